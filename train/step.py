"""One training step: conservative DPO on the rows of a round. `python -P -m train.step SPEC.json`.

Reads a `StepSpec`, prints a JSON line per optimiser step to stdout, a repair's included (all else goes to stderr), and
leaves one folder: `adapter/` (LoRA) or `masters/` (float32, full weights served in less), `weights/` (merged, as
served), `ledger.json`, `probes.json`. The folder appears when everything in it is there; a killed step leaves nothing
and is begun again.

With `train.workers` every worker runs this step on its share of the rows (`train.workers`). Without, there is one
process, and a model larger than one GPU is spread over those it sees.
"""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from dream.config import TrainConfig
from dream.errors import DataError
from dream.records import PreferencePair
from dream.store import read_log, write_json
from train import ledger
from train.checkpoints import (
    Place,
    load_adapter,
    load_model,
    load_tokenizer,
    merge_adapters,
    new_adapter,
    replace_weights,
    rounded,
    whole_folder,
    whole_weights,
    without_dropout,
)
from train.child import Report, carry_out
from train.data import Encoded, StepSpec, encode, encode_rehearsed, with_other_sides
from train.dpo import ConservativeDPOTrainer, data_set, dpo_arguments, row_weights, training_order
from train.drift import Budget, DriftMeter
from train.repair import repair
from train.scoring import (
    Remembered,
    Scores,
    probe_ids,
    probe_scores,
    prompts_can_be_shared,
    remember,
    reply_distributions,
    score_pairs,
)
from train.sft import warm_up

T = TypeVar("T")


def load_policy(spec: StepSpec) -> PreTrainedModel:
    """The policy to train: the model's weights under a float32 adapter, or float32 masters."""
    train = spec.train
    if train.method == "full":
        return without_dropout(
            load_model(spec.weights or spec.model, torch.float32, spec.trust_remote_code, trainer_place(train))
        )
    dtype = torch.bfloat16 if train.mixed_precision else torch.float32
    model = without_dropout(load_model(spec.model, dtype, spec.trust_remote_code))
    return load_adapter(model, spec.adapter, trainable=True) if spec.adapter else new_adapter(model, train.lora)


def trainer_place(train: TrainConfig) -> Place:
    """Where what the trainer works with goes."""
    return Place.PARTS if train.fsdp else Place.DEVICES


def run(spec: StepSpec, report: Report) -> None:
    """The whole step; see the module's docstring.

    Raises:
        UserError: the rows, the model or the configuration cannot be used.
        TrainingError: the loss or gradient left the finite numbers, or a folder of an earlier step cannot be loaded.
        StorageError: the result could not be written.
    """
    workers = PartialState(cpu=not torch.cuda.is_available())  # as the trainer's arguments will have it
    if spec.train.workers > workers.num_processes:
        from train.workers import run_on_workers  # Ray takes seconds to import

        run_on_workers(run, spec, report)
        return
    result = whole_folder(Path(spec.out)) if workers.is_main_process else nullcontext(Path(os.devnull))
    with result as folder, tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        set_seed(spec.seed)
        train = spec.train
        rows = list(read_log(Path(spec.rows), PreferencePair))
        if not rows:
            raise DataError(f"{spec.rows}: no rows to train on")
        tokenizer = load_tokenizer(spec.model, spec.trust_remote_code)
        encoded = [encode(tokenizer, row) for row in rows]
        weights = row_weights(rows, encoded, train.max_length)
        # A row that is left out stands for nothing but must not cost memory.
        encoded = [
            ids if w else Encoded(ids.prompt[:1], ids.chosen[:1], ids.rejected[:1])
            for ids, w in zip(encoded, weights, strict=True)
        ]
        encoded, others = with_other_sides(encoded, rows, train)
        fitting = [i for i, weight in enumerate(weights) if weight]
        dtype = getattr(torch, spec.served_dtype)
        probes_before = served_before(spec, tokenizer, dtype) if workers.is_main_process else []

        policy = load_policy(spec)
        texts = [probe_ids(tokenizer, probe) for probe in spec.heldout]
        moved = texts and not is_initial(spec)
        initial = of_initial(spec, policy, lambda model: reply_distributions(model, texts)) if moved else None
        meter = DriftMeter(policy, texts, initial)
        batches: dict[str, Any] = {"bf16": train.mixed_precision, "batch": train.micro_batch_size}
        remembered: list[Remembered] = []
        if kept_as_is := [encode_rehearsed(tokenizer, text) for text in spec.rehearsed + spec.repaired]:
            remembered = of_initial(spec, policy, lambda model: remember(model, kept_as_is, **batches))
        rehearsed, repaired = remembered[: len(spec.rehearsed)], remembered[len(spec.rehearsed) :]
        shared = prompts_can_be_shared(policy, encoded, train.mixed_precision)
        scoring: dict[str, Any] = {"shared": shared, **batches}
        before = score_pairs(policy, encoded, **scoring)
        loaded = time.monotonic()
        warm_up_loss = None
        if spec.sft:
            warm_up_loss = warm_up(policy, tokenizer, [encoded[i] for i in fitting], train, f"{scratch}/sft", spec.seed)
        reference = reference_scores(spec, policy, encoded, before, scoring)
        referenced = time.monotonic()
        trainer = ConservativeDPOTrainer(
            model=policy,
            args=dpo_arguments(train, f"{scratch}/dpo", spec.seed),
            train_dataset=data_set(encoded, others, reference, weights, spec.flip_probability, train),
            processing_class=load_tokenizer(spec.model, spec.trust_remote_code),
            train=train,
            rows_per_step=min(train.batch_size, len(rows)),
            shared=shared,
            report=report,
            rehearsed=rehearsed,
        )
        budget = Budget(meter, train)
        trainer.add_callback(budget)
        trainer.train()
        steps, planned = trainer.state.global_step, trainer.state.max_steps
        del trainer
        repair_kl = None
        if repaired:
            repair_kl = repair(policy, repaired, train, f"{scratch}/repair", spec.seed, report)
            budget.path.append(meter.measure(steps + len(repair_kl)))
        trained = time.monotonic()
        after = score_pairs(policy, encoded, **scoring)
        # Of an adapter they would keep the base alive, which makes room for the merged model.
        weights_after = whole_weights(policy) if train.method == "full" else {}
        if not workers.is_main_process:
            return

        reached = set(training_order(encoded, others, train.batch_size)[: steps * train.batch_size])
        kept = [i for i in fitting if i in reached]  # fewer where a budget ended the training
        change = ledger.ChangeMeter(dtype)
        served = save_policy(spec, policy, weights_after, folder, dtype, change)
        tokenizer.save_pretrained(folder / "weights")
        write_json(
            folder / "probes.json", {"before": probes_before, "after": probe_scores(served, tokenizer, spec.probes)}
        )
        document = {
            "rows": len(kept),
            "left_out": len(rows) - len(fitting),
            "steps": steps,
            "planned_steps": planned,
            "ended_early": budget.spent,
            "method": train.method,
            "reference": train.reference,
            "learning_rate": train.learning_rate,
            "flip_probability": spec.flip_probability,
            "sft_loss": warm_up_loss,
            "repair_kl": repair_kl,
            "prompts_shared": shared,
            "weights": change.report(len(kept)),
            "drift": [drift.model_dump() for drift in budget.path],
            "preference": ledger.preference_figures(before, after, reference, encoded, others, kept, train),
            "seconds": {
                "prepare": loaded - began,
                "reference": referenced - loaded,
                "train": trained - referenced,
                "save": time.monotonic() - trained,
            },
        }
        write_json(folder / "ledger.json", {"summary": ledger.summary(document), **document})


