"""The rubric asked of an OpenAI-compatible server, such as `vllm serve` or a hosted model.

The key comes from the environment and is written nowhere. A question that the server cannot answer, or answers with
something else than a letter, is not a number: the judge abstains on that reply.
"""

import asyncio
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dream.config import ServerConfig
from dream.errors import JudgeError
from dream.judge.likelihood import LETTERS, log_odds, rotations, rubric_prompt
from dream.judge.question import Labelled, Question

if TYPE_CHECKING:
    import openai

UNSEEN = -12.0
"""Log-probability of a letter that is not among the server's likeliest tokens, and the lowest that counts."""
TOP_LOGPROBS = 20
"""Likeliest tokens to ask for: the most that OpenAI and an unconfigured `vllm serve` give."""
PATIENCE = 8
"""Requests in a row that may fail after all their retries; the rest of the batch is not sent to a dead server."""
GONE = 64
"""Requests in a row, over all batches, after which the server is gone, be it for want of credit (402, 403, or 429 for
good): scenarios would be used up without a verdict."""
WITHOUT_END = (402, 403, 408, 409, 429)
"""Of a server that has answered: each may be about one request, and all of them together are not."""
LONGEST_WAIT_S = 120.0
"""Before a retry: the longest `Retry-After` that the library honours."""
_HINTS = {401: "judge.server.api_key_env", 403: "judge.server.api_key_env", 404: "judge.server.base_url and model"}


class Server:
    """Log-odds of the rubric's letters by a server, averaged over all rotations of the labels."""

    name = "server"
    columns = ("server_push_back", "server_neither")
    learns = False

    def __init__(self, config: ServerConfig) -> None:
        """Raises JudgeError where the key's variable is not set or cannot hold a key."""
        from openai import AsyncOpenAI

        self._config = config
        self._key = _key(config.api_key_env)
        # The library retries timeouts, 429 and 5xx with exponential back-off and honours Retry-After.
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",  # the library insists on one
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )
        # `timeout` is for each read, so an answer that trickles in needs a bound of its own.
        self._patience_s = (config.max_retries + 1) * (config.timeout_s + LONGEST_WAIT_S)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._answered = False
        self._failed_in_a_row = self._unanswered = 0

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Nothing to learn."""

    async def measure(self, questions: Sequence[Question]) -> np.ndarray:
        """Log-odds against `comply`, shape (questions, 2); nan where the server gave no usable answer.

        Raises:
            JudgeError: the server refuses the key, the model, or the first request, or has been gone for long.
        """
        self._failed_in_a_row = 0

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
            async with self._slots:  # held through the waits between retries, which spares a busy server
                if self._failed_in_a_row >= PATIENCE:
                    return None
                async with asyncio.timeout(self._patience_s):
                    answer = await self._client.chat.completions.create(
                        model=self._config.model,
                        messages=[{"role": "user", "content": prompt}],
                        max_tokens=self._config.max_tokens,
                        temperature=0,
                        logprobs=self._config.logprobs or openai.omit,
                        top_logprobs=TOP_LOGPROBS if self._config.logprobs else openai.omit,
                    )
        except openai.APIStatusError as error:
            if self._is_refusal(error.status_code):
                raise self._refusal(error) from None  # the library's own text may hold the key
            down = error.status_code >= 500
            if down or error.status_code in WITHOUT_END:
                self._unheard(f"status {error.status_code}", down=down)
            return None
        except (openai.OpenAIError, TimeoutError, ValueError, RecursionError) as error:  # none in time, or no JSON
            self._unheard(type(error).__name__, down=True)
            return None
        self._failed_in_a_row = self._unanswered = 0
        letters = read_letters(answer)
        self._answered = self._answered or letters is not None
        return letters

    def _unheard(self, why: str, *, down: bool) -> None:
        """Counts a request without an answer; `down` where the server is likely at fault, not the request."""
        self._failed_in_a_row += down
        self._unanswered += 1
        if self._unanswered >= GONE:
            raise JudgeError(
                f"judge.server {self._config.base_url} answered none of the last {GONE} requests (the last: {why}); "
                "bring it back, then go on with the same command"
            )

    def _is_refusal(self, status: int) -> bool:
        """Whether a status is about the configuration.

        From a server that has answered before, only a wrong key or model is; a 400 is then about one reply, which is
        too long for the model or offends a content filter.
        """
        busy = status in (408, 409, 429)
        return status in (401, 404) or (400 <= status < 500 and not busy and not self._answered)

    def _refusal(self, error: "openai.APIStatusError") -> JudgeError:
        said = " ".join(error.message.split())
        if self._key:
            said = said.replace(self._key, "(key)")
        hint = _HINTS.get(error.status_code, "judge.server.model, max_tokens and logprobs")
        return JudgeError(f"judge.server {self._config.base_url} refuses to answer: {said[:300]}; look at {hint}")


def _key(variable: str) -> str:
    """The key in an environment variable; empty where none is needed."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeError(f"judge.server.api_key_env: the variable {variable} is not set; export it")
    if not re.fullmatch(r"[!-~]+", key):  # a header cannot carry it, and the error of that would show it
        raise JudgeError(
            f"judge.server.api_key_env: the variable {variable} holds spaces or accents; export the bare key"
        )
    return key


def read_letters(answer: Any) -> list[float] | None:
    """Log-probability of each letter in a chat completion: from its log-probabilities, else from its text.

    A text counts only when it is one letter, with nothing but punctuation around it; "A or B" is no answer.
    """
    try:
        choice = answer.choices[0]
        steps = choice.logprobs.content if choice.logprobs else None
        if steps:
            found = dict.fromkeys(LETTERS, UNSEEN)
            for one in steps[0].top_logprobs:  # "A", " A" and "a" are tokens of their own
                letter = one.token.strip().upper()
                if letter in found:
                    found[letter] = max(found[letter], min(one.logprob, 0.0))
            if max(found.values()) > UNSEEN:
                return list(found.values())
        said = re.fullmatch(r"\W*([ABC])\W*", choice.message.content or "", re.IGNORECASE)
    except (AttributeError, LookupError, TypeError):  # a server may answer anything
        return None
    return [0.0 if said[1].upper() == letter else UNSEEN for letter in LETTERS] if said else None
