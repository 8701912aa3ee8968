"""train/gate.py: what promotes a candidate, what sends it back, and what is only noise."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dream.config import GateConfig, load
from train.behaviour import Behaviour, Ruling, Sampled
from train.evals import RoundEvaluation, figures
from train.gate import Decision, Items, change, decide, gain, no_fall, no_loss, no_rise, no_task_fall, tail
from train.lm_tasks import TaskScore
from train.retention import Retention

CONFIG = GateConfig()
SURE = CONFIG.confidence
COUNT = 40
SHARES = ("clear", "flawed", "pressed", "refused", "obeyed", "retained")
"""The arguments of `measured` that are shares of items."""
FEW = settings(max_examples=15)
"""For tests of whole decisions, each of which draws some ten thousand resamples."""


def rulings(right: Ruling, share: float, wrong: Ruling, count: int = COUNT) -> list[Ruling]:
    """The right ruling on the first items, the wrong one on the others."""
    held = round(share * count)
    return [right] * held + [wrong] * (count - held)


def measured(
    *,
    rise: float = 0.0,
    shift: float = 0.0,
    chosen: float = 0.0,
    clear: float = 0.8,
    flawed: float = 0.8,
    pressed: float = 0.8,
    refused: float = 0.1,
    obeyed: float = 0.8,
    retained: float = 0.9,
    nll: float = 3.0,
    tokens: int = 20,
    text: str = "all of these words are new here",
    fresh: bool = True,
    count: int = COUNT,
    noise: int | None = None,
) -> RoundEvaluation:
    """An evaluation of `count` fixed pairs.

    `rise` is that of the crossed margin, `shift` moves every d towards push-back (below zero: towards compliance),
    `chosen` moves both replies' likelihood; the shares are of right rulings and answers; `noise` seeds a little of it.
    """
    d = np.random.default_rng(1).normal(0, 0.5, (count, 2, 2)) + np.array([[-0.4], [0.2]]) + shift
    d[:, 1] += rise / 2
    d[:, 0] -= rise / 2
    if noise is not None:
        d = d + np.random.default_rng(noise).normal(0, 0.02, d.shape)
    plain = {
        "clear": rulings("comply", clear, "abstain", count),
        "flawed": rulings("push_back", flawed, "neither", count),
    }
    heldout = figures(
        np.stack([-d / 2, d / 2], axis=-1) - 2.0 + chosen,
        {side: [Sampled(ruling, text, tokens) for ruling in ones] for side, ones in plain.items()},
        seed=0,
    )
    answers = [float(number < round(retained * count)) for number in range(count)]
    return RoundEvaluation(
        heldout=heldout,
        fresh=heldout if fresh else None,
        behaviour=Behaviour(
            pressed=rulings("push_back", pressed, "comply", count),
            lookalikes=rulings("push_back", refused, "comply", count),
            steered_comply=rulings("comply", obeyed, "push_back", count),
            steered_push_back=rulings("push_back", obeyed, "comply", count),
        ),
        retention=Retention(arithmetic=answers, facts=answers, format=answers, neutral=[nll] * 16, tasks={}),
    )


def plain(**figures: Any) -> RoundEvaluation:
    """`measured` without fresh scenarios, which are the same items here, so that every item counts once."""
    return measured(**figures, fresh=False)


def failed(decision: Decision) -> list[str]:
    """The names of the checks that failed, the two gains aside."""
    return [check.name for check in decision.checks[2:] if not check.passed]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_clear_gain_is_promoted(fresh: bool) -> None:
    """A margin that rises on every pair, with nothing falling, promotes, and the reason gives the gain."""
    decision = decide(measured(fresh=fresh), measured(rise=0.3, fresh=fresh), CONFIG)
    assert (decision.decision, decision.conclusive, failed(decision)) == ("promote", True, [])
    assert "rose by 0.300" in decision.reason


@FEW
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 60), st.booleans())
def test_no_change_is_no_evidence(shift, clear, flawed, retained, tokens, fresh) -> None:
    """Whatever the policy is like, a candidate that measures the same is rolled back, and not as a rejection."""
    same = measured(shift=shift, clear=clear, flawed=flawed, retained=retained, tokens=tokens, fresh=fresh)
    decision = decide(same, same, CONFIG)
    assert (decision.decision, decision.conclusive, failed(decision)) == ("roll_back", False, [])
    assert decision.reason.startswith("inconclusive: crossed margin did not rise beyond chance")


@FEW
@given(st.floats(0.02, 3), st.integers(0, 99))
def test_a_planted_gain_is_promoted(rise: float, noise: int) -> None:
    """A rise of every pair far beyond the noise promotes, however small or large it is."""
    assert decide(measured(), measured(rise=rise, noise=noise), CONFIG).decision == "promote"


def test_the_least_gain_is_configured() -> None:
    """Gains below what is configured are not enough, however sure."""
    least = GateConfig(min_margin_gain=0.5, min_pair_accuracy_gain=0.9)
    decision = decide(measured(), measured(rise=0.3), least)
    assert (decision.decision, decision.conclusive) == ("roll_back", False)


@FEW
@given(st.floats(0.25, 2), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_comply_only_is_sycophancy(shift: float, rise: float, fresh: bool, noise: int) -> None:
    """A candidate that learned to go along with everything is rejected under that name and no other drift's, though the
    crossed margin does not see it, no sampled ruling changed, and whatever it gained."""
    after = measured(shift=-shift - rise / 2, rise=rise, fresh=fresh, noise=noise)
    decision = decide(measured(fresh=fresh), after, CONFIG)
    assert (decision.decision, decision.conclusive) == ("roll_back", True)
    assert "flawed_preference" in failed(decision)
    assert "sycophancy drift" in decision.reason
    assert "contrarian drift" not in decision.reason


@FEW
@given(st.floats(0.25, 2), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_push_back_only_is_contrarian(shift: float, rise: float, fresh: bool, noise: int) -> None:
    """A candidate that learned to argue with everything is rejected under the other name."""
    after = measured(shift=shift + rise / 2, rise=rise, fresh=fresh, noise=noise)
    decision = decide(measured(fresh=fresh), after, CONFIG)
    assert (decision.decision, decision.conclusive) == ("roll_back", True)
    assert "clear_preference" in failed(decision)
    assert "contrarian drift" in decision.reason
    assert "sycophancy drift" not in decision.reason


def test_drift_shows_where_hardly_a_pair_was_right() -> None:
    """A policy whose own flawed pairs are all wrong has none to lose; its preference falls all the same."""
    before, after = measured(shift=-3.0), measured(shift=-3.6)
    assert before.heldout.flawed.accuracy == 0
    assert failed(decide(before, after, CONFIG)) == ["flawed_preference"]


def by_likelihood(*scores: list) -> tuple[RoundEvaluation, ...]:
    """Evaluations of d alone, shape (pairs, prompts, reply sets), without sampled replies."""
    nothing = Retention(arithmetic=[], facts=[], format=[], neutral=[], tasks={})
    return tuple(
        RoundEvaluation(
            heldout=figures(np.stack([-d / 2, d / 2], -1), {"clear": [], "flawed": []}, 0),
            fresh=None,
            retention=nothing,
        )
        for d in map(np.array, scores)
    )


def test_certainty_may_fall_where_more_pairs_are_right() -> None:
    """A policy that complied in any case, mostly by a wide margin, and now tells more pairs apart by a narrow one."""
    before, after = by_likelihood(
        [[[-3.0, -3.0], [-3.0, -3.0]]] * 15 + [[[0.1, 0.1], [-3.0, -3.0]]] * 5,
        [[[-0.5, -0.5], [0.5, 0.5]]] * 20,
    )
    assert after.heldout.clear.margin < before.heldout.clear.margin
    assert decide(before, after, CONFIG).decision == "promote"


def test_one_lucky_pair_does_not_hide_a_drift() -> None:
    """One flawed pair that turns right by chance does not excuse the preference of all others."""
    d = np.array([[[-3.0, -3.0], [-0.2, -0.2]]] * COUNT)
    worse = d - [[0.0], [1.3]]
    worse[0] = 0.1
    before, after = by_likelihood(d, worse)
    assert after.heldout.flawed.accuracy > before.heldout.flawed.accuracy
    assert "flawed_preference" in failed(decide(before, after, CONFIG))


def test_scores_beyond_all_bounds_are_decided_on() -> None:
    """A policy that blew up is rejected like any other that lost a stance, without an overflow."""
    before, after = by_likelihood([[[-1.0, -1.0], [1.0, 1.0]]] * 20, [[[-2000.0, -2000.0]] * 2] * 20)
    assert "flawed_preference" in failed(decide(before, after, CONFIG))


def test_few_gains_are_no_evidence() -> None:
    """Five pairs of many turn right and none wrong: resamples hold no loss, but chance does that once in 32 times."""
    items = Items([0.0] * 144, [1.0] * 5 + [0.0] * 139)
    assert gain("x", items, 0.0, 0.975).passed
    assert not gain("x", items, 0.0, 0.975, counted=True).passed
    seven = Items([0.0] * 144, [0.5] * 7 + [0.0] * 137)
    assert gain("x", seven, 0.0, 0.975, counted=True).passed


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configured_sizes_can_fail(path: Path) -> None:
    """Where all that was right is lost, every check of sampled behaviour must be able to say so."""
    config, _ = load(path)
    sizes = config.eval
    counts = (sizes.pressed_scenarios, sizes.lookalikes, 2 * sizes.steered_scenarios, 2 * sizes.sampled_scenarios)
    assert all(tail(count, count) <= 1 - config.gate.confidence for count in counts)


def test_accuracy_promotes_where_the_margin_does_not_rise() -> None:
    """Pairs that are right for the first time, at the price of the margin of those that were right by far."""
    before, after = by_likelihood(
        [[[-2.0, -2.0], [2.0, 2.0]]] * 10 + [[[-0.2, -0.2], [-0.1, -0.1]]] * 10,
        [[[-1.9, -1.9], [1.9, 1.9]]] * 10 + [[[-0.2, -0.2], [0.1, 0.1]]] * 10,
    )
    decision = decide(before, after, CONFIG)
    assert decision.decision == "promote"
    assert "crossed accuracy rose by 0.500" in decision.reason
    assert [check.passed for check in decision.checks[:2]] == [False, True]


def test_lost_own_pairs_are_drift() -> None:
    """Own pairs that turn from right to wrong are named by McNemar's test too, with its p-value."""
    decision = decide(measured(), measured(shift=-0.4), CONFIG)
    check = next(one for one in decision.checks if one.name == "flawed_own_accuracy")
    assert (check.passed, check.method, check.items) == (False, "mcnemar", 2 * COUNT)
    assert check.p_value < 0.001
    assert check.after < check.before


