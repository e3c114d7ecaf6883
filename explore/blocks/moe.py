"""Mixture of experts, and LatentMoE when `d_latent` is set."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Call, Linear, RMSNorm, RoutedMixer, RouterStats, parameter
from explore.blocks.declarations import Axis, Draw, Group, Layout, Powers, Role, Stops, ladder, leaf, width
from explore.blocks.mlp import MLPConfig
from explore.blocks.moe_axes import moe_axes, moe_layout
from explore.blocks.moe_saved import moe_kept, moe_saved
from explore.blocks.saved import Ranks, check_divides
from explore.blocks.state import State
from explore.config import added_later
from explore.cost import ConventionName, Entry, Saved, matrix, product, vector
from explore.ops import Activation, Visit, experts, is_gated, linear, visits

SMALLEST_SCORE = 2.0**-100
"""Far below any score that matters, yet large enough that sums and gradients of shares stay finite in fp32."""


class MoEConfig(BlockConfig):
    """Routed and shared experts.

    Attributes:
        top_k: number of routed experts per token.
        d_expert: inner width of a routed expert; a latent does not change it.
        d_latent: input and output width of routed experts (LatentMoE); d_model when None.
        latent_norm: RMSNorm on the experts' input (`input`) or on their combined output (`combined`).
        router_input: the router reads the residual stream (`model`) or the latent (`latent`).
        n_shared: number of shared experts, which process every token at full width; built as one MLP of
            width n_shared * d_shared.
        shared_gate: multiply the shared experts' output by a sigmoid gate, one scalar per token.
        bias: add biases to the router and the routed experts.
        router_score: function from logits to scores.
        normalize_weights: divide the chosen scores by their sum.
        routed_scaling_factor: factor applied to the weights afterwards.
        expert_bias: balance load with a selection bias, adjusted once per optimizer step.
        bias_update_rate: change of the bias per step.
        aux_loss_coef: coefficient of the sequence-wise balance loss; 0 leaves it out.
    """

    label: ClassVar[str] = "experts"
    role: ClassVar[Role] = "experts"
    family_names: ClassVar[tuple[str, ...]] = ("MoE", "LatentMoE")
    groups: ClassVar[Mapping[str, Group]] = {
        "experts": Group((0.04, 0.60, 0.42)),
        "shared experts": Group((0.69, 0.95, 0.89), ("shared", "shared_gate")),
        "latent projections": Group((0.94, 0.41, 0.47), ("latent_down", "latent_up")),
        "router": Group((0.67, 0.26, 0.13), ("router",)),
    }
    draws: ClassVar[Mapping[str, Draw]] = {
        "n_experts": Powers(8, 64),
        "sparsity": Powers(2, 16),
        "ratio": (0.25, 0.5, 1.0),
        "shared_ratio": (0.0, 1.0, 2.0),
        "compression": Powers(1, 4),
    }
    ranks: ClassVar[Ranks] = Ranks(
        replicated=("router", "latent_down", "latent_norm", "latent_up"),
        routed=("experts",),
        full_width=("router",),
        recomputed=(
            ("moe", ("router", "latent_down", "experts", "latent_up", "shared", "shared_gate")),
            ("moe_act", ()),
            ("shared_experts", ("shared", "shared_gate")),
        ),
    )

    kind: Literal["moe"] = "moe"
    n_experts: PositiveInt
    top_k: PositiveInt
    d_expert: PositiveInt
    d_latent: PositiveInt | None = None
    latent_norm: Literal["none", "input", "combined"] = "none"
    router_input: Literal["model", "latent"] = "model"
    n_shared: NonNegativeInt = 1
    d_shared: PositiveInt | None = None
    activation: Activation = "relu2"
    bias: bool = False
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_weights: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    expert_bias: bool = True
    bias_update_rate: NonNegativeFloat = 1e-3
    aux_loss_coef: NonNegativeFloat = 1e-4
    norm_eps: PositiveFloat = 1e-5
    shared_gate: bool = added_later(False)

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k: must be at most n_experts={self.n_experts}, got {self.top_k}")
        if self.n_shared and self.d_shared is None:
            raise ValueError(f"d_shared: must be set with n_shared={self.n_shared}, got None")
        if self.shared_gate and not self.n_shared:
            raise ValueError("shared_gate must be False with n_shared=0, got True")
        if self.d_latent is None and self.latent_norm != "none":
            raise ValueError(f"latent_norm: must be 'none' without d_latent, got {self.latent_norm!r}")
        if self.d_latent is None and self.router_input == "latent":
            raise ValueError("router_input: must be 'model' without d_latent, got 'latent'")
        return self

    @classmethod
    def default(cls, d_model: int) -> MoEConfig:
        d_expert = max(16, 11 * d_model // 16 // 16 * 16)
        return cls(n_experts=128, top_k=6, d_expert=d_expert, d_shared=2 * d_expert, routed_scaling_factor=2.5)

    @classmethod
    def random_example(cls, rng: random.Random) -> MoEConfig:
        n_experts, d_latent = rng.randint(1, 8), rng.choice([None, rng.randint(1, 12)])
        n_shared = rng.randint(0, 2)
        return cls(
            n_experts=n_experts,
            top_k=rng.randint(1, n_experts),
            d_expert=rng.randint(1, 12),
            n_shared=n_shared,
            d_shared=rng.randint(1, 12),
            d_latent=d_latent,
            latent_norm="none" if d_latent is None else rng.choice(["none", "input", "combined"]),
            router_input="model" if d_latent is None else rng.choice(["model", "latent"]),
            activation=rng.choice(get_args(Activation)),
            bias=rng.random() < 0.5,
            shared_gate=n_shared > 0 and rng.random() < 0.5,
        )

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """`sparsity` is n_experts / top_k; expert widths are given as ratios to the model's width.

        `compression` is d_model / d_latent, rounded to a divisor; 1 means no latent.
        """
        n_experts, shared = drawn["n_experts"], drawn["shared_ratio"]
        sizes = {"n_experts": n_experts, "top_k": max(1, n_experts // drawn["sparsity"])}
        sizes["d_expert"] = width(d_model, drawn["ratio"])
        sizes |= {"n_shared": 1, "d_shared": width(d_model, shared)} if shared else {"n_shared": 0}
        if drawn["compression"] > 1:
            sizes["d_latent"] = d_model // math.gcd(drawn["compression"], d_model)
        return sizes

    @property
    def family_name(self) -> str:
        return self.family_names[self.d_latent is not None]

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        # `latent_eff` and `latent_acc` need a latent that divides the width.
        parts = (d_model // k for k in (2, 3, 4, 6, 8, 16) if d_model % k == 0)
        stops = {
            "n_experts": Stops(tuple(ladder(2, 1024, 1, 4))),
            "top_k": Stops(tuple(ladder(1, min(64, self.n_experts), 1, 8)), open=False),
            "d_expert": Stops(tuple(ladder(16, 4 * d_model, 16, 8))),
            "d_latent": Stops((None, *ladder(16, d_model, 16, 8), *parts)),
        }
        return stops if self.d_shared is None else stops | {"d_shared": Stops(tuple(ladder(16, 8 * d_model, 16, 8)))}

    @classmethod
    def settled(cls, sizes: Mapping[str, Any]) -> dict[str, int]:
        top_k, n_experts = sizes.get("top_k"), sizes.get("n_experts")
        if isinstance(top_k, int) and isinstance(n_experts, int) and top_k > n_experts:
            return {"top_k": n_experts}
        return {}

    def shared_mlp(self) -> MLPConfig | None:
        """All shared experts as one MLP, which computes the sum of their outputs."""
        if not self.n_shared or self.d_shared is None:
            return None
        return MLPConfig(d_ff=self.n_shared * self.d_shared, activation=self.activation)

    def entries(self, d_model: int, seq_len: int) -> tuple[Entry, ...]:
        d_routed = self.d_latent or d_model
        matrices = 3 if is_gated(self.activation) else 2
        weights = matrices * d_routed * self.d_expert
        expert = weights + ((matrices - 1) * self.d_expert + d_routed if self.bias else 0)
        d_router = d_routed if self.router_input == "latent" else d_model
        rows = [matrix("router", d_router, self.n_experts, seq_len, bias=self.bias)]
        if self.d_latent is not None:
            rows.append(matrix("latent_down", d_model, self.d_latent, seq_len))
        if self.latent_norm != "none":
            rows.append(vector("latent_norm", d_routed))
        rows.append(
            Entry(
                "experts",
                params=self.n_experts * expert,
                params_active=self.top_k * expert,
                params_read=self.top_k * expert,
                flops_seq=2 * self.top_k * weights * seq_len,
                flops_step=2 * self.top_k * weights,
                all_to_all_numel=2 * self.top_k * d_routed,
                sums_over=(d_routed, self.d_expert),
            )
        )
        if self.d_latent is not None:
            rows.append(matrix("latent_up", self.d_latent, d_model, seq_len))
        if (shared := self.shared_mlp()) is not None:
            rows.append(product("shared", matrices * d_model * shared.d_ff, seq_len, (d_model, shared.d_ff)))
        if self.shared_gate:
            rows.append(matrix("shared_gate", d_model, 1, seq_len))
        return tuple(rows)

    def saved(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return moe_saved(self, d_model, seq_len)

    def kept(self, d_model: int, seq_len: int) -> tuple[Saved, ...]:
        return moe_kept(self, d_model, seq_len)

    def routing(self) -> tuple[int, int]:
        return self.n_experts, self.top_k

    def check_parallel(self, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1) -> None:
        check_divides("ep", ep, "n_experts", self.n_experts)
        check_divides("etp", etp, "d_expert", self.d_expert)
        if (shared := self.shared_mlp()) is not None:
            check_divides("tp", tp, "n_shared * d_shared", shared.d_ff)

    def conventions(self, d_model: int, seq_len: int) -> Mapping[ConventionName, Mapping[str, int]]:
        return {"megatron": {"router": 0} | ({"shared_gate": 0} if self.shared_gate else {})}

    def regions(self, seq_len: int) -> Mapping[str, int]:
        return {} if is_gated(self.activation) or self.bias else {"experts": self.top_k * self.d_expert}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        n, k, d, f = self.n_experts, self.top_k, self.d_latent or d_model, self.d_expert
        x, up, down = leaf(batch_size * seq_len, d, dtype=dtype), leaf(n, d, f, dtype=dtype), leaf(n, f, d, dtype=dtype)
        gate = leaf(n, d, f, dtype=dtype) if is_gated(self.activation) else None
        weights, chosen = torch.rand(len(x), n).topk(k, dim=-1)
        sizes = f"{n} top {k}" + ("" if self.d_latent is None else ", latent")
        return {f"experts, {sizes}": lambda: experts(x, chosen, weights, up, gate, down, self.activation)}

    def axes(self) -> tuple[Axis, ...]:
        return moe_axes(self)

    def layout(self) -> Layout:
        return moe_layout(self)

    def build(self, d_model: int) -> MoE:
        return MoE(self, d_model)


class MoE(RoutedMixer):
    """y = W_up(sum over top_k of p_i E_i(W_down x)) + shared(x); without a latent W_up and W_down are absent.

    Scores are computed in fp32. Experts are chosen by score + expert_bias; the weights p_i are the chosen
    scores without the bias.

    Source: LatentMoE, arXiv 2601.18089; bias balancing, arXiv 2408.15664; sequence-wise balance loss,
    arXiv 2412.19437, equations 17 to 20.
    """

    expert_bias: Tensor

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config = c = config
        d_routed = c.d_latent or d_model
        self.router = Linear(d_routed if c.router_input == "latent" else d_model, c.n_experts, bias=c.bias)
        self.register_buffer("expert_bias", torch.zeros(c.n_experts))
        latent = c.d_latent is not None
        self.latent_down = Linear(d_model, d_routed, bias=False) if latent else None
        self.latent_norm = RMSNorm(d_routed, eps=c.norm_eps) if c.latent_norm != "none" else None
        self.up = parameter(c.n_experts, d_routed, c.d_expert)
        self.gate = parameter(c.n_experts, d_routed, c.d_expert) if is_gated(c.activation) else None
        self.down = parameter(c.n_experts, c.d_expert, d_routed)
        self.up_bias = parameter(c.n_experts, c.d_expert) if c.bias else None
        self.gate_bias = parameter(c.n_experts, c.d_expert) if c.bias and self.gate is not None else None
        self.down_bias = parameter(c.n_experts, d_routed) if c.bias else None
        self.latent_up = Linear(d_routed, d_model, bias=False) if latent else None
        shared = c.shared_mlp()
        self.shared = None if shared is None else shared.build(d_model)
        self.shared_gate = Linear(d_model, 1, bias=False) if c.shared_gate else None

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.router.weight, std=std)
        nn.init.zeros_(self.expert_bias)
        for bias in (self.router.bias, self.up_bias, self.gate_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.normal_(self.up, std=std)
        if self.gate is not None:
            nn.init.normal_(self.gate, std=std)
        nn.init.normal_(self.down, std=out_std)
        if self.latent_down is not None and self.latent_up is not None:
            nn.init.normal_(self.latent_down.weight, std=std)
            nn.init.normal_(self.latent_up.weight, std=out_std)
        if self.latent_norm is not None:
            self.latent_norm.reset_parameters()
        if self.shared is not None:
            self.shared.init_weights(std, out_std)
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=std)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        routed, scores, chosen, weights = self._sent(x)
        y = experts(
            routed.flatten(0, 1),
            chosen.flatten(0, 1),
            weights.flatten(0, 1),
            self.up,
            self.gate,
            self.down,
            self.config.activation,
            self._biases(),
            self.quantizer,
            n_sequences=len(x),
        ).view_as(routed)
        if self.config.latent_norm == "combined" and self.latent_norm is not None:
            y = self.latent_norm(y)
        if self.latent_up is not None:
            y = self.latent_up(y)
        if self.shared is not None:
            shared, _ = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())
        return y, self._stats(scores, chosen) if state is None else None

    def visits(self, x: Float[Tensor, "batch seq d_model"]) -> Iterator[Visit]:
        routed, _, chosen, weights = self._sent(x)
        sent = (routed.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1))
        return visits(*sent, self.up, self.gate, self.down, self.config.activation, self._biases())

    def _biases(self) -> tuple[Tensor, Tensor | None, Tensor] | None:
        if self.up_bias is None or self.down_bias is None:
            return None
        return self.up_bias, self.gate_bias, self.down_bias

    def _sent(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the experts' input, the scores, the chosen experts and their weights, per token."""
        routed = x if self.latent_down is None else self.latent_down(x)
        scores = self._scores(routed if self.config.router_input == "latent" else x)
        if self.config.latent_norm == "input" and self.latent_norm is not None:
            routed = self.latent_norm(routed)
        return routed, scores, *self.route(scores)

    def route(
        self, scores: Float[Tensor, "batch seq n_experts"]
    ) -> tuple[Int[Tensor, "batch seq top_k"], Float[Tensor, "batch seq top_k"]]:
        """Returns the chosen experts of each token and their weights."""
        chosen = (scores + self.expert_bias).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.config.normalize_weights:
            weights = _shares(weights)
        return chosen, weights * self.config.routed_scaling_factor

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, " n_experts"]) -> None:
        """Moves the bias of each expert towards the mean load."""
        if self.config.expert_bias:
            self.expert_bias += self.config.bias_update_rate * torch.sign(load.mean() - load)

    def _scores(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = self.router.bias.float() if self.config.bias else None
            product = linear if self.router.quantizer is None else self.router.quantizer.linear
            logits = product(x.float(), self.router.weight.float(), bias)
            return logits.sigmoid() if self.config.router_score == "sigmoid" else logits.softmax(-1)

    def _stats(self, scores: Tensor, chosen: Tensor) -> RouterStats:
        c = self.config
        assigned = chosen.flatten(1)
        load = scores.new_zeros(chosen.shape[0], c.n_experts).scatter_add(
            1, assigned, torch.ones_like(assigned, dtype=scores.dtype)
        )
        if c.aux_loss_coef == 0:
            return RouterStats(load.sum(0), scores.new_zeros(()))
        fraction = load * c.n_experts / (c.top_k * chosen.shape[1])
        probability = _shares(scores).mean(dim=1)
        return RouterStats(load.sum(0), c.aux_loss_coef * (fraction * probability).sum(-1).mean())


def _shares(scores: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch experts"]:
    """Scores divided by their sum, which is never 0: experts with logits below -69 get equal shares."""
    scores = scores.clamp(min=SMALLEST_SCORE)
    return scores / scores.sum(-1, keepdim=True)
