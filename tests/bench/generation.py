"""Dreaming beside other ways of getting the same tokens from the same model, in generated tokens a second.

Ours is `dream generate` without its start: scenarios, judge, filters, store and audit included. Beside it:

- `generate_vs_staged`: the same, but with a barrier: no scenario goes on before all that are under way can.
- `generate_vs_raw_vllm`: vLLM alone, given all of ours' requests at once.
- `generate_vs_hf`: Hugging Face `generate`, given a part of ours' requests in batches of like length.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dream.config import Config, load
from dream.engine import Completion, Engine, EngineStats, Sampling
from dream.judge.combined import Judge
from dream.models import resolve
from dream.paths import data_folder
from dream.pool import vllm_pool
from dream.records import Message
from dream.templates import Template, load_all
from tests.bench import Row, paired_rates
from tests.bench.dreaming import calibrated_judge, dream_round

PAIRS = 64
"""Half of what `configs/cpu-coffee.yaml` dreams, so that three runs of all four ways take less than an hour; the
beginning and the end of a round, when few scenarios are under way, are a larger part here than there."""
HF_SHARE = 6
"""Hugging Face gets every sixth request, which is enough for a rate."""
HF_BATCH = 32


class Request(NamedTuple):
    """One request that the pipeline made, and the tokens it got for each of its samples."""

    messages: list[Message]
    sampling: Sampling
    tokens: list[int]


class Recording:
    """An `Engine` that hands everything on and remembers the requests that generate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests: list[Request] = []
        self.under_way_s = 0.0
        """The times of all requests together: divided by a run's seconds, how many were under way on average."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        began = time.perf_counter()
        completions = await self._engine.generate(messages, sampling)
        self.under_way_s += time.perf_counter() - began
        self.requests.append(Request(list(messages), sampling, [one.tokens for one in completions]))
        return completions

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        return await self._engine.score(messages, replies)

    async def load_weights(self, folder: Path | None) -> None:
        await self._engine.load_weights(folder)

    async def rest(self) -> None:
        await self._engine.rest()

    async def stats(self) -> EngineStats:
        return await self._engine.stats()


class Staged(Recording):
    """The same with a barrier, as pipelines work that take a batch through one stage after the other: requests are held
    back until nobody can go on without an answer, and answered when the last of them is done."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._held = 0
        self._batch: asyncio.Future[None] | None = None
        self._unanswered = 0
        self._answered = asyncio.Event()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        await self._start_together()
        self._unanswered += 1
        answered = self._answered
        try:
            completions = await super().generate(messages, sampling)
        finally:
            self._unanswered -= 1
            if not self._unanswered:
                answered.set()
                self._answered = asyncio.Event()
        await answered.wait()
        return completions

    async def _start_together(self) -> None:
        if self._unanswered:  # a stage is under way: this request belongs to the next
            await self._answered.wait()
        self._held += 1
        if self._batch is None:
            self._batch = asyncio.ensure_future(self._when_all_wait())
        await asyncio.shield(self._batch)

    async def _when_all_wait(self) -> None:
        seen = -1
        while seen != self._held:
            seen = self._held
            await asyncio.sleep(0.02)  # time enough for judge and filters of whoever was answered last
        self._held, self._batch = 0, None


class Dreamed(NamedTuple):
    """What a run of the pipeline took and asked for; `cached` is the share of its prompt tokens that the prefix cache
    had, `under_way` how many requests the engine had on average."""

    seconds: float
    requests: list[Request]
    cached: float
    under_way: float

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return sum(sum(request.tokens) for request in self.requests) / self.seconds


async def dreamed(engine: Recording, judge: Judge, templates: list[Template], config: Config) -> Dreamed:
    """One round of `config.generate.pairs` pairs into a folder that is thrown away, from an empty prefix cache."""
    await engine.load_weights(None)  # empties it: steering prompts are the same in every round
    before = await engine.stats()
    seconds, _, _ = await dream_round(engine, judge, templates, config)
    after = await engine.stats()
    cached = (after.cached_tokens - before.cached_tokens) / max(1, after.prompt_tokens - before.prompt_tokens)
    return Dreamed(seconds, engine.requests, cached, engine.under_way_s / seconds)


@asynccontextmanager
async def pipeline(config: Config, model: str) -> AsyncIterator[tuple[Engine, Judge, list[Template]]]:
    """The engine pool and the judge, both warm."""
    templates = load_all()
    async with vllm_pool(config, model) as pool:
        judge = await calibrated_judge(pool, config, templates)
        few = config.model_copy(update={"generate": config.generate.model_copy(update={"pairs": 2})})
        await dreamed(Recording(pool), judge, templates, few)
        yield pool, judge, templates


