"""dream/templates.py, dream/template*.py and dream/scenarios.py: what a template file may be, and what it draws."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dream import template_new
from dream.cli import app
from dream.errors import ConfigError, TemplateError
from dream.records import SIDES
from dream.scenarios import STANCES, draw, eval_pairs, plan
from dream.template import FrontMatter
from dream.template_audit import advice, direction_auc, refuse_leaks
from dream.templates import Template, examine, load, load_all, mentioned, selected

SHIPPED = sorted((Path(__file__).parent.parent / "prompts" / "scenarios").glob("*.j2"))

shipped = cache(load)


@pytest.fixture
def refused(tmp_path: Path, template_text: Callable[..., str]) -> Callable[[str, str], str]:
    """Loads the tiny template with one text replaced, which must fail, and gives the message after the path."""

    def try_to_load(old: str, new: str) -> str:
        text = template_text("broken")
        assert old in text
        path = tmp_path / "broken.j2"
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(TemplateError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}:")
        return message.removeprefix(str(path))

    return try_to_load


def line_of(text: str, part: str) -> int:
    """The number of the first line that holds `part`."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_template_renders(path: Path) -> None:
    """Every shipped template loads and makes a scenario with text on all of its sides."""
    template = shipped(path)
    for seed in range(5, 9):  # loading looks at the first five
        scenario = draw(template, seed, "s")
        assert scenario.sides == (("clear",) if template.general else SIDES)
        for side in scenario.sides:
            assert scenario.prompt(side)[0]["content"].strip()
            assert all(scenario.side(side).aims[stance] for stance in STANCES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_examples_speak_of_the_situation(path: Path) -> None:
    """Every worked reply of a shipped template holds the words that its `mentions` ask for, in many draws."""
    template = shipped(path)
    for seed in range(5, 9):  # loading looks at the first five
        scenario = draw(template, seed, "s")
        for side in scenario.sides:
            for stance in STANCES:
                wanted = scenario.side(side).mentions[stance]
                for reply in scenario.side(side).examples[stance]:
                    assert [words for words in wanted if not mentioned(words, reply)] == []


def test_load_all_needs_a_template(tmp_path: Path) -> None:
    """A folder without templates is refused."""
    with pytest.raises(TemplateError):
        load_all(tmp_path)


@pytest.mark.parametrize("text", ["", "no head", "---\nname: x\n", "name: x\n---\n"])
def test_front_matter_is_needed(tmp_path: Path, text: str) -> None:
    """A file without a YAML head is refused at its first line."""
    path = tmp_path / "x.j2"
    path.write_text(text)
    with pytest.raises(TemplateError, match=r"x\.j2:1: no front matter"):
        load(path)


@pytest.mark.parametrize("block", ["situation", "clear", "flawed", "comply", "push_back", "comply_examples"])
def test_missing_block_is_named(refused, block: str) -> None:
    """A block that is missing is named, with how to write it."""
    assert re.match(rf":\d+: block {block} is missing; add ", refused(f"block {block} %}}", "block extra %}"))


def test_unknown_block_is_named_with_its_line(refused, template_text) -> None:
    """A block of another name is refused at its line."""
    message = refused("{% block clear %}", "{% block clear %}{% endblock %}\n{% block spare %}")
    assert message.startswith(f":{line_of(template_text('broken'), 'block clear') + 1}: unknown block spare")


@pytest.mark.parametrize("name", ["unheard", "clear_text"])
def test_undefined_variable_is_named_with_its_line(refused, template_text, name: str) -> None:
    """A variable that no slot defines is refused at the line that uses it."""
    message = refused("Write the label with", f"Write the label with {{{{ {name} }}}}")
    line = line_of(template_text("broken"), "Write the label with")
    assert message.startswith(f":{line}: block comply uses '{name}'")


@pytest.mark.parametrize("bad", ["{{ good ", "{% if good %}", "{{ good | nofilter }}", "{% endblock %}"])
def test_broken_jinja_is_named_with_its_line(refused, template_text, bad: str) -> None:
    """Broken Jinja is refused at a line inside or right after the block it is in."""
    line = int(refused("Write the label with", f"{bad} Write the label with").split(":")[1])
    start = line_of(template_text("broken"), "Write the label with")
    assert start <= line <= start + 1


@pytest.mark.parametrize("bad", ["domains: [writing", "domains: 'writing", "domains: a: b"])
def test_broken_yaml_is_named_with_its_line(refused, template_text, bad: str) -> None:
    """Broken YAML is refused at its line, or at the next one where only that shows it."""
    message = refused("domains: [writing]", bad)
    line = line_of(template_text("broken"), "domains:")
    assert "broken YAML" in message
    assert line <= int(message.split(":")[1]) <= line_of(template_text("broken"), "mentions:") + 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: broken", "name: other", "make them the same"),
        ("split: train", "split: trial", "split"),
        ("domains: [writing]", "domains: []", "domains"),
        ("domains: [writing]", "domains: [writing]\ncolour: red", "colour"),
        ("description: A label has to quote the stock list.\n", "", "description"),
        ("good: [lamps, chairs, kettles, tents, mugs]", "good: lamps", "slots.good"),
        ("good: [lamps, chairs, kettles, tents, mugs]", "good: []", "slots.good"),
        ("good: [lamps, chairs, kettles, tents, mugs]", "good: {rnge: [1, 2]}", "slots.good"),
        ("n: {range: [20, 900]}", "n: {range: [20]}", "slots.n"),
        ("n: {range: [20, 900]}", "n: {range: [20, 900], step: 0}", "slots.n"),
        ("n: {range: [20, 900]}", "n: {range: [900, 20]}", "slots.n"),
        ("n: {range: [20, 900]}", "n: {from: nowhere}", "slots.n"),
        ("n: {range: [20, 900]}", "n: {from: [good]}", "slots.n"),
        ("n: {range: [20, 900]}", "n: {expr: 1 +}", "slots.n"),
        ("m: {range: [20, 900], not: n}", "m: {range: [20, 900], not: k}", "slots.m"),
        ("m: {range: [20, 900], not: n}", "m: {range: [20, 900], not: 5}", "slots.m"),
        ("m: {range: [20, 900], not: n}", "m: {range: [20, 900], not: }", "slots.m"),
        ("m: {range: [20, 900], not: n}", "m: {range: [20, 900], not: [[n]]}", "slots.m"),
        ("good: [lamps", "spare: [a, b]\n  good: [lamps", "slots.spare is used nowhere"),
        (', claimed: "{{ m }}"}', "}", "'claimed' is given for one side only"),
        ('comply: ["{{ said }}"', 'comply: ["{{ sad }}"', "sad"),
        ('comply: ["{{ said }}"', 'comply: ["{{ said"', "{{ said"),
        ('comply: ["{{ said }}"', 'comply: ["seldom said"', "lacks 'seldom said'"),
        ('said: "{{ m }}"', 'said: "{{ n }}"', "clear and flawed are equal"),
        ("{% block flawed %}\nWrite a label that says", "{% block flawed %}\nThrow all of it out:", "share too few"),
        ("By the list we have {{ claimed }}, so I would not print {{ said }}.\n", "", "at least 3"),
        ("Write the label with {{ said }} {{ good }}.", "", "renders to nothing"),
    ],
)  # fmt: skip
def test_bad_template_is_refused(refused, old: str, new: str, said: str) -> None:
    """A mistake in a template is refused on loading with the file and the key or block it is in."""
    assert said in refused(old, new)


