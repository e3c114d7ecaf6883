"""The Gated DeltaNet mixer."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

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
    ladder,
    leaf,
)
from explore.blocks.saved import Ranks, check_divides, dropout_mask, norm_kept
from explore.blocks.state import RecurrentState
from explore.cost import ConventionName, Entry, Saved, convolution, linear_input, matrix, vector
from explore.ops import causal_conv1d, delta_rule, l2_norm, rms_norm_before_gate
from explore.ops.delta_rule import backward_extra_flops, chunked_flops, step_flops

RULE = tuple(f"delta {name}" for name in chunked_flops(1, 1, 1, 1, 1, 1))
"""Ledger names of the matrix products of the chunked gated delta rule."""

QK_EPS = 1e-6
"""Added to the squared norm of a query or key before the square root."""


class GatedDeltaNetConfig(BlockConfig):
    """Sizes of the mixer. `n_heads` counts value heads; several may share a key head.

    Attributes:
        n_key_heads: heads of queries and keys; divides n_heads.
        d_k: width of a query and of a key.
        d_v: width of a value; the state of a head is d_v x d_k.
        chunk_size: positions per chunk of the matrix-product form; affects the FLOP count.
        dt_min: smallest step size at initialisation.
        dt_max: largest step size at initialisation.
    """

    label: ClassVar[str] = "Gated DeltaNet"
    role: ClassVar[Role] = "recurrent"
    family_names: ClassVar[tuple[str, ...]] = ("Gated DeltaNet",)
    groups: ClassVar[Mapping[str, Group]] = {
        "Gated DeltaNet projections": Group((0.45, 0.05, 0.50)),
        "delta rule, state": Group((0.72, 0.46, 0.95), RULE),
    }
    lines: ClassVar[Mapping[str, tuple[str, ...]]] = {"delta rule": RULE}
    draws: ClassVar[Mapping[str, Draw]] = {"expand": Powers(1, 2), "d_head": Powers(16, 64), "sharing": Powers(1, 4)}
    ranks: ClassVar[Ranks] = Ranks(replicated=("norm",), full_width=("conv1d",))

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    n_heads: PositiveInt
    n_key_heads: PositiveInt
    d_k: PositiveInt
    d_v: PositiveInt
    d_conv: PositiveInt = 4
    chunk_size: PositiveInt = 64
    dt_min: PositiveFloat = 0.001
    dt_max: PositiveFloat = 0.1
    norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _check(self) -> GatedDeltaNetConfig:
        if self.n_heads % self.n_key_heads:
            raise ValueError(f"n_key_heads: must divide n_heads={self.n_heads}, got {self.n_key_heads}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min: must be at most dt_max={self.dt_max}, got {self.dt_min}")
        return self

    @property
    def d_keys(self) -> int:
        """Total width of the keys of all heads; the queries have the same width."""
        return self.n_key_heads * self.d_k

    @property
    def d_values(self) -> int:
        """Total width of the values of all heads, and of their gates and outputs."""
        return self.n_heads * self.d_v

    @property
    def d_conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.d_keys + self.d_values

    @property
    def d_in_proj(self) -> int:
        """Output width of the input projection: convolution channels, gates, beta and step sizes."""
        return self.d_conv_channels + self.d_values + 2 * self.n_heads

    @classmethod
    def default(cls, d_model: int) -> GatedDeltaNetConfig:
        """Keys as wide as the model and values twice as wide, as in Qwen3-Next."""
        d_head = head_width(d_model, (128, 64, 32, 16), at_least=4)
        n_key_heads = d_model // d_head
        return cls(n_heads=2 * n_key_heads, n_key_heads=n_key_heads, d_k=d_head, d_v=d_head)

    @classmethod
    def random_example(cls, rng: random.Random) -> GatedDeltaNetConfig:
        n_key_heads, sharing = rng.randint(1, 3), rng.randint(1, 3)
        return cls(
            n_heads=n_key_heads * sharing,
            n_key_heads=n_key_heads,
            d_k=rng.randint(1, 6),
            d_v=rng.randint(1, 6),
            d_conv=rng.randint(1, 4),
            chunk_size=rng.randint(1, 16),
        )

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Values are `expand` times as wide as the model; `sharing` value heads share one key head."""
        d_values = d_model * drawn["expand"]
        d_head = math.gcd(drawn["d_head"], d_values)
        n_heads = d_values // d_head
        n_key_heads = n_heads // math.gcd(drawn["sharing"], n_heads)
        return {"n_heads": n_heads, "n_key_heads": n_key_heads, "d_k": d_head, "d_v": d_head}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {
            "n_key_heads": Stops(tuple(divisors(self.n_heads)), open=False),
            "d_k": Stops(tuple(ladder(8, 256, 8, 2))),
        }

    @classmethod
    def settled(cls, sizes: Mapping[str, Any]) -> dict[str, int]:
        keys, heads = sizes.get("n_key_heads"), sizes.get("n_heads")
        if not (isinstance(keys, int) and isinstance(heads, int) and keys >= 1 and heads >= 1 and heads % keys):
            return {}
        return {"n_key_heads": max(n for n in divisors(heads) if n <= keys)}

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        products = chunked_flops(seq_len, self.n_heads, self.n_key_heads, self.d_k, self.d_v, self.chunk_size)
        step = step_flops(self.n_heads, self.d_k, self.d_v)
        rule = [Entry(f"delta {name}", flops_seq=n, flops_step=step.get(name, 0)) for name, n in products.items()]
        kept = self.d_values * self.d_k  # written by the last product
        rule[-1] = rule[-1]._replace(ssm_numel=kept, state_rows=(self.d_k,))
        return (
            matrix("in_proj", d_model, self.d_in_proj, seq_len),
            convolution("conv1d", self.d_conv_channels, self.d_conv, seq_len),
            vector("A_log, dt_bias", 2 * self.n_heads),
            *rule,
            vector("norm", self.d_v),
            matrix("out_proj", self.d_values, d_model, seq_len),
        )

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        values, unit = self.d_values * seq_len, 2 * self.n_heads * self.d_k * seq_len
        return (
            linear_input("in_proj", d_model * seq_len),
            # The convolution's input, the gates and the inputs of step sizes and beta are slices of one tensor.
            Saved("conv1d", "scan", self.d_in_proj * seq_len, cut="width"),
            Saved("conv1d", "activation", self.d_conv_channels * seq_len, cut="width"),
            # Normalised queries and keys of every head; the values are a slice of the convolution's output.
            Saved(RULE[0], "scan", unit, cut="width"),
            # The kernel keeps the decay, beta and each chunk's triangle, and recomputes the states.
            Saved(RULE[0], "scan", 2 * self.n_heads * seq_len, "float32", cut="width"),
            Saved(RULE[0], "scan", self.n_heads * self.chunk_size * seq_len, cut="width"),
            Saved("norm", "norm", values, cut="width"),
            linear_input("out_proj", values, cut="width"),
            dropout_mask("out_proj", d_model, seq_len),
        )

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        channels, rest = self.d_conv_channels, seq_len % self.chunk_size
        parts = [((seq_len - rest) // self.chunk_size, self.chunk_size), (1, rest)]
        rule = sum(self._kept_by_chunks(n, length, seq_len) for n, length in parts if n * length)
        if seq_len < 2 * self.chunk_size:  # products with the first chunk's zero state are skipped and keep nothing
            rule -= self.n_heads * self.d_k * min(seq_len, self.chunk_size)
        return (
            Saved("in_proj", "linear input", d_model * seq_len, "float32"),
            Saved("conv1d", "scan", (seq_len + self.d_conv - 1) * channels, "float32"),
            Saved("conv1d", "activation", 2 * channels * seq_len, "float32"),  # before and after SiLU
            # Step sizes before and after softplus, beta, and the lengths of queries and keys.
            Saved("A_log, dt_bias", "scan", (3 * self.n_heads + 2 * self.n_key_heads) * seq_len, "float32"),
            Saved(RULE[0], "scan", rule, "float32"),
            norm_kept("norm", self.d_values, seq_len, self.n_heads),
            # The gate is a view of the output of `in_proj`; its SiLU multiplies the norm's output.
            Saved("norm", "norm", (self.d_in_proj + 2 * self.d_values) * seq_len, "float32"),
            Saved("out_proj", "linear input", self.d_values * seq_len, "float32"),
        )

    def _kept_by_chunks(self, n: int, length: int, seq_len: int) -> int:
        """Elements that the products of `n` chunks keep for one sequence."""
        g, h = self.n_key_heads, self.n_heads
        # Beta is copied into chunks unless a single head already has that memory layout.
        numbers = 4 + (h > 1 or n * length < seq_len or n > 1)
        squares = (2 * g + 3 * h) * length  # K K^T, Q K^T, decays, T and scores
        widths = 2 * self.d_keys + 3 * h * self.d_k + 2 * self.d_values  # of inputs, then of W, queries, keys, U and N
        return n * (length * (numbers * h + squares + widths) + h * self.d_v * self.d_k)

    def context_numel(self, cp: int) -> float:
        # Ranks exchange tokens for heads (all-to-all) before the rule, and back after it.
        return (1 - 1 / cp) * (self.d_in_proj + self.d_values)

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("tp * cp", tp * cp, "n_key_heads", self.n_key_heads)

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        rule = 2 * self.n_heads * 4 * self.d_v**2 * seq_len  # four d_v x d_v products per head, for any d_k
        return {"megatron": dict.fromkeys(RULE, 0) | {RULE[0]: rule}}

    def uncounted(self, seq_len: int) -> Uncounted:
        """FLOPs that gradients of triangular solves spend outside the triangles."""
        return Uncounted(0, backward_extra_flops(seq_len, self.n_heads, self.d_k, self.d_v, self.chunk_size))

    def regions(self, seq_len: int) -> Mapping[str, int]:
        return {"conv": self.d_conv_channels}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        def inputs(*shape: int) -> Tensor:
            return leaf(batch_size, seq_len, *shape, dtype=dtype)

        g, h, k, v = self.n_key_heads, self.n_heads, self.d_k, self.d_v
        queries, keys, values = inputs(g, k), inputs(g, k), inputs(h, v)
        log_alpha = torch.rand(batch_size, seq_len, h).neg_().requires_grad_()
        beta = torch.rand(batch_size, seq_len, h).requires_grad_()

        def rule() -> Tensor:
            Q, K = l2_norm(queries, QK_EPS, k**-0.5), l2_norm(keys, QK_EPS)
            return delta_rule(Q, K, values, log_alpha, beta, self.chunk_size)[0]

        return {"delta_rule": rule}

    def axes(self) -> tuple[Axis, ...]:
        """The axes: key heads, and the value heads that share each."""
        probe = Probe("out_proj", "input")
        return (Axis("n_key_heads", self.n_key_heads), Axis("n_heads", self.n_heads, within="n_key_heads", probe=probe))

    def layout(self) -> Layout:
        keys, values = ("n_key_heads", self.d_k), ("n_heads", self.d_v)
        qkv: Dim = (keys, keys, values)
        heads: Dim = (("n_heads",),)
        return {
            "in_proj.weight": ((*qkv, values, *heads, *heads), D_MODEL),  # q, k, v, z, b, a
            "conv1d.weight": (qkv, WHOLE, WHOLE),
            "A_log": (heads,),
            "dt_bias": (heads,),
            "norm.weight": (WHOLE,),
            "out_proj.weight": (D_MODEL, (values,)),
        }

    def build(self, d_model: int) -> GatedDeltaNet:
        return GatedDeltaNet(self, d_model)

    def new_state(self, capacity: int | None = None) -> RecurrentState:
        return RecurrentState(capacity=capacity, shape=(self.n_heads, self.d_v, self.d_k), n_past=self.d_conv - 1)


class GatedDeltaNet(Mixer[RecurrentState]):
    """Projection, short convolution, gated delta rule, norm before the gate, projection.

    alpha = exp(-exp(A_log) softplus(a + dt_bias)) and beta = sigmoid(b), where a and b are scalars per head. Queries,
    keys and values go through the convolution and SiLU; queries and keys have unit length, and queries are scaled by
    d_k^(-1/2). The order inside `in_proj` is queries, keys, values, gate z, b, a.

    Source: arXiv 2412.06464, section 3.4; sizes, scale and order of heads as in Qwen3-Next. Initial weights follow the
    paper's code, but A is drawn from 0.01 on, so that its logarithm is finite.
    """

    def __init__(self, config: GatedDeltaNetConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        channels = config.d_conv_channels
        self.in_proj = Linear(d_model, config.d_in_proj, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=False)
        self.A_log = parameter(config.n_heads)
        self.dt_bias = parameter(config.n_heads)
        self.norm = RMSNorm(config.d_v, eps=config.norm_eps)  # per head; all heads share one weight
        self.out_proj = Linear(config.d_values, d_model, bias=False)

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        c = self.config
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=out_std)
        self.conv1d.reset_parameters()
        self.norm.reset_parameters()
        self.A_log.uniform_(0.01, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: RecurrentState | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        c = self.config
        qkv, z, b, a = self.in_proj(x).split((c.d_conv_channels, c.d_values, c.n_heads, c.n_heads), dim=-1)
        before = None if state is None else state.update_conv(qkv)
        qkv = causal_conv1d(qkv, self.conv1d.weight, None, before, silu=True)
        q, k, v = qkv.split((c.d_keys, c.d_keys, c.d_values), dim=-1)
        y, recurrent = delta_rule(
            l2_norm(q.unflatten(-1, (c.n_key_heads, c.d_k)), QK_EPS, c.d_k**-0.5),
            l2_norm(k.unflatten(-1, (c.n_key_heads, c.d_k)), QK_EPS),
            v.unflatten(-1, (c.n_heads, c.d_v)),
            -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias),
            b.float().sigmoid(),
            c.chunk_size,
            None if state is None else state.recurrent,
            in_place=state is not None and state.in_place,
        )
        if state is not None:
            state.keep(recurrent, x.shape[1])
        y = rms_norm_before_gate(y, z.unflatten(-1, (c.n_heads, c.d_v)), self.norm.weight, c.norm_eps)
        return self.out_proj(y.flatten(2)), None
