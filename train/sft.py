"""The optional warm-up: one pass of supervised training on the chosen replies, before the first DPO round."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from dream.config import TrainConfig
from dream.errors import TrainingError
from train.data import Encoded
from train.optim import OwnSchedule, arguments


class WarmUpTrainer(OwnSchedule, SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's SFT trainer with the schedule of `train.optim`."""

    def __init__(self, *args: Any, train: TrainConfig, **kwargs: Any) -> None:
        self._train = train
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)


def warm_up(
    policy: PreTrainedModel, tokenizer: Any, rows: Sequence[Encoded], train: TrainConfig, folder: str, seed: int
) -> float:
    """Trains `policy` in place on the chosen replies, prompts masked; the mean loss, in nats a token.

    Raises:
        TrainingError: the loss left the finite numbers.
    """
    trainer = WarmUpTrainer(
        model=policy,
        args=SFTConfig(**arguments(train, folder, seed, train.sft_learning_rate)),
        train_dataset=Dataset.from_list(
            [{"input_ids": row.prompt + row.chosen, "labels": [-100] * len(row.prompt) + row.chosen} for row in rows]
        ),
        processing_class=tokenizer,
        train=train,
    )
    loss = float(trainer.train().training_loss)
    if not math.isfinite(loss):
        raise TrainingError(f"the warm-up's loss is {loss}; lower train.sft_learning_rate")
    return loss
