"""The gate: does a candidate become the policy? Pure functions over two evaluations on the same items.

Every comparison is paired and has an interval: the gain must be larger than chance to promote, a loss larger than
chance to reject. Comply and push-back are gated apart, so that one cannot be bought with the other.
"""

from typing import Literal

import numpy as np

from dream.config import GateConfig
from dream.records import Record
from train.evals import RoundEvaluation, interval


class Check(Record):
    """One comparison: the mean change from the policy to the candidate with its 95 % interval."""

    name: str
    before: float
    after: float
    change_ci: tuple[float, float] | None = None
    passed: bool
    reason: str = ""


class Decision(Record):
    """What the gate decided, with every check it looked at."""

    decision: Literal["promote", "roll_back"]
    reason: str
    checks: list[Check]


def decide(before: RoundEvaluation, after: RoundEvaluation, config: GateConfig) -> Decision:
    """Compares a candidate with the policy before it."""
    held_before, held_after = before.heldout.items, after.heldout.items
    gained = gain("margin", _margins(before), _margins(after), config.min_margin_gain)
    checks = [
        gained,
        no_fall("heldout_margin", held_before["margin"], held_after["margin"], 0.0, "judgement on unseen kinds fell"),
        no_fall(
            "pair_accuracy",
            held_before["pair_right"],
            held_after["pair_right"],
            config.max_pair_accuracy_drop,
            "held-out pair accuracy fell",
        ),
    ]
    for side, words in (("clear", "contrarian drift: complies less with clear direction"),
                        ("flawed", "sycophancy drift: pushes back less on flawed direction")):  # fmt: skip
        name = f"{side}_right"
        if name in held_before:
            checks.append(no_fall(name, held_before[name], held_after[name], config.max_stance_drop, words))
    if before.retention:
        words = "forgetting: arithmetic answers were lost"
        checks.append(no_fall("retention", before.retention, after.retention, config.max_retention_drop, words))
    if before.heldout.reply_tokens and after.heldout.reply_tokens is not None:
        checks.append(_length(before.heldout.reply_tokens, after.heldout.reply_tokens, config.max_length_growth))
    failed = [check.reason for check in checks if not check.passed]
    if failed:
        return Decision(decision="roll_back", reason="; ".join(failed), checks=checks)
    low, high = gained.change_ci or (0.0, 0.0)
    reason = f"crossed margin rose by {gained.after - gained.before:.3f} [{low:.3f}, {high:.3f}] and nothing fell"
    return Decision(decision="promote", reason=reason, checks=checks)


def gain(name: str, before: list[float], after: list[float], least: float) -> Check:
    """Passes when the interval of the paired mean change lies above `least`."""
    low, high = _change(before, after)
    passed = low > least
    reason = "" if passed else f"{name} did not rise beyond chance (change [{low:+.3f}, {high:+.3f}])"
    return _check(name, before, after, (low, high), passed, reason)


def no_fall(name: str, before: list[float], after: list[float], allowed: float, words: str) -> Check:
    """Fails when the mean fell by more than `allowed` and the interval of the change lies below zero."""
    low, high = _change(before, after)
    fell = float(np.mean(before) - np.mean(after))
    passed = not (fell > allowed and high < 0)
    return _check(name, before, after, (low, high), passed, "" if passed else f"{words} ({fell:.3f})")


def _length(before: float, after: float, growth: float) -> Check:
    passed = after <= growth * before
    reason = "" if passed else f"replies grew from {before:.0f} to {after:.0f} tokens"
    return Check(name="reply_tokens", before=before, after=after, passed=passed, reason=reason)


def _margins(evaluation: RoundEvaluation) -> list[float]:
    fresh = evaluation.fresh.items["margin"] if evaluation.fresh else []
    return [*evaluation.heldout.items["margin"], *fresh]


def _change(before: list[float], after: list[float]) -> tuple[float, float]:
    return interval(np.array(after) - np.array(before), seed=0)


def _check(
    name: str, before: list[float], after: list[float], ci: tuple[float, float], passed: bool, reason: str
) -> Check:
    return Check(
        name=name,
        before=float(np.mean(before)),
        after=float(np.mean(after)),
        change_ci=ci,
        passed=passed,
        reason=reason,
    )
