"""The halves of contrast pairs, and what a small classifier reads from one half alone.

A `Task` is one half as features: a direction without its reply, or a reply without its prompt. The classifier is
trained on some of the templates (or scenarios) and tested on the others; its AUC says what the half gives away.

Not covered: shortcuts that n-grams, a sentence embedding and the length do not show; general pairs, which have no wrong
direction.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dream.config import AuditConfig
from dream.embed import Embed
from dream.records import ContrastPair, Message, PreferencePair

FOLDS = 5
MIN_GROUPS = 3
"""Fewer templates (or scenarios) than this are not split into some to learn from and some to test on."""
SOURCE_GAP = 0.15
"""The shares of steered replies among the chosen and among the rejected may differ by this much."""


@dataclass(frozen=True)
class Texts:
    """Texts with a label each, shape (texts,): 0 for `classes[0]`, 1 for `classes[1]`.

    `pair` is the place of the contrast pair that each is from; it has as many of the one label as of the other, so
    that every fold is balanced.
    """

    texts: list[str]
    labels: np.ndarray
    pair: np.ndarray
    classes: tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One view to measure: features, shape (texts, features), and the group of each text, which no fold divides."""

    name: str
    texts: Texts
    features: Any
    groups: np.ndarray
    bound: float
    terms: np.ndarray | None = None
    """Names of the features, where they are n-grams."""

    @property
    def too_few(self) -> str:
        """Why there can be no AUC; empty where there can be."""
        unit = "scenarios" if self.name.endswith("_within") else "templates"
        groups = len(set(self.groups.tolist()))
        return needed(groups, unit, MIN_GROUPS) if groups < MIN_GROUPS else ""


def tasks(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None) -> list[Task]:
    """The views that are classifiers. Nothing is fitted here but the n-grams' vocabulary, which knows no labels."""
    directions, replies = _directions(pairs), reply_texts(pairs)
    template, scenario = np.array(template_names(pairs)), scenario_numbers(pairs)
    says, replied = _ngrams(directions.texts), _ngrams(replies.texts)
    vectors = {} if embed is None else {"reply_embedding": (replies, embed(replies.texts), None)}
    views = {
        "direction": (directions, *says),
        "direction_within": (directions, *says),
        "reply_ngrams": (replies, *replied),
        **vectors,
        "reply_within": (replies, *replied),
        "length": (replies, _lengths(replies.texts), None),
    }
    return [
        Task(
            name,
            texts,
            features,
            (scenario if name.endswith("_within") else template)[texts.pair],
            bound_of(name, bounds),
            terms,
        )
        for name, (texts, features, terms) in views.items()
    ]


def bound_of(name: str, bounds: AuditConfig) -> float:
    """The bound of a view."""
    sorts = {"direction": bounds.direction_auc, "reply": bounds.reply_auc, "length": bounds.length_auc}
    return {**sorts, "source": SOURCE_GAP}[name.split("_")[0]]


def needed(count: int, unit: str, least: int) -> str:
    """Why something was not measured."""
    return f"not measured: {count} {unit}, and at least {least} are needed"


