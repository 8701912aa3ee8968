"""The faults of docs/FAULTS.md that no other file tests: what is lost, what is done twice, what the user reads."""

import ast
import asyncio
import errno
import functools
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from actors import local_pool
from ray.cluster_utils import Cluster
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError
from test_generate import Round, check_every_scenario_ended_once, check_no_draw_twice
from test_judge_server import Answer, Fake, Server, measure, question
from test_judge_server import fake as fake

from dream import store
from dream.config import Config, EngineConfig, GenerateConfig, TrainConfig
from dream.engine import Completion, EngineStats, Sampling, ScriptedEngine
from dream.errors import EngineError, Stopped, StorageError, TrainingError, UserError
from dream.generate import FINISHING, Progress, RoundDreamer
from dream.pool import EnginePool, connect
from dream.records import Message, user
from dream.selfplay import LONGEST_TOKEN
from dream.stop import NOW, Stop
from dream.store import RoundStore, new_run_path
from dream.tasks import train_in_child
from dream.vllm_engine import EngineDied
from train.data import StepSpec

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "FAULTS.md"


def test_the_table_names_tests_that_exist() -> None:
    """Every row of docs/FAULTS.md names a test, and every named test is there."""
    rows = [line for line in TABLE.read_text().splitlines() if re.match(r"\| (?!fault \||---)", line)]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+)\.(\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}.{name}"


# Replies


GARBAGE = {
    "empty": "",
    "enormous": "lamps and chairs " * 60_000,
    "one enormous word": "x" * 1_000_000,
    "half characters": "Label: \ud83d lamps \udc80 on our shelves.",
    "zero bytes": "Label: 12 lamps\x00\x00 on our shelves.",
    "no text": "Label: \ufffd\ufffd lamps on our shelves.",
    "control tokens": "<|im_start|>assistant\nLabel<|im_end|> on our shelves.",
    "line ends of all kinds": "Label\r\n\u2028on\u2029our\x85shelves \x1e now.",
}
REASONS = {
    "empty": "too_short",
    "enormous": "cut_off",
    "one enormous word": "cut_off",
    "control tokens": "control_tokens",
}
"""What a verdict says of garbage that is not `garbled`."""


@pytest.fixture
def dream(tmp_path: Path, judge, tiny_templates, settings_with) -> Callable[..., Round]:
    """Dreams a round of six pairs, or goes on with it, with an engine."""

    def go(engine: Any, stop: Stop | None = None, look: Callable[[Progress], None] = lambda progress: None) -> Round:
        config: Config = settings_with(generate={"pairs": 6, "concurrency": 4})
        rounds, watch = RoundStore(tmp_path / "round_01"), stop or Stop()
        try:
            dreamer = RoundDreamer(
                engine, judge, rounds, tiny_templates, config,
                round_number=1, policy="base", on_progress=look, stop=watch,
            )  # fmt: skip
            watch.run(asyncio.wait_for(dreamer.run(), 60))
        finally:
            rounds.close()
        return Round(tmp_path / "round_01")

    return go


def check_whole(found: Round) -> None:
    """Six pairs, unique and complete, and every scenario has one end."""
    assert len(found.rows) == len({(row.pair_id, row.side) for row in found.rows}) == 12
    assert len(found.pairs) == 6
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_never_trained_on(dream, script, likelihood, kind: str) -> None:
    """Whatever every third answer is, of the dreamer too, the round ends with its pairs and none of it is in them; as a
    reply it is no longer than its tokens can be, and its verdict says what is wrong with it."""
    calls = iter(range(1_000_000))

    class Broken(ScriptedEngine):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
            if next(calls) % 3 == 1:
                return [Completion(GARBAGE[kind], 9, "stop")] * sampling.n
            return await super().generate(messages, sampling)

    found = dream(Broken(script, likelihood))
    check_whole(found)
    for row in [*found.rows, *found.general]:
        for message in [*row.prompt, *row.chosen, *row.rejected]:
            assert len(message["content"]) < 1_000
            assert not re.search("[\x00\ufffd]|<\\|", message["content"])
    assert REASONS.get(kind, "garbled") in {verdict.reason for verdict in found.verdicts.values()}
    longest = GenerateConfig().max_tokens * LONGEST_TOKEN
    assert all(len(reply.text) <= longest for reply in found.replies.values())
    for path in found.folder.glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            json.loads(line.decode("utf-8"))


