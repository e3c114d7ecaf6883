"""Times the kernel and torch's attention on this CPU, in turns, and prints their distance from float64.

python kernels/causal_attention/bench.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.causal_attention import causal_attention, handles

SHAPES = ((8, 512, 6, 2, 32), (8, 1024, 8, 2, 64), (16, 128, 4, 2, 32), (1, 4096, 8, 2, 64))
"""Batch, positions, heads, key-value heads, channels per head."""
REPEATS = 11

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args(arguments).threads)
    ways: dict[str, Attention] = {"kernel": causal_attention, "torch": torch_attention}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms forward, and with backward")
    print(f"{'shape':>22} {'dtype':>9} {'way':>7} {'forward':>8} {'both':>8} {'error':>8} {'of gradients':>13}")
    for shape in SHAPES:
        exact = outputs(torch_attention, leaves(shape, torch.float64))
        for dtype in (torch.float32, torch.bfloat16):
            inputs = leaves(shape, dtype)
            if not handles(*inputs):
                continue
            times = {way: timed(call, inputs) for way, call in ways.items()}
            for way, call in ways.items():
                errors = [distance(x, y) for x, y in zip(outputs(call, inputs), exact, strict=True)]
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{shape!s:>22} {name:>9} {way:>7} {times[way][0]:8.2f} {times[way][1]:8.2f} {errors[0]:8.0e} "
                    f"{max(errors[1:]):13.0e}"
                )
    return 0


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def leaves(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v in the layout of a model: positions before heads in memory."""
    batch, seq, n_heads, n_kv_heads, d_head = shape
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, seq, heads, d_head, generator=random).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    return q, k, v


def outputs(attend: Attention, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of half of its squared norm."""
    y = attend(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, y.detach())]


def timed(attend: Attention, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Median milliseconds of a forward pass, and of both passes."""
    plain = tuple(x.detach() for x in inputs)

    def median(call: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[1:])

    return median(lambda: attend(*plain)), median(lambda: outputs(attend, inputs))


def distance(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((x.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    raise SystemExit(main())
