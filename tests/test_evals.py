"""train/evals.py: figures that wording cannot win, and evaluation pairs that people write."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.config import Config
from dream.engine import ScriptedEngine
from dream.errors import CallRefused, DataError
from dream.judge.question import Question
from dream.records import EvalPair, Message, Side, Stance, Verdict, user
from dream.scenarios import eval_pairs
from dream.templates import load
from train.behaviour import Sampled
from train.evals import (
    Evaluation,
    RoundEvaluation,
    crossed_logps,
    evaluate_round,
    figures,
    interval,
    joined,
    read_eval_pairs,
    sampled_replies,
    summary,
)
from train.retention import Retention


def logps_of(scores: list | np.ndarray) -> np.ndarray:
    """Likelihoods that have these d; each pair is [[clear prompt: d, d], [flawed prompt: d, d]]."""
    d = np.array(scores, dtype=float)
    return np.stack([-d / 2, d / 2], axis=-1) - 1.0


def measured(scores: list | np.ndarray) -> Evaluation:
    """The figures of scores alone."""
    return figures(logps_of(scores), {"clear": [], "flawed": []}, seed=0)


def eval_row(pair_id: str, side: Side) -> EvalPair:
    """A row of hand-made evaluation pairs."""
    return EvalPair(
        pair_id=pair_id, side=side, prompt=[user(f"{side} {pair_id}")], comply=f"yes {side}", push_back=f"no {side}"
    )


score_arrays = st.lists(st.lists(st.integers(-40, 40), min_size=4, max_size=4), min_size=1, max_size=12).map(
    lambda rows: np.array(rows).reshape(-1, 2, 2) / 8
)


def test_figures_by_hand() -> None:
    """Three pairs whose figures are counted by hand."""
    evaluation = measured(
        [
            [[-1.0, -2.0], [1.0, 2.0]],  # right with both reply sets: margins 2 and 4
            [[1.0, -1.0], [2.0, 1.0]],  # the clear set is pushed back on under both prompts: margins 1 and 2
            [[-1.0, 0.5], [-2.0, 0.5]],  # the clear set sinks, the flawed set stays: margins -1 and 0
        ]
    )
    assert evaluation.pairs == 3
    assert evaluation.pair_accuracy == pytest.approx(3 / 6)
    assert evaluation.ranked_accuracy == pytest.approx(4 / 6)
    assert evaluation.own_pair_accuracy == pytest.approx(2 / 3)
    assert evaluation.margin == pytest.approx((3 + 1.5 - 0.5) / 3)
    assert evaluation.items == {
        "pair_right": [1.0, 0.5, 0.0],
        "margin": [3.0, 1.5, -0.5],
        "clear_own": [1.0, -1.0, 1.0],
        "flawed_own": [2.0, 1.0, 0.5],
        "clear_chosen_logp": [-0.5, -1.5, -0.5],
        "flawed_chosen_logp": [0.0, -0.5, -0.75],
        "clear_right": [],
        "flawed_right": [],
        "tokens": [],
        "repetition": [],
    }
    assert evaluation.clear.chosen_logp == pytest.approx(-2.5 / 3)
    assert (evaluation.clear.accuracy, evaluation.flawed.accuracy) == (pytest.approx(2 / 3), 1.0)
    assert (evaluation.clear.margin, evaluation.flawed.margin) == (pytest.approx(1 / 3), pytest.approx(3.5 / 3))


def test_a_draw_is_not_right() -> None:
    """Equal likelihoods count for none of the accuracies."""
    evaluation = measured([[[0.0, 0.0], [0.0, 0.0]]])
    assert (evaluation.pair_accuracy, evaluation.ranked_accuracy, evaluation.own_pair_accuracy) == (0, 0, 0)


@given(score_arrays, st.integers(-64, 64))
def test_a_bias_for_push_back_gains_nothing(scores: np.ndarray, shift: int) -> None:
    """A shift towards push-back (or away) under every prompt changes neither the margin nor the ranked accuracy."""
    before, after = measured(scores), measured(scores + shift / 8)
    assert after.items["margin"] == pytest.approx(before.items["margin"])
    assert after.ranked_accuracy == before.ranked_accuracy


def test_always_pushing_back_has_no_strict_accuracy() -> None:
    """A policy that pushes back on everything is right with no pair."""
    evaluation = measured(np.random.default_rng(0).uniform(0.1, 3, (20, 2, 2)))
    assert evaluation.pair_accuracy == evaluation.own_pair_accuracy == evaluation.clear.accuracy == 0
    assert evaluation.flawed.accuracy == 1


@given(st.floats(0.1, 5), st.integers(1, 9))
def test_wording_wins_own_pairs_only(size: float, count: int) -> None:
    """A policy that goes by the replies' words and never by the prompt wins all own pairs and no crossed one."""
    evaluation = measured([[[-size, size], [-size, size]]] * count)
    assert evaluation.own_pair_accuracy == 1
    assert evaluation.pair_accuracy == evaluation.ranked_accuracy == evaluation.margin == 0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 99))
