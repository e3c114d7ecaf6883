"""Time, memory and error of the kernel compared with PyTorch's implementations, on a CUDA GPU.

With `--model` it prints the formulas of cost.py instead, which needs no GPU:

python kernels/linear_cross_entropy/bench.py [--model] [--tokens N --vocab-size N --d-model N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.linear_cross_entropy import linear_cross_entropy, passes
from explore.kernels.linear_cross_entropy.cost import Work, fused, materialised, tiled
from explore.kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

SHAPES = ((8192, 32_000, 1024), (16_384, 50_257, 2048), (8192, 131_072, 4096))
"""Tokens, vocab_size, d_model."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="store_true", help="print FLOPs, bytes and bounds; needs no GPU")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--d-model", type=int)
    args = parser.parse_args(arguments)
    shape = (args.tokens, args.vocab_size, args.d_model)
    if any(shape) and not all(n and n > 0 for n in shape):
        parser.error(f"--tokens, --vocab-size, --d-model: must be three positive integers or all absent, got {shape}")
    shapes = [shape] if all(shape) else SHAPES
    if args.model:
        for shape in shapes:
            print_model(*shape)
        return 0
    if not torch.cuda.is_available():
        print("bench.py: no CUDA GPU to time on; --model prints bytes, FLOPs and bounds without one", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print("bound: of each way's own FLOPs and bytes, for an H100 (989 TFLOP/s, 3.35 TB/s)")
    for shape in shapes:
        print_times(*shape)
    return 0


def print_model(tokens: int, vocab_size: int, d_model: int) -> None:
    """Prints the formulas' values for bf16 inputs."""
    print(f"tokens {tokens}, vocab_size {vocab_size}, d_model {d_model}, bf16; bound: H100, 989 TFLOP/s, 3.35 TB/s")
    print(f"{'':20}{'FLOPs':>12}{'':12}{'bytes':>12}{'':12}{'extra MiB':>12}{'':12}{'bound ms':>10}")
    print(f"{'':20}{'fwd':>12}{'bwd':>12}{'fwd':>12}{'bwd':>12}{'fwd':>12}{'bwd':>12}{'fwd':>10}{'fwd+bwd':>10}")
    for name, work in works(tokens, vocab_size, d_model).items():
        counts = (work.flops_fwd, work.flops_bwd, work.bytes_fwd, work.bytes_bwd)
        extra = (work.extra_bytes_fwd / 2**20, work.extra_bytes_bwd / 2**20)
        bounds = (work.bound_fwd_s * 1e3, work.bound_s * 1e3)
        print(
            f"{name:20}"
            + "".join(f"{x:12.3e}" for x in counts)
            + "".join(f"{x:12.1f}" for x in extra)
            + "".join(f"{x:10.3f}" for x in bounds)
        )


def works(tokens: int, vocab_size: int, d_model: int) -> dict[str, Work]:
    """The cost model of every timed implementation, for bf16 inputs."""
    columns = passes.tiles_for(torch.bfloat16, "ieee", passes.H100_SHARED_BYTES).columns
    return {
        "kernel": tiled(tokens, vocab_size, d_model, 2, columns, passes.CHUNK_TOKENS, passes.CHUNK_VOCAB),
        "full logits": materialised(tokens, vocab_size, d_model, 2),
        "full logits, fused": fused(tokens, vocab_size, d_model, 2),
    }


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual implementation: logits in the dtype of the inputs, their cross-entropy in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")


def print_times(tokens: int, vocab_size: int, d_model: int) -> None:
    """Prints a table of times, bounds, peak memory and errors of every implementation at one shape."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab_size, d_model, device="cuda") / d_model**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device="cuda")
    targets[::10] = -100
    truth = in_float64(hidden, weight, targets)
    compiled: Loss = torch.compile(reference, dynamic=False)
    model = works(tokens, vocab_size, d_model)
    ways: dict[str, tuple[Loss, Work]] = {
        "kernel": (linear_cross_entropy, model["kernel"]),
        "F.cross_entropy": (full_logits, model["full logits"]),
        "compiled reference": (compiled, model["full logits, fused"]),
        "compiled F.c._e.": (torch.compile(full_logits, dynamic=False), model["full logits, fused"]),
    }
    print(f"\ntokens {tokens}, vocab_size {vocab_size}, d_model {d_model}; error: |x - x in float64| / |x|")
    print(f"{'':20}{'ms':>10}{'':10}{'bound ms':>10}{'':10}{'peak MiB':>10}{'error':>10}")
    print(
        f"{'':20}{'fwd':>10}{'fwd+bwd':>10}{'fwd':>10}{'fwd+bwd':>10}{'':10}{'loss':>10}{'dHidden':>10}{'dWeight':>10}"
    )
    for name, (loss, work) in ways.items():
        try:
            row = measure(loss, hidden, weight, targets, truth)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:20}out of memory")
            continue
        fwd_ms, both_ms, peak, *errors = row
        bound_fwd_ms, bound_ms = work.bound_fwd_s * 1e3, work.bound_s * 1e3
        print(
            f"{name:20}{fwd_ms:10.3f}{both_ms:10.3f}{bound_fwd_ms:10.3f}{bound_ms:10.3f}{peak:10.0f}"
            + "".join(f"{error:10.1e}" for error in errors)
        )


def measure(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, truth: Sequence[Tensor]
) -> tuple[float, float, float, float, float, float]:
    """Milliseconds of forward and of both passes, peak MiB without the inputs, errors of loss and gradients."""

    def both() -> tuple[Tensor, ...]:
        value = loss(hidden, weight, targets)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(both(), truth, strict=True)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        fwd_ms = triton.testing.do_bench(lambda: loss(hidden, weight, targets))
    return fwd_ms, triton.testing.do_bench(both), peak, errors[0], errors[1], errors[2]


def in_float64(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> list[Tensor]:
    """Loss and gradients of the reference in float64, computed in slices of tokens to fit into memory."""
    w = weight.detach().double().requires_grad_()
    loss, d_weight, d_hidden = torch.zeros((), dtype=torch.float64, device=w.device), torch.zeros_like(w), []
    for start in range(0, len(targets), rows):
        h = hidden.detach()[start : start + rows].double().requires_grad_()
        value = reference(h, w, targets[start : start + rows])
        dh, dw = torch.autograd.grad(value, (h, w))
        loss, d_weight = loss + value.detach(), d_weight + dw
        d_hidden.append(dh)
    return [loss, torch.cat(d_hidden), d_weight]


if __name__ == "__main__":
    sys.exit(main())
