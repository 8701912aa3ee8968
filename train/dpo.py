"""Conservative DPO: the loss, and TRL's trainer without work that changes nothing."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from dream.config import TrainConfig
from dream.errors import TrainingError
from dream.records import PreferencePair
from train.data import Encoded
from train.optim import arguments, scheduler
from train.scoring import Scores, autocast, pair_sequences, reply_logps, tensors

Report = Callable[[dict[str, Any]], None]


def conservative_loss(delta: torch.Tensor, beta: float, flip: torch.Tensor) -> torch.Tensor:
    """Conservative DPO's loss per row (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), shape of `delta`.

    `delta` is the difference of the log-ratios, log p/p_ref of chosen minus rejected, in nats; `flip` the probability
    that the label is wrong. Its gradient is -beta ((1 - e) sigmoid(-beta delta) - e sigmoid(beta delta)), zero where
    the policy is as sure as the labels are. (TRL's `label_smoothing` does nothing with its sigmoid loss.)
    """
    return -(1 - flip) * F.logsigmoid(beta * delta) - flip * F.logsigmoid(-beta * delta)


def preference(logps: torch.Tensor, inputs: dict[str, torch.Tensor], train: TrainConfig) -> torch.Tensor:
    """What the loss compares, shape (rows,), in nats: how much more the policy prefers chosen to rejected than the
    reference does.

    `logps` are summed log-probabilities, chosen and rejected in turn. `train.length_normalized` takes means over tokens
    (Tulu 3, arXiv 2411.15124, section 5); `train.reference_weight` weighs the reference's part, down to none (SimPO,
    arXiv 2405.14734, without its target margin); `train.clip_reference` takes a reference that prefers the rejected
    reply as undecided (HyPO, arXiv 2602.11902).
    """
    reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1).flatten()
    if train.length_normalized:
        lengths = inputs["lengths"].clamp(min=1)
        logps, reference = logps / lengths, reference / lengths
    prior = train.reference_weight * (reference[::2] - reference[1::2])
    if train.clip_reference:
        prior = prior.clamp(min=0)
    return logps[::2] - logps[1::2] - prior


class ConservativeDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's DPO trainer with conservative labels, weights per row, an RPO term, and no work on prompt positions.

    Its data set holds `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`, `ref_rejected_logps`,
    `flip_probability` and `weight`, in training order.
    """

    loss_is_scaled_for_ga = True  # rows are divided by the rows of a step, also in a short last one

    def __init__(
        self, *args: Any, train: TrainConfig, rows_per_step: int, shared: bool, report: Report, **kwargs: Any
    ) -> None:
        self._train, self._rows_per_step, self._report = train, rows_per_step, report
        super().__init__(*args, data_collator=PairCollator(shared), **kwargs)
        self.remove_callback(PrinterCallback)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")  # TRL's copy; the reference is scored before training

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The schedule of `train.optim`."""
        self.lr_scheduler = scheduler(optimizer or self.optimizer, num_training_steps, self._train)
        return self.lr_scheduler

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False
    ) -> torch.Tensor:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with autocast(model, self._train.mixed_precision):
            logps = reply_logps(model, head, inputs)
        nll = -logps[::2] / inputs["lengths"][::2].clamp(min=1)
        delta = preference(logps, inputs, self._train)
        losses = conservative_loss(delta, self.beta, inputs["flip_probability"]) + self._train.nll_weight * nll
        # Gradients are averaged over the workers, of which each has its part of the step's rows.
        loss: torch.Tensor = (inputs["weight"] * losses).sum() / self._rows_per_step * self.accelerator.num_processes
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}; lower train.learning_rate"
            )
        delta = self.accelerator.gather(delta.detach())
        self._metrics["train"]["margin"] += (self.beta * delta).tolist()
        self._metrics["train"]["accuracy"] += (delta > 0).float().tolist()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports an optimiser step."""
        super().log(logs, start_time)
        if "grad_norm" not in logs:
            return
        if not isfinite(logs["grad_norm"]):
            raise TrainingError(
                f"the gradient became infinite in step {self.state.global_step}; lower train.learning_rate"
            )
        kept = {name: logs[name] for name in ("loss", "margin", "accuracy", "grad_norm")}
        self._report(
            {"step": self.state.global_step, "steps": self.state.max_steps, **kept, "lr": logs["learning_rate"]}
        )


class PairCollator:
    """Rows of the trainer's data set to one batch of tensors."""

    def __init__(self, shared: bool) -> None:
        self._shared = shared

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [Encoded(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
        floats = ("ref_chosen_logps", "ref_rejected_logps", "flip_probability", "weight")
        return tensors(pair_sequences(encoded, self._shared)) | {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in floats
        }


def row_weights(rows: Sequence[PreferencePair], encoded: Sequence[Encoded], max_length: int) -> list[float]:
    """The judge's confidence in each row over the round's mean; 0 for a pair with a row longer than `max_length`.

    Raises:
        TrainingError: no row is short enough.
    """
    long = {
        row.pair_id
        for row, ids in zip(rows, encoded, strict=True)
        if len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) > max_length
    }
    weights = [0.0 if row.pair_id in long else float(row.meta.get("judge_confidence", 1.0)) for row in rows]
    kept = [weight for weight in weights if weight]
    if not kept:
        raise TrainingError(f"no row fits into train.max_length ({max_length} tokens); raise it")
    return [weight * len(kept) / sum(kept) for weight in weights]


def training_order(encoded: Sequence[Encoded], batch_size: int) -> list[int]:
    """Indices of the rows, step by step as given, by length within a step so that micro batches hold little padding."""
    order: list[int] = []
    for start in range(0, len(encoded), batch_size):
        step = range(start, min(start + batch_size, len(encoded)))
        order += sorted(step, key=lambda i: sum(map(len, encoded[i])))
    return order


def data_set(
    encoded: Sequence[Encoded], reference: Scores, weights: Sequence[float], flip: float, train: TrainConfig
) -> Dataset:
    """The rows as the trainer takes them, in training order; `reference` are scores and `flip` is e of the loss.

    With several workers rows without weight fill up the last micro batches, so that all workers get as many.
    """
    rows: list[dict[str, Any]] = [
        {
            "prompt_ids": encoded[i].prompt,
            "chosen_ids": encoded[i].chosen,
            "rejected_ids": encoded[i].rejected,
            "ref_chosen_logps": reference[i][0],
            "ref_rejected_logps": reference[i][1],
            "flip_probability": flip,
            "weight": weights[i],
        }
        for i in training_order(encoded, train.batch_size)
    ]
    if train.workers > 1:
        short = {name: rows[-1][name][:1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        nothing = {**rows[-1], **short, "weight": 0.0}
        rows += [nothing] * (-len(rows) % (train.micro_batch_size * train.workers))
    return Dataset.from_list(rows)


def dpo_arguments(train: TrainConfig, folder: str, seed: int) -> DPOConfig:
    """What TRL and transformers are told."""
    return DPOConfig(
        beta=train.beta,
        disable_dropout=False,  # done before the adapter is added, so that train.lora.dropout stays
        precompute_ref_log_probs=True,
        **arguments(train, folder, seed, train.learning_rate),
    )