def test_dreamer_that_writes_control_tokens_is_not_quoted(dream, script, likelihood) -> None:
    """A background sentence with a control token, hidden or not, or with garbled text stands before no direction."""
    odd = iter(range(1_000_000))
    insertions = ("<|im_end|>", "<|im\u200b_end|>", "\ufffd", "\x1b[2J")

    def write(messages: Sequence[Message], number: int) -> str:
        text = script(messages, number)
        return text.replace("stall", f"stall {insertions[next(odd) % 4]}") if "small stall" in text else text

    found = dream(ScriptedEngine(write, likelihood))
    check_whole(found)
    assert {scenario.background for scenario in found.scenarios} == {""}


# The remote judge


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"[" * 200_000),
        Answer(b"A" * 5_000_000),
        Answer(b"\xff\xfe\x00" * 100),
        Answer(b"not gzip", headers={"Content-Encoding": "gzip"}),
        Answer(gzip.compress(b"{"), headers={"Content-Encoding": "gzip"}),
        Answer({}, 302, {"Location": "/v1/chat/completions"}),
    ],
    ids=["nested", "enormous", "not UTF-8", "not gzip", "broken JSON", "redirects for ever"],
)
def test_nonsense_of_a_judge_is_no_verdict(fake: Fake, answer: Answer) -> None:
    """A body that cannot be read is no answer, whatever the parser makes of it."""
    fake.script = lambda asked: answer
    assert np.isnan(measure(fake.config())).all()


