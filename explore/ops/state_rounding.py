"""Decoding state in narrow formats: the state is rounded when it is written.

If a format has a scale for a whole tensor, here each sequence has its own scale; for keys and values each position of a
sequence has one. So the stored state does not depend on other batch rows. Keys, values and inputs of a convolution are
rounded by position, so they do not depend on how the text is split among calls either. Recurrent state is rounded once
at the end of each call, so it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from explore.ops.quantize import Blocks, quantize_blocks
from explore.ops.rounding import rounding_generator, rounding_noise
from explore.precision import FORMATS, FormatName


@dataclass(frozen=True)
class StateRounding:
    """How the decoding state of a layer is rounded; blocks lie along the last axis.

    Attributes:
        kv: format of keys and values, or of the latents that they are computed from; None does not round them.
        state: format of recurrent state and of the inputs that a short convolution keeps; None does not round them.
        stochastic_kv: whether keys and values are rounded stochastically instead of to nearest.
        stochastic_state: whether recurrent state and inputs of a convolution are rounded stochastically.
        seed: seed of stochastic rounding. All rows of a batch draw the same numbers.
        layer: index of the layer, part of the seed.
    """

    kv: FormatName | None = None
    state: FormatName | None = None
    stochastic_kv: bool = False
    stochastic_state: bool = False
    seed: int = 0
    layer: int = 0

    def entries(
        self, x: Float[Tensor, "batch heads new width"], name: str, start: int
    ) -> Float[Tensor, "batch heads new width"]:
        """Rounds keys, values or latents of positions from `start` on."""
        return self._by_position(x, self.kv, self.stochastic_kv, name, start)

    def inputs(self, x: Float[Tensor, "batch new channels"], start: int) -> Float[Tensor, "batch new channels"]:
        """Rounds inputs of a convolution at positions from `start` on."""
        return self._by_position(x[:, None], self.state, self.stochastic_state, "conv", start)[:, 0]

    def recurrent(self, x: Float[Tensor, "batch *shape"], length: int) -> Float[Tensor, "batch *shape"]:
        """Rounds the recurrent state after `length` positions."""
        if self.state is None:
            return x
        noise = self._noise(x, "recurrent", length) if self.stochastic_state else None
        return _rounded(x, self.state, tuple(range(1, x.ndim)), noise)

    def _by_position(self, x: Tensor, format: FormatName | None, stochastic: bool, name: str, start: int) -> Tensor:
        if format is None:
            return x
        noise = None
        if stochastic:
            noise = torch.cat([self._noise(x[:, :, i : i + 1], name, start + i) for i in range(x.shape[2])], dim=2)
        return _rounded(x, format, (1, 3), noise)

    def _noise(self, x: Tensor, name: str, position: int) -> Float32[Tensor, "batch *rest"]:
        generator = rounding_generator(self.seed, position, self.layer, name, x.device)
        return rounding_noise(x[:1], generator).expand(x.shape)


@torch.no_grad()
def _rounded(x: Tensor, format: FormatName, scaled_together: tuple[int, ...], noise: Tensor | None) -> Tensor:
    amax = x.float().abs().amax(scaled_together, keepdim=True)
    return quantize_blocks(x, noise, Blocks(FORMATS[format]), amax).to(x.dtype)