@pytest.mark.parametrize(
    "bad",
    ["{{ good.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ self.__init__.__globals__ }}", "{{ good.append }}",
     "{{ cycler.__init__.__globals__ }}", "{% include 'other' %}"],
)  # fmt: skip
def test_sandbox_refuses_attribute_access(refused, template_text, bad: str) -> None:
    """A template cannot reach Python's insides or other files; the error names the line."""
    message = refused("Write the label with", f"{bad} Write the label with")
    assert int(message.split(":")[1]) == line_of(template_text("broken"), "Write the label with")


@pytest.mark.parametrize(
    "bad",
    ["{% for i in range(99999) %}more and more {% endfor %}", "{% for i in range(10 ** 9) %}.{% endfor %}",
     "{{ 'x' * 5000 }}"],
)  # fmt: skip
def test_endless_output_is_refused(refused, bad: str) -> None:
    """A block that renders to more than a few thousand characters is refused."""
    assert "block comply" in refused("Write the label with", f"{bad} Write the label with")


def test_endless_front_matter_is_refused(refused) -> None:
    """A value of the front matter is bounded like a block is."""
    refused('push_back: ["{{ said }}"', "push_back: [\"x|{{ 'x' * 5000 }}|{{ said }}\"")


@given(seed=st.integers(0, 2**31))
def test_same_seed_same_draw(tiny_seeded: list[Template], seed: int) -> None:
    """The same seed draws the same scenario, and what differs between the sides is only the number that is said."""
    one, other = (draw(tiny_seeded[0], seed, "s") for _ in range(2))
    assert one == other
    words = [one.side(side).direction.replace(one.side(side).mentions["comply"][0], "#") for side in SIDES]
    assert words[0] == words[1]
    assert one.clear.direction != one.flawed.direction


