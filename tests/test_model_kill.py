"""kill -9 to the driver, the trainer and the engine of the real `dream train`, and the same command again. Minutes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.model

SMALL = {
    "generate.pairs": 2, "generate.steering": "note", "generate.samples": 1, "generate.max_tokens": 32,
    "judge.self_test_replies": 32, "engine.max_model_len": 1024, "engine.cpu_kv_cache_gib": 1,
    "eval.heldout_pairs": 4, "eval.fresh_pairs": 2, "eval.sampled_scenarios": 2, "eval.pressed_scenarios": 2,
    "eval.lookalikes": 2, "eval.steered_scenarios": 2, "eval.retention_questions": 4, "eval.neutral_texts": 2,
    "train.learning_rate": 2e-4, "engine.dtype": "float32", "train.bf16": "false",
}  # fmt: skip
DEADLINE_S = 900
WRITTEN = "round_01/.train.*.tmp"
"""What a training child writes, until it is complete."""


def dreamed(run: Path) -> bool:
    """Whether the round's dreaming is under way."""
    return (run / "round_01" / "replies.jsonl").exists()


def training(run: Path) -> Callable[[Path], bool]:
    """Tells whether a training child writes its folder. What a killed one left by now is none: it stays until the next
    child has made its imports and begins."""
    left = set(run.glob(WRITTEN))
    return lambda run: bool(set(run.glob(WRITTEN)) - left)


def driver(process: psutil.Process) -> list[psutil.Process]:
    """The command itself, with a trainer and an engine that have to end with it."""
    assert trainer(process)
    assert engine(process)
    return [process]


def trainer(process: psutil.Process) -> list[psutil.Process]:
    """The training child, by its command line."""
    return [child for child in process.children() if "train.step" in child.cmdline()]


def engine(process: psutil.Process) -> list[psutil.Process]:
    """vLLM's engine and the Ray actor around it, which name themselves so."""
    names = ("VLLM::", "ray::_EngineActor")
    return [child for child in process.children(recursive=True) if "".join(child.cmdline()).startswith(names)]


def test_killed_command_given_again(tmp_path: Path) -> None:
    """One run, killed three times. A lost engine is started again within the command; a lost trainer or driver ends
    it, and the same command goes on; the last time it ends as it should."""
    run = tmp_path / "run"
    sets = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-P", "-m", "dream.cli", "train", "--rounds", "1", "--out", str(run), *sets]
    assert given(command, run, tmp_path / "first.log", [(dreamed, engine), (training(run), trainer)]) == 1
    assert given(command, run, tmp_path / "second.log", [(training(run), driver)]) == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    check(run)


def given(
    command: list[str],
    run: Path,
    path: Path,
    kills: list[tuple[Callable[[Path], bool], Callable[[psutil.Process], list[psutil.Process]]]],
) -> int:
    """The exit code of the command, some of whose processes are killed when something has begun; none outlives it."""
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        started: list[psutil.Process] = []
        for begun, whom in kills:
            wait_until(lambda begun=begun: begun(run) or process.poll() is not None)
            assert process.poll() is None, path.read_text()
            started += psutil.Process(process.pid).children(recursive=True)
            targets = whom(psutil.Process(process.pid))
            assert targets, path.read_text()
            for target in targets:
                os.kill(target.pid, signal.SIGKILL)
        code = process.wait(DEADLINE_S)
    _, left = psutil.wait_procs(started, timeout=180)  # Ray's agents look for their node once a minute
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    return code


def wait_until(true: Callable[[], bool]) -> None:
    """Looks a hundred times a second."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def check(run: Path) -> None:
    """One round of two whole pairs, one decision, and a policy that follows from it."""
    assert [path.parent.name for path in run.glob("round_*/gate.json")] == ["round_01"]
    folder = run / "round_01"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    sides = {(row["pair_id"], row["side"]) for row in rows}
    assert len(sides) == len(rows) == 4
    assert len({pair_id for pair_id, _ in sides}) == 2
    ledger = json.loads((folder / "train" / "ledger.json").read_text())
    assert ledger["steps"] == ledger["planned_steps"] or ledger["ended_early"]
    assert not any(folder.glob(".train.*.tmp"))
    served = json.loads((folder / "served.json").read_text())
    assert served["largest_change"] > 20 * served["apart"]
    promoted = json.loads((folder / "gate.json").read_text())["decision"]["decision"] == "promote"
    policy = json.loads((run / "policy.json").read_text())
    assert (policy["round"], policy["as_of"]) == (int(promoted), 1)
