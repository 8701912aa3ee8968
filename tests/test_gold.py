"""dream/judge/gold.py: the gold set that the judge is calibrated and tested on."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.errors import DataError
from dream.judge.gold import GeneralReply, GoldReply, halves, read_gold
from dream.judge.question import Labelled, Question
from dream.records import Scenario, user
from dream.scenarios import draw
from dream.store import read_log
from dream.templates import Template

PROMPTS = Path(__file__).parent.parent / "prompts"
TRAPS = {
    "agrees_then_refuses", "announces_only", "comply_with_warning", "comply_words_in_refusal", "corrected_silently",
    "correction_without_apology", "echo", "in_character", "needless_question", "off_topic", "quotes_request",
    "refusal_words_in_compliance", "small_model", "sure_but", "terse", "wordy",
}  # fmt: skip
"""What fools a judge that goes by the sound of a reply."""


@pytest.fixture(scope="module")
def everything() -> list[tuple[GoldReply | GeneralReply, Labelled]]:
    """The gold set that is shipped."""
    return read_gold(PROMPTS / "gold")


@pytest.fixture(scope="module")
def gold(everything: list) -> list[tuple[GoldReply, Labelled]]:
    """Its replies to scenarios."""
    return [(row, labelled) for row, labelled in everything if isinstance(row, GoldReply)]


@pytest.fixture(scope="module")
def general(everything: list) -> list[tuple[GeneralReply, Labelled]]:
    """Its replies to requests of all kinds."""
    return [(row, labelled) for row, labelled in everything if isinstance(row, GeneralReply)]


@pytest.fixture(scope="module")
def scenarios() -> dict[str, Scenario]:
    """Its scenarios by their ids."""
    return {one.scenario_id: one for one in read_log(PROMPTS / "gold" / "scenarios.jsonl", Scenario)}


@pytest.fixture
def write(tmp_path: Path, tiny_templates: list[Template]) -> Callable[..., Path]:
    """A gold folder of two scenarios, one of them general, with these replies."""

    def build(*replies: dict[str, str]) -> Path:
        drawn = [draw(tiny_templates[place], 1, name) for place, name in ((0, "two-sided"), (-1, "general"))]
        (tmp_path / "scenarios.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in drawn))
        (tmp_path / "replies.jsonl").write_text("".join(json.dumps(one) + "\n" for one in replies))
        return tmp_path

    return build


def reply(scenario_id: str = "two-sided", side: str = "clear", **changes: str) -> dict[str, str]:
    """A row of replies.jsonl."""
    row = {"scenario_id": scenario_id, "side": side, "response": "Done.", "label": "comply", "trait": "terse"}
    return row | changes


def test_gold_is_large_enough(gold: list) -> None:
    """The gold set has 300 replies to scenarios or more, all stances well among them, and no reply twice."""
    assert len(gold) >= 300
    assert min(Counter(row.label for row, _ in gold).values()) >= 60
    rows = Counter((row.scenario_id, row.side, row.response) for row, _ in gold)
    assert [row for row, count in rows.items() if count > 1] == []


def test_general_gold_is_large_enough(general: list) -> None:
    """Replies to other requests are a hundred or more, with all stances among them, and no reply twice."""
    assert len(general) >= 100
    assert set(Counter(row.label for row, _ in general)) == {"comply", "push_back", "neither"}
    rows = Counter((row.prompt, row.response) for row, _ in general)
    assert [row for row, count in rows.items() if count > 1] == []


def test_a_request_does_not_tell_the_stance(general: list) -> None:
    """Nearly every request of the general gold is complied with in one reply and pushed back on in another."""
    labels: dict[str, set[str]] = defaultdict(set)
    for row, _ in general:
        labels[row.prompt].add(row.label)
    both = [prompt for prompt, found in labels.items() if {"comply", "push_back"} <= found]
    assert len(both) > 0.8 * len(labels)


def test_general_questions_know_nothing_but_the_request(general: list) -> None:
    """A question about a reply from elsewhere has no aims, mentions or worked replies, and is grouped by its prompt."""
    for row, labelled in general:
        assert labelled == Labelled(Question([user(row.prompt)], row.response), row.label, row.prompt)


@pytest.mark.parametrize("name", ["scenarios", "replies", "general"])
def test_gold_files_end_in_a_newline(name: str) -> None:
    """A last line without its newline would be taken for a torn one and left out without a word."""
    assert (PROMPTS / "gold" / f"{name}.jsonl").read_bytes().endswith(b"}\n")


def test_every_template_has_gold(gold: list, scenarios: dict[str, Scenario]) -> None:
    """The replies answer scenarios of all templates there are, and of no others; every scenario has a reply."""
    answered = {row.scenario_id for row, _ in gold}
    assert answered == set(scenarios)
    names = {path.stem for path in (PROMPTS / "scenarios").glob("*.j2")}
    assert {one.template for one in scenarios.values()} == names


def test_both_stances_on_every_side(gold: list, scenarios: dict[str, Scenario]) -> None:
    """The side of a scenario does not tell the stance: each has both on each side of every template."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row, _ in gold:
        found[scenarios[row.scenario_id].template, row.side].add(row.label)
    assert {place for place, labels in found.items() if not {"comply", "push_back"} <= labels} == set()
    wanted = {(one.template, side) for one in scenarios.values() for side in one.sides}
    assert set(found) == wanted


