"""Tensors that a layer saves in the forward pass for the backward pass.

They are the inputs of linear layers, norms and activations, the queries, keys, values and outputs of attention,
the inputs of a scan, and the router's scores. Sizes are elements per sequence; bytes follow from the
precision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

SAVED_GROUPS = ("linear input", "attention", "scan", "norm", "activation", "routing", "expert")
"""Purposes of saved tensors; `expert` covers everything in routed experts."""

Cut = Literal["tokens", "width", "expert width", "expert tokens"]
"""How devices split a tensor: by tokens only, also by heads or inner width, or by experts."""

WIDTHS = {"activation": 2.0, "float32": 4.0, "int64": 8.0, "byte": 1.0}
"""Bytes per element; activations are assumed to be bf16."""


class Saved(NamedTuple):
    """One saved tensor.

    Attributes:
        component: ledger component that saves it.
        group: its purpose, one of `SAVED_GROUPS`.
        numel_seq: elements per sequence.
        width: its dtype, a key of `WIDTHS`.
        narrow_copies: number of linear layers that each save a copy in the narrow format.
        wide: another reader needs it in full precision too; without narrow products all readers share one tensor.
        cut: how devices split it.
        dropped_by: settings (recomputed modules, fused kernels), each of which makes saving it unnecessary.
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
        """Bytes per sequence.

        Args:
            narrow: bytes per element of the narrow format; None when products use full precision.
        """
        if narrow is None or not self.narrow_copies:
            return self.numel_seq * WIDTHS[self.width]
        full = self.numel_seq * WIDTHS[self.width] if self.wide else 0.0
        return full + self.narrow_copies * self.numel_seq * narrow

    def kept(self, settings: Collection[str]) -> bool:
        """Whether it is saved under the given settings."""
        return not any(name in settings for name in self.dropped_by)


def linear_input(component: str, numel_seq: int, *, cut: Cut = "tokens", dropped_by: tuple[str, ...] = ()) -> Saved:
    """The input of a linear layer with no other reader; the weight's gradient needs it."""
    return Saved(component, "linear input", numel_seq, narrow_copies=1, wide=False, cut=cut, dropped_by=dropped_by)


def saved_bytes(tensors: Iterable[Saved], settings: Collection[str] = (), narrow: float | None = None) -> float:
    """Bytes saved per sequence under the given settings."""
    return sum(tensor.n_bytes(narrow) for tensor in tensors if tensor.kept(settings))
