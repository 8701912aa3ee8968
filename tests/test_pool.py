"""dream/pool.py, dream/vllm_engine.py: what Ray and vLLM are asked for, and restarts of toy engines in real actors."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dream import pool as pool_module
from dream.config import EngineConfig
from dream.engine import Completion, EngineStats, Sampling
from dream.errors import ConfigError, EngineError
from dream.pool import EnginePool, actor_resources, connect
from dream.records import user
from dream.vllm_engine import EngineDied, VLLMEngine, engine_arguments, prepare_cpu_environment


def test_gpu_engine_asks_for_its_gpus() -> None:
    """Tensor parallel engines get that many GPUs, CPU engines none."""
    config = EngineConfig(tensor_parallel=4)
    assert actor_resources(config, on_gpu=True) == {"num_cpus": 1, "num_gpus": 4}
    assert actor_resources(config, on_gpu=False) == {"num_cpus": 1}


def test_vllm_gets_the_configuration_and_no_remote_code() -> None:
    """On a GPU vLLM gets parallelism and memory, on a CPU eager mode and small cache blocks; remote code stays off."""
    config = EngineConfig(tensor_parallel=2, dtype="bfloat16", gpu_memory_utilization=0.7)
    gpu, cpu = (engine_arguments("m", config, seed=3, on_gpu=on_gpu) for on_gpu in (True, False))
    assert (gpu["tensor_parallel_size"], gpu["gpu_memory_utilization"], gpu["seed"]) == (2, 0.7, 3)
    assert gpu["enable_sleep_mode"] is True
    assert "enable_sleep_mode" not in cpu
    assert engine_arguments("m", EngineConfig(sleep_level=0), 1, on_gpu=True)["enable_sleep_mode"] is False
    assert (cpu["enforce_eager"], cpu["block_size"]) == (True, 32)
    assert "tensor_parallel_size" not in cpu
    assert gpu["trust_remote_code"] is cpu["trust_remote_code"] is False


class SleepingEngine:
    """vLLM's engine as far as sleep goes: what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    async def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake {' '.join(tags)}")

    async def collective_rpc(self, method: str, **_: Any) -> None:
        self.told.append(method)

    async def reset_prefix_cache(self) -> None:
        self.told.append("reset")


@pytest.mark.parametrize("sleeps", [True, False])
def test_engine_sleeps_while_a_step_trains(sleeps: bool) -> None:
    """A GPU's engine forgets its weights for training and gets the new ones before its cache; a CPU's keeps all."""
    engine = VLLMEngine("m", EngineConfig(), seed=1)
    engine._engine, engine._sleeps = SleepingEngine(), sleeps

    async def go() -> list[str]:
        for _ in range(2):  # a second time changes nothing
            await engine.rest()
        await engine.load_weights(Path("new"))
        await engine.load_weights(Path("newer"))
        return engine._engine.told

    loading = ["reload_weights", "pack_vocabulary"]
    first = ["sleep 2", "wake weights", *loading, "wake kv_cache", "reset"] if sleeps else [*loading, "reset"]
    assert asyncio.run(go()) == [*first, *loading, "reset"]


def test_engine_that_died_at_rest_says_so() -> None:
    """Its death shows when it is to load weights, or to rest; the pool then starts another, as it does for a call."""
    from vllm.v1.engine.exceptions import EngineDeadError

    class Dead(SleepingEngine):
        async def sleep(self, level: int) -> None:
            raise EngineDeadError

        async def collective_rpc(self, method: str, **_: Any) -> None:
            raise EngineDeadError

    engine = VLLMEngine("m", EngineConfig(), seed=1)
    engine._engine, engine._sleeps = Dead(), True
    for call in (engine.rest(), engine.load_weights(Path("new"))):
        with pytest.raises(EngineDied):
            asyncio.run(call)


def test_released_engine_is_shut_down_to_rest() -> None:
    """vLLM ends its own processes before the actor is killed, whatever its sleep level."""
    told: list[str] = []
    engine = VLLMEngine("m", EngineConfig(release=True), seed=1)
    engine._engine, engine._sleeps = SimpleNamespace(shutdown=lambda: told.append("shutdown")), True
    asyncio.run(engine.rest())
    assert told == ["shutdown"]


def test_cpu_engine_uses_every_core_and_one_process() -> None:
    """vLLM keeps a core back by default and has a process for its worker; here all that the process may use are bound
    and the engine is its own worker."""
    environment = prepare_cpu_environment(3, [0, 1, 5])
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_ENABLE_V1_MULTIPROCESSING"]) == ("3", "0")
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,5"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"


def fragile(deaths: Path, times: int) -> Callable[[], Any]:
    """Makes engines that die in their first call until `times` deaths are written to a file."""

    class Fragile:  # inside the function, so that Ray ships it by value
        async def start(self, weights: Path | None = None) -> None:
            self.weights = weights

        async def generate(self, messages: Sequence[Any], sampling: Sampling) -> list[Completion]:
            if deaths.stat().st_size < times:
                with deaths.open("a") as file:
                    file.write("x")
                raise EngineDied("gone")
            return [Completion(str(self.weights), 1, "stop")]

        async def score(self, messages: Sequence[Any], replies: Sequence[str]) -> list[list[float]]:
            return [[-1.0] for _ in replies]

        async def load_weights(self, folder: Path | None) -> None:
            self.weights = folder

        async def rest(self) -> None:
            pass

        async def stats(self) -> EngineStats:
            return EngineStats(generated_tokens=1)

    return Fragile


