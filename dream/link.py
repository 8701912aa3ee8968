"""Many calls to an engine's actor in few messages. Ray takes about two milliseconds a message, so that one message a
call would let a driver make some five hundred calls a second; here all calls of one turn of the event loop go out
together, and all answers that are there come back together (docs/BENCH.md, `orchestrator_rps`).

No answer waits for another: the actor sends what is ready while the rest is under way.
"""

import asyncio
import itertools
import pickle
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from dream.errors import EngineError

GATHER_S = 0.002
"""How long the actor lets further answers join the first: as much as a message takes."""


class Call(NamedTuple):
    """A call of one of the engine's methods."""

    number: int
    method: str
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """What a call returned, or the exception that it raised."""

    number: int
    value: Any
    error: Exception | None


class CallTaker:
    """The actor's end."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._ready: list[Answer] = []
        self._any = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def take(self, calls: list[Call]) -> None:
        """Begins calls."""
        for call in calls:
            task = asyncio.ensure_future(self._run(call))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def answers(self) -> list[Answer]:
        """Waits for an answer, and returns all that are there."""
        await self._any.wait()
        await asyncio.sleep(GATHER_S)
        self._any.clear()
        ready, self._ready = self._ready, []
        return ready

    async def _run(self, call: Call) -> None:
        try:
            answer = Answer(call.number, await getattr(self._target, call.method)(*call.arguments), None)
        except Exception as error:  # whatever it is, the caller is to get it
            answer = Answer(call.number, None, _sendable(error))
        self._ready.append(answer)
        self._any.set()


class Link:
    """The driver's end.

    Args:
        take: sends calls; what it raises ends these calls.
        answers: fetches answers; what it raises ends all that are under way.
    """

    def __init__(
        self, take: Callable[[list[Call]], Awaitable[None]], answers: Callable[[], Awaitable[list[Answer]]]
    ) -> None:
        self._take, self._answers = take, answers
        self._numbers = itertools.count()
        self._outbox: list[Call] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching = False

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the engine's method returns or raises, or the error with which the actor was lost."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        self._waiting[number] = answer = loop.create_future()
        if not self._outbox:
            loop.call_soon(lambda: self._start(self._send()))
        self._outbox.append(Call(number, method, arguments))
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self) -> None:
        calls, self._outbox = self._outbox, []
        if not self._fetching:
            self._fetching = True
            self._start(self._fetch())
        try:
            await self._take(calls)
        except Exception as error:
            self._lose([call.number for call in calls], error)

    async def _fetch(self) -> None:
        try:
            while self._waiting:
                for answer in await self._answers():
                    waiting = self._waiting.get(answer.number)
                    if waiting is None or waiting.done():  # the caller has given up
                        continue
                    if answer.error is not None:
                        waiting.set_exception(answer.error)
                    else:
                        waiting.set_result(answer.value)
                await asyncio.sleep(0)  # callers take their answers, and mostly call again
        except Exception as error:
            self._lose(list(self._waiting), error)
        finally:
            self._fetching = False

    def _lose(self, numbers: list[int], error: Exception) -> None:
        for number in numbers:
            waiting = self._waiting.get(number)
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)


def _sendable(error: Exception) -> Exception:
    """The error itself if it can travel, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"{type(error).__name__}: {error}")
    return error
