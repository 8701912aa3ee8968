"""The audit of accepted contrast pairs: does the direction alone, or the reply alone, tell right from wrong?

A trained model takes whatever shortcut the data offers, and only prompt and reply together may decide. So each half
alone is read by a small classifier (`dream.views`), and its AUC is compared with a bound; what is over it is named.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dream.config import AuditConfig
from dream.embed import Embed
from dream.records import ContrastPair, Record
from dream.views import (
    SOURCE_GAP,
    Task,
    auc_of,
    bound_of,
    fitted,
    needed,
    out_of_fold,
    scenario_numbers,
    steered_shares,
    tasks,
    template_names,
)

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
MIN_TEXTS = 3
"""An n-gram that fewer texts have is not named."""
NAMED = 3
"""Giveaways of a view, and templates of a giveaway, that are named."""
RESAMPLES = 200


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


def audit(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None = None, seed: int = 0) -> Audit:
    """Measures every view on a set. `seed` is that of the intervals; without `embed` its view is left out.

    Unseen templates: tested on templates that the classifier was not trained on. Known templates: on other scenarios
    of the same ones, mirrored twins together. An AUC below .5 is no leak: what was learned from some was wrong for the
    rest, as happens where a balanced set is split.
    """
    templates = template_names(pairs)
    if len(pairs) < bounds.min_pairs:
        reason = needed(len(pairs), "pairs", bounds.min_pairs)
        names = [name for name in TITLES if embed is not None or name != "reply_embedding"]
        views = [View(name=name, bound=bound_of(name, bounds), reason=reason) for name in names]
        return Audit(pairs=len(pairs), templates=len(set(templates)), views=views)
    views, draws = [], _draws(scenario_numbers(pairs), seed)
    for task in tasks(pairs, bounds, embed):
        if task.too_few:
            views.append(View(name=task.name, bound=task.bound, reason=task.too_few))
            continue
        scores, folds = out_of_fold(task)
        times = np.vstack([np.ones(len(scores)), draws[:, task.texts.pair]])
        auc, *resampled = auc_of(scores, task.texts.labels, folds, times).tolist()
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
    views.append(source_view(pairs))
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


def _draws(scenarios: np.ndarray, seed: int) -> np.ndarray:
    """How often a bootstrap over scenarios draws each pair, shape (RESAMPLES, pairs); all pairs of one together."""
    count = int(scenarios.max()) + 1
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, scenarios]


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
    weights = fitted(features, labels).coef_[0]
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


def source_view(pairs: Sequence[ContrastPair]) -> View:
    """Whether steered replies stand on both sides of the preference alike."""
    steered = steered_shares(pairs)
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
        rows = [template for template, one in zip(template_names(pairs), more, strict=True) if one]
        points_to = ("chosen", "rejected")[side]
        giveaways = [Giveaway(text="a steered reply", points_to=points_to, texts=len(rows), templates=_most(rows))]
    return View(name="source", bound=SOURCE_GAP, shares=(chosen, rejected), over=over, giveaways=giveaways)


def _most(templates: Iterable[str]) -> list[str]:
    """The templates that occur most."""
    return [str(name) for name, _ in Counter(templates).most_common(NAMED)]


def _short(value: float) -> str:
    """A share as `.52`."""
    return f"{value:.2f}".removeprefix("0")
