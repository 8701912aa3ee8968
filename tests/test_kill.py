"""kill -9 at any moment, of the driver, the trainer or the engine, and the same command again: nothing lost or doubled.

Lives are real processes (tests/kill_runner.py) on the scripted engine, with real training steps on the toy model. They
are killed at moments drawn over the time that is known to be left, as often as it takes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from conftest import tiny_text

from dream.records import PreferencePair
from dream.store import contrast_pairs, read_json, read_log, write_json
from train.data import StepSpec
from train.history import finished_rounds, read_policy

pytestmark = pytest.mark.kill

RUNNER = Path(__file__).parent / "kill_runner.py"
PROMPTS = Path(__file__).parent.parent / "prompts"
PAIRS, ROUNDS = 3, 2
KILLS = 32
SERVERS = 2
"""Processes that serve lives side by side."""
KILLS_A_RUN = 4
VICTIMS = {"driver": 5, "trainer": 3, "engine": 2}
"""Who is killed, and how often of ten times."""
LAST_WORDS = {"trainer": "training ended with code -9", "engine": "an engine died"}
"""Of a driver whose trainer or engine was killed."""


class Server:
    """A process that forks lives."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, place: Path) -> int:
        """Begins a life; the driver's process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{place}\n")
        self._process.stdin.flush()
        return self._said()["pid"]

    def ended(self) -> int:
        """Waits until the life is over; its exit code, negative for a signal."""
        return self._said()["code"]

    def _said(self) -> dict[str, int]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def servers(number: int, log: Path) -> Iterator[list[Server]]:
    """Some of them, ended with the block."""
    with log.open("w") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for _ in range(number)
        ]
        try:
            yield [Server(process) for process in processes]
        finally:
            for process in processes:
                process.communicate(timeout=60)


def workplace(place: Path, toy: Path, rounds: int = ROUNDS) -> Path:
    """A directory to run the command in: two tiny templates, a part of the gold set, the toy model."""
    shutil.copytree(PROMPTS, place / "prompts", ignore=shutil.ignore_patterns("scenarios"))
    replies = place / "prompts" / "gold" / "replies.jsonl"
    replies.write_text("".join(replies.read_text().splitlines(keepends=True)[::12]))
    (place / "prompts" / "scenarios").mkdir()
    for name, flaw, split in (("stock", "false_premise", "train"), ("kept", "missing_fact", "heldout")):
        (place / "prompts" / "scenarios" / f"{name}.j2").write_text(tiny_text(name, flaw, split))
    shutil.copytree(toy, place / "model")
    config = {
        "rounds": rounds,
        "model": str(place / "model"),
        "engine": {"dtype": "float32"},
        "judge": {"signals": ["contrast"], "self_test_replies": 16},
        "generate": {
            "pairs": PAIRS, "concurrency": 2, "dreamer": "slots", "general_share": 0, "worked_examples": 0, "samples": 1
        },
        "train": {"batch_size": 4, "micro_batch_size": 2, "bf16": False, "flip_probability": 0.1},
        "eval": {
            "heldout_pairs": 4, "fresh_pairs": 1, "sampled_scenarios": 1, "pressed_scenarios": 1, "lookalikes": 2,
            "steered_scenarios": 1, "retention_questions": 0, "neutral_texts": 0,
        },
    }  # fmt: skip
    write_json(place / "config.json", config)
    return place


def killed_life(server: Server, place: Path, whom: str, delay: float) -> bool:
    """A life in which somebody is killed `delay` seconds after it, or he, began; whether that ended it."""
    note, log = place / f"{whom}.pid", place / "driver.log"
    note.unlink(missing_ok=True)
    log.write_text("")  # what earlier lives said is no evidence of this one
    driver = server.start(place)
    while whom != "driver" and running(driver) and not (note.exists() and note.read_text()):
        time.sleep(0.005)
    due = time.monotonic() + delay
    while running(driver) and time.monotonic() < due:
        time.sleep(0.005)
    victim = driver if whom == "driver" else int(note.read_text()) if note.exists() else None
    hit = victim is not None and running(victim)
    if hit:
        os.kill(victim, signal.SIGKILL)
    code, said = server.ended(), log.read_text()
    if code:
        assert hit, said  # nobody else may end a life
        assert code == (-signal.SIGKILL if whom == "driver" else 1), said
        assert LAST_WORDS.get(whom, "") in said, said
    return code != 0


def running(pid: int) -> bool:
    """Whether there is such a process, and it is not only waiting to be noticed as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def check(place: Path, rounds: int = ROUNDS) -> None:
    """The run is as one that nobody disturbed."""
    run, numbers = place / "run", range(1, rounds + 1)
    results = finished_rounds(run)
    assert [(result.round, result.parent, result.accepted) for result in results] == [
        (n, n - 1, PAIRS) for n in numbers
    ]
    assert [result.decision.decision for result in results] == ["promote"] * rounds
    policy = read_policy(run)
    assert (policy.round, policy.as_of) == (rounds, rounds)
    rows = [row for n in numbers for row in read_log(run / f"round_{n:02d}" / "pairs.jsonl", PreferencePair)]
    assert len({(row.pair_id, row.side) for row in rows}) == len(rows) == 2 * PAIRS * rounds
    assert len(list(contrast_pairs(rows))) == PAIRS * rounds
    assert len({(row.meta["template"], row.meta["seed"]) for row in rows}) == PAIRS * rounds
    for n in numbers:
        check_round(run / f"round_{n:02d}", str(run / f"round_{n - 1:02d}/train/adapter") if n > 1 else None)


