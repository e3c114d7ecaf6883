"""A layer: one residual unit."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from explore.blocks import BlockConfig, RMSNorm, RouterStats, State


class Layer(nn.Module):
    """One residual unit: x + mixer(norm(x))."""

    def __init__(self, block: BlockConfig, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = block.build(d_model)

    def init_weights(self, std: float, out_std: float) -> None:
        self.norm.reset_parameters()
        self.mixer.init_weights(std, out_std)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        y, stats = self.mixer(self.norm(x), state)
        return x + y, stats
