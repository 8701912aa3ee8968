"""A look at templates that are valid: what weakens training, and whether a direction alone gives its side away.

`dream.audit` measures the same on accepted pairs. This needs no model and no pairs, so a leak shows while the template
is being written.
"""

import re
from collections.abc import Sequence
from typing import Any

from dream.config import AuditConfig
from dream.errors import TemplateError
from dream.records import SIDES, Record
from dream.scenarios import STANCES, draw
from dream.template import GENERAL, Template

BOUND = AuditConfig().direction_auc
DRAWS = 60
"""Draws of each template that are classified."""
WORDING_DRAWS = 40
MIN_WORDINGS = 3
MAX_LENGTH_RATIO = 1.5
REPLY_DRAWS = 5
FOLDS = 5
RESAMPLES = 200
NAMED = 3
"""Words, and templates of a word, that are named."""


class Giveaway(Record):
    """A word or two that point to one side by themselves, and the templates whose directions have them most."""

    text: str
    points_to: str
    templates: list[str]


class DirectionAuc(Record):
    """How well a classifier tells clear from flawed by the direction alone; `auc` is None where `reason` says why.

    `interval` is the 95 % bootstrap interval over scenarios.
    """

    title: str
    auc: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""
    giveaways: list[Giveaway] = []

    @property
    def over(self) -> bool:
        """Whether the AUC is over its bound."""
        return self.auc is not None and self.auc > BOUND

    def __str__(self) -> str:
        if self.auc is None or self.interval is None:
            return f"{self.title}: not measured: {self.reason}"
        low, high = self.interval
        return f"{self.title}: AUC {self.auc:.2f} [{low:.2f}, {high:.2f}], {'OVER the ' * self.over}bound {BOUND:.2f}"


def advice(templates: Sequence[Template]) -> list[str]:
    """What is allowed but weakens training: a line each, with the file, the line and what to do."""
    return [line for template in templates for line in _advice(template)] + _shared_kinds(templates)


def counts(templates: Sequence[Template]) -> str:
    """How many templates, kinds of flaw and domains there are."""
    kinds = {template.front.flaw for template in templates} - {GENERAL}
    heldout = {template.front.flaw for template in templates if template.front.split == "heldout"} - {GENERAL}
    domains = {domain for template in templates for domain in template.front.domains}
    general = sum(template.general for template in templates)
    return (
        f"{len(templates)} templates ({general} general), {len(kinds)} kinds of flaw, "
        f"{len(heldout)} of them held out, {len(domains)} domains"
    )


def direction_auc(templates: Sequence[Template], seed: int = 0) -> list[DirectionAuc]:
    """Two AUCs of a bag of words on directions of contrast templates.

    Held-out templates: trained on the training templates, tested on the others. Training templates: each scenario is
    tested by a classifier that was trained on other scenarios of the same templates. The second is below .5 where the
    values are balanced: those that few scenarios of one part have as clear, more of the others have.
    """
    contrast = [template for template in templates if not template.general]
    training = [template for template in contrast if template.front.split == "train"]
    heldout = [template for template in contrast if template.front.split == "heldout"]
    titles = ("direction alone, held-out templates", "direction alone, training templates")
    if not training:
        return [DirectionAuc(title=title, reason="no contrast template to train on") for title in titles]
    known = _directions(training, seed)
    within = _measured(titles[1], known, _out_of_fold(*known), seed, training)
    if not heldout:
        return [DirectionAuc(title=titles[0], reason="no held-out contrast template"), within]
    unseen = _directions(heldout, seed)
    scores = _classifier().fit(*known).predict_proba(unseen[0])[:, 1]
    return [_measured(titles[0], unseen, scores, seed, training), within]


def refuse_leaks(measured: Sequence[DirectionAuc]) -> None:
    """Refuses templates whose directions give their side away.

    Raises:
        TemplateError: an AUC is over its bound; the message names the words and the templates.
    """
    for result in (result for result in measured if result.over):
        words = [f"{one.text} points to {one.points_to} ({', '.join(one.templates)})" for one in result.giveaways]
        raise TemplateError(
            f"{result}: {'; '.join(words)}; word both directions alike but for a value, or add `mirror`"
        )


