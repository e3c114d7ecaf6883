"""One depth of multi-token prediction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from explore.blocks import Linear, RMSNorm, RouterStats, State
from explore.model.config import ModelConfig
from explore.model.layer import Layer


class MTPDepth(nn.Module):
    """One depth: norm(layers(W [norm(embedding of the next token); norm(hidden state)])).

    Embedding and head are the main model's. Depth 1 reads the main model's hidden state after its
    final norm; depth k + 1 reads the output of depth k.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2; Nemotron 3 applies one depth several times.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mtp is not None
        d, eps = config.d_model, config.norm_eps
        self.embedding_norm = RMSNorm(d, eps=eps)
        self.hidden_norm = RMSNorm(d, eps=eps)
        self.eh_proj = Linear(2 * d, d, bias=False)
        self.layers = nn.ModuleList(Layer(config.blocks[letter], d, eps) for letter in config.mtp.pattern)
        self.norm = RMSNorm(d, eps=eps)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.eh_proj.weight, std=std)
        for norm in (self.embedding_norm, self.hidden_norm, self.norm):
            norm.reset_parameters()
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.init_weights(std, out_std)

    def forward(
        self,
        embedding: Float[Tensor, "batch seq d_model"],
        hidden: Float[Tensor, "batch seq d_model"],
        state: list[State] | None = None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], list[RouterStats]]:
        """Returns the head's input at this depth, and router statistics.

        Args:
            embedding: embedding of the token after each position, shifted by one more at every depth.
            hidden: output of the previous depth.
            state: decoding state of every layer, as in the main model.
        """
        x = self.eh_proj(torch.cat((self.embedding_norm(embedding), self.hidden_norm(hidden)), dim=-1))
        x = x.to(embedding.dtype)  # the residual stream stays in fp32 under autocast, as the main model's does
        stats = []
        for i, layer in enumerate(self.layers):
            x, layer_stats = layer(x, None if state is None else state[i])
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(x), stats
