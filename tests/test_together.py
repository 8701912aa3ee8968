"""dream/judge/together.py: calls that are made together, and who gets what of them."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.judge.together import Together


def recorded(calls: list[list[int]]) -> Callable[[list[int]], np.ndarray]:
    """Squares, and the items of each call; a negative item raises."""

    def rows_of(items: list[int]) -> np.ndarray:
        calls.append(items)
        if min(items) < 0:
            raise ValueError("negative")
        return np.array([[item * item, item] for item in items])

    return rows_of


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=8))
def test_everyone_gets_the_rows_of_their_own_items(asked: list[list[int]]) -> None:
    """However calls are put together, in whatever loop."""
    together = Together(recorded([]))

    async def go() -> list[np.ndarray]:
        return await asyncio.gather(*map(together, asked))

    for _ in range(2):
        assert [rows.tolist() for rows in asyncio.run(go())] == [[[i * i, i] for i in items] for items in asked]


def test_what_is_asked_meanwhile_is_one_call() -> None:
    """The first call begins at once; the others, who come while it runs, share the next."""
    calls: list[list[int]] = []
    release = threading.Event()

    def slow(items: list[int]) -> np.ndarray:
        release.wait(10)
        return recorded(calls)(items)

    async def go() -> None:
        together = Together(slow)
        first = asyncio.ensure_future(together([1]))
        await asyncio.sleep(0.01)
        others = [asyncio.ensure_future(together([number])) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        others[1].cancel()
        release.set()
        assert (await first).tolist() == [[1, 1]]
        assert (await others[2]).tolist() == [[16, 4]]

    asyncio.run(go())
    assert calls == [[1], [2, 3, 4]]


def test_an_error_reaches_those_who_asked_and_nobody_later() -> None:
    """The function goes on being usable."""
    together = Together(recorded([]))

    async def go() -> None:
        for failed in await asyncio.gather(together([-1]), together([2]), return_exceptions=True):
            assert isinstance(failed, ValueError)
        assert (await together([3])).tolist() == [[9, 3]]

    asyncio.run(go())


@pytest.mark.parametrize("item", [1, -1])
def test_a_caller_that_gives_up_is_no_error(item: int) -> None:
    """Its rows, or the error, are nobody's; the others of its call get theirs, and later calls go on."""
    begun, release = threading.Event(), threading.Event()

    def slow(items: list[int]) -> np.ndarray:
        begun.set()
        release.wait(10)
        return recorded([])(items)

    async def go() -> None:
        together = Together(slow)
        gone, left = (asyncio.ensure_future(together([item])) for _ in range(2))
        await asyncio.to_thread(begun.wait, 10)
        gone.cancel()
        release.set()
        if item < 0:
            with pytest.raises(ValueError, match="negative"):
                await left
        else:
            assert (await left).tolist() == [[1, 1]]
        assert gone.cancelled()
        assert (await together([2])).tolist() == [[4, 2]]

    asyncio.run(go())
