"""Our DPO beside TRL's `DPOTrainer` as it comes: the same rows, model, adapter, batches and losses, in pairs a second.

Counted is everything from rows to a trained adapter: tokenising, log-probabilities of the reference, optimiser steps.
Not counted: loading the model, writing results.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from dream.config import TrainConfig, load
from dream.errors import TrainingError
from dream.models import resolve
from dream.paths import data_folder
from dream.records import PreferencePair, assistant
from dream.scenarios import eval_pairs
from dream.templates import load_all
from tests.bench import Row, paired_rates
from train.checkpoints import load_model, load_tokenizer, new_adapter, without_dropout
from train.data import encode, with_other_sides
from train.dpo import ConservativeDPOTrainer, data_set, dpo_arguments, row_weights
from train.scoring import prompts_can_be_shared, score_pairs

PAIRS = 32
REPETITIONS = 2
TOLERANCE = {False: 1e-3, True: 2e-2}
"""Nats by which the losses of a step may differ, without and with mixed precision: bfloat16 keeps eight bits, and the
two trainers lay rows out differently."""


class Trained(NamedTuple):
    """What a training took, and the loss of each optimiser step."""

    seconds: float
    losses: list[float]


def preference_pairs(count: int, seed: int) -> list[PreferencePair]:
    """Rows from the worked replies of the training templates, both sides of a scenario in turn; no model, no judge."""
    templates = [template for template in load_all() if template.front.split == "train"]
    rows = []
    for pair in eval_pairs(templates, count // 2, seed):
        right, wrong = (pair.comply, pair.push_back) if pair.side == "clear" else (pair.push_back, pair.comply)
        rows.append(
            PreferencePair(
                pair_id=pair.pair_id, side=pair.side, prompt=pair.prompt,
                chosen=[assistant(right)], rejected=[assistant(wrong)], meta={},
            )
        )  # fmt: skip
    return rows


def train_ours(model: str, train: TrainConfig, rows: Sequence[PreferencePair], seed: int) -> Trained:
    """Trains a new adapter as `train.step` does, without what a step measures and writes beside it."""
    dtype = torch.bfloat16 if train.mixed_precision else torch.float32
    initial = without_dropout(load_model(model, dtype, trust_remote_code=False))
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        began = time.perf_counter()
        policy = new_adapter(initial, train.lora)
        encoded, others = with_other_sides([encode(tokenizer, row) for row in rows], rows, train)
        weights = row_weights(rows, encoded, train.max_length)
        shared = prompts_can_be_shared(policy, encoded, train.mixed_precision)
        reference = score_pairs(
            policy, encoded, shared=shared, bf16=train.mixed_precision, batch=train.micro_batch_size
        )
        ConservativeDPOTrainer(
            model=policy,
            args=dpo_arguments(train, folder, seed),
            train_dataset=data_set(encoded, others, reference, weights, 0.0, train),
            processing_class=tokenizer,
            train=train,
            rows_per_step=min(train.batch_size, len(rows)),
            shared=shared,
            report=reports.append,
        ).train()
        return Trained(time.perf_counter() - began, [report["loss"] for report in reports])


def train_theirs(model: str, train: TrainConfig, rows: Sequence[PreferencePair], seed: int) -> Trained:
    """Trains a new adapter with TRL's defaults; set is only what makes it the same run, and what writes no files."""
    initial = load_model(model, torch.float32, trust_remote_code=False)
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        began = time.perf_counter()
        trainer = DPOTrainer(
            model=initial,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=train.micro_batch_size,
                gradient_accumulation_steps=train.batch_size // train.micro_batch_size,
                num_train_epochs=1,
                learning_rate=train.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=train.max_grad_norm,
                beta=train.beta,
                max_length=train.max_length,
                train_sampling_strategy="sequential",  # the same rows in the same step
                bf16=train.mixed_precision,
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
            ),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=train.lora.rank,
                lora_alpha=train.lora.alpha,
                lora_dropout=train.lora.dropout,
                target_modules=train.lora.target_modules,
                task_type="CAUSAL_LM",
            ),
        )
        trainer.train()
        seconds = time.perf_counter() - began
    return Trained(seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def require_same_losses(ours: Sequence[float], theirs: Sequence[float], *, mixed: bool = False) -> None:
    """Proves that both did the same work. The first loss is log 2 in any DPO; the later ones need the same gradients.

    Raises:
        TrainingError: a loss differs by more than `TOLERANCE`, or there are not as many.
    """
    if len(ours) != len(theirs):
        raise TrainingError(f"ours made {len(ours)} optimiser steps and TRL's {len(theirs)}; compare equal runs")
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), 1):
        if not abs(our - their) <= TOLERANCE[mixed]:  # so that nan fails too
            raise TrainingError(
                f"the loss of step {step} is {our:.5f} in ours and {their:.5f} in TRL's trainer; speeds of unequal "
                "work say nothing: see test_losses_are_those_of_trl in tests/test_dpo.py"
            )


def measure(model: str | None = None) -> list[Row]:
    """Trains with either in turn; `model` is a folder in place of the configured model.

    Raises:
        TrainingError: the losses differ.
    """
    config, _ = load(data_folder("configs") / "cpu.yaml")
    # TRL has no NLL term beside the sigmoid loss and another warm-up; both are left out of both.
    train = config.train.model_copy(
        update={"nll_weight": 0.0, "row_weight": 1.0, "crossed_weight": 0.0, "warmup": 0.0, "schedule": "constant"}
    )
    source = resolve(model or config.model)
    rows = preference_pairs(PAIRS, config.seed)
    for trainer in (train_ours, train_theirs):
        trainer(source, train, rows[: train.micro_batch_size], config.seed)  # first calls are slow
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPETITIONS):
        ours, theirs = (trainer(source, train, rows, config.seed) for trainer in (train_ours, train_theirs))
        print(f"losses of ours {ours.losses}, of TRL's {theirs.losses}", file=sys.stderr)
        require_same_losses(ours.losses, theirs.losses, mixed=train.mixed_precision)
        for rate, trained in zip(rates, (ours, theirs), strict=True):
            rate.append(len(rows) / trained.seconds)
        print(f"pairs/s of ours {rates[0][-1]:.2f}, of TRL's {rates[1][-1]:.2f}", file=sys.stderr)
    return [paired_rates(Path(__file__).stem, *rates, target=2.0, unit="pairs/s")]
