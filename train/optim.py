"""What every trainer is told of the optimiser: the configuration's keys in the words of transformers."""

from math import ceil, cos, pi
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from dream.config import TrainConfig


def rate_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Learning rate of step 0, 1, ... as a share of the highest: a linear rise, then a cosine or none of it.

    No step has rate zero: a round has few steps, and the usual schedules waste the first.
    """
    rise = min(ceil(steps * train.warmup), steps - 1) if train.warmup else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    if train.schedule == "constant":
        return 1.0
    return 0.5 * (1 + cos(pi * (step - rise) / (steps - rise)))


def scheduler(optimizer: torch.optim.Optimizer, steps: int, train: TrainConfig) -> LambdaLR:
    """`rate_factor` as a scheduler."""
    return LambdaLR(optimizer, lambda step: rate_factor(min(step, steps - 1), steps, train))


class OwnSchedule:
    """For a trainer of transformers: the schedule of `scheduler`, by the configuration in `_train`."""

    _train: TrainConfig
    args: Any
    optimizer: torch.optim.Optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Called by the trainer once it knows its steps."""
        optimizer = optimizer or self.optimizer
        for group in optimizer.param_groups:  # of Apollo's two, transformers tells it to one
            group["eps"] = self.args.adam_epsilon
        self.lr_scheduler = scheduler(optimizer, num_training_steps, self._train)
        return self.lr_scheduler


def arguments(train: TrainConfig, folder: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """Keyword arguments that every trainer's arguments share."""
    on_gpu = torch.cuda.is_available()
    optimiser: dict[str, Any] = {"optim": "adamw_torch_fused"}  # the same update in one pass over each parameter
    if train.optim == "apollo_adamw":
        optimiser["optim"] = train.optim
        optimiser["optim_args"] = (
            f"rank={train.apollo_rank},scale={train.apollo_scale},update_proj_gap={train.apollo_update_gap},"
            "scale_type=channel,proj=random"
        )
        optimiser["optim_target_modules"] = "all-linear"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch_size * train.workers),
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "max_grad_norm": train.max_grad_norm,
        "max_length": None,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": on_gpu,
        "use_cpu": not on_gpu,
        "bf16": False,  # `scoring.autocast` does it
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
        **optimiser,
    }
