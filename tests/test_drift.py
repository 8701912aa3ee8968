"""train/drift.py and the budgets of a training step: KL, displacement, and the end that comes early."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import train_toy

from dream.config import LoraConfig, TrainConfig
from train.checkpoints import adapted_layers, load_model, new_adapter
from train.data import Drift
from train.drift import DriftMeter, displacement_since_now, spent
from train.scoring import divergence, reply_distributions

TEXTS = [([2, 5, 6, 1, 3], [7, 8, 9]), ([2, 10, 1, 3], [11, 12])]


@pytest.fixture
def model(toy_model: Path) -> Any:
    """The toy in float32."""
    return load_model(str(toy_model), torch.float32, trust_remote_code=False)


def test_divergence_is_that_of_torch(model: Any) -> None:
    """KL(now || before) a token, the same as torch's own on all tokens together; 0 against itself."""
    before = reply_distributions(model, TEXTS)
    assert [part.shape for part in before] == [(3, 31), (2, 31)]
    with torch.no_grad():
        model.lm_head.weight += 0.3 * torch.randn_like(model.lm_head.weight)
    now = reply_distributions(model, TEXTS)
    wanted = torch.nn.functional.kl_div(torch.cat(before), torch.cat(now), reduction="batchmean", log_target=True)
    assert divergence(now, before) == pytest.approx(float(wanted), rel=1e-5)
    assert divergence(now, before) > 0.01
    assert divergence(before, before) == 0


def test_displacement_of_an_adapter_is_that_of_the_merged_weights(model: Any) -> None:
    """Out of the factors alone: the Frobenius norm of the change of all weights over that of the weights."""
    policy = new_adapter(model, LoraConfig(rank=4, alpha=8))
    layers = adapted_layers(policy)
    torch.manual_seed(1)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    before = {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}
    norm = sum(float(v.square().sum()) for name, v in policy.named_parameters() if "lora_" not in name) ** 0.5
    displaced = displacement_since_now(policy)
    assert displaced() == pytest.approx(0, abs=1e-6)
    for layer in layers.values():
        layer.lora_A["default"].weight.data += 0.1
        layer.lora_B["default"].weight.data *= 1.5
    moved = sum(
        float((layer.get_delta_weight("default") - before[name]).detach().square().sum())
        for name, layer in layers.items()
    )
    assert displaced() == pytest.approx(moved**0.5 / norm, rel=1e-4)


def test_displacement_of_full_weights_is_estimated(model: Any) -> None:
    """A change of one part in a hundred everywhere is seen on the remembered values alone."""
    displaced = displacement_since_now(model)
    for value in model.parameters():
        value.data *= 1.01
    assert displaced() == pytest.approx(0.01, rel=1e-3)


def test_meter_tells_the_last_policy_from_the_initial_model(model: Any) -> None:
    """The two distances differ when the policy had moved before."""
    initial = reply_distributions(model, TEXTS)
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    meter = DriftMeter(model, TEXTS, initial)
    drift = meter.measure(step=3)
    assert drift.step == 3
    assert drift.kl_previous == 0 < drift.kl_initial


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"max_kl": 0.5, "max_displacement": 0.02}, ""),
        ({"max_kl": 0.1}, "train.max_kl 0.1 at step 7"),
        ({"max_displacement": 0.001}, "train.max_displacement 0.001 at step 7"),
    ],
)
def test_budget_that_is_spent_is_named(settings: dict[str, float], words: str) -> None:
    """None unless a configured bound is passed."""
    said = spent(Drift(step=7, kl_previous=0.2, kl_initial=9.0, displacement=0.01), TrainConfig(**settings))
    assert words in said
    assert bool(said) == bool(words)


def test_spent_budget_ends_training_early(toy_model: Path, tmp_path: Path) -> None:
    """The step stops at the next look, saves what it has, and says so in the ledger and its line."""
    reports = train_toy(toy_model, tmp_path / "out", max_kl=1e-9, budget_steps=2)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert len(reports) == ledger["steps"] == 2 < ledger["planned_steps"] == 4
    assert "train.max_kl" in ledger["ended_early"]
    assert (ledger["rows"], ledger["left_out"]) == (8, 0)  # of 16, those of two steps
    assert "ended after 2 of 4 steps" in ledger["summary"]
    assert (tmp_path / "out" / "weights" / "model.safetensors").exists()


def test_budget_that_lasts_changes_nothing(toy_model: Path, tmp_path: Path) -> None:
    """Measuring the drift leaves training as it is; the last drift is that of the end."""
    measured, unmeasured = (
        [line["loss"] for line in train_toy(toy_model, tmp_path / name, budget_steps=steps)]
        for name, steps in (("one", 1), ("two", 100))
    )
    assert measured == unmeasured
    ledger = json.loads((tmp_path / "one" / "ledger.json").read_text())
    assert [drift["step"] for drift in ledger["drift"]] == [1, 2, 3, 4]
    assert ledger["ended_early"] == ""
    assert ledger["drift"][-1]["displacement"] == pytest.approx(ledger["weights"]["all"]["relative_change"], rel=1e-3)


def test_budget_spent_by_the_last_step_ends_nothing_early(toy_model: Path, tmp_path: Path) -> None:
    """Training that went all the way did not end early, whatever its last step cost."""
    train_toy(toy_model, tmp_path / "out", max_kl=1e-9, budget_steps=100)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["steps"] == ledger["planned_steps"]
    assert ledger["drift"][-1]["kl_previous"] > 1e-9
    assert ledger["ended_early"] == ""
