"""The engine protocol, behind which stand vLLM actors, or a scripted engine in tests.

Components that need a model get an `Engine` and know nothing else of it.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dream.records import Message


@dataclass(frozen=True)
class Sampling:
    """How to sample. There is no per-request seed: vLLM on a CPU dies of one (docs/ARCHITECTURE.md)."""

    n: int = 1
    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are left out; unlike `top_p` it needs no sorting."""


@dataclass(frozen=True)
class Completion:
    """One sampled text, its length in tokens and why it ended (`stop` or `length`)."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class EngineStats:
    """Counted since the engine started."""

    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that the prefix cache held."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(
            self.generated_tokens + other.generated_tokens,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class Engine(Protocol):
    """What the loop needs of a model."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        """Samples `sampling.n` replies to a chat prompt."""

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        """Log-probability of every token of each reply, given the chat prompt (natural logarithm)."""

    async def load_weights(self, folder: Path | None) -> None:
        """Serves the weights of a Hugging Face folder; None goes back to the model the engine started with."""

    async def rest(self) -> None:
        """Gives back what memory it can, for training; until weights are loaded again it answers nothing."""

    async def stats(self) -> EngineStats:
        """What the engine has done so far."""


class WithSecond:
    """An `Engine` beside which another rests and comes back, that of a judge with a model of its own; whatever else is
    asked, the first one answers."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self._first, self._second = first, second
        self._resting = False

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        return await self._first.generate(messages, sampling)

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        return await self._first.score(messages, replies)

    async def load_weights(self, folder: Path | None) -> None:
        """Serves these; a second engine that rests serves what it did before."""
        await self._first.load_weights(folder)
        if self._resting:
            await self._second.load_weights(None)
            self._resting = False

    async def rest(self) -> None:
        self._resting = True
        await self._first.rest()
        await self._second.rest()

    async def stats(self) -> EngineStats:
        return await self._first.stats()


def mean(values: Sequence[float]) -> float:
    """The mean, 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


class ScriptedEngine:
    """An engine without a model: a function writes the replies, a hash gives the scores. Deterministic and quick.

    Args:
        write: from the messages and the sample's number to the reply's text.
        score: from the messages and a reply to its mean log-probability; by default a hash of both.
        delay_s: time each call takes.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Message], int], str],
        score: Callable[[Sequence[Message], str], float] | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self._write = write
        self._score = score or _hashed_score
        self._delay_s = delay_s
        self.loaded: list[Path | None] = []
        self._tokens = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        await asyncio.sleep(self._delay_s)
        completions = []
        for number in range(sampling.n):
            words = self._write(messages, number).split(" ")
            reason = "length" if len(words) > sampling.max_tokens else "stop"
            words = words[: sampling.max_tokens]
            self._tokens += len(words)
            completions.append(Completion(" ".join(words), len(words), reason))
        return completions

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        await asyncio.sleep(self._delay_s)
        return [[self._score(messages, reply)] * max(1, len(reply.split())) for reply in replies]

    async def load_weights(self, folder: Path | None) -> None:
        self.loaded.append(folder)

    async def rest(self) -> None:
        """There is nothing to give back."""

    async def stats(self) -> EngineStats:
        return EngineStats(generated_tokens=self._tokens)


def _hashed_score(messages: Sequence[Message], reply: str) -> float:
    digest = hashlib.sha256((repr(messages) + reply).encode()).digest()
    return -1.0 - digest[0] / 128
