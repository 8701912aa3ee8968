"""The optional warm-up: one pass of supervised training on the chosen replies, before the first DPO round."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from dream.config import TrainConfig
from train.data import Encoded
from train.optim import arguments, scheduler


class WarmUpTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's SFT trainer with the schedule of `train.optim`."""

    def __init__(self, *args: Any, train: TrainConfig, **kwargs: Any) -> None:
        self._train = train
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The schedule of `train.optim`."""
        self.lr_scheduler = scheduler(optimizer or self.optimizer, num_training_steps, self._train)
        return self.lr_scheduler


def warm_up(
    policy: PreTrainedModel, tokenizer: Any, rows: Sequence[Encoded], train: TrainConfig, folder: str, seed: int
) -> float:
    """Trains `policy` in place on the chosen replies, prompts masked; the mean loss, in nats a token."""
    trainer = WarmUpTrainer(
        model=policy,
        args=SFTConfig(**arguments(train, folder, seed, train.sft_learning_rate)),
        train_dataset=Dataset.from_list(
            [{"input_ids": row.prompt + row.chosen, "labels": [-100] * len(row.prompt) + row.chosen} for row in rows]
        ),
        processing_class=tokenizer,
        train=train,
    )
    return float(trainer.train().training_loss)
