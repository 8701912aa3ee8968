"""A whole `dream train` as a process that can be killed: scripted engine in its own process, toy model, real steps.

    python tests/kill_runner.py PLACE    one life: the command in this process, its trainer as the product starts it
    python tests/kill_runner.py          serves lives: a line with a PLACE in, `{"pid"}` and then `{"code"}` out

A served life is forked from a process that has imported torch and TRL already, and so is its trainer; everything else
is as in the command. PLACE holds `prompts/`, `model/`, `config.json`; the run is made in `run/`, and `engine.pid` and
`trainer.pid` name who can be killed.
"""

import asyncio
import importlib
import json
import os
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads, as this process is forked

from conftest import score_reply, write_reply
from test_rounds import PolicyEngine, skill_of

import dream.embed
from dream import tasks
from dream.config import Config, parse, resolved
from dream.engine import Completion, EngineStats, Sampling
from dream.errors import DreamError, EngineError, TrainingError
from dream.records import Message
from dream.store import read_json, write_json
from dream.terminal import Terminal
from train import child
from train.data import StepSpec

CALL_SECONDS = 0.003
"""What a call of the engine takes once the judge is calibrated, so that kills also fall into dreaming and measuring."""


class ToyEngine(PolicyEngine):
    """The scripted engine; it is better at routing in each round, and scores the probes as the trainer did."""

    def __init__(self) -> None:
        super().__init__(write_reply, score_reply)
        self.probed: dict[tuple[str, str], float] = {}

    def learn(self, folder: Path | None) -> None:
        self._delay_s, self.skill, self.probed = CALL_SECONDS, skill_of(None), {}
        if folder is not None:
            trained = folder.parent.parent
            self.skill = float(trained.name.removeprefix("round_"))
            spec = StepSpec.model_validate(read_json(trained / "train.spec.json"))
            scores = read_json(trained / "train" / "probes.json")["after"]
            self.probed = {
                (repr(probe.messages), probe.reply): score for probe, score in zip(spec.probes, scores, strict=True)
            }

    def score_plain(self, messages: Sequence[Message], reply: str) -> float:
        probed = self.probed.get((repr(list(messages)), reply))
        return super().score_plain(messages, reply) if probed is None else probed


class EngineProcess:
    """An `Engine` in a process of its own. When that dies, its calls end as the pool's do once it has given up."""

    def __init__(self) -> None:
        self.ours, theirs = Pipe()
        self.pid = fork(lambda: answer_calls(self.ours, theirs))
        theirs.close()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        return self._call("generate", messages, sampling)

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        return self._call("score", messages, replies)

    async def load_weights(self, folder: Path | None) -> None:
        self._call("load_weights", folder)

    async def rest(self) -> None:
        self._call("rest")

    async def stats(self) -> EngineStats:
        return self._call("stats")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self.ours.send((method, arguments))
            return self.ours.recv()
        except (EOFError, OSError) as error:
            raise EngineError("an engine died again after 0 restarts; the run can be continued") from error


def answer_calls(other_end: Connection, driver: Connection) -> int:
    """The engine's process: answers until the driver is gone."""
    other_end.close()
    engine = ToyEngine()
    while True:
        try:
            method, arguments = driver.recv()
            driver.send(asyncio.run(getattr(engine, method)(*arguments)))
        except (EOFError, OSError):
            return 0


def fork(work: Callable[[], int]) -> int:
    """Runs `work` in a copy of this process, which exits with what it returns; the copy's id."""
    if pid := os.fork():
        return pid
    for handle in Path("/proc/self/fd").iterdir():  # what an exec closes; the lock ends with the driver alone
        with suppress(OSError):
            if os.readlink(handle).endswith("/.lock"):
                os.close(int(handle.name))
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@asynccontextmanager
async def engine_process(config: Config, model: str) -> AsyncIterator[EngineProcess]:
    """Stands for `tasks.real_engine`."""
    engine = EngineProcess()
    Path("engine.pid").write_text(str(engine.pid))
    yield engine
    engine.ours.close()
    os.waitpid(engine.pid, 0)


def forked_step(spec: StepSpec, folder: Path) -> None:
    """`tasks.train_in_child` with a fork in place of a new interpreter, which takes ten seconds to import."""
    path = folder / "train.spec.json"
    write_json(path, spec.model_dump(mode="json"))
    driver = os.getpid()

    def work() -> int:
        redirect(folder / "train.log")
        return child.main([str(driver), "train.step", str(path)])

    pid = fork(work)
    Path("trainer.pid").write_text(str(pid))
    _, status = os.waitpid(pid, 0)
    if status:
        raise TrainingError(f"training ended with code {os.waitstatus_to_exitcode(status)} ({folder / 'train.log'})")


def redirect(log: Path) -> None:
    """Nothing to read; all that is printed goes into a file."""
    for place, file in ((0, Path(os.devnull).open("rb")), (1, log.open("ab")), (2, log.open("ab"))):  # noqa: SIM115
        os.dup2(file.fileno(), place)


def life(place: Path, forked: bool) -> int:
    """The command, from its beginning to its end; its exit code."""
    os.chdir(place)
    dream.embed.minilm = lambda: None  # the embedding model takes seconds to load
    config = resolved(parse(read_json(place / "config.json"), "config.json"))
    trainer = forked_step if forked else None
    try:
        tasks.train(config, Path("config.json"), Path("run"), [], Terminal(), force_judge=True,
                    open_engine=engine_process, trainer=trainer)  # fmt: skip
    except DreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def serve() -> None:
    """Forks a life for each line of stdin."""
    for name in ("dream.audit", "dream.judge.combined", "train.rounds", "train.step"):  # slow, and needed by all lives
        importlib.import_module(name)

    def work(place: Path) -> int:
        redirect(place / "driver.log")
        return life(place, forked=True)

    for line in sys.stdin:
        pid = fork(partial(work, Path(line.strip())))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(life(Path(sys.argv[1]), forked=False))
    serve()