def test_judge_that_trickles_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that arrives byte by byte, each in time, does not hold a reply for ever."""
    monkeypatch.setattr("dream.judge.server.LONGEST_WAIT_S", 0.2)
    ended = asyncio.Event()

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not ended.is_set():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        writer.close()

    async def go() -> np.ndarray:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = fake.config(base_url=f"http://127.0.0.1:{port}/v1", timeout_s=1)
        try:
            return await asyncio.wait_for(Server(config).measure([question("Here: 15 lamps.")]), 30)
        finally:
            ended.set()
            server.close()

    assert np.isnan(asyncio.run(go())).all()


# The disk and the clock


@pytest.mark.parametrize("written", [0, 3, 8])
def test_disk_that_is_full_only_when_synced(dream, engine, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Where a full disk shows only now the command says so in a line, and given again it ends as it should."""
    left = iter(range(written))

    def sync(handle: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", sync)
        with pytest.raises(StorageError, match=r"\.jsonl: No space left on device; make room .* same command again"):
            dream(engine)
    check_whole(dream(engine))


def test_pair_that_did_not_reach_the_disk_is_taken_back(tmp_path: Path, make_pair, monkeypatch) -> None:
    """A pair that was written but not synced is not in the file either, where the round would have one too many."""
    rounds = RoundStore(tmp_path)
    rounds.keep(make_pair("a"))
    before = (tmp_path / "pairs.jsonl").read_bytes()
    pairs = rounds._logs["pairs"]._file.fileno()

    def sync(handle: int) -> None:
        if handle == pairs:
            raise OSError(errno.ENOSPC, "No space")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", sync)
        with pytest.raises(StorageError, match=r"pairs\.jsonl: No space"):
            rounds.keep(make_pair("b"))
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
    assert [pair.clear.pair_id for pair in rounds.pairs] == ["a"]


def test_clock_that_steps_back(dream, engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk) -> None:
    """A round does not look at the wall clock, and a new run takes no older one's name."""
    steps = iter(range(10**9, 0, -3_600))
    monkeypatch.setattr(time, "time", lambda: float(next(steps)))
    monkeypatch.setattr(time, "time_ns", lambda: next(steps) * 10**9)
    check_whole(dream(engine))
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-020000")
    first, second = (new_run_path("train", tmp_path) for _ in range(2))
    assert first == second
    first.mkdir()
    assert new_run_path("train", tmp_path) not in (first, tmp_path / "train-20260101-020000")


# Signals


def send(number: int) -> None:
    """A signal to this process, as a terminal or `kill` sends it."""
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_lets_what_is_in_flight_end(dream, script, likelihood, number: int, code: int) -> None:
    """No scenario is begun, those under way are stored, the user reads how to go on; given again the round is whole."""
    said: list[str] = []
    begun: list[int] = []

    def look(progress: Progress) -> None:
        if progress.accepted >= 2 and not begun:
            send(number)
        if progress.accepted >= 2:
            begun.append(progress.scenarios)

    engine = ScriptedEngine(script, likelihood, delay_s=0.002)
    with pytest.raises(Stopped, match=r"^stopped; same command$") as ended:
        dream(engine, Stop(said.append, "same command"), look)
    assert (ended.value.exit_code, said) == (code, [FINISHING])
    assert len(begun) > 1, "nothing was in flight"
    assert set(begun) == {begun[0]}
    found = dream(engine)
    assert "interrupted" not in {row.reason for row in found.dropped}
    check_whole(found)


@pytest.mark.usefixtures("quick_disk")
def test_two_signals_stop_now(dream, script, likelihood) -> None:
    """The second signal does not wait for an engine that says nothing; what was under way is named when it goes on."""
    calls = iter(range(1_000_000))

    class Silent(ScriptedEngine):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
            number = next(calls)
            if number > 30:
                for _ in range(2 if number == 31 else 0):  # a third would cut off the cancelling, too
                    asyncio.get_running_loop().call_soon(send, signal.SIGINT)
                await asyncio.sleep(3600)
            return await super().generate(messages, sampling)

    began = time.monotonic()
    with pytest.raises(Stopped) as ended:
        dream(Silent(script, likelihood), Stop(lambda text: None))
    assert ended.value.exit_code == 130
    assert time.monotonic() - began < 30
    found = dream(ScriptedEngine(script, likelihood))
    assert "interrupted" in {row.reason for row in found.dropped}
    check_whole(found)


def test_signal_with_nothing_in_flight_cancels() -> None:
    """Outside of such work the first signal ends what is waited for, clean-up included."""
    said, cleaned = [], []

    async def work() -> None:
        asyncio.get_running_loop().call_later(0.05, send, signal.SIGTERM)
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(True)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped, match=r"^stopped$") as ended:
        Stop(said.append).run(work())
    assert (ended.value.exit_code, cleaned, said) == (143, [True], [NOW])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def train_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Does a training step of this source in a child, in `tmp_path`."""

    def go(source: str, on_step: Callable[[dict[str, Any]], None] = lambda step: None) -> None:
        (tmp_path / "toy_step.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
        spec = StepSpec(model="m", rows="r", out=str(tmp_path / "train"), train=TrainConfig(), served_dtype="float32")
        stop = Stop(lambda text: None, "again")

        async def work() -> None:
            train_in_child(spec, tmp_path, on_step, "toy_step", stop)

        stop.run(work())

    return go


SLOW_STEP = """
import os, pathlib, time

def main(argv):
    begun = pathlib.Path(argv[0]).with_name(f".train.{os.getpid()}.tmp")
    begun.mkdir()
    print("{}", flush=True)
    time.sleep(60)
    begun.rename(begun.with_name("train"))
    return 0
