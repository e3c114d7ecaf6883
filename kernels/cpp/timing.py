"""Times and errors of a C++ kernel beside plain PyTorch, for the benches of the kernels."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from explore.kernels.cpp import computes

REPEATS = 11

Inputs = Callable[[torch.dtype], Sequence[Tensor]]


def run(
    title: str | None,
    ways: Mapping[str, Callable[..., Tensor]],
    shapes: Iterator[tuple[str, Inputs]],
    arguments: Sequence[str] | None,
) -> int:
    """Prints a line for each shape, dtype and way, and returns the exit code.

    Args:
        title: what the command does, for its help.
        ways: implementations by name. The last is the reference, whose result in float64 is exact.
        shapes: a name of each shape, and its inputs in a dtype.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args(arguments).threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms forward, and with backward")
    print(f"{'shape':>30} {'dtype':>9} {'way':>7} {'forward':>8} {'both':>8} {'error':>8} {'of gradients':>13}")
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if computes(torch.empty(0, dtype=dtype))]
    for name, inputs in shapes:
        exact = results([*ways.values()][-1], inputs(torch.float64))
        for dtype in dtypes:
            for way, call in ways.items():
                tensors = inputs(dtype)
                forward, both = milliseconds(call, tensors)
                errors = [distance(x, y) for x, y in zip(results(call, tensors), exact, strict=True)]
                kind = str(dtype).removeprefix("torch.")
                print(
                    f"{name:>30} {kind:>9} {way:>7} {forward:8.2f} {both:8.2f} {errors[0]:8.0e} {max(errors[1:]):13.0e}"
                )
    return 0


def results(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of half of its squared norm."""
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, y.detach())]


def milliseconds(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Median time of a forward pass, and of both passes."""
    plain = [x.detach() for x in inputs]

    def median(timed: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            timed()
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[1:])

    return median(lambda: call(*plain)), median(lambda: results(call, inputs))


def distance(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((x.double() - exact).norm() / exact.norm())
