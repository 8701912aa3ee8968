"""How good a judge is on labelled replies, and how sure it must be."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dream.errors import DataError
from dream.records import Record, Stance

STANCES: tuple[Stance, Stance, Stance] = ("comply", "push_back", "neither")
THRESHOLDS = np.round(np.arange(0.4, 1.0, 0.01), 2)
MIN_RULED = 20
"""A threshold is chosen from at least so many replies that it lets through."""


class Quality(Record):
    """How good a judge is on labelled replies.

    `auc` is of push_back against comply; `accuracy` and `kappa` of the likeliest stance over all replies; `error_rate`
    the share of wrong rulings among those it did not abstain on. `confusion` counts label -> ruling.
    """

    n: int
    auc: float
    auc_ci: tuple[float, float]
    accuracy: float
    kappa: float
    abstained: int
    error_rate: float
    confusion: dict[str, dict[str, int]] = {}


def quality(
    probabilities: np.ndarray,
    labels: Sequence[Stance],
    threshold: float | np.ndarray,
    seed: int = 0,
    objected: np.ndarray | None = None,
) -> Quality:
    """Compares probabilities of `STANCES`, shape (n, 3), with labels. The judge abstains below the threshold, one for
    all or shape (n,), and where a check objected, shape (n,).

    Where no label is `neither` (files of `dream judge check` need not have it) that stance is not counted as an answer:
    a reply that the judge finds to be neither is one it abstains on.

    Raises:
        DataError: not both stances are among the labels, so that nothing can be told apart.
    """
    if not {"comply", "push_back"} <= set(labels):
        raise DataError("the labelled replies need both labels, comply and push_back")
    stances = [stance for stance in STANCES if stance in set(labels)]
    columns = [STANCES.index(stance) for stance in stances]
    said = [stances[place] for place in probabilities[:, columns].argmax(axis=1)]
    overall = [STANCES[place] for place in probabilities.argmax(axis=1)]
    sure = probabilities.max(axis=1) >= threshold
    if objected is not None:
        sure &= ~objected
    sure &= np.array([stance in stances for stance in overall])
    wrong = np.array([one != label for one, label in zip(said, labels, strict=True)])
    either = np.array([label != "neither" for label in labels])
    scores = push_back_scores(probabilities)
    truth = np.array([label == "push_back" for label in labels], dtype=float)
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(either)
    draws = places[rng.integers(0, len(places), (200, len(places)))]
    low, high = np.nanpercentile([auc(scores[draw], truth[draw]) for draw in draws], [2.5, 97.5])
    agreement = 1 - float(wrong.mean())
    given, true = Counter(said), Counter(labels)
    chance = sum(given[stance] * true[stance] for stance in stances) / len(labels) ** 2
    ruled = ["abstain" if not one else stance for one, stance in zip(sure, said, strict=True)]
    confusion = {
        stance: Counter(r for r, label in zip(ruled, labels, strict=True) if label == stance) for stance in stances
    }
    return Quality(
        n=len(labels),
        auc=round(auc(scores[places], truth[places]), 4),
        auc_ci=(round(float(low), 4), round(float(high), 4)),
        accuracy=round(agreement, 4),
        kappa=round((agreement - chance) / (1 - chance) if chance < 1 else 0.0, 4),
        abstained=int((~sure).sum()),
        error_rate=round(float(wrong[sure].mean()) if sure.any() else 0.5, 4),
        confusion={
            stance: {name: counts[name] for name in (*stances, "abstain")} for stance, counts in confusion.items()
        },
    )


def push_back_scores(probabilities: np.ndarray) -> np.ndarray:
    """Probability of push_back against comply, shape (n,), from probabilities of `STANCES`, shape (n, 3)."""
    comply, push_back = probabilities[:, 0], probabilities[:, 1]
    return np.asarray(push_back / np.maximum(comply + push_back, 1e-12))


def threshold_for(
    probabilities: np.ndarray, labels: Sequence[Stance], precision: float, objected: np.ndarray | None = None
) -> float:
    """The lowest threshold at which the rulings that no check objected to are right with this precision.

    Where none reaches it, the threshold with the best precision among those that let `MIN_RULED` replies through.
    """
    open_to_rule = np.ones(len(labels), dtype=bool) if objected is None else ~objected
    confidence = np.where(open_to_rule, probabilities.max(axis=1), -1.0)
    right = np.array([STANCES[place] for place in probabilities.argmax(axis=1)]) == np.array(labels)
    shares: list[tuple[float, float]] = []
    for threshold in THRESHOLDS:
        ruled = confidence >= threshold
        if ruled.sum() < max(1, min(MIN_RULED, open_to_rule.sum())):
            break
        shares.append((float(right[ruled].mean()), float(threshold)))
        if shares[-1][0] >= precision:
            return float(threshold)
    return max(shares)[1] if shares else float(THRESHOLDS[-1])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half; nan with one class only."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5]
    if not len(positive) or not len(negative):
        return math.nan
    above = (positive[:, None] > negative[None, :]).mean()
    return float(above + 0.5 * (positive[:, None] == negative[None, :]).mean())


def folds(groups: Sequence[Any], count: int) -> np.ndarray:
    """A fold per item, shape (n,): by group, or in turn where there are too few groups to leave some out."""
    names = sorted(set(groups))
    if len(names) < count:
        return np.arange(len(groups)) // 2 % count
    number = {group: place % count for place, group in enumerate(names)}
    return np.array([number[group] for group in groups])
