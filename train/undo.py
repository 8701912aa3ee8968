"""The undo test: how many opposite examples take back what a run taught? `python -P -m train.undo SPEC.json`.

The disposition is the crossed margin (docs/ARCHITECTURE.md, "What is measured") on new scenarios of trained kinds. The
policy is trained on worked pairs whose chosen and rejected reply changed places, one scenario (both sides) an optimiser
step, at the loss, flip probability and learning rate of its last promoted round, without rehearsal or repair. It is
undone where its margin is no longer above the initial model's. The count has a bootstrap interval over the scenarios
that the margin is measured on; what another order of the examples would give is not in it.

Reads an `UndoSpec`, prints a JSON line per measurement to stdout (all else goes to stderr) and leaves an `UndoResult`.

Not covered: held-out kinds of flaw, and examples that are contrary on one side only.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dream.config import Config
from dream.errors import ConfigError, DataError, RunError
from dream.records import RIGHT_STANCE, WRONG_STANCE, EvalPair, PreferencePair, Record, assistant
from dream.scenarios import eval_pairs
from dream.store import Log, read_json, read_log, round_folder, write_json
from dream.templates import Template
from train.child import carry_out
from train.data import Encoded, StepSpec, chat_ids, encode, with_other_sides
from train.evals import RESAMPLES
from train.history import read_policy

if TYPE_CHECKING:  # torch, which the command line does without when it prepares a specification
    from transformers import PreTrainedModel

LIMIT = 64
"""Opposite examples that are tried."""
MEASURED, OPPOSITE = 7_001, 7_002
"""Added to ten thousand times the run's seed: seeds that no evaluation of the run drew its scenarios with."""


class UndoSpec(StepSpec):
    """Everything `python -P -m train.undo SPEC.json` needs to know. `rows` are the opposite examples, the two rows of
    a scenario in turn; `out` is the file of the result."""

    measured: list[EvalPair]
    """Scenarios that the margin is measured on, clear and flawed in turn."""


class Measured(Record):
    """The crossed margin after so many opposite examples, in nats a token."""

    examples: int
    margin: float


class UndoResult(Record):
    """What the test found. The counts are the smallest measured ones; None where the policy has no gain, or has not
    lost it (or half of it) by `limit`."""

    initial_margin: float
    policy_margin: float
    path: list[Measured]
    """Empty where there was no gain to undo. It goes on to the limit, so that a count that chance gave is seen."""
    half_undone_after: int | None
    undone_after: int | None
    undone_after_ci: tuple[int | None, int | None] | None
    """The 95 % interval of `undone_after`, among the measured counts; an end is None where it lies beyond `limit`, the
    interval where there is no gain, or one scenario only."""
    limit: int

    @property
    def gain(self) -> float:
        """What the run added to the margin."""
        return self.policy_margin - self.initial_margin


def prepare(run: Path, config: Config, templates: Sequence[Template], model: str) -> UndoSpec:
    """The test of a run's accepted policy, its rows written into a new temporary folder (that of `out`).

    Raises:
        RunError: no round was promoted.
        ConfigError: there are no scenarios to draw.
    """
    policy = read_policy(run)
    if policy.round == 0:
        raise RunError(f"{run}: the policy is the model as it came (no round was promoted); there is nothing to undo")
    trained = [template for template in templates if template.front.split == "train"]
    measured = eval_pairs(trained, config.eval.fresh_pairs, config.seed * 10_000 + MEASURED)
    if not measured:
        raise ConfigError(
            "--undo: no scenarios to measure on; it takes a contrast template with `split: train` and "
            "eval.fresh_pairs of 1 or more (--set eval.fresh_pairs=24)"
        )
    folder = Path(tempfile.mkdtemp(prefix="dream-undo-"))
    log = Log(folder / "rows.jsonl")
    log.append(*opposite(eval_pairs(trained, LIMIT, config.seed * 10_000 + OPPOSITE)))
    log.close()
    weights = policy.masters or policy.weights
    trained_with = read_json(round_folder(run, policy.round) / "train" / "ledger.json")
    return UndoSpec(
        model=model,
        adapter=str(run / policy.adapter) if policy.adapter else None,
        weights=str(run / weights) if weights and not policy.adapter else None,
        rows=str(folder / "rows.jsonl"),
        out=str(folder / "undo.json"),
        train=config.train.model_copy(
            update={
                "method": "lora" if policy.adapter else "full",
                "learning_rate": trained_with["learning_rate"],
                "workers": 1,
                "fsdp": False,
                "batch_size": 2,
                "micro_batch_size": min(2, config.train.micro_batch_size),
                "warmup": 0.0,
                "schedule": "constant",
            }
        ),
        flip_probability=trained_with["flip_probability"],
        seed=config.seed,
        trust_remote_code=config.engine.trust_remote_code,
        measured=measured,
    )


def opposite(rows: Sequence[EvalPair]) -> list[PreferencePair]:
    """A row for each, in which the wrong stance is chosen and the right one rejected."""
    return [
        PreferencePair(
            pair_id=row.pair_id,
            side=row.side,
            prompt=row.prompt,
            chosen=[assistant(_reply(row, WRONG_STANCE[row.side]))],
            rejected=[assistant(_reply(row, RIGHT_STANCE[row.side]))],
            meta={},
        )
        for row in rows
    ]


def _reply(row: EvalPair, stance: str) -> str:
    return row.comply if stance == "comply" else row.push_back


