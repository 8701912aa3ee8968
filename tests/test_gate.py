"""train/gate.py: what promotes a candidate, and what sends it back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.config import GateConfig
from train.evals import RoundEvaluation, figures
from train.gate import Decision, decide, gain, no_fall

CONFIG = GateConfig()
STANCES = {"clear": ("comply", "push_back"), "flawed": ("push_back", "comply")}
"""Per side the right and the wrong stance."""


def measured(
    rise: float = 0.0,
    clear: float = 0.8,
    flawed: float = 0.8,
    retained: float = 0.9,
    tokens: int = 20,
    count: int = 40,
    fresh: bool = True,
    seed: int = 1,
) -> RoundEvaluation:
    """An evaluation of `count` fixed pairs, raised by `rise` in margin, with shares of right stances and answers."""
    scores = np.random.default_rng(1).normal(0, 0.5, (count, 2, 2)) + np.array([[-1.0], [1.0]])
    scores = scores + np.random.default_rng(seed).normal(0, 0.02, scores.shape) * (seed != 1)
    scores[:, 1, :] += rise
    stances = {
        side: [right] * round(share * count) + [wrong] * (count - round(share * count))
        for (side, (right, wrong)), share in zip(STANCES.items(), (clear, flawed), strict=True)
    }
    heldout = figures(scores, stances, [tokens] * count, seed=0)
    answers = [float(number < round(retained * count)) for number in range(count)]
    return RoundEvaluation(heldout=heldout, fresh=heldout if fresh else None, retention=answers)


def verdict(decision: Decision) -> tuple[str, list[str]]:
    """The decision and the names of the checks that failed."""
    return decision.decision, [check.name for check in decision.checks if not check.passed]


@pytest.mark.parametrize("fresh", [True, False])
def test_no_change_is_rolled_back(fresh: bool) -> None:
    """A candidate that measures as its policy did has shown nothing, and is not promoted."""
    decision = decide(measured(fresh=fresh), measured(fresh=fresh), CONFIG)
    assert verdict(decision) == ("roll_back", ["margin"])
    assert "did not rise beyond chance" in decision.reason


@pytest.mark.parametrize("fresh", [True, False])
def test_a_clear_gain_is_promoted(fresh: bool) -> None:
    """A margin that rises on every pair, with nothing falling, promotes, and the reason gives the gain."""
    decision = decide(measured(fresh=fresh), measured(rise=0.3, fresh=fresh), CONFIG)
    assert verdict(decision) == ("promote", [])
    assert "rose by 0.300" in decision.reason


def test_a_gain_of_noise_is_rolled_back() -> None:
    """A mean that rose while half of the pairs fell as far is chance."""
    check = gain("margin", [0.0] * 20, [1.0, -0.9] * 10, 0.0)
    assert check.after > check.before
    assert not check.passed


def test_the_least_gain_is_configured() -> None:
    """A gain below `min_margin_gain` is not enough, however sure."""
    decision = decide(measured(), measured(rise=0.3), GateConfig(min_margin_gain=0.5))
    assert verdict(decision) == ("roll_back", ["margin"])


@pytest.mark.parametrize(("side", "words"), [("clear", "contrarian drift"), ("flawed", "sycophancy drift")])
def test_drift_has_its_name(side: str, words: str) -> None:
    """A candidate that gains in margin by being less right on one side is sent back under that drift's name."""
    decision = decide(measured(), measured(rise=0.5, **{side: 0.4}), CONFIG)
    assert verdict(decision) == ("roll_back", [f"{side}_right"])
    assert words in decision.reason


def test_one_side_does_not_pay_for_the_other() -> None:
    """Complying less is not made up for by pushing back more, nor by any gain in margin."""
    decision = decide(measured(clear=0.9, flawed=0.2), measured(rise=2.0, clear=0.3, flawed=1.0), CONFIG)
    assert verdict(decision) == ("roll_back", ["clear_right"])


@given(st.integers(8, 40), st.integers(8, 40), st.sampled_from(["clear", "flawed"]), st.floats(0, 3))
def test_a_sure_fall_is_never_promoted(before: int, fall: int, side: str, rise: float) -> None:
    """Whatever the gain, a side with eight or more right replies fewer of 40 is not promoted."""
    after = before - min(fall, before)
    decision = decide(measured(**{side: before / 40}), measured(rise=rise, **{side: after / 40}), CONFIG)
    assert decision.decision == "roll_back"
    assert f"{side}_right" in verdict(decision)[1]