@pytest.mark.parametrize(
    ("change_", "name", "words"),
    [
        ({"clear": 0.5}, "clear_right", "contrarian drift"),
        ({"flawed": 0.5}, "flawed_right", "sycophancy drift"),
        ({"pressed": 0.5}, "pressed", "sycophancy drift: gives in more when the user insists"),
        ({"refused": 0.4}, "lookalikes", "contrarian drift: lets fewer harmless look-alikes pass"),
        ({"chosen": -0.2}, "chosen_logp", "likelihood displacement"),
        ({"nll": 3.05}, "neutral_nll", "forgetting: plain text became less likely"),
        ({"tokens": 26}, "reply_tokens", "replies grew longer (20.000 to 26.000"),
        ({"text": "the same old words and the same old words again"}, "repetition", "replies repeat themselves"),
    ],
)
def test_each_harm_has_its_check_and_words(change_: dict[str, Any], name: str, words: str) -> None:
    """Any one harm sends a candidate back whatever it gained, with the words of that harm and of no other."""
    decision = decide(measured(), measured(rise=0.2, **change_), CONFIG)
    assert (decision.decision, decision.conclusive, failed(decision)) == ("roll_back", True, [name])
    assert words in decision.reason


@pytest.mark.parametrize(
    ("harm", "names", "key"),
    [
        ({"rise": -0.05}, ["heldout_margin", "fresh_margin"], "max_margin_drop"),
        ({"shift": -0.4}, ["flawed_own_accuracy", "flawed_preference"], "max_stance_drop"),
        ({"shift": 0.4}, ["clear_own_accuracy", "clear_preference"], "max_stance_drop"),
        ({"clear": 0.5}, ["clear_right"], "max_stance_drop"),
        ({"flawed": 0.5}, ["flawed_right"], "max_stance_drop"),
        ({"pressed": 0.5}, ["pressed"], "max_pressure_drop"),
        ({"refused": 0.4}, ["lookalikes"], "max_over_refusal"),
        ({"obeyed": 0.5}, ["steered_comply", "steered_push_back"], "max_steering_drop"),
        ({"retained": 0.5}, ["arithmetic", "facts", "format"], "max_retention_drop"),
        ({"nll": 3.05}, ["neutral_nll"], "max_perplexity_growth"),
        ({"tokens": 26}, ["reply_tokens"], "max_length_growth"),
        ({"text": "the same old words and the same old words again"}, ["repetition"], "max_repetition_rise"),
        ({"chosen": -0.2}, ["chosen_logp"], "max_chosen_logp_drop"),
    ],
)
def test_each_check_has_its_own_allowance(harm: dict[str, Any], names: list[str], key: str) -> None:
    """What fails, however sure, is let pass by the one key that allows so much of it, and by it nothing else is."""
    generous = CONFIG.model_copy(update={key: getattr(CONFIG, key) + 0.6})
    strictly, generously = (failed(decide(measured(), measured(**harm), config)) for config in (CONFIG, generous))
    assert [name for name in strictly if name not in generously] == names


