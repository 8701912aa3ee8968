"""One training step: conservative DPO on the rows of a round. `python -P -m train.dpo SPEC.json`.

Reads a `DpoSpec`, prints a JSON line per optimiser step to stdout (all else goes to stderr) and leaves one folder:
`adapter/` (LoRA) or `masters/` (float32, full weights served in less), `weights/` (merged, as served), `ledger.json`,
`probes.json`. The folder appears when everything in it is there; a killed step leaves nothing and is begun again.

Not covered: several workers (one process; a model larger than one GPU is spread over those it sees).
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from dream.config import TrainConfig
from dream.errors import ConfigError, DataError, DreamError, TrainingError
from dream.records import PreferencePair
from dream.store import read_json, read_log, write_json
from train import ledger
from train.checkpoints import (
    load_adapter,
    load_model,
    load_tokenizer,
    merge_adapters,
    replace_weights,
    rounded,
    whole_folder,
)
from train.data import DpoSpec, Encoded, Probe, chat_ids, encode, lay_out

Report = Callable[[dict[str, Any]], None]
Scores = list[tuple[float, float]]


def conservative_loss(delta: torch.Tensor, beta: float, flip: torch.Tensor) -> torch.Tensor:
    """Conservative DPO's loss per row (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), shape of `delta`.

    `delta` is the difference of the log-ratios, log p/p_ref of chosen minus rejected, in nats; `flip` the probability
    that the label is wrong. Its gradient is -beta ((1 - e) sigmoid(-beta delta) - e sigmoid(beta delta)), zero where
    the policy is as sure as the labels are. (TRL's `label_smoothing` does nothing with its sigmoid loss.)
    """
    return -(1 - flip) * F.logsigmoid(beta * delta) - flip * F.logsigmoid(-beta * delta)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate of step 0, 1, ... as a share of the highest: a linear rise, then a cosine.

    No step has rate zero: a round has few steps, and the usual schedules waste the first.
    """
    rise = min(ceil(steps * warmup), steps - 1) if warmup else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + cos(pi * (step - rise) / (steps - rise)))


def tensors(sequences: Sequence[tuple[list[int], Sequence[list[int]]]]) -> dict[str, torch.Tensor]:
    """`lay_out` as tensors, with `lengths`, the tokens of each reply."""
    batch = {name: torch.tensor(value) for name, value in lay_out(sequences)._asdict().items()}
    batch["lengths"] = torch.tensor([len(reply) for _, replies in sequences for reply in replies])
    return batch


def pair_sequences(rows: Sequence[Encoded], shared: bool) -> list[tuple[list[int], list[list[int]]]]:
    """Chosen and rejected of each row behind one prompt (`shared`), or as two sequences; both in that order."""
    if shared:
        return [(row.prompt, [row.chosen, row.rejected]) for row in rows]
    return [(row.prompt, [reply]) for row in rows for reply in (row.chosen, row.rejected)]


