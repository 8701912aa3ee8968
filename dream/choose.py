"""Choosing, among more accepted pairs than are wanted, those by which neither half alone gives right or wrong away."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from dream.audit import source_view
from dream.config import AuditConfig
from dream.embed import Embed
from dream.records import ContrastPair
from dream.views import auc_of, out_of_fold, reply_texts, scenario_of, steered_shares, tasks, template_names

REFITS = 5
"""How often `choose` measures again what is left."""


def choose(
    pairs: Sequence[ContrastPair], count: int, bounds: AuditConfig, embed: Embed | None = None, seed: int = 0
) -> list[ContrastPair]:
    """The `count` of the pairs that give least away, in the order in which they came; all where there are no more.

    Greedy: of the kinds of flaw that have most pairs, the scenario goes that the views over their bounds read best,
    twins together; among equals, as where no view is over, one of the template that has most. What is left is measured
    again now and then. Twins are parted only where one pair too many is left. `seed` decides between equals.
    """
    replies = reply_texts(pairs).texts
    vectors = dict(zip(replies, embed(replies), strict=True)) if embed is not None else {}

    def known(texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts])

    templates = template_names(pairs)
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
            together[scenario_of(pairs[place])].append(place)
    fitting = [group for group in together.values() if len(group) <= surplus]
    return fitting or [[place] for group in together.values() for place in group]


def _leaks(pairs: Sequence[ContrastPair], bounds: AuditConfig, embed: Embed | None) -> np.ndarray:
    """How much each pair gives away, shape (pairs,): the mean score of its right texts less that of its wrong ones.

    Summed over the views over their bounds only: to select against the others would turn their AUC below .5, and a
    cue that points the wrong way is a cue as well.
    """
    leaks = np.zeros(len(pairs))
    if len(pairs) < bounds.min_pairs:
        return leaks
    for task in tasks(pairs, bounds, embed):
        if task.too_few:
            continue
        texts, (scores, folds) = task.texts, out_of_fold(task)
        if auc_of(scores, texts.labels, folds, np.ones((1, len(scores))))[0] > task.bound:
            signed = np.where(texts.labels == 1, scores, -scores)
            leaks += np.bincount(texts.pair, signed) / np.bincount(texts.pair, texts.labels)
    if source_view(pairs).over:
        gaps = np.diff(steered_shares(pairs), axis=1)[:, 0]
        leaks += gaps * np.sign(gaps.mean())
    return leaks
