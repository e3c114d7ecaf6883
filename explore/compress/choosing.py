"""Chooses the indices with the highest scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from explore.blocks import Axis, BlockConfig
from explore.compress.surgery import Indices


def choose(
    block: BlockConfig, sizes: Mapping[str, int], scores: Callable[[Axis, Mapping[str, Indices]], Sequence[float]]
) -> dict[str, Indices]:
    """Returns the kept indices of a block's axes: those with the highest scores, ties to the first.

    Args:
        sizes: new values of config fields; unnamed sizes stay whole.
        scores: returns the score of every index of an axis, given the indices kept on earlier axes.

    Raises:
        ValueError: a size is not between 1 and the parent's, or does not divide evenly among outer indices.
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
    """Returns the `n` indices with the highest scores, best first, ties to the first."""
    return sorted(among, key=lambda i: (-scores[i], i))[:n]
