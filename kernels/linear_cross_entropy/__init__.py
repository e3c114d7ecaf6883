"""Fused linear layer and cross-entropy on CUDA: the logits stay in registers, one tile at a time."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from explore.kernels.linear_cross_entropy.passes import backward, forward, interpreted

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, "tokens"],  # noqa: F821
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of softmax(hidden weight^T), in nats and fp32; targets of -100 are ignored.

    Under autocast, `hidden` and `weight` are cast as in a linear layer. A target outside the vocabulary makes the loss
    NaN, since raising an error would require waiting for the device.

    Raises:
        ValueError: if dtypes or devices differ or have no kernel, or if `weight` is empty.
    """
    device = hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight must both be float32 or bfloat16, got {hidden.dtype} and {weight.dtype}")
    if {device, weight.device, targets.device} != {device} or not (device.type == "cuda" or interpreted()):
        raise ValueError(
            "hidden, weight and targets must be on one CUDA device, or on any one device with TRITON_INTERPRET=1, "
            f"got {device}, {weight.device} and {targets.device}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight must have at least one entry and one channel, got shape {tuple(weight.shape)}")
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        loss, lse = forward(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, targets, lse = ctx.saved_tensors
        return *backward(hidden, weight, targets, lse, upstream, ctx.needs_input_grad[:2]), None