def test_every_trap_is_set_often(gold: list) -> None:
    """Every trap stands in the gold set at least eight times, so that falling into it shows in the figures."""
    count = Counter(row.trait for row, _ in gold)
    assert {trait for trait in TRAPS | set(count) if count[trait] < 8} == set()


@pytest.mark.parametrize(
    ("trait", "label"),
    [
        ("agrees_then_refuses", "push_back"),
        ("comply_words_in_refusal", "push_back"),
        ("refusal_words_in_compliance", "comply"),
        ("comply_with_warning", "comply"),
        ("announces_only", "neither"),
        ("off_topic", "neither"),
        ("echo", "neither"),
    ],
)
def test_traps_have_their_stance(gold: list, trait: str, label: str) -> None:
    """What a trap is made of decides its label: the rule that a labeller follows, in one place."""
    assert {row.response: row.label for row, _ in gold if row.trait == trait and row.label != label} == {}


def test_questions_know_their_scenario(gold: list, scenarios: dict[str, Scenario]) -> None:
    """Each question is about the reply's own side, with its aims, mentions and worked replies."""
    for row, labelled in gold:
        side = scenarios[row.scenario_id].side(row.side)
        question = labelled.question
        assert (question.reply, labelled.label, labelled.group) == (row.response, row.label, row.scenario_id)
        assert side.direction in question.asked
        assert (question.aims, question.mentions, question.examples) == (side.aims, side.mentions, side.examples)


def test_shipped_halves_are_alike(everything: list) -> None:
    """Both halves have all stances and between two and three fifths of the replies."""
    examples = [labelled for _, labelled in everything]
    for half in halves(examples):
        assert 0.4 < len(half) / len(examples) < 0.6
        assert min(Counter(one.label for one in half).values()) > 20


@given(groups=st.lists(st.integers(0, 9).map(str), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_halves_never_split_a_scenario(groups: list[str], seed: int) -> None:
    """Every reply is in one half, all replies to a scenario in the same, and the halves' scenarios differ by one."""
    examples = [Labelled(Question([user("x")], str(n)), "comply", group) for n, group in enumerate(groups)]
    first, second = halves(examples, seed)
    assert sorted(one.question.reply for one in first + second) == sorted(one.question.reply for one in examples)
    one, other = {example.group for example in first}, {example.group for example in second}
    assert not one & other
    assert len(other) - len(one) in (0, 1)
    assert (first, second) == halves(examples, seed)


def test_gold_of_a_folder(write: Callable[..., Path]) -> None:
    """The rows come in the order of the file."""
    found = read_gold(write(reply(), reply(side="flawed", label="push_back"), reply("general")))
    assert [(row.scenario_id, row.side, labelled.label) for row, labelled in found] == [
        ("two-sided", "clear", "comply"),
        ("two-sided", "flawed", "push_back"),
        ("general", "clear", "comply"),
    ]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (reply("elsewhere"), "no clear side of scenario 'elsewhere'"),
        (reply("general", "flawed"), "no flawed side of scenario 'general'"),
        (reply(label="agree"), "label: "),
        (reply(side="sunny"), "side: "),
        (reply(note="x"), "note: "),
    ],
)
def test_bad_gold_names_line_and_key(write: Callable[..., Path], bad: dict[str, str], words: str) -> None:
    """A row that is malformed, or names a side that is not there, is refused with file and line."""
    with pytest.raises(DataError) as caught:
        read_gold(write(reply(), bad))
    assert "replies.jsonl:2: " in str(caught.value)
    assert words in str(caught.value)


def test_empty_gold_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    """A folder without gold replies is refused, with a word on where they are to be had."""
    with pytest.raises(DataError, match="no gold replies; copy prompts/gold"):
        read_gold(write())
    with pytest.raises(DataError, match="no gold replies"):
        read_gold(tmp_path / "absent")
