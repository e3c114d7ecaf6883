"""What a layer keeps from its forward for its backward pass, tensor by tensor.

Kept are inputs of linear layers, of norms and of activations, the queries, keys, values and outputs of attention,
what a scan starts from, and the router's scores. They are counted in elements of one sequence; bytes follow from a
precision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

SAVED_GROUPS = ("linear input", "attention", "scan", "norm", "activation", "routing", "expert")
"""What tensors are kept for; `expert` is all that belongs to routed experts."""

Cut = Literal["tokens", "width", "expert width", "expert tokens"]
"""How devices divide a tensor: by tokens alone, or by heads or inner width as well; those of experts apart."""

WIDTHS = {"activation": 2.0, "float32": 4.0, "int64": 8.0, "byte": 1.0}
"""Bytes of an element; activations are taken to be in bf16."""


class Saved(NamedTuple):
    """One tensor.

    Attributes:
        component: the component of the ledger that keeps it.
        group: what it is kept for, of `SAVED_GROUPS`.
        numel_seq: elements of one sequence.
        width: in what it is kept, a key of `WIDTHS`.
        narrow_copies: linear layers that read it, each of which keeps a copy in the format of narrow products.
        wide: something else needs it in full width as well; without narrow products all share one tensor.
        cut: how devices divide it.
        dropped_by: settings that make it unnecessary, each alone: recomputed modules, and fused kernels.
    """

    component: str
    group: str
    numel_seq: int
    width: str = "activation"
    narrow_copies: int = 0
    wide: bool = True
    cut: Cut = "tokens"
    dropped_by: tuple[str, ...] = ()

    def n_bytes(self, narrow: float | None = None) -> float:
        """Bytes of one sequence.

        Args:
            narrow: bytes of an element in the format of narrow products; none when products are in full width.
        """
        if narrow is None or not self.narrow_copies:
            return self.numel_seq * WIDTHS[self.width]
        full = self.numel_seq * WIDTHS[self.width] if self.wide else 0.0
        return full + self.narrow_copies * self.numel_seq * narrow

    def kept(self, settings: Collection[str]) -> bool:
        """Whether it is kept under some settings."""
        return not any(name in settings for name in self.dropped_by)


def linear_input(component: str, numel_seq: int, *, cut: Cut = "tokens", dropped_by: tuple[str, ...] = ()) -> Saved:
    """What a linear layer alone reads: its weight's gradient needs it."""
    return Saved(component, "linear input", numel_seq, narrow_copies=1, wide=False, cut=cut, dropped_by=dropped_by)


def saved_bytes(tensors: Iterable[Saved], settings: Collection[str] = (), narrow: float | None = None) -> float:
    """Bytes of one sequence that are kept under some settings."""
    return sum(tensor.n_bytes(narrow) for tensor in tensors if tensor.kept(settings))
