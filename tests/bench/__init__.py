"""Benchmarks: what the product does beside the usual way of doing it (`make bench`, docs/BENCH.md).

Each module that `bench.ROWS` names has one function `measure() -> list[Row]` and gives the rows listed there.
"""

import ctypes
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from dream.records import Record

MIB = 2**20


class Row(Record):
    """One comparison. `ours` and `other` are in `unit`."""

    name: str
    ours: float
    other: float
    ratio: float
    """How many times better ours is; of repetitions the median of their ratios, which need not be `ours / other`."""
    target: float
    """The ratio that is wanted."""
    unit: str

    @property
    def met(self) -> bool:
        """Whether the ratio reaches its target."""
        return self.ratio >= self.target


def paired_rates(name: str, ours: Sequence[float], other: Sequence[float], *, target: float, unit: str) -> Row:
    """The row of repeated measurements in which more is better, the k-th of both made one after the other.

    Medians; the ratio is that within a repetition, so that a machine that slows down in between slows both.
    """
    ratios = [one / another for one, another in zip(ours, other, strict=True)]
    return Row(name=name, ours=median(ours), other=median(other), ratio=median(ratios), target=target, unit=unit)


def resident_peak() -> int:
    """The largest resident size of this process so far, in bytes; not ru_maxrss, which begins with the parent's."""
    return _status("VmHWM")


def resident_held() -> int:
    """The resident size of this process, in bytes, without garbage and what malloc keeps of freed memory (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    """A size that the kernel tells of this process, in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def svg(title: str, width: int, height: int, body: str) -> str:
    """A drawing of that many pixels under its title; of the elements in `body`, small text has class small."""
    size = f'width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14">'
        f'<style>.small{{font-size:11px;fill:#555}}</style><rect {size} fill="#fff"/>'
        f'<text x="12" y="22">{title}</text>{body}</svg>\n'
    )
