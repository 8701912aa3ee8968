"""Benchmarks: what the product does beside the usual way of doing it (`make bench`, docs/BENCH.md).

Each module that `bench.ROWS` names has one function `measure() -> list[Row]` and gives the rows listed there.
"""

from collections.abc import Sequence
from statistics import median

from dream.records import Record


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
