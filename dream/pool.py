"""The pool of engines, one per Ray actor. The only module that imports ray.

The pool is itself an `Engine`: it routes each call to the least loaded actor, starts a dead or silent one again with
the weights that are being served, and tries the calls that were in flight once more.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from dream.config import Config, EngineConfig
from dream.engine import Completion, Engine, EngineStats, Sampling
from dream.errors import DreamError, EngineError
from dream.records import Message
from dream.vllm_engine import EngineDied, VLLMEngine


class StartableEngine(Engine, Protocol):
    """An engine that is started inside its actor."""

    async def start(self, weights: Path | None = None) -> None:
        """Brings the engine up, serving `weights` if given."""


EngineFactory = Callable[[], StartableEngine]


def actor_resources(config: EngineConfig, on_gpu: bool) -> dict[str, Any]:
    """What Ray is asked for, per engine."""
    if on_gpu:
        return {"num_cpus": 1, "num_gpus": config.tensor_parallel}
    return {"num_cpus": 1}


def connect(address: str | None) -> None:
    """Joins a Ray cluster, or starts one on this machine that listens on loopback only."""
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        ray.init(address=address, **common)
    else:
        ray.init(include_dashboard=False, object_store_memory=256 * 2**20, _node_ip_address="127.0.0.1", **common)


class _EngineActor:
    """Runs one engine inside a Ray actor."""

    def __init__(self, factory: EngineFactory) -> None:
        self._engine = factory()

    async def start(self, weights: Path | None) -> None:
        await self._engine.start(weights)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        return await self._engine.generate(messages, sampling)

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        return await self._engine.score(messages, replies)

    async def load_weights(self, folder: Path | None) -> None:
        await self._engine.load_weights(folder)

    async def stats(self) -> EngineStats:
        return await self._engine.stats()


@dataclass
class _Replica:
    actor: Any
    in_flight: int = 0
    replaced: asyncio.Task[None] | None = None


class EnginePool:
    """An `Engine` over `config.replicas` actors; use it as an async context manager."""

    def __init__(self, factory: EngineFactory, config: EngineConfig) -> None:
        self._factory, self._config = factory, config
        self._replicas: list[_Replica] = []
        self._weights: Path | None = None
        self._before = EngineStats()
        self.restarts = 0

    async def __aenter__(self) -> "EnginePool":
        self._replicas = [_Replica(self._new_actor()) for _ in range(self._config.replicas)]
        await asyncio.gather(*(self._start(replica) for replica in self._replicas))
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in self._replicas:
            if replica.replaced is not None:
                replica.replaced.cancel()
            ray.kill(replica.actor)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        completions: list[Completion] = await self._call("generate", messages, sampling)
        return completions

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        scores: list[list[float]] = await self._call("score", messages, replies)
        return scores

    async def load_weights(self, folder: Path | None) -> None:
        """Loads weights into every engine; one that is started again later gets them too."""
        self._weights = folder
        for replica in list(self._replicas):
            await self._on(replica, "load_weights", folder)

    async def stats(self) -> EngineStats:
        total = EngineStats()
        for replica in list(self._replicas):
            total = total + await self._on(replica, "stats")
        return total

    def _new_actor(self) -> Any:
        on_gpu = bool(ray.cluster_resources().get("GPU"))
        options = {"max_concurrency": 4096, **actor_resources(self._config, on_gpu)}
        return ray.remote(_EngineActor).options(**options).remote(self._factory)

    async def _start(self, replica: _Replica) -> None:
        try:
            await replica.actor.start.remote(self._weights)
        except RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, DreamError) else EngineError(f"the engine did not start: {cause}")
            ) from error
        except RayActorError as error:
            raise EngineError(f"the engine's process ended while it started: {error}") from error

    async def _call(self, method: str, *arguments: Any) -> Any:
        replica = min(self._replicas, key=lambda candidate: candidate.in_flight)
        return await self._on(replica, method, *arguments)

    async def _on(self, replica: _Replica, method: str, *arguments: Any) -> Any:
        while True:
            if replica.replaced is not None:
                await asyncio.shield(replica.replaced)
            actor = replica.actor
            replica.in_flight += 1
            try:
                reference = getattr(actor, method).remote(*arguments)
                return await asyncio.wait_for(reference, self._config.request_timeout_s)
            except (RayActorError, EngineDied, TimeoutError) as error:
                if replica.actor is actor and (replica.replaced is None or replica.replaced.done()):
                    replica.replaced = asyncio.ensure_future(self._replace(replica, error))
            finally:
                replica.in_flight -= 1
            await asyncio.shield(replica.replaced) if replica.replaced else None

    async def _replace(self, replica: _Replica, reason: BaseException) -> None:
        if self.restarts >= self._config.max_restarts:
            raise EngineError(
                f"an engine died again after {self.restarts} restarts ({type(reason).__name__}: {reason}); "
                "see the Ray logs, or raise engine.max_restarts; the run can be continued"
            )
        self.restarts += 1
        logging.getLogger("dream").warning("engine lost (%s); starting it again", type(reason).__name__)
        ray.kill(replica.actor)
        replica.actor = self._new_actor()
        await self._start(replica)


def vllm_pool(config: Config, model: str) -> EnginePool:
    """The pool of real engines for a configuration; `model` is what `dream.models.resolve` returned."""
    connect(config.ray.address)
    engine, seed = config.engine, config.seed
    return EnginePool(lambda: VLLMEngine(model, engine, seed), engine)