def reply_logps(model: torch.nn.Module, head: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each reply under its prompt, summed over its tokens, in nats; shape (replies,), float32.

    Only the positions that predict a reply token go through `head`, the vocabulary projection: on a CPU the projection
    of every position costs more than the transformer. The model's own forward runs, so that its logit scaling applies.
    """
    segments = batch["segments"]
    mask = None
    if int(segments.max()) > 1:
        own = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        mask = own.tril()[:, None]
    with _head_only_at(head, batch["sources"]):
        output = model(input_ids=batch["ids"], attention_mask=mask, position_ids=batch["positions"], use_cache=False)
    logps = -F.cross_entropy(output.logits.float(), batch["tokens"], reduction="none")
    return logps.new_zeros(len(batch["lengths"])).index_add(0, batch["replies"], logps)


@contextmanager
def _head_only_at(head: torch.nn.Module, sources: torch.Tensor) -> Iterator[None]:
    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[sources.to(hidden.device)],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def autocast(model: torch.nn.Module, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16, parameters as they are."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def score_pairs(model: PreTrainedModel, rows: Sequence[Encoded], *, shared: bool, bf16: bool, batch: int) -> Scores:
    """Summed log-probabilities (chosen, rejected) of each row, in the rows' order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    scores: dict[int, tuple[float, float]] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = {k: v.to(model.device) for k, v in tensors(pair_sequences([rows[i] for i in part], shared)).items()}
        with autocast(model, bf16):
            logps = reply_logps(model, model.get_output_embeddings(), inputs)
        scores |= {
            i: (chosen, rejected) for i, (chosen, rejected) in zip(part, logps.view(-1, 2).tolist(), strict=True)
        }
    return [scores[i] for i in range(len(rows))]


def prompts_can_be_shared(model: PreTrainedModel, rows: Sequence[Encoded], bf16: bool) -> bool:
    """Whether two replies behind one prompt score as two sequences do: tried on a few rows, not assumed.

    It does not hold for models with recurrent layers, or with attention that takes no mask of our own.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    few = sorted(rows, key=lambda row: sum(map(len, row)))[:2]
    apart, together = (score_pairs(model, few, shared=shared, bf16=bf16, batch=2) for shared in (False, True))
    lengths = [(len(row.chosen), len(row.rejected)) for row in few]
    return all(
        abs(a - b) / max(1, n) < 0.05
        for first, second, count in zip(apart, together, lengths, strict=True)
        for a, b, n in zip(first, second, count, strict=True)
    )


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
        """`rate_factor` as a scheduler."""
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: rate_factor(min(step, num_training_steps - 1), num_training_steps, self._train.warmup),
        )
        return self.lr_scheduler

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False
    ) -> torch.Tensor:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with autocast(model, self._train.mixed_precision):
            logps = reply_logps(model, head, inputs)
        chosen, rejected = logps.view(-1, 2).unbind(1)
        delta = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        nll = -chosen / inputs["lengths"][::2].clamp(min=1)
        losses = conservative_loss(delta, self.beta, inputs["flip_probability"]) + self._train.nll_weight * nll
        loss = (inputs["weight"] * losses).sum() / self._rows_per_step
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}; lower train.learning_rate"
            )
        self._metrics["train"]["margin"] += (self.beta * delta.detach()).tolist()
        self._metrics["train"]["accuracy"] += (delta.detach() > 0).float().tolist()
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


@torch.no_grad()
def probe_scores(model: PreTrainedModel, tokenizer: Any, probes: Sequence[Probe]) -> list[float]:
    """Mean log-probability per reply token of each probe, computed in the model's own precision as an engine does."""
    scores = []
    for probe in probes:
        head = chat_ids(tokenizer, probe.messages, add_generation_prompt=True)
        reply = tokenizer(probe.reply, add_special_tokens=False)["input_ids"]
        inputs = {name: value.to(model.device) for name, value in tensors([(head, [list(reply)])]).items()}
        scores.append(float(reply_logps(model, model.get_output_embeddings(), inputs)) / max(1, len(reply)))
    return scores


def arguments(train: TrainConfig, folder: str, seed: int) -> DPOConfig:
    """What TRL and transformers are told."""
    on_gpu = torch.cuda.is_available()
    optimiser: dict[str, Any] = {"optim": train.optim}
    if train.optim == "apollo_adamw":
        optimiser["optim_args"] = (
            f"rank={train.apollo_rank},scale={train.apollo_scale},update_proj_gap={train.apollo_update_gap},"
            "scale_type=channel,proj=random"
        )
        optimiser["optim_target_modules"] = "all-linear"
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.batch_size // train.micro_batch_size,
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        beta=train.beta,
        max_grad_norm=train.max_grad_norm,
        max_length=None,
        disable_dropout=False,  # done before the adapter is added, so that train.lora.dropout stays
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=on_gpu,
        use_cpu=not on_gpu,
        bf16=False,  # `autocast` does it
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        **optimiser,
    )


def load_policy(spec: DpoSpec) -> PreTrainedModel:
    """The policy to train: bfloat16 weights under a float32 adapter, or float32 masters.

    Raises:
        ConfigError: `train.lora.target_modules` names no layer of this model.
    """
    train = spec.train
    if train.method == "full":
        model = load_model(spec.weights or spec.model, torch.float32, spec.trust_remote_code)
        disable_dropout_in_model(model)
        return model
    model = load_model(spec.model, torch.bfloat16 if train.mixed_precision else torch.float32, spec.trust_remote_code)
    disable_dropout_in_model(model)
    if spec.adapter is not None:
        return load_adapter(model, spec.adapter, trainable=True)
    lora = train.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"train.lora.target_modules: {' '.join(str(error).split())[:300]}") from error


