"""Measures the rows and writes them down: `python -P -m tests.bench.bench [--runs N] [NAME ...]`, without names all.

Prints a table and leaves `runs/bench/bench.json`, the list of the rows measured; of several runs each row is the one
with the median ratio. Exit codes: 0 measured, whether or not the targets were met; 2 no such row; 1 a row could not be
measured or compared unlike things.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from rich.table import Table

from dream.errors import ConfigError, DreamError
from dream.store import write_json
from dream.terminal import out
from tests.bench import Row
from train.child import end_with

ROWS = {
    "generate_vs_raw_vllm": "generation",
    "generate_vs_staged": "generation",
    "generate_vs_hf": "generation",
    "dpo_vs_trl": "dpo_vs_trl",
    "reload_vs_restart": "reload_vs_restart",
    "orchestrator_rps": "orchestrator_rps",
    "growth_256_vs_16": "growth_256_vs_16",
}
"""The rows in the order of the table, and the module beside this one that measures each, together with its others."""
RESULT = Path("runs/bench/bench.json")


def measure(module: str) -> list[Row]:
    """Measures the rows of a module in this process."""
    rows = import_module(f"tests.bench.{module}").measure()
    assert all(isinstance(row, Row) for row in rows)
    return list(rows)


def measure_apart(module: str) -> list[Row]:
    """Measures the rows of a module in a process of its own: none sees the memory, threads or engines of another."""
    with process_apart() as pool:
        return pool.submit(measure, module).result()


def process_apart() -> ProcessPoolExecutor:
    """A process that ends with this one, however that ends; whatever libraries print there goes to stderr."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    end_with(parent)
    os.dup2(2, 1)


def middle(runs: Sequence[Row]) -> Row:
    """Of the runs of one row that with the median ratio; of an even number the lower of the two."""
    return sorted(runs, key=lambda row: row.ratio)[(len(runs) - 1) // 2]


def table(measured: Mapping[str, Sequence[Row]]) -> Table:
    """The rows as people read them, from the runs of each."""
    made = Table(box=None, pad_edge=False)
    for column in ("row", "ours", "other", "unit", "ratio", "least, most", "target", ""):
        made.add_column(column, justify="left" if column in ("row", "unit", "") else "right")
    for name, runs in measured.items():
        row, ratios = middle(runs), [run.ratio for run in runs]
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        figures = f"{row.ours:.3g}", f"{row.other:.3g}", row.unit, f"{row.ratio:.2f}", spread, f"{row.target:.2f}"
        made.add_row(name, *figures, "met" if row.met else "MISSED")
    return made


def main(words: Sequence[str]) -> int:
    """Measures the named rows, all of them without a name; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -P -m tests.bench.bench", description="Measures the benchmark's rows."
    )
    parser.add_argument("--runs", type=int, default=1, help="how often each row is measured, in turn with the others")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row; default: all")
    chosen = parser.parse_args(words)
    names = chosen.names
    if unknown := [name for name in names if name not in ROWS]:
        error: DreamError = ConfigError(f"no row {unknown[0]!r} in the benchmark; there is {', '.join(ROWS)}")
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    measured: dict[str, list[Row]] = {}
    code = 0
    for module in list(dict.fromkeys(ROWS[name] for name in names or ROWS)) * chosen.runs:
        print(f"measuring {module}", file=sys.stderr)
        try:
            for row in measure_apart(module):
                measured.setdefault(row.name, []).append(row)
        except (DreamError, BrokenProcessPool) as error:
            print(f"error: {module}: {error}", file=sys.stderr)
            code = 1
        write_json(RESULT, [middle(runs).model_dump() for runs in measured.values()])
    out.print(table(measured))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
