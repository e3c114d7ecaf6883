"""Causal grouped-query attention."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Call, Linear, Mixer, RMSNorm, parameter
from explore.blocks.declarations import (
    D_MODEL,
    WHOLE,
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
    divisors,
    head_width,
    leaf,
)
from explore.blocks.saved import Ranks, attention_saved, check_divides, norm_kept
from explore.blocks.state import KVCache, WindowCache
from explore.config import added_later
from explore.cost import (
    ConventionName,
    Entry,
    Saved,
    attended_keys,
    convolution,
    linear_input,
    matrix,
    vector,
    visible_keys,
)
from explore.ops import attention, causal_conv1d, rotate


class AttentionConfig(BlockConfig):
    """Grouped-query attention without positional encoding, as in the Nemotron hybrids.

    Attributes:
        rope_theta: base of the rotary position embedding; no positional encoding (NoPE) when None.
        window: number of positions a query attends to, including its own; unlimited when None.
        bias: which projections have biases: none of them, query, key and value, or those and the output.
        qk_norm: apply RMSNorm to each query and key head before the rotation.
        sinks: add one learned logit per head to the softmax; it takes weight but contributes no value.
        output_gate: multiply the heads' outputs by the sigmoid of a further projection of the input.
        d_rope: number of leading channels of a head that are rotated; the whole head when None.
        d_conv: width, in positions, of a depthwise causal convolution over queries, keys and values, applied before
            norm and rotation; no convolution when None.
    """

    label: ClassVar[str] = "attention"
    role: ClassVar[Role] = "attention"
    groups: ClassVar[Mapping[str, Group]] = {
        "attention projections": Group((0.00, 0.45, 0.70)),
        "attention scores, KV": Group((0.53, 0.77, 1.00), ("attention",)),
    }
    draws: ClassVar[Mapping[str, Draw]] = {"d_head": Powers(16, 64), "sharing": Powers(1, 4)}
    ranks: ClassVar[Ranks] = Ranks(
        replicated=("qk_norm",), full_width=("conv1d",), recomputed=(("core_attn", ("attention",)),)
    )

    kind: Literal["attention"] = "attention"
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    d_head: PositiveInt
    rope_theta: PositiveFloat | None = None
    window: int | None = Field(default=None, ge=1)
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    sinks: bool = False
    norm_eps: PositiveFloat = 1e-5
    output_gate: bool = added_later(False)
    d_rope: PositiveInt | None = added_later(None)
    d_conv: PositiveInt | None = added_later(None)

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads: must divide n_heads={self.n_heads}, got {self.n_kv_heads}")
        if self.d_rope is not None:
            if self.rope_theta is None:
                raise ValueError(f"d_rope: must be absent without rope_theta, got {self.d_rope}")
            if self.d_rope % 2 or self.d_rope > self.d_head:
                raise ValueError(f"d_rope: must be even and at most d_head={self.d_head}, got {self.d_rope}")
        elif self.rope_theta is not None and self.d_head % 2:
            raise ValueError(f"d_head must be even with rope_theta, got {self.d_head}")
        return self

    @property
    def orders_tokens(self) -> bool:
        return self.rope_theta is not None or self.d_conv is not None

    @property
    def d_conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values; 0 without one."""
        return 0 if self.d_conv is None else (self.n_heads + 2 * self.n_kv_heads) * self.d_head

    @classmethod
    def default(cls, d_model: int) -> AttentionConfig:
        d_head = head_width(d_model, (128, 64, 32, 16), at_least=4)
        n_heads = d_model // d_head
        return cls(n_heads=n_heads, n_kv_heads=2 if n_heads % 2 == 0 else 1, d_head=d_head)

    @classmethod
    def random_example(cls, rng: random.Random) -> AttentionConfig:
        groups, per_group = rng.randint(1, 4), rng.randint(1, 4)
        d_head, rope_theta = 2 * rng.randint(1, 4), rng.choice([None, 1e4])
        return cls(
            n_heads=groups * per_group,
            n_kv_heads=groups,
            d_head=d_head,
            window=rng.choice([None, rng.randint(1, 30)]),
            rope_theta=rope_theta,
            bias=rng.choice(["none", "qkv", "all"]),
            qk_norm=rng.random() < 0.5,
            sinks=rng.random() < 0.5,
            output_gate=rng.random() < 0.5,
            d_rope=None if rope_theta is None else rng.choice([None, *range(2, d_head + 1, 2)]),
            d_conv=rng.choice([None, rng.randint(1, 4)]),
        )

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Query heads add up to the model's width; `sharing` query heads share one key-value head."""
        d_head = math.gcd(drawn["d_head"], d_model)
        n_heads = d_model // d_head
        return {"n_heads": n_heads, "n_kv_heads": n_heads // math.gcd(drawn["sharing"], n_heads), "d_head": d_head}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {"n_kv_heads": Stops(tuple(divisors(self.n_heads)), open=False)}

    @classmethod
    def settled(cls, sizes: Mapping[str, Any]) -> dict[str, int]:
        kv, heads = sizes.get("n_kv_heads"), sizes.get("n_heads")
        if not (isinstance(kv, int) and isinstance(heads, int) and kv >= 1 and heads >= 1 and heads % kv):
            return {}
        return {"n_kv_heads": max(n for n in divisors(heads) if n <= kv)}

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        seen = visible_keys(seq_len, self.window)
        qkv_bias, o_bias = self.bias != "none", self.bias == "all"
        return (
            matrix("q_proj", d_model, d_q, seq_len, bias=qkv_bias),
            matrix("k_proj", d_model, d_kv, seq_len, bias=qkv_bias),
            matrix("v_proj", d_model, d_kv, seq_len, bias=qkv_bias),
            *((matrix("gate_proj", d_model, d_q, seq_len, bias=qkv_bias),) if self.output_gate else ()),
            *((convolution("conv1d", self.d_conv_channels, self.d_conv, seq_len),) if self.d_conv else ()),
            *((vector("qk_norm", 2 * self.d_head),) if self.qk_norm else ()),
            *((vector("sinks", self.n_heads),) if self.sinks else ()),
            Entry(
                "attention",
                # Two products (scores, weighted values), each d_head MACs per head and query-key pair.
                flops_seq=2 * 2 * d_q * attended_keys(seq_len, self.window),
                flops_step=2 * 2 * d_q * seen,
                kv_numel=2 * d_kv,
                kv_numel_seq=2 * d_kv * seen,
                state_rows=(self.d_head,),
            ),
            matrix("o_proj", d_q, d_model, seq_len, bias=o_bias),
        )

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        return (
            linear_input("q_proj", d_model * seq_len),
            *((Saved("conv1d", "attention", self.d_conv_channels * seq_len, cut="width"),) if self.d_conv else ()),
            *((Saved("qk_norm", "norm", (d_q + d_kv) * seq_len, cut="width"),) if self.qk_norm else ()),
            Saved("attention", "attention", (d_q + 2 * d_kv) * seq_len, cut="width"),
            # The gate and the gated outputs of the heads.
            *((Saved("gate_proj", "activation", 2 * d_q * seq_len, cut="width"),) if self.output_gate else ()),
            *attention_saved(self.n_heads, d_q, d_model, seq_len),
        )

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        heads, d_q, d_kv = self.n_heads + self.n_kv_heads, self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        padded = (seq_len + (self.d_conv or 1) - 1) * self.d_conv_channels
        return (
            Saved("q_proj", "linear input", d_model * seq_len, "float32"),
            *((Saved("conv1d", "attention", padded, "float32"),) if self.d_conv else ()),
            *((norm_kept("qk_norm", d_q + d_kv, seq_len, heads),) if self.qk_norm else ()),
            Saved("attention", "attention", (d_q + 2 * d_kv) * seq_len, "float32"),
            *((Saved("gate_proj", "activation", 2 * d_q * seq_len, "float32"),) if self.output_gate else ()),
            Saved("o_proj", "linear input", d_q * seq_len, "float32"),
        )

    def context_numel(self, cp: int) -> float:
        return (cp - 1) * 2.0 * self.n_kv_heads * self.d_head  # keys and values go round a ring

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("tp", tp, "n_heads", self.n_heads)
        if tp % self.n_kv_heads:  # with more ranks than KV heads, several ranks share one
            check_divides("tp", tp, "n_kv_heads", self.n_kv_heads)

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        square = 2 * 2 * self.n_heads * self.d_head * seq_len**2
        none = {"conv1d": 0} if self.d_conv else {}
        return {"megatron": {"attention": square // 2, **none}, "palm": {"attention": square}}

    def uncounted(self, seq_len: int) -> Uncounted:
        """FLOPs for masked query-key pairs: attention without a fused kernel computes every pair."""
        masked = 2 * 2 * self.n_heads * self.d_head * (seq_len**2 - attended_keys(seq_len, self.window))
        return Uncounted(masked, 3 * masked)

    def regions(self, seq_len: int) -> Mapping[str, int]:
        seen = min(self.window or seq_len, seq_len)
        conv = {"conv": self.d_conv_channels} if self.d_conv else {}
        return {"attention": self.n_heads * seen, **conv}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        q, k, v = (
            leaf(batch_size, heads, seq_len, self.d_head, dtype=dtype)
            for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        )
        return {"attention": lambda: attention(q, k, v, self.window)}

    def axes(self) -> tuple[Axis, ...]:
        """The axes: key-value heads, the query heads that share each, and channels (pairs of channels with RoPE)."""
        probe = Probe("o_proj", "input")
        return (Axis("n_kv_heads", self.n_kv_heads), Axis("n_heads", self.n_heads, within="n_kv_heads", probe=probe))

    def layout(self) -> Layout:
        q: Dim = (("n_heads", self.d_head),)
        kv: Dim = (("n_kv_heads", self.d_head),)
        projections = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": q}
        return {
            **{f"{name}.weight": (rows, D_MODEL) for name, rows in projections.items()},
            **{f"{name}.bias": (rows,) for name, rows in projections.items()},
            "conv1d.weight": ((*q, *kv, *kv), WHOLE, WHOLE),
            "q_norm.weight": (WHOLE,),
            "k_norm.weight": (WHOLE,),
            "sinks": ((("n_heads",),),),
            "o_proj.weight": (D_MODEL, q),
            "o_proj.bias": (D_MODEL,),
        }

    def build(self, d_model: int) -> Attention:
        return Attention(self, d_model)

    def new_state(self, capacity: int | None = None) -> KVCache:
        n_past = (self.d_conv or 1) - 1
        if self.window is None:
            return KVCache(capacity=capacity, n_past=n_past)
        return WindowCache(capacity=capacity, n_past=n_past, window=self.window)


class Attention(Mixer[KVCache]):
    """Causal softmax(Q K^T / sqrt(d_head)) V; groups of query heads share keys and values.

    Source: arXiv 2305.13245; sinks as in GPT-OSS, arXiv 2508.10925; output gate as in arXiv 2505.06708 and Qwen3-Next;
    convolution as in Primer, arXiv 2109.08668, with any number of positions.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        d_q, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        qkv_bias = config.bias != "none"
        self.q_proj = Linear(d_model, d_q, bias=qkv_bias)
        self.k_proj = Linear(d_model, d_kv, bias=qkv_bias)
        self.v_proj = Linear(d_model, d_kv, bias=qkv_bias)
        self.gate_proj = Linear(d_model, d_q, bias=qkv_bias) if config.output_gate else None
        channels, self.conv1d = config.d_conv_channels, None
        if config.d_conv is not None:
            self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=False)
        self.q_norm = RMSNorm(config.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.sinks = parameter(config.n_heads) if config.sinks else None
        self.o_proj = Linear(d_q, d_model, bias=config.bias == "all")

    def init_weights(self, std: float, out_std: float) -> None:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj)
        for projection in filter(None, projections):
            nn.init.normal_(projection.weight, std=out_std if projection is self.o_proj else std)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        c = self.config
        qkv = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv1d is not None:
            qkv = _convolved(qkv, self.conv1d.weight, state)
        q, k, v = (each.unflatten(-1, (-1, c.d_head)).transpose(1, 2) for each in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rope_theta is not None:
            start = 0 if state is None else state.length
            q, k = (self._rotate(heads, c.rope_theta, start) for heads in (q, k))
        if state is not None:
            k, v = state.update(k, v)
        y = attention(q, k, v, c.window, self.sinks).transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.o_proj(y), None

    def linear_map(self) -> Float[Tensor, "d_model d_model"]:
        """W_O W_V: attention when every token attends only to itself (Puzzle, arXiv 2411.19146, section 3.2)."""
        c = self.config
        v = self.v_proj.weight.unflatten(0, (c.n_kv_heads, c.d_head))
        product: Tensor = self.o_proj.weight @ v.repeat_interleave(c.n_heads // c.n_kv_heads, dim=0).flatten(0, 1)
        return product

    def _rotate(self, heads: Tensor, theta: float, start: int) -> Tensor:
        d_rope = self.config.d_rope
        if d_rope is None:
            return rotate(heads, theta, start)
        return torch.cat((rotate(heads[..., :d_rope], theta, start), heads[..., d_rope:]), dim=-1)


def _convolved(qkv: list[Tensor], weight: Tensor, state: KVCache | None) -> list[Tensor]:
    """Convolves queries, keys and values depthwise; `weight` stacks the filters of all three."""
    widths = [each.shape[-1] for each in qkv]
    before = None if state is None else state.update_conv(torch.cat(qkv, dim=-1))
    past = [None] * len(qkv) if before is None else before.split(widths, dim=-1)
    return [causal_conv1d(*each[:2], None, each[2]) for each in zip(qkv, weight.split(widths), past, strict=True)]
