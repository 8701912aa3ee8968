"""Calls of one slow function made together: what is asked while a call is under way goes into the next one.

Replies come one by one from many scenarios, and judged together they take a quarter less time (docs/LOG.md, "Judged
together"). Who shares a call is a matter of time, so the last bits of an embedding are, too.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Together:
    """An asynchronous function of a list that gives a row an item, from a blocking one, which runs in a thread.

    Nobody waits for others to come: a call begins as soon as the one before it has ended. Where it raises, all whose
    items were in it get the error.
    """

    def __init__(self, rows_of: Callable[[list[Any]], np.ndarray]) -> None:
        self._rows_of = rows_of
        self._waiting: list[tuple[Sequence[Any], asyncio.Future[np.ndarray]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[Any]) -> np.ndarray:
        """The rows of these items, in their order."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, []
            try:
                rows = await asyncio.to_thread(self._rows_of, [item for items, _ in asked for item in items])
            except Exception as error:  # whatever it is, those who asked are to get it
                for _, answer in asked:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for items, answer in asked:
                own, rows = rows[: len(items)], rows[len(items) :]
                if not answer.done():  # whoever asked may have given up
                    answer.set_result(own)