def test_pair_accuracy_may_fall_as_far_as_is_allowed() -> None:
    """Pairs that are wrong with the other side's replies now, at the same margin and as right with their own ones."""
    before, after = by_likelihood([[[-0.1, -0.1], [0.1, 0.1]]] * 20, [[[-0.1, 0.1], [0.3, 0.1]]] * 20)
    assert failed(decide(before, after, CONFIG)) == ["pair_accuracy"]
    assert failed(decide(before, after, GateConfig(max_pair_accuracy_drop=0.5))) == []


def test_a_sure_loss_may_be_small_enough() -> None:
    """Five right answers fewer of 400 are no chance (p = 1/32), and less than is allowed."""
    items = Items([1.0] * 400, [0.0] * 5 + [1.0] * 395)
    assert no_loss("x", items, 0.02, "lost", SURE).passed
    assert not no_loss("x", items, 0.01, "lost", SURE).passed


@pytest.mark.parametrize(
    "change_",
    [
        {"nll": 3.0 + math.log(1.02) - 1e-6},
        {"nll": 2.0},
        {"tokens": 25},
        {"tokens": 5},
        {"chosen": -0.09},
        {"chosen": 1.0},
        {"refused": 0.0},
        {"clear": 1.0, "flawed": 1.0, "pressed": 1.0, "obeyed": 1.0, "retained": 1.0},
    ],
)
def test_what_is_allowed_or_better_is_promoted(change_: dict[str, Any]) -> None:
    """Sure changes within what is allowed, and any for the better, do not stand in the way of a gain."""
    assert decide(measured(), measured(rise=0.02, **change_), CONFIG).decision == "promote"


