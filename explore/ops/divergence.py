"""Divergence between the next-token distributions of a student and a teacher, computed from their hidden states.

    h, W    hidden states and head of the student      z = h W^T / tau
    g, V    hidden states and head of the teacher      t = g V^T / tau
    q, p    softmax(z), softmax(t)
    KL      tau^2 sum_i p_i (log p_i - log q_i)        dKL/d(h W^T) = tau (q - p)

The factor tau^2 keeps the size of the gradient when the temperature changes.

Source: Hinton et al. 2015, arXiv 1503.02531; forward KL on the logits only, Minitron, arXiv 2407.14679.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.loss import IGNORED, HeadGradients, token_slices
from explore.ops.paths import OpPath, declare, path_of, product_dtype

declare(
    "divergence",
    OpPath("sliced", default_on="any"),
    OpPath("whole", reference=True, countable=True),
)


class Divergence(NamedTuple):
    """Sums over tokens, in nats.

    Attributes:
        kl: KL(teacher || student) at the temperature, times the temperature squared.
        cross_entropy: cross-entropy of the student with the targets at temperature 1; it has no gradient.
    """

    kl: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]


def linear_kl(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    teacher_hidden: Float[Tensor, "tokens d_teacher"],
    teacher_weight: Float[Tensor, "vocab_size d_teacher"],
    targets: Int64[Tensor, " tokens"],
    temperature: float = 1.0,
) -> Divergence:
    """Divergence between softmax(hidden weight^T / temperature) and that of a teacher; targets of -100 are ignored.

    As in `linear_cross_entropy`, the logits of both models are computed and dropped one slice of tokens at a time, and
    each slice also computes the student's gradients. The teacher has no gradient. Its product is computed in the dtype
    of `teacher_hidden`, also under autocast.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach().to(teacher_hidden.dtype)
    inputs = (hidden, weight, teacher_hidden, teacher_weight, targets, temperature)
    if path_of("divergence", hidden.device.type) == "whole":
        return logits_kl(F.linear(hidden, weight), *inputs[2:])
    if torch.is_grad_enabled():
        return Divergence(*_Sliced.apply(*inputs))  # type: ignore[no-untyped-call]
    return Divergence(*_add_up(*inputs, None))


def logits_kl(
    logits: Float[Tensor, "tokens vocab_size"],
    teacher_hidden: Float[Tensor, "tokens d_teacher"],
    teacher_weight: Float[Tensor, "vocab_size d_teacher"],
    targets: Int64[Tensor, " tokens"],
    temperature: float = 1.0,
) -> Divergence:
    """Computes `linear_kl` from the logits of the student at all tokens."""
    kept = targets != IGNORED
    with torch.autocast(logits.device.type, enabled=False):
        teacher = (teacher_hidden @ teacher_weight.T)[kept]  # (kept, vocab_size)
        student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits[kept], teacher))
        log_q, log_p = (F.log_softmax(x / temperature, 1) for x in (student, teacher))
        kl = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
        return Divergence(kl, F.cross_entropy(student.detach(), targets[kept], reduction="sum"))


def _add_up(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    temperature: float,
    gradients: HeadGradients | None,
) -> tuple[Tensor, Tensor]:
    """Sums over all slices of tokens; adds the gradients of the first sum to `gradients`, if given."""
    dtype = product_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    kl, cross_entropy = (hidden.new_zeros((), dtype=exact) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in token_slices(hidden, weight):
            ignored = (targets[rows] == IGNORED).unsqueeze(1)
            target = targets[rows].unsqueeze(1).masked_fill(ignored, 0)
            z = _shifted((hidden[rows] @ weight.T).to(exact))
            t = _shifted((teacher_hidden[rows] @ teacher_weight.T).to(exact))
            picked = z.gather(1, target)
            if temperature != 1:
                cross_entropy += (z.exp().sum(1, keepdim=True).log() - picked).masked_fill(ignored, 0).sum()
                z /= temperature
                t /= temperature
            gap = t - z  # log p - log q without the two normalisers
            p, q = t.exp_(), z.exp_()
            p_norm, q_norm = (x.sum(1, keepdim=True) for x in (p, q))
            p /= p_norm
            if temperature == 1:
                cross_entropy += (q_norm.log() - picked).masked_fill(ignored, 0).sum()
            mean_gap = torch.linalg.vecdot(p, gap).unsqueeze(1)
            kl += (mean_gap + q_norm.log() - p_norm.log()).masked_fill(ignored, 0).sum() * temperature**2
            if gradients is not None:
                dlogits = q.div_(q_norm).sub_(p).mul_(temperature)
                gradients.add(rows, dlogits.masked_fill_(ignored, 0))
    return kl, cross_entropy


def _shifted(logits: Tensor) -> Tensor:
    """Subtracts the maximum of every row, in place, so that the exponential does not overflow."""
    return logits.sub_(logits.amax(1, keepdim=True))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = hidden.dtype, weight.dtype
        gradients = HeadGradients(hidden, weight)
        kl, cross_entropy = _add_up(
            gradients.hidden, gradients.weight, teacher_hidden, teacher_weight, targets, temperature, gradients
        )
        ctx.mark_non_differentiable(cross_entropy)
        ctx.save_for_backward(gradients.dhidden, gradients.dweight)
        return kl, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (dkl * dhidden).to(hidden_dtype), (dkl * dweight).to(weight_dtype), None, None, None, None