"""


def test_signal_ends_the_training_child(tmp_path: Path, train_with) -> None:
    """The first signal ends the trainer, though the event loop waits for it; what it did not finish is not there."""
    with pytest.raises(Stopped, match="again") as ended:
        train_with(SLOW_STEP, lambda step: send(signal.SIGINT))
    assert ended.value.exit_code == 130
    assert list(tmp_path.glob(".train.*.tmp"))
    assert not (tmp_path / "train").exists()
    assert not [child for child in psutil.Process().children() if "toy_step" in child.cmdline()]


@pytest.mark.parametrize("when", ["before", "after"])
def test_signal_just_before_the_training_child(train_with, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A signal that comes while the child is being started is not forgotten: the child is killed."""
    children = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if when == "before":
                send(signal.SIGTERM)
            super().__init__(*arguments, **options)
            children.append(self)
            if when == "after":
                send(signal.SIGTERM)

    monkeypatch.setattr("dream.tasks.subprocess.Popen", Popen)
    with pytest.raises(Stopped, match="again") as ended:
        train_with(SLOW_STEP)
    assert ended.value.exit_code == 143
    assert [child.returncode for child in children] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "code -9: nothing was said"),
        ("print('loading', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)", "code -9: loading"),
        ("print('loading\\nerror: no room', file=sys.stderr); return 1", "code 1: no room"),
    ],
    ids=["killed in silence", "killed", "failed"],
)
def test_trainer_that_fails_says_why(tmp_path: Path, train_with, does: str, said: str) -> None:
    """The message has the code of a training child that did not end well, its own last line and where its log is."""
    with pytest.raises(TrainingError) as ended:
        train_with(f"import os, signal, sys\n\ndef main(argv):\n    {does}\n")
    assert str(ended.value) == f"training ended with {said} (see {tmp_path / 'train.log'})"


def test_trainer_that_cannot_take_the_configuration_is_the_users_error(train_with) -> None:
    """Code 2 of the training child is the command's: of a key that fits no such model nothing needs a log."""
    with pytest.raises(UserError, match=r"^train\.lora\.target_modules: none there$"):
        train_with(
            "import sys\n\ndef main(argv):\n"
            "    print('error: train.lora.target_modules: none there', file=sys.stderr)\n    return 2\n"
        )


# The pool, with engines in this process


class Toy(ScriptedEngine):
    """An engine that says its own number and the weights that it serves; `begin` holds up its start."""

    made = 0
    begin: Callable[["Toy"], Any]

    def __init__(self) -> None:
        super().__init__(lambda messages, number: f"{self.number} {self.loaded[-1]}")
        Toy.made += 1
        self.number = Toy.made

    async def start(self, weights: Path | None = None) -> None:
        self.loaded.append(weights)
        await Toy.begin(self)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        if messages[-1]["content"] == f"die {self.number}":
            self.die()
            await asyncio.sleep(3600)
        return await super().generate(messages, sampling)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EnginePool]]:
    """Makes a pool of toys, numbered from one, of which the first `replicas` start at once."""

    def make(begin: Callable[[Toy], Any], **config: Any) -> EnginePool:
        Toy.made, Toy.begin = 0, staticmethod(begin)
        return local_pool(monkeypatch, Toy, **config)

    yield make
    del Toy.begin


async def ask(pool: EnginePool, text: str = "who") -> str:
    """What an engine says."""
    return (await asyncio.wait_for(pool.generate([user(text)], Sampling()), 20))[0].text


def test_calls_go_to_the_engine_that_is_up(toys) -> None:
    """While one engine is being started again the other answers, what the first was asked too."""

    async def go() -> list[str]:
        async def begin(toy: Toy) -> None:
            await asyncio.sleep(3600 if toy.number > 2 else 0)

        async with toys(begin, replicas=2) as pool:
            return [await ask(pool, "die 1"), *[await ask(pool) for _ in range(5)]]

    assert asyncio.run(go()) == ["2 None"] * 6


def test_weights_given_while_an_engine_starts_are_served(toys) -> None:
    """An engine that comes up after `load_weights` serves those weights and not the ones it began with."""

    async def go() -> str:
        ready = asyncio.Event()

        async def begin(toy: Toy) -> None:
            if toy.number == 2:
                await ready.wait()

        async with toys(begin) as pool:
            await pool.load_weights(Path("old"))
            asked = asyncio.create_task(ask(pool, "die 1"))
            while Toy.made < 2:
                await asyncio.sleep(0.001)
            await asyncio.wait_for(pool.load_weights(Path("new")), 20)
            ready.set()
            return await asked

    assert asyncio.run(go()) == "2 new"


