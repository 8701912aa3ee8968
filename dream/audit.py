"""The audit of accepted contrast pairs: does the direction alone, or the reply alone, tell right from wrong?

A trained model takes whatever shortcut the data offers, and only prompt and reply together may decide. So a small
classifier is given each half alone, trained on some of the set and tested on the rest, and its AUC is compared with a
bound. `choose` picks, from more candidates than are wanted, pairs that keep the AUCs low.

Not covered: shortcuts that n-grams, a sentence embedding and the length do not show; general pairs, which have no wrong
direction.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dream.config import AuditConfig
from dream.embed import Embed
from dream.records import ContrastPair, Message, PreferencePair, Record

TITLES = {
    "direction": "direction alone, unseen templates",
    "direction_within": "direction alone, known templates",
    "reply_ngrams": "reply alone (n-grams), unseen templates",
    "reply_embedding": "reply alone (embedding), unseen templates",
    "reply_within": "reply alone (n-grams), known templates",
    "length": "length of the reply alone",
    "source": "steered replies",
}
ADVICE = {
    "direction": "word both directions of these templates alike but for a value, or add `mirror`",
    "reply": "word right and wrong replies of these templates alike, on both sides",
    "length": "make the worked replies of both stances alike in length, or lower filters.max_length_ratio",
    "source": "raise generate.samples, so that the policy's own replies are found for both",
}

FOLDS = 5
MIN_GROUPS = 3
"""Fewer templates (or scenarios) than this are not split into some to learn from and some to test on."""
MIN_TEXTS = 3
"""An n-gram that fewer texts have is not named."""
NAMED = 3
"""Giveaways of a view, and templates of a giveaway, that are named."""
SOURCE_GAP = 0.15
"""The shares of steered replies among the chosen and among the rejected may differ by this much."""
RESAMPLES = 200
REFITS = 5
"""How often `choose` measures again what is left."""


class Giveaway(Record):
    """What points to one class by itself, in how many texts it does so, and the templates that most of them are of."""

    text: str
    points_to: str
    texts: int
    templates: list[str]


class View(Record):
    """What one half alone gives away. `auc` is None where it was not measured; `reason` says why.

    `interval` is the 95 % bootstrap interval over scenarios. `shares`, of the view `source` only, are those of steered
    replies among the chosen and among the rejected, and `bound` is then how far they may be apart.
    """

    name: str
    bound: float
    auc: float | None = None
    interval: tuple[float, float] | None = None
    shares: tuple[float, float] | None = None
    over: bool = False
    reason: str = ""
    giveaways: list[Giveaway] = []


class Audit(Record):
    """The audit of one set of contrast pairs."""

    pairs: int
    templates: int
    views: list[View]

    @property
    def over(self) -> list[View]:
        """The views over their bound."""
        return [view for view in self.views if view.over]


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
        return _needed(groups, unit, MIN_GROUPS) if groups < MIN_GROUPS else ""


def audit(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None = None, seed: int = 0) -> Audit:
    """Measures every view on a set. `seed` is that of the intervals; without `embed` its view is left out.

    Unseen templates: tested on templates that the classifier was not trained on. Known templates: on other scenarios
    of the same ones, mirrored twins together. An AUC below .5 is no leak: what was learned from some was wrong for the
    rest, as happens where a balanced set is split.
    """
    templates = _templates(pairs)
    if len(pairs) < bounds.min_pairs:
        reason = _needed(len(pairs), "pairs", bounds.min_pairs)
        names = [name for name in TITLES if embed is not None or name != "reply_embedding"]
        views = [View(name=name, bound=_bound(name, bounds), reason=reason) for name in names]
        return Audit(pairs=len(pairs), templates=len(set(templates)), views=views)
    views, draws = [], _draws(_scenarios(pairs), seed)
    for task in _tasks(pairs, bounds, embed):
        if task.too_few:
            views.append(View(name=task.name, bound=task.bound, reason=task.too_few))
            continue
        scores, folds = _out_of_fold(task)
        times = np.vstack([np.ones(len(scores)), draws[:, task.texts.pair]])
        auc, *resampled = _auc(scores, task.texts.labels, folds, times).tolist()
        low, high = np.percentile(resampled, [2.5, 97.5])
        over = auc > task.bound
        views.append(
            View(
                name=task.name,
                bound=task.bound,
                auc=round(auc, 4),
                interval=(round(float(low), 4), round(float(high), 4)),
                over=over,
                giveaways=_giveaways(task, scores, templates) if over else [],
            )
        )
    views.append(_source(pairs))
    return Audit(pairs=len(pairs), templates=len(set(templates)), views=views)


def lines(audit: Audit) -> list[str]:
    """What the terminal prints: a line a view, and under one over its bound what gives it away and what to do."""
    reasons = {view.reason for view in audit.views}
    if len(reasons) == 1 and all(reasons):
        return [f"audit: {reasons.pop()}"]
    printed = []
    for view in audit.views:
        line = f"audit: {TITLES[view.name]}: "
        if view.auc is not None and view.interval is not None:
            low, high = map(_short, view.interval)
            line += f"AUC {_short(view.auc)} [{low}, {high}], {'OVER the ' * view.over}bound {_short(view.bound)}"
        elif view.shares is not None:
            line += f"{view.shares[0]:.0%} of chosen, {view.shares[1]:.0%} of rejected"
            line += f", {'OVER the ' * view.over}bound {view.bound:.0%} apart"
        printed.append(line + view.reason)
        if view.over:
            printed += [
                f"  {give.text} points to {give.points_to} ({give.texts} texts, most in {', '.join(give.templates)})"
                for give in view.giveaways
            ]
            printed.append(f"  what to do: {ADVICE[view.name.split('_')[0]]}; or ask for more pairs")
    return printed


def choose(
    pairs: Sequence[ContrastPair], count: int, bounds: AuditConfig, embed: Embed | None = None, seed: int = 0
) -> list[ContrastPair]:
    """The `count` of the pairs that give least away, in the order in which they came; all where there are no more.

    Greedy: of the kinds of flaw that have most pairs, the scenario goes that the views over their bounds read best,
    twins together; among equals, as where no view is over, one of the template that has most. What is left is measured
    again now and then. Twins are parted only where one pair too many is left. `seed` decides between equals.
    """
    replies = _replies(pairs).texts
    vectors = dict(zip(replies, embed(replies), strict=True)) if embed is not None else {}

    def known(texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts])

    templates = _templates(pairs)
    rank = np.random.default_rng(seed).permutation(len(pairs))
    kept = list(range(len(pairs)))
    batch = math.ceil((len(pairs) - count) / REFITS)
    while len(kept) > count:
        leaks = np.zeros(len(pairs))
        leaks[kept] = _leaks([pairs[place] for place in kept], bounds, known if vectors else None)
        target = max(count, len(kept) - batch)
        while len(kept) > target:
            sizes = Counter(templates[place] for place in kept)
            out = max(
                _droppable(pairs, kept, len(kept) - count),
                key=lambda group: (leaks[group].mean().round(6), sizes[templates[group[0]]], rank[group[0]]),
            )
            kept = [place for place in kept if place not in out]
    return [pairs[place] for place in kept]


def _droppable(pairs: Sequence[ContrastPair], kept: Sequence[int], surplus: int) -> list[list[int]]:
    """Places that may go together: scenarios of the fullest kinds, or single pairs where no scenario is so small."""
    kinds = Counter(pairs[place].clear.meta["flaw"] for place in kept)
    together: dict[str, list[int]] = defaultdict(list)
    for place in kept:
        if kinds[pairs[place].clear.meta["flaw"]] == max(kinds.values()):
            together[_scenario(pairs[place])].append(place)
    fitting = [group for group in together.values() if len(group) <= surplus]
    return fitting or [[place] for group in together.values() for place in group]


def _tasks(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None) -> list[Task]:
    """The views that are classifiers. Nothing is fitted here but the n-grams' vocabulary, which knows no labels."""
    directions, replies = _directions(pairs), _replies(pairs)
    template, scenario = np.array(_templates(pairs)), _scenarios(pairs)
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
            _bound(name, bounds),
            terms,
        )
        for name, (texts, features, terms) in views.items()
    ]