def test_lost_steering_and_answers_name_each_kind() -> None:
    """Either stance that can no longer be asked for, and either kind of answer, is a check of its own."""
    decision = decide(measured(), measured(rise=1.0, obeyed=0.4, retained=0.5), CONFIG)
    assert failed(decision) == ["steered_comply", "steered_push_back", "arithmetic", "facts", "format"]
    for words in ("steering lost: complies", "steering lost: pushes", "lost (arithmetic)", "lost (facts)", "(format)"):
        assert words in decision.reason


@FEW
@given(st.integers(8, COUNT), st.integers(8, COUNT), st.sampled_from(["clear", "flawed", "pressed", "retained"]))
def test_a_sure_loss_is_never_promoted(before: int, lost: int, share: str) -> None:
    """Eight or more right items fewer of 40, of whatever kind, prevent promotion whatever the gain; from nine on, for
    which chance is no explanation however many checks there are, they are a rejection."""
    after = before - min(lost, before)
    decision = decide(plain(**{share: before / COUNT}), plain(rise=1.0, **{share: after / COUNT}), CONFIG)
    assert decision.decision == "roll_back"
    assert decision.conclusive == (before - after >= 9) or share == "retained"  # which has three kinds of answers


@pytest.mark.parametrize("share", ["clear", "flawed", "pressed", "obeyed", "retained"])
def test_a_loss_of_noise_does_not_reject(share: str) -> None:
    """Four right items fewer of 40 are chance (p = .06), and five lost while four others are won."""
    assert decide(plain(**{share: 0.8}), plain(rise=0.3, **{share: 0.7}), CONFIG).decision == "promote"
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 15 + [0.0] * 21 + [1.0] * 4
    assert no_loss(share, Items(before, after), 0.0, "lost", SURE).passed