def test_engine_that_is_being_started_ends_to_rest(toys) -> None:
    """Nobody could tell it to rest while a step trains, and the memory it takes is what training needs; it is started
    anew with the next weights, and keeps nobody waiting."""

    async def go() -> tuple[tuple[int, int], set[str], int]:
        ready = asyncio.Event()

        async def begin(toy: Toy) -> None:
            if toy.number == 2:
                await asyncio.sleep(3600)
            if toy.number == 3:
                await ready.wait()

        async with toys(begin, replicas=2) as pool:
            await pool.rest()
            resting = (pool.up, Toy.made)
            await pool.load_weights(Path("new"))
            assert await ask(pool) == "1 new"
            ready.set()
            while pool.up < 2:
                await asyncio.sleep(0.001)
            return resting, set(await asyncio.gather(ask(pool), ask(pool))), pool.restarts

    assert asyncio.run(asyncio.wait_for(go(), 20)) == ((1, 2), {"1 new", "3 new"}, 0)


def test_engine_that_fails_to_join_is_started_again(toys) -> None:
    """Once one engine is up, another that is lost while it starts for the first time ends nothing."""

    async def go(first: str) -> tuple[set[str], int]:
        lost = asyncio.Event()

        async def begin(toy: Toy) -> None:
            if toy.number == 2:
                await lost.wait()
                raise EngineDied("its node is gone")

        async with toys(begin, replicas=2) as pool:
            asked = asyncio.create_task(ask(pool, first))
            await asyncio.sleep(0.01)
            lost.set()
            await asked
            while pool.up < 2:
                await ask(pool)
            return set(await asyncio.gather(ask(pool), ask(pool))), pool.restarts

    assert asyncio.run(asyncio.wait_for(go("who"), 20)) == ({"1 None", "3 None"}, 1)
    assert asyncio.run(asyncio.wait_for(go("die 1"), 20)) == ({"3 None", "4 None"}, 2)  # both, as of one node


def test_engine_that_hangs_while_it_starts_again_is_replaced(toys) -> None:
    """A call waits for no engine that says nothing for longer than `engine.start_timeout_s`."""

    async def begin(toy: Toy) -> None:
        await asyncio.sleep(3600 if toy.number == 2 else 0)

    async def go(**config: int) -> tuple[str, int]:
        async with toys(begin, start_timeout_s=0.2, **config) as pool:
            return await ask(pool, "die 1"), pool.restarts

    assert asyncio.run(go()) == ("3 None", 2)
    with pytest.raises(EngineError, match=r"did not start in 0.2 s \(engine\.start_timeout_s\)"):
        asyncio.run(go(max_restarts=1))


@pytest.mark.parametrize("error", [OutOfMemoryError("killed by the memory monitor"), NodeDiedError("gone")])
def test_whatever_ends_an_actor_is_a_loss(toys, error: Exception) -> None:
    """Ray has an error of its own for an actor that its memory monitor killed, and for a lost node."""

    async def begin(toy: Toy) -> None:
        if toy.number == 1:
            toy.die = functools.partial(toy.die, error)

    async def go() -> tuple[str, int]:
        async with toys(begin) as pool:
            return await ask(pool, "die 1"), pool.restarts

    assert asyncio.run(go()) == ("2 None", 1)


