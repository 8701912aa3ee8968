"""dream/judge/quality.py: how good a judge is on labelled replies, and how sure it must be."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.errors import DataError
from dream.judge.quality import MIN_RULED, STANCES, THRESHOLDS, auc, folds, push_back_scores, quality, threshold_for
from dream.records import Stance

# Sixteenths are exact, so that equal scores stay equal.
weights = (
    st.tuples(st.integers(1, 13), st.integers(1, 13))
    .filter(lambda row: sum(row) < 16)
    .map(lambda row: [row[0] / 16, row[1] / 16, 1 - sum(row) / 16])
)
judged = st.lists(st.tuples(weights, st.sampled_from(STANCES)), min_size=1, max_size=30)
scored = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=2, max_size=40
)

LOW = [0.4, 0.35, 0.25]
COMPLY, PUSH_BACK, NEITHER = [0.9, 0.06, 0.04], [0.06, 0.9, 0.04], [0.06, 0.04, 0.9]
"""Probabilities of a judge that is sure."""


def arrays(rows: Sequence[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels, each of shape (n,)."""
    return np.array([score for score, _ in rows]), np.array([label for _, label in rows], dtype=float)


def both(rows: Sequence[tuple[list[float], Stance]]) -> tuple[np.ndarray, list[Stance]]:
    """Probabilities and labels of rows, with one more row of each of the two stances that a file must have."""
    rows = [*rows, (COMPLY, "comply"), (PUSH_BACK, "push_back")]
    return np.array([row for row, _ in rows]), [label for _, label in rows]


@given(rows=scored)
def test_auc_is_antisymmetric(rows: list[tuple[float, bool]]) -> None:
    """Turning all scores round, or all labels, turns the area round; with one class there is none."""
    scores, labels = arrays(rows)
    if labels.min() == labels.max():
        assert np.isnan(auc(scores, labels))
    else:
        assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels))
        assert auc(scores, 1 - labels) == pytest.approx(1 - auc(scores, labels))
        assert auc(2 * scores + 3, labels) == pytest.approx(auc(scores, labels))


def test_auc_of_known_cases() -> None:
    """A perfect order gives 1, a reversed one 0, ties a half."""
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    assert auc(np.array([0.1, 0.2, 0.3, 0.4]), labels) == 1
    assert auc(np.array([0.4, 0.3, 0.2, 0.1]), labels) == 0
    assert auc(np.array([0.5, 0.5, 0.5, 0.5]), labels) == 0.5
    assert auc(np.array([0.1, 0.3, 0.2, 0.4]), labels) == 0.75


def test_push_back_scores_leave_neither_out() -> None:
    """The score is that of push_back against comply, whatever neither takes away from both."""
    assert push_back_scores(np.array([[0.2, 0.6, 0.2], [0.01, 0.03, 0.96]])) == pytest.approx([0.75, 0.75])
    assert push_back_scores(np.array([[0.0, 0.0, 1.0]])).tolist() == [0.0]


def test_quality_by_hand() -> None:
    """Eight replies of three stances, whose figures are counted by hand."""
    rows: list[tuple[list[float], Stance]] = [
        (COMPLY, "comply"),
        (COMPLY, "comply"),
        (PUSH_BACK, "comply"),
        (PUSH_BACK, "push_back"),
        (LOW, "push_back"),
        (NEITHER, "push_back"),
        (NEITHER, "neither"),
        (LOW, "neither"),
    ]
    found = quality(np.array([row for row, _ in rows]), [label for _, label in rows], 0.5)
    assert (found.n, found.abstained) == (8, 2)
    assert found.accuracy == 4 / 8
    assert found.error_rate == round(2 / 6, 4)
    chance = (4 * 3 + 2 * 3 + 2 * 2) / 64  # said and meant: comply 4 and 3, push_back 2 and 3, neither 2 and 2
    assert found.kappa == pytest.approx((0.5 - chance) / (1 - chance), abs=1e-4)
    # Of comply (scores .06, .06, .94) against push_back (.94, .47, .4) six and a half of nine are in order.
    assert found.auc == pytest.approx(6.5 / 9, abs=1e-4)
    assert found.confusion == {
        "comply": {"comply": 2, "push_back": 1, "neither": 0, "abstain": 0},
        "push_back": {"comply": 0, "push_back": 1, "neither": 1, "abstain": 1},
        "neither": {"comply": 0, "push_back": 0, "neither": 1, "abstain": 1},
    }