@pytest.fixture(scope="session")
def tiny_seeded(tmp_path_factory: pytest.TempPathFactory, template_text) -> list[Template]:
    """One tiny template that lives as long as the session, for property tests."""
    path = tmp_path_factory.mktemp("templates") / "seeded.j2"
    path.write_text(template_text("seeded"))
    return [load(path)]


def test_other_seeds_give_other_draws(tiny_templates: list[Template]) -> None:
    """Different seeds, and different templates with one seed, do not draw the same numbers again and again."""
    draws = {(t.name, draw(t, seed, "s").situation) for t in tiny_templates for seed in range(5)}
    assert len(draws) == 20


def test_hash_is_that_of_the_content(tmp_path: Path, template_text) -> None:
    """The recorded hash changes with any character of the file and with nothing else."""
    path = tmp_path / "one.j2"
    path.write_text(template_text("one"))
    first = load(path).hash
    assert load(path).hash == first
    path.write_text(template_text("one") + "{# a remark #}\n")
    assert load(path).hash != first


def test_general_template_has_one_side(tiny_templates: list[Template]) -> None:
    """A general template draws a clear side only, with worked replies of both stances."""
    scenario = draw(tiny_templates[-1], 1, "s")
    assert scenario.sides == ("clear",)
    assert scenario.flawed is None
    assert [len(scenario.clear.examples[stance]) for stance in STANCES] == [3, 3]


@given(seed=st.integers(0, 1000), passes=st.integers(1, 5))
def test_plan_is_balanced_over_flaws(tiny_pool: list[Template], seed: int, passes: int) -> None:
    """Every pass of a plan visits each kind of flaw once, however many templates a kind has."""
    planned = list(islice(plan(tiny_pool, seed), 2 * passes))
    assert Counter(t.front.flaw for t, _ in planned) == {"one": passes, "two": passes}
    assert planned == list(islice(plan(tiny_pool, seed), 2 * passes))


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory: pytest.TempPathFactory, template_text) -> list[Template]:
    """Three templates of two flaws."""
    folder = tmp_path_factory.mktemp("pool")
    for name, flaw in (("a", "one"), ("b", "one"), ("c", "two")):
        (folder / f"{name}.j2").write_text(template_text(name, flaw))
    return load_all(folder)


