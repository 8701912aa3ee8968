"""New weights in a running engine beside an engine that is started with them, in seconds until the first token."""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import torch

from dream.config import Config, load
from dream.engine import Engine, Sampling
from dream.models import resolve
from dream.paths import data_folder
from dream.pool import vllm_pool
from dream.records import user
from tests.bench import Row
from train.checkpoints import load_model, load_tokenizer

RELOADS = 3
WANTED_S = 1.0
"""What the embedded model's weights may take."""


async def first_token(engine: Engine) -> None:
    """Waits for one token."""
    await engine.generate([user("Say yes.")], Sampling(max_tokens=1))


async def seconds(config: Config, model: str, weights: Path) -> tuple[float, float]:
    """Of one reload (the median) and of one start, both to the first token."""
    began = time.perf_counter()
    async with vllm_pool(config, model) as pool:
        await first_token(pool)
        start = time.perf_counter() - began
        reloads = []
        for _ in range(RELOADS):
            began = time.perf_counter()
            await pool.load_weights(weights)
            await first_token(pool)
            reloads.append(time.perf_counter() - began)
    print(f"reloads {reloads}, start {start:.1f} s", file=sys.stderr)
    return sorted(reloads)[RELOADS // 2], start


def measure() -> list[Row]:
    """The row; its target is the ratio at which a reload takes `WANTED_S`."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    model = resolve(config.model)
    with tempfile.TemporaryDirectory() as folder:
        load_model(model, getattr(torch, config.engine.dtype), trust_remote_code=False).save_pretrained(folder)
        load_tokenizer(model, trust_remote_code=False).save_pretrained(folder)
        reload, start = asyncio.run(seconds(config, model, Path(folder)))
    name = Path(__file__).stem
    return [Row(name=name, ours=reload, other=start, ratio=start / reload, target=start / WANTED_S, unit="s")]
