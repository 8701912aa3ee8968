"""What rows on dreaming share: the judge as commands have it, and a round into a folder that is thrown away."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dream.config import Config
from dream.embed import minilm
from dream.engine import Engine
from dream.generate import RoundDreamer
from dream.judge.combined import Judge, calibrated
from dream.judge.gold import halves, read_gold
from dream.judge.planted import planted
from dream.records import ContrastPair
from dream.store import RoundStore
from dream.templates import Template, load_all


def training_templates() -> list[Template]:
    """Those that the loop dreams of."""
    return [template for template in load_all() if template.front.split == "train"]


async def calibrated_judge(engine: Engine | None, config: Config, templates: Sequence[Template]) -> Judge:
    """A judge of the gold set and of the training templates' worked replies."""
    trained = [template for template in templates if template.front.split == "train"]
    calibrate, test = halves([labelled for _, labelled in read_gold()])
    return await calibrated(
        engine, config, calibrate, planted(trained, config.judge.self_test_replies, config.seed), test
    )


async def dream_round(
    engine: Engine, judge: Judge, templates: Sequence[Template], config: Config
) -> tuple[float, RoundDreamer, list[ContrastPair]]:
    """The seconds that round 1 took, its dreamer and its pairs."""
    with tempfile.TemporaryDirectory() as folder:
        store = RoundStore(Path(folder) / "round_01")
        began = time.perf_counter()
        dreamer = RoundDreamer(engine, judge, store, templates, config, round_number=1, policy="bench", embed=minilm())
        await dreamer.run()
        seconds = time.perf_counter() - began
        pairs = list(store.pairs)
        store.close()
    return seconds, dreamer, pairs
