"""The Mamba-2 mixer."""

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
    FusedNorm,
    Group,
    Layout,
    Powers,
    Probe,
    Role,
    Stops,
    head_width,
    ladder,
    leaf,
)
from explore.blocks.saved import Ranks, check_divides, dropout_mask, norm_kept
from explore.blocks.state import RecurrentState
from explore.cost import ConventionName, Entry, Saved, convolution, linear_input, matrix, vector
from explore.ops import causal_conv1d, gated_group_rms_norm, ssd

SCAN = ("ssd C B^T", "ssd (L * C B^T) X", "ssd state update", "ssd state output")
"""The four products of the chunked algorithm."""


class Mamba2Config(BlockConfig):
    """Sizes of the mixer; `d_inner` is n_heads * d_head and independent of d_model.

    Attributes:
        n_groups: groups of heads that share B and C, and groups of the gated norm.
        chunk_size: positions per chunk of the matrix-product form; affects the FLOP count.
        dt_min: smallest step size at initialisation.
        dt_max: largest step size at initialisation.
    """

    label: ClassVar[str] = "Mamba-2"
    role: ClassVar[Role] = "recurrent"
    family_names: ClassVar[tuple[str, ...]] = ("Mamba",)
    groups: ClassVar[Mapping[str, Group]] = {
        "Mamba-2 projections": Group((0.87, 0.56, 0.02)),
        "Mamba-2 scan, state": Group((0.85, 0.72, 0.50), SCAN),
    }
    lines: ClassVar[Mapping[str, tuple[str, ...]]] = {"ssd": SCAN}
    draws: ClassVar[Mapping[str, Draw]] = {
        "expand": Powers(2, 2),
        "d_head": Powers(16, 64),
        "d_state": Powers(16, 128),
        "n_groups": Powers(1, 4),
    }
    ranks: ClassVar[Ranks] = Ranks(full_width=("conv1d",))

    fused_norms: ClassVar[Mapping[str, FusedNorm]] = {"norm.weight": FusedNorm("out_proj", "n_groups")}

    kind: Literal["mamba2"] = "mamba2"
    n_heads: PositiveInt
    d_head: PositiveInt
    d_state: PositiveInt
    n_groups: PositiveInt = 1
    d_conv: PositiveInt = 4
    chunk_size: PositiveInt = 128
    dt_min: PositiveFloat = 0.001
    dt_max: PositiveFloat = 0.1
    norm_eps: PositiveFloat = 1e-5

    @model_validator(mode="after")
    def _check(self) -> Mamba2Config:
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups: must divide n_heads={self.n_heads}, got {self.n_groups}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min: must be at most dt_max={self.dt_max}, got {self.dt_min}")
        return self

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.d_head

    @property
    def d_conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @classmethod
    def default(cls, d_model: int) -> Mamba2Config:
        d_head = 2 * head_width(d_model, (32, 16), at_least=2)
        n_heads = 2 * d_model // d_head
        return cls(n_heads=n_heads, d_head=d_head, d_state=128, n_groups=math.gcd(n_heads, 8))

    @classmethod
    def random_example(cls, rng: random.Random) -> Mamba2Config:
        groups, per_group = rng.randint(1, 4), rng.randint(1, 4)
        return cls(
            n_heads=groups * per_group,
            d_head=rng.randint(1, 8),
            d_state=rng.randint(1, 4),
            n_groups=groups,
            d_conv=rng.randint(1, 4),
            chunk_size=4 * rng.randint(1, 4),
        )

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Heads add up to `expand` times the model's width."""
        d_inner = d_model * drawn["expand"]
        d_head = math.gcd(drawn["d_head"], d_inner)
        n_heads = d_inner // d_head
        groups = math.gcd(drawn["n_groups"], n_heads)
        return {"n_heads": n_heads, "d_head": d_head, "d_state": drawn["d_state"], "n_groups": groups}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {"d_state": Stops(tuple(ladder(8, 512, 8, 2)))}

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        channels = self.d_conv_channels
        # All chunks but the last are full; products within a chunk are square.
        whole, rest = divmod(seq_len, self.chunk_size)
        squares = whole * self.chunk_size**2 + rest**2
        state = self.d_inner * self.d_state
        return (
            matrix("in_proj", d_model, self.d_inner + channels + self.n_heads, seq_len),
            convolution("conv1d", channels, self.d_conv, seq_len, bias=True),
            vector("A_log, D, dt_bias", 3 * self.n_heads),
            Entry(SCAN[0], flops_seq=2 * self.n_groups * self.d_state * squares),
            Entry(SCAN[1], flops_seq=2 * self.d_inner * squares),
            Entry(
                SCAN[2],
                flops_seq=2 * state * seq_len,
                flops_step=2 * state,
                ssm_numel=state,
                state_rows=(self.d_state,),
            ),
            Entry(SCAN[3], flops_seq=2 * state * seq_len, flops_step=2 * state),
            vector("norm", self.d_inner),
            matrix("out_proj", self.d_inner, d_model, seq_len),
        )

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        d_in_proj, inner = self.d_inner + self.d_conv_channels + self.n_heads, self.d_inner * seq_len
        return (
            linear_input("in_proj", d_model * seq_len),
            # The fused kernel keeps its input and its output before the gate; it recomputes convolution and states.
            Saved(SCAN[0], "scan", d_in_proj * seq_len, cut="width"),
            Saved(SCAN[0], "scan", inner, cut="width"),
            Saved("norm", "norm", inner, cut="width"),
            linear_input("out_proj", inner, cut="width"),
            dropout_mask("out_proj", d_model, seq_len),
        )

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        channels = self.d_conv_channels
        rest = seq_len % self.chunk_size
        parts = [((seq_len - rest) // self.chunk_size, self.chunk_size), (1, rest)]
        scan = sum(self._kept_by_chunks(n, length, seq_len) for n, length in parts if n * length)
        return (
            Saved("in_proj", "linear input", d_model * seq_len, "float32"),
            Saved("conv1d", "scan", (seq_len + self.d_conv - 1) * channels, "float32"),
            Saved("conv1d", "activation", 2 * channels * seq_len, "float32"),  # before and after SiLU
            Saved("A_log, D, dt_bias", "scan", 2 * self.n_heads * seq_len, "float32"),  # dt before and after softplus
            Saved(SCAN[0], "scan", scan, "float32"),
            norm_kept("norm", self.d_inner, seq_len, self.n_groups),
            # The gate is a view of the output of `in_proj`.
            Saved("norm", "norm", (self.d_inner + channels + self.n_heads) * seq_len, "float32"),
            Saved("out_proj", "linear input", self.d_inner * seq_len, "float32"),
        )

    def _kept_by_chunks(self, n: int, length: int, seq_len: int) -> int:
        """Elements that the products of `n` chunks keep for one sequence."""
        h, maps = self.n_heads, self.n_groups * self.d_state
        # Two products each copy B and C, unless a single group already has the layout they need;
        # inputs with one head or one position need no copy either.
        copies = 0 if self.n_groups == 1 and (n == 1 or n * length == seq_len) else 4
        inputs = 3 if h == 1 or length == 1 else 4
        of_position = copies * maps + (self.n_groups + h) * length + inputs * self.d_inner + 2 * h
        return n * (length * of_position + h + self.d_inner * self.d_state)

    def context_numel(self, cp: int) -> float:
        # Ranks exchange tokens for heads (all-to-all) before the scan, and back after it.
        return (1 - 1 / cp) * (2 * self.d_inner + self.d_conv_channels + self.n_heads)

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("tp", tp, "n_groups", self.n_groups)
        check_divides("tp * cp", tp * cp, "n_heads", self.n_heads)

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        d_inner = 2 * d_model  # the convention fixes it, even if n_heads * d_head differs
        d_in = 2 * d_inner + 2 * self.n_groups * self.d_state + self.n_heads
        flops = {"conv1d": 0, "in_proj": 2 * d_model * d_in * seq_len, "out_proj": 2 * d_inner * d_model * seq_len}
        return {"megatron": flops | dict.fromkeys(SCAN, 0) | {SCAN[0]: 7 * d_inner * self.d_state * seq_len}}

    def regions(self, seq_len: int) -> Mapping[str, int]:
        return {
            "conv": self.d_conv_channels,
            "gated_norm": self.d_inner,
            "ssd": self.n_heads * self.chunk_size,
        }

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        def inputs(*shape: int) -> Tensor:
            return leaf(batch_size, seq_len, *shape, dtype=dtype)

        c, h, g, n = self.d_conv_channels, self.n_heads, self.n_groups, self.d_state
        x, filters, bias = inputs(c), leaf(c, 1, self.d_conv, dtype=dtype), leaf(c, dtype=dtype)
        y, z, scale = inputs(self.d_inner), inputs(self.d_inner), leaf(self.d_inner, dtype=dtype)
        X, B, C = inputs(h, self.d_head), inputs(g, n), inputs(g, n)
        dt = torch.rand(batch_size, seq_len, h).mul_(0.1).requires_grad_()
        A, D = -torch.rand(h).add_(1), leaf(h, dtype=torch.float32)
        return {
            "conv": lambda: causal_conv1d(x, filters, bias, silu=True),
            "gated_norm": lambda: gated_group_rms_norm(y, z, scale, g, self.norm_eps),
            "ssd": lambda: ssd(X, dt, A, B, C, D, self.chunk_size)[0],
        }

    def axes(self) -> tuple[Axis, ...]:
        """The axes; a cut keeps the same channels in every head and the same indices of B and C in every group."""
        x, BC = Probe("in_proj", "output", (1,), squares=True), Probe("in_proj", "output", (2, 3))
        return (
            Axis("n_groups", self.n_groups),
            Axis("d_head", self.d_head, probe=x),
            Axis("n_heads", self.n_heads, within="n_groups", probe=x, inner="d_head"),
            Axis("d_state", self.d_state, probe=BC),
        )

    def layout(self) -> Layout:
        inner, state = ("n_heads", "d_head"), ("n_groups", "d_state")
        xBC: Dim = (inner, state, state)
        heads: Dim = (("n_heads",),)
        return {
            "in_proj.weight": ((inner, *xBC, *heads), D_MODEL),  # z, x, B, C, dt
            "conv1d.weight": (xBC, WHOLE, WHOLE),
            "conv1d.bias": (xBC,),
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm.weight": ((inner,),),
            "out_proj.weight": (D_MODEL, (inner,)),
        }

    def build(self, d_model: int) -> Mamba2:
        return Mamba2(self, d_model)

    def new_state(self, capacity: int | None = None) -> RecurrentState:
        return RecurrentState(
            capacity=capacity, shape=(self.n_heads, self.d_head, self.d_state), n_past=self.d_conv - 1
        )


class Mamba2(Mixer[RecurrentState]):
    """Mamba-2: projection, short convolution, selective state space, gated norm, projection.

    Parameter names and their order inside `in_proj` (z, x, B, C, dt) are those of state-spaces/mamba.

    Source: arXiv 2405.21060, figure 6 and section 7; dt is not clamped.
    """

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(d_model, config.d_inner + config.d_conv_channels + config.n_heads, bias=False)
        self.conv1d = nn.Conv1d(
            config.d_conv_channels, config.d_conv_channels, config.d_conv, groups=config.d_conv_channels
        )
        self.A_log = parameter(config.n_heads)
        self.D = parameter(config.n_heads)
        self.dt_bias = parameter(config.n_heads)
        self.norm = RMSNorm(config.d_inner, eps=config.norm_eps)
        self.out_proj = Linear(config.d_inner, d_model, bias=False)

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        c = self.config
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=out_std)
        self.conv1d.reset_parameters()
        self.norm.reset_parameters()
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: RecurrentState | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], None]:
        c = self.config
        z, xBC, dt = self.in_proj(x).split((c.d_inner, c.d_conv_channels, c.n_heads), dim=-1)
        assert self.conv1d.bias is not None
        before = None if state is None else state.update_conv(xBC)
        xBC = causal_conv1d(xBC, self.conv1d.weight, self.conv1d.bias, before, silu=True)
        d_BC = c.n_groups * c.d_state
        X, B, C = xBC.split((c.d_inner, d_BC, d_BC), dim=-1)
        y, ssm = ssd(
            X.unflatten(-1, (c.n_heads, c.d_head)),
            F.softplus(dt.float() + self.dt_bias),
            -self.A_log.float().exp(),
            B.unflatten(-1, (c.n_groups, c.d_state)),
            C.unflatten(-1, (c.n_groups, c.d_state)),
            self.D,
            c.chunk_size,
            None if state is None else state.recurrent,
            in_place=state is not None and state.in_place,
        )
        if state is not None:
            state.keep(ssm, x.shape[1])
        y = gated_group_rms_norm(y.flatten(2), z, self.norm.weight, c.n_groups, c.norm_eps)
        return self.out_proj(y), None