def crossed(tokenizer: Any, rows: Sequence[EvalPair]) -> list[Encoded]:
    """Token ids of each reply set under the flawed and then the clear prompt of its scenario, push-back before comply:
    four a scenario. As in an engine, a reply ends with its last word and not with an end of turn."""
    found = []
    for clear, flawed in zip(rows[::2], rows[1::2], strict=True):
        for replies in (clear, flawed):
            push_back, comply = (
                list(tokenizer(text, add_special_tokens=False)["input_ids"])
                for text in (replies.push_back, replies.comply)
            )
            for side in (flawed, clear):
                prompt = chat_ids(tokenizer, side.prompt, add_generation_prompt=True)
                found.append(Encoded(prompt, push_back, comply))
    return found


def crossed_margins(scores: Sequence[tuple[float, ...]], rows: Sequence[Encoded]) -> np.ndarray:
    """d(flawed) - d(clear) of each scenario, the mean of its two reply sets, in nats a token, shape (scenarios,); of
    the summed log-probabilities of `crossed` rows."""
    d = [
        push / max(1, len(row.chosen)) - comply / max(1, len(row.rejected))
        for (push, comply), row in zip(scores, rows, strict=True)
    ]
    under = np.array(d).reshape(-1, 2, 2).mean(axis=1)
    return np.asarray(under[:, 0] - under[:, 1])


def is_measured(examples: int, limit: int) -> bool:
    """Whether the margin is measured after so many examples: 1, 2, 4, 8, ... and the last."""
    return examples & (examples - 1) == 0 or examples == limit


def verdict(
    initial: np.ndarray, policy: np.ndarray, path: Sequence[tuple[int, np.ndarray]], limit: int, seed: int = 0
) -> UndoResult:
    """The result of these margins, each of shape (scenarios,): half undone where half the gain is left or less, undone
    where none is."""

    def first(margins: Sequence[float], bound: float) -> int | None:
        return next((count for (count, _), margin in zip(path, margins, strict=True) if margin <= bound), None)

    before, start = float(initial.mean()), float(policy.mean())
    means = [float(margins.mean()) for _, margins in path]
    ci = None
    if path and len(initial) > 1:
        scenarios = np.stack([initial, *(margins for _, margins in path)], axis=1)
        drawn = np.random.default_rng(seed).integers(0, len(scenarios), (RESAMPLES, len(scenarios)))
        looks = scenarios[drawn].mean(axis=1)
        counts = [first(margins, bound) for bound, *margins in looks.tolist()]
        beyond = limit + 1
        ends = np.quantile([beyond if one is None else one for one in counts], [0.025, 0.975], method="inverted_cdf")
        low, high = (None if end == beyond else int(end) for end in ends)
        ci = (low, high)
    return UndoResult(
        initial_margin=before,
        policy_margin=start,
        path=[Measured(examples=count, margin=margin) for (count, _), margin in zip(path, means, strict=True)],
        half_undone_after=first(means, (before + start) / 2),
        undone_after=first(means, before),
        undone_after_ci=ci,
        limit=limit,
    )


def run(spec: UndoSpec, report: Callable[[dict[str, Any]], None]) -> None:
    """The whole test; see the module's docstring.

    Raises:
        UserError: the rows, the model or the configuration cannot be used.
        TrainingError: the loss or gradient left the finite numbers, or the policy's folder cannot be loaded.
        StorageError: the result could not be written.
    """
    import torch
    from transformers import set_seed

    from train.checkpoints import load_model, load_tokenizer
    from train.dpo import ConservativeDPOTrainer, data_set, dpo_arguments
    from train.scoring import prompts_can_be_shared, score_pairs
    from train.step import load_policy, reference_scores

    set_seed(spec.seed)
    train = spec.train
    rows = list(read_log(Path(spec.rows), PreferencePair))
    if not rows or len(rows) % 2:
        raise DataError(f"{spec.rows}: {len(rows)} rows; opposite examples take two each")
    limit = len(rows) // 2
    tokenizer = load_tokenizer(spec.model, spec.trust_remote_code)
    encoded, others = with_other_sides([encode(tokenizer, row) for row in rows], rows, train)
    measured = crossed(tokenizer, spec.measured)
    policy = load_policy(spec)
    shared = prompts_can_be_shared(policy, measured, train.mixed_precision)
    scoring: dict[str, Any] = {"shared": shared, "bf16": train.mixed_precision, "batch": train.micro_batch_size}

    def margins(model: "PreTrainedModel") -> np.ndarray:
        return crossed_margins(score_pairs(model, measured, **scoring), measured)

    if train.method == "lora":
        with policy.disable_adapter():
            initial = margins(policy)
    else:
        initial = margins(load_model(spec.model, torch.float32, spec.trust_remote_code))
    before = margins(policy)
    path: list[tuple[int, np.ndarray]] = []

    def watch(step: dict[str, Any]) -> None:
        examples = step["step"]
        if is_measured(examples, limit):
            path.append((examples, margins(policy)))
            tell(*path[-1])

    def tell(examples: int, found: np.ndarray) -> None:
        report({"examples": examples, "margin": float(found.mean()), "limit": limit})

    tell(0, before)
    if before.mean() > initial.mean():
        reference = reference_scores(spec, policy, encoded, score_pairs(policy, encoded, **scoring), scoring)
        with tempfile.TemporaryDirectory() as scratch:
            ConservativeDPOTrainer(
                model=policy,
                args=dpo_arguments(train, scratch, spec.seed),
                train_dataset=data_set(encoded, others, reference, [1.0] * len(rows), spec.flip_probability, train),
                processing_class=tokenizer,
                train=train,
                rows_per_step=train.batch_size,
                shared=shared,
                report=watch,
            ).train()
    write_json(Path(spec.out), verdict(initial, before, path, limit, spec.seed).model_dump())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the test of one specification file; see `child.carry_out`."""
    return carry_out("train.undo", UndoSpec, run, argv)


if __name__ == "__main__":
    sys.exit(main())
