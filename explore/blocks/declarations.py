"""Types with which a block describes itself to figures, search, workbench, proof, compilation and timing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Role = Literal["attention", "recurrent", "mlp", "experts"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Purpose of a block, in the order figures stack component groups."""


class Group(NamedTuple):
    """A part of a block that figures show as one.

    Attributes:
        color: red, green and blue from 0 to 1, distinguishable from all other groups with any colour vision.
        components: ledger components in the group; the first group of a block also takes all unassigned ones.
    """

    color: tuple[float, float, float]
    components: tuple[str, ...] = ()


class Powers(NamedTuple):
    """The powers of two from `low` to `high`, inclusive; both bounds are powers of two."""

    low: int
    high: int


Draw = Powers | tuple[Any, ...]
"""Values that a search may draw for a size: powers of two, or a few values."""


class Stops(NamedTuple):
    """Stops of a size's slider in the workbench.

    Attributes:
        values: sizes offered; None leaves the size out.
        open: also offer the sizes of the initial model and those derived from its width.
    """

    values: tuple[int | None, ...]
    open: bool = True


class Uncounted(NamedTuple):
    """FLOPs per sequence that are executed but not in the ledger because the maths does not need them.

    Attributes:
        forward: FLOPs of a forward pass.
        training: FLOPs of a forward and a backward pass.
    """

    forward: int = 0
    training: int = 0


def ladder(low: int, high: int, step: int, per_octave: int) -> Iterator[int]:
    """Yields multiples of `step` from `low` to `high`, at most `per_octave` per doubling."""
    value = low
    while value <= high:
        yield value
        value += max(step, 2 ** (value.bit_length() - 1) // per_octave)


MOST_TRIED = 100_000
"""Largest trial divisor; all divisors are found for numbers up to its square."""


def divisors(n: int) -> list[int]:
    """Returns the divisors of `n` in ascending order: those up to `MOST_TRIED` and their cofactors."""
    small = [k for k in range(1, min(math.isqrt(n), MOST_TRIED) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def head_width(d_model: int, widths: tuple[int, ...], at_least: int) -> int:
    """The largest of `widths` that divides `d_model` into `at_least` heads.

    Raises:
        ValueError: no width does.
    """
    for width in widths:
        if d_model % width == 0 and d_model // width >= at_least:
            return width
    smallest = widths[-1]
    raise ValueError(
        f"d_model: must be a multiple of {smallest} and at least {smallest * at_least} "
        f"to be divided into heads, got {d_model}"
    )


def width(d_model: int, ratio: float, multiple: int = 8) -> int:
    """Returns the positive multiple of `multiple` nearest to `ratio` times the model's width."""
    return max(multiple, round(ratio * d_model / multiple) * multiple)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a small random tensor that requires a gradient, as input for timing an op."""
    return torch.randn(shape).mul_(0.1).to(dtype).requires_grad_()


class Probe(NamedTuple):
    """Activations by which the indices of an axis are scored.

    Attributes:
        module: submodule of the mixer whose weight has the axis.
        side: score the module's input or its output.
        stretches: positions of the stretches of that dimension to score (empty: all); their scores are multiplied.
        squares: sum squares over all positions of the text instead of averaging magnitudes over a sequence.
    """

    module: str
    side: Literal["input", "output"]
    stretches: tuple[int, ...] = ()
    squares: bool = False


class FusedNorm(NamedTuple):
    """A norm over some axes that an op computes, so no module outputs its result.

    Attributes:
        read_by: module that reads its output.
        groups: axis along which each index has its own mean square.
    """

    read_by: str
    groups: str


class Axis(NamedTuple):
    """An axis of a trained block whose indices can be kept or cut.

    Attributes:
        name: name used in plans, scores and commands.
        size: number of indices.
        within: outer axis; each of its indices holds the same number of this axis's indices, in order (heads within
            groups, for example). A cut keeps the same number in every outer index it keeps.
        field: config field that counts the kept indices; `name` when empty.
        per_index: the field counts indices per index of `within`, not in total.
        prefix: only leading indices can be kept.
        rotatable: rotating the indices leaves the function unchanged, so principal axes can be kept instead.
        probe: activations that score the axis; without them an index scores the sum of the axes inside it.
        inner: axis, chosen earlier, over whose kept indices the score is summed.
        powers: exponents of weight norms whose product is the magnitude of an index, if not all are 1.
    """

    name: str
    size: int
    within: str = ""
    field: str = ""
    per_index: bool = False
    prefix: bool = False
    rotatable: bool = False
    probe: Probe | None = None
    inner: str = ""
    powers: tuple[tuple[str, int], ...] = ()


Dim = tuple[tuple[str | int, ...], ...]
"""Stretches of one dimension of a weight. A stretch runs over its axes and fixed lengths, the last one fastest; a
dimension without stretches has no axis."""

Layout = Mapping[str, tuple[Dim, ...]]
"""Dimensions of every weight and buffer of a module by name, including those that an option removes."""

D_MODEL: Dim = (("d_model",),)
WHOLE: Dim = ()
