"""Optimizers: AdamW, and Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from explore.experiment import TrainConfig
from explore.model import LanguageModel
from explore.train.environment import multiplies_bf16


def build_optimizer(model: LanguageModel, config: TrainConfig) -> Optimizer:
    """Builds the optimizer of a model. One-dimensional weights (norms, biases, per-head scalars) have no weight decay.

    Muon updates the two-dimensional matrices of the layers, including multi-token prediction. AdamW updates the rest:
    embedding, head, and stacked experts, which are three-dimensional.
    """
    matrices: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if config.optimizer == "muon" and name.startswith(("layers.", "mtp.")) and weight.ndim == 2:
            matrices.append(weight)
        else:
            (decaying if weight.ndim >= 2 else others).append(weight)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    adamw = AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not matrices:
        return adamw
    kind = Muon if multiplies_bf16() else Float32Muon
    muon = kind(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return JointOptimizer(muon=muon, adamw=adamw)


class Float32Muon(Muon):
    """Muon with its Newton-Schulz iteration in fp32.

    Torch's own iteration is in bf16. A processor that does not multiply bf16 takes many times as long for it, more than
    for the rest of a training step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _loss(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.grad))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonalized(
                    weight.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"], group["ns_steps"]
                )
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(weight.shape)))  # "match_rms_adamw"
        return loss


def _loss(closure: Callable[[], Any] | None) -> Any:
    """The loss that a closure computes with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _orthogonalized(
    x: Float[Tensor, "rows columns"], coefficients: tuple[float, float, float], n_steps: int
) -> Float[Tensor, "rows columns"]:
    """A matrix with the singular vectors of x and singular values near 1, by Newton-Schulz iteration."""
    a, b, c = coefficients
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(n_steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if x.shape[0] > x.shape[1] else wide


class JointOptimizer(Optimizer):
    """Several optimizers, each over its own weights, that step together."""

    def __init__(self, **members: Optimizer) -> None:
        self.members = members
        super().__init__([group for member in members.values() for group in member.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries as in the members, so that a learning rate set here applies there.
        self.param_groups = [group for member in self.members.values() for group in member.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _loss(closure)
        for member in self.members.values():
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state_dict[name])
        self._share_groups()
