"""train/gate.py: what promotes a candidate and what does not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.config import GateConfig
from train.evals import Evaluation, RoundEvaluation, SideFigures
from train.gate import decide

PAIRS, SAMPLED, QUESTIONS = 32, 24, 30
CONFIG = GateConfig()

values = st.floats(-3, 3, allow_nan=False).map(lambda value: round(value, 3))
margins = st.lists(values, min_size=PAIRS, max_size=PAIRS)
bits = st.sampled_from([0.0, 1.0])


def flags(right: int, total: int) -> list[float]:
    """So many right of a total."""
    return [1.0] * right + [0.0] * (total - right)


def measured(**changes: object) -> RoundEvaluation:
    """An evaluation: half of everything is right; `changes` replace items, `retention`, `tokens` and `fresh`."""
    side = SideFigures(accuracy=0.5, margin=0)
    items = {
        "pair_right": flags(PAIRS // 2, PAIRS),
        "margin": [0.0] * PAIRS,
        "clear_right": flags(SAMPLED // 2, SAMPLED),
        "flawed_right": flags(SAMPLED // 2, SAMPLED),
    }

    def one(items: dict[str, list[float]]) -> Evaluation:
        return Evaluation(
            pairs=PAIRS,
            pair_accuracy=0.5,
            pair_accuracy_ci=(0.4, 0.6),
            ranked_accuracy=0.5,
            own_pair_accuracy=0.5,
            margin=0,
            margin_ci=(0, 0),
            clear=side,
            flawed=side,
            reply_tokens=changes.get("tokens", 10.0),
            items=items,
        )

    fresh = one({"margin": changes["fresh"]}) if "fresh" in changes else None
    retention = changes.get("retention", flags(QUESTIONS // 2, QUESTIONS))
    return RoundEvaluation(
        heldout=one({name: changes.get(name, found) for name, found in items.items()}), fresh=fresh, retention=retention
    )


@st.composite
def evaluations(draw: st.DrawFn) -> RoundEvaluation:
    """Any evaluation."""
    sampled = st.lists(bits, min_size=SAMPLED, max_size=SAMPLED)
    return measured(
        margin=draw(margins),
        pair_right=draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=PAIRS, max_size=PAIRS)),
        clear_right=draw(sampled),
        flawed_right=draw(sampled),
        retention=draw(st.lists(bits, min_size=QUESTIONS, max_size=QUESTIONS)),
        tokens=draw(st.floats(1, 60)),
        fresh=draw(margins),
    )


GAIN = [0.4 + 0.01 * (place % 7) for place in range(PAIRS)]
"""A clear gain in margin, pair by pair."""


@given(same=evaluations())
def test_identical_candidate_is_rolled_back(same: RoundEvaluation) -> None:
    """A candidate that measures exactly like the policy does not become it, for want of a gain and of nothing else."""
    decision = decide(same, same, CONFIG)
    assert decision.decision == "roll_back"
    assert "did not rise beyond chance" in decision.reason
    assert [check.name for check in decision.checks if not check.passed] == ["margin"]


@given(before=margins, changes=st.lists(values, min_size=PAIRS // 2, max_size=PAIRS // 2))
def test_no_evidence_is_rolled_back(before: list[float], changes: list[float]) -> None:
    """As many gains as equal losses are no evidence, however large they are."""
    after = [old + change for old, change in zip(before, [*changes, *(-c for c in changes)], strict=True)]
    decision = decide(measured(margin=before), measured(margin=after), CONFIG)
    assert decision.decision == "roll_back"
    assert "did not rise beyond chance" in decision.reason


@given(before=margins, least=st.floats(0.05, 2))
def test_clear_gain_is_promoted(before: list[float], least: float) -> None:
    """A gain on every pair promotes, and the reason gives it with its interval."""
    after = [value + least + extra for value, extra in zip(before, GAIN, strict=True)]
    decision = decide(measured(margin=before), measured(margin=after), CONFIG)
    assert decision.decision == "promote"
    assert "crossed margin rose by" in decision.reason
    assert all(check.passed for check in decision.checks)


def test_gain_below_the_wanted_one_is_rolled_back() -> None:
    """`min_margin_gain` raises the bar for the whole interval."""
    after = measured(margin=GAIN)
    assert decide(measured(), after, CONFIG).decision == "promote"
    assert decide(measured(), after, GateConfig(min_margin_gain=0.45)).decision == "roll_back"


def test_gain_on_trained_kinds_alone_is_enough_unless_unseen_kinds_fell() -> None:
    """Fresh scenarios count for the gain; a fall on held-out ones rejects all the same."""
    flat, fresh = measured(fresh=[0.0] * PAIRS), [2.0 + value for value in GAIN]
    assert decide(flat, measured(fresh=fresh), CONFIG).decision == "promote"
    fallen = decide(flat, measured(fresh=fresh, margin=[-value for value in GAIN]), CONFIG)
    assert fallen.decision == "roll_back"
    assert "unseen kinds" in fallen.reason


@given(lost=st.integers(9, SAMPLED), name=st.sampled_from(["clear_right", "flawed_right"]), gain=st.floats(0, 50))
def test_drift_is_never_bought_with_margin(lost: int, name: str, gain: float) -> None:
    """A significant fall of one side's stance rejects under its own name, whatever the margin and the other side do."""
    other = "flawed_right" if name == "clear_right" else "clear_right"
    before = measured(**{name: flags(SAMPLED, SAMPLED), other: flags(0, SAMPLED)})
    after = measured(
        margin=[value + gain for value in GAIN],
        **{name: flags(SAMPLED - lost, SAMPLED), other: flags(SAMPLED, SAMPLED)},
    )
    decision = decide(before, after, CONFIG)
    assert decision.decision == "roll_back"
    words, others = "contrarian drift", "sycophancy drift"
    if name == "flawed_right":
        words, others = others, words
    assert words in decision.reason
    assert others not in decision.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair_right": flags(2, PAIRS)}, "held-out pair accuracy fell"),
        ({"retention": flags(2, QUESTIONS)}, "forgetting"),
        ({"tokens": 16.0}, "replies grew from 10 to 16 tokens"),
    ],
)
def test_every_other_loss_rejects_under_its_name(changes: dict, words: str) -> None:
    """Fallen pair accuracy, lost arithmetic and longer replies each reject a candidate that gained."""
    decision = decide(measured(), measured(margin=GAIN, **changes), CONFIG)
    assert decision.decision == "roll_back"
    assert words in decision.reason


