"""Training on two workers gives what one gives. Ray and two processes with torch: most of a minute."""

import json
from pathlib import Path

import pytest
from toy import build_toy, train_toy

from dream.errors import TrainingError
from train.workers import cause_of


@pytest.mark.kill
def test_two_workers_train_as_one_does(tmp_path: Path) -> None:
    """Same losses step by step, also in a last step that is short, and the same policy."""
    build_toy(tmp_path / "model")
    settings = {"method": "full", "learning_rate": 1e-3, "batch_size": 12, "crossed_weight": 1.0}
    alone, together = (
        train_toy(tmp_path / "model", tmp_path / f"by_{workers}", workers=workers, **settings) for workers in (1, 2)
    )
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert two["margin"] == pytest.approx(one["margin"], abs=1e-3)
    first, second = (json.loads((tmp_path / f"by_{workers}" / "ledger.json").read_text()) for workers in (1, 2))
    for reply in ("chosen", "rejected"):
        one, two = (made["preference"]["after"][reply]["logp_token"] for made in (first, second))
        assert two == pytest.approx(one, abs=1e-3)


class Failed(Exception):
    """As Ray Train raises it: what each worker raised, by rank."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("2 workers failed")
        self.worker_failures = failures


def test_what_a_worker_raises_is_one_line() -> None:
    """An error of ours keeps its words, however deep Ray wraps it; any other says what Ray said."""
    ours = TrainingError("no row fits into train.max_length (64 tokens); raise it")
    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = ours
    assert cause_of(Failed({1: ValueError("later"), 0: wrapped})) is ours
    assert str(cause_of(Failed({0: ValueError("odd")}))) == "training on several workers failed: 2 workers failed"
