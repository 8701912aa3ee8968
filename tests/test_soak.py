"""Dreaming through sixty faults: whatever fails and however often, the same call ends with exactly the wanted pairs."""

import asyncio
import errno
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from actors import local_pool
from test_faults import GARBAGE, send
from test_generate import Round, check_every_scenario_ended_once, check_no_draw_twice

from dream.engine import Completion, Sampling, ScriptedEngine
from dream.errors import EngineError, Stopped, StorageError
from dream.generate import RoundDreamer
from dream.judge.combined import Judge
from dream.records import Message
from dream.stop import Stop
from dream.store import Log, RoundStore
from dream.vllm_engine import EngineDied

PAIRS = 100
FAULTS = 60
LOST = ("engine died", "actor killed", "engine hangs")
ENDS = ("disk full", "stopped", "stopped now", "pool gave up")
KINDS = (*LOST, *ENDS, *GARBAGE, "no verdict")
LIVES = 100
"""More than that many calls would mean that the round gets nowhere."""


class Fate:
    """Says when the next fault happens, and which: each kind as often as any other, in an order that the seed draws."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._left = [KINDS[number % len(KINDS)] for number in range(FAULTS)]
        self._dice.shuffle(self._left)
        self._calls = 5
        self.seen: Counter[str] = Counter()

    def next(self, *kinds: str) -> str:
        """The fault that is due, if it is of these kinds, which happens now; otherwise an empty string."""
        if not self._left or self._left[-1] not in kinds:
            return ""
        self._calls -= 1
        if self._calls > 0:
            return ""
        self._calls = self._dice.randint(1, 8)
        self.seen[self._left[-1]] += 1
        return self._left.pop()


class Ill(ScriptedEngine):
    """A scripted engine to which faults happen; `die` is what its actor puts here."""

    def __init__(self, fate: Fate, *arguments: Any) -> None:
        super().__init__(*arguments, delay_s=0.0005)
        self._fate = fate

    async def start(self, weights: Path | None = None) -> None:
        """Nothing to bring up."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        fault = self._fate.next(*LOST, *GARBAGE, "stopped", "stopped now", "pool gave up")
        if fault in GARBAGE:
            return [Completion(GARBAGE[fault], 9, "stop")] * sampling.n
        if fault == "engine died":
            raise EngineDied("gone")
        if fault == "pool gave up":
            raise EngineError("an engine died again after 3 restarts; the run can be continued")
        if fault == "actor killed":
            self.die()
        if fault in ("actor killed", "engine hangs"):
            await asyncio.sleep(3600)
        if fault in ("stopped", "stopped now"):
            send(signal.SIGTERM)
        if fault == "stopped now":
            asyncio.get_running_loop().call_soon(send, signal.SIGINT)
        return await super().generate(messages, sampling)


class Mute:
    """A signal of a judge that now and then has no answer."""

    def __init__(self, signal: Any, fate: Fate) -> None:
        self._signal, self._fate = signal, fate
        self.columns = signal.columns

    async def measure(self, questions: Sequence[Any]) -> np.ndarray:
        measured = await self._signal.measure(questions)
        return np.full_like(measured, np.nan) if self._fate.next("no verdict") else measured


class FullDisk:
    """A file with room for ten bytes more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.usefixtures("quick_disk")
def test_sixty_faults_cost_no_pair(
    tmp_path: Path, judge: Judge, twin_templates, settings_with, script, likelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least fifty faults of all kinds in one round, and it holds exactly the wanted pairs, unique and complete."""
    fate = Fate(seed=1)
    config = settings_with(generate={"pairs": PAIRS, "concurrency": 6})
    mute = replace(judge, signals=[Mute(one, fate) for one in judge.signals])
    append = Log.append

    def append_or_not(log: Log, *records: Any, sync: bool = False) -> None:
        with monkeypatch.context() as patch:
            if fate.next("disk full"):
                patch.setattr(log, "_file", FullDisk(log._file))
            append(log, *records, sync=sync)

    monkeypatch.setattr(Log, "append", append_or_not)

    async def dream(rounds: RoundStore, stop: Stop) -> None:
        engines = local_pool(monkeypatch, lambda: Ill(fate, script, likelihood), replicas=2, request_timeout_s=0.5)
        async with engines as pool:
            dreamer = RoundDreamer(pool, mute, rounds, twin_templates, config, round_number=1, policy="base", stop=stop)
            await dreamer.run()

    ends: Counter[str] = Counter()
    while not ends["done"] and ends.total() < LIVES:
        rounds, stop = RoundStore(tmp_path / "round_01"), Stop(lambda text: None)
        kept = {pair.clear.pair_id for pair in [*rounds.pairs, *rounds.spare]}
        try:
            stop.run(dream(rounds, stop))
            ends["done"] += 1
        except (StorageError, Stopped, EngineError) as error:
            ends[type(error).__name__] += 1
        finally:
            rounds.close()
        found = Round(tmp_path / "round_01")
        accepted = {pair.clear.pair_id for pair in [*found.pairs, *found.spare]}
        assert kept <= accepted, "an accepted pair was lost"

    assert ends["done"] == 1, ends
    assert fate.seen.total() == FAULTS, "the round was over before the faults were"
    assert set(fate.seen) == set(KINDS)
    assert set(ends) == {"done", "StorageError", "Stopped", "EngineError"}
    assert len(found.rows) == len({(row.pair_id, row.side) for row in found.rows}) == 2 * PAIRS
    assert len(found.pairs) == PAIRS
    assert {pair_id.removesuffix("m") + "m" for pair_id in accepted} <= accepted
    assert {pair_id.removesuffix("m") for pair_id in accepted} <= accepted
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)
    texts = {message["content"] for row in found.rows for message in [*row.prompt, *row.chosen, *row.rejected]}
    assert not texts & set(GARBAGE.values())
