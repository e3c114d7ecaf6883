"""The op of a made-up mixer, as it would stand in `explore/ops`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from explore.ops.paths import OpPath, declare

declare("toy", OpPath("plain", default_on="any", reference=True, countable=True))


def toy(x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d"]:
    return F.silu(x)