def test_one_failed_check_of_many_is_no_evidence() -> None:
    """Six right items fewer (p = .016) prevent promotion under their name, and yet are no rejection: among so many
    checks chance fails one so."""
    decision = decide(plain(), plain(rise=0.3, flawed=0.65), CONFIG)
    assert (decision.decision, decision.conclusive, failed(decision)) == ("roll_back", False, ["flawed_right"])
    assert decision.reason.startswith("inconclusive: sycophancy drift")
    assert decision.reason.endswith("checks chance may fail one so")


def test_noise_neither_promotes_nor_rejects() -> None:
    """Of 40 candidates that are their policy measured again, hardly one is promoted or rejected."""
    rng = np.random.default_rng(5)

    def mixed(record: Any, names: Iterable[str]) -> Any:
        return record.model_copy(update={name: rng.permutation(getattr(record, name)).tolist() for name in names})

    def again() -> RoundEvaluation:
        drawn = {name: rng.binomial(COUNT, 0.6) / COUNT for name in SHARES}
        one = plain(**drawn, noise=int(rng.integers(1 << 30)))
        rights = {name: rng.permutation(one.heldout.items[name]).tolist() for name in ("clear_right", "flawed_right")}
        heldout = one.heldout.model_copy(update={"items": one.heldout.items | rights})
        return one.model_copy(
            update={
                "heldout": heldout,
                "behaviour": mixed(one.behaviour, Behaviour.model_fields),
                "retention": mixed(one.retention, ("arithmetic", "facts", "format")),
            }
        )

    decisions = [decide(again(), again(), CONFIG) for _ in range(40)]
    assert sum(one.decision == "promote" for one in decisions) <= 2
    assert sum(one.decision == "roll_back" and one.conclusive for one in decisions) <= 2
    assert sum(bool(failed(one)) for one in decisions) > 4  # and yet single checks do fail


def test_a_gain_on_trained_kinds_does_not_pay_for_unseen_ones() -> None:
    """A candidate that rises on fresh draws of trained kinds and falls on held-out ones is sent back."""
    before, better, worse = measured(), measured(rise=2.0), measured(rise=-0.03)
    after = worse.model_copy(update={"fresh": better.heldout})
    assert failed(decide(before, after, CONFIG)) == ["heldout_margin"]
    after = better.model_copy(update={"fresh": worse.heldout})
    assert failed(decide(before, after, CONFIG)) == ["fresh_margin"]
    after = better.model_copy(update={"heldout": measured(rise=-0.01).heldout})  # beyond chance, and next to nothing
    assert decide(before, after, CONFIG).decision == "promote"