def _directions(pairs: Sequence[ContrastPair]) -> Texts:
    """Both directions of each pair; a row that does not name its own is taken for its prompt's last message."""
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    texts = [str(row.meta.get("direction") or row.prompt[-1]["content"]) for row in rows]
    return Texts(texts, np.tile([0, 1], len(pairs)), np.arange(len(rows)) // 2, ("clear", "flawed"))


def reply_texts(pairs: Sequence[ContrastPair]) -> Texts:
    """The four replies of each pair: chosen and rejected on the clear side, then on the flawed one."""
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    texts = [_content(messages) for row in rows for messages in (row.chosen, row.rejected)]
    return Texts(texts, np.tile([1, 0], len(rows)), np.arange(len(texts)) // 4, ("rejected", "chosen"))


def _content(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def template_names(pairs: Sequence[ContrastPair]) -> list[str]:
    """The template of each pair."""
    return [pair.clear.meta["template"] for pair in pairs]


def scenario_numbers(pairs: Sequence[ContrastPair]) -> np.ndarray:
    """A number per scenario, shape (pairs,)."""
    return np.unique([scenario_of(pair) for pair in pairs], return_inverse=True)[1]


def scenario_of(pair: ContrastPair) -> str:
    """The scenario's id; that of the mirrored one for a twin."""
    return str(pair.clear.meta.get("mirror_of") or pair.clear.meta["scenario_id"])


def steered_shares(pairs: Sequence[ContrastPair]) -> np.ndarray:
    """Share of each pair's chosen and of its rejected replies that are steered, shape (pairs, 2); nan if unknown."""

    def share(rows: Sequence[PreferencePair], key: str) -> float:
        sources = [row.meta.get(key) for row in rows]
        return sources.count("steered") / len(sources) if None not in sources else math.nan

    both = [(pair.clear, pair.flawed) for pair in pairs]
    return np.array([[share(rows, key) for key in ("chosen_source", "rejected_source")] for rows in both])


def _ngrams(texts: Sequence[str]) -> tuple[Any, np.ndarray]:
    """Tf-idf of words, signs and couples of them, sparse (texts, terms), and the terms. Every number is the word 0."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        preprocessor=lambda text: re.sub(r"\d+(?:[.,:]\d+)*", "0", text.lower()),
        token_pattern=r"[^\W_](?:['\w]*\w)?|[^\w\s]",
        ngram_range=(1, 2),
        sublinear_tf=True,
    )
    return vectorizer.fit_transform(texts), vectorizer.get_feature_names_out()


def _lengths(replies: Sequence[str]) -> np.ndarray:
    """Log words and log characters, shape (replies, 2), each less the mean of the row's two replies.

    A preference trainer sees the two replies to one prompt side by side, so what counts is which of them is longer;
    templates whose replies are long by nature would hide it. One classifier over both, tested out of fold like the
    rest: the better AUC of two, turned to lie above .5, would be above it in every set by chance.
    """
    lengths = np.log([[max(1, len(reply.split())), max(1, len(reply))] for reply in replies])
    rows = lengths.reshape(-1, 2, 2)
    return np.asarray((rows - rows.mean(axis=1, keepdims=True)).reshape(-1, 2))


def fitted(features: Any, labels: np.ndarray) -> Any:
    """The classifier."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, solver="liblinear").fit(features, labels)  # the fastest on sets this small


def out_of_fold(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The probability of label 1 by a classifier that has not seen the text's group, and its fold, shape (texts,)."""
    from sklearn.model_selection import GroupKFold

    labels = task.texts.labels
    scores, folds = np.zeros(len(labels)), np.zeros(len(labels), dtype=int)
    splits = GroupKFold(min(FOLDS, len(set(task.groups.tolist())))).split(task.features, labels, task.groups)
    for fold, (inside, outside) in enumerate(splits):
        scores[outside] = fitted(task.features[inside], labels[inside]).predict_proba(task.features[outside])[:, 1]
        folds[outside] = fold
    return scores.round(6), folds  # equal texts are to tie, whatever the last bits say


def auc_of(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half, in each of some draws, shape (draws,).

    Only texts of one fold are compared: what two classifiers say of texts without any cue is not on one scale.
    `times`, shape (draws, texts), is how often each text was drawn.
    """
    won, couples = np.zeros(len(times)), np.zeros(len(times))
    for fold in np.unique(folds):
        inside = folds == fold
        values, place = np.unique(scores[inside], return_inverse=True)
        at_value = np.eye(len(values))[place]
        right = (times * labels)[:, inside] @ at_value
        wrong = (times * (1 - labels))[:, inside] @ at_value
        won += (right * (wrong.cumsum(axis=1) - wrong / 2)).sum(axis=1)
        couples += right.sum(axis=1) * wrong.sum(axis=1)
    return np.asarray(won / couples)
