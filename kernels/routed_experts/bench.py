"""Compares the kernels with plain PyTorch and the roofline: `python kernels/routed_experts/bench.py`.

Without a GPU, `--model` prints FLOPs, bytes and minimum times from the formulas in README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.routed_experts import Activation, cost, routed_experts
from explore.kernels.routed_experts.cost import Pass, Shape
from explore.kernels.routed_experts.reference import activate, reference

FLOPS_PER_S, BANDWIDTH = 989e12, 3.35e12
"""Published rates of an H100 SXM: FLOP/s of dense bf16 products, and bytes per second."""

SHAPES = {
    "standard": Shape(t=8192, k=6, e=128, d=4096, f=2688, gated=False),
    "latent, same experts": Shape(t=8192, k=6, e=128, d=1024, f=2688, gated=False),
    "latent, 4 times the experts": Shape(t=8192, k=24, e=512, d=1024, f=2688, gated=False),
    "latent, swiglu": Shape(t=8192, k=24, e=256, d=512, f=1408, gated=True),
    "latent, decode": Shape(t=64, k=24, e=512, d=1024, f=2688, gated=False),
}
"""Experts of the models of LatentMoE, arXiv 2601.18089."""

Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]
Run = Callable[..., Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 2 if there is no GPU to time on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="print the formulas without timing")
    parser.add_argument("--shape", type=int, nargs=5, metavar=tuple("tkedf"), help="time only this shape")
    parser.add_argument("--swiglu", action="store_true", help="use SwiGLU instead of squared ReLU for --shape")
    parser.add_argument("--flops-per-s", type=float, default=FLOPS_PER_S, help="peak of the card (%(default)g)")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes/s of the card (%(default)g)")
    asked = parser.parse_args(arguments)
    shapes = (
        {"as asked": Shape(**dict(zip("tkedf", asked.shape, strict=True)), gated=asked.swiglu)}
        if asked.shape
        else SHAPES
    )
    if asked.model:
        for name, shape in shapes.items():
            print("\n".join(model(name, shape, asked.flops_per_s, asked.bandwidth)))
        return 0
    if not torch.cuda.is_available():
        print("bench: needs a CUDA GPU; --model prints FLOPs, bytes and the least time without one", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, triton {triton.__version__}")
    for name, shape in shapes.items():
        for line in timed(name, shape, asked.flops_per_s, asked.bandwidth):
            print(line, flush=True)
    return 0


def model(name: str, shape: Shape, flops_per_s: float, bandwidth: float) -> Iterator[str]:
    """Lines of a table: FLOPs, bytes and minimum time of each kernel, then fused compared with unfused."""
    yield f"\n{name}: {title(shape)}; {shape.n / shape.e:.0f} rows an expert"
    yield f"{'':44}{'GFLOP':>10}{'MB':>10}{'FLOP/byte':>10}{'least us':>10}  bound by"

    def line(label: str, passes: Sequence[Pass]) -> str:
        flops, moved = cost.total(passes)[1:]
        bound = "memory" if flops / flops_per_s < moved / bandwidth else "products"
        least = 1e6 * cost.bound_s(passes, flops_per_s, bandwidth)
        numbers = f"{flops / 1e9:10.1f}{moved / 1e6:10.1f}{flops / max(moved, 1):10.0f}{least:10.1f}"
        return f"{label:44}{numbers}  {bound if len(passes) == 1 else ''}".rstrip()

    directions = {
        "forward": (cost.forward(shape, keep=False), cost.forward_unfused(shape)),
        "forward and backward": (
            cost.forward(shape, keep=True) + cost.backward(shape),
            cost.forward_unfused(shape) + cost.backward_unfused(shape),
        ),
    }
    for direction, (fused, unfused) in directions.items():
        for each in fused:
            yield line(f"  {each.name}", [each])
        yield line(direction, fused)
        yield line(f"{direction}, unfused", unfused)


def timed(name: str, shape: Shape, flops_per_s: float, bandwidth: float) -> Iterator[str]:
    """Lines of a table: milliseconds, fraction of the roofline, and error against fp32 of each implementation."""
    activation: Activation = "swiglu" if shape.gated else "relu2"
    torch._dynamo.reset()  # torch limits how many shapes of a function it compiles
    leaves = inputs(shape, torch.device("cuda"), torch.bfloat16)
    capacity = int(leaves[1].flatten().bincount().max())  # not timed, which favours the padded form
    runs: dict[str, Run] = {
        "Triton": partial(routed_experts, activation=activation),
        "compiled, padded": partial(torch.compile(padded, dynamic=False), activation=activation, capacity=capacity),
        "grouped_mm": partial(grouped, activation=activation),
    }
    truth = results(partial(reference, activation=activation), in_dtype(leaves, torch.float32))
    least = [
        1e3 * cost.bound_s(passes, flops_per_s, bandwidth)
        for passes in (cost.forward(shape, keep=False), cost.forward(shape, keep=True) + cost.backward(shape))
    ]
    yield f"\n{name}: {title(shape)}"
    yield f"{'':20}{'forward ms':>12}{'of bound':>10}{'+ backward ms':>15}{'of bound':>10}{'error':>10}"
    yield f"{'roofline':20}{least[0]:12.3f}{1:10.0%}{least[1]:15.3f}{1:10.0%}"
    for label, run in runs.items():
        try:
            found = results(run, leaves)
            error = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, truth, strict=True))
            del found
            with torch.no_grad():
                forward = triton.testing.do_bench(partial(run, *leaves), return_mode="median")
            both = triton.testing.do_bench(partial(results, run, leaves), return_mode="median")
        except (RuntimeError, NotImplementedError, AttributeError) as problem:  # too old a torch or too little memory
            yield f"{label:20}  {str(problem).splitlines()[0]}"
            continue
        yield f"{label:20}{forward:12.3f}{least[0] / forward:10.0%}{both:15.3f}{least[1] / both:10.0%}{error:10.1e}"


def title(shape: Shape) -> str:
    """The shape and the activation in words."""
    sizes = " ".join(f"{letter}={getattr(shape, letter)}" for letter in "tkedf")
    return f"{sizes}, {'swiglu' if shape.gated else 'relu2'}"


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    """Random tensors, each token with k different experts chosen uniformly."""
    s = replace(shape, itemsize=dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)

    def leaf(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(sizes, generator=generator, device=device, dtype=dtype)
        return (values * scale).requires_grad_()

    chosen = torch.rand(s.t, s.e, generator=generator, device=device).topk(s.k).indices
    matrices = [leaf(s.e, s.d, s.f, scale=s.d**-0.5) for _ in range(s.reads)]
    gate = matrices[1] if s.gated else None
    return leaf(s.t, s.d), chosen, leaf(s.t, s.k), matrices[0], gate, leaf(s.e, s.f, s.d, scale=s.f**-0.5)


def in_dtype(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """The same values in another dtype, as new leaves."""
    x, chosen, *rest = leaves
    made = [None if leaf is None else leaf.detach().to(dtype).requires_grad_() for leaf in (x, *rest)]
    return made[0], chosen, *made[1:]  # type: ignore[return-value]


def results(run: Run, leaves: Leaves) -> list[Tensor]:
    """The output and the gradient of every leaf."""
    y = run(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


def padded(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
    capacity: int,
) -> Tensor:
    """Plain PyTorch: one batch of products, each expert padded to `capacity` rows."""
    expert, order = chosen.flatten().sort(stable=True)
    first = torch.searchsorted(expert, torch.arange(len(up), device=x.device))
    slot = expert * capacity + torch.arange(len(order), device=x.device) - first[expert]
    token = order // chosen.shape[1]
    rows = x.new_zeros(len(up) * capacity, x.shape[1]).index_copy(0, slot, x[token]).view(len(up), capacity, -1)
    h = activate(rows @ up, None if gate is None else rows @ gate, activation)
    return _combined(x, (h @ down).flatten(0, 1)[slot], weights, order, token)


def grouped(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str
) -> Tensor:
    """Plain PyTorch: one grouped product for each matrix."""
    expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(len(up), device=x.device), right=True, out_int32=True)
    token = order // chosen.shape[1]
    product = partial(F.grouped_mm, offs=ends) if hasattr(F, "grouped_mm") else partial(torch._grouped_mm, offs=ends)
    rows = x[token]
    h = activate(product(rows, up), None if gate is None else product(rows, gate), activation)
    return _combined(x, product(h, down), weights, order, token)


def _combined(x: Tensor, outputs: Tensor, weights: Tensor, order: Tensor, token: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, token, outputs * weights.flatten()[order, None].to(x.dtype))


if __name__ == "__main__":
    sys.exit(main())
