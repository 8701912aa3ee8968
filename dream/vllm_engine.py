"""The engine that runs a real model: vLLM's `AsyncLLM`. The only module that imports vllm.

It lives inside a Ray actor (`dream.pool`). Not covered: adapters served by the engine (`enable_lora` halves the speed
on a CPU, so merged weights are loaded) and multi-modal prompts.
"""

import asyncio
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dream.config import EngineConfig
from dream.engine import Completion, EngineStats, Sampling
from dream.errors import CallRefused, EngineError, one_line
from dream.records import Message


class EngineDied(EngineError):
    """The vLLM engine process died; the request can be tried again on another engine."""


def prepare_cpu_environment(kv_cache_gib: int, cores: Sequence[int]) -> dict[str, str]:
    """Environment of a vLLM CPU engine process: all cores (the default keeps one back), Intel's OpenMP if installed.

    Without `VLLM_ENABLE_V1_MULTIPROCESSING` the engine's process (the async engine has one all the same) is also its
    worker, which saves a third of the start. OpenMP then needs its number of threads from here.
    """
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(cores)),
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        environment["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD", "")]))
    return environment


class WorkerExtension:
    """Methods that vLLM's workers get beside their own."""

    model_runner: Any

    def pack_vocabulary(self) -> None:
        """Packs the vocabulary projection anew. On a CPU vLLM multiplies by a packed copy, and where the projection is
        tied to the embedding, loading new weights leaves that copy as it was."""
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def use_fused_kernels(self) -> None:
        """Takes vLLM's own kernels for norms and gated activations. On an x86 CPU it has them and leaves them aside for
        what `torch.compile` makes; in eager mode each then takes half a dozen passes over memory instead of one."""
        import torch
        from vllm import ir

        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            kernel = op.impls["vllm_c"]
            kernel._supports_args = _where_contiguous(kernel._supports_args)
            kernel.supported = True
            op.set_default(["vllm_c", "native"])
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "SiluAndMul":
                module.op = torch.ops._C.silu_and_mul
                module._forward_method = module.forward_cuda  # it calls `op`, whatever the processor


def _where_contiguous(supports: Callable[..., bool]) -> Callable[..., bool]:
    """A kernel's check of its arguments that also turns away views with gaps, which the CPU's kernels misread."""

    def check(*arguments: Any) -> bool:
        return supports(*arguments) and all(one.is_contiguous() for one in arguments if hasattr(one, "is_contiguous"))

    return check