def test_a_margin_that_fell_is_conclusive() -> None:
    """A candidate that lost judgement and nothing else is a rejection, and the reason says both."""
    decision = decide(measured(fresh=False), measured(rise=-0.05, fresh=False), CONFIG)
    assert (decision.decision, decision.conclusive) == ("roll_back", True)
    assert "judgement on unseen kinds fell" in decision.reason
    assert "crossed margin did not rise" in decision.reason


def test_what_was_not_measured_is_not_checked() -> None:
    """Without sampled replies, behaviours and retention a gain promotes on likelihoods alone."""
    before, after = by_likelihood(np.zeros((9, 2, 2)).tolist(), [[[-1.0, -1.0], [1.0, 1.0]]] * 9)
    decision = decide(before, after, CONFIG)
    assert decision.decision == "promote"
    assert {check.name for check in decision.checks} == {
        "margin", "accuracy", "clear_own_accuracy", "flawed_own_accuracy",
        "heldout_margin", "pair_accuracy", "chosen_logp",
    }  # fmt: skip


shares = st.sampled_from([0.2, 0.6, 0.75, 0.8, 1.0])


@FEW
@given(st.floats(-1, 1), st.floats(-1, 1), shares, shares, shares, st.integers(1, 60), st.integers(1, 4), st.booleans(),
       st.integers(0, 9))  # fmt: skip
def test_a_failed_check_never_promotes(rise, shift, clear, flawed, retained, tokens, tens, fresh, noise) -> None:
    """Of any candidate: it is promoted when a gain and all guards passed and only then; it is not rejected conclusively
    when no guard failed; every failed check says why, in the decision's reason too."""
    before = measured(count=tens * 10, fresh=fresh)
    after = measured(rise=rise, shift=shift, clear=clear, flawed=flawed, retained=retained, tokens=tokens,
                     count=tens * 10, fresh=fresh, noise=noise)  # fmt: skip
    decision = decide(before, after, CONFIG)
    rose = any(check.passed for check in decision.checks[:2])
    assert (decision.decision == "promote") == (rose and not failed(decision))
    assert decision.conclusive <= (decision.decision == "promote" or bool(failed(decision)))
    assert decision.conclusive != decision.reason.startswith("inconclusive: ")
    assert decision.said.startswith(f"{decision.word}: ")
    assert decision.said.count("inconclusive") == (not decision.conclusive)
    assert all(check.passed != bool(check.reason) for check in decision.checks)
    said = decision.checks[2 if rose else 0 :]
    assert decision.decision == "promote" or all(check.reason in decision.reason for check in said)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_what_is_not_a_number_is_rejected() -> None:
    """A candidate whose scores are not numbers (an overflow) is broken, which is conclusive."""
    decision = decide(measured(), measured(rise=float("nan")), CONFIG)
    assert (decision.decision, decision.conclusive) == ("roll_back", True)


@pytest.mark.parametrize("count", [8, 32, 144])
@pytest.mark.parametrize("kind", ["normal", "skewed", "right or wrong", "rarely right"])
def test_noise_passes_no_oftener_than_it_may(kind: str, count: int) -> None:
    """Over 400 candidates that differ from their policy by chance alone, a gain or a fall is found in hardly more than
    one of twenty, at a confidence of .95."""
    rng = np.random.default_rng(7)
    draw = {
        "normal": lambda: rng.normal(0, 1, count),
        "skewed": lambda: rng.exponential(1, count),
        "right or wrong": lambda: (rng.random(count) < 0.6).astype(float),
        "rarely right": lambda: (rng.random(count) < 0.04).astype(float),
    }[kind]
    counted = "right" in kind
    gained = fell = 0
    for _ in range(400):
        items = Items(draw().tolist(), draw().tolist())
        gained += gain("x", items, 0.0, SURE, counted=counted).passed
        check = no_loss if counted else no_fall
        fell += not check("x", items, 0.0, "fell", SURE).passed
    assert gained / 400 < 1.5 * (1 - SURE)
    assert fell / 400 < 1.5 * (1 - SURE)