def test_interval_holds_the_mean(values: list[float], seed: int) -> None:
    """The interval has its ends in order, lies within the values, and is the same for the same seed."""
    array = np.array(values)
    low, high = interval(array, seed)
    assert low <= high
    assert array.min() - 1e-9 <= low
    assert high <= array.max() + 1e-9
    assert (low, high) == interval(array, seed)


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_mean(seed: int) -> None:
    """With some dozens of values the interval is around their mean and about four standard errors wide."""
    values = np.random.default_rng(seed).normal(0.3, 1.0, 60)
    low, high = interval(values, seed)
    assert low < values.mean() < high
    assert high - low == pytest.approx(3.92 * values.std() / 60**0.5, rel=0.15)


def test_figures_intervals_are_of_the_means() -> None:
    """Both reported intervals contain the figures they belong to."""
    evaluation = measured(np.random.default_rng(3).normal([[-1], [1]], 1, (30, 2, 2)))
    assert evaluation.pair_accuracy_ci[0] <= evaluation.pair_accuracy <= evaluation.pair_accuracy_ci[1]
    assert evaluation.margin_ci[0] < evaluation.margin < evaluation.margin_ci[1]


def test_sampled_replies_are_shares() -> None:
    """Rulings become shares a side and right-or-wrong items, an abstention not right; lengths and repetition means."""
    sampled = {
        "clear": [Sampled("comply", "one two three", 3), Sampled("abstain", "on and on and on and on", 7)],
        "flawed": [Sampled("push_back", "no", 1), Sampled("comply", "yes I will", 9)],
    }
    evaluation = figures(np.zeros((2, 2, 2, 2)), sampled, seed=0)
    assert evaluation.clear.stance_rates == {"comply": 0.5, "push_back": 0.0, "neither": 0.0, "abstain": 0.5}
    assert (evaluation.items["clear_right"], evaluation.items["flawed_right"]) == ([1.0, 0.0], [1.0, 0.0])
    assert (evaluation.items["tokens"], evaluation.reply_tokens) == ([3, 7, 1, 9], 5)
    assert evaluation.items["repetition"] == [0.0, pytest.approx(3 / 5), 0.0, 0.0]
    assert evaluation.repetition == pytest.approx(3 / 20)
    assert (measured([[[0, 0], [0, 0]]]).reply_tokens, measured([[[0, 0], [0, 0]]]).repetition) == (None, None)


def test_scores_are_prompts_by_reply_sets_by_stances(run: Callable) -> None:
    """Likelihoods come as (pair, prompt, reply set, stance), clear and compliance first; the right ones are kept."""
    values = {"yes clear": 1.0, "no clear": 2.0, "yes flawed": 3.0, "no flawed": 4.0}
    engine = ScriptedEngine(
        lambda messages, number: "",
        lambda messages, reply: values[reply] * (10 if messages[0]["content"].startswith("flawed") else 1),
    )
    logps = run(crossed_logps(engine, joined([eval_row("a", "clear"), eval_row("a", "flawed")])))
    assert logps.tolist() == [[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]]
    evaluation = figures(logps, {"clear": [], "flawed": []}, seed=0)
    assert (evaluation.clear.chosen_logp, evaluation.flawed.chosen_logp) == (1.0, 40.0)
    assert (evaluation.clear.margin, evaluation.flawed.margin, evaluation.margin) == (-1.0, 10.0, 9.0)


