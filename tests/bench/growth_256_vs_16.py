"""How cost grows: seconds per accepted pair when 256 are wanted beside 16, and 64 in between, on a scripted engine.

What the engine itself costs does not depend on how many pairs there are; what grows could be near duplicates that must
be compared, logs, the audit and the driver's memory.
"""

import asyncio
import resource
import sys
from pathlib import Path
from statistics import median

from dream.config import load
from dream.paths import data_folder
from dream.templates import load_all
from tests.bench import Row
from tests.bench.dreaming import calibrated_judge, dream_round
from tests.bench.scripted import worked_engine

SIZES = (16, 64, 256)
REPETITIONS = 3
DELAY_S = 0.2
"""What a call takes, so that scenarios wait for an engine as they do in earnest."""


async def seconds_per_pair() -> dict[int, list[float]]:
    """By number of pairs, the seconds per pair of each repetition; the sizes take turns."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    templates = [template for template in load_all() if template.front.split == "train"]
    judge = await calibrated_judge(None, config, templates)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(REPETITIONS + 1):
        for size in SIZES if turn else SIZES[:1]:  # the first round loads models, and is not counted
            generate = config.generate.model_copy(update={"pairs": size})
            sized = config.model_copy(update={"generate": generate, "seed": config.seed + turn})
            engine = worked_engine(templates, sized, 20 + size // 3, DELAY_S)
            seconds, dreamer, _ = await dream_round(engine, judge, templates, sized)
            summary = dreamer.summary()
            each = seconds / summary["accepted"]
            if turn:
                found[size].append(each)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{summary['accepted']} pairs of {summary['scenarios']} scenarios: {each:.3f} s a pair, "
                f"peak memory of the driver {memory:.0f} MiB",
                file=sys.stderr,
            )
    return found


def measure() -> list[Row]:
    """The row; a ratio of 1 means that a pair costs as much among 256 as among 16."""
    found = asyncio.run(seconds_per_pair())
    ours, other = median(found[256]), median(found[16])
    ratio = median(few / many for few, many in zip(found[16], found[256], strict=True))
    return [Row(name=Path(__file__).stem, ours=ours, other=other, ratio=ratio, target=1 / 1.15, unit="s/pair")]
