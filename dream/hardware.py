"""What this machine has, read from the operating system, so that the command line need not import torch."""

import os
from pathlib import Path


def gpu_visible() -> bool:
    """Whether an NVIDIA device file is there and not hidden by `CUDA_VISIBLE_DEVICES`."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and (Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists())


def bfloat16_is_fast() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 where models are put here."""
    return gpu_visible() or cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """Whether the processor has units for it: AVX-512 BF16 or AMX.

    Without them bfloat16 is six to nine times *slower* than float32 (docs/LOG.md).
    """
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The processor's instruction sets by Linux's names; empty where they cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