def _bound(name: str, bounds: AuditConfig) -> float:
    """The bound of a view."""
    sorts = {"direction": bounds.direction_auc, "reply": bounds.reply_auc, "length": bounds.length_auc}
    return {**sorts, "source": SOURCE_GAP}[name.split("_")[0]]


def _needed(count: int, unit: str, least: int) -> str:
    return f"not measured: {count} {unit}, and at least {least} are needed"


def _directions(pairs: Sequence[ContrastPair]) -> Texts:
    """Both directions of each pair; a row that does not name its own is taken for its prompt's last message."""
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    texts = [str(row.meta.get("direction") or row.prompt[-1]["content"]) for row in rows]
    return Texts(texts, np.tile([0, 1], len(pairs)), np.arange(len(rows)) // 2, ("clear", "flawed"))


def _replies(pairs: Sequence[ContrastPair]) -> Texts:
    """The four replies of each pair: chosen and rejected on the clear side, then on the flawed one."""
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    texts = [_content(messages) for row in rows for messages in (row.chosen, row.rejected)]
    return Texts(texts, np.tile([1, 0], len(rows)), np.arange(len(texts)) // 4, ("rejected", "chosen"))


def _content(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _templates(pairs: Sequence[ContrastPair]) -> list[str]:
    return [pair.clear.meta["template"] for pair in pairs]


def _scenarios(pairs: Sequence[ContrastPair]) -> np.ndarray:
    """A number per scenario, shape (pairs,)."""
    return np.unique([_scenario(pair) for pair in pairs], return_inverse=True)[1]


def _scenario(pair: ContrastPair) -> str:
    """The scenario's id; that of the mirrored one for a twin."""
    return str(pair.clear.meta.get("mirror_of") or pair.clear.meta["scenario_id"])


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


def _fitted(features: Any, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, solver="liblinear").fit(features, labels)  # the fastest on sets this small


def _out_of_fold(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The probability of label 1 by a classifier that has not seen the text's group, and its fold, shape (texts,)."""
    from sklearn.model_selection import GroupKFold

    labels = task.texts.labels
    scores, folds = np.zeros(len(labels)), np.zeros(len(labels), dtype=int)
    splits = GroupKFold(min(FOLDS, len(set(task.groups.tolist())))).split(task.features, labels, task.groups)
    for fold, (inside, outside) in enumerate(splits):
        scores[outside] = _fitted(task.features[inside], labels[inside]).predict_proba(task.features[outside])[:, 1]
        folds[outside] = fold
    return scores.round(6), folds  # equal texts are to tie, whatever the last bits say


def _auc(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, times: np.ndarray) -> np.ndarray:
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


def _draws(scenarios: np.ndarray, seed: int) -> np.ndarray:
    """How often a bootstrap over scenarios draws each pair, shape (RESAMPLES, pairs); all pairs of one together."""
    count = int(scenarios.max()) + 1
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, scenarios]


def _leaks(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None) -> np.ndarray:
    """How much each pair gives away, shape (pairs,): the mean score of its right texts less that of its wrong ones.

    Summed over the views over their bounds only: to select against the others would turn their AUC below .5, and a
    cue that points the wrong way is a cue as well.
    """
    leaks = np.zeros(len(pairs))
    if len(pairs) < bounds.min_pairs:
        return leaks
    for task in _tasks(pairs, bounds, embed):
        if task.too_few:
            continue
        texts, (scores, folds) = task.texts, _out_of_fold(task)
        if _auc(scores, texts.labels, folds, np.ones((1, len(scores))))[0] > task.bound:
            signed = np.where(texts.labels == 1, scores, -scores)
            leaks += np.bincount(texts.pair, signed) / np.bincount(texts.pair, texts.labels)
    if _source(pairs).over:
        gaps = np.diff(_steered(pairs), axis=1)[:, 0]
        leaks += gaps * np.sign(gaps.mean())
    return leaks


def _giveaways(task: Task, scores: np.ndarray, templates: Sequence[str]) -> list[Giveaway]:
    """What the classifier goes by, the strongest first."""
    if task.terms is not None:
        return _terms(task, templates)
    texts = task.texts
    places = np.array(templates)[texts.pair]
    if task.name == "length":
        gain = task.features[texts.labels == 1].sum(axis=1)  # positive where the chosen reply is the longer one
        longer = gain.mean() > 0
        rows = places[texts.labels == 1][(gain > 0) == longer]
        text = "the longer reply" if longer else "the shorter reply"
        return [Giveaway(text=text, points_to="chosen", texts=len(rows), templates=_most(rows))]
    best = np.argsort(np.where(texts.labels == 1, -scores, scores - 1), kind="stable")[:NAMED]
    return [  # an embedding has no words to name: the replies that it reads best
        Giveaway(
            text=repr(texts.texts[place]),
            points_to=texts.classes[texts.labels[place]],
            texts=texts.texts.count(texts.texts[place]),
            templates=[str(places[place])],
        )
        for place in best
    ]


def _terms(task: Task, templates: Sequence[str]) -> list[Giveaway]:
    """The n-grams that part the classes most: weight in the classifier by the difference of the classes' means.

    A single word goes before a sign or a couple that do little more. Left out is what mostly stands in texts that a
    stronger one has named; for unseen templates also what one template alone has, since nothing carries over from it.
    """
    assert task.terms is not None
    labels, features = task.texts.labels, task.features
    weights = _fitted(features, labels).coef_[0]
    parting = weights * np.asarray(features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)).ravel()
    found: list[Giveaway] = []
    covered: list[set[int]] = []
    parting *= [1 if re.fullmatch(r"[\w']+", term) else 0.8 for term in task.terms]
    for term in np.argsort(-parting, kind="stable"):
        label = int(weights[term] > 0)
        having = features[:, [term]].nonzero()[0]
        pointing = having[labels[having] == label]
        names = [templates[task.texts.pair[place]] for place in pointing]
        if parting[term] <= parting.max() / 4 or len(found) == NAMED:  # the rest is chance
            break
        if len(having) < MIN_TEXTS or (not task.name.endswith("_within") and len(set(names)) < 2):
            continue
        if any(len(texts & set(having)) > len(having) / 2 for texts in covered):
            continue
        covered.append(set(having))
        found.append(
            Giveaway(
                text=repr(re.sub(r"\b0\b", "NUMBER", task.terms[term])),
                points_to=task.texts.classes[label],
                texts=len(pointing),
                templates=_most(names),
            )
        )
    return found


def _steered(pairs: Sequence[ContrastPair]) -> np.ndarray:
    """Share of each pair's chosen and of its rejected replies that are steered, shape (pairs, 2); nan if unknown."""

    def share(rows: Sequence[PreferencePair], key: str) -> float:
        sources = [row.meta.get(key) for row in rows]
        return sources.count("steered") / len(sources) if None not in sources else math.nan

    both = [(pair.clear, pair.flawed) for pair in pairs]
    return np.array([[share(rows, key) for key in ("chosen_source", "rejected_source")] for rows in both])


def _source(pairs: Sequence[ContrastPair]) -> View:
    """Whether steered replies stand on both sides of the preference alike."""
    steered = _steered(pairs)
    if np.isnan(steered).any():
        return View(
            name="source", bound=SOURCE_GAP, reason="not measured: not every row says where its replies are from"
        )
    chosen, rejected = (round(float(share), 4) for share in steered.mean(axis=0))
    over = abs(chosen - rejected) > SOURCE_GAP
    giveaways = []
    if over:
        side = 0 if chosen > rejected else 1
        more = steered[:, side] > steered[:, 1 - side]
        rows = [template for template, one in zip(_templates(pairs), more, strict=True) if one]
        points_to = ("chosen", "rejected")[side]
        giveaways = [Giveaway(text="a steered reply", points_to=points_to, texts=len(rows), templates=_most(rows))]
    return View(name="source", bound=SOURCE_GAP, shares=(chosen, rejected), over=over, giveaways=giveaways)


def _most(templates: Iterable[str]) -> list[str]:
    """The templates that occur most."""
    return [str(name) for name, _ in Counter(templates).most_common(NAMED)]


def _short(value: float) -> str:
    """A share as `.52`."""
    return f"{value:.2f}".removeprefix("0")
