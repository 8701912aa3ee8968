"""How cost grows: seconds per accepted pair when 16, 64 and 256 are wanted, on a scripted engine.

What the engine itself costs does not depend on how many pairs there are; what grows could be near duplicates that must
be compared, scenarios that come to nothing, logs, the audit and the driver's memory.
`python -P -m tests.bench.growth_256_vs_16 FILE.svg` prints the table of docs/BENCH.md and draws it.
"""

import asyncio
import math
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dream.config import load
from dream.paths import data_folder
from tests.bench import MIB, Row, resident_held, resident_peak, svg
from tests.bench.dreaming import calibrated_judge, dream_round, training_templates
from tests.bench.scripted import worked_engine

SIZES = (16, 64, 256)
REPETITIONS = 3
DELAY_S = 0.2
"""What a call takes, so that scenarios wait for an engine as they do in earnest."""


class Dreamed(NamedTuple):
    """One round: what a pair took; in MiB the most memory that the process has had so far, and what it holds now."""

    scenarios: int
    seconds_per_pair: float
    peak: float
    held: float


Grown = dict[int, list[Dreamed]]
"""By number of pairs, the rounds of the repetitions; the sizes take turns."""


async def grown() -> Grown:
    """Dreams the rounds; one before them loads models and is not counted."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    templates = training_templates()
    judge = await calibrated_judge(None, config, templates)
    found: Grown = {size: [] for size in SIZES}
    for turn in range(REPETITIONS + 1):
        for size in SIZES if turn else SIZES[:1]:
            generate = config.generate.model_copy(update={"pairs": size})
            sized = config.model_copy(update={"generate": generate, "seed": config.seed + turn})
            engine = worked_engine(templates, sized, 20 + size // 3, DELAY_S)
            seconds, dreamer, pairs = await dream_round(engine, judge, templates, sized)
            scenarios = dreamer.summary()["scenarios"]
            del dreamer
            one = Dreamed(scenarios, seconds / len(pairs), resident_peak() / MIB, resident_held() / MIB)
            print(f"{len(pairs)} pairs: {one}", file=sys.stderr)
            if turn:
                found[size].append(one)
    return found


def measure() -> list[Row]:
    """The row; a ratio of 1 means that a pair costs as much among 256 as among 16."""
    found = asyncio.run(grown())
    few, many = ([one.seconds_per_pair for one in found[size]] for size in (16, 256))
    ratio = median(a / b for a, b in zip(few, many, strict=True))
    name = Path(__file__).stem
    return [Row(name=name, ours=median(many), other=median(few), ratio=ratio, target=1 / 1.15, unit="s/pair")]


def table(found: Grown) -> list[str]:
    """Markdown lines: medians of the repetitions; of memory the peak after the first (it never falls), and what is held
    after the first and after the last."""
    lines = [
        "| pairs | scenarios | s/pair (least, most) | the driver's peak, MiB | held after a round: first, last |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size, rounds in found.items():
        seconds = sorted(one.seconds_per_pair for one in rounds)
        spread = f"{median(seconds):.3f} ({seconds[0]:.3f}, {seconds[-1]:.3f})"
        scenarios = median(one.scenarios for one in rounds)
        memory = f"{rounds[0].peak:.0f} | {rounds[0].held:.0f}, {rounds[-1].held:.0f}"
        lines.append(f"| {size} | {scenarios:.0f} | {spread} | {memory} |")
    return lines


def plot(found: Grown) -> str:
    """An SVG: seconds per pair against the number of pairs (doubling); a ring is a round, the line joins medians."""
    left, top, width, height = 60, 50, 400, 200
    first, last = math.log2(min(found)), math.log2(max(found))
    highest = max(one.seconds_per_pair for rounds in found.values() for one in rounds) * 1.1

    def at(size: int, seconds: float) -> tuple[str, str]:
        along = (math.log2(size) - first) / (last - first)
        return f"{left + width * along:.0f}", f"{top + height * (1 - seconds / highest):.0f}"

    body = [f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" stroke="#888"/>']
    for k in range(3):
        _, y = at(min(found), highest * k / 2)
        body.append(f'<text x="12" y="{y}" class="small">{highest * k / 2:.2f}</text>')
    middle = [at(size, median(one.seconds_per_pair for one in rounds)) for size, rounds in found.items()]
    points = " ".join(f"{x},{y}" for x, y in middle)
    body.append(f'<polyline points="{points}" fill="none" stroke="#2f6fa7" stroke-width="3"/>')
    for size, rounds in found.items():
        for one in rounds:
            x, y = at(size, one.seconds_per_pair)
            body.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#fff" stroke="#2f6fa7" stroke-width="2"/>')
        label = f"{size} pairs, {rounds[0].held:.0f} MiB"
        body.append(f'<text x="{x}" y="{top + height + 18}" class="small">{label}</text>')
    title = "Seconds per accepted pair, and the memory that the driver holds"
    return svg(title, left + width + 110, top + height + 36, "".join(body))


def main(arguments: list[str]) -> int:
    """Measures, prints the table and writes the plot."""
    found = asyncio.run(grown())
    print("\n".join(table(found)))
    Path(arguments[0]).write_text(plot(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