@pytest.mark.parametrize("times", [1, 3])
def test_dead_engine_is_replaced_and_its_requests_are_answered(tmp_path: Path, times: int) -> None:
    """Requests in flight when an engine dies are tried again on a new one, which serves the same weights."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    connect(None)

    async def go() -> tuple[list[list[Completion]], int]:
        async with EnginePool(fragile(deaths, times), EngineConfig(max_restarts=3)) as pool:
            await pool.load_weights(Path("weights"))
            calls = [pool.generate([user(str(number))], Sampling()) for number in range(4)]
            return await asyncio.gather(*calls), pool.restarts

    answers, restarts = asyncio.run(go())
    assert [answer[0].text for answer in answers] == ["weights"] * 4
    assert 1 <= restarts <= 3


def test_engine_that_dies_again_and_again_ends_the_run_with_a_message(tmp_path: Path) -> None:
    """After max_restarts the pool gives up and says what to do."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    connect(None)

    async def go() -> None:
        async with EnginePool(fragile(deaths, 100), EngineConfig(max_restarts=1)) as pool:
            await pool.generate([user("a")], Sampling())

    with pytest.raises(EngineError, match=r"max_restarts.*the run can be continued"):
        asyncio.run(go())


def test_each_engine_has_restarts_of_its_own(tmp_path: Path) -> None:
    """Two engines that die once each are both started again, though each may only once."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    connect(None)

    async def go() -> tuple[list[list[Completion]], int]:
        async with EnginePool(fragile(deaths, 0), EngineConfig(replicas=2, max_restarts=1)) as pool:
            await pool.generate([user("a")], Sampling())
            for replica in pool._replicas:
                while replica.down:
                    await asyncio.sleep(0.1)
                ray.kill(replica.actor)
            calls = [pool.generate([user(str(number))], Sampling()) for number in range(4)]
            return await asyncio.gather(*calls), pool.restarts

    answers, restarts = asyncio.run(asyncio.wait_for(go(), 120))
    assert (len(answers), restarts) == (4, 2)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> int:
    """The processors of the machine, of which an engine asks for all."""
    connect(None)
    found = int(ray.cluster_resources()["CPU"])
    monkeypatch.setattr(pool_module, "actor_resources", lambda config, on_gpu: {"num_cpus": found})
    return found


def test_pool_opens_with_the_first_engine_and_says_what_the_others_wait_for(
    tmp_path: Path, everything: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine without a place keeps nobody waiting."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    monkeypatch.setattr(pool_module, "PLACE_S", 1.0)

    async def go() -> list[list[Completion]]:
        async with EnginePool(fragile(deaths, 0), EngineConfig(replicas=2)) as pool:
            answers = await asyncio.gather(*(pool.generate([user(str(number))], Sampling()) for number in range(8)))
            while not caplog.records:
                await asyncio.sleep(0.1)
            return answers

    assert len(asyncio.run(asyncio.wait_for(go(), 120))) == 8
    assert f"it needs a node with {everything} CPU, 0 GPU; free in the whole cluster: 0 CPU" in caplog.text


def test_engine_without_a_place_on_this_machine_is_an_error(
    tmp_path: Path, everything: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node will join, so that a judge's engine beside one that has it all would wait for ever."""
    deaths = tmp_path / "deaths"
    deaths.touch()
    monkeypatch.setattr(pool_module, "PLACE_S", 1.0)

    async def go() -> None:
        first, second = (
            EnginePool(fragile(deaths, 0), EngineConfig(start_timeout_s=20), grows=False) for _ in range(2)
        )
        async with first, second:
            pass

    said = rf"^an engine needs {everything} CPU, 0 GPU, and this machine had 0 CPU, 0 GPU free; .*judge\.server$"
    with pytest.raises(ConfigError, match=said):
        asyncio.run(asyncio.wait_for(go(), 120))


def test_released_engines_leave_their_places_until_they_have_new_weights(tmp_path: Path, everything: int) -> None:
    """While they rest Ray has what they took to give away; afterwards they are all back and the figures go on."""
    deaths = tmp_path / "deaths"
    deaths.touch()

    @ray.remote(num_cpus=everything)
    def work() -> str:
        return "trained"

    async def go() -> tuple[str, str, EngineStats]:
        async with EnginePool(fragile(deaths, 0), EngineConfig(release=True)) as pool:
            await pool.generate([user("a")], Sampling())
            await pool.rest()
            trained = await work.remote()
            await pool.load_weights(Path("new"))
            answer = await pool.generate([user("a")], Sampling())
            return trained, answer[0].text, await pool.stats()

    assert asyncio.run(asyncio.wait_for(go(), 120)) == ("trained", "new", EngineStats(generated_tokens=2))