def test_eval_pairs_hold_both_sides(tiny_templates: list[Template]) -> None:
    """Evaluation pairs come in twos, clear and flawed, with a reply of each stance, never from a general template."""
    rows = eval_pairs(tiny_templates, 6, seed=3)
    assert [row.side for row in rows] == ["clear", "flawed"] * 6
    assert len({row.pair_id for row in rows}) == 6
    assert all(row.comply != row.push_back for row in rows)
    assert rows == eval_pairs(tiny_templates, 6, seed=3)


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("12", "we sold 12 lamps", True),
        ("12", "we sold 120 lamps", False),
        ("Lamps", "we sold 12 lamps", True),
        ("chairs|lamps", "we sold 12 lamps", True),
        ("1.5", "about 145 of them", False),
        ("a+b", "it is a+b.", True),
    ],
)
def test_mentioned_looks_for_whole_words(words: str, text: str, expected: bool) -> None:
    """A mention is whole words, any of the alternatives, whatever the case."""
    assert mentioned(words, text) is expected


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("good: [lamps,", "good: [on,", 'slots.good.0: YAML reads on as True; put it in quotes: "on"'),
        ("good: [lamps,", "good: [true,", 'slots.good.0: YAML reads true as True; put it in quotes: "true"'),
        ("good: [lamps,", "good: [012,", 'slots.good.0: YAML reads 012 as 10; put it in quotes: "012"'),
        ("  good: [lamps", "  off: [a]\n  good: [lamps", 'slots.off: YAML reads off as False; put it in quotes: "off"'),
        ("good: [lamps,", "good: ['',", "slots.good.0 is empty"),
        ("good: [lamps,", "good: [{a: 1},", "slots.good: a value is a text or a number"),
        ("  n: {", "  x: []\n  n: {", "slots.x is empty"),
        ("  n: {", "  x:\n  n: {", "slots.x is empty"),
        ("  n: {", "  good: [a]\n  n: {", "slots.good is given twice"),
        ("  n: {", "  my-x: [a]\n  n: {", "slots.my-x: 'my-x' is no name that a block can use"),
        ("  n: {", "  side: [a]\n  n: {", "slots.side: 'side' is the name of the side itself"),
        ("  n: {", "  x: {expr: nn + 1}\n  n: {", "slots.x: expr uses 'nn', which no slot above"),
        ("  n: {", "  x: {expr: '1', not: good}\n  n: {", "slots.x: unknown key 'not'; beside expr"),
        ("  n: {", "  x: {range: [1, 2], from: good}\n  n: {", "slots.x: expected a list, or a mapping with one of"),
        ('said: "{{ n }}"', "said: {{ n }}", "found unhashable key; put Jinja in quotes"),
        ('said: "{{ n }}"', 'said: "{{ n }"', "two brackets on each side"),
        ('said: "{{ n }}"', 'said: "{ n }"', "'{ n }' is plain text; write {{ n }}"),
        ('said: "{{ n }}"', "said: { n: 1 }", "sides.clear.said: expected a text in quotes"),
        ('said: "{{ n }}"', 'said: "{{ claimed }}"', "sides.clear.said: uses 'claimed', which no slot defines"),
        ('said: "{{ n }}"', 'said: ""', "sides.clear.said is empty"),
        ("clear: {said", 'clear: {spare: "a", said', "sides.clear.spare: 'spare' is given for one side only"),
        ('comply: ["{{ said }}"', 'comply: [""', "mentions.comply.0 is empty"),
        ('comply: ["{{ said }}"', 'comply: ["{{ sad }}"', "mentions.comply.0: uses 'sad'"),
        ("Write the label with {{", "Write the label with {", "block comply: '{ said }}' is plain text"),
        ("domains: [writing]", "domains: [writing]\nmirror: [[n, k]]", "mirror: 'k' is no slot that is drawn"),
        ("domains: [writing]", "domains: [writing]\nmirror: [[good, good]]", "mirror: block clear on the clear side"),
    ],
)  # fmt: skip
def test_mistake_is_named_with_its_line(refused, template_text, old: str, new: str, said: str) -> None:
    """A mistake is refused at a line that it made, with what is wrong."""
    message = refused(old, new)
    text = template_text("broken")
    first = text.count("\n", 0, text.index(old)) + 1
    assert said in message
    assert first <= int(message.split(":")[1]) <= first + new.count("\n")