def check_round(folder: Path, adapter: str | None) -> None:
    """A round's training is whole, began from the parent's adapter and took every row of the round once."""
    assert {path.name for path in folder.glob("*.tmp")} | {path.name for path in folder.glob(".*")} == set()
    trained = {path.name for path in (folder / "train").iterdir()}
    assert trained == {"adapter", "weights", "ledger.json", "probes.json"}
    spec = StepSpec.model_validate(read_json(folder / "train.spec.json"))
    assert spec.adapter == adapter
    ids = {row.pair_id for row in read_log(folder / "pairs.jsonl", PreferencePair)}
    used = Counter(row.pair_id for row in read_log(folder / "rows.jsonl", PreferencePair))
    assert {pair_id: used[pair_id] for pair_id in ids} == dict.fromkeys(ids, 2)
    ledger = read_json(folder / "train" / "ledger.json")
    assert ledger["rows"] == used.total()
    assert ledger["steps"] == ledger["planned_steps"] or ledger["ended_early"]


def killed_runs(server: Server, place: Path, toy: Path, seed: int, kills: int) -> Counter[str]:
    """Runs that are each killed up to `KILLS_A_RUN` times and then end; how many kills hit whom."""
    rng = random.Random(seed)
    end(server, workplace(place / "first", toy))  # before which the server imports torch
    began = time.monotonic()
    end(server, workplace(place / "undisturbed", toy))
    round_seconds = (time.monotonic() - began) / ROUNDS
    hits: Counter[str] = Counter()
    for number in count():
        if hits.total() == kills:
            break
        here, before = workplace(place / f"run_{number}", toy), hits.total()
        while hits.total() < min(kills, before + KILLS_A_RUN):
            left = ROUNDS - len(finished_rounds(here / "run"))
            whom = rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            delay = rng.uniform(0, round_seconds * (0.5 if whom == "trainer" else left))
            if not killed_life(server, here, whom, delay):
                break
            hits[whom] += 1
        end(server, here)
    return hits


def end(server: Server, place: Path) -> None:
    """The same command, undisturbed, and what it leaves."""
    server.start(place)
    assert server.ended() == 0, (place / "driver.log").read_text()
    check(place)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kills_at_random_moments(tmp_path: Path, toy_model: Path) -> None:
    """After every kill the same command goes on, and in the end the run is as one that nobody disturbed."""
    with servers(SERVERS, tmp_path / "servers.log") as ours, ThreadPoolExecutor(SERVERS) as threads:
        parts = [
            threads.submit(killed_runs, server, tmp_path / f"part_{number}", toy_model, number, KILLS // SERVERS)
            for number, server in enumerate(ours)
        ]
        hits = sum((part.result() for part in parts), Counter[str]())
    assert hits.total() == KILLS
    assert set(hits) == set(VICTIMS)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_trainer_ends_with_its_driver(tmp_path: Path, toy_model: Path) -> None:
    """A driver that is killed takes its training child along, so that the child of the same command has no rival."""
    place = workplace(tmp_path / "place", toy_model, rounds=1)
    command = [sys.executable, str(RUNNER), str(place)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        spec = "round_01/train.spec.json"
        while driver.poll() is None and not trainers(driver.pid, spec):
            time.sleep(0.01)
        (child,) = trainers(driver.pid, spec)
        time.sleep(0.5)  # within its imports
        driver.kill()
    time.sleep(0.5)
    assert not running(child)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(place, rounds=1)


def trainers(parent: int, spec: str) -> list[int]:
    """Child processes that were started on a specification file."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_child = (path / "stat").read_text().rpartition(")")[2].split()[1] == str(parent)
            if is_child and (path / "cmdline").read_bytes().rstrip(b"\0").endswith(spec.encode()):
                found.append(int(path.name))
    return found
