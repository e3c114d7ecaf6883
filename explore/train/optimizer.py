"""Optimizers: AdamW, and Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from explore.experiment import TrainConfig
from explore.model import LanguageModel


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
    muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return JointOptimizer(muon=muon, adamw=adamw)


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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members.values():
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state_dict[name])
        self._share_groups()