@pytest.mark.parametrize("side", ["clear", "flawed"])
def test_a_fall_of_noise_does_not_reject(side: str) -> None:
    """Two replies fewer of 40, and 5 fewer of 40 while 4 others are new, are chance."""
    assert decide(measured(), measured(rise=0.3, **{side: 0.75}), CONFIG).decision == "promote"
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 15 + [0.0] * 21 + [1.0] * 4
    assert no_fall(f"{side}_right", before, after, 0.0, "fell").passed


def test_a_sure_fall_within_what_is_allowed_does_not_reject() -> None:
    """A fall beyond chance but smaller than allowed passes; the same fall with nothing allowed does not."""
    before, after = [0.5] * 40, [0.45] * 40
    assert no_fall("pair_accuracy", before, after, 0.1, "fell").passed
    assert not no_fall("pair_accuracy", before, after, 0.02, "fell").passed


def test_a_gain_on_trained_kinds_does_not_pay_for_unseen_ones() -> None:
    """A candidate that rises on fresh draws of trained kinds and falls on held-out ones is sent back."""
    before, better, worse = measured(), measured(rise=2.0), measured(rise=-0.2)
    after = worse.model_copy(update={"fresh": better.heldout})
    assert verdict(decide(before, after, CONFIG)) == ("roll_back", ["heldout_margin"])


def test_forgetting_is_rolled_back() -> None:
    """Lost answers to arithmetic send a candidate back, unless nothing was asked."""
    before, after = measured(), measured(rise=0.5, retained=0.4)
    assert verdict(decide(before, after, CONFIG)) == ("roll_back", ["retention"])
    unasked = [evaluation.model_copy(update={"retention": []}) for evaluation in (before, after)]
    assert decide(*unasked, CONFIG).decision == "promote"


@pytest.mark.parametrize(("tokens", "decision"), [(5, "promote"), (30, "promote"), (31, "roll_back")])
def test_replies_may_not_grow(tokens: int, decision: str) -> None:
    """Replies may grow to `max_length_growth` (1.5) times their length and no further; shorter is well."""
    found = decide(measured(tokens=20), measured(rise=0.3, tokens=tokens), CONFIG)
    assert found.decision == decision
    assert (f"from 20 to {tokens} tokens" in found.reason) == (decision == "roll_back")


def test_all_failures_are_in_the_reason() -> None:
    """The reason of a rejected round holds every failed check's own reason."""
    decision = decide(measured(), measured(rise=-1.0, clear=0.2, flawed=0.2, retained=0.2, tokens=99), CONFIG)
    assert len(verdict(decision)[1]) >= 6
    assert all(check.reason in decision.reason for check in decision.checks if not check.passed)


shares = st.sampled_from([0.2, 0.6, 0.75, 0.8, 1.0])


@given(
    st.floats(-1, 1), shares, shares, shares, st.integers(1, 60), st.integers(1, 4), st.booleans(), st.integers(2, 9)
)
def test_a_failed_check_never_promotes(rise, clear, flawed, retained, tokens, count, fresh, seed) -> None:
    """Of any candidate: it is promoted when all checks passed and only then, and a failed check says why."""
    before = measured(count=count * 10, fresh=fresh)
    after = measured(rise, clear, flawed, retained, tokens, count * 10, fresh, seed)
    decision = decide(before, after, CONFIG)
    assert (decision.decision == "promote") == all(check.passed for check in decision.checks)
    assert all(check.passed != bool(check.reason) for check in decision.checks)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=30), st.floats(0, 1))
def test_both_checks_cannot_be_about_the_same_change(change: list[float], allowed: float) -> None:
    """No change is both a sure gain and a forbidden fall."""
    before = [0.0] * len(change)
    assert not (gain("x", before, change, 0.0).passed and not no_fall("x", before, change, allowed, "fell").passed)


def test_what_is_not_a_number_is_not_promoted() -> None:
    """A candidate whose scores are not numbers (an overflow) is sent back."""
    broken = measured(rise=float("nan"))
    assert decide(measured(), broken, CONFIG).decision == "roll_back"