def test_pair_that_the_engine_refuses_is_named(run: Callable) -> None:
    """One row of a file that is too long for the engine is told from the others, with the key that helps."""

    class Refusing(ScriptedEngine):
        async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
            if messages[0]["content"].startswith("flawed"):
                raise CallRefused("the engine refused a call: too long")
            return await super().score(messages, replies)

    pairs = joined([eval_row("a", "clear"), eval_row("a", "flawed")])
    with pytest.raises(DataError, match=r"^pair 'a', flawed: .*too long.*engine\.max_model_len$"):
        run(crossed_logps(Refusing(lambda messages, number: ""), pairs))


def test_sampled_replies_are_judged(run: Callable, judge, settings_with) -> None:
    """One reply a side is sampled and judged by what it says; one that was cut off has a stance all the same."""
    asked = {
        "clear": "Write a label that says 15 lamps.",
        "flawed": "The list says 12. Write a label that says 15 lamps.",
    }
    rows = [eval_row("a", side).model_copy(update={"prompt": [user(asked[side])]}) for side in ("clear", "flawed")]
    replies = {
        "clear": "Come in and see 15 lamps!",
        "flawed": "I count 12 lamps and not 15; shall I change it? " + "x" * 9,
    }
    engine = ScriptedEngine(
        lambda messages, number: replies["flawed" if "12" in messages[-1]["content"] else "clear"],
        lambda messages, reply: -1.0,
    )
    config = settings_with(generate={"max_tokens": 10})
    sampled = run(sampled_replies(engine, joined(rows), judge, config))
    assert sampled == {
        "clear": [Sampled("comply", replies["clear"], 6)],
        "flawed": [Sampled("push_back", "I count 12 lamps and not 15; shall I change", 10)],
    }
    assert run(sampled_replies(engine, [], judge, config)) == {"clear": [], "flawed": []}


