"""train/lm_tasks.py: the `lm-eval` package, played by a module that writes results as it does."""

import asyncio
import textwrap
from pathlib import Path

import psutil
import pytest

from dream.errors import ConfigError, TrainingError
from train.lm_tasks import TaskScore, check_installed, lm_scores

FAKE = """
    import json, os, pathlib, sys, time
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if "missing" in options["--tasks"]:
        sys.exit("Tasks were not found: missing")
    if "endless" in options["--tasks"]:
        pathlib.Path(os.environ["PYTHONPATH"], "pid").write_text(f"{os.getpid()}\\n")
        time.sleep(600)
    assert options["--model_args"] == "pretrained=weights,trust_remote_code=False"
    tasks = options["--tasks"].split(",")
    results = {task: {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": task} for task in tasks}
    results["odd"] = {"bleu,none": 3.0}
    results["unsure"] = {"acc,none": 0.5, "acc_stderr,none": "N/A"}
    out = pathlib.Path(options["--output_path"]) / "weights"
    out.mkdir(parents=True)
    (out / "results_2026-01-01T00-00-00.json").write_text(json.dumps({"results": results}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a package `lm_eval` importable, here and in child processes."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("")
    (tmp_path / "lm_eval" / "__main__.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("fake")
def test_scores_are_read_from_the_results(tmp_path: Path) -> None:
    """Accuracy with its standard error, a task each."""
    assert asyncio.run(lm_scores(["arc_easy", "piqa"], "weights")) == {
        task: TaskScore(value=0.5, stderr=0.01) for task in ("arc_easy", "piqa")
    }


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("missing", "Tasks were not found: missing"),
        ("odd", "odd reports none of .*bleu,none"),
        ("unsure", "unsure reports no standard error of acc"),
    ],
)
def test_task_that_fails_is_an_error(task: str, words: str) -> None:
    """A task that is not there, or whose score or its error is not known, never counts as measured."""
    with pytest.raises(TrainingError, match=words):
        asyncio.run(lm_scores([task], "weights"))


@pytest.mark.usefixtures("fake")
def test_cancelled_tasks_leave_no_process(tmp_path: Path) -> None:
    """A signal that ends the command ends lm-eval as well, which holds the model's memory."""

    async def go() -> int:
        asked = asyncio.ensure_future(lm_scores(["endless"], "weights"))
        while not ((pid := tmp_path / "pid").exists() and pid.read_text().endswith("\n")):
            await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return int(pid.read_text())

    assert not psutil.pid_exists(asyncio.run(asyncio.wait_for(go(), 60)))


def test_package_that_is_missing_is_named() -> None:
    """Asked for without the package: an error with the way out; nothing asked for: nothing needed."""
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        check_installed(["arc_easy"])
    assert asyncio.run(lm_scores([], "weights")) == {}