def engine_arguments(model: str, config: EngineConfig, seed: int, on_gpu: bool) -> dict[str, Any]:
    """What vLLM is asked for."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "trust_remote_code": config.trust_remote_code,
        "load_format": "safetensors",
        "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}",
        "enable_prefix_caching": True,
    }
    if on_gpu:
        arguments["tensor_parallel_size"] = config.tensor_parallel
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        arguments["enable_sleep_mode"] = config.sleep_level > 0 and not config.release
    else:
        arguments["enforce_eager"] = True  # compiling takes a minute and makes nothing faster on a CPU
        arguments["block_size"] = 32  # of 128 by default: prompts here are short, and only whole blocks are cached
    return arguments


class VLLMEngine:
    """An `Engine` on vLLM. Create it, then await `start` inside the event loop that will use it."""

    def __init__(self, model: str, config: EngineConfig, seed: int) -> None:
        self._model, self._config, self._seed = model, config, seed
        self._ids = itertools.count()
        self._generated = self._prompted = self._cached = 0
        self._sleeps = self._asleep = False

    async def start(self, weights: Path | None = None) -> None:
        """Starts the engine process and, where given, loads other weights into it.

        Raises:
            EngineError: vLLM could not start with this model.
        """
        import torch

        on_gpu = torch.cuda.is_available()
        self._sleeps = on_gpu and self._config.sleep_level > 0
        if not on_gpu:
            os.environ.update(prepare_cpu_environment(self._config.cpu_kv_cache_gib, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = engine_arguments(self._model, self._config, self._seed, on_gpu)
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except Exception as error:  # vLLM raises many kinds; all of them mean that this model cannot be served
            said = f"{type(error).__name__}: {one_line(error)[:500]}"
            raise EngineError(f"vLLM cannot serve {self._model}: {said}") from error
        if not on_gpu:
            await self._engine.collective_rpc("use_fused_kernels")
        self._tokenizer = self._engine.get_tokenizer()
        if weights is not None:
            await self.load_weights(weights)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        """Samples `sampling.n` replies.

        Raises:
            CallRefused: the prompt is too long, or of turns that the model's chat template does not take.
            EngineDied: the engine process is gone.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(self._chat_ids(messages), parameters)
        completions = []
        for choice in output.outputs:
            self._generated += len(choice.token_ids)
            completions.append(Completion(choice.text.strip(), len(choice.token_ids), choice.finish_reason or "stop"))
        return completions

    async def score(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[float]]:
        """Log-probability per token of each reply.

        The first reply fills the prefix cache with the prompt; the others pay for their own tokens only.

        Raises:
            CallRefused: as `generate`, of the prompt and a reply.
            EngineDied: the engine process is gone.
        """
        head = self._chat_ids(messages)
        first = [await self._score_one(head, reply) for reply in replies[:1]]
        return first + list(await asyncio.gather(*(self._score_one(head, reply) for reply in replies[1:])))

    async def load_weights(self, folder: Path | None) -> None:
        """Loads weights in place, without a restart, and forgets the prefix cache of the old ones."""
        path = str(folder) if folder is not None else self._model
        with _told():
            if self._asleep:
                await self._engine.wake_up(tags=["weights"])
            await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
            await self._engine.collective_rpc("pack_vocabulary")
            if self._asleep:  # only now, so that old and new weights and the cache are never there together
                await self._engine.wake_up(tags=["kv_cache"])
                self._asleep = False
            await self._engine.reset_prefix_cache()

    async def rest(self) -> None:
        """Puts a GPU's engine to sleep at `engine.sleep_level`; with `engine.release` ends the engine."""
        if self._config.release:
            self._engine.shutdown()
        elif self._sleeps and not self._asleep:
            with _told():
                await self._engine.sleep(level=self._config.sleep_level)
            self._asleep = True

    async def stats(self) -> EngineStats:
        return EngineStats(self._generated, self._prompted, self._cached)

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        try:
            encoded = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise CallRefused(f"the model's chat template does not take a prompt: {error}") from error
        return list(encoded["input_ids"])

    async def _score_one(self, head: list[int], reply: str) -> list[float]:
        tail = self._tokenizer(reply, add_special_tokens=False)["input_ids"]
        if not tail:
            return []
        ids = head + tail
        output = await self._run(ids, _scoring(read_cache=True))
        # vLLM fills the positions that came from the prefix cache with garbage. The reply's first token needs the
        # hidden state of the prompt's last one; if the cache reached that far, score again without reading it.
        if (output.num_cached_tokens or 0) >= len(head):
            output = await self._run(ids, _scoring(read_cache=False))
        return [output.prompt_logprobs[place][ids[place]].logprob for place in range(len(head), len(ids))]

    async def _run(self, ids: list[int], parameters: Any) -> Any:
        output = None
        with _told():
            async for output in self._engine.generate(  # noqa: B007  # the last output is the whole answer
                {"prompt_token_ids": ids}, parameters, request_id=f"r{next(self._ids)}"
            ):
                pass
        if output is None:
            raise EngineDied("the engine returned nothing for a request")
        self._prompted += len(ids)
        self._cached += output.num_cached_tokens or 0
        return output


@contextmanager
def _told() -> Iterator[None]:
    """What vLLM raises when its process is gone as `EngineDied`, and what it does not answer as `CallRefused`."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except VLLMClientError as error:
        raise CallRefused(f"the engine refused a call: {error}") from error
    except EngineDeadError as error:
        raise EngineDied(f"the engine process died: {error}") from error


def _scoring(read_cache: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,  # with detokenize the engine dies of an OverflowError on cached positions
        skip_reading_prefix_cache=not read_cache,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
