"""The embedded model, for real: vLLM in a Ray actor, and one small round with TRL. Minutes; marked `model`."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dream import models
from dream.config import Config, parse, resolved
from dream.engine import Engine, Sampling, mean
from dream.errors import CallRefused
from dream.pool import EnginePool, vllm_pool
from dream.records import user
from dream.vllm_engine import WorkerExtension

pytestmark = pytest.mark.model

PROMPT = [user("The sales sheet says that we sold 40 lamps in July. Write one sentence that says we sold 40 lamps.")]
REPLIES = ["In July, we sold 40 lamps.", "The sheet says 30 lamps, not 40, so that would be wrong.", "No."]


@pytest.fixture(scope="module")
def config() -> Config:
    """The embedded model with a small cache, in float32 so that scores are alike on any machine."""
    return resolved(parse({"engine": {"max_model_len": 1024, "cpu_kv_cache_gib": 1, "dtype": "float32"}}, "test"))


@pytest.fixture(scope="module")
def use(config: Config) -> Callable[[Callable[[EnginePool], Awaitable[None]]], None]:
    """Runs a coroutine on a fresh pool."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[EnginePool]:
        async with vllm_pool(config, models.resolve(config.model)) as pool:
            yield pool

    def run(work: Callable[[EnginePool], Awaitable[None]]) -> None:
        async def go() -> None:
            async with opened() as pool:
                await work(pool)

        asyncio.run(go())

    return run


async def scores(engine: Engine, replies: list[str]) -> list[float]:
    """Mean log-probability of each reply."""
    return [mean(values) for values in await engine.score(PROMPT, replies)]


def test_engine_scores_reloads_and_survives(
    use: Callable[[Callable[[EnginePool], Awaitable[None]]], None], tmp_path: Path
) -> None:
    """One engine, five promises: cached scores equal fresh ones, long prompts in a full batch do not kill it, one that
    is too long is refused, other weights are served and the old ones come back exactly, and a killed engine is started
    again with its weights."""
    changed, wanted = other_weights(tmp_path / "changed")

    async def work(pool: EnginePool) -> None:
        together = await scores(pool, REPLIES)
        for place in (2, 0, 1):  # warm prefixes now
            assert (await scores(pool, [REPLIES[place]]))[0] == pytest.approx(together[place], abs=2e-2)

        long = [user("word " * 600 + str(number)) for number in range(8)]  # prefilled in chunks
        answers = await asyncio.gather(*(pool.generate([one], Sampling(1, 8)) for one in long))
        assert [len(answer) for answer in answers] == [1] * 8

        with pytest.raises(CallRefused, match="refused a call"):
            await pool.generate([user("word " * 3000)], Sampling(1, 8))

        await pool.load_weights(changed)
        moved = await scores(pool, REPLIES)
        assert max(abs(a - b) for a, b in zip(moved, together, strict=True)) > 0.05
        assert moved == pytest.approx(wanted, abs=2e-2)

        kill_engine_processes()
        assert await scores(pool, REPLIES) == pytest.approx(moved, abs=2e-2)
        assert pool.restarts == 1

        await pool.load_weights(None)
        assert await scores(pool, REPLIES) == pytest.approx(together, abs=2e-2)

    use(work)


def other_weights(folder: Path) -> tuple[Path, list[float]]:
    """The embedded model with its last norm and its embedding changed, and the mean log-probability of each reply by
    transformers; made in a process of its own so that torch's memory is gone."""
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, folder, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
model.model.norm.weight.data *= 0.8
model.get_input_embeddings().weight.data[::3] *= 1.1  # tied to the vocabulary projection
model.save_pretrained(folder), tokenizer.save_pretrained(folder)
head = tokenizer.apply_chat_template(asked["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
for reply in asked["replies"]:
    tail = tokenizer(reply, add_special_tokens=False)["input_ids"]
    logps = model(torch.tensor([head + tail])).logits.log_softmax(-1)[0, len(head) - 1 : -1]
    print(float(logps.gather(1, torch.tensor(tail)[:, None]).mean()))
"""
    model = models.resolve("bundled:smollm2-135m-instruct")
    asked = json.dumps({"prompt": PROMPT, "replies": REPLIES})
    command = [sys.executable, "-P", "-c", code, model, str(folder), asked]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return folder, [float(line) for line in printed.split()]


def kill_engine_processes() -> None:
    """kill -9 to every vLLM engine process of this user, and waits until they are gone."""
    found: list[psutil.Process] = []
    end = time.monotonic() + 60
    while not found and time.monotonic() < end:  # a busy machine may show an empty command line for a moment
        found = [
            one for one in psutil.process_iter(["cmdline"]) if "".join(one.info["cmdline"] or []).startswith("VLLM::")
        ]
    assert found, "no engine process to kill"
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=60)


def test_fused_kernels_compute_what_the_plain_ones_do() -> None:
    """Norms by vLLM's kernels are those of its plain implementation, on views with gaps too, and a gated activation
    takes the kernel."""
    import torch
    from vllm import ir
    from vllm._custom_ops import current_platform

    class SiluAndMul(torch.nn.Module):
        def forward_cuda(self) -> None: ...

    current_platform.import_ir_kernels()
    gated = SiluAndMul()
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(get_model=lambda: gated)
    worker.use_fused_kernels()
    assert gated._forward_method == gated.forward_cuda
    x = torch.randn(5, 4, 64)
    for view in (x[:, 1], x[:, 1].contiguous()):
        weight, residual = torch.randn(64), torch.randn(5, 64)
        norm, added = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
        torch.testing.assert_close(norm(view, weight, 1e-5), norm.impls["native"].impl_fn(view, weight, 1e-5))
        expected = added.impls["native"].impl_fn(view, residual, weight, 1e-5)
        torch.testing.assert_close(
            added(view.clone(memory_format=torch.preserve_format), residual, weight, 1e-5), expected
        )
    gate = torch.randn(3, 128)
    out = torch.empty(3, 64)
    gated.op(out, gate)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate[:, :64]) * gate[:, 64:])


def test_one_small_round_end_to_end(tmp_path: Path) -> None:
    """`dream train` dreams, judges, trains, serves what it trained, and decides."""
    small = {
        "generate.pairs": 2, "generate.steering": "note", "generate.samples": 1, "generate.max_tokens": 32,
        "judge.self_test_replies": 32, "engine.max_model_len": 1024, "engine.cpu_kv_cache_gib": 1,
        "eval.heldout_pairs": 4, "eval.fresh_pairs": 2, "eval.sampled_scenarios": 2, "eval.retention_questions": 4,
        "train.learning_rate": 2e-4,
        "engine.release": "true",  # a new engine serves the candidate; that of the test above took weights in place
        "engine.dtype": "float32", "train.bf16": "false",  # so that engine and trainer differ by little on any machine
    }  # fmt: skip
    sets = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "dream.cli", "train", "--rounds", "1", "--out", str(run), *sets]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = run / "round_01"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {row["side"] for row in rows} == {"clear", "flawed"}
    served = json.loads((folder / "served.json").read_text())
    assert served["largest_change"] > 20 * served["apart"]
    gate = json.loads((folder / "gate.json").read_text())
    assert gate["decision"]["decision"] in ("promote", "roll_back")
    policy = json.loads((run / "policy.json").read_text())
    assert policy["round"] == (1 if gate["decision"]["decision"] == "promote" else 0)
    assert "held-out scenarios" in done.stdout
