"""The pool of engines, one per Ray actor.

The pool is itself an `Engine`, whose calls travel together (`dream.link`): it routes each call to the least loaded
actor that is up, starts a dead or silent one again with the weights that are being served, and makes the calls that
were in flight again, on another where one is up.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private import ray_constants
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from dream.config import Config, EngineConfig
from dream.engine import Completion, Engine, EngineStats, Sampling
from dream.errors import ConfigError, DreamError, EngineError, one_line
from dream.link import Answer, Call, CallTaker, Link
from dream.records import Message
from dream.vllm_engine import EngineDied, VLLMEngine


class StartableEngine(Engine, Protocol):
    """An engine that is started inside its actor."""

    async def start(self, weights: Path | None = None) -> None:
        """Brings the engine up, serving `weights` if given."""


EngineFactory = Callable[[], StartableEngine]
PLACE_S = 30.0
"""How long an engine waits for a place before that is said."""
GONE = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises where an actor or its node is lost; the memory monitor's kill comes as an error of its own."""


def actor_resources(config: EngineConfig, on_gpu: bool) -> dict[str, Any]:
    """What Ray is asked for, per engine."""
    if on_gpu:
        return {"num_cpus": 1, "num_gpus": config.tensor_parallel}
    return {"num_cpus": 1}


