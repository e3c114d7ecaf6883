"""The words in which a block says what it is to figures, search, workbench, proof, compilation and timing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Role = Literal["attention", "recurrent", "mlp", "experts"]
ROLES: tuple[Role, ...] = get_args(Role)
"""What a block is for, in the order in which figures stack the groups of its components."""


class Group(NamedTuple):
    """A part of a block that figures show as one.

    Attributes:
        color: red, green and blue, from 0 to 1; different to every eye from the colours of all other groups.
        components: of the ledger. The first group of a block has those that no other one names.
    """

    color: tuple[float, float, float]
    components: tuple[str, ...] = ()


class Powers(NamedTuple):
    """The powers of two from `low` to `high`, both of which are one."""

    low: int
    high: int


Draw = Powers | tuple[Any, ...]
"""What a search may draw a size from: powers of two, or a few values."""


class Stops(NamedTuple):
    """Where the slider of a size stops.

    Attributes:
        values: None stands for a size that is left out.
        open: the sizes of the model that was begun with, and those that follow its width, are stops too.
    """

    values: tuple[int | None, ...]
    open: bool = True


class Uncounted(NamedTuple):
    """FLOPs of one sequence that run and are in no ledger, since the maths does not need them.

    Attributes:
        forward: of a forward pass.
        training: of a forward and a backward pass.
    """

    forward: int = 0
    training: int = 0


class Region(NamedTuple):
    """Calls of an op that can be compiled.

    Attributes:
        n_elements: elements per token, to which the time of the op is proportional.
        lengths: of its calls on one sequence, each of which is compiled for itself.
    """

    n_elements: int
    lengths: tuple[int, ...]


def ladder(low: int, high: int, step: int, per_octave: int) -> Iterator[int]:
    """From `low` to `high` in multiples of `step`, and no more than `per_octave` of them to a doubling."""
    value = low
    while value <= high:
        yield value
        value += max(step, 2 ** (value.bit_length() - 1) // per_octave)


MOST_TRIED = 100_000
"""Largest number that is tried as a divisor: all divisors are found of a number up to its square."""


def divisors(n: int) -> list[int]:
    """The numbers that divide `n`, in rising order: all those up to `MOST_TRIED`, and what each leaves."""
    small = [k for k in range(1, min(math.isqrt(n), MOST_TRIED) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def head_width(d_model: int, widths: tuple[int, ...], at_least: int) -> int:
    """The largest of `widths` that divides `d_model` into `at_least` heads.

    Raises:
        ValueError: none does.
    """
    for width in widths:
        if d_model % width == 0 and d_model // width >= at_least:
            return width
    smallest = widths[-1]
    raise ValueError(
        f"d_model: {d_model} is not divisible into heads; "
        f"allowed are multiples of {smallest}, at least {smallest * at_least}"
    )


def width(d_model: int, ratio: float, multiple: int = 8) -> int:
    """A multiple of `multiple` near `ratio` times the model's width, and not zero."""
    return max(multiple, round(ratio * d_model / multiple) * multiple)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers near zero that take a gradient: an input of an op that is timed."""
    return torch.randn(shape).mul_(0.1).to(dtype).requires_grad_()


class Probe(NamedTuple):
    """Activations by which the indices of an axis are scored.

    Attributes:
        module: of the mixer; its weight has the axis.
        side: what the module reads, or what it gives.
        stretches: of that dimension, by position, all when empty; of several ones the scores are multiplied.
        squares: sum squares over all positions of the text, rather than take the mean size over those of a sequence.
    """

    module: str
    side: Literal["input", "output"]
    stretches: tuple[int, ...] = ()
    squares: bool = False


class FusedNorm(NamedTuple):
    """A norm over some axes that an op computes, so that no module gives its output.

    Attributes:
        read_by: module that reads what it gives.
        groups: axis of whose indices each has a mean square of its own.
    """

    read_by: str
    groups: str


class Axis(NamedTuple):
    """Indices of a trained block of which some can be kept and the others cut away.

    Attributes:
        name: what plans, scores and commands call it.
        size: how many indices there are.
        within: axis whose indices hold equally many of this one's each, in order: heads within groups, for example. Of
            every index of it that is kept, equally many are kept.
        field: field of the config that counts what is kept; the name where it is empty.
        per_index: the field counts those within one index of `within`, not all of them.
        prefix: only the first ones can be kept.
        rotatable: a rotation of the indices changes nothing in the maths, so that principal axes can be kept instead.
        probe: activations that score it. Without one the score is that of all that lies within an index.
        inner: the score is a sum over the kept indices of this axis, which is chosen before.
        powers: of the norms of weights whose product is the magnitude of an index, where they are not all 1.
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
"""Stretches of a dimension of a weight. Each runs over the indices of its axes and over fixed lengths, the last one
fastest; a dimension without stretches has no axis."""

Layout = Mapping[str, tuple[Dim, ...]]
"""The dimensions of every weight and buffer of a module, by name; also of those that an option leaves out."""

D_MODEL: Dim = (("d_model",),)
WHOLE: Dim = ()
