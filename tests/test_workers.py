"""Training on two workers gives what one gives. Ray and two processes with torch: most of a minute a test."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import build_toy, train_toy

from dream.errors import TrainingError
from dream.records import user
from train.data import Rehearsed
from train.workers import cause_of


@pytest.mark.kill
@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 1e-2)])
def test_two_workers_train_as_one_does(tmp_path: Path, method: str, rate: float) -> None:
    """Same losses step by step, also in a last step that is short, and the same policy."""
    build_toy(tmp_path / "model")
    settings = {"method": method, "learning_rate": rate, "batch_size": 12, "crossed_weight": 1.0}
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


@pytest.mark.kill
def test_two_workers_with_a_part_of_the_weights_each_train_as_one_does(tmp_path: Path) -> None:
    """With `fsdp` too: the same losses, gradients' norms, ledger and weights, of a model whose embeddings are tied,
    through a warm-up, with what is rehearsed and repaired, gradients that are clipped, and drift at each step."""
    build_toy(tmp_path / "model", tied=True)
    settings = {"method": "full", "learning_rate": 1e-3, "batch_size": 8, "sft": True, "sft_learning_rate": 1e-4,
                "rehearsed": [Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)], "rehearsal": 4,
                "repaired": [Rehearsed(messages=[user("s r q")], reply="a b", finished=True)] * 8, "repair_steps": 1,
                "max_grad_norm": 0.1, "budget_steps": 1}  # fmt: skip
    alone = train_toy(tmp_path / "model", tmp_path / "alone", **settings)
    parts = train_toy(tmp_path / "model", tmp_path / "parts", workers=2, fsdp=True, **settings)
    assert len(alone) == len(parts) == 3  # two steps on pairs, one of repair
    for one, two in zip(alone[:2], parts[:2], strict=True):
        assert two == pytest.approx(one, abs=1e-3)
        assert one["grad_norm"] > 0.1
    assert parts[2] == pytest.approx(alone[2], rel=1e-2)
    first, second = (json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("alone", "parts"))
    assert second["weights"].keys() == first["weights"].keys()
    for name, figures in first["weights"].items():
        assert second["weights"][name] == pytest.approx(figures, rel=1e-2)
    for one, two in zip(first["drift"], second["drift"], strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-5)
    for reply in ("chosen", "rejected"):
        one, two = (made["preference"]["after"][reply] for made in (first, second))
        assert two == pytest.approx(one, abs=1e-3)
    saved, others = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("alone", "parts"))
    assert saved.keys() == others.keys()
    for name, value in saved.items():
        torch.testing.assert_close(others[name], value, atol=1e-4, rtol=0)


@pytest.mark.kill
def test_workers_without_room_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would look for room for ever; the message names what is wanted, what is free and what to change."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    build_toy(tmp_path / "model")
    many = 2 * (os.cpu_count() or 1)
    with pytest.raises(TrainingError, match=rf"{many} workers need a CPU each.*lower train.workers"):
        train_toy(tmp_path / "model", tmp_path / "out", workers=many, batch_size=many * 2, micro_batch_size=2)


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
