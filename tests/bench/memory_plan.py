"""The memory plan beside what training takes on a CPU: `python -P -m tests.bench.memory_plan [MODEL]`.

Each combination of `dream.memory` takes two optimiser steps of the real step (`train.step`, its measuring and saving
included) in a process of its own; MODEL is a folder in place of the configured model. Measured is the largest resident
size of that process less what it had after its imports, planned the same without `dream.memory.PROCESS`. Exit codes: 0
when all are within `TOLERANCE`, else 1.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dream.config import TrainConfig, load
from dream.errors import TrainingError
from dream.memory import COMBINATIONS, GIB, PROCESS, Batch, Device, read_shape, trainer_plan
from dream.models import resolve
from dream.paths import data_folder
from dream.records import Record
from dream.store import Log, write_json
from dream.templates import load_all
from tests.bench import resident_peak
from tests.bench.dpo_vs_trl import preference_pairs
from train.data import StepSpec

TOLERANCE = 0.25
STEPS = 2
"""The first makes the optimiser's state; only the second holds it beside the activations."""


class Measured(Record):
    """What a child says: resident bytes after its imports and at their most, and its largest micro batch."""

    imported: int
    peak: int
    width: int
    replies: int


def child(path: Path) -> Measured:
    """Carries out the step of a specification file in this process."""
    from dream.records import PreferencePair
    from dream.store import read_json, read_log
    from train.checkpoints import load_tokenizer
    from train.data import encode, lay_out, with_other_sides
    from train.dpo import training_order
    from train.scoring import pair_sequences
    from train.step import run

    spec = StepSpec.model_validate(read_json(path))
    imported = resident_peak()
    run(spec, lambda line: print(line, file=sys.stderr))
    peak = resident_peak()
    tokenizer = load_tokenizer(spec.model, trust_remote_code=False)
    rows = list(read_log(Path(spec.rows), PreferencePair))
    encoded, others = with_other_sides([encode(tokenizer, row) for row in rows], rows, spec.train)
    order, size = training_order(encoded, others, spec.train.batch_size), spec.train.micro_batch_size
    layouts = [
        lay_out(pair_sequences([encoded[i] for i in order[start : start + size]], shared=True))
        for start in range(0, len(order), size)
    ]
    return Measured(
        imported=imported,
        peak=peak,
        width=max(len(layout.ids[0]) for layout in layouts),
        replies=max(len(layout.tokens) for layout in layouts),
    )


def measure(model: str, train: TrainConfig, served: str, seed: int) -> Measured:
    """Trains in a child process.

    Raises:
        TrainingError: it failed.
    """
    from train.rounds import heldout_texts, probes

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = Log(folder / "rows.jsonl")
        log.append(*preference_pairs(STEPS * train.batch_size, seed))
        log.close()
        spec = StepSpec(
            model=model, rows=str(folder / "rows.jsonl"), out=str(folder / "out"), train=train, seed=seed,
            served_dtype=served, probes=probes(load_all()), heldout=heldout_texts(load_all(), seed),
        )  # fmt: skip
        write_json(folder / "spec.json", spec.model_dump(mode="json"))
        command = [sys.executable, "-P", "-m", "tests.bench.memory_plan", "--child", str(folder / "spec.json")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise TrainingError(f"{train.method}, {train.optim}: training ended with code {done.returncode}; see above")
    return Measured.model_validate(json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str]) -> int:
    """Prints a line a combination; see the module's docstring."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    model = resolve(argv[0] if argv else config.model)
    shape = read_shape(Path(model) / "config.json")
    close = True
    for method, optim in COMBINATIONS:
        train = config.train.model_copy(update={"method": method, "optim": optim})
        measured = measure(model, train, config.engine.dtype, config.seed)
        batch = Batch(train.micro_batch_size, measured.width, measured.replies)
        planned = trainer_plan(shape, train, config.engine.dtype, Device(0), batch).peak - PROCESS
        ratio = planned / (measured.peak - measured.imported)
        close &= abs(ratio - 1) <= TOLERANCE
        print(
            f"{method:4} {optim:12}  planned {planned / GIB:6.3f} GiB  "
            f"measured {(measured.peak - measured.imported) / GIB:6.3f} GiB  ratio {ratio:.2f}  "
            f"(imports alone {measured.imported / GIB:.2f} GiB; {batch.rows} rows of {batch.width} positions)",
            flush=True,
        )
    return 0 if close else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(child(Path(sys.argv[2])).model_dump_json())
    else:
        sys.exit(main(sys.argv[1:]))