@given(name=st.sampled_from(["clear_right", "flawed_right", "retention", "pair_right"]), up=st.integers(0, 12),
       net=st.integers(0, 1))  # fmt: skip
def test_noise_sized_fall_does_not_reject(name: str, up: int, net: int) -> None:
    """One answer fewer, among any number that changed both ways, is chance and not a loss."""
    total = {"retention": QUESTIONS, "pair_right": PAIRS}.get(name, SAMPLED)
    right = total // 2
    kept = right - min(up + net, right)
    after = [1.0] * kept + [0.0] * (right - kept) + flags(min(up, total - right), total - right)
    assert decide(measured(), measured(margin=GAIN, **{name: after}), CONFIG).decision == "promote"


def test_small_sample_does_not_reject_by_chance() -> None:
    """One reply of eight is more than the allowed fall but not more than chance."""
    before, after = measured(clear_right=flags(8, 8)), measured(margin=GAIN, clear_right=flags(7, 8))
    assert decide(before, after, CONFIG).decision == "promote"


@given(before=evaluations(), after=evaluations(), tokens=st.booleans(), retention=st.booleans(), stance=st.booleans())
def test_further_failure_never_promotes(before, after, tokens: bool, retention: bool, stance: bool) -> None:
    """Promotion needs every check, so a candidate that gets worse in one thing is not promoted for it."""
    decision = decide(before, after, CONFIG)
    assert (decision.decision == "promote") == all(check.passed for check in decision.checks)
    assert all(bool(check.reason) != check.passed for check in decision.checks)
    held = after.heldout
    if tokens:
        held = held.model_copy(update={"reply_tokens": 1000.0})
    if stance:
        held = held.model_copy(update={"items": held.items | {"clear_right": [0.0] * SAMPLED}})
    worse = after.model_copy(update={"heldout": held} | ({"retention": [0.0] * QUESTIONS} if retention else {}))
    if decision.decision == "roll_back":
        assert decide(before, worse, CONFIG).decision == "roll_back"


@given(factor=st.floats(0.1, 3))
def test_length_may_grow_as_far_as_allowed(factor: float) -> None:
    """Replies may become up to `max_length_growth` times as long, and shorter ones are no loss."""
    decision = decide(measured(), measured(margin=GAIN, tokens=10 * factor), CONFIG)
    assert (decision.decision == "promote") == (10 * factor <= 10 * CONFIG.max_length_growth)


def test_what_was_not_measured_is_not_checked() -> None:
    """Without sampled replies, questions and lengths the margin and the pair accuracy decide."""
    bare = {"retention": [], "tokens": None}
    before, after = (
        measured(margin=margin, **bare).model_copy() for margin in ([0.0] * PAIRS, GAIN)
    )  # the same, but for the margin
    for evaluation in (before, after):
        del evaluation.heldout.items["clear_right"], evaluation.heldout.items["flawed_right"]
    decision = decide(before, after, CONFIG)
    assert decision.decision == "promote"
    assert [check.name for check in decision.checks] == ["margin", "heldout_margin", "pair_accuracy"]


def test_broken_scores_are_not_promoted() -> None:
    """A candidate whose score is not a number somewhere is rolled back."""
    assert decide(measured(), measured(margin=[math.nan, *GAIN[1:]]), CONFIG).decision == "roll_back"
