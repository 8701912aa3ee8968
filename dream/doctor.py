"""`dream doctor`: what this machine can run, and what is missing."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from dream import models, templates
from dream.config import Config
from dream.errors import DreamError
from dream.hardware import bfloat16_is_fast, gpu_visible
from dream.paths import data_folder, model_cache
from dream.runs import versions

NEEDED = ("torch", "transformers", "trl", "peft", "ray", "vllm", "datasets")
MIN_FREE_GB = 5


class Finding(NamedTuple):
    """One thing that was looked at; `good` says whether it stands in the way."""

    name: str
    good: bool
    text: str


def examine(config: Config, config_file: Path) -> list[Finding]:
    """Looks at packages, hardware, configuration, model, templates and disk; starts nothing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    packages = f"missing {', '.join(missing)}; install requirements/cpu.lock or the gpu extra" if missing else found
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    wants_gpu = config.engine.tensor_parallel * config.engine.replicas > 1 and not gpu_visible()
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
        Finding("disk", free > MIN_FREE_GB, f"{free:.0f} GB free here; a run of a 135M model takes 1 to 3 GB"),
    ]


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
