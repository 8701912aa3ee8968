"""Requests a second through the pool and the store when engines answer at once: what one driver can feed.

A GPU engine answers some tens of requests a second, so 2,000 feed a hundred of them.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dream.config import EngineConfig
from dream.engine import Sampling, ScriptedEngine
from dream.pool import EnginePool, connect
from dream.records import Reply, user
from dream.store import RoundStore
from tests.bench import MIB, Row, resident_peak

REQUESTS = 100_000
IN_FLIGHT = 512
WANTED = 2_000.0
PROMPT = "Write one line for the notice board, and keep to what the list says. " * 4
REPLY = "We have forty lamps for you today, and they are ready to take home."


def instant() -> Callable[[], Any]:
    """Makes engines that answer at once."""

    class Instant(ScriptedEngine):  # inside the function, so that Ray ships it by value
        async def start(self, weights: Path | None = None) -> None:
            pass

    return lambda: Instant(lambda messages, number: REPLY)


async def requests_per_second(count: int) -> float:
    """Of `count` requests, each stored as a reply; says what memory the driver took on the way."""
    connect(None)
    numbers = iter(range(count))
    with tempfile.TemporaryDirectory() as folder:
        store = RoundStore(Path(folder) / "round_01")
        async with EnginePool(instant(), EngineConfig()) as pool:

            async def work() -> None:
                for number in numbers:
                    completions = await pool.generate([user(f"{number} {PROMPT}")], Sampling())
                    store.add("replies", *(
                        Reply(
                            reply_id=f"{number}", scenario_id=f"{number}", side="clear", source="on_policy", asked=None,
                            text=one.text, tokens=one.tokens, finish_reason="stop", policy="bench",
                        )
                        for one in completions
                    ))  # fmt: skip
                    if number % (count // 5) == 0:
                        memory = resident_peak() / MIB
                        print(f"{number} requests, peak memory of the driver {memory:.0f} MiB", file=sys.stderr)

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
            rate = count / (time.perf_counter() - began)
        store.close()
    return rate


def measure() -> list[Row]:
    """The row; `other` is the rate that is wanted."""
    rate = asyncio.run(requests_per_second(REQUESTS))
    return [
        Row(
            name=Path(__file__).stem,
            ours=rate,
            other=WANTED,
            ratio=rate / WANTED,
            target=1.0,
            unit="requests/s",
        )
    ]
