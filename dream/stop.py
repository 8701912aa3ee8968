"""Stopping on SIGINT (Ctrl-C) or SIGTERM: after one, what is in flight ends in good order; after two, it stops now.

A command runs its coroutine with `Stop.run`. Where nothing is in flight the first signal cancels it; around work that
can end in good order it stands in a `Stop.gently` block. Not covered: what runs before and after the coroutine, where
Python's own handling stands.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from dream.errors import Stopped

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOW = "stopping; a second signal stops at once"


def _nothing() -> None:
    """What is in flight ends by itself."""


class Stop:
    """What signals asked for; without `run` none ever comes."""

    def __init__(self, say: Callable[[str], None] = print, how_to_go_on: str = "") -> None:
        """`say` shows a line to the user when the first signal comes; `how_to_go_on` ends the message of `Stopped`."""
        self._say, self._how_to_go_on = say, how_to_go_on
        self._text = NOW
        self._act: Callable[[], object] = _nothing
        self._loop: asyncio.AbstractEventLoop
        self.asked: int | None = None
        """The number of the first signal; who works in a `gently` block begins nothing new when it is there."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`asyncio.run`, with our handlers while it lasts; from the main thread only.

        Raises:
            Stopped: a signal ended the work.
        """
        try:
            return asyncio.run(self._watched(work))
        except (asyncio.CancelledError, KeyboardInterrupt) as error:
            if self.asked is None:
                raise
            raise self._stopped() from error

    @contextmanager
    def gently(self, text: str, act: Callable[[], object] = _nothing) -> Iterator[None]:
        """While the block lasts the first signal cancels nothing: it shows `text` and calls `act`, which may be done
        twice and in the middle of anything. A signal that came before counts.

        Raises:
            Stopped: at the end of a block that raised nothing itself, when a signal came.
        """
        before = self._text, self._act
        self._text, self._act = text, act
        if self.asked is not None:
            self._act()
        try:
            yield
        finally:
            self._text, self._act = before
        if self.asked is not None:
            raise self._stopped()

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        self._loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._act = lambda: self._loop.call_soon_threadsafe(task.cancel)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            return await work
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        self._loop.call_soon_threadsafe(self._say, self._text)  # to print in the middle of printing is an error
        self._act()

    def _stopped(self) -> Stopped:
        assert self.asked is not None
        return Stopped(self.asked, self._how_to_go_on)