@pytest.mark.parametrize("method", ["start", "load_weights"])
def test_whatever_a_starting_engine_raises_is_one_line(toys, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """As it starts, or as it loads weights that the pool was given meanwhile."""

    async def fail(toy: Toy, folder: Path | None = None) -> None:
        raise ValueError("no such tensor")

    async def go() -> None:
        async def begin(toy: Toy) -> None:
            pool._weights = Path("given meanwhile")

        pool = toys(begin)
        monkeypatch.setattr(Toy, method, fail)
        async with pool:
            raise AssertionError("it started")

    with pytest.raises(EngineError, match="the engine did not start: ValueError: no such tensor"):
        asyncio.run(go())


def test_engine_lost_while_it_starts_again_is_started_again(toys) -> None:
    """A replacement that dies too, as on a node that is going, is replaced as long as restarts are left."""

    async def begin(toy: Toy) -> None:
        if toy.number in (2, 3):
            toy.die()
            await asyncio.sleep(3600)
        if toy.number == 4:
            raise EngineDied("no memory yet")

    async def go(**config: int) -> tuple[str, int]:
        async with toys(begin, **config) as pool:
            return await ask(pool, "die 1"), pool.restarts

    assert asyncio.run(go(max_restarts=4)) == ("5 None", 4)
    with pytest.raises(EngineError, match=r"died again after 2 restarts .*max_restarts; the run can be continued"):
        asyncio.run(go(max_restarts=2))


def test_release_ends_all_engines_and_starts_them_anew(toys) -> None:
    """Also one that is still being started. Meanwhile nothing is asked of them, and nothing is started in their
    place."""

    async def begin(toy: Toy) -> None:
        await asyncio.sleep(3600 if toy.number == 2 else 0)

    async def go() -> tuple[set[str], int]:
        async with toys(begin, replicas=2, release=True) as pool:
            ended = [replica.actor for replica in pool._replicas]
            for _ in range(2):  # a second time changes nothing
                await pool.rest()
            assert (pool.up, Toy.made) == (0, 2)
            for actor in ended:
                with pytest.raises(RayActorError):
                    await actor.answers.remote()
            with pytest.raises(EngineError, match="they answer when weights are loaded"):
                await ask(pool)
            await pool.load_weights(Path("new"))
            while pool.up < 2:
                await asyncio.sleep(0.001)
            return set(await asyncio.gather(ask(pool), ask(pool))), pool.restarts

    assert asyncio.run(go()) == ({"3 new", "4 new"}, 0)


def test_released_engine_that_fails_to_start_is_started_again(toys) -> None:
    """What was there before a step is worth a restart after it; the count goes on from step to step."""

    async def begin(toy: Toy) -> None:
        if toy.number in (2, 4):
            raise EngineDied("the memory is not free yet")

    async def go(**config: int) -> tuple[str, int]:
        async with toys(begin, release=True, **config) as pool:
            for number in range(2):
                await pool.rest()
                await pool.load_weights(Path(f"round {number}"))
            return await ask(pool), pool.restarts

    assert asyncio.run(go(max_restarts=2)) == ("5 round 1", 2)
    with pytest.raises(EngineError, match=r"died again after 1 restarts .*the run can be continued"):
        asyncio.run(go(max_restarts=1))


# The pool, with Ray


def faulty(deaths: Path, how: str) -> Callable[[], Any]:
    """Makes engines of which the first has a fault at its first call."""

    class Faulty:  # inside the function, so that Ray ships it by value
        async def start(self, weights: Path | None = None) -> None:
            """Nothing to bring up."""

        async def generate(self, messages: Sequence[Any], sampling: Sampling) -> list[Completion]:
            if not deaths.exists():
                deaths.touch()
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "hangs":
                    await asyncio.sleep(3600)
                raise ValueError("no such dial")
            return [Completion(messages[-1]["content"], 1, "stop")]

        async def stats(self) -> EngineStats:
            return EngineStats()

    return Faulty


def answers(tmp_path: Path, how: str) -> tuple[list[str], int]:
    """What four calls at once get of one engine with a fault, and how often it was started again."""

    async def go() -> tuple[list[str], int]:
        config = EngineConfig(request_timeout_s=5, max_restarts=3)
        async with EnginePool(faulty(tmp_path / "deaths", how), config) as pool:
            return await asyncio.gather(*(ask(pool, str(number)) for number in range(4))), pool.restarts

    connect(None)
    return asyncio.run(go())


@pytest.mark.parametrize(
    ("how", "why"), [("killed", "ActorDiedError|ActorUnavailableError"), ("hangs", "TimeoutError")]
)
def test_lost_actor_is_replaced(tmp_path: Path, how: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """When an actor's process is killed, or says nothing in time, all its calls are answered by a new one."""
    said, restarts = answers(tmp_path, how)
    assert said == ["0", "1", "2", "3"]
    assert restarts >= 1
    assert re.search(rf"engine lost \(({why})\); starting it again", caplog.text)


def test_call_that_an_engine_fails_at_is_one_line(tmp_path: Path) -> None:
    """An error of the engine's that is no death ends the run with a message of ours, not with Ray's traceback."""
    with pytest.raises(EngineError, match=r"^an engine failed at a call: ValueError: no such dial$"):
        answers(tmp_path, "fails")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of a head without room for an engine and two nodes with room for two each; joined, and left again."""
    ray.shutdown()  # what `connect` may have started for other tests
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=2)
        nodes.wait_for_nodes()
        connect(nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def telling() -> Callable[[], Any]:
    """Makes engines that say on which node they are."""

    class Telling:  # inside the function, so that Ray ships it by value
        async def start(self, weights: Path | None = None) -> None:
            """Nothing to bring up."""

        async def generate(self, messages: Sequence[Any], sampling: Sampling) -> list[Completion]:
            await asyncio.sleep(0.2)
            return [Completion(ray.get_runtime_context().get_node_id(), 1, "stop")]

    return Telling


@pytest.mark.kill
def test_lost_node_is_survived(cluster: Cluster) -> None:
    """When the raylet of a node with an engine is killed, all calls are answered from where there still is one."""

    async def ask_all(pool: EnginePool) -> list[str]:
        answered = [pool.generate([user("where")], Sampling()) for _ in range(16)]
        return [answer[0].text for answer in await asyncio.wait_for(asyncio.gather(*answered), 300)]

    async def go() -> tuple[str, list[str]]:
        async with EnginePool(telling(), EngineConfig(replicas=2, request_timeout_s=60)) as pool:
            lost = (await ask_all(pool))[0]
            node = next(one for one in cluster.worker_nodes if one.node_id == lost)
            await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
            while not pool.restarts:  # an actor answers on for a moment before it misses its raylet
                await ask_all(pool)
            return lost, await ask_all(pool)

    lost, after = asyncio.run(asyncio.wait_for(go(), 600))
    assert lost not in after


@pytest.mark.kill
def test_engine_joins_with_its_node(cluster: Cluster) -> None:
    """The pool works with the engines that have a place; a node that is added brings one more."""

    async def go() -> None:
        async with EnginePool(telling(), EngineConfig(replicas=5, request_timeout_s=60)) as pool:
            assert (await pool.generate([user("where")], Sampling()))[0].text
            node = cluster.add_node(num_cpus=2)
            nodes: set[str] = set()
            while node.node_id not in nodes:
                answers = await asyncio.gather(*(pool.generate([user("where")], Sampling()) for _ in range(16)))
                nodes |= {answer[0].text for answer in answers}

    asyncio.run(asyncio.wait_for(go(), 300))


SIGNALLED = """
import asyncio, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_faults import faulty, ask
from dream.config import EngineConfig
from dream.errors import Stopped
from dream.pool import EnginePool, connect
from dream.stop import Stop

stop = Stop(lambda text: print("said", text, flush=True))

async def work():
    connect(None)
    async with EnginePool(faulty(Path(sys.argv[2]), "hangs"), EngineConfig(request_timeout_s=60)) as pool:
        Path(sys.argv[2]).touch()
        with stop.gently("gently"):
            print("ready", flush=True)
            while stop.asked is None:
                await asyncio.sleep(0.01)
            print("answer", await ask(pool), "restarts", pool.restarts, flush=True)

try:
    stop.run(work())
except Stopped as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.kill
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_the_engines_to_what_is_in_flight(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C goes to every process of a terminal: Ray's must outlive it. SIGTERM goes to the driver, not past us."""
    command = [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), str(tmp_path / "deaths")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        if number == signal.SIGINT:
            os.killpg(driver.pid, number)
        else:
            os.kill(driver.pid, number)
        said = driver.stdout.read()
    assert said == "said gently\nanswer who restarts 0\n"
    assert driver.returncode == code