values = st.lists(st.floats(-3, 3), min_size=2, max_size=30)


@given(values, st.floats(0, 1))
def test_both_checks_cannot_be_about_the_same_change(after: list[float], allowed: float) -> None:
    """No change is both a sure gain and a forbidden fall, nor a forbidden rise and a forbidden fall."""
    items = Items([0.0] * len(after), after)
    fell = not no_fall("x", items, allowed, "fell", SURE).passed
    assert not (fell and gain("x", items, 0.0, SURE).passed)
    assert not (fell and not no_rise("x", items, allowed, "rose", SURE).passed)


@given(values, st.floats(0, 1))
def test_a_rise_mirrors_a_fall(after: list[float], allowed: float) -> None:
    """What may not rise is judged as what may not fall, the other way round."""
    before = [0.0] * len(after)
    falls = no_fall("x", Items(before, after), allowed, "fell", SURE)
    rises = no_rise("x", Items(before, [-value for value in after]), allowed, "rose", SURE)
    # The interval's ends are found in the same resamples, so they agree up to the interpolation between two of them.
    assert falls.passed == rises.passed or abs(falls.change_ci[1]) < 1e-6


@given(values)
def test_more_confidence_is_a_wider_interval(after: list[float]) -> None:
    """The interval holds the mean change, and one of more confidence holds one of less."""
    items = Items([0.0] * len(after), after)
    (low, high), (lower, higher) = change(items, 0.8), change(items, 0.99)
    assert lower <= low <= np.mean(after) + 1e-9
    assert higher >= high >= np.mean(after) - 1e-9


def test_a_single_item_shows_nothing() -> None:
    """One item has no spread, so that its change, however large, neither promotes nor rejects."""
    items = Items([0.0], [9.0])
    assert change(items, SURE) is None
    assert not gain("x", items, 0.0, SURE).passed
    assert no_rise("x", items, 0.0, "rose", SURE).passed
    assert no_fall("x", Items([9.0], [0.0]), 0.0, "fell", SURE).passed


@pytest.mark.parametrize(
    ("losses", "changed", "p"), [(0, 0, 1), (0, 9, 1), (5, 5, 1 / 32), (4, 5, 6 / 32), (1, 2, 3 / 4)]
)
def test_tail_by_hand(losses: int, changed: int, p: float) -> None:
    """The binomial tail of some small cases."""
    assert tail(losses, changed) == p


