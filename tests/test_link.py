"""dream/link.py: many calls in few messages, none of which waits for another, is lost, or gets another's answer."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.errors import EngineError
from dream.link import Answer, Call, CallTaker, Link

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Target:
    """Answers after a while, or raises."""

    async def double(self, number: int, wait: float = 0.0) -> int:
        await asyncio.sleep(wait)
        if number < 0:
            raise ValueError(f"{number} is negative")
        return 2 * number

    async def odd(self) -> None:
        raise type("Local", (Exception,), {})("cannot travel")


class Wire:
    """The messages between both ends, counted; once `cut`, all of them fail."""

    def __init__(self) -> None:
        self.taker = CallTaker(Target())
        self.sent = self.fetched = 0
        self.cut = asyncio.Event()
        self.link = Link(self.take, self.answers)

    async def take(self, calls: list[Call]) -> None:
        self.sent += 1
        if self.cut.is_set():
            raise EngineError("cut")
        self.taker.take(calls)

    async def answers(self) -> list[Answer]:
        self.fetched += 1
        answer, cut = asyncio.ensure_future(self.taker.answers()), asyncio.ensure_future(self.cut.wait())
        await asyncio.wait({answer, cut}, return_when=asyncio.FIRST_COMPLETED)
        if self.cut.is_set():
            raise EngineError("cut")
        return answer.result()


@given(st.lists(st.tuples(st.integers(-3, 50), st.sampled_from([0.0, 0.001, 0.004])), max_size=40))
def test_each_call_gets_its_own_answer(calls: list[tuple[int, float]]) -> None:
    """Whatever the order in which they end, and errors too."""

    async def work() -> list[Any]:
        wire = Wire()
        return await asyncio.gather(*(wire.link.call("double", *call) for call in calls), return_exceptions=True)

    for (number, _), found in zip(calls, asyncio.run(work()), strict=True):
        assert str(found) == (f"{number} is negative" if number < 0 else str(2 * number))


def test_calls_of_one_moment_share_messages(run: Run) -> None:
    """A hundred calls take one message there, and few back."""

    async def work() -> Wire:
        wire = Wire()
        await asyncio.gather(*(wire.link.call("double", number) for number in range(100)))
        return wire

    wire = run(work())
    assert wire.sent == 1
    assert wire.fetched <= 3


def test_quick_call_does_not_wait_for_a_slow_one(run: Run) -> None:
    """The slow call is still under way when the quick one has its answer."""

    async def work() -> bool:
        wire = Wire()
        slow = asyncio.ensure_future(wire.link.call("double", 1, 5.0))
        assert await asyncio.wait_for(wire.link.call("double", 2), 2) == 4
        waiting = not slow.done()
        slow.cancel()
        return waiting

    assert run(work())


def test_lost_actor_ends_calls_under_way_and_later_ones(run: Run) -> None:
    """None waits for ever; one that was given up before hinders nothing."""

    async def work() -> list[Any]:
        wire = Wire()
        given_up = asyncio.ensure_future(wire.link.call("double", 3, 5.0))
        under_way = [asyncio.ensure_future(wire.link.call("double", number, 5.0)) for number in range(3)]
        await asyncio.sleep(0.01)
        given_up.cancel()
        wire.cut.set()
        return await asyncio.gather(*under_way, wire.link.call("double", 1), return_exceptions=True)

    found = asyncio.run(work())
    assert [str(one) for one in found] == ["cut"] * 4


def test_error_that_cannot_travel_is_told_in_words(run: Run) -> None:
    """Ray could not send an exception of a class that only the actor knows."""

    async def work() -> None:
        await Wire().link.call("odd")

    with pytest.raises(EngineError, match="Local: cannot travel"):
        run(work())