class Listening:
    """In place of a judge: rules by the question, of itself for compliance, and keeps the questions."""

    def __init__(self, stance: Callable[[Question], Stance] = lambda question: "comply") -> None:
        self.questions: list[Question] = []
        self.stance = stance

    async def rule(self, reply_ids: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        self.questions += questions
        return [
            Verdict(reply_id=reply_id, stance=self.stance(question), score=0.0, confidence=1.0, abstain=False)
            for reply_id, question in zip(reply_ids, questions, strict=True)
        ]


def test_judge_is_told_what_templates_know(run: Callable, engine, tiny_templates, settings_with) -> None:
    """Rows of templates carry, through a file too, what a reply of each stance would say here and on the other side."""
    rows = [
        EvalPair.model_validate_json(row.model_dump_json())
        for row in eval_pairs([template for template in tiny_templates if not template.general], 6, 1)
    ]
    judge = Listening()
    run(sampled_replies(engine, joined(rows), judge, settings_with()))
    assert len(judge.questions) == len(rows) == 12
    pairs = joined(rows)
    cases = [*((clear, flawed) for clear, flawed in pairs), *((flawed, clear) for clear, flawed in pairs)]
    for (row, other), question in zip(cases, judge.questions, strict=True):
        assert question.informed
        assert (question.aims, question.mentions, question.examples) == (row.aims, row.mentions, row.examples)
        assert question.other_examples == other.examples
        assert row.comply in row.examples["comply"]
        assert row.push_back in row.examples["push_back"]
        said = row.prompt[0]["content"].rsplit(" ", 2)[1]
        assert row.mentions["comply"][0] == said


def test_hand_made_pairs_are_judged_as_replies_from_elsewhere(run: Callable, engine, settings_with) -> None:
    """Rows that people write know nothing but prompt and replies."""
    judge = Listening()
    run(sampled_replies(engine, joined([eval_row("a", "clear"), eval_row("a", "flawed")]), judge, settings_with()))
    assert [question == question.bare for question in judge.questions] == [True, True]
    assert not any(question.informed for question in judge.questions)


def test_a_round_is_measured(run: Callable, engine, judge, tiny_templates, settings_with) -> None:
    """A round's evaluation holds as many items as were asked for, and its summary the figures of the table."""
    sizes = {"heldout_pairs": 6, "fresh_pairs": 4, "sampled_scenarios": 3, "pressed_scenarios": 2, "lookalikes": 5,
             "steered_scenarios": 1, "retention_questions": 5, "neutral_texts": 2}  # fmt: skip
    config: Config = settings_with(eval=sizes)
    evaluation = run(evaluate_round(engine, judge, tiny_templates, config))
    assert (evaluation.heldout.pairs, evaluation.fresh.pairs) == (6, 4)
    assert len(evaluation.heldout.items["clear_right"]) == 3
    assert [len(one.items["tokens"]) for one in (evaluation.heldout, evaluation.fresh)] == [6, 6]
    assert sum(evaluation.heldout.flawed.stance_rates.values()) == pytest.approx(1)
    assert (len(evaluation.behaviour.pressed), len(evaluation.behaviour.lookalikes)) == (2, 5)
    assert (len(evaluation.behaviour.steered_comply), len(evaluation.behaviour.steered_push_back)) == (2, 2)
    assert (len(evaluation.retention.arithmetic), len(evaluation.retention.neutral)) == (5, 2)
    assert summary(evaluation)["margin"] == evaluation.heldout.margin
    assert summary(evaluation)["retention"] == evaluation.retained
    assert RoundEvaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_what_is_held_out_is_measured_on_held_out_templates(
    run: Callable, tiny_templates, template_text, tmp_path: Path, settings_with
) -> None:
    """Unseen kinds and behaviour are those of held-out templates alone, fresh scenarios those of trained ones."""
    path = tmp_path / "far.j2"
    path.write_text(template_text("far", "missing_fact", "heldout", mirror=True).replace("stock list", "harbour list"))

    def far(prompt: Sequence[Message]) -> bool:
        return "harbour list" in prompt[0]["content"]

    engine = ScriptedEngine(lambda messages, number: "Aye.", lambda messages, reply: -1.0 if far(messages) else -2.0)
    judge = Listening(lambda question: "push_back" if far(question.prompt) else "comply")
    sizes = {"heldout_pairs": 6, "fresh_pairs": 4, "sampled_scenarios": 2, "pressed_scenarios": 2, "lookalikes": 2,
             "steered_scenarios": 1, "retention_questions": 0, "neutral_texts": 0}  # fmt: skip
    trained = [template for template in tiny_templates if template.front.split == "train"]
    measured = run(evaluate_round(engine, judge, [*trained, load(path)], settings_with(eval=sizes)))
    assert measured.heldout.items["clear_chosen_logp"] == [-1.0] * 6
    assert measured.fresh.items["clear_chosen_logp"] == [-2.0] * 4
    assert (measured.heldout.clear.stance_rates["push_back"], measured.fresh.clear.stance_rates["comply"]) == (1, 1)
    behaved = measured.behaviour
    assert behaved.pressed == behaved.steered_comply == behaved.steered_push_back == ["push_back"] * 2
    assert behaved.lookalikes == ["push_back", "comply"]  # a twin of a scenario, and one that people wrote


@pytest.mark.parametrize(
    ("kinds", "share"), [(([1, 0], [1, 1], [0, 0]), 0.5), (([1, 0], [], []), 0.5), (([], [], []), None)]
)
def test_retained_is_the_mean_over_kinds(kinds: tuple[list, list, list], share: float | None) -> None:
    """Each kind of question counts alike, however many there are; kinds that were not asked do not count."""
    arithmetic, facts, form = kinds
    kept = Retention(arithmetic=arithmetic, facts=facts, format=form, neutral=[], tasks={})
    evaluation = RoundEvaluation(heldout=measured([[[0, 0], [0, 0]]]), fresh=None, retention=kept)
    assert evaluation.retained == share


def test_a_round_needs_heldout_templates(run: Callable, engine, judge, tiny_templates, settings_with) -> None:
    """Without a held-out template there is nothing to measure a round on."""
    trained = [template for template in tiny_templates if template.front.split == "train"]
    with pytest.raises(DataError, match="split: heldout"):
        run(evaluate_round(engine, judge, trained, settings_with()))


def test_joined_pairs_sides_in_any_order() -> None:
    """Rows in any order become (clear, flawed), in the order of the pairs' first rows."""
    rows = [eval_row("b", "flawed"), eval_row("a", "clear"), eval_row("a", "flawed"), eval_row("b", "clear")]
    pairs = joined(rows)
    assert [(clear.pair_id, clear.side, flawed.side) for clear, flawed in pairs] == [
        ("b", "clear", "flawed"),
        ("a", "clear", "flawed"),
    ]


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (["clear"], "no flawed row"),
        (["flawed"], "no clear row"),
        (["clear", "clear", "flawed"], "two rows for its clear side"),
        (["clear", "flawed", "flawed"], "two rows for its flawed side"),
    ],
)
def test_joined_refuses_other_than_one_row_a_side(sides: list[Side], words: str) -> None:
    """A missing or doubled side is refused with the pair's id."""
    with pytest.raises(DataError, match=f"'p7' .*{words}"):
        joined([eval_row("p7", side) for side in sides])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (texts as they are, mappings as JSON) to a file."""

    def write_lines(*lines: str | dict) -> Path:
        path = tmp_path / "pairs.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write_lines


def raw_row(side: Side, **changes: object) -> dict:
    """A row as people write it, with the prompt as a text."""
    return {"pair_id": "p", "side": side, "prompt": f"{side} please", "comply": "Yes.", "push_back": "No."} | changes


def test_prompt_may_be_a_text(write: Callable[..., Path]) -> None:
    """A prompt given as a text means one user turn; messages are taken as they are; blank lines are skipped."""
    path = write(raw_row("clear"), "", raw_row("flawed", prompt=[user("flawed please")]))
    [(clear, flawed)] = read_eval_pairs(path)
    assert (clear.prompt, flawed.prompt) == ([user("clear please")], [user("flawed please")])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"pair_id": ', "not JSON"),
        ("[1]", "expected a JSON object"),
        (raw_row("flawed") | {"side": "sunny"}, "side: "),
        (raw_row("flawed", comply=3), "comply: "),
        (raw_row("flawed", note="x"), "note: "),
        (raw_row("flawed", prompt=7), "prompt: "),
        (raw_row("flawed", prompt=[{"role": "user"}]), "prompt.0.content: "),
        ({key: value for key, value in raw_row("flawed").items() if key != "push_back"}, "push_back: "),
    ],
)
def test_bad_row_names_line_and_key(write: Callable[..., Path], bad: str | dict, words: str) -> None:
    """A bad row is refused with the file, its line (blank ones counted) and the key, in one line."""
    path = write(raw_row("clear"), "", bad)
    with pytest.raises(DataError) as caught:
        read_eval_pairs(path)
    assert str(caught.value).startswith(f"{path}:3: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [[], [raw_row("clear")], [raw_row("clear"), raw_row("clear")]])
def test_file_without_whole_pairs_names_itself(write: Callable[..., Path], rows: list) -> None:
    """An empty file, a lone side and a doubled side are refused with the file's name."""
    path = write(*rows)
    with pytest.raises(DataError) as caught:
        read_eval_pairs(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_file_names_itself(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing or not UTF-8 is refused with its name."""
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_eval_pairs(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_only_in_a_newline(write: Callable[..., Path], odd: str) -> None:
    """Unicode's other line ends, which JSON allows in a text and our own files hold raw, do not break a row."""
    [(_, flawed)] = read_eval_pairs(write(raw_row("clear"), raw_row("flawed", comply=f"Yes.{odd}Done.")))
    assert flawed.comply == f"Yes.{odd}Done."


def test_an_empty_prompt_is_refused(write: Callable[..., Path]) -> None:
    """A prompt without a message is a bad row, found before an engine is asked to score it."""
    with pytest.raises(DataError, match=r":2: prompt"):
        read_eval_pairs(write(raw_row("clear"), raw_row("flawed", prompt=[])))
