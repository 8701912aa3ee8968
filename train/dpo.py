"""Conservative DPO: the loss, and TRL's trainer without work that changes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, cycle
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from dream.config import TrainConfig
from dream.errors import TrainingError
from dream.records import PreferencePair
from train.child import Report
from train.data import Encoded
from train.optim import OwnSchedule, arguments
from train.scoring import Remembered, Scores, autocast, forgotten, pair_sequences, reply_logps, tensors, tokens


def conservative_loss(delta: torch.Tensor, beta: float, flip: torch.Tensor) -> torch.Tensor:
    """Conservative DPO's loss per row (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), shape of `delta`.

    `delta` is the difference of the log-ratios, log p/p_ref of chosen minus rejected, in nats; `flip` the probability
    that the label is wrong. Its gradient is -beta ((1 - e) sigmoid(-beta delta) - e sigmoid(beta delta)), zero where
    the policy is as sure as the labels are. (TRL's `label_smoothing` does nothing with its sigmoid loss.)
    """
    return -(1 - flip) * F.logsigmoid(beta * delta) - flip * F.logsigmoid(-beta * delta)


def preferred(logps: torch.Tensor, lengths: torch.Tensor, train: TrainConfig) -> torch.Tensor:
    """How much likelier each chosen reply is than its rejected one, in nats, shape (rows,).

    `logps` are summed log-probabilities, chosen and rejected in turn, `lengths` their tokens. `train.length_normalized`
    takes means over tokens (Tulu 3, arXiv 2411.15124, section 5).
    """
    if train.length_normalized:
        logps = logps / lengths.clamp(min=1)
    return logps[::2] - logps[1::2]


def preference(ours: torch.Tensor, reference: torch.Tensor, train: TrainConfig) -> torch.Tensor:
    """What the loss compares, in nats, the shape of both: by how much the policy's preference exceeds the reference's.

    `train.reference_weight` weighs the reference's part, down to none (SimPO, arXiv 2405.14734, without its target
    margin); `train.clip_reference` takes a reference that prefers the wrong as undecided (HyPO, arXiv 2602.11902).
    """
    prior = train.reference_weight * reference
    return ours - (prior.clamp(min=0) if train.clip_reference else prior)


def compared(
    scores: Scores, rows: Sequence[Encoded], others: Sequence[int], train: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What scored rows prefer, in nats, float64 of shape (rows,) each: chosen to rejected under the row's own prompt
    (`preferred`), and how much of that is lost under the prompt of its other side (`data.other_sides`).

    The second is what `train.crossed_weight` trains: two replies under two prompts, so that all that a policy thinks
    of the replies whatever the prompt cancels. It is 0 for rows without another side.
    """
    lengths = torch.tensor([[len(row.chosen), len(row.rejected)] for row in rows]).flatten()
    under = [scores[i][:2] if i == j else scores[j][2:] for i, j in enumerate(others)]
    own, lost = (
        preferred(torch.tensor(logps, dtype=torch.float64).flatten(), lengths, train)
        for logps in ([score[:2] for score in scores], under)
    )
    return own, own - lost


