"""Which indices remain: the highest scores, as many as are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from explore.blocks import Axis, BlockConfig
from explore.compress.surgery import Indices


def choose(
    block: BlockConfig, sizes: Mapping[str, int], scores: Callable[[Axis, Mapping[str, Indices]], Sequence[float]]
) -> dict[str, Indices]:
    """Kept indices of the axes of a block, those with the highest scores; of equal ones the first.

    Args:
        sizes: fields of the config, and how many they are to count; what is not named stays whole.
        scores: of every index of an axis, given what is kept of the axes before it.

    Raises:
        ValueError: a size that is not between 1 and the parent's, or not equally many within each index of an axis.
    """
    keep: dict[str, Indices] = {}
    whole = {axis.name: axis.size for axis in block.axes()}
    for axis in block.axes():
        field = axis.field or axis.name
        if field not in sizes:
            continue
        outer = keep.get(axis.within, tuple(range(whole.get(axis.within, 1))))
        n_outer = len(outer)
        share = axis.size // whole.get(axis.within, 1)
        most, n = (share if axis.per_index else share * n_outer), sizes[field]
        if not 1 <= n <= most:
            raise ValueError(f"{field}: must be from 1 to {most}, got {n}")
        if not axis.per_index and n % n_outer:
            raise ValueError(f"{field}: must be a multiple of {axis.within}, {n_outer}, got {n}")
        each = n if axis.per_index else n // n_outer
        if each == share:
            continue
        rank = [0.0] * axis.size if axis.prefix else scores(axis, keep)
        keep[axis.name] = tuple(
            i for k in outer for i in sorted(highest(rank, range(k * share, (k + 1) * share), each))
        )
    return keep


def highest(scores: Sequence[float], among: Sequence[int], n: int) -> list[int]:
    """The `n` indices with the highest scores, the best first; of equal ones the first."""
    return sorted(among, key=lambda i: (-scores[i], i))[:n]
