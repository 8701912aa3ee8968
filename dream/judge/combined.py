"""The judge of a run: rules, then calibrated signals, with an error rate that is measured when the run starts.

Calibration is on labelled replies, split by template: signals that learn are fitted on the other templates' replies
before they are measured on one template's, so the error rate is that of unseen wording. What it cannot tell is how
unlike the model's own replies the labelled ones are; `dream judge check` measures that on any labelled file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dream.config import Config
from dream.engine import Engine
from dream.errors import DataError, JudgeError
from dream.judge.question import Labelled, Question, Signal
from dream.judge.rules import lacks_mention, of_other_side, unusable
from dream.judge.signals import SIGNALS
from dream.records import Record, Stance, Verdict

FOLDS = 4
MAX_ERROR_RATE = 0.25
"""A judge that errs more often on known replies stops the run."""


class Quality(Record):
    """How good a judge is on labelled replies; rates are shares, `error_rate` of those it did not abstain on."""

    n: int
    auc: float
    auc_ci: tuple[float, float]
    accuracy: float
    kappa: float
    abstained: int
    error_rate: float


@dataclass
class Judge:
    """Use `calibrated` to make one."""

    signals: Sequence[Signal]
    config: Config
    weights: np.ndarray
    quality: Quality

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """What each signal says, shape (questions, signals)."""
        if not questions:
            return np.zeros((0, len(self.signals)))
        return np.stack([np.array(await signal.measure(questions)) for signal in self.signals], axis=1)

    async def scores(self, questions: Sequence[Question]) -> np.ndarray:
        """Probability that each reply pushes back, shape (questions,), whatever the rules say of it."""
        return _probability(await self.measure(questions), self.weights)

    async def rule(self, reply_ids: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        """One verdict a question. What the rules turn away is not shown to the signals."""
        settings = self.config.judge
        refused = [unusable(question, self.config.filters.min_words) for question in questions]
        if settings.require_mentions:
            refused = [
                reason or ("off_topic" if all(lacks_mention(q, stance) for stance in ("comply", "push_back")) else "")
                for reason, q in zip(refused, questions, strict=True)
            ]
        open_places = [place for place, reason in enumerate(refused) if not reason]
        features = await self.measure([questions[place] for place in open_places])
        scores = dict(zip(open_places, _probability(features, self.weights), strict=True))
        measured = dict(zip(open_places, features.tolist(), strict=True))
        verdicts = []
        for place, question in enumerate(questions):
            if refused[place]:
                verdicts.append(
                    Verdict(
                        reply_id=reply_ids[place],
                        stance="neither",
                        score=0.5,
                        confidence=1.0,
                        abstain=False,
                        reason=refused[place],
                    )
                )
                continue
            score = float(scores[place])
            stance: Stance = "push_back" if score > 0.5 else "comply"
            confidence = max(score, 1 - score)
            reason = "" if confidence >= settings.min_confidence else "unsure"
            if not reason and settings.require_mentions and (words := lacks_mention(question, stance)):
                reason = f"does not mention {words}"
            if not reason and of_other_side(question, stance):
                reason = "of_other_side"
            named = {signal.name: round(value, 4) for signal, value in zip(self.signals, measured[place], strict=True)}
            verdicts.append(
                Verdict(
                    reply_id=reply_ids[place],
                    stance=stance,
                    score=round(score, 4),
                    confidence=round(confidence, 4),
                    abstain=bool(reason),
                    reason=reason,
                    signals=named,
                )
            )
        return verdicts


async def calibrated(engine: Engine, config: Config, examples: Sequence[Labelled], force: bool = False) -> Judge:
    """A judge whose signals are fitted and weighed on labelled replies, with its measured error rate.

    Raises:
        JudgeError: it errs on more than a quarter of replies whose stance is known, unless `force`.
    """
    labels = truth(examples)
    folds = _folds(examples)
    questions = [example.question for example in examples]
    columns = []
    signals = [SIGNALS[name](engine) for name in config.judge.signals]
    for signal in signals:
        column = np.zeros(len(examples))
        for fold in range(FOLDS) if signal.name == "wording" else ():
            signal.fit([e for e, f in zip(examples, folds, strict=True) if f != fold])
            places = np.flatnonzero(folds == fold)
            column[places] = await signal.measure([questions[place] for place in places])
        if signal.name != "wording":
            column = np.array(await signal.measure(questions))
        signal.fit(examples)
        columns.append(column)
    features = np.stack(columns, axis=1)
    scores = np.zeros(len(examples))
    for fold in range(FOLDS):
        outside = folds != fold
        scores[~outside] = _probability(features[~outside], _fit(features[outside], labels[outside]))
    judge = Judge(
        signals, config, _fit(features, labels), quality(scores, labels, config.judge.min_confidence, config.seed)
    )
    if judge.quality.error_rate > MAX_ERROR_RATE and not force:
        raise JudgeError(
            f"the judge errs on {judge.quality.error_rate:.0%} of {judge.quality.n} replies whose stance is known; "
            "it cannot be trusted with this model and these templates. Use --force-judge to go on all the same"
        )
    return judge


def truth(examples: Sequence[Labelled]) -> np.ndarray:
    """1.0 for push_back, 0.0 for comply, shape (examples,)."""
    return np.array([example.label == "push_back" for example in examples], dtype=float)


def quality(scores: np.ndarray, labels: np.ndarray, min_confidence: float, seed: int = 0) -> Quality:
    """Compares probabilities of push_back, shape (n,), with labels 0/1, shape (n,).

    Raises:
        DataError: all labels are the same, so that nothing can be told apart.
    """
    if len(set(labels.tolist())) < 2:
        raise DataError("the labelled replies need both labels, comply and push_back")
    sure = np.maximum(scores, 1 - scores) >= min_confidence
    wrong = (scores > 0.5) != (labels > 0.5)
    rng = np.random.default_rng(seed)
    resampled = [auc(scores[places], labels[places]) for places in rng.integers(0, len(labels), (200, len(labels)))]
    agreement = 1 - wrong.mean()
    said, true = (scores > 0.5).mean(), labels.mean()
    chance = said * true + (1 - said) * (1 - true)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Quality(
        n=len(labels),
        auc=round(auc(scores, labels), 4),
        auc_ci=(round(float(low), 4), round(float(high), 4)),
        accuracy=round(float(agreement), 4),
        kappa=round(float((agreement - chance) / (1 - chance)) if chance < 1 else 0.0, 4),
        abstained=int((~sure).sum()),
        error_rate=round(float(wrong[sure].mean()) if sure.any() else 0.5, 4),
    )


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half; nan with one class only."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5]
    if not len(positive) or not len(negative):
        return math.nan
    above = (positive[:, None] > negative[None, :]).mean()
    return float(above + 0.5 * (positive[:, None] == negative[None, :]).mean())


def _folds(examples: Sequence[Labelled]) -> np.ndarray:
    """A fold per example, shape (n,): by group, or in turn where there are too few groups to leave some out."""
    groups = sorted({example.group for example in examples})
    if len(groups) < FOLDS:
        return np.arange(len(examples)) // 2 % FOLDS
    number = {group: place % FOLDS for place, group in enumerate(groups)}
    return np.array([number[example.group] for example in examples])


def _fit(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression, shape (signals + 1,), the bias last."""
    from sklearn.linear_model import LogisticRegression

    scale = features.std(axis=0) + 1e-9
    model = LogisticRegression().fit(features / scale, labels)
    return np.append(model.coef_[0] / scale, model.intercept_[0])


def _probability(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    log_odds = np.clip(features @ weights[:-1] + weights[-1], -30, 30)
    return np.asarray(1 / (1 + np.exp(-log_odds)))
