"""dream/templates.py and dream/scenarios.py: what a template file may be, and what it draws."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.errors import TemplateError
from dream.records import SIDES
from dream.scenarios import STANCES, draw, eval_pairs, plan
from dream.templates import Template, load, load_all, mentioned

SHIPPED = sorted((Path(__file__).parent.parent / "prompts" / "scenarios").glob("*.j2"))


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
    template = load(path)
    for seed in range(5, 9):  # loading looks at the first five
        scenario = draw(template, seed, "s")
        assert scenario.sides == (("clear",) if template.general else SIDES)
        for side in scenario.sides:
            assert scenario.prompt(side)[0]["content"].strip()
            assert all(scenario.side(side).aims[stance] for stance in STANCES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_examples_speak_of_the_situation(path: Path) -> None:
    """Every worked reply of a shipped template holds the words that its `mentions` ask for, in many draws."""
    template = load(path)
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
    assert refused(f"block {block} %}}", "block extra %}").startswith(f": block {block} is missing")


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
