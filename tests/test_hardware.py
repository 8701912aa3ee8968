"""dream/hardware.py: what the operating system says of this machine."""

from pathlib import Path

import pytest

from dream import hardware
from dream.hardware import bfloat16_is_fast, cpu_flags, gpu_visible

CPUINFO = """\
processor\t: 0
model name\t: Made-Up CPU @ 3.00GHz : special
flags\t\t: fpu sse4_2 avx2 avx512_bf16
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu other
"""


def test_cpu_flags_are_those_of_the_first_core(tmp_path: Path) -> None:
    """The flags are the words of the first `flags` line, and nothing of other lines."""
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert cpu_flags(path) == {"fpu", "sse4_2", "avx2", "avx512_bf16"}


@pytest.mark.parametrize("content", [None, b"", b"Features : fp asimd\n", b"flags\t: \n", b"\xff\xfe\n"])
def test_cpu_flags_may_be_unknown(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing, empty, of another processor or not text gives no flags and no error."""
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_bytes(content)
    assert cpu_flags(path) == set()


@pytest.mark.parametrize("devices", ["", "-1"])
def test_hidden_gpu_is_not_visible(monkeypatch: pytest.MonkeyPatch, devices: str) -> None:
    """`CUDA_VISIBLE_DEVICES` set to nothing hides a GPU whose device file is there."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert not gpu_visible()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("devices", [None, "0"])
def test_gpu_is_visible_by_its_device_file(monkeypatch: pytest.MonkeyPatch, there: bool, devices: str | None) -> None:
    """With the variable unset or naming a device, the device file decides."""
    monkeypatch.setattr(Path, "exists", lambda path: there and str(path).startswith("/dev/nvidia"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert gpu_visible() is there


@pytest.mark.parametrize(
    ("gpu", "flags", "fast"),
    [
        (False, {"avx2", "avx512f"}, False),
        (False, {"avx512_bf16"}, True),
        (False, {"amx_bf16"}, True),
        (True, set(), True),
    ],
)
def test_bfloat16_is_fast_with_the_right_hardware(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, flags: set[str], fast: bool
) -> None:
    """A GPU, AVX-512 BF16 or AMX makes bfloat16 fast; AVX-512 alone does not."""
    monkeypatch.setattr(hardware, "gpu_visible", lambda: gpu)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    assert bfloat16_is_fast() is fast
