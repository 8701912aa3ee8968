"""Tasks of the `lm-eval` package (https://github.com/EleutherAI/lm-evaluation-harness), where it is installed."""

import asyncio
import importlib.util
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dream.errors import ConfigError, TrainingError, last_line
from dream.records import Record

METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "f1,none")
"""The first of these that a task reports is its score."""


class TaskScore(Record):
    """A task's score and its standard error."""

    value: float
    stderr: float


def check_installed(tasks: Sequence[str]) -> None:
    """Refuses tasks before any work when the package is not there.

    Raises:
        ConfigError: it is not installed.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.lm_eval_tasks: the package lm-eval is not installed; pip install lm-eval, or leave the list empty"
        )


async def lm_scores(tasks: Sequence[str], weights: str, *, trust_remote_code: bool = False) -> dict[str, TaskScore]:
    """Scores of a model folder on the named tasks, in a process of its own, which ends with this one and when the call
    is cancelled; nothing for no tasks.

    Raises:
        ConfigError: the package is not installed.
        TrainingError: a task failed, its data are not present, or it reports no known score with a standard error.
    """
    check_installed(tasks)
    if not tasks:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        model = f"pretrained={weights},trust_remote_code={trust_remote_code}"
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "train.child", str(os.getpid()), "train.lm_tasks", "--model", "hf",
            "--model_args", model, "--tasks", ",".join(tasks), "--output_path", folder,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        results = sorted(Path(folder).rglob("results*.json"))
        if child.returncode or not results:
            why = last_line((err or out).decode(errors="replace"))
            raise TrainingError(f"eval.lm_eval_tasks: lm-eval failed: {why}")
        found = json.loads(results[-1].read_text(encoding="utf-8"))["results"]
    return {task: _score(task, found.get(task, {})) for task in tasks}


def _score(task: str, figures: dict[str, Any]) -> TaskScore:
    for metric in METRICS:
        if metric in figures:
            name, kind = metric.split(",")
            stderr = figures.get(f"{name}_stderr,{kind}")
            if not isinstance(stderr, (int, float)):  # lm-eval writes "N/A"; 0.0 in its place would be certainty
                raise TrainingError(
                    f"eval.lm_eval_tasks: {task} reports no standard error of {name}, without which a fall cannot be "
                    "told from chance; name other tasks, or those that a group is made of"
                )
            return TaskScore(value=figures[metric], stderr=stderr)
    raise TrainingError(
        f"eval.lm_eval_tasks: {task} reports none of {', '.join(METRICS)}; it has {', '.join(figures) or 'nothing'}"
    )


def main(argv: Sequence[str]) -> int:
    """`python -m lm_eval` with these arguments, for `train.child`."""
    sys.argv = ["lm_eval", *argv]
    runpy.run_module("lm_eval", run_name="__main__")
    return 0
