"""Rehearsal alone, after the pairs: what training on them cost is given back.

Training on pairs and rehearsing in the same steps pull at the same weights, and one pays for the other. One after the
other they hardly do: what is rehearsed lies far from the scenarios, so a few steps bring it back and leave the
condition as it was learned (measured in docs/LOG.md, "Repair").
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from dream.config import TrainConfig
from dream.errors import TrainingError
from train.child import Report
from train.optim import OwnSchedule, arguments
from train.scoring import Remembered, autocast, forgotten


class RepairTrainer(OwnSchedule, Trainer):  # type: ignore[misc]  # transformers is not typed
    """Transformers' trainer on what a policy has forgotten of remembered texts; its data set is their numbers."""

    loss_is_scaled_for_ga = False  # a mean over the texts of a micro batch, and these are equally large

    def __init__(
        self, *args: Any, train: TrainConfig, texts: Sequence[Remembered], report: Report, **kwargs: Any
    ) -> None:
        self._train, self._texts, self._report = train, texts, report
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
        """KL divergence from what is remembered, in nats a token (`scoring.forgotten`)."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with autocast(model, self._train.mixed_precision):
            return forgotten(model, head, [self._texts[i] for i in inputs["number"].tolist()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports an optimiser step."""
        super().log(logs, start_time)
        if "loss" in logs:
            self._report({"step": self.state.global_step, "steps": self.state.max_steps, "repair_kl": logs["loss"]})


def repair(
    policy: PreTrainedModel, texts: Sequence[Remembered], train: TrainConfig, folder: str, seed: int, report: Report
) -> list[float]:
    """Trains `policy` in place until it thinks of `texts` as is remembered; the KL divergence of each step's texts
    before the step, in nats a token.

    Raises:
        TrainingError: it left the finite numbers.
    """
    options = arguments(train, folder, seed, train.repair_learning_rate)
    del options["max_length"]  # TRL's
    trainer = RepairTrainer(
        model=policy,
        args=TrainingArguments(**options, adam_epsilon=train.repair_epsilon),
        train_dataset=Dataset.from_dict({"number": range(len(texts))}),
        train=train,
        texts=texts,
        report=report,
    )
    trainer.train()
    path = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if not all(map(isfinite, path)):
        raise TrainingError("the loss of the repair left the finite numbers; lower train.repair_learning_rate")
    return path