class ConservativeDPOTrainer(OwnSchedule, DPOTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's DPO trainer with conservative labels, weights per row, an RPO term, and no work on prompt positions.

    Its data set is that of `data_set`. The loss of a row is that of its own comparison, plus the RPO term. Where a row
    is also compared with its other side (`compared`), its own comparison counts `train.row_weight` times and that one
    `train.crossed_weight` times. `rehearsed` are texts that the policy is to think of as is remembered.
    """

    loss_is_scaled_for_ga = True  # rows are divided by the rows of a step, also in a short last one

    def __init__(
        self,
        *args: Any,
        train: TrainConfig,
        rows_per_step: int,
        shared: bool,
        report: Report,
        rehearsed: Sequence[Remembered] = (),
        **kwargs: Any,
    ) -> None:
        self._train, self._rows_per_step, self._report = train, rows_per_step, report
        with _without_fingerprint():
            super().__init__(*args, data_collator=PairCollator(shared), **kwargs)
        self._rehearsed = self._rehearsal(rehearsed) if rehearsed else None
        self.remove_callback(PrinterCallback)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")  # TRL's copy; the reference is scored before training

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False
    ) -> torch.Tensor:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with autocast(model, self._train.mixed_precision):
            logps = reply_logps(model, head, inputs)
        train, lengths, flip = self._train, inputs["lengths"], inputs["flip_probability"]
        chosen = inputs["own"][::2]
        nll = -logps[chosen] / lengths[chosen].clamp(min=1)
        own, lost = (preferred(logps[which], lengths[which], train) for which in (inputs["own"], inputs["under_other"]))
        delta = preference(own, inputs["reference"], train)
        alone = inputs["own"][::2] == inputs["under_other"][::2]
        weight = torch.where(alone, 1.0, train.row_weight)
        losses = weight * conservative_loss(delta, self.beta, flip) + train.nll_weight * nll
        if train.crossed_weight:
            apart = preference(own - lost, inputs["crossed_reference"], train)
            losses = losses + train.crossed_weight * conservative_loss(apart, self.beta, flip)
            delta = torch.where(alone, delta, apart)  # what the step's line is to show
        loss: torch.Tensor = (inputs["weight"] * losses).sum() / self._rows_per_step
        if self._rehearsed is not None:
            loss = loss + train.rehearsal_weight * self._rehearsal_loss(model, head, next(self._rehearsed))
        # Gradients are averaged over the workers, of which each has its part of the step's rows.
        loss = loss * self.accelerator.num_processes
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}; lower train.learning_rate"
            )
        delta = self.accelerator.gather(delta.detach())
        self._metrics["train"]["margin"] += (self.beta * delta).tolist()
        self._metrics["train"]["accuracy"] += (delta > 0).float().tolist()
        return loss

    def _rehearsal(self, texts: Sequence[Remembered]) -> Iterator[Sequence[Remembered]]:
        """What each micro batch of this worker rehearses, without end; the workers share the texts as they do rows."""
        each = self._train.rehearsal // self._micro_batches
        batches = [texts[start : start + each] for start in range(0, len(texts), each)]
        workers = self.accelerator.num_processes
        return cycle(batches[self.accelerator.process_index :: workers] or batches)

    @property
    def _micro_batches(self) -> int:
        """Of a step, over all workers."""
        return self._train.batch_size // self._train.micro_batch_size

    def _rehearsal_loss(
        self, model: torch.nn.Module, head: torch.nn.Module, texts: Sequence[Remembered]
    ) -> torch.Tensor:
        """A micro batch's part of what a step's rehearsed texts say was forgotten."""
        with autocast(model, self._train.mixed_precision):
            return forgotten(model, head, texts) / self._micro_batches

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


@contextmanager
def _without_fingerprint() -> Iterator[None]:
    """TRL hashes all weights, under which it would keep the reference's scores; it is given those, and cannot hash what
    is in parts on several workers."""
    hash_module, dpo_trainer.hash_module = dpo_trainer.hash_module, lambda model: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = hash_module


class PairCollator:
    """Rows of the trainer's data set to one batch of tensors.

    `own` are the indices of each row's chosen and rejected reply among all replies of the batch, shape (2 * rows,), and
    `under_other` those of the same replies under the prompt of the row's other side, or `own` where it has none.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [Encoded(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], row["others"]) for row in rows]
        starts = list(accumulate((len(one.replies) for one in encoded[:-1]), initial=0))
        place = {row["number"]: i for i, row in enumerate(rows)}
        there = [
            start if row["number"] == row["other"] else starts[place[row["other"]]] + 2
            for row, start in zip(rows, starts, strict=True)
        ]
        floats = ("reference", "crossed_reference", "flip_probability", "weight")
        return (
            tensors(pair_sequences(encoded, self._shared))
            | {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in floats}
            | {
                name: torch.tensor([(i, i + 1) for i in first]).flatten()
                for name, first in (("own", starts), ("under_other", there))
            }
        )


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


def training_order(encoded: Sequence[Encoded], others: Sequence[int], batch_size: int) -> list[int]:
    """Indices of the rows, step by step as given, by length within a step so that micro batches hold little padding.

    The two sides of a scenario (`data.other_sides`) stay neighbours, ahead of a step's rows without another side, so
    that a micro batch, which is even, holds both.
    """
    order: list[int] = []
    for start in range(0, len(encoded), batch_size):
        step = range(start, min(start + batch_size, len(encoded)))
        units = sorted({tuple(sorted({i, others[i]})) for i in step})
        order += chain(*sorted(units, key=lambda unit: (-len(unit), sum(tokens(encoded[i]) for i in unit))))
    return order


def data_set(
    encoded: Sequence[Encoded],
    others: Sequence[int],
    reference: Scores,
    weights: Sequence[float],
    flip: float,
    train: TrainConfig,
) -> Dataset:
    """The rows as the trainer takes them, in training order.

    `others` are `data.other_sides`, or every row's own index where sides are not compared; `reference` are scores and
    `flip` is e of the loss. With several workers rows without weight fill up the last micro batches, so that all
    workers get as many.
    """
    own, crossed = (values.tolist() for values in compared(reference, encoded, others, train))
    rows: list[dict[str, Any]] = [
        {
            "number": i,
            "other": others[i],
            "prompt_ids": encoded[i].prompt,
            "chosen_ids": encoded[i].chosen,
            "rejected_ids": encoded[i].rejected,
            "others": list(encoded[i].others),
            "reference": own[i],
            "crossed_reference": crossed[i],
            "flip_probability": flip,
            "weight": weights[i],
        }
        for i in training_order(encoded, others, train.batch_size)
    ]
    if train.workers > 1:
        short = {name: rows[-1][name][:1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        nothing = {**rows[-1], **short, "others": [], "number": -1, "other": -1, "weight": 0.0}
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