def test_general_template_has_no_other_side(tmp_path: Path, template_text) -> None:
    """What only a contrast template has is refused in a general one."""
    path = tmp_path / "plain.j2"
    text = template_text("plain", "none").replace("sides:", "mirror: [[n, m]]\nsides:\n  flawed: {said: '1'}")
    path.write_text(text)
    assert [problem.split(": flaw is none")[0] for problem in examine(path)[1]] == [
        f"{path}:{line_of(text, 'flawed:')}: sides.flawed",
        f"{path}:{line_of(text, 'mirror:')}: mirror",
    ]


def test_all_problems_are_found_at_once(tmp_path: Path, template_text) -> None:
    """Problems that do not depend on each other are all reported; `load` raises the first."""
    path = tmp_path / "broken.j2"
    text = (
        template_text("broken")
        .replace("split: train", "split: trial")
        .replace("lamps", "on")
        .replace("{% block f", "{%")
    )
    path.write_text(text)
    problems = examine(path)[1]
    assert [int(problem.removeprefix(f"{path}:").split(":")[0]) for problem in problems] == [
        line_of(text, part) for part in ("[on", "trial", "{%lawed")
    ]
    with pytest.raises(TemplateError, match=re.escape(problems[0])):
        load(path)


def test_mirror_that_cannot_be_computed_is_refused(tmp_path: Path, template_text) -> None:
    """An expression that fails with the mirrored values is a problem of the template, not a crash."""
    text = template_text("broken").replace("sides:", "mirror: [[n, m]]\nsides:")
    text = text.replace("mentions:", "mentions:").replace("\nmirror", '\n  q: {expr: "1 // (n - n0)"}\nmirror')
    text = text.replace("  n: {", "  n0: [7]\n  n: {range: [8, 9]}\n  m: [7]\n  unused: {", 1)
    path = tmp_path / "broken.j2"
    path.write_text(re.sub(r"  unused.*\n  m: .*\n", "", text).replace("in the store.", "in the store {{ q }}."))
    assert any("cannot compute '1 // (n - n0)'" in problem for problem in examine(path)[1])


@pytest.fixture
def counselled(tmp_path: Path, template_text) -> Callable[..., list[str]]:
    """The advice on mirrored templates with three wordings and shared openers, of which one has texts replaced."""

    def advise(*changes: tuple[str, str], flaw: str = "spare") -> list[str]:
        lines = "{% if k == 1 %}\nPlease write{% elif k == 2 %}\nNow write{% else %}\nWrite{% endif %}"
        good = template_text("one", "false_premise").replace("sides:", "  k: [1, 2, 3]\nmirror: [[n, m]]\nsides:")
        good = good.replace("\nWrite a", f"\n{lines} a").replace("The list gives", "We have")
        text = good
        for old, changed in changes:
            assert old in text
            text = text.replace(old, changed)
        (tmp_path / "one.j2").write_text(text)
        other = good.replace("name: one", "name: other").replace("false_premise", flaw).replace("train", "heldout")
        (tmp_path / "other.j2").write_text(other)
        return [line.removeprefix(f"{tmp_path}/") for line in advice(load_all(tmp_path))]

    return advise


def test_good_templates_need_no_advice(counselled) -> None:
    """Nothing is said of templates that follow all advice."""
    assert counselled() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("mirror: [[n, m]]\n", "")], "one.j2:12: no mirror"),
        ([("We have {{ claimed", "No, {{ claimed"), ("By the", "The")], "begin with the same word"),
        ([("Here you are: ", "Here you are, with many thanks for all of your patience and your trust: "),
          ("We have {{ said", "We have, as you have surely heard by now from all of us and all our friends, {{ said"),
          ("ready to take home", "ready to take home in a bag of yours or of ours")], "words (comply)"),
        ([("Now write", "Please write")], "the direction is worded in 2 ways"),
        ([("Now write", "Write"), ("Please write", "Write")], "the direction is worded in 1 way;"),
    ],
)  # fmt: skip
def test_advice_names_what_weakens_training(counselled, changes: list[tuple[str, str]], said: str) -> None:
    """A template that is valid but weak gets one line of advice, with its file and line."""
    [line] = counselled(*changes)
    assert said in line
    assert re.match(r"one\.j2:\d+: ", line)


