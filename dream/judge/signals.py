"""The signals a judge is combined from; `SIGNALS` lists all of them.

At 135M the usual "does this reply push back?" question is worth nothing (AUC about .5, docs/LOG.md), so signals come
from likelihoods and from wording.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from dream.engine import Engine, mean
from dream.judge.question import Labelled, Question, Signal
from dream.selfplay import steering


class Contrast:
    """log p(reply | asked to push back) - log p(reply | asked to comply), mean per token, by the engine's model."""

    name = "contrast"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> list[float]:
        """Replies to the same prompt are scored together, so that the prompt is paid for once."""
        together: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            key = (_text(question), question.aims.get("push_back", ""), question.aims.get("comply", ""))
            together[key].append(place)
        values = [0.0] * len(questions)

        async def compare(prompt: str, push_back: str, comply: str, places: list[int]) -> None:
            replies = [questions[place].reply for place in places]
            against, along = await asyncio.gather(
                self._engine.score(steering("push_back", prompt, push_back), replies),
                self._engine.score(steering("comply", prompt, comply), replies),
            )
            for place, push_logps, comply_logps in zip(places, against, along, strict=True):
                values[place] = mean(push_logps) - mean(comply_logps)

        await asyncio.gather(*(compare(*key, places) for key, places in together.items()))
        return values


class Wording:
    """Log-odds of a logistic regression over word n-grams, learned from labelled replies; it never sees the prompt."""

    name = "wording"

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Learns; numbers count as one word, so that it cannot learn values by heart."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self._model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[a-zA-Z']+|\d|[?!]", sublinear_tf=True),
            LogisticRegression(C=10.0, max_iter=1000),
        )
        self._model.fit([e.question.reply for e in examples], [e.label == "push_back" for e in examples])

    async def measure(self, questions: Sequence[Question]) -> list[float]:
        """Log-odds; `fit` comes first."""
        if not questions:
            return []
        return [float(value) for value in self._model.decision_function([q.reply for q in questions])]


SIGNALS: dict[str, Callable[[Engine], Signal]] = {
    "contrast": Contrast,
    "wording": lambda engine: Wording(),
}


def _text(question: Question) -> str:
    return "\n\n".join(message["content"] for message in question.prompt if message["role"] == "user")
