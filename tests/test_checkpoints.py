"""train/checkpoints.py: a policy's weights as they are served."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_torch import APOLLOAdamW
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from toy import build_toy, train_toy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dream.records import user
from train.checkpoints import Place, as_served, load_model, whole_weights, without_dropout
from train.data import Rehearsed
from train.drift import displacement_since_now
from train.scoring import reply_distributions


@given(value=st.floats(-4, 4, width=32).filter(lambda value: abs(value) > 1e-30))
def test_what_is_served_is_on_average_what_was_trained(value: float) -> None:
    """Each value goes to one of its two neighbours in bfloat16, and in the mean the distance is made up for."""
    trained = torch.full((20_000,), value)
    served = as_served("w", trained, torch.bfloat16).float()
    nearest = trained[:1].to(torch.bfloat16).float().item()
    spacing = abs(nearest) * 2.0**-7
    assert len(served.unique()) <= 2
    assert (served - trained).abs().max().item() <= spacing
    assert abs(served.double().mean().item() - trained[0].double().item()) <= 0.02 * spacing


@pytest.mark.parametrize(
    ("gpus", "several", "place", "devices"),
    [
        (0, False, Place.DEVICES, None),
        (1, False, Place.DEVICES, "cuda"),
        (2, False, Place.DEVICES, "auto"),
        (2, True, Place.DEVICES, "cuda"),
        (2, True, Place.MEMORY, None),
    ],
)
def test_where_a_model_is_put(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, several: bool, place: Place, devices: str | None
) -> None:
    """One of several workers sees all GPUs of its machine and takes its own; a worker alone spreads the model."""
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(source: str, device_map: str | None, **given: Any) -> Any:
        asked.append(device_map)
        return load(source, **given)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    load_model(str(toy_model), torch.float32, False, place)
    assert asked == [devices]


def test_dropout_of_a_function_is_off_too(toy_model: Path) -> None:
    """A Llama gives its attention a number, which no `Dropout` module holds."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(toy_model), attention_dropout=0.5))
    model = without_dropout(model).train()
    ids = torch.tensor([[2, 5, 6, 1, 3, 7, 8]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_weights_that_did_not_move_are_served_as_they_were() -> None:
    """What bfloat16 can hold stays, and so does what is served in float32; the same weights are always served alike."""
    held = torch.linspace(-3, 3, 1000).to(torch.bfloat16)
    assert torch.equal(as_served("w", held.float(), torch.bfloat16), held)
    trained = torch.linspace(-3, 3, 1000)
    assert torch.equal(as_served("w", trained, torch.float32), trained)
    assert torch.equal(as_served("w", trained, torch.bfloat16), as_served("w", trained, torch.bfloat16))
    assert not torch.equal(as_served("w", trained, torch.bfloat16), as_served("v", trained, torch.bfloat16))


def test_small_steps_reach_the_engine(toy_model: Path, tmp_path: Path) -> None:
    """A step that moves no weight by half of bfloat16's spacing still changes what is served."""
    train_toy(toy_model, tmp_path / "out", method="full", learning_rate=2e-6, served_dtype="bfloat16")
    initial, trained, served = (
        dict(load_model(str(folder), torch.float32, trust_remote_code=False).named_parameters())
        for folder in (toy_model, tmp_path / "out" / "masters", tmp_path / "out" / "weights")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    rounded = initial[name].to(torch.bfloat16).float()
    moved = trained[name] - initial[name]
    assert 0 < moved.abs().max() < rounded.abs().median() * 2.0**-9
    assert not torch.equal(served[name], rounded)
    assert torch.equal(served[name], as_served(name, trained[name].detach(), torch.bfloat16).float())


@pytest.fixture
def one_worker() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_worker")
def test_model_in_parts_is_the_same_model(tmp_path: Path) -> None:
    """Between calls every parameter is in parts, tied ones once; calls and gathered weights are those of the whole."""
    build_toy(tmp_path, tied=True)
    plain, parts = (load_model(str(tmp_path), torch.float32, False, place) for place in (Place.DEVICES, Place.PARTS))
    texts = [([2, 5, 6, 1, 3], [7, 8, 9])]
    assert torch.equal(reply_distributions(parts, texts)[0], reply_distributions(plain, texts)[0])
    assert all(isinstance(value, DTensor) for value in parts.parameters())
    assert parts.get_output_embeddings().weight is parts.get_input_embeddings().weight
    gathered = whole_weights(parts)
    for name, value in whole_weights(plain).items():
        assert torch.equal(gathered[name], value)


@pytest.mark.usefixtures("one_worker")
def test_displacement_of_a_model_in_parts(tmp_path: Path) -> None:
    """It is that of the same change of the whole model."""
    build_toy(tmp_path)
    moved = []
    for place in (Place.DEVICES, Place.PARTS):
        model = load_model(str(tmp_path), torch.float32, False, place)
        displaced = displacement_since_now(model)
        with torch.no_grad():
            for value in model.parameters():
                value *= 1.5
        moved.append(displaced())
    assert moved == pytest.approx([0.5, 0.5])


def test_adapters_base_is_gone_before_the_merged_model_is_made(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two are as large, and a GPU that holds the policy need not hold both."""
    bases, alive = [], []

    def loaded(*arguments: Any) -> Any:
        model = load_model(*arguments)
        alive.append([base() is not None for base in bases])
        bases.append(weakref.ref(model.get_input_embeddings().weight))
        return model

    monkeypatch.setattr("train.step.load_model", loaded)
    train_toy(toy_model, tmp_path / "out", method="lora")
    assert alive == [[], [False], [False, False]]  # what is served before, the policy, and what is served after


def test_apollo_repairs_with_the_large_epsilon(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its two groups, matrices and the rest, transformers tells it to one."""
    seen = []
    stepped = APOLLOAdamW.step

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append({group["eps"] for group in self.param_groups})
        return stepped(self, *arguments, **named)

    monkeypatch.setattr(APOLLOAdamW, "step", step)
    text = Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)
    apollo = {"method": "full", "optim": "apollo_adamw", "apollo_rank": 4}
    train_toy(toy_model, tmp_path / "out", repaired=[text] * 4, repair_steps=1, repair_epsilon=3e-5, **apollo)
    assert seen == [{1e-8}] * 4 + [{3e-5}]