def test_kind_that_is_trained_and_held_out_is_advised_against(counselled) -> None:
    """A held-out template whose kind of flaw is trained as well measures nothing new."""
    [line] = counselled(flaw="false_premise")
    assert re.fullmatch(r"other\.j2:4: false_premise is held out here and trained in one; .*", line)


def test_shipped_templates_need_no_advice() -> None:
    """The templates of the package follow all advice, and so does the starting point of a new one."""
    assert advice([shipped(path) for path in SHIPPED]) == []


@pytest.fixture
def leaking(tmp_path: Path, template_text) -> Callable[[str], list[Template]]:
    """Three training templates and a held-out one whose flawed direction has a word that the clear one has not."""

    def make(word: str) -> list[Template]:
        for name, split in (("a", "train"), ("b", "train"), ("c", "train"), ("kept", "heldout")):
            text = template_text(name, split, split)
            head, flawed = text.split("{% block flawed %}")
            (tmp_path / f"{name}.j2").write_text(f"{head}{{% block flawed %}}{flawed.replace('a label', word, 1)}")
        return load_all(tmp_path)

    return make


def test_direction_that_gives_itself_away_is_refused(leaking) -> None:
    """A word that only flawed directions have is found in both measures, and named with the templates."""
    measured = direction_auc(leaking("a quick label"))
    assert [(result.auc, result.over) for result in measured] == [(1.0, True), (1.0, True)]
    with pytest.raises(TemplateError, match=r"AUC 1.00 .*OVER .*quick.* points to flawed \(a, b, c\)"):
        refuse_leaks(measured)


def test_direction_that_gives_nothing_away_passes(leaking) -> None:
    """Directions that differ in a random number are near chance, with an interval around the figure."""
    measured = direction_auc(leaking("a label"))
    refuse_leaks(measured)
    for result in measured:
        low, high = result.interval
        assert low <= result.auc <= high < 0.65
    assert direction_auc(leaking("a label")) == measured


def test_auc_needs_both_parts(leaking) -> None:
    """Without held-out or without training templates the measure says so."""
    templates = leaking("a label")
    assert [result.auc is None for result in direction_auc(templates[:3])] == [True, False]
    assert [result.reason for result in direction_auc(templates[3:])] == ["no contrast template to train on"] * 2


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without prompts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_new_template_copies_the_prompts(elsewhere: Path) -> None:
    """The first new template of a folder brings the package's prompts along, all of them and nothing else."""
    path = template_new.new("my-own")
    assert path == elsewhere / "prompts" / "scenarios" / "my-own.j2"
    package = SHIPPED[0].parent.parent
    copied = {file.relative_to(elsewhere / "prompts") for file in (elsewhere / "prompts").rglob("*")}
    assert copied == {file.relative_to(package) for file in package.rglob("*")} | {Path("scenarios/my-own.j2")}
    assert [file.name for file in elsewhere.iterdir()] == ["prompts"]
    assert advice([load(path)]) == []


@pytest.mark.parametrize("name", ["a", "on", "12", "1-2", "null", "-", "a-b-c-9"])
def test_new_template_is_valid(elsewhere: Path, name: str) -> None:
    """Whatever its name, a new template loads and explains every key and block in a comment."""
    (elsewhere / "prompts" / "scenarios").mkdir(parents=True)
    (elsewhere / "prompts" / "new_template.j2").write_text((SHIPPED[0].parent.parent / "new_template.j2").read_text())
    path = template_new.new(name)
    assert load(path).name == name
    head, blocks = path.read_text().split("\n---\n")
    assert [key for key in FrontMatter.model_fields if not re.search(rf"^{key}:.*#", head, re.MULTILINE)] == []
    assert blocks.count("{#") == 5


@pytest.mark.parametrize("name", ["", "My-Own", "my_own", "../own", "own.j2", "é", "own\n", "sales-sheet"])
def test_new_template_is_refused(elsewhere: Path, name: str) -> None:
    """A name that is no name or is taken is refused, and nothing is written."""
    with pytest.raises(TemplateError, match=r"small letters, digits and hyphens|exists"):
        template_new.new(name)
    assert list(elsewhere.iterdir()) == []


