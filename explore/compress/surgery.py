"""Exact surgery: selects kept indices of every axis and cuts weights and configs accordingly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from explore.blocks import Axis, BlockConfig, Dim
from explore.foreign import echo

Indices = tuple[int, ...]
"""Kept indices of an axis, ascending."""


def complete(axes: Iterable[Axis], keep: Mapping[str, Sequence[int]]) -> dict[str, Indices]:
    """Extends the kept indices of some axes to all axes.

    An unnamed axis keeps everything inside kept indices of its outer axis.

    Raises:
        ValueError: an unknown axis, an index out of range, or unequal numbers within the indices of an outer axis.
    """
    axes = tuple(axes)
    if unknown := [name for name in keep if name not in {axis.name for axis in axes}]:
        allowed = ", ".join(axis.name for axis in axes) or "none"
        raise ValueError(f"keep must name an axis of this block ({allowed}), got {echo(unknown[0])}")
    sizes = {axis.name: axis.size for axis in axes}
    found: dict[str, Indices] = {}
    for axis in axes:
        share = axis.size // sizes[axis.within] if axis.within else axis.size
        outer = found[axis.within] if axis.within else (0,)
        given = keep.get(axis.name)
        kept = tuple(i for k in outer for i in range(k * share, (k + 1) * share)) if given is None else tuple(given)
        if given is not None:
            _check(axis, kept)
        if axis.within:
            counts = {k: sum(i // share == k for i in kept) for k in outer}
            if sum(counts.values()) != len(kept) or len(set(counts.values())) > 1:
                raise ValueError(
                    f"{axis.name}: equally many must be kept within each kept index of {axis.within} "
                    f"({echo(list(outer))}) and none elsewhere, got {echo(list(kept))}"
                )
        found[axis.name] = kept
    return found


def _check(axis: Axis, kept: Indices) -> None:
    if not kept:
        raise ValueError(f"{axis.name}: at least 1 of {axis.size} must be kept, got none")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= axis.size:
        raise ValueError(
            f"{axis.name}: kept indices must rise and lie from 0 to {axis.size - 1}, got {echo(list(kept))}"
        )
    if axis.prefix and kept[-1] != len(kept) - 1:
        raise ValueError(f"{axis.name}: only the first ones can be kept, got {echo(list(kept))}")


def resized(block: BlockConfig, kept: Mapping[str, Indices]) -> BlockConfig:
    """Returns the config of a block after a cut.

    Args:
        kept: kept indices of every axis, from `complete`.

    Raises:
        ValueError: the block is impossible, for example `top_k` above `n_experts`.
    """
    sizes: dict[str, int] = {}
    for axis in block.axes():
        n = len(kept[axis.name])
        n = n // len(kept[axis.within]) if axis.per_index else n
        field = axis.field or axis.name
        if sizes.setdefault(field, n) != n:
            raise ValueError(f"{axis.name}: as many must be kept as of {field}, {sizes[field]}, got {n}")
    return type(block).model_validate({**block.model_dump(), **sizes})


def cut(
    weight: Tensor,
    dims: tuple[Dim, ...],
    axes: Iterable[Axis],
    kept: Mapping[str, Indices],
    rotations: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Returns a weight after a cut.

    Args:
        dims: axes of its dimensions.
        axes: all axes that `dims` names.
        kept: kept indices of every axis, from `complete`.
        rotations: matrix (size, kept) by axis; its columns are the directions that become the kept indices.
    """
    named = {axis.name: axis for axis in axes}
    alone = {dim[0][0]: k for k, dim in enumerate(dims) if len(dim) == 1 and len(dim[0]) == 1}
    for k, dim in enumerate(dims):
        only = named.get(str(dim[0][0])) if dim and len(dim) == 1 and len(dim[0]) == 1 else None
        if only is not None and rotations and only.name in rotations:
            matrix = rotations[only.name].to(weight.dtype)
            weight = torch.movedim(torch.movedim(weight, k, -1) @ matrix, -1, k)
        elif only is not None and only.within in alone:  # each index of another dimension has its own indices
            outer = alone[only.within]
            n_outer, share = len(kept[only.within]), only.size // named[only.within].size
            if weight.shape[outer] != n_outer:
                raise AssertionError(f"{only.within} must be cut before {only.name}")
            shape = [1] * weight.ndim
            shape[outer], shape[k] = n_outer, -1
            weight = torch.take_along_dim(weight, torch.tensor(kept[only.name]).remainder(share).view(shape), k)
        elif dim:
            weight = weight.index_select(k, indices(dim, named, kept).to(weight.device))
    return weight


def indices(dim: Dim, axes: Mapping[str, Axis], kept: Mapping[str, Indices]) -> Tensor:
    """Returns the kept positions of a dimension made of stretches."""
    found, start = [], 0
    for stretch in dim:
        index, size = torch.zeros(1, dtype=torch.long), 1
        for part in stretch:
            n = part if isinstance(part, int) else axes[part].size
            of_part = torch.arange(n) if isinstance(part, int) else torch.tensor(kept[part])
            index, size = (index[:, None] * n + of_part).flatten(), size * n
        found.append(start + index)
        start += size
    return torch.cat(found)
