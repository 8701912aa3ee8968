"""Signals that need no language model: word patterns, sentence embeddings, structure. All are quick and pinned.

They are learned from labelled replies and do not change with the policy, so one verdict means the same in every round.
"""

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dream.judge.question import Labelled, Question
from dream.judge.rules import announces
from dream.judge.together import Together
from dream.judge.transcript import neutral
from dream.records import Stance
from dream.templates import mentioned

if TYPE_CHECKING:
    from dream.embed import Embed

STANCES: tuple[Stance, Stance, Stance] = ("comply", "push_back", "neither")


class _Learned(ABC):
    """A linear classifier over three stances, given as log-odds: push_back against comply, neither against both."""

    name: str
    columns: tuple[str, ...]
    learns = True

    def __init__(self) -> None:
        self._together = Together(self._log_odds)

    @abstractmethod
    def _features(self, questions: Sequence[Question]) -> Any:
        """What the classifier reads, one row a question."""

    @abstractmethod
    def _model(self) -> Any:
        """A fresh scikit-learn classifier."""

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Learns; without examples of `neither` that column stays 0."""
        self._fitted = self._model().fit(
            self._features([example.question for example in examples]), [example.label for example in examples]
        )

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """Log-odds, shape (questions, 2); `fit` comes first."""
        if not questions:
            return np.zeros((0, 2))
        return await self._together(questions)

    def _log_odds(self, questions: Sequence[Question]) -> np.ndarray:
        found = self._fitted.predict_log_proba(self._features(questions))
        by_stance = dict(zip(self._fitted.classes_, found.T, strict=True))
        comply, push_back = by_stance["comply"], by_stance["push_back"]
        neither = by_stance.get("neither", np.maximum(comply, push_back))
        return np.clip(np.stack([push_back - comply, neither - np.maximum(comply, push_back)], axis=1), -8, 8)


class Wording(_Learned):
    """Word n-grams of the reply, as they are and with what it took from the prompt masked.

    The mask turns "the sheet says 30, not 40" into "the P says N, not P": how a reply uses what it was told.
    """

    name = "wording"
    columns = ("wording_push_back", "wording_neither")

    def _features(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        return [(neutral(question.reply), question.asked) for question in questions]

    def _model(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        return make_pipeline(
            TfidfVectorizer(analyzer=_patterns, sublinear_tf=True, min_df=2),
            LogisticRegression(C=10.0, max_iter=2000),
        )


def _patterns(pair: tuple[str, str]) -> list[str]:
    """1-2-grams of a reply's words and 1-3-grams of the masked ones; numbers count as one word."""
    reply, asked = pair
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    known = set(_words(asked)) - ENGLISH_STOP_WORDS
    words = _words(reply)
    plain = ["0" if word.isdigit() else word for word in words]
    masked = ["M" + ("P" if word in known else "N" if word.isdigit() else word) for word in words]
    ends = ["^", *plain, "$"]
    return [*_grams(ends, 2), *_grams(["M^", *masked, "M$"], 3)]


def _grams(words: Sequence[str], longest: int) -> Iterator[str]:
    for n in range(1, longest + 1):
        for start in range(len(words) - n + 1):
            yield " ".join(words[start : start + n])


class Embedding(_Learned):
    """Sentence embeddings of the reply and of its first sentence, as they are and less the prompt's, and whose worked
    replies it is nearer to. The first sentence often holds the stance of a long reply."""

    name = "embedding"
    columns = ("embedding_push_back", "embedding_neither")

    def __init__(self, embed: "Embed") -> None:
        super().__init__()
        self._embed = embed

    def _features(self, questions: Sequence[Question]) -> np.ndarray:
        replies = [neutral(question.reply) for question in questions]
        starts = [_first_sentence(reply) for reply in replies]
        asked = [question.asked for question in questions]
        worked = [line for question in questions for lines in question.examples.values() for line in lines]
        texts = list(dict.fromkeys([*replies, *starts, *asked, *worked]))
        vectors = dict(zip(texts, self._embed(texts), strict=True))  # in one call: a call costs as much as three texts
        reply, start, prompt = (np.stack([vectors[text] for text in part]) for part in (replies, starts, asked))
        near = [self._nearer(question, one, vectors) for question, one in zip(questions, reply, strict=True)]
        like = [3 * np.array(near), (reply * prompt).sum(axis=1), (start * prompt).sum(axis=1)]
        return np.hstack([start, reply, start - prompt, reply - prompt, np.stack(like, axis=1)])

    @staticmethod
    def _nearer(question: Question, reply: np.ndarray, vectors: Mapping[str, np.ndarray]) -> float:
        """Cosine with what a push-back would say minus that with what a compliance would, 0 where it is not known."""
        if not question.examples:
            return 0.0
        along, against = (
            max(float(vectors[line] @ reply) for line in question.examples[stance])
            for stance in ("comply", "push_back")
        )
        return against - along

    def _model(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=5.0, max_iter=2000)


class Structure:
    """What can be counted: whose mentions a reply holds, whose worked replies it is like, what the prompt gave it."""

    name = "structure"
    columns = (
        "known", "mentions_comply", "mentions_push_back", "alike_comply", "alike_push_back",
        "asks", "announces", "overlap", "echo", "length", "denies", "takes_back",
    )  # fmt: skip
    learns = False

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """One row a question, shape (questions, columns)."""
        return np.array([self._one(question) for question in questions], dtype=float).reshape(-1, len(self.columns))

    def _one(self, question: Question) -> list[float]:
        reply, words, asked = _straight(question.reply), _words(question.reply), _words(question.asked)
        known = set(asked)
        matcher = difflib.SequenceMatcher(None, words, asked, autojunk=False)
        longest = matcher.find_longest_match().size
        return [
            float(question.informed),
            _share(question, "comply"),
            _share(question, "push_back"),
            _alike(question, "comply"),
            _alike(question, "push_back"),
            float(reply.rstrip().endswith("?")),
            float(announces(reply)),
            sum(word in known for word in words) / max(len(words), 1),
            longest / max(len(words), 1),
            math.log1p(len(words)),
            float(bool(_DENIAL.search(reply))),
            float(bool(_TURN.search(reply))),
        ]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+", text.strip(), maxsplit=1)[0]


def _share(question: Question, stance: Stance) -> float:
    wanted = question.mentions.get(stance, ())
    return sum(mentioned(words, question.reply) for words in wanted) / len(wanted) if wanted else 0.0


def _alike(question: Question, stance: Stance) -> float:
    """difflib's ratio over words to the likest worked reply of the stance, 0 where there is none."""
    words = _words(question.reply)
    return max(
        (
            difflib.SequenceMatcher(None, words, _words(example), autojunk=False).ratio()
            for example in question.examples.get(stance, ())
        ),
        default=0.0,
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|\d+|[?!:;]", _straight(text.lower()))


def _straight(text: str) -> str:
    """With straight apostrophes, which models write as often as curly ones."""
    return text.replace("\u2019", "'")


_DENIAL = re.compile(
    r"\b(?:can(?:no|')t|won't|would(?: not|n't)|will not|(?:do|does|did|is|are|was|were|has|have|should)(?: not|n't)"
    r"|never|neither|rather not|refuse|declin\w+|unable|against)\b",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"\b(?:but|however|though|although|instead|actually|unless|until|only|except|wait|hold on)\b", re.IGNORECASE
)


def make(name: str) -> "Wording | Embedding | Structure":
    """The signal of this module with that name."""
    if name == "embedding":
        from dream.embed import minilm

        return Embedding(minilm())
    return Wording() if name == "wording" else Structure()
