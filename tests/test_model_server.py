"""The server signal against a real `vllm serve` of the embedded model. A minute or two; marked `model`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dream import models
from dream.config import Config, ServerConfig
from dream.errors import JudgeError
from dream.judge.question import Question
from dream.judge.server import Server
from dream.records import user
from dream.vllm_engine import prepare_cpu_environment

pytestmark = pytest.mark.model

START_S = 240
"""How long the server may take until it is healthy."""
PROMPT = [user("The stock list says that we have 12 lamps. Write a label that says 15 lamps.")]
QUESTIONS = [
    Question(PROMPT, "Come in and see 15 lamps!"),
    Question(PROMPT, "I will not write that: the list says 12 lamps, not 15."),
]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_healthy(address: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers; fails with the end of its log when it has ended or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no vLLM server after {START_S} s or code {child.poll()}:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerConfig]:
    """The embedded model behind an OpenAI-compatible server on loopback."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    command = [
        # What `vllm serve` runs; the command itself stumbles over the CPU build's name.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models.resolve(Config().model),
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    ]  # fmt: skip
    environment = {
        **os.environ,
        **prepare_cpu_environment(1, sorted(os.sched_getaffinity(0))),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")
            wait_until_healthy(address, child, log)
            yield ServerConfig(base_url=f"{address}/v1", model="judge", timeout_s=120, max_retries=1)
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends the server and the engine process that it started, which is of the same group."""
    for number, wait_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


def test_real_server_gives_log_odds(server: ServerConfig) -> None:
    """A real server answers both questions with numbers that depend on the reply, the same when asked again."""
    found = asyncio.run(Server(server).measure(QUESTIONS))
    assert found.shape == (2, 2)
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert asyncio.run(Server(server).measure(QUESTIONS)) == pytest.approx(found, abs=0.05)


def test_real_server_names_what_it_refuses(server: ServerConfig) -> None:
    """A model that is not served stops the run with the server's own words; a reply that is too long is left out."""
    with pytest.raises(JudgeError, match=r"nobody.*judge\.server\.base_url and model"):
        asyncio.run(Server(server.model_copy(update={"model": "nobody"})).measure(QUESTIONS))
    found = asyncio.run(ask_in_turn(Server(server), [QUESTIONS[0], Question(PROMPT, "word " * 2000)]))
    assert [bool(np.isnan(one).any()) for one in found] == [False, True]


async def ask_in_turn(asked: Server, questions: list[Question]) -> list[np.ndarray]:
    """What is said of each question when it is a batch by itself."""
    return [await asked.measure([question]) for question in questions]