async def ours_and_staged(config: Config, model: str) -> tuple[Dreamed, Dreamed]:
    """Both in turn on one engine, with other draws."""
    found = []
    async with pipeline(config, model) as (engine, judge, templates):
        for number, kind in enumerate((Recording, Staged)):
            seeded = config.model_copy(update={"seed": config.seed + number})
            one = await dreamed(kind(engine), judge, templates, seeded)
            print(
                f"{kind.__name__}: {one.rate:.1f} tokens/s in {len(one.requests)} requests, {one.seconds:.0f} s, "
                f"{one.under_way:.0f} under way, {one.cached:.0%} of prompt tokens cached",
                file=sys.stderr,
            )
            found.append(one)
    return found[0], found[1]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """A chat prompt as the engine sees it."""
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


async def raw_rate(config: Config, model: str, run: Sequence[Request]) -> float:
    """vLLM alone, with the engine arguments of the product: all requests at once, to the same lengths."""
    # In a Ray actor, as ours: the environment of an engine is read at the start of its process.
    import ray

    from dream.pool import connect

    connect(None)
    rate: float = await ray.remote(_raw_rate).remote(config.model_dump(), model, list(run))
    return rate


def _raw_rate(raw: dict[str, Any], model: str, run: list[Request]) -> float:
    from dream.vllm_engine import engine_arguments, prepare_cpu_environment

    config = Config.model_validate(raw)
    environment = prepare_cpu_environment(config.engine.cpu_kv_cache_gib, sorted(os.sched_getaffinity(0)))
    # `LLM` would run its engine in this process, whose threads Ray has limited to one.
    os.environ.update(environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    from vllm import LLM, SamplingParams

    engine = LLM(**engine_arguments(model, config.engine, config.seed, on_gpu=False))
    tokenizer = engine.get_tokenizer()
    prompts = [{"prompt_token_ids": prompt_ids(tokenizer, one.messages)} for one in run for _ in one.tokens]
    wanted = [
        SamplingParams(
            max_tokens=count, min_tokens=count, ignore_eos=True,
            temperature=one.sampling.temperature, top_p=one.sampling.top_p, min_p=one.sampling.min_p,
        )
        for one in run for count in one.tokens
    ]  # fmt: skip
    engine.generate(prompts[:2], wanted[:2], use_tqdm=False)
    engine.reset_prefix_cache()
    began = time.perf_counter()
    engine.generate(prompts, wanted, use_tqdm=False)
    return sum(one.max_tokens or 0 for one in wanted) / (time.perf_counter() - began)


def hf_rate(config: Config, model: str, run: Sequence[Request]) -> float:
    """Hugging Face `generate` on a part of the requests, sorted by length, each batch to its longest reply; counted are
    the tokens that the pipeline got."""
    import torch

    from train.checkpoints import load_model, load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the judge's embedding leaves one
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    tokenizer.padding_side = "left"
    loaded = load_model(model, getattr(torch, config.engine.dtype), trust_remote_code=False).eval()
    part = [(prompt_ids(tokenizer, one.messages), count) for one in run[::HF_SHARE] for count in one.tokens]
    part.sort(key=lambda one: (len(one[0]), one[1]))
    began = time.perf_counter()
    for start in range(0, len(part), HF_BATCH):
        batch = part[start : start + HF_BATCH]
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt")
        longest = max(count for _, count in batch)
        with torch.inference_mode():
            loaded.generate(**padded, max_new_tokens=longest, min_new_tokens=longest, do_sample=True)
    return sum(count for _, count in part) / (time.perf_counter() - began)


def measure() -> list[Row]:
    """The three rows, from one run of the pipeline."""
    config, _ = load(data_folder("configs") / "cpu.yaml")
    config = config.model_copy(update={"generate": config.generate.model_copy(update={"pairs": PAIRS})})
    model = resolve(config.model)
    ours, staged = asyncio.run(ours_and_staged(config, model))
    raw = asyncio.run(raw_rate(config, model, ours.requests))
    face = hf_rate(config, model, ours.requests)
    others = (
        ("generate_vs_raw_vllm", raw, 0.9),
        ("generate_vs_staged", staged.rate, 1.3),
        ("generate_vs_hf", face, 3.0),
    )
    return [paired_rates(name, [ours.rate], [other], target=least, unit="tokens/s") for name, other, least in others]
