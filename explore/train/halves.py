"""Trains on the two halves of a batch at once, each on its own thread.

The ops of a small model are too short to split across threads, which would wait for each other at every op. Two threads
that each train on half of the batch wait only once per step. The gradient is the same sum in another order, so its last
bits differ from those of the whole batch; they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.blocks import RouterStats
from explore.experiment import Experiment
from explore.model import LanguageModel
from explore.train.objectives import BatchLoss, Objective, Term

IGNORED = -100
"""Target value that the loss ignores."""


def check_halves(experiment: Experiment, devices: int, device: str) -> None:
    """Checks that the batches of a run can be split into halves.

    Raises:
        ValueError: they cannot.
    """
    train = experiment.train
    if device != "cpu" or devices > 1:
        raise ValueError(f"split_batch must be False on {devices} x {device}, got True; it is for one CPU process")
    if train.batch_size < 2:
        raise ValueError(f"split_batch must be False with train.batch_size={train.batch_size}, got True")
    if train.quantizes or train.objective.kind != "next_token":
        raise ValueError("split_batch must be False with a teacher or emulated low precision, got True")


def in_halves(objective: Objective) -> Objective:
    """Wraps an objective so that it runs forward and backward on two halves of the batch at once, on a CPU.

    The forward pass also computes the gradients of the weighted sum of the terms; the backward pass only returns them.
    Each half takes one thread; if torch has a single thread, the halves run one after the other.

    Args:
        objective: one that draws no random numbers.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="half of a batch")
    is_first = True  # only one thread may compile

    def halves(model: LanguageModel, tokens: Tensor, targets: Tensor) -> BatchLoss:
        nonlocal is_first
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        parts = list(zip(tokens.tensor_split(2), targets.tensor_split(2), strict=True))
        shares = _shares(targets, [target for _, target in parts])
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def half(i: int) -> tuple[BatchLoss, Sequence[Tensor | None]]:
            with torch.enable_grad():
                with torch.autocast("cpu", dtype, enabled=autocast):
                    found = objective(model, *parts[i])
                total = sum(term.weight * shares[term.over_targets][i] * term.value for term in found.terms.values())
                assert isinstance(total, Tensor)
                return found, torch.autograd.grad(total, weights, allow_unused=True)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for this thread, for new ones and for MKL
        try:
            if is_first or threads == 1:
                one, other = half(0), half(1)
            else:
                future = pool.submit(copy_context().run, half, 0)
                other = half(1)
                one = future.result()
        finally:
            torch.set_num_threads(threads)
        is_first = False
        return _joined((one[0], other[0]), shares, _sums(one[1], other[1]), weights)

    return halves


def _shares(targets: Tensor, parts: Sequence[Tensor]) -> dict[bool, list[Any]]:
    """The weight of each half in a mean over targets (True) and in a mean over sequences (False)."""
    n_targets = (targets != IGNORED).sum()
    return {
        True: [(part != IGNORED).sum() / n_targets for part in parts],
        False: [len(part) / len(targets) for part in parts],
    }


def _sums(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(one, other, strict=True)]


def _joined(
    halves: Sequence[BatchLoss],
    shares: Mapping[bool, Sequence[Any]],
    gradients: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> BatchLoss:
    """Combines the losses of the halves into the loss of the whole batch."""
    first, second = halves
    terms = {}
    for name, term in first.terms.items():
        a, b = shares[term.over_targets]
        terms[name] = term._replace(value=(a * term.value + b * second.terms[name].value).detach())
    # The gradient of all terms is attached to the loss, whose weight in the sum is known here.
    loss = terms["loss"]
    terms["loss"] = loss._replace(value=_handed(loss, gradients, weights))
    stats = {
        i: RouterStats(
            (stat.load + second.stats[i].load).detach(), (stat.aux_loss + second.stats[i].aux_loss).detach() / 2
        )
        for i, stat in first.stats.items()
    }
    return BatchLoss(terms, first.n_targets + second.n_targets, stats)


def _handed(loss: Term, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    value: Tensor = _Handed.apply(loss.value, loss.weight, list(gradients), *weights)  # type: ignore[no-untyped-call]
    return value


class _Handed(torch.autograd.Function):
    """Passes on the loss, with the gradients of all terms that the forward pass computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.weight, ctx.gradients = weight, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        scale = float(dvalue) / ctx.weight
        if scale != 1:
            gradients = [None if each is None else each.mul_(scale) for each in gradients]
        return None, None, None, *gradients
