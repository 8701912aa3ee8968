"""`dream doctor`: what this machine can run, and what is missing."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from dream import embed, models, templates
from dream.config import Config
from dream.errors import DreamError
from dream.hardware import bfloat16_is_fast, gpu_visible
from dream.memory import GIB, WIDTH, Device, ModelShape, Plan, TrainerPlan, largest_batch, plan, read_shape
from dream.paths import data_folder, model_cache
from dream.runs import versions

NEEDED = ("torch", "transformers", "trl", "peft", "ray", "vllm", "datasets", embed.PACKAGE)
MIN_FREE_GB = 5


class Finding(NamedTuple):
    """One thing that was looked at; `good` says whether it stands in the way."""

    name: str
    good: bool
    text: str


def examine(config: Config, config_file: Path) -> list[Finding]:
    """Looks at packages, hardware, configuration, model, templates and disk; starts nothing."""
    missing = [name for name in needed(config) if importlib.util.find_spec(name) is None]
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    packages = f"missing {', '.join(missing)}; install requirements/cpu.lock or the gpu extra" if missing else found
    shape = _shape(config.model)
    memory = machine_memory() / GIB
    wants_gpu = config.engine.tensor_parallel > 1 and not gpu_visible()
    precision = "fast" if bfloat16_is_fast() else "slow, so float32 is used"
    return [
        Finding("packages", not missing, packages),
        Finding(
            "cores and memory", True, f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; bfloat16 is {precision}"
        ),
        Finding("GPU", not wants_gpu or config.ray.address is not None, _gpu(config)),
        Finding("configuration", True, f"{config_file}: {config.model}, {config.train.method}, {config.engine.dtype}"),
        _model(config),
        _templates(),
        _disk(config, shape),
        *(_memory(config, shape) if isinstance(shape, ModelShape) else [Finding("memory", True, shape)]),
    ]


def needed(config: Config) -> list[str]:
    """The modules that this configuration takes."""
    asked = {
        "openai": "server" in config.judge.signals,
        "apollo_torch": config.train.optim == "apollo_adamw",
        "lm_eval": bool(config.eval.lm_eval_tasks),
    }
    return [*NEEDED, *(name for name, wanted in asked.items() if wanted)]


def machine_memory() -> int:
    """Bytes of main memory that this process may use: all there is, or the limit of its control group."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return there
    return min(there, int(limit)) if limit.isdigit() else there


def seen_device() -> Device | None:
    """What models are put on here; None where a GPU does not say how much memory it has."""
    if not gpu_visible():
        return Device(machine_memory())
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(word) * 2**20 for word in said.split() if word.isdigit()]
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        sizes = sizes[: len(named.split(","))]
    return Device(min(sizes), len(sizes), gpu=True) if sizes else None


def _gpu(config: Config) -> str:
    here = "a CUDA device is visible" if gpu_visible() else "none visible"
    engines = f"{config.engine.replicas} engine(s) of {config.engine.tensor_parallel} GPU(s)"
    where = f"on the Ray cluster {config.ray.address}" if config.ray.address else "on this machine"
    return f"{here}; configured: {engines} {where}"


def _model(config: Config) -> Finding:
    if config.model in models.BUNDLED:
        package = models.BUNDLED[config.model]
        there = importlib.util.find_spec(package) is not None
        text = (
            f"{config.model}, unpacked to {model_cache()}" if there else f"{config.model} needs the package {package}"
        )
        return Finding("model", there, text)
    try:
        return Finding("model", True, models.resolve(config.model))
    except DreamError as error:
        return Finding("model", False, str(error))


def _templates() -> Finding:
    try:
        loaded = templates.load_all()
    except DreamError as error:
        return Finding("templates", False, str(error))
    held = sum(template.front.split == "heldout" for template in loaded)
    return Finding("templates", True, f"{len(loaded)} in {data_folder('prompts')}, {held} of them held out")


def _disk(config: Config, shape: ModelShape | str) -> Finding:
    """Whether a run's weights fit: each round keeps those that are served, and of full weights the masters."""
    free, most = shutil.disk_usage(Path.cwd()).free / 1e9, float(MIN_FREE_GB)
    text = f"{free:.0f} GB free here"
    if isinstance(shape, ModelShape):
        served = WIDTH[config.engine.dtype]
        masters = WIDTH["float32"] if config.train.method == "full" and served < WIDTH["float32"] else 0
        weights = shape.parameters * (served + masters) * config.rounds / 1e9
        most, text = max(most, weights), f"{text}; the weights of {config.rounds} rounds take {weights:.1f} GB"
    return Finding("disk", free > most, text)