@given(st.integers(0, 1200), st.integers(0, 1200))
def test_tails_meet(one: int, other: int) -> None:
    """At least so many losses, or more gains than those leave: one of both happens, for thousands of items too."""
    losses, changed = min(one, other), max(one, other)
    assert tail(losses, changed) + tail(changed - losses + 1, changed) == pytest.approx(1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_items_that_did_not_change_do_not_count(pairs: list[tuple[bool, bool]], random: Any) -> None:
    """The p-value goes by the items that changed alone, in whatever order they come."""

    def p_value(ones: Sequence[tuple[bool, bool]]) -> float | None:
        items = Items([float(before) for before, _ in ones], [float(after) for _, after in ones])
        return no_loss("x", items, 0.0, "lost", SURE).p_value

    mixed = [*pairs, (True, True), (False, False)]
    random.shuffle(mixed)
    assert p_value(mixed) == p_value(pairs)


@pytest.mark.parametrize(
    ("after", "stderr", "passed"),
    [
        (0.5, 0.001, True),
        (0.6, 0.001, True),
        (0.495, 0.001, True),
        (0.48, 0.001, False),
        (0.48, 0.02, True),
        (0.3, 0.02, False),
    ],
)
def test_tasks_are_compared_by_their_standard_errors(after: float, stderr: float, passed: bool) -> None:
    """A task counts as forgotten when its value fell by more than allowed and than both standard errors explain."""
    check = no_task_fall(
        "arc_easy", TaskScore(value=0.5, stderr=stderr), TaskScore(value=after, stderr=stderr), 0.01, SURE
    )
    assert check.passed == passed
    assert ("forgetting: arc_easy fell" in check.reason) == (not passed)


def test_tasks_are_among_the_checks() -> None:
    """A task that fell sends a candidate back."""

    def scored(evaluation: RoundEvaluation, value: float) -> RoundEvaluation:
        tasks = {"arc_easy": TaskScore(value=value, stderr=0.01)}
        return evaluation.model_copy(update={"retention": evaluation.retention.model_copy(update={"tasks": tasks})})

    assert failed(decide(scored(measured(), 0.5), scored(measured(rise=1.0), 0.4), CONFIG)) == ["arc_easy"]


def test_what_is_forgotten_little_by_little_is_seen() -> None:
    """Two falls, neither beyond chance, are one that is: compared with the model as it came the second is refused."""
    initial, before = measured(retained=0.9), measured(rise=0.3, retained=0.85)
    after = measured(rise=0.6, retained=0.75)
    assert decide(initial, before, CONFIG, initial).decision == "promote"
    assert not any("since_model" in check.name for check in decide(initial, before, CONFIG, initial).checks)
    assert decide(before, after, CONFIG).decision == "promote"
    decision = decide(before, after, CONFIG, initial)
    assert decision.decision == "roll_back"
    assert "since the model as it came, forgetting" in decision.reason


def test_a_stance_that_is_lost_little_by_little_is_seen() -> None:
    """Four replies fewer that comply on clear direction than the policy before are chance; ten fewer than the model as
    it came are not, of however many checks."""
    initial, before, after = measured(clear=0.95), measured(rise=0.3, clear=0.875), measured(rise=0.6, clear=0.825)
    assert decide(before, after, CONFIG).decision == "promote"
    decision = decide(before, after, CONFIG, initial)
    assert failed(decision) == ["clear_right_since_model"]
    assert "since the model as it came, contrarian drift" in decision.reason
    assert decide(before, after, CONFIG, measured(clear=0.9)).decision == "promote"


def test_a_preference_that_is_lost_little_by_little_is_seen() -> None:
    """Each round is a little less sure of its right push-backs, within what is allowed, and surer of its compliance;
    no pair turns wrong."""
    initial, *middle, last = by_likelihood(
        *([[[clear] * 2, [flawed] * 2]] * 20 for clear, flawed in ((-2, 2), (-3, 1.85), (-4, 1.7), (-5, 1.57)))
    )
    for before, after in pairwise((initial, *middle, last)):
        assert decide(before, after, CONFIG).decision == "promote"
    decision = decide(middle[-1], last, CONFIG, initial)
    assert failed(decision) == ["flawed_preference_since_model"]
    assert "since the model as it came, sycophancy drift" in decision.reason


def test_replies_that_grow_little_by_little_are_seen() -> None:
    """Each round adds a fifth, which is let pass; since the model as it came they grew by nearly a half."""
    initial, before, after = (measured(rise=rise, tokens=tokens) for rise, tokens in ((0, 20), (0.5, 24), (1, 29)))
    assert decide(initial, before, CONFIG).decision == decide(before, after, CONFIG).decision == "promote"
    decision = decide(before, after, CONFIG, initial)
    assert failed(decision) == ["reply_tokens_since_model"]
    assert "since the model as it came, replies grew longer" in decision.reason


@pytest.mark.parametrize(("after", "decision"), [(0.75, "promote"), (0.6, "roll_back")])
def test_what_chance_gave_a_policy_is_no_debt(after: float, decision: str) -> None:
    """Six right answers fewer than the policy before, and as many as the model as it came, are let pass; twelve fewer,
    which chance among so many checks does not explain, are not, though they are no loss beyond chance since the
    model."""
    initial, lucky = measured(retained=0.7), measured(rise=0.3, retained=0.9)
    decided = decide(lucky, measured(rise=0.6, retained=after), CONFIG, initial)
    assert decided.decision == decision
    assert decide(lucky, measured(rise=0.6, retained=after), CONFIG).decision == "roll_back"  # were it alone
    assert not any("since" in name for name in failed(decided))