def connect(address: str | None) -> None:
    """Joins a Ray cluster, or starts one on this machine that listens on loopback only, whatever others there are.

    Raises:
        ConfigError: there is no cluster at the address, or it does not let this program join.
        EngineError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address:
            ray.init(address=address, **common)
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")  # of 15 by default: the engine would wait for all else
            # Where clusters are possible, Ray makes the machine's own address of 127.0.0.1 and listens on all of them.
            ray_constants.ENABLE_RAY_CLUSTER = False
            local = {"address": "local", "object_store_memory": 256 * 2**20, "_node_ip_address": "127.0.0.1"}
            ray.init(include_dashboard=False, **local, **common)
    except Exception as error:  # of many kinds, by what is wrong
        said = one_line(error)[:300]
        if address:
            raise ConfigError(f"ray.address: {address!r} cannot be joined: {said}") from error
        raise EngineError(f"Ray does not start on this machine: {type(error).__name__}: {said}") from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process where it stands


class _EngineActor:
    """Runs one engine inside a Ray actor."""

    def __init__(self, factory: EngineFactory) -> None:
        self._engine = factory()
        self._calls = CallTaker(self._engine)

    async def placed(self) -> None:
        """Answers as soon as there is an actor."""

    async def take(self, calls: list[Call]) -> None:
        self._calls.take(calls)

    async def answers(self) -> list[Answer]:
        return await self._calls.answers()


class _Replica:
    def __init__(self, actor: Any) -> None:
        self.in_flight = 0
        self.restarts = 0
        self.coming: asyncio.Task[None] | None = None
        self.put(actor)

    def put(self, actor: Any) -> None:
        """A new actor, or another in the place of a lost or ended one."""
        self.actor = actor
        self.link = Link(actor.take.remote, actor.answers.remote)
        self.ended = False

    def end(self) -> None:
        """Ends the actor, and its start where it is still under way."""
        if self.coming is not None:
            self.coming.cancel()
        ray.kill(self.actor)
        self.ended = True

    @property
    def down(self) -> bool:
        """Whether it is being started, for the first time or in the place of a lost one."""
        return self.coming is not None and not self.coming.done()

    @property
    def up(self) -> bool:
        """Whether it was started and, as far as is known, answers."""
        if self.ended or self.coming is None or not self.coming.done() or self.coming.cancelled():
            return False
        return self.coming.exception() is None


class _Lost(Exception):
    """A call was lost with its engine, which is being replaced."""


class EnginePool:
    """An `Engine` over `config.replicas` actors, spread over the cluster; use it as an async context manager.

    It is open as soon as one engine is up. The others join when they are, be it after the node that has room for them.
    With `config.release` they end to rest, and start anew with the next weights; so does, in any case, an engine that
    is still being started then.
    """

    def __init__(self, factory: EngineFactory, config: EngineConfig, *, grows: bool = True) -> None:
        """`grows`: whether nodes may join the cluster, so that it is worth waiting for one with room."""
        self._factory, self._config, self._grows = factory, config, grows
        self._replicas: list[_Replica] = []
        self._weights: Path | None = None
        self._opened = False
        self._counted = EngineStats()  # of engines that were released

    @property
    def restarts(self) -> int:
        """How often an engine was started in the place of a lost one."""
        return sum(replica.restarts for replica in self._replicas)

    async def __aenter__(self) -> "EnginePool":
        self._replicas = [_Replica(self._new_actor()) for _ in range(self._config.replicas)]
        await self._bring_up(self._replicas)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    async def _bring_up(self, replicas: Sequence[_Replica]) -> None:
        """Starts engines and, where none is up, waits for the first; all end where that fails.

        An engine that fails to start is started again once one was up; before that its configuration is more likely at
        fault than its node.
        """
        starts = []
        for replica in replicas:
            replica.coming = asyncio.ensure_future(self._come_up(replica))
            starts.append(replica.coming)
        if not starts or self.up:
            return
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
            for start in done:
                start.result()
            self._opened = True
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        for replica in self._replicas:
            replica.end()

    def _end_starts(self) -> None:
        for replica in self._replicas:
            if replica.down:
                replica.end()

    @property
    def up(self) -> int:
        """How many engines answer now."""
        return sum(replica.up for replica in self._replicas)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        completions: list[Completion] = await self._call("generate", messages, sampling)
        return completions

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        scores: list[list[float]] = await self._call("score", messages, replies)
        return scores

    async def load_weights(self, folder: Path | None) -> None:
        """Loads weights into every engine; one that is being started, or is started again later, gets them too."""
        self._weights = folder
        await self._each("load_weights", folder)
        ended = [replica for replica in self._replicas if replica.ended]
        for replica in ended:
            replica.put(self._new_actor())
        await self._bring_up(ended)

    async def rest(self) -> None:
        """Lets every engine rest. With `config.release` all of them end, else those that are still being started,
        which could not be told to rest once they are up: a step that trains keeps the event loop."""
        if self._config.release:
            self._counted = await self.stats()
        self._end_starts()
        await self._each("rest")
        if self._config.release:
            self._close()
        else:
            self._end_starts()  # of those that were lost just now

    async def stats(self) -> EngineStats:
        """Of the engines that are up and of released ones; one that was lost and started again counts from zero."""
        return sum(await self._each("stats"), self._counted)

    async def _each(self, method: str, *arguments: Any) -> list[Any]:
        """What the engines that are up answer, in turn; one that is lost meanwhile is left out."""
        answers = []
        for replica in self._replicas:
            if not replica.down and not replica.ended:
                with suppress(_Lost):
                    answers.append(await self._once(replica, method, *arguments))
        return answers

    def _new_actor(self) -> Any:
        options = {"max_concurrency": 4096, "scheduling_strategy": "SPREAD", **self._resources()}
        return ray.remote(_EngineActor).options(**options).remote(self._factory)

    def _resources(self) -> dict[str, Any]:
        return actor_resources(self._config, on_gpu=bool(ray.cluster_resources().get("GPU")))

    async def _come_up(self, replica: _Replica) -> None:
        try:
            await self._start(replica)
        except EngineError as error:
            if not self._opened:
                raise
            await self._replace(replica, error)

    async def _start(self, replica: _Replica) -> None:
        try:
            await self._placed(replica.actor)
            async with asyncio.timeout(self._config.start_timeout_s):
                loaded = self._weights
                await replica.link.call("start", loaded)
                while loaded != self._weights:  # the pool was given others meanwhile
                    loaded = self._weights
                    await replica.link.call("load_weights", loaded)
        except GONE as error:
            raise EngineError(f"the engine's process ended while it started: {error}") from error
        except TimeoutError as error:
            raise EngineError(
                f"the engine did not start in {self._config.start_timeout_s:g} s (engine.start_timeout_s)"
            ) from error
        except DreamError:
            raise
        except Exception as error:
            raise EngineError(f"the engine did not start: {_said(error)}") from error

    async def _placed(self, actor: Any) -> None:
        """Waits until Ray has found a node for an actor, and says so when that takes long.

        Raises:
            ConfigError: in all the time for a start there was no room for the first engine, and no node will join.
        """
        place = asyncio.ensure_future(actor.placed.remote())
        if not (await asyncio.wait([place], timeout=PLACE_S))[0]:
            needed, free = _listed(self._resources()), _listed(ray.available_resources())
            logging.getLogger("dream").warning(
                "an engine is not up yet: it needs a node with %s; free in the whole cluster: %s", needed, free
            )
            last_chance = None if self._grows or self._opened else self._config.start_timeout_s
            if not (await asyncio.wait([place], timeout=last_chance))[0]:
                raise ConfigError(
                    f"an engine needs {needed}, and this machine had {free} free; lower engine.tensor_parallel, or, "
                    "for a judge.model beside the policy, ask a judge.server"
                )
        await place

    async def _call(self, method: str, *arguments: Any) -> Any:
        while there := [replica for replica in self._replicas if not replica.ended]:
            replica = min(there, key=lambda candidate: (candidate.down, candidate.in_flight))
            with suppress(_Lost):
                return await self._once(replica, method, *arguments)
        raise EngineError("the engines have ended to rest; they answer when weights are loaded")

    async def _once(self, replica: _Replica, method: str, *arguments: Any) -> Any:
        """One call, when the replica is up.

        Raises:
            _Lost: the engine died or said nothing in time, and is being replaced.
            EngineError: it could not be replaced, or failed at the call; `CallRefused` where it would not answer it.
        """
        if replica.coming is not None:
            await asyncio.shield(replica.coming)
        actor = replica.actor
        replica.in_flight += 1
        try:
            return await asyncio.wait_for(replica.link.call(method, *arguments), self._config.request_timeout_s)
        except (*GONE, EngineDied, TimeoutError) as error:
            if replica.actor is actor and not replica.down and not replica.ended:
                replica.coming = asyncio.ensure_future(self._replace(replica, error))
            raise _Lost from error
        except DreamError:
            raise
        except Exception as error:
            raise EngineError(f"an engine failed at a call: {_said(error)}") from error
        finally:
            replica.in_flight -= 1

    async def _replace(self, replica: _Replica, reason: BaseException) -> None:
        """Starts an engine in the place of a lost one; again where that is lost too, as on a node that is going."""
        while True:
            if replica.restarts >= self._config.max_restarts:
                raise EngineError(
                    f"an engine died again after {replica.restarts} restarts ({type(reason).__name__}: {reason}); "
                    "see the Ray logs, or raise engine.max_restarts; the run can be continued"
                )
            replica.restarts += 1
            logging.getLogger("dream").warning("engine lost (%s); starting it again", type(reason).__name__)
            ray.kill(replica.actor)
            replica.put(self._new_actor())
            try:
                return await self._start(replica)
            except EngineError as error:
                reason = error


def _listed(resources: Mapping[str, float]) -> str:
    """Processors and GPUs of Ray's resources, by whatever name Ray calls them there."""
    kept = {name.removeprefix("num_").upper().rstrip("S"): value for name, value in resources.items()}
    return ", ".join(f"{kept.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _said(error: Exception) -> str:
    """What an engine raised, in words."""
    return f"{type(error).__name__}: {error}"


def vllm_pool(config: Config, model: str) -> EnginePool:
    """The pool of real engines for a configuration; `model` is what `dream.models.resolve` returned."""
    connect(config.ray.address)
    engine, seed = config.engine, config.seed
    grows = config.ray.address is not None
    return EnginePool(lambda: VLLMEngine(model, engine, seed), engine, grows=grows)
