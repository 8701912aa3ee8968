"""dream/hardware.py: what the operating system says of this machine."""

from pathlib import Path

import pytest

from dream import hardware
from dream.hardware import bfloat16_is_fast, cpu_flags, gpu_visible

CPUINFO = """\
processor\t: 0
model name\t: Made-up CPU: the best
flags\t\t: fpu sse2 avx512f avx512_bf16

processor\t: 1
flags\t\t: fpu only_on_the_second
"""


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (CPUINFO, {"fpu", "sse2", "avx512f", "avx512_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd\n", set()),
        ("flags\t\t:\n", set()),
        ("", set()),
    ],
)
def test_flags_are_those_of_the_first_processor(tmp_path: Path, text: str, flags: set[str]) -> None:
    """The flags are the words of the first `flags` line, and none where there is no such line."""
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_flags(path) == flags


def test_unreadable_cpuinfo_has_no_flags(tmp_path: Path) -> None:
    """A machine without the file has no flags, and no error."""
    assert cpu_flags(tmp_path / "absent") == set()
    assert cpu_flags(tmp_path) == set()


@pytest.mark.parametrize(("setting", "visible"), [("", False), ("-1", False), ("0", True), ("0,1", True), (None, True)])
def test_cuda_visible_devices_hides_the_gpu(monkeypatch, setting: str | None, visible: bool) -> None:
    """An empty `CUDA_VISIBLE_DEVICES`, or -1, hides a device that is there."""
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    if setting is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert gpu_visible() is visible


def test_no_device_file_means_no_gpu(monkeypatch) -> None:
    """`CUDA_VISIBLE_DEVICES` alone makes no device."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not gpu_visible()


@pytest.mark.parametrize(
    ("gpu", "flags", "fast"),
    [(True, set(), True), (False, {"avx2"}, False), (False, {"amx_bf16"}, True), (False, {"avx512_bf16"}, True)],
)
def test_bfloat16_needs_a_gpu_or_its_instructions(monkeypatch, gpu: bool, flags: set[str], fast: bool) -> None:
    """bfloat16 is fast on a GPU and on CPUs with AVX-512 BF16 or AMX."""
    monkeypatch.setattr(hardware, "gpu_visible", lambda: gpu)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    assert bfloat16_is_fast() is fast