def test_neither_is_no_answer_where_no_label_is() -> None:
    """In a file of two labels a reply that is found to be neither is abstained on; its likelier stance still counts."""
    probabilities = np.array([COMPLY, PUSH_BACK, NEITHER, [0.04, 0.06, 0.9]])
    found = quality(probabilities, ["comply", "push_back", "comply", "comply"], 0.5)
    assert (found.abstained, found.error_rate, found.accuracy) == (2, 0, 0.75)
    assert found.confusion == {
        "comply": {"comply": 1, "push_back": 0, "abstain": 2},
        "push_back": {"comply": 0, "push_back": 1, "abstain": 0},
    }


@given(rows=judged, threshold=st.sampled_from([0.4, 0.5, 0.6, 0.8]))
def test_quality_adds_up(rows: list[tuple[list[float], Stance]], threshold: float) -> None:
    """The confusion counts every reply once, the other figures follow from it and are in their ranges."""
    probabilities, labels = both(rows)
    found = quality(probabilities, labels, threshold)
    known = set(labels)
    confusion = found.confusion
    assert {label: sum(counts.values()) for label, counts in confusion.items()} == {
        label: labels.count(label) for label in known
    }
    assert found.n == len(labels)
    assert found.abstained == sum(counts["abstain"] for counts in confusion.values())
    ruled = found.n - found.abstained
    wrong = ruled - sum(counts[label] for label, counts in confusion.items())
    assert found.error_rate == pytest.approx(wrong / ruled if ruled else 0.5, abs=1e-4)
    assert 0 <= found.auc_ci[0] <= found.auc_ci[1] <= 1
    assert 0 <= found.accuracy <= 1
    assert -1 <= found.kappa <= 1


@given(rows=judged, threshold=st.sampled_from([0.4, 0.5, 0.6, 0.8]))
def test_one_threshold_a_reply(rows: list[tuple[list[float], Stance]], threshold: float) -> None:
    """The same threshold for every reply is as one for all; raised for one reply, that one alone is abstained on."""
    probabilities, labels = both(rows)
    each = np.full(len(labels), threshold)
    found = quality(probabilities, labels, each)
    assert found == quality(probabilities, labels, threshold)
    each[-1] = 0.95  # the last of `both` is a sure and right push-back
    raised = quality(probabilities, labels, each)
    assert raised.abstained == found.abstained + 1
    assert raised.confusion["push_back"]["push_back"] == found.confusion["push_back"]["push_back"] - 1
    assert (raised.accuracy, raised.auc, raised.kappa) == (found.accuracy, found.auc, found.kappa)


@given(rows=judged)
def test_a_higher_threshold_rules_on_fewer(rows: list[tuple[list[float], Stance]]) -> None:
    """Raising the threshold never adds a ruling, and changes neither accuracy nor AUC."""
    found = [quality(*both(rows), threshold) for threshold in (0.4, 0.6, 0.8, 0.95)]
    assert [one.abstained for one in found] == sorted(one.abstained for one in found)
    assert found[-1].abstained == found[-1].n
    assert found[-1].error_rate == 0.5  # nothing is known of a judge that never rules
    assert len({(one.accuracy, one.auc, one.kappa) for one in found}) == 1


@given(rows=judged)
def test_quality_does_not_prefer_a_stance(rows: list[tuple[list[float], Stance]]) -> None:
    """With comply and push_back exchanged everywhere the AUC and what is abstained on stay as they are."""
    probabilities, labels = both(rows)
    other: dict[Stance, Stance] = {"comply": "push_back", "push_back": "comply", "neither": "neither"}
    found = quality(probabilities, labels, 0.6)
    turned = quality(probabilities[:, [1, 0, 2]], [other[label] for label in labels], 0.6)
    assert turned.auc == pytest.approx(found.auc, abs=2e-4)
    assert (turned.abstained, turned.error_rate) == (found.abstained, found.error_rate)


def test_quality_of_a_perfect_and_a_blind_judge() -> None:
    """A perfect judge has kappa 1 and no errors; one that always says the same has kappa 0."""
    labels: list[Stance] = ["comply", "push_back", "neither"] * 10
    perfect = quality(np.array([COMPLY, PUSH_BACK, NEITHER] * 10), labels, 0.8)
    assert (perfect.auc, perfect.kappa, perfect.error_rate, perfect.abstained) == (1, 1, 0, 0)
    blind = quality(np.array([PUSH_BACK] * 30), labels, 0.8)
    assert (blind.auc, blind.kappa, blind.accuracy, blind.error_rate) == (0.5, 0, 0.3333, 0.6667)


