"""How far training has gone from where it began, measured while it runs: KL on held-out texts, and displacement."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dream.config import TrainConfig
from train.checkpoints import adapted_layers
from train.data import Drift
from train.scoring import Text, divergence, reply_distributions

STRIDE = 251
"""Of full weights every so manieth value is remembered; a prime, so that it falls on all columns."""


class DriftMeter:
    """Remembers a policy as it is now, and says how far it has gone since.

    Args:
        policy: the policy before training.
        texts: token ids of (prompt, reply) that it is not trained on.
        initial: `reply_distributions` of the initial model; None when the policy still is the initial model.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        texts: Sequence[Text],
        initial: Sequence[torch.Tensor] | None,
    ) -> None:
        self._policy, self._texts = policy, texts
        self._previous = reply_distributions(policy, texts)
        self._initial = self._previous if initial is None else initial
        self._displaced = displacement_since_now(policy)

    def measure(self, step: int) -> Drift:
        """The distances after this step."""
        training = self._policy.training
        now = reply_distributions(self._policy, self._texts)
        self._policy.train(training)
        return Drift(
            step=step,
            kl_previous=divergence(now, self._previous),
            kl_initial=divergence(now, self._initial),
            displacement=self._displaced(),
        )


def displacement_since_now(policy: torch.nn.Module) -> Callable[[], float]:
    """A function that gives the norm of the change of the weights from now on, over their norm now.

    Adapters: exact over the adapted layers and all weights, from the factors alone. Full weights: estimated on every
    251st value, as a second copy would not fit.
    """
    layers = adapted_layers(policy)
    if layers:
        start = {name: _factors(layer) for name, layer in layers.items()}
        squares = sum(_squares(value) for name, value in policy.named_parameters() if "lora_" not in name)
        return lambda: (_moved(layers, start) / squares) ** 0.5
    before = {name: _sample(value).clone() for name, value in policy.named_parameters()}
    norm = sum(_squares(value) for value in before.values())

    def displaced() -> float:
        now = ((name, _sample(value)) for name, value in policy.named_parameters())
        return math.sqrt(sum(_squares(value - before[name]) for name, value in now) / norm)

    return displaced


def _sample(value: torch.Tensor) -> torch.Tensor:
    """Every 251st value; where each worker holds a part (`train.fsdp`), all workers get those of the whole."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().reshape(-1)[::STRIDE]


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(B, A, scale) of an adapter: its change of the weight is scale * B A. Float64, as the norms are differences."""
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return b.detach().double().clone(), a.detach().double().clone(), float(layer.scaling["default"])


def _moved(layers: Mapping[str, Any], start: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]) -> float:
    """Sum of squares of (scale B A - scale B0 A0) over the layers, out of products of size rank by rank."""
    total = 0.0
    for name, layer in layers.items():
        b0, a0, scale = start[name]
        b1, a1, _ = _factors(layer)
        b, a = torch.cat([b1, -b0], dim=1), torch.cat([a1, a0], dim=0)
        total += scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return max(0.0, total)


def _squares(value: torch.Tensor) -> float:
    return float(value.detach().double().square().sum())


class Budget(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Measures the drift every `train.budget_steps` steps and at the end, and ends training when a budget is spent."""

    def __init__(self, meter: DriftMeter, train: TrainConfig) -> None:
        self._meter, self._train = meter, train
        self.path: list[Drift] = []
        self.spent = ""
        """Which budget ended training, in words; empty when none did."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Called by the trainer after every optimiser step."""
        if state.global_step % self._train.budget_steps and state.global_step < state.max_steps:
            return control
        drift = self._meter.measure(state.global_step)
        self.path.append(drift)
        if state.global_step < state.max_steps:
            self.spent = spent(drift, self._train)
            if self.spent:
                control.should_training_stop = True
        return control


def spent(drift: Drift, train: TrainConfig) -> str:
    """The budget that this drift has used up, in words; empty when there is some left."""
    if train.max_kl is not None and drift.kl_previous > train.max_kl:
        return f"KL {drift.kl_previous:.3f} over train.max_kl {train.max_kl:g} at step {drift.step}"
    if train.max_displacement is not None and drift.displacement > train.max_displacement:
        return (
            f"displacement {drift.displacement:.2e} over train.max_displacement {train.max_displacement:g} "
            f"at step {drift.step}"
        )
    return ""
