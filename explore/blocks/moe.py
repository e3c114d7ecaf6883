"""Mixture of experts, and LatentMoE when `d_latent` is set."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from explore.blocks.base import BlockConfig, Linear, Mixer, RMSNorm, RouterStats, State, parameter
from explore.blocks.mlp import MLPConfig
from explore.cost import Entry, matrix, product, vector
from explore.ops import Activation, experts, is_gated, linear


class MoEConfig(BlockConfig):
    """Routed and shared experts.

    Attributes:
        top_k: experts that a token is sent to.
        d_expert: inner width of a routed expert; not reduced by a latent.
        d_latent: width in which routed experts read and write (LatentMoE); d_model when absent.
        latent_norm: RMSNorm on what the experts read (`input`) or on their combined output (`combined`).
        router_input: what the router reads.
        n_shared: experts that see every token at full width, kept as one MLP of n_shared * d_shared.
        bias: router and routed experts have biases.
        router_score: how logits become scores.
        normalize_weights: divide the chosen scores by their sum.
        routed_scaling_factor: factor on the weights after that.
        expert_bias: balance by a bias on the choice, moved once per optimizer step.
        bias_update_rate: how far the bias moves at each step.
        aux_loss_coef: coefficient of the sequence-wise balance loss; 0 leaves it out.
    """

    role: ClassVar[Literal["moe"]] = "moe"
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

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k: {self.top_k} is above n_experts={self.n_experts}")
        if self.n_shared and self.d_shared is None:
            raise ValueError(f"d_shared: a width is required with n_shared={self.n_shared}")
        if self.d_latent is None and self.latent_norm != "none":
            raise ValueError(f"latent_norm: {self.latent_norm!r} needs d_latent; without it only 'none' is allowed")
        if self.d_latent is None and self.router_input == "latent":
            raise ValueError("router_input: 'latent' needs d_latent; without it only 'model' is allowed")
        return self

    @classmethod
    def default(cls, d_model: int) -> MoEConfig:
        d_expert = max(16, 11 * d_model // 16 // 16 * 16)
        return cls(n_experts=128, top_k=6, d_expert=d_expert, d_shared=2 * d_expert, routed_scaling_factor=2.5)

    def shared_mlp(self) -> MLPConfig | None:
        """All shared experts as one MLP: the sum of their outputs is the same."""
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
            )
        )
        if self.d_latent is not None:
            rows.append(matrix("latent_up", self.d_latent, d_model, seq_len))
        if (shared := self.shared_mlp()) is not None:
            rows.append(product("shared", matrices * d_model * shared.d_ff, seq_len))
        return tuple(rows)

    def build(self, d_model: int) -> MoE:
        return MoE(self, d_model)


class MoE(Mixer):
    """y = W_up(sum over top_k of p_i E_i(W_down x)) + shared(x); without a latent W_up and W_down are absent.

    Scores are computed in fp32. The choice is made on score + expert_bias, the weights are the chosen
    scores without it.

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

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], RouterStats | None]:
        routed = x if self.latent_down is None else self.latent_down(x)
        scores = self._scores(routed if self.config.router_input == "latent" else x)
        chosen, weights = self.route(scores)
        if self.config.latent_norm == "input" and self.latent_norm is not None:
            routed = self.latent_norm(routed)
        y = experts(
            routed.flatten(0, 1),
            chosen.flatten(0, 1),
            weights.flatten(0, 1),
            self.up,
            self.gate,
            self.down,
            self.config.activation,
            None if self.up_bias is None or self.down_bias is None else (self.up_bias, self.gate_bias, self.down_bias),
        ).view_as(routed)
        if self.config.latent_norm == "combined" and self.latent_norm is not None:
            y = self.latent_norm(y)
        if self.latent_up is not None:
            y = self.latent_up(y)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, self._stats(scores, chosen) if state is None else None

    def route(
        self, scores: Float[Tensor, "batch seq n_experts"]
    ) -> tuple[Int[Tensor, "batch seq top_k"], Float[Tensor, "batch seq top_k"]]:
        """Chooses the experts of each token, and their weights."""
        chosen = (scores + self.expert_bias).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.config.normalize_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.config.routed_scaling_factor

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, " n_experts"]) -> None:
        """Moves the bias of each expert towards the mean load; called once per optimizer step."""
        if self.config.expert_bias:
            self.expert_bias += self.config.bias_update_rate * torch.sign(load.mean() - load)

    def _scores(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = self.router.bias.float() if self.config.bias else None
            logits = linear(x.float(), self.router.weight.float(), bias)
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
        probability = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(dim=1)
        return RouterStats(load.sum(0), c.aux_loss_coef * (fraction * probability).sum(-1).mean())


def _alpha(standard: MoEConfig, d_model: int, d_latent: int) -> int:
    if standard.d_latent is not None:
        raise ValueError(f"d_latent: a standard MoE is needed, this one has d_latent={standard.d_latent}")
    if d_latent < 1 or d_model % d_latent:
        raise ValueError(f"d_latent: {d_latent} does not divide d_model={d_model}")
    return d_model // d_latent


def latent_eff(standard: MoEConfig, d_model: int, d_latent: int) -> MoEConfig:
    """l-MoE_eff of a standard MoE: alpha times the experts, the same top_k; cheaper at the same quality.

    alpha = d_model / d_latent; total parameters of the routed experts stay as they are.

    Source: arXiv 2601.18089, section 3.
    """
    alpha = _alpha(standard, d_model, d_latent)
    return standard.model_copy(update={"d_latent": d_latent, "n_experts": alpha * standard.n_experts})


def latent_acc(standard: MoEConfig, d_model: int, d_latent: int, *, pay_projections: bool = True) -> MoEConfig:
    """l-MoE_acc of a standard MoE: alpha times the experts and alpha times top_k; better at the same cost.

    Args:
        pay_projections: lower top_k by what the two latent projections cost, so that active parameters
            stay equal: alpha * top_k - 2 d_model / (g d_expert), g = 2 matrices in an expert, 3 if gated.
            Released configurations do (24 becomes 22); the paper's formula does not.

    Source: arXiv 2601.18089, section 3; the rule for top_k is derived from the released configurations.
    """
    eff = latent_eff(standard, d_model, d_latent)
    top_k = float(_alpha(standard, d_model, d_latent) * standard.top_k)
    if pay_projections:
        top_k -= 2 * d_model / ((3 if is_gated(standard.activation) else 2) * standard.d_expert)
    if round(top_k) < 1:
        raise ValueError(f"d_latent: at {d_latent} the two projections cost more than the experts that a token uses")
    return eff.model_copy(update={"top_k": round(top_k)})
