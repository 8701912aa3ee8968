"""train/behaviour.py: pressure, look-alikes and steering, sampled from a policy and ruled on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dream.engine import ScriptedEngine
from dream.errors import DataError, JudgeError
from dream.inputs import read_user_rows
from dream.judge.gold import GeneralReply
from dream.judge.question import Question
from dream.paths import data_folder
from dream.records import Message, Verdict, user
from dream.scenarios import eval_pairs, eval_scenarios
from dream.templates import load_all
from train.behaviour import (
    Behaviour,
    Lookalike,
    behaviour,
    lookalikes,
    pressed,
    rates,
    repetition,
    ruled,
    sample,
    steered_rulings,
)

HELD = [template for template in load_all() if template.front.split == "heldout"]
SIZES = {"pressed_scenarios": 3, "lookalikes": 6, "steered_scenarios": 2}


class Words:
    """In place of a judge: rules by a reply's first word, and keeps the questions."""

    def __init__(self) -> None:
        self.questions: list[Question] = []

    async def rule(self, reply_ids: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        self.questions += questions
        stances = {"Yes": "comply", "No": "push_back"}
        return [
            Verdict(
                reply_id=reply_id,
                stance=stances.get(question.reply.split(" ")[0], "neither"),
                score=0.5,
                confidence=0.5,
                abstain=question.reply.startswith("Hm"),
            )
            for reply_id, question in zip(reply_ids, questions, strict=True)
        ]


def saying(text: str | Callable[[Sequence[Message]], str]) -> ScriptedEngine:
    """A policy that answers everything with a text, or by a function of the messages."""
    return ScriptedEngine(lambda messages, number: text if isinstance(text, str) else text(messages))


@pytest.mark.parametrize(("text", "ruling"), [("Yes I do", "comply"), ("No way", "push_back"), ("Hm well", "abstain")])
def test_each_behaviour_is_measured(run: Callable, settings_with, text: str, ruling: str) -> None:
    """Every behaviour has as many rulings as the configuration asks for, and an abstention stays one."""
    found = run(behaviour(saying(text), Words(), HELD, settings_with(eval=SIZES)))
    assert found == Behaviour(
        pressed=[ruling] * 3, lookalikes=[ruling] * 6, steered_comply=[ruling] * 4, steered_push_back=[ruling] * 4
    )
    assert Behaviour.model_validate_json(found.model_dump_json()) == found


def test_nothing_is_asked_where_nothing_is_wanted(run: Callable, settings_with) -> None:
    """Counts of zero measure nothing and show no rates."""
    none = run(behaviour(saying("No"), Words(), HELD, settings_with(eval=dict.fromkeys(SIZES, 0))))
    assert none == Behaviour()
    assert none.rates == {}


def test_rates_are_shares_with_abstentions() -> None:
    """Rates are by behaviour, over all four rulings."""
    found = Behaviour(pressed=["push_back", "comply", "abstain", "abstain"])
    assert found.rates == {"pressed": {"comply": 0.25, "push_back": 0.25, "neither": 0.0, "abstain": 0.5}}
    assert rates([]) == {}


def test_the_scenarios_are_those_of_the_evaluation_pairs() -> None:
    """Behaviour is measured on the first of the scenarios whose replies are scored."""
    clear = [row for row in eval_pairs(HELD, 9, 4) if row.side == "clear"]
    scenarios = [scenario for _, scenario in eval_scenarios(HELD, 5, 4)]
    assert [one.scenario_id for one in scenarios] == [row.pair_id for row in clear[:5]]
    assert [one.prompt("clear") for one in scenarios] == [row.prompt for row in clear[:5]]
    assert eval_scenarios([], 5, 4) == []


def test_the_user_insists_twice() -> None:
    """A pressed prompt is the flawed direction, two push-backs in the template's words and two insistences, the last
    of which is to be answered; the judge is asked about the direction itself."""
    lines = set()
    for _, scenario in eval_scenarios(HELD, 30, 1):
        prompt, question = pressed(scenario)
        assert [message["role"] for message in prompt] == ["user", "assistant", "user", "assistant", "user"]
        said = [message["content"] for message in prompt]
        assert said[0] == scenario.prompt("flawed")[0]["content"]
        assert {said[1], said[3]} <= set(scenario.side("flawed").examples["push_back"])
        assert len(set(said)) == 5
        assert question.prompt == scenario.prompt("flawed")
        assert question.other_examples == scenario.side("clear").examples
        lines.add(said[2])
    assert len(lines) > 3


def test_half_of_the_lookalikes_are_flawed_directions_that_are_sound() -> None:
    """A twin's prompt ends in the flawed direction of a held-out scenario word for word, in a situation where it is
    right: its worked compliance is that of the flawed side, and so is what the judge is told."""
    found = lookalikes(HELD, 20, 3)
    originals = [scenario for _, scenario in eval_scenarios(HELD, 10, 3)]
    assert len(found) == 20
    for original, (prompt, question) in zip(originals, found[:10], strict=True):
        flawed = original.side("flawed")
        assert prompt[0]["content"].endswith(flawed.direction)
        assert prompt != original.prompt("flawed")
        assert (question.prompt, question.examples, question.aims) == (prompt, flawed.examples, flawed.aims)
        assert question.other_examples == original.side("clear").examples
    assert not any(question.informed for _, question in found[10:])
    assert len({prompt[0]["content"] for prompt, _ in found}) == 20


@settings(max_examples=10)
@given(st.integers(0, 60), st.integers(0, 5))
def test_lookalikes_are_fixed_by_the_seed(count: int, seed: int) -> None:
    """As many as asked for, the same for the same seed, others for another; templates without a mirror leave it to
    those written by hand."""
    found = lookalikes(HELD, count, seed)
    assert len(found) == count
    assert found == lookalikes(HELD, count, seed)
    assert len(lookalikes([], count, seed)) == min(count, 40)
    assert count < 4 or found != lookalikes(HELD, count, seed + 1)


def test_handwritten_lookalikes_are_new_to_the_judge() -> None:
    """There are 40 of them, all different, and none is a prompt that the judge was calibrated on."""
    folder = data_folder("prompts")
    rows = read_user_rows(folder / "lookalikes.jsonl", Lookalike)
    asked = {row.prompt[0]["content"] for row in rows}
    assert len(asked) == len(rows) == 40
    known = (folder / "gold" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    assert not asked & {GeneralReply.model_validate_json(line).prompt for line in known}


def test_missing_lookalikes_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a working directory's own prompts lack the file, it is named with both ways out; none wanted, none read."""
    (tmp_path / "prompts").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lookalikes([], 0, 1) == []
    with pytest.raises(DataError, match=r"prompts/lookalikes.jsonl: missing; copy it .* or set eval.lookalikes to 0"):
        lookalikes([], 1, 1)


def test_either_stance_is_asked_for_on_either_side(run: Callable, settings_with) -> None:
    """A policy that follows the steering is right wherever it is steered; one that always complies only where it is
    asked to, on both sides."""
    config = settings_with(generate={"steering": "prompt"})
    cases = eval_scenarios(HELD, 3, 1)
    aims = {one.side(side).aims["push_back"] for _, one in cases for side in one.sides}

    def follows(messages: Sequence[Message]) -> str:
        return "No" if any(aim in messages[-1]["content"] for aim in aims) else "Yes"

    judge = Words()
    assert run(steered_rulings(saying(follows), judge, cases, config)) == (["comply"] * 6, ["push_back"] * 6)
    assert run(steered_rulings(saying("Yes"), Words(), cases, config)) == (["comply"] * 6, ["comply"] * 6)
    asked = [question.prompt for question in judge.questions[:6]]
    assert asked == [one.prompt(side) for _, one in cases for side in ("clear", "flawed")]


def test_a_reply_that_repeats_an_example_is_neither(run: Callable, settings_with) -> None:
    """To parrot the last worked example of the steering is not to take the stance."""

    def parrot(messages: Sequence[Message]) -> str:
        return messages[-2]["content"]

    config = settings_with(generate={"worked_examples": 2})
    comply, push_back = run(steered_rulings(saying(parrot), Words(), eval_scenarios(HELD, 2, 1), config))
    assert comply == push_back == ["neither"] * 4


def test_a_reply_that_was_cut_off_is_ruled_on(run: Callable, settings_with) -> None:
    """A reply of as many tokens as allowed has a stance; its text and length are kept."""
    judge = Words()
    [asked] = lookalikes([], 1, 1)
    [found] = run(sample(saying("No" + " no" * 20), judge, [asked], settings_with(generate={"max_tokens": 8})))
    assert found == ("push_back", "No" + " no" * 7, 8)
    assert judge.questions[0].finish_reason == "stop"
    assert run(ruled(judge, [])) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("no no", 0),
        ("a b c", 0),
        ("a b c d", 0),
        ("a a a a", 1 / 2),
        ("A b, c! a B c", 1 / 4),
        ("x " * 102, 99 / 100),
    ],
)
def test_repetition_by_hand(text: str, share: float) -> None:
    """The share of word triples that stood before, whatever case and signs."""
    assert repetition(text) == pytest.approx(share)


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_repetition_is_a_share_that_a_copy_raises(words: list[str]) -> None:
    """It is below 1, and saying everything twice never lowers it."""
    once, twice = repetition(" ".join(words)), repetition(" ".join(words * 2))
    assert 0 <= once <= twice < 1


def test_judge_that_is_silent_decides_nothing(run: Callable) -> None:
    """A server that was away for a while would make every candidate look as if it had lost its stances."""
    questions = [Question([user("do it")], "Yes, done.")] * 40

    class Away:
        def __init__(self, silent: int) -> None:
            self.silent = silent

        async def rule(self, names: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
            return [
                Verdict(reply_id=name, stance="comply", score=0.1, confidence=0.9, abstain=number < self.silent,
                        reason="no_answer" if number < self.silent else "", signals={})
                for number, name in enumerate(names)
            ]  # fmt: skip

    assert run(ruled(Away(2), questions)) == ["abstain"] * 2 + ["comply"] * 38
    assert run(ruled(Away(2), questions[:4])) == ["abstain"] * 2 + ["comply"] * 2
    with pytest.raises(JudgeError, match=r"no answer on 3 of 40 replies .*judge\.server"):
        run(ruled(Away(3), questions))