def _advice(template: Template) -> list[str]:
    found = []
    replies_at = template.lines.at("block", "push_back_examples")
    if not (template.general or template.front.mirror or template.front.split == "heldout"):
        where = template.lines.at("sides")
        found.append(
            f"{where}: no mirror; name slots that change places, so that each text is right once and wrong once"
        )
    words: dict[str, int] = dict.fromkeys(STANCES, 0)
    lines: dict[str, int] = dict.fromkeys(STANCES, 0)
    shared = False
    for seed in range(REPLY_DRAWS):
        scenario = draw(template, seed, "advice")
        for side in scenario.sides:
            replies = scenario.side(side).examples
            for stance in STANCES:
                words[stance] += sum(len(reply.split()) for reply in replies[stance])
                lines[stance] += len(replies[stance])
            comply, push_back = ({_opener(reply) for reply in replies[stance]} for stance in STANCES)
            shared = shared or bool(comply & push_back)
    comply_words, push_back_words = (words[stance] / lines[stance] for stance in STANCES)
    if max(comply_words, push_back_words) > MAX_LENGTH_RATIO * min(comply_words, push_back_words):
        found.append(
            f"{replies_at}: worked replies have {comply_words:.0f} words (comply) and {push_back_words:.0f} "
            "(push_back); make them alike, or length tells them apart"
        )
    if not shared:
        found.append(f"{replies_at}: no worked replies of the two stances begin with the same word; share some openers")
    wordings = {_wording(template, seed) for seed in range(WORDING_DRAWS)}
    if len(wordings) < MIN_WORDINGS:
        found.append(
            f"{template.lines.at('block', 'clear')}: the direction is worded in {len(wordings)} way"
            f"{'s' * (len(wordings) > 1)}; write {MIN_WORDINGS} or more, one of them blunt or odd (a slot `style`)"
        )
    return found


def _opener(reply: str) -> str:
    """The first word."""
    return re.sub(r"\W", "", reply.split()[0]).lower()


def _wording(template: Template, seed: int) -> str:
    """The clear direction of a draw without its values: each becomes `_`, the longest first."""
    slots = template.variables(seed, covered=True)
    variables = template.side_variables("clear", slots)
    values = sorted({str(value) for value in variables.values()}, key=len, reverse=True)
    return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, values))}|\d+)(?!\w)", "_", template.render("clear", variables))


def _shared_kinds(templates: Sequence[Template]) -> list[str]:
    """Kinds of flaw that are both trained and held out."""
    found = []
    for template in templates:
        same = [
            other.name
            for other in templates
            if other.front.flaw == template.front.flaw and other.front.split == "train"
        ]
        if template.front.split == "heldout" and not template.general and same:
            where = f"{template.lines.at('flaw')}: {template.front.flaw}"
            found.append(f"{where} is held out here and trained in {', '.join(same)}; give this one a kind of its own")
    return found


def _directions(templates: Sequence[Template], seed: int) -> tuple[list[str], list[int]]:
    """Directions by template and scenario, clear before flawed, and their labels: 0 clear, 1 flawed."""
    scenarios = [draw(template, seed + turn, "audit", covered=True) for template in templates for turn in range(DRAWS)]
    return [scenario.side(side).direction for scenario in scenarios for side in SIDES], [0, 1] * len(scenarios)


def _classifier() -> Any:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(solver="liblinear"))


def _out_of_fold(texts: list[str], labels: list[int]) -> Any:
    """The probability of flawed by a classifier that has not seen the scenario, shape (texts,)."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    scenario = [place // len(SIDES) for place in range(len(texts))]
    folds = GroupKFold(FOLDS)
    return cross_val_predict(_classifier(), texts, labels, groups=scenario, cv=folds, method="predict_proba")[:, 1]


def _measured(
    title: str, tested: tuple[list[str], list[int]], scores: Any, seed: int, training: Sequence[Template]
) -> DirectionAuc:
    import numpy as np

    _, ranks = np.unique(np.round(scores, 6), return_inverse=True)  # equal texts tie, whatever the last bits say
    count = len(ranks) // len(SIDES)

    def auc(times: Any) -> float:
        """Area under the ROC curve, ties counted half, where each scenario is drawn so many times."""
        clear, flawed = (np.bincount(ranks[place :: len(SIDES)], times, ranks.max() + 1) for place in range(len(SIDES)))
        return float(flawed @ (clear.cumsum() - clear / 2) / (clear.sum() * flawed.sum()))

    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    low, high = np.percentile([auc(times) for times in draws], [2.5, 97.5]).tolist()
    result = DirectionAuc(title=title, auc=auc(np.ones(count)), interval=(low, high))
    return result.model_copy(update={"giveaways": _giveaways(training, tested[0], seed)}) if result.over else result


def _giveaways(training: Sequence[Template], tested: list[str], seed: int) -> list[Giveaway]:
    """The words that the classifier goes by most in the tested texts, and the templates it learned them from."""
    import numpy as np

    texts, labels = _directions(training, seed)
    vectorizer, regression = (step for _, step in _classifier().fit(texts, labels).steps)
    learned = vectorizer.transform(texts) > 0
    share = np.asarray((vectorizer.transform(tested) > 0).mean(axis=0)).ravel()
    weights = regression.coef_[0]
    found = []
    for term in np.argsort(-np.abs(weights) * share, kind="stable")[:NAMED]:
        having = np.reshape(learned[:, [term]].toarray(), (len(training), -1)).sum(axis=1)
        names = [training[place].name for place in np.argsort(-having, kind="stable")[:NAMED] if having[place]]
        word = repr(str(vectorizer.get_feature_names_out()[term]))
        found.append(Giveaway(text=word, points_to=SIDES[int(weights[term] > 0)], templates=names))
    return found
