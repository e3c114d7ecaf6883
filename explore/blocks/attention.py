"""Causal grouped-query attention."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Mixer, head_width
from explore.cost import Entry, attended_keys, matrix
from explore.ops import attention, rotate


class AttentionConfig(BlockConfig):
    """Grouped-query attention without positional encoding, as in the Nemotron hybrids.

    Attributes:
        rope_theta: base of rotary position embedding; none (NoPE) when absent.
        window: positions that a query sees, itself included; all before it when absent.
    """

    kind: Literal["attention"] = "attention"
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    d_head: PositiveInt
    rope_theta: PositiveFloat | None = None
    window: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads: {self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.rope_theta is not None and self.d_head % 2:
            raise ValueError(f"d_head: {self.d_head} is odd; rotary embedding needs an even width")
        return self

    @classmethod
    def default(cls, d_model: int) -> AttentionConfig:
        d_head = head_width(d_model, (128, 64, 32, 16), at_least=4)
        n_heads = d_model // d_head
        return cls(n_heads=n_heads, n_kv_heads=2 if n_heads % 2 == 0 else 1, d_head=d_head)

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        # Two products, scores and weighted values, each of d_head MACs a head and query-key pair.
        pairs = attended_keys(seq_len, self.window)
        return (
            matrix("q_proj", d_model, d_q, seq_len),
            matrix("k_proj", d_model, d_kv, seq_len),
            matrix("v_proj", d_model, d_kv, seq_len),
            Entry("attention", flops_seq=2 * 2 * d_q * pairs, kv_numel=2 * d_kv),
            matrix("o_proj", d_q, d_model, seq_len),
        )

    def build(self, d_model: int) -> Attention:
        return Attention(self, d_model)


class Attention(Mixer):
    """softmax(Q K^T / sqrt(d_head)) V over what came before, keys and values shared by groups of heads.

    Source: arXiv 2305.13245.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        d_q, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = nn.Linear(d_model, d_q, bias=False)
        self.k_proj = nn.Linear(d_model, d_kv, bias=False)
        self.v_proj = nn.Linear(d_model, d_kv, bias=False)
        self.o_proj = nn.Linear(d_q, d_model, bias=False)

    def init_weights(self, std: float, out_std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=out_std)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.config.d_head)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.rope_theta is not None:
            q, k = (rotate(heads, self.config.rope_theta) for heads in (q, k))
        y = attention(q, k, v, self.config.window)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None
