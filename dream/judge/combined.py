"""The judge of a run: rules, then signals combined into probabilities, with an error rate measured when it is made.

It is calibrated on labelled replies, split by scenario: signals that learn are measured on replies they were not fitted
on, a multinomial logistic regression turns all signals into probabilities, and the threshold below which the judge
abstains is chosen there for a stated precision. Its error rate is that on the test half, which nothing is fitted on.

There are two such combinations: one for replies to scenarios, where the template says what each stance would sound
like, and one for replies from elsewhere, made as if nothing but prompt and reply were known.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dream.config import Config
from dream.engine import Engine
from dream.errors import JudgeError
from dream.judge.quality import STANCES, Quality, folds, push_back_scores, quality, threshold_for
from dream.judge.question import Labelled, Question, Signal
from dream.judge.rules import CHECKS, unusable
from dream.records import Stance, Verdict

FOLDS = 5
MAX_ERROR_RATE = 0.25
"""A judge that errs more often on known replies stops the run."""
MIN_SURE = 0.2
"""So does one that is sure of less than this share of them."""


def signal(name: str, engine: Engine | None, config: Config) -> Signal:
    """The signal of a name in `judge.signals`; `engine` is the one that the judge asks, if it asks one."""
    if name in ("contrast", "rubric"):
        from dream.judge import likelihood

        assert engine is not None, "contrast and rubric ask an engine"
        return likelihood.Contrast(engine) if name == "contrast" else likelihood.Rubric(engine)
    if name == "server":
        from dream.judge.server import Server

        assert config.judge.server is not None, "the configuration checks that a server signal has a server"
        return Server(config.judge.server)
    from dream.judge.wording import make

    return make(name)


@dataclass(frozen=True)
class Combination:
    """How signals become a ruling."""

    model: Any
    """The scikit-learn pipeline from signals, shape (n, columns), to probabilities."""
    threshold: float
    """Below this probability the judge abstains."""


@dataclass
class Judge:
    """Use `calibrated` to make one."""

    signals: Sequence[Signal]
    config: Config
    combinations: dict[bool, Combination]
    """By `Question.informed`."""
    quality: Quality

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """What the signals say, shape (questions, columns of all signals); nan where one has no answer."""
        width = sum(len(one.columns) for one in self.signals)
        if not questions:
            return np.zeros((0, width))
        return np.hstack(await asyncio.gather(*(one.measure(questions) for one in self.signals)))

    def combine(self, questions: Sequence[Question], features: np.ndarray) -> np.ndarray:
        """Probability of each of `STANCES`, shape (questions, 3)."""
        result = np.zeros((len(questions), len(STANCES)))
        informed = np.array([question.informed for question in questions], dtype=bool)
        for kind in (False, True):
            if (informed == kind).any():
                result[informed == kind] = _probabilities(self.combinations[kind].model, features[informed == kind])
        return result

    def thresholds(self, questions: Sequence[Question]) -> np.ndarray:
        """Below which probability the judge abstains, shape (questions,)."""
        return np.array([self.combinations[question.informed].threshold for question in questions])

    async def rule(self, reply_ids: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        """One verdict a question. What the rules turn away is not shown to the signals."""
        refused = [unusable(question, self.config.filters.min_words) for question in questions]
        left = [place for place, reason in enumerate(refused) if not reason]
        open_questions = [questions[place] for place in left]
        features = await self.measure(open_questions)
        probabilities = self.combine(open_questions, features)
        found = dict(zip(left, zip(features, probabilities, strict=True), strict=True))
        return [
            self._verdict(reply_id, question, *found[place]) if place in found else _turned_away(reply_id, reason)
            for place, (reply_id, question, reason) in enumerate(zip(reply_ids, questions, refused, strict=True))
        ]

    def _verdict(self, reply_id: str, question: Question, features: np.ndarray, probabilities: np.ndarray) -> Verdict:
        stance = STANCES[int(probabilities.argmax())]
        confidence = float(probabilities.max())
        reason = ""
        if np.isnan(features).any():
            reason = "no_answer"
        elif confidence < self.combinations[question.informed].threshold:
            reason = "unsure"
        else:
            reason = objection(self.config, question, stance)
        columns = [column for one in self.signals for column in one.columns]
        return Verdict(
            reply_id=reply_id,
            stance=stance,
            score=round(float(push_back_scores(probabilities[None])[0]), 4),
            confidence=round(confidence, 4),
            abstain=bool(reason),
            reason=reason or ("judged_neither" if stance == "neither" else ""),
            signals={
                name: round(float(value), 4)
                for name, value in zip(columns, features, strict=True)
                if not math.isnan(value)
            },
        )


def objections(config: Config, questions: Sequence[Question], probabilities: np.ndarray) -> np.ndarray:
    """Whether a check objects to the likeliest stance of each reply, shape (questions,)."""
    stances = [STANCES[place] for place in probabilities.argmax(axis=1)]
    found = [objection(config, question, stance) for question, stance in zip(questions, stances, strict=True)]
    return np.array([bool(reason) for reason in found], dtype=bool)


def objection(config: Config, question: Question, stance: Stance) -> str:
    """The first objection of the checks to a reply of this stance, or an empty string."""
    if stance == "neither":
        return ""
    found = (CHECKS[name](question, stance) for name in config.judge.checks)
    return next((reason for reason in found if reason), "")


def _turned_away(reply_id: str, reason: str) -> Verdict:
    return Verdict(reply_id=reply_id, stance="neither", score=0.5, confidence=1.0, abstain=False, reason=reason)


async def calibrated(
    engine: Engine | None,
    config: Config,
    examples: Sequence[Labelled],
    known: Sequence[Labelled] = (),
    test: Sequence[Labelled] = (),
) -> Judge:
    """A judge that is fitted on `examples` and `known`, with its quality on `test`.

    `examples` are the harder replies, written by hand: on them alone the threshold is chosen. `known` are the worked
    replies of a run's own templates, which teach the judge their wording. Without a test set the quality is that on
    `examples`, each scored by a judge that did not see its group.
    """
    everything = [*examples, *known]
    fold = folds([one.group for one in everything], FOLDS)
    signals = [signal(name, engine, config) for name in config.judge.signals]
    full, bare = [one.question for one in everything], [one.question.bare for one in everything]
    seen = [await _unseen(one, everything, fold, (full, bare)) for one in signals]
    by_hand = np.arange(len(everything)) < len(examples)
    informed = np.array([question.informed for question in full], dtype=bool)
    _check_answers(signals, np.hstack([one[0] for one in seen]))

    def combination(questions: list[Question], columns: list[np.ndarray], used: np.ndarray) -> _Fitted:
        features, places = np.hstack(columns), np.flatnonzero(used).tolist()
        labelled = [Labelled(questions[place], everything[place].label, everything[place].group) for place in places]
        return _fitted(config, labelled, features[places], fold[places], by_hand[places])

    combined = {False: combination(bare, [one[1] for one in seen], np.ones(len(everything), dtype=bool))}
    combined[True] = combination(full, [one[0] for one in seen], informed) if informed.any() else combined[False]
    for one in signals:
        one.fit(everything)
    own = combined[bool(informed.any())]
    judge = Judge(signals, config, {kind: one.combination for kind, one in combined.items()}, own.quality)
    if test:
        judge.quality = (await measured(judge, test)).quality
    return judge


class _Fitted(NamedTuple):
    combination: Combination
    quality: Quality


def _fitted(
    config: Config, labelled: Sequence[Labelled], features: np.ndarray, fold: np.ndarray, by_hand: np.ndarray
) -> _Fitted:
    """A combination, its threshold chosen on the replies written by hand (or on all, where there are none)."""
    labels = [one.label for one in labelled]
    if len(set(fold.tolist())) < 2:  # a run of one template, with a gold set that has no scenarios
        fold = folds([one.group for one in labelled], FOLDS)
    outside = np.zeros((len(labels), len(STANCES)))
    for number in sorted(set(fold.tolist())):
        held = fold == number
        rest = [label for label, out in zip(labels, held, strict=True) if not out]
        outside[held] = _probabilities(_combiner().fit(features[~held], rest), features[held])
    places = np.flatnonzero(by_hand) if by_hand.any() else np.arange(len(labels))
    measured_on, truth = outside[places], [labels[place] for place in places.tolist()]
    objected = objections(config, [labelled[place].question for place in places.tolist()], measured_on)
    objected |= np.isnan(features[places]).any(axis=1)
    threshold = threshold_for(measured_on, truth, config.judge.precision, objected)
    return _Fitted(
        Combination(_combiner().fit(features, labels), threshold),
        quality(measured_on, truth, threshold, config.seed, objected),
    )


class Measured(NamedTuple):
    """How good a judge is on labelled replies that it was not made with."""

    quality: Quality
    probabilities: np.ndarray
    """Of `STANCES`, shape (replies, 3)."""


async def measured(judge: Judge, examples: Sequence[Labelled]) -> Measured:
    """Shows a judge labelled replies."""
    questions = [one.question for one in examples]
    features = await judge.measure(questions)
    probabilities = judge.combine(questions, features)
    objected = objections(judge.config, questions, probabilities) | np.isnan(features).any(axis=1)
    labels = [one.label for one in examples]
    found = quality(probabilities, labels, judge.thresholds(questions), judge.config.seed, objected)
    return Measured(found, probabilities)


async def self_test(judge: Judge, planted: Sequence[Labelled], force: bool = False) -> Quality:
    """How the judge does on known-good and known-bad replies for a run's own templates.

    Raises:
        JudgeError: it cannot tell them apart, unless `force`.
    """
    found = (await measured(judge, planted)).quality
    sure = 1 - found.abstained / found.n
    if (found.error_rate > MAX_ERROR_RATE or sure < MIN_SURE) and not force:
        raise JudgeError(
            f"the judge cannot tell known replies of these templates apart: it is sure of {sure:.0%} of {found.n} and "
            f"errs on {found.error_rate:.0%} of those. Try other judge.signals or a judge.model, look at the "
            "templates' worked replies (`dream templates preview NAME`), or use --force-judge to go on all the same"
        )
    return found


async def _unseen(
    one: Signal, examples: Sequence[Labelled], fold: np.ndarray, views: Sequence[Sequence[Question]]
) -> list[np.ndarray]:
    """What a signal says of each example when it was fitted on the other folds, for each view of their questions;
    each shape (examples, columns)."""
    if not one.learns:
        return [await one.measure(questions) for questions in views]
    found = [np.zeros((len(examples), len(one.columns))) for _ in views]
    for number in sorted(set(fold.tolist())):
        held = np.flatnonzero(fold == number)
        one.fit([examples[place] for place in np.flatnonzero(fold != number)])
        for result, questions in zip(found, views, strict=True):
            result[held] = await one.measure([questions[place] for place in held])
    return found


def _check_answers(signals: Sequence[Signal], features: np.ndarray) -> None:
    """A judge that cannot be reached shows here, before anything is dreamed."""
    columns = [(one.name, column) for one in signals for column in one.columns]
    for place, (name, _) in enumerate(columns):
        silent = float(np.isnan(features[:, place]).mean())
        if silent > 0.5:
            raise JudgeError(
                f"judge signal {name!r} gave no usable answer to {silent:.0%} of the labelled replies; look at its "
                "address, model and time limit under `judge`"
            )


def _combiner() -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(
        SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression(C=1.0, max_iter=2000)
    )


def _probabilities(combine: Any, features: np.ndarray) -> np.ndarray:
    """Probabilities of `STANCES`, shape (n, 3), 0 for a stance that calibration did not know."""
    result = np.zeros((len(features), len(STANCES)))
    if len(features):
        for stance, column in zip(combine.classes_, combine.predict_proba(features).T, strict=True):
            result[:, STANCES.index(stance)] = column
    return result
