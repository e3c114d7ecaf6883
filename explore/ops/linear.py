"""Linear layers whose weights are laid out once, for many products with few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from explore.ops.paths import path_of

MIN_PACKED = 1 << 19
"""Rows times elements of a weight from which oneDNN's product is faster, though it costs more to call."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Lays out the weights of a model's linear layers for products with so many rows, inside a `with` block.

    Without gradients, on a CPU and outside autocast. The weights must stay as they are inside the block.
    """
    packed = [layer for layer in model.modules() if type(layer) is nn.Linear and _gains(layer.weight, rows)]
    try:
        for layer in packed:
            layer.forward = _product(layer, rows)  # type: ignore[assignment, method-assign]
        yield
    finally:
        for layer in packed:
            vars(layer).pop("forward", None)


def _gains(weight: Tensor, rows: int) -> bool:
    return (
        path_of("linear", weight.device.type) == "packed"
        and weight.is_cpu
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and weight.dtype == torch.float32
        and rows * weight.numel() >= MIN_PACKED
    )


def _product(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
        return y

    return product
