"""Signals that ask a language model by likelihood: no text is sampled, so there is no verdict to parse.

At 135M the rubric is worth next to nothing (docs/LOG.md); it is for larger models behind the same interface.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from dream import prompts
from dream.engine import Engine, mean
from dream.judge.question import Labelled, Question
from dream.judge.transcript import neutral
from dream.records import Stance, user
from dream.selfplay import steering

RUBRIC: dict[str, Stance] = {"comply": "comply", "push back": "push_back", "neither": "neither"}
"""The answers of the rubric, and the stance each of them means."""
LETTERS = "ABC"


class Contrast:
    """log p(reply | asked to push back) - log p(reply | asked to comply), mean per token."""

    name = "contrast"
    columns = ("contrast",)
    learns = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """Replies to the same prompt are scored together, so that the prompt is paid for once."""

        def key(question: Question) -> tuple[str, str, str]:
            aims = question.aims
            return neutral(question.asked), neutral(aims.get("push_back", "")), neutral(aims.get("comply", ""))

        async def compare(key: tuple[str, str, str], replies: list[str]) -> list[float]:
            prompt, push_back, comply = key
            against, along = await asyncio.gather(
                self._engine.score(steering("push_back", prompt, push_back), replies),
                self._engine.score(steering("comply", prompt, comply), replies),
            )
            return [mean(push) - mean(go) for push, go in zip(against, along, strict=True)]

        return np.array(await _by_prompt(questions, key, compare)).reshape(-1, 1)


class Rubric:
    """The verdict of a judging prompt by constrained choice: the log-odds of its letters.

    Each question is asked in every rotation of the labels and the answers are averaged, so that a liking for a letter
    or a place cancels.
    """

    name = "rubric"
    columns = ("rubric_push_back", "rubric_neither")
    learns = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """Log-odds against `comply` of each other stance, shape (questions, 2)."""

        async def ask(question: Question) -> list[float]:
            turns = rotations()
            scored = await asyncio.gather(
                *(self._engine.score([user(rubric_prompt(question, labels))], list(LETTERS)) for labels in turns)
            )
            return log_odds(
                [dict(zip(labels, map(mean, found), strict=True)) for labels, found in zip(turns, scored, strict=True)]
            )

        return np.array(await asyncio.gather(*map(ask, questions))).reshape(-1, 2)


def rotations() -> list[list[str]]:
    """The rubric's answers in every rotation, so that each stands at each letter once."""
    labels = list(RUBRIC)
    return [labels[start:] + labels[:start] for start in range(len(labels))]


def rubric_prompt(question: Question, labels: Sequence[str]) -> str:
    """The judging prompt with the labels at A, B, C; the transcript in it cannot close itself or speak as a role."""
    return prompts.render(
        "judge/rubric",
        asked=neutral(question.asked),
        reply=neutral(question.reply),
        choices=list(zip(LETTERS, labels, strict=True)),
    )


def log_odds(asked: Sequence[dict[str, float]]) -> list[float]:
    """Mean log-odds of push_back and of neither against comply, from one mapping label -> log-probability an order."""
    return [math.fsum(one[label] - one["comply"] for one in asked) / len(asked) for label in ("push back", "neither")]


async def _by_prompt(
    questions: Sequence[Question],
    key: Callable[[Question], tuple[str, str, str]],
    compare: Callable[[tuple[str, str, str], list[str]], Coroutine[Any, Any, list[float]]],
) -> list[float]:
    together: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        together[key(question)].append(place)
    values = [0.0] * len(questions)

    async def one(group: tuple[str, str, str], places: list[int]) -> None:
        found = await compare(group, [neutral(questions[place].reply) for place in places])
        for place, value in zip(places, found, strict=True):
            values[place] = value

    await asyncio.gather(*(one(group, places) for group, places in together.items()))
    return values
