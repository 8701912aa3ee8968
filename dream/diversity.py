"""How various a set of contrast pairs is, and what turns away a scenario that is nearly one that was dreamed before.

A narrow signal teaches a narrow habit. No single figure shows variety: distinct-n sees
words only, the embedded figures see meaning and hardly a changed number, and the shares see what was asked for.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dream.records import ContrastPair, Message, Record

if TYPE_CHECKING:
    from dream.embed import Embed


class Words(Record):
    """Lengths of texts, in words."""

    mean: float
    median: float


class Diversity(Record):
    """How various one set of contrast pairs is.

    `flaws`, `domains` (shares of the pairs) and the lengths are of all pairs. The rest leaves mirrored twins out, which
    repeat the directions and replies of the pair that they mirror, and takes the clear prompts for the prompts, as a
    flawed one is a value apart. `nearest_similarity` and `vendi_score`, of the `unmirrored` prompts, are None where
    there was no embedding model.
    """

    pairs: int
    unmirrored: int
    flaws: dict[str, float]
    domains: dict[str, float]
    prompt_distinct_1: float
    prompt_distinct_2: float
    reply_distinct_1: float
    reply_distinct_2: float
    nearest_similarity: float | None
    vendi_score: float | None
    chosen_words: Words
    rejected_words: Words


def diversity(pairs: Sequence[ContrastPair], embed: "Embed | None") -> Diversity:
    """Measures a set of contrast pairs; without `embed` what needs vectors is left out."""
    unmirrored = [pair for pair in pairs if not pair.clear.meta.get("mirror_of")]
    prompts = [_content(pair.clear.prompt) for pair in unmirrored]
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    replies = [
        _content(messages)
        for pair in unmirrored
        for row in (pair.clear, pair.flawed)
        for messages in (row.chosen, row.rejected)
    ]
    vectors = embed(prompts) if embed is not None else None
    return Diversity(
        pairs=len(pairs),
        unmirrored=len(unmirrored),
        flaws=_shares([str(pair.clear.meta.get("flaw", "unknown")) for pair in pairs]),
        domains=_shares([str(pair.clear.meta.get("domain", "unknown")) for pair in pairs]),
        prompt_distinct_1=round(distinct_n(prompts, 1), 4),
        prompt_distinct_2=round(distinct_n(prompts, 2), 4),
        reply_distinct_1=round(distinct_n(replies, 1), 4),
        reply_distinct_2=round(distinct_n(replies, 2), 4),
        nearest_similarity=None if vectors is None else round(nearest_similarity(vectors), 4),
        vendi_score=None if vectors is None else round(vendi_score(vectors), 2),
        chosen_words=_lengths([_content(row.chosen) for row in rows]),
        rejected_words=_lengths([_content(row.rejected) for row in rows]),
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all of them, in (0, 1]; case is ignored; 0.0 where there is none.

    Li et al. 2016, arXiv 1510.03055. It falls as the texts grow in number, so only sets of one size compare.
    """
    grams = [gram for text in texts for gram in _ngrams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def nearest_similarity(vectors: np.ndarray) -> float:
    """Mean cosine similarity of each row to the nearest other one; rows of unit length, shape (n, d).

    1.0 where every text has a double; 0.0 for fewer than two rows.
    """
    if len(vectors) < 2:
        return 0.0
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    return float(similarities.max(axis=1).mean())


def vendi_score(vectors: np.ndarray) -> float:
    """The effective number of unlike rows, from 1 (all alike) to n; rows of unit length, shape (n, d); 0.0 of none.

    exp of the entropy of the eigenvalues of K / n, K being the cosine kernel (Friedman and Dieng 2022, arXiv
    2210.02410).
    """
    if not len(vectors):
        return 0.0
    shares = np.linalg.svd(vectors, compute_uv=False).astype(float) ** 2 / len(vectors)  # the eigenvalues of K / n
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


class NearDuplicates:
    """Texts of which each can be found by one that is nearly the same: MinHash LSH over words and pairs of words.

    Likeness is the Jaccard similarity of those sets. Numbers are words, so "40 lamps" and "41 lamps" are one word
    apart, which among thirty others is nearly the same. It is estimated, with a standard error of at most .045 for 128
    permutations.
    """

    def __init__(self, threshold: float, permutations: int = 128) -> None:
        """`threshold` is the similarity, in (0, 1], from which two texts are nearly the same."""
        from datasketch import MinHashLSH  # takes half a second, for scipy

        self._threshold, self._permutations = threshold, permutations
        # At its own threshold the index finds hardly half, so it looks a little lower and the estimate decides.
        self._index = MinHashLSH(threshold=max(0.0, threshold - 0.1), num_perm=permutations, weights=(0.1, 0.9))
        self._sketches: dict[str, Any] = {}

    def find(self, text: str) -> str | None:
        """The key of the likest text that was added and is at least `threshold` similar; None where there is none."""
        sketch = self._sketch(text)
        similar = {key: float(sketch.jaccard(self._sketches[key])) for key in sorted(self._index.query(sketch))}
        likest = max(similar, key=similar.__getitem__, default=None)
        return likest if likest is not None and similar[likest] >= self._threshold else None

    def add(self, key: str, text: str) -> None:
        """Makes a text one that can be found; `key` must be new."""
        self._sketches[key] = self._sketch(text)
        self._index.insert(key, self._sketches[key])

    def _sketch(self, text: str) -> Any:
        from datasketch import MinHash

        words = _words(text)
        shingles = {" ".join(gram) for n in (1, 2) for gram in _ngrams(words, n)}
        sketch = MinHash(num_perm=self._permutations)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        return sketch


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _content(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _shares(names: Sequence[str]) -> dict[str, float]:
    """Shares of each name, the commonest first."""
    return {name: round(count / len(names), 4) for name, count in Counter(names).most_common()}


def _lengths(texts: Sequence[str]) -> Words:
    lengths = [len(_words(text)) for text in texts] or [0]
    return Words(mean=round(statistics.fmean(lengths), 2), median=statistics.median(lengths))
