"""The rubric asked of an OpenAI-compatible server, such as `vllm serve` or a hosted model.

The key comes from the environment and is written nowhere. A question that the server cannot answer, or answers with
something else than a letter, is not a number: the judge abstains on that reply.
"""

import asyncio
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dream.config import ServerConfig
from dream.errors import JudgeError
from dream.judge.likelihood import LETTERS, log_odds, rotations, rubric_prompt
from dream.judge.question import Labelled, Question

UNSEEN = -12.0
"""Log-probability of a letter that is not among the server's likeliest tokens."""


class Server:
    """Log-odds of the rubric's letters by a server, averaged over all rotations of the labels."""

    name = "server"
    columns = ("server_push_back", "server_neither")
    learns = False

    def __init__(self, config: ServerConfig) -> None:
        """Raises JudgeError where the key's variable is not set."""
        from openai import AsyncOpenAI

        key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise JudgeError(f"judge.server.api_key_env: the variable {config.api_key_env} is not set; export it")
        self._config = config
        # The library retries timeouts, 429 and 5xx with exponential back-off and honours Retry-After.
        self._client = AsyncOpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=config.max_retries
        )
        self._slots = asyncio.Semaphore(config.concurrency)

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """Log-odds against `comply`, shape (questions, 2); nan where the server gave no usable answer.

        Raises:
            JudgeError: the server refuses the key, the model or the request itself.
        """

        async def ask(question: Question) -> list[float]:
            turns = rotations()
            answers = await asyncio.gather(*(self._letters(rubric_prompt(question, labels)) for labels in turns))
            if any(answer is None for answer in answers):
                return [math.nan, math.nan]
            return log_odds(
                [dict(zip(labels, answer or (), strict=True)) for labels, answer in zip(turns, answers, strict=True)]
            )

        return np.array(await asyncio.gather(*map(ask, questions))).reshape(-1, 2)

    async def _letters(self, prompt: str) -> list[float] | None:
        """Log-probability of each letter, or None."""
        import openai

        try:
            async with self._slots:
                answer = await self._client.chat.completions.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=self._config.max_tokens,
                    temperature=0,
                    logprobs=self._config.logprobs,
                    top_logprobs=20 if self._config.logprobs else None,
                )
        except (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
            openai.BadRequestError,
        ) as error:
            raise JudgeError(f"judge.server {self._config.base_url}: {error.message}") from error
        except openai.OpenAIError:  # timeouts, 429 and 5xx after all retries, or an answer that is no completion
            return None
        return read_letters(answer)


def read_letters(answer: Any) -> list[float] | None:
    """Log-probability of each letter in a chat completion: from its log-probabilities, else from its text.

    A text counts only when it is one letter, with nothing but punctuation around it; "A or B" is no answer.
    """
    try:
        choice = answer.choices[0]
        steps = choice.logprobs.content if choice.logprobs else None
        if steps:
            found = {one.token.strip().upper(): one.logprob for one in reversed(steps[0].top_logprobs)}
            if any(letter in found for letter in LETTERS):
                return [max(found.get(letter, UNSEEN), UNSEEN) for letter in LETTERS]
        text = choice.message.content or ""
    except (AttributeError, IndexError, TypeError):  # a server may answer anything
        return None
    letter = re.fullmatch(r"\W*([ABC])\W*", text.strip(), re.IGNORECASE)
    return [0.0 if letter[1].upper() == one else UNSEEN for one in LETTERS] if letter else None
