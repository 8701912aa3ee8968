"""How cost grows: seconds per accepted pair when 256 are wanted beside 16, and 64 in between, on a scripted engine.

What the engine itself costs does not depend on how many pairs there are; what grows could be near duplicates that must
be compared, logs, the audit and the driver's memory.
"""

import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from dream.config import load
from dream.embed import minilm
from dream.generate import RoundDreamer
from dream.judge.combined import calibrated
from dream.judge.gold import halves, read_gold
from dream.judge.planted import planted
from dream.paths import data_folder
from dream.store import RoundStore
from dream.templates import load_all
from tests.bench import Row
from tests.bench.scripted import worked_engine

SIZES = (16, 64, 256)
REPETITIONS = 3
DELAY_S = 0.2
"""What a call takes, so that scenarios wait for an engine as they do in earnest."""


async def seconds_per_pair() -> dict[int, list[float]]:
    """By number of pairs, the seconds per pair of each repetition; the sizes take turns."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    templates = [template for template in load_all() if template.front.split == "train"]
    gold = halves([labelled for _, labelled in read_gold()])
    known = planted(templates, config.judge.self_test_replies, config.seed)
    judge = await calibrated(None, config, gold[0], known, gold[1])
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(REPETITIONS):
        for size in SIZES:
            generate = config.generate.model_copy(update={"pairs": size})
            sized = config.model_copy(update={"generate": generate, "seed": config.seed + turn})
            engine = worked_engine(templates, sized, 20 + size // 3, DELAY_S)
            with tempfile.TemporaryDirectory() as folder:
                store = RoundStore(Path(folder) / "round_01")
                began = time.perf_counter()
                dreamer = RoundDreamer(
                    engine, judge, store, templates, sized, round_number=1, policy="bench", embed=minilm()
                )
                await dreamer.run()
                found[size].append((time.perf_counter() - began) / len(store.pairs))
                store.close()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{len(store.pairs)} pairs of {dreamer.summary()['scenarios']} scenarios: {found[size][-1]:.3f} s a "
                f"pair, peak memory of the driver {memory:.0f} MiB",
                file=sys.stderr,
            )
    return found


def measure() -> list[Row]:
    """The row; a ratio of 1 means that a pair costs as much among 256 as among 16."""
    found = asyncio.run(seconds_per_pair())
    ours, other = median(found[256]), median(found[16])
    ratio = median(few / many for few, many in zip(found[16], found[256], strict=True))
    return [Row(name=Path(__file__).stem, ours=ours, other=other, ratio=ratio, target=1 / 1.15, unit="s/pair")]
