"""Multi-head latent attention."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from explore.blocks.attention import AttentionConfig
from explore.blocks.base import BlockConfig, Linear, Mixer, RMSNorm
from explore.blocks.declarations import (
    D_MODEL,
    Axis,
    Dim,
    Draw,
    Group,
    Layout,
    Powers,
    Probe,
    Role,
    Stops,
    Uncounted,
    head_width,
    ladder,
    width,
)
from explore.blocks.saved import Ranks, attention_saved, check_divides, norm_kept
from explore.blocks.state import LatentCache
from explore.cost import ConventionName, Entry, Saved, attended_keys, linear_input, matrix, vector
from explore.ops import attention, rotate


class MLAConfig(BlockConfig):
    """Attention whose keys and values are projected from one narrow vector per token.

    Attributes:
        q_rank: bottleneck width of the query projection; a single full projection when None.
        kv_rank: width of the latent vector that keys and values are projected from.
        d_nope: width of the unrotated part of a head's query and key.
        d_rope: width of the rotated part of a head's query, and of the rotated key that all heads share.
        d_v: width of a head's value.
    """

    label: ClassVar[str] = "latent attention"
    role: ClassVar[Role] = "attention"
    groups: ClassVar[Mapping[str, Group]] = AttentionConfig.groups
    colored_as: ClassVar[str] = "attention scores, KV"
    draws: ClassVar[Mapping[str, Draw]] = {"d_head": Powers(16, 64), "kv_ratio": (0.25, 0.5, 1.0)}
    ranks: ClassVar[Ranks] = Ranks(
        replicated=("q_down", "q_norm", "kv_down", "kv_norm"),
        recomputed=(("core_attn", ("attention",)), ("mla_up_proj", ("q_up", "kv_up"))),
    )

    kind: Literal["mla"] = "mla"
    n_heads: PositiveInt
    q_rank: PositiveInt | None = None
    kv_rank: PositiveInt
    d_nope: PositiveInt
    d_rope: PositiveInt
    d_v: PositiveInt
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _check(self) -> MLAConfig:
        if self.d_rope % 2:
            raise ValueError(f"d_rope: must be even, got {self.d_rope}")
        return self

    @property
    def orders_tokens(self) -> bool:
        return True

    @classmethod
    def default(cls, d_model: int) -> MLAConfig:
        d_head = head_width(d_model, (128, 64, 32, 16), at_least=4)
        n_heads = d_model // d_head
        return cls(n_heads=n_heads, kv_rank=4 * d_head, d_nope=d_head, d_rope=d_head // 2, d_v=d_head)

    @classmethod
    def random_example(cls, rng: random.Random) -> MLAConfig:
        return cls(
            n_heads=rng.randint(1, 4),
            q_rank=rng.choice([None, rng.randint(1, 4)]),
            kv_rank=rng.randint(1, 4),
            d_nope=rng.randint(1, 4),
            d_rope=2 * rng.randint(1, 4),
            d_v=rng.randint(1, 4),
        )

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Heads add up to the model's width; `kv_ratio` is the cached width divided by the model's width."""
        d_head = max(4, math.gcd(drawn["d_head"], d_model))
        n_heads, kv_rank = max(1, d_model // d_head), width(d_model, drawn["kv_ratio"])
        return {"n_heads": n_heads, "kv_rank": kv_rank, "d_nope": d_head, "d_rope": d_head // 2, "d_v": d_head}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {"kv_rank": Stops(tuple(ladder(16, 4 * d_model, 16, 8)))}

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        h, d_q = self.n_heads, self.n_heads * (self.d_nope + self.d_rope)
        if self.q_rank is None:
            query = [matrix("q_proj", d_model, d_q, seq_len)]
        else:
            query = [
                matrix("q_down", d_model, self.q_rank, seq_len),
                vector("q_norm", self.q_rank),
                matrix("q_up", self.q_rank, d_q, seq_len),
            ]
        kept = self.kv_rank + self.d_rope
        return (
            *query,
            matrix("kv_down", d_model, kept, seq_len),
            vector("kv_norm", self.kv_rank),
            matrix("kv_up", self.kv_rank, h * (self.d_nope + self.d_v), seq_len),
            Entry(
                "attention",
                flops_seq=self._pair * attended_keys(seq_len, None),
                # Absorbed form: scores and values use the latent, which all heads share.
                flops_step=2 * h * (kept + self.kv_rank) * seq_len,
                kv_numel=kept,
                kv_numel_seq=kept * seq_len,
                state_rows=(self.kv_rank, self.d_rope),
            ),
            matrix("o_proj", h * self.d_v, d_model, seq_len),
        )

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        h, q_rank = self.n_heads, self.q_rank or 0
        d_qk, d_v, up = h * (self.d_nope + self.d_rope), h * self.d_v, ("mla_up_proj",)
        return (
            # The query and latent projections read the same vector; each keeps a narrow copy.
            Saved("kv_down", "linear input", d_model * seq_len, "activation", 2, wide=False, dropped_by=("layernorm",)),
            Saved("kv_norm", "norm", (q_rank + self.kv_rank + self.d_rope) * seq_len),
            linear_input("kv_up", (q_rank + self.kv_rank) * seq_len, dropped_by=up),
            Saved("attention", "attention", (2 * d_qk + d_v) * seq_len, cut="width", dropped_by=up),
            *attention_saved(h, d_v, d_model, seq_len),
        )

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        h, d_qk = self.n_heads, self.n_heads * (self.d_nope + self.d_rope)
        # Values are copied, except with one head or one position, where they are a view shared with the keys.
        d_v = h * self.d_v if h > 1 and seq_len > 1 else h * (self.d_nope + self.d_v)
        q_rank = () if self.q_rank is None else (norm_kept("q_norm", self.q_rank, seq_len),)
        return (
            Saved("kv_down", "linear input", d_model * seq_len, "float32"),
            *q_rank,
            norm_kept("kv_norm", self.kv_rank + self.d_rope, seq_len),
            Saved("kv_up", "linear input", ((self.q_rank or 0) + self.kv_rank) * seq_len, "float32"),
            Saved("attention", "attention", (2 * d_qk + d_v) * seq_len, "float32"),
            Saved("o_proj", "linear input", h * self.d_v * seq_len, "float32"),
        )

    def context_numel(self, cp: int) -> float:
        return (cp - 1) * float(self.n_heads * (self.d_nope + self.d_rope + self.d_v))

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("tp", tp, "n_heads", self.n_heads)

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        return {"palm": {"attention": self._pair * seq_len**2}}

    def uncounted(self, seq_len: int) -> Uncounted:
        """FLOPs for masked query-key pairs: attention without a fused kernel computes every pair."""
        masked = self._pair * (seq_len**2 - attended_keys(seq_len, None))
        return Uncounted(masked, 3 * masked)

    @property
    def _pair(self) -> int:
        """FLOPs per query-key pair: score and weighted value, all heads."""
        return 2 * self.n_heads * (self.d_nope + self.d_rope + self.d_v)

    def regions(self, seq_len: int) -> Mapping[str, int]:
        return {"attention": self.n_heads * seq_len}

    def axes(self) -> tuple[Axis, ...]:
        q_rank = () if self.q_rank is None else (Axis("q_rank", self.q_rank, probe=Probe("q_norm", "output")),)
        kv_rank = Axis("kv_rank", self.kv_rank, probe=Probe("kv_norm", "output"))
        return (Axis("n_heads", self.n_heads, probe=Probe("o_proj", "input")), *q_rank, kv_rank)

    def layout(self) -> Layout:
        q: Dim = (("n_heads", self.d_nope + self.d_rope),)
        q_rank: Dim = (("q_rank",),)
        kv_rank: Dim = (("kv_rank",),)
        return {
            "q_proj.weight": (q, D_MODEL),
            "q_down.weight": (q_rank, D_MODEL),
            "q_norm.weight": (q_rank,),
            "q_up.weight": (q, q_rank),
            "kv_down.weight": ((("kv_rank",), (self.d_rope,)), D_MODEL),
            "kv_norm.weight": (kv_rank,),
            "kv_up.weight": ((("n_heads", self.d_nope + self.d_v),), kv_rank),
            "o_proj.weight": (D_MODEL, (("n_heads", self.d_v),)),
        }

    def build(self, d_model: int) -> MLA:
        return MLA(self, d_model)

    def new_state(self, capacity: int | None = None) -> LatentCache:
        return LatentCache(capacity=capacity)


class MLA(Mixer[LatentCache]):
    """Attention with keys [W_uk c; k_r] and values W_uv c; only c = norm(W_down x) and the rotated key k_r are cached.

    A single token that continues from a state is decoded in the absorbed form: W_uk is applied to the query and W_uv
    to the weighted sum, so per-head keys and values are never computed.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; rotation pairs channels i and i + d/2, not neighbours.
    """

    def __init__(self, config: MLAConfig, d_model: int) -> None:
        super().__init__()
        self.config = c = config
        d_q = c.n_heads * (c.d_nope + c.d_rope)
        if c.q_rank is None:
            self.q_proj: nn.Module = Linear(d_model, d_q, bias=False)
        else:
            self.q_down = Linear(d_model, c.q_rank, bias=False)
            self.q_norm = RMSNorm(c.q_rank, eps=c.norm_eps)
            self.q_up = Linear(c.q_rank, d_q, bias=False)
        self.kv_down = Linear(d_model, c.kv_rank + c.d_rope, bias=False)
        self.kv_norm = RMSNorm(c.kv_rank, eps=c.norm_eps)
        self.kv_up = Linear(c.kv_rank, c.n_heads * (c.d_nope + c.d_v), bias=False)
        self.o_proj = Linear(c.n_heads * c.d_v, d_model, bias=False)

    def init_weights(self, std: float, out_std: float) -> None:
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=out_std if module is self.o_proj else std)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LatentCache | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        c = self.config
        start = 0 if state is None else state.length
        q = self.q_proj(x) if c.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q_nope, q_rope = q.unflatten(-1, (c.n_heads, -1)).transpose(1, 2).split((c.d_nope, c.d_rope), dim=-1)
        q_rope = rotate(q_rope, c.rope_theta, start)
        latent, k_rope = self.kv_down(x).split((c.kv_rank, c.d_rope), dim=-1)
        latent = self.kv_norm(latent)[:, None]
        k_rope = rotate(k_rope[:, None], c.rope_theta, start)
        if state is not None:
            latent, k_rope = state.update(latent, k_rope)
        if state is not None and start > 0 and x.shape[1] == 1:
            y = self._absorbed(q_nope, q_rope, latent, k_rope)
        else:
            k_nope, v = (
                self.kv_up(latent[:, 0]).unflatten(-1, (c.n_heads, -1)).transpose(1, 2).split((c.d_nope, c.d_v), dim=-1)
            )
            k = torch.cat((k_nope, k_rope.expand(-1, c.n_heads, -1, -1)), dim=-1)
            y = attention(torch.cat((q_nope, q_rope), dim=-1), k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        c = self.config
        up = self.kv_up.weight.to(latent.dtype).view(c.n_heads, c.d_nope + c.d_v, c.kv_rank)
        W_uk, W_uv = up.split((c.d_nope, c.d_v), dim=1)
        q_latent = torch.bmm(q_nope[:, :, 0].transpose(0, 1), W_uk).transpose(0, 1)  # batch heads kv_rank
        scores = q_latent @ latent[:, 0].transpose(1, 2) + q_rope[:, :, 0] @ k_rope[:, 0].transpose(1, 2)
        scores = scores / (c.d_nope + c.d_rope) ** 0.5
        mixed = scores.softmax(dim=-1).to(latent.dtype) @ latent[:, 0]
        return torch.bmm(mixed.transpose(0, 1), W_uv.transpose(1, 2)).transpose(0, 1)[:, :, None]