def _shape(model: str) -> ModelShape | str:
    """A model's shape, or why there is no memory plan of it."""
    path = _config_json(model)
    if path is None:
        why = f"{model} is not on this machine yet, and nothing is downloaded or unpacked here"
        return f"not planned: {why}; ask again when it is"
    try:
        return read_shape(path)
    except DreamError as error:
        return f"not planned: {error}"


def _memory(config: Config, shape: ModelShape) -> list[Finding]:
    """The memory plan, a finding a line of it."""
    device = seen_device()
    if device is None:
        return [Finding("memory", True, "not planned: nvidia-smi does not say how much memory the GPU has")]
    return memory_findings(plan(shape, config, device), config)


def _config_json(model: str) -> Path | None:
    """The config.json of a model, where it is on this machine."""
    if model in models.BUNDLED:
        path = model_cache() / model.removeprefix("bundled:") / "config.json"
        return path if path.is_file() else None
    try:
        source = models.resolve(model)
    except DreamError:
        return None
    if Path(source).is_dir():
        return Path(source) / "config.json"
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def memory_findings(made: Plan, config: Config) -> list[Finding]:
    """The plan as lines: engines, the configured training step and the other ones, and what is in memory together.

    Only what the configuration asks for can be not good.
    """
    device, engine, configured = made.device, made.engine, made.trainers[0]
    elsewhere = config.ray.address is not None
    there = f"{_gib(device.total)} GiB" + (f" ({device.devices} GPUs)" if device.devices > 1 else "")
    fits = elsewhere or (engine.kv_cache >= engine.sequence and engine.reserved <= device.total)
    room = f"{max(0, engine.kv_cache) // engine.kv_token} tokens of cache for {config.engine.max_num_seqs} sequences"
    parts = {"weights": engine.weights, "workspace": engine.workspace, "KV cache": engine.kv_cache}
    findings = [
        Finding(
            "memory", fits,
            f"{'engine':17} {_sizes(parts)}; {room}; {_gib(engine.reserved)} of {there} in all"
            + ("; the cluster's nodes may have more" if elsewhere else "" if fits else _engine_advice(made, config)),
        ),
        *(_trainer_finding(trainer, trainer is configured, made, config, there) for trainer in made.trainers),
    ]  # fmt: skip
    if not elsewhere:
        both, asleep = engine.resting + configured.peak, engine.resting < engine.reserved
        key = "engine.gpu_memory_utilization, " if device.gpu else "engine.cpu_kv_cache_gib, "
        lower = ("" if asleep else key) + "train.micro_batch_size or train.max_length"
        how = "keep their memory" if not asleep else "sleep" if engine.resting else "are ended"
        text = f"{'both together':17} {_gib(both)} of {there}, as engines {how} while a step trains"
        release = ", set engine.release" if engine.resting and configured.peak <= device.total else ""
        advice = f": does not fit; lower {lower}{release}, or name a smaller model"
        findings.append(Finding("memory", both <= device.total, text + ("" if both <= device.total else advice)))
    return findings


def _engine_advice(made: Plan, config: Config) -> str:
    if made.engine.kv_cache < made.engine.sequence:
        key = "engine.gpu_memory_utilization" if made.device.gpu else "engine.cpu_kv_cache_gib"
        length = f"engine.max_model_len ({config.engine.max_model_len})"
        return f": no room for one sequence of {length}; raise {key}, or lower the length"
    key = "engine.replicas" if made.device.gpu else "engine.replicas or engine.cpu_kv_cache_gib"
    return f": does not fit; lower {key}, or name a smaller model"


def _trainer_finding(trainer: TrainerPlan, configured: bool, made: Plan, config: Config, there: str) -> Finding:
    names = ("weights", "adapter", "gradients", "moments", "activations", "logits", "beside", "merged")
    parts = {name: size for name in names if (size := getattr(trainer, name))}
    fits = trainer.peak <= made.device.total
    batch = largest_batch(config)
    mark = f" (configured; {batch.rows} rows of {batch.width} positions)" if configured else ""
    text = f"{trainer.method} {trainer.optim:12} {_sizes(parts)}; at most {_gib(trainer.peak)} of {there}{mark}"
    if not fits:
        text += ": does not fit"
    if configured and not fits:
        least = trainer._replace(activations=0, logits=0).peak
        keys = "lower train.micro_batch_size or train.max_length"
        text += f"; {keys if least < made.device.total else 'no batch is small enough, name a smaller model'}"
    return Finding("memory", fits or not configured, text)


def _sizes(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