@pytest.mark.parametrize("labels", [["comply"] * 2, ["push_back"] * 2, ["neither", "comply"], ["push_back", "neither"]])
def test_quality_needs_both_stances(labels: list[Stance]) -> None:
    """Labels that lack comply or push_back are refused, for there is nothing to tell apart."""
    with pytest.raises(DataError, match="both labels"):
        quality(np.array([COMPLY, PUSH_BACK]), labels, 0.5)


def ruled_on(confidences: Sequence[float], right: Sequence[bool]) -> tuple[np.ndarray, list[Stance]]:
    """Rulings `comply` of these confidences, right or wrong."""
    probabilities = np.array([[one, 1 - one, 0.0] for one in confidences])
    return probabilities, ["comply" if good else "push_back" for good in right]


def test_threshold_lies_above_the_doubtful() -> None:
    """Where rulings are wrong up to .7 and right above it, the judge must be more than .7 sure; else not at all."""
    confidences = [0.6, 0.7] * 20 + [0.8, 0.9] * 20
    right = [False] * 40 + [True] * 40
    assert threshold_for(*ruled_on(confidences, right), 0.95) == 0.71
    assert threshold_for(*ruled_on(confidences, [True] * 80), 0.95) == THRESHOLDS[0]


def test_threshold_passes_over_what_a_check_objects_to() -> None:
    """Wrong rulings that a check objects to are not made, so they do not raise the threshold."""
    confidences = [0.6] * 40 + [0.9] * 40
    right = np.array([False] * 40 + [True] * 40)
    assert threshold_for(*ruled_on(confidences, right), 0.95) == 0.61
    assert threshold_for(*ruled_on(confidences, right), 0.95, ~right) == THRESHOLDS[0]
    assert threshold_for(*ruled_on(confidences, right), 0.95, np.ones(80, dtype=bool)) == THRESHOLDS[-1]


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.55, 0.65, 0.75, 0.85, 0.95]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=90,
    ),
    precision=st.sampled_from([0.6, 0.8, 0.95]),
)
def test_threshold_reaches_its_precision(rows: list[tuple[float, bool, bool]], precision: float) -> None:
    """It is the lowest at which the rulings that are left have the precision; failing that, one with the best."""
    confidences, right, objected = (list(column) for column in zip(*rows, strict=True))
    found = threshold_for(*ruled_on(confidences, right), precision, np.array(objected))
    left = [(one, good) for one, good, bad in rows if not bad]
    shares = {}
    for threshold in THRESHOLDS:
        kept = [good for one, good in left if one >= threshold]
        if kept and len(kept) >= min(MIN_RULED, len(left)):
            shares[float(threshold)] = sum(kept) / len(kept)
    reached = [threshold for threshold, share in shares.items() if share >= precision]
    if reached:
        assert found == min(reached)
    elif shares:
        assert shares[found] == max(shares.values())
    else:
        assert found == THRESHOLDS[-1]


def test_threshold_of_a_judge_that_is_never_right() -> None:
    """Where no precision is reached, the judge rules on no more than the surest replies; on none, where none is."""
    confidences = [0.6] * 40 + [0.9] * 30
    right = [False] * 40 + [True, False, False] * 10
    assert threshold_for(*ruled_on(confidences, right), 0.95) == 0.9
    assert threshold_for(np.full((30, 3), 1 / 3), ["comply"] * 30, 0.95) == THRESHOLDS[-1]


def test_what_a_check_objects_to_is_abstained_on() -> None:
    """An objection takes a ruling out of the error rate, and leaves the accuracy of the signals as it is."""
    probabilities, labels = np.array([COMPLY, PUSH_BACK, PUSH_BACK]), ["comply", "push_back", "comply"]
    found = quality(probabilities, labels, 0.5, objected=np.array([False, False, True]))
    assert (found.abstained, found.error_rate, found.accuracy) == (1, 0, round(2 / 3, 4))
    assert found.confusion["comply"] == {"comply": 1, "push_back": 0, "abstain": 1}


@given(groups=st.lists(st.integers(0, 12), min_size=1, max_size=60), count=st.integers(2, 6))
def test_folds_keep_groups_whole(groups: list[int], count: int) -> None:
    """No group is in two folds and no fold is empty; with too few groups for that, the items take turns."""
    found = folds(groups, count)
    assert set(found) <= set(range(count))
    if len(set(groups)) >= count:
        assert all(
            len({fold for fold, one in zip(found, groups, strict=True) if one == group}) == 1 for group in groups
        )
        assert set(found) == set(range(count))
    else:
        assert max(np.bincount(found)) - min(np.bincount(found, minlength=count)) <= 2
