"""Products of a trained model with quantised weights; the scales of the rows come from a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from explore.ops.grouped import grouped_product
from explore.ops.low_precision import Layout, Quantizer
from explore.ops.paths import product_dtype
from explore.ops.quantize import Blocks, quantize_blocks
from explore.precision import FORMATS


@dataclass(eq=False)
class Observer(Quantizer):
    """Computes unquantised products and records the largest magnitude of their rows.

    Attributes:
        amax: largest magnitude of the rows of each expert, by name of the weight.
    """

    amax: dict[str, Float32[Tensor, " e"]] = field(default_factory=dict)

    def product(
        self, rows: Float[Tensor, "r d_in"], weight: Float[Tensor, "e d_in d_out"], layout: Layout, name: str = ""
    ) -> Float[Tensor, "r d_out"]:
        found = torch.stack([_amax(part) for part in rows.split(layout.loads)])
        self.amax[name] = torch.maximum(self.amax[name], found) if name in self.amax else found
        dtype = product_dtype(rows)
        return grouped_product(rows.to(dtype), weight.to(dtype), layout.loads)


@dataclass(eq=False)
class CalibratedQuantizer(Quantizer):
    """Quantises rows to nearest. The scale of a tensor, if the format has one, comes from a calibration.

    Weights are used unchanged. There is no backward pass.

    Attributes:
        amax: largest magnitude of the rows of each expert in the calibration, by name of the weight. Larger elements
            saturate.
    """

    amax: Mapping[str, Float32[Tensor, " e"]] = field(default_factory=dict)

    def product(
        self, rows: Float[Tensor, "r d_in"], weight: Float[Tensor, "e d_in d_out"], layout: Layout, name: str = ""
    ) -> Float[Tensor, "r d_out"]:
        amax = self.amax[name].to(rows.device)[layout.expert_of(rows.device)][:, None]
        x = quantize_blocks(rows, None, Blocks(FORMATS[self.format], 1), amax)
        return grouped_product(x, weight.float(), layout.loads).to(product_dtype(rows))


def _amax(rows: Tensor) -> Tensor:
    return rows.abs().amax().float() if len(rows) else torch.zeros((), device=rows.device)
