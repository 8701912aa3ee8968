"""Two Ray nodes beside one: `python -P -m tests.bench.two_nodes`. Its log: docs/LOG.md, "Two nodes".

Real raylets, each with room for one scripted engine, which answers a few calls at a time as an engine with a model
does. Dreams the same round on one node, on both, and on one that the second joins on the way.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from dream.config import Config, load
from dream.judge.combined import Judge
from dream.paths import data_folder
from dream.pool import EnginePool, connect
from dream.templates import Template
from tests.bench.dreaming import calibrated_judge, dream_round, training_templates
from tests.bench.scripted import worked_engine

PAIRS = 64
AT_ONCE = 4
DELAY_S = 0.25
"""A call takes this long and an engine takes `AT_ONCE` calls at once, so that one makes 16 a second."""
JOINS_AFTER_S = 10.0


def limited(config: Config) -> Callable[[], Any]:
    """Makes engines that answer a few calls at a time and say, by their statistics, how many they answered."""

    class Limited:  # inside the function, so that Ray ships it by value
        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        async def start(self, weights: Path | None = None) -> None:
            self._engine: Any = worked_engine(training_templates(), config, 20 + PAIRS // 3, DELAY_S)
            self._room = asyncio.Semaphore(AT_ONCE)

        async def generate(self, *arguments: Any) -> Any:
            async with self._room:
                return await self._engine.generate(*arguments)

    return Limited


async def dreamed(
    name: str, cluster: Cluster, replicas: int, judge: Judge, templates: list[Template], config: Config, joins: bool
) -> tuple[float, set[str]]:
    """The seconds a round took, and its pairs as texts."""
    engine = config.engine.model_copy(update={"replicas": replicas})
    async with EnginePool(limited(config), engine) as pool:

        async def join() -> None:
            await asyncio.sleep(JOINS_AFTER_S)
            cluster.add_node(num_cpus=1)
            print(f"  a node joined after {JOINS_AFTER_S:.0f} s", flush=True)

        joining = asyncio.ensure_future(join()) if joins else None
        while pool.up < (1 if joins else replicas):
            await asyncio.sleep(0.1)
        seconds, _, pairs = await dream_round(pool, judge, templates, config)
        if joining:
            await joining
        tokens = (await pool.stats()).generated_tokens
    said = {f"{row.prompt} {row.chosen} {row.rejected}" for pair in pairs for row in (pair.clear, pair.flawed)}
    print(
        f"{name}: {len(pairs)} pairs, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", flush=True
    )
    return seconds, said


async def compare() -> bool:
    """Whether both rounds gave the same pairs."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    config = config.model_copy(update={"generate": config.generate.model_copy(update={"pairs": PAIRS})})
    templates = training_templates()
    judge = await calibrated_judge(None, config, templates)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        connect(cluster.address)
        few = config.model_copy(update={"generate": config.generate.model_copy(update={"pairs": 2})})
        await dreamed("unmeasured, to be warm", cluster, 1, judge, templates, few, joins=False)
        one, pairs = await dreamed("one node", cluster, 1, judge, templates, config, joins=False)
        await dreamed("one node, and one that joins", cluster, 2, judge, templates, config, joins=True)
        cluster.wait_for_nodes()
        two, same = await dreamed("two nodes", cluster, 2, judge, templates, config, joins=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(f"two nodes are {one / two:.2f} times as fast; same pairs: {pairs == same}")
    return pairs == same


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(compare()) else 1)
