"""Routed experts in Triton: gather, grouped products, activation and weighted scatter, forward and backward.

Shapes: t tokens, k choices per token, e experts, d input and output width of an expert, f inner width of an expert;
n = t k choices, sorted by expert in the kernels. The derivation is in README.md.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.routed_experts.backward import gradients
from explore.kernels.routed_experts.forward import outputs
from explore.kernels.routed_experts.routing import Routing, route

__all__ = ["Activation", "routed_experts"]

Activation = Literal["relu2", "swiglu", "swiglu_clamped"]
DTYPES = (torch.float32, torch.bfloat16)


def routed_experts(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    gate: Float[Tensor, "e d f"] | None,
    down: Float[Tensor, "e f d"],
    activation: Activation,
) -> Float[Tensor, "t d"]:
    """For each token x, the sum over its chosen experts of weight times activation(x up, x gate) down.

    No token is dropped. The function is differentiable once, in all arguments except `chosen`. The host never waits for
    the device, and results are bitwise reproducible.

    Args:
        chosen: expert indices in 0 .. e - 1. They are not checked, because a check would wait for the device.
        weights: weights of the choices in any float dtype, used in fp32.

    Raises:
        ValueError: activation, gate, dtype, shape or device do not fit.
    """
    _check(x, chosen, weights, up, gate, down, activation)
    leaves = (x, weights, up, gate, down)
    keep = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    # Triton launches on the current device. Autocast would turn bf16 sums, and therefore the output, into fp32.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        y: Tensor = _RoutedExperts.apply(  # type: ignore[no-untyped-call]
            x, chosen, weights, up, gate, down, activation, keep
        )
    return y


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        activation: Activation,
        keep: bool,
    ) -> Tensor:
        x, weights, up, down = (each.contiguous() for each in (x, weights, up, down))
        gate = None if gate is None else gate.contiguous()
        routing = route(chosen, len(up), x.dtype)
        y, kept = outputs(x, weights, up, gate, down, activation, routing, keep)
        if keep:
            ctx.save_for_backward(x, weights, up, gate, down, *kept, *routing.tensors())
            ctx.activation, ctx.rows, ctx.top_k = activation, routing.rows, routing.top_k
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, gate, down, *kept, choice, token, bounds, tile_expert, tile_row = ctx.saved_tensors
        routing = Routing(choice, token, bounds, tile_expert, tile_row, ctx.rows, ctx.top_k)
        needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[2:6]
        dx, dweights, dup, dgate, ddown = gradients(
            dy.contiguous(), x, weights, up, gate, down, tuple(kept), ctx.activation, routing, needs
        )
        return dx, None, dweights, dup, dgate, ddown, None, None


def _check(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if (gate is None) != (activation == "relu2"):
        needed = "None for the activation 'relu2'" if activation == "relu2" else f"given for {activation!r}"
        raise ValueError(f"gate must be {needed}, got {'None' if gate is None else 'a tensor'}")
    e, d, f = up.shape
    for name, tensor, shape in (
        ("x", x, (len(x), d)),
        ("chosen", chosen, (len(x), chosen.shape[-1])),
        ("weights", weights, chosen.shape),
        ("gate", gate, up.shape),
        ("down", down, (e, f, d)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit the others, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("up", up), ("gate", gate), ("down", down)):
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.dtype != x.dtype):
            raise ValueError(f"{name} must be float32 or bfloat16 and have the dtype of x, got {tensor.dtype}")
    for name, tensor in (("chosen", chosen), ("weights", weights), ("up", up), ("gate", gate), ("down", down)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, the device of x, got {tensor.device}")
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"x must be on cuda, or on any device with TRITON_INTERPRET=1, got {x.device}")