def run(spec: DpoSpec, report: Report) -> None:
    """The whole step; see the module's docstring.

    Raises:
        UserError: the rows, the model or the configuration cannot be used.
        TrainingError: the loss or gradient left the finite numbers, or a folder of an earlier step cannot be loaded.
        StorageError: the result could not be written.
    """
    with whole_folder(Path(spec.out)) as folder, tempfile.TemporaryDirectory() as scratch:
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
        dtype = getattr(torch, spec.served_dtype)
        probes_before = served_before(spec, tokenizer, dtype)

        loaded = time.monotonic()
        policy = load_policy(spec)
        shared = prompts_can_be_shared(policy, encoded, train.mixed_precision)
        scoring: dict[str, Any] = {"shared": shared, "bf16": train.mixed_precision, "batch": train.micro_batch_size}
        reference, before = reference_scores(spec, policy, encoded, scoring)
        referenced = time.monotonic()
        order = training_order(encoded, train.batch_size)
        trainer = ConservativeDPOTrainer(
            model=policy,
            args=arguments(train, scratch, spec.seed),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt_ids": encoded[i].prompt,
                        "chosen_ids": encoded[i].chosen,
                        "rejected_ids": encoded[i].rejected,
                        "ref_chosen_logps": reference[i][0],
                        "ref_rejected_logps": reference[i][1],
                        "flip_probability": spec.flip_probability,
                        "weight": weights[i],
                    }
                    for i in order
                ]
            ),
            processing_class=load_tokenizer(spec.model, spec.trust_remote_code),
            train=train,
            rows_per_step=min(train.batch_size, len(rows)),
            shared=shared,
            report=report,
        )
        trainer.train()
        trained = time.monotonic()
        after = score_pairs(policy, encoded, **scoring)
        steps = trainer.state.global_step
        del trainer

        kept = [i for i, weight in enumerate(weights) if weight]
        meter = ledger.ChangeMeter(dtype)
        served = save_policy(spec, policy, folder, dtype, meter)
        tokenizer.save_pretrained(folder / "weights")
        write_json(
            folder / "probes.json", {"before": probes_before, "after": probe_scores(served, tokenizer, spec.probes)}
        )
        document = {
            "rows": len(kept),
            "left_out": len(rows) - len(kept),
            "steps": steps,
            "method": train.method,
            "reference": train.reference,
            "learning_rate": train.learning_rate,
            "flip_probability": spec.flip_probability,
            "prompts_shared": shared,
            "weights": meter.report(len(kept)),
            "preference": ledger.preference_figures(
                before=[before[i] for i in kept],
                after=[after[i] for i in kept],
                reference=[reference[i] for i in kept],
                lengths=[(len(encoded[i].chosen), len(encoded[i].rejected)) for i in kept],
                beta=train.beta,
            ),
            "seconds": {
                "prepare": loaded - began,
                "reference": referenced - loaded,
                "train": trained - referenced,
                "save": time.monotonic() - trained,
            },
        }
        write_json(folder / "ledger.json", {"summary": ledger.summary(document), **document})


def served_before(spec: DpoSpec, tokenizer: Any, dtype: torch.dtype) -> list[float]:
    """Probe scores of the current policy as it is served."""
    if not spec.probes:
        return []
    source = spec.model if spec.train.method == "lora" else spec.weights or spec.model
    base = load_model(source, "auto", spec.trust_remote_code)
    return probe_scores(merge_adapters(base, spec.adapter, None, dtype), tokenizer, spec.probes)


def reference_scores(
    spec: DpoSpec, policy: PreTrainedModel, rows: Sequence[Encoded], scoring: dict[str, Any]
) -> tuple[Scores, Scores]:
    """Scores of the reference and of the policy before training (the same list where they are the same policy)."""
    before = score_pairs(policy, rows, **scoring)
    if spec.train.reference == "previous" or (spec.adapter is None and spec.weights is None):
        return before, before
    if spec.train.method == "lora":
        with policy.disable_adapter():
            return score_pairs(policy, rows, **scoring), before
    initial = load_model(spec.model, torch.float32, spec.trust_remote_code)
    return score_pairs(initial, rows, **scoring), before


def save_policy(
    spec: DpoSpec, policy: PreTrainedModel, folder: Path, dtype: torch.dtype, meter: ledger.ChangeMeter
) -> PreTrainedModel:
    """Writes adapter or masters, and the merged weights; the merged model, as it is served."""
    trust = spec.trust_remote_code
    if spec.train.method == "lora":
        policy.save_pretrained(str(folder / "adapter"), selected_adapters=["default"], safe_serialization=True)
        base = load_model(spec.model, "auto", trust)
        served = merge_adapters(base, spec.adapter, str(folder / "adapter"), dtype, meter.add)
    else:
        base = load_model(spec.weights or spec.model, torch.float32, trust)
        masters = replace_weights(base, dict(policy.named_parameters()), meter.add)
        if dtype != torch.float32:
            rounded(masters, torch.float32).save_pretrained(folder / "masters")
        served = rounded(masters, dtype)
    gc.collect()
    served.save_pretrained(folder / "weights")
    return served


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the step of one specification file; 0, or a one-line message and the error's exit code."""
    progress = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print, stdout carries progress only
    paths = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(paths) != 1:
            raise ConfigError("usage: python -P -m train.dpo SPEC.json")
        try:
            spec = DpoSpec.model_validate(read_json(Path(paths[0])))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{paths[0]}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        run(spec, lambda line: print(json.dumps(line), file=progress))
    except DreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