def test_check_shows_every_problem_and_advice(tmp_path: Path, template_text) -> None:
    """`dream templates check` prints all problems of all files, and advice that does not fail it."""
    good, bad = tmp_path / "good.j2", tmp_path / "bad.j2"
    good.write_text(template_text("good"))
    result = CliRunner().invoke(app, ["templates", "check", str(good)])
    assert result.exit_code == 0
    assert f"advice: {good}:11: no mirror" in result.stdout
    bad.write_text(template_text("bad").replace("split: train", "split: trial\ncolour: red"))
    result = CliRunner().invoke(app, ["templates", "check", str(bad), str(good)])
    assert str(result.exception) == "1 of 2 templates are wrong"
    assert [line.split(":")[2] for line in result.stderr.splitlines()] == ["6", "7"]
    assert "ok good" in result.stdout


def test_check_of_all_takes_no_files(tmp_path: Path) -> None:
    """`--all` with files is refused, since it is the whole library that it measures."""
    result = CliRunner().invoke(app, ["templates", "check", "--all", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)


def test_check_of_all_refuses_a_leak(leaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--all` shows the figures of the library and fails when a direction gives its side away."""
    leaking("a quick label")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "scenarios").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["templates", "check", "--all"])
    assert isinstance(result.exception, TemplateError)
    assert "4 templates (0 general), 2 kinds of flaw, 1 of them held out, 1 domains" in result.stdout
    assert result.stdout.count("AUC 1.00 [1.00, 1.00], OVER the bound 0.65") == 2


@given(
    start=st.integers(0, 1600),
    length=st.integers(0, 12),
    text=st.text("{}[]%:\"'#-\n &*|~aon1.", max_size=8),
)
def test_damaged_file_is_one_line_a_problem(scratch: Path, template_text, start: int, length: int, text: str) -> None:
    """Whatever is written into a template, it loads, or each problem is one line with the file and a line number."""
    good = template_text("scratch")
    scratch.write_text(good[:start] + text + good[start + length :])
    template, problems = examine(scratch)
    assert (template is None) == bool(problems)
    for problem in problems:
        assert re.fullmatch(rf"{re.escape(str(scratch))}:\d+: .+", problem)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for property tests to write to."""
    return tmp_path_factory.mktemp("scratch") / "scratch.j2"


@pytest.mark.parametrize("style", [1, 2, 3, 4, 5, 6, 7, 8])
def test_fault_in_one_branch_is_found(tmp_path: Path, template_text: Callable[..., str], style: int) -> None:
    """Every value of a short list is drawn by the check, so a fault that only one of them shows is found."""
    path = tmp_path / "branches.j2"
    fault = f"in the store.{{% if style == {style} %}}{{{{ 7 // 0 }}}}{{% endif %}}"
    path.write_text(
        template_text("branches")
        .replace("  good:", "  style: [1, 2, 3, 4, 5, 6, 7, 8]\n  good:")
        .replace("in the store.", fault)
    )
    with pytest.raises(TemplateError, match="block situation"):
        load(path)


def test_run_works_with_the_named_templates(tiny_templates: list[Template]) -> None:
    """Named ones alone are trained on; held-out and general ones stay, and no name means all."""
    assert selected(tiny_templates, []) == tiny_templates
    assert [one.name for one in selected(tiny_templates, ["memo"])] == ["memo", "kept", "plain"]


@pytest.mark.parametrize(("name", "hint"), [("stok", "did you mean 'stock'"), ("kept", "there are"), ("zzz", "stock")])
def test_name_of_no_trained_template_is_refused(tiny_templates: list[Template], name: str, hint: str) -> None:
    """A typing error, a held-out template: the key and a way out."""
    with pytest.raises(ConfigError, match=f"generate.templates: .*'{name}'.*{hint}"):
        selected(tiny_templates, [name])