def served_before(spec: StepSpec, tokenizer: Any, dtype: torch.dtype) -> list[float]:
    """Probe scores of the current policy as it is served."""
    if not spec.probes:
        return []
    if spec.train.method == "full" and spec.weights:
        served = rounded(load_whole(spec, spec.weights, "auto"), dtype, trained=True)
    else:
        served = merge_adapters(load_whole(spec, spec.model, "auto"), None, spec.adapter, dtype)
    scores = probe_scores(served, tokenizer, spec.probes)
    del served
    gc.collect()  # on several GPUs a model is part of a cycle
    return scores


def load_whole(spec: StepSpec, source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """A whole model beside the policy: in main memory where the policy is in parts because no device holds it whole."""
    return load_model(source, dtype, spec.trust_remote_code, Place.MEMORY if spec.train.fsdp else Place.DEVICES)


def reference_scores(
    spec: StepSpec, policy: PreTrainedModel, rows: Sequence[Encoded], before: Scores, scoring: dict[str, Any]
) -> Scores:
    """Scores of the reference: the initial model, or the policy before DPO (after its warm-up, when it had one)."""
    if spec.train.reference == "previous":
        return score_pairs(policy, rows, **scoring) if spec.sft else before
    if is_initial(spec):
        return before
    return of_initial(spec, policy, lambda model: score_pairs(model, rows, **scoring))


def of_initial(spec: StepSpec, policy: PreTrainedModel, measure: Callable[[PreTrainedModel], T]) -> T:
    """What `measure` says of the initial model; `policy` must be as it was before training."""
    if is_initial(spec):
        return measure(policy)
    if spec.train.method == "lora":
        with policy.disable_adapter():
            return measure(policy)
    found = measure(load_model(spec.model, torch.float32, spec.trust_remote_code, trainer_place(spec.train)))
    gc.collect()  # as in `served_before`
    return found


def is_initial(spec: StepSpec) -> bool:
    """Whether the current policy is the initial model."""
    return spec.adapter is None and spec.weights is None


def save_policy(
    spec: StepSpec,
    policy: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    dtype: torch.dtype,
    meter: ledger.ChangeMeter,
) -> PreTrainedModel:
    """Writes adapter or masters (of `weights`), and the merged weights; the merged model, as it is served."""
    if spec.train.method == "lora":
        policy.save_pretrained(str(folder / "adapter"), selected_adapters=["default"], safe_serialization=True)
        policy.to("meta")  # frees its memory, whoever still holds the model: the merged one is as large
        base = load_whole(spec, spec.model, "auto")
        served = merge_adapters(base, spec.adapter, str(folder / "adapter"), dtype, meter.add)
    else:
        base = load_whole(spec, spec.weights or spec.model, torch.float32)
        masters = replace_weights(base, weights, meter.add)
        if dtype != torch.float32:
            rounded(masters, torch.float32).save_pretrained(folder / "masters")
        served = rounded(masters, dtype, trained=True)
    gc.collect()
    served.save_pretrained(folder / "weights")
    return served


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the step of one specification file; see `child.carry_out`."""
    return carry_out("train.step", StepSpec, run, argv)


if __name__ == "__main__":
    sys.exit(main())
