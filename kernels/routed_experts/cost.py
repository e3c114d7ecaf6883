"""FLOPs and bytes of the kernels, and of the same work with one kernel for each step; the formulas are in README.md.

Bytes are lower bounds: each kernel reads and writes every tensor once, and only the matrices of experts with tokens.
Indices, weights and their gradients are left out: at most two numbers per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """Sizes, in the letters of the package.

    Attributes:
        gated: the activation reads two products.
        itemsize: bytes of an element.
    """

    t: int
    k: int
    e: int
    d: int
    f: int
    gated: bool
    itemsize: int = 2

    @property
    def n(self) -> int:
        """Number of choices."""
        return self.t * self.k

    @property
    def reads(self) -> int:
        """Number of products that the activation reads."""
        return 2 if self.gated else 1

    @property
    def matrix(self) -> int:
        """Upper bound on the elements of one matrix over the experts with tokens."""
        return min(self.e, self.n) * self.d * self.f

    @property
    def product(self) -> int:
        """FLOPs of all choices through one matrix."""
        return 2 * self.n * self.d * self.f


class Pass(NamedTuple):
    """One kernel: what it does, its FLOPs in matrix products and its bytes to and from memory."""

    name: str
    flops: int
    bytes: int


def forward(shape: Shape, keep: bool) -> list[Pass]:
    """The kernels of the forward pass.

    Args:
        keep: whether a backward pass follows.
    """
    s, m = shape, shape.reads
    rows, inner, tokens = s.n * s.d, s.n * s.f, s.t * s.d
    kept = m * inner if keep and s.gated else 0
    return _passes(
        s,
        ("gather, up, activation", m * s.product, tokens + m * s.matrix + inner + kept),
        ("down, weight", s.product, inner + s.matrix + rows),
        ("combine", 0, rows + tokens),
    )


def backward(shape: Shape) -> list[Pass]:
    """The kernels of the backward pass, for all gradients."""
    s, m = shape, shape.reads
    rows, inner, tokens, all_matrix = s.n * s.d, s.n * s.f, s.t * s.d, s.e * s.d * s.f
    by_gate = [("gradient of gate", s.product, tokens + inner + all_matrix)] if s.gated else []
    return _passes(
        s,
        ("gradients of inner values", s.product, tokens + s.matrix + (2 * m + 1) * inner),
        ("gradient of rows", m * s.product, m * inner + m * s.matrix + rows),
        ("combine", 0, rows + tokens),
        ("gradient of up", s.product, tokens + inner + all_matrix),
        *by_gate,
        ("gradient of down", s.product, tokens + inner + all_matrix),
    )


def forward_unfused(shape: Shape) -> list[Pass]:
    """The forward pass as a gather, grouped products, an activation, a scaling and a scatter."""
    s, m = shape, shape.reads
    rows, inner, tokens = s.n * s.d, s.n * s.f, s.t * s.d
    return _passes(
        s,
        ("gather", 0, tokens + rows),
        ("up", m * s.product, m * (rows + s.matrix + inner)),
        ("activation", 0, (m + 1) * inner),
        ("down", s.product, inner + s.matrix + rows),
        ("weight", 0, 2 * rows),
        ("scatter", 0, rows + tokens),
    )


def backward_unfused(shape: Shape) -> list[Pass]:
    """The backward pass of `forward_unfused`, step by step."""
    s, m = shape, shape.reads
    rows, inner, tokens, all_matrix = s.n * s.d, s.n * s.f, s.t * s.d, s.e * s.d * s.f
    return _passes(
        s,
        ("scatter", 0, tokens + rows),
        ("weight", 0, 4 * rows),
        ("down", 2 * s.product, 2 * rows + 2 * inner + s.matrix + all_matrix),
        ("activation", 0, (2 * m + 1) * inner),
        ("up", 2 * m * s.product, m * (2 * rows + 2 * inner + s.matrix + all_matrix)),
        ("sum of up and gate", 0, 3 * rows if s.gated else 0),
        ("gather", 0, rows + tokens),
    )


def total(passes: Iterable[Pass], name: str = "total") -> Pass:
    """All passes as one."""
    passes = list(passes)
    return Pass(name, sum(each.flops for each in passes), sum(each.bytes for each in passes))


def bound_s(passes: Iterable[Pass], flops_per_s: float, bandwidth: float) -> float:
    """Minimum seconds of passes run one after another, each bound by products or memory."""
    return sum(max(each.flops / flops_per_s, each.bytes / bandwidth) for each in passes)


def _passes(shape: Shape, *rows: tuple[str, int, int]) -> list[Pass]:
    return [Pass(name, flops, numel * shape.itemsize) for name, flops, numel in rows]
