"""Engines in place of Ray actors, in this process: the pool's own code runs, and faults cost milliseconds."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from dream.config import EngineConfig
from dream.pool import EnginePool, _EngineActor


class Actor:
    """`actor.method.remote(...)` is awaited as with Ray; once it is killed all its calls end as with a dead actor."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._inside, self._death = _EngineActor(factory), asyncio.get_running_loop().create_future()
        self._inside._engine.die = self.kill

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self._call(getattr(self._inside, method), *arguments))

    def kill(self, error: Exception | None = None) -> None:
        """Ends it, from outside or, as `engine.die`, from within; its calls then raise `error`."""
        if not self._death.done():
            self._death.set_result(error or RayActorError())

    async def _call(self, method: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        work = asyncio.ensure_future(method(*arguments))
        try:
            await asyncio.wait({work, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                raise self._death.result()
            return work.result()
        finally:
            work.cancel()


def local_pool(patch: pytest.MonkeyPatch, factory: Callable[[], Any], **config: Any) -> EnginePool:
    """A pool whose engines live here; `config` as in `engine`."""
    patch.setattr(EnginePool, "_new_actor", lambda pool: Actor(pool._factory))
    patch.setattr("dream.pool.ray.kill", lambda actor: actor.kill())
    return EnginePool(factory, EngineConfig(**config))
