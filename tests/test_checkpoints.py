"""train/checkpoints.py: a policy's weights as they are served."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import train_toy

from train.checkpoints import as_served, load_model


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
