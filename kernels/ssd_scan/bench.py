"""Compares the scan with mamba-ssm, compiled PyTorch and the roofline; `--model` prints only the roofline.

python kernels/ssd_scan/bench.py
python kernels/ssd_scan/bench.py --model --chunk 128
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

H100_BYTES_PER_S = 3.35e12
"""Published bandwidth of the SXM card, in bytes per second."""
H100_FLOPS_PER_S = 989e12
"""Published FLOP/s of the SXM card for dense bf16."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, with the FLOPs and bytes that its kernels need; derived in the README."""

    b: int
    seq: int
    h: int
    p: int
    g: int
    n: int
    q: int
    itemsize: int = 2
    """Bytes of an element of X, B, C, Y and the stored states."""

    def pairs(self) -> float:
        """Number of positions j <= i in a chunk, averaged over i."""
        return (self.q + 1) / 2

    def flops_fwd(self, pairs: float | None = None) -> float:
        """FLOPs of the matrix products of a forward pass; `pairs` replaces the mean number of pairs if given."""
        pairs = self.pairs() if pairs is None else pairs
        return self.b * self.seq * self.h * (4 * self.p * self.n + 2 * pairs * (self.n + self.p))

    def flops_bwd(self, pairs: float | None = None) -> float:
        """FLOPs of a backward pass, including the states and C B^T that it recomputes."""
        pairs = self.pairs() if pairs is None else pairs
        return self.b * self.seq * self.h * (12 * self.p * self.n + 2 * pairs * (4 * self.n + 3 * self.p))

    def bytes_fwd(self) -> float:
        """Bytes that the kernels of a forward pass read and write; each kernel moves each of its tensors once."""
        return self._bytes(per_head=3, per_group=3, states=2, scalars=7)

    def bytes_bwd(self) -> float:
        """Bytes that the kernels of a backward pass read and write."""
        return self._bytes(per_head=7, per_group=8, states=5, scalars=17)

    def _bytes(self, *, per_head: int, per_group: int, states: int, scalars: int) -> float:
        tokens, chunks = self.b * self.seq, self.b * -(-self.seq // self.q)
        moved = per_head * tokens * self.h * self.p + per_group * tokens * self.g * self.n
        moved += states * chunks * self.h * self.p * self.n
        return self.itemsize * moved + 4 * scalars * tokens * self.h


@dataclass(frozen=True)
class Card:
    """Peak FLOP/s and bandwidth of a device, for the roofline."""

    bytes_per_s: float
    flops_per_s: float

    def ridge(self) -> float:
        """FLOP/byte at which compute and memory take the same time."""
        return self.flops_per_s / self.bytes_per_s

    def bound_s(self, flops: float, moved: float) -> float:
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


SHAPES = (
    Shape(b=8, seq=4096, h=24, p=64, g=1, n=128, q=256),
    Shape(b=8, seq=4096, h=64, p=64, g=8, n=128, q=256),
    Shape(b=1, seq=65536, h=64, p=64, g=8, n=128, q=128),
    Shape(b=8, seq=4096, h=64, p=64, g=8, n=128, q=64),
)


def compute_bound_from(shape: Shape, card: Card, phase: str) -> int:
    """The smallest chunk size, among multiples of 16, whose FLOPs take longer than its bytes.

    Args:
        phase: `fwd` or `bwd`.
    """
    q = 16
    while True:
        at = replace(shape, q=q)
        flops, moved = getattr(at, f"flops_{phase}")(), getattr(at, f"bytes_{phase}")()
        if flops / moved >= card.ridge() or q >= 2**16:
            return q
        q += 16


def model_table(shapes: Sequence[Shape], card: Card) -> str:
    """Values of the formulas, one line per shape and phase."""
    lines = [
        f"at {card.bytes_per_s / 1e12:g} TB/s and {card.flops_per_s / 1e12:g} TFLOP/s, {card.ridge():.0f} FLOP/byte",
        f"{'b seq h p g n q':28} phase {'GB':>8} {'TFLOP':>8} {'FLOP/B':>7} {'bound ms':>9} bound by  compute from q",
    ]
    for shape in shapes:
        sizes = " ".join(str(getattr(shape, name)) for name in ("b", "seq", "h", "p", "g", "n", "q"))
        for phase in ("fwd", "bwd"):
            flops, moved = getattr(shape, f"flops_{phase}")(), getattr(shape, f"bytes_{phase}")()
            side = "compute" if flops / moved >= card.ridge() else "memory"
            lines.append(
                f"{sizes:28} {phase:5} {moved / 1e9:8.3f} {flops / 1e12:8.3f} {flops / moved:7.1f}"
                f" {card.bound_s(flops, moved) * 1e3:9.3f} {side:9} {compute_bound_from(shape, card, phase)}"
            )
    return "\n".join(lines)


Scan = Callable[..., "tuple[Tensor, Tensor]"]


def implementations() -> dict[str, Scan]:
    """All implementations that can be imported; each is called like `ssd_scan` without a state."""
    import torch

    from explore.kernels.ssd_scan import ssd_scan
    from explore.kernels.ssd_scan.reference import ssd_scan_chunked

    found: dict[str, Scan] = {"this kernel": ssd_scan, "torch.compile": torch.compile(ssd_scan_chunked)}
    if importlib.util.find_spec("mamba_ssm") is not None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def mamba_ssm(X: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, q: int) -> Any:
            return mamba_chunk_scan_combined(X, dt, A, B, C, q, D=D, return_final_states=True)

        found["mamba-ssm"] = mamba_ssm
    return found


def make_inputs(shape: Shape) -> list[Tensor]:
    """Leaves for X, dt, A, B, C and D, with decay as at the start of training a Mamba-2."""
    import torch
    from torch.nn.functional import softplus

    torch.manual_seed(0)
    s, on = shape, {"device": "cuda"}
    X, B, C = (
        torch.randn(size, **on, dtype=torch.bfloat16)  # type: ignore[call-overload]
        for size in ((s.b, s.seq, s.h, s.p), (s.b, s.seq, s.g, s.n), (s.b, s.seq, s.g, s.n))
    )
    dt = softplus(torch.randn(s.b, s.seq, s.h, device="cuda") - 4)
    A, D = -torch.rand(s.h, device="cuda") * 15 - 1, torch.ones(s.h, device="cuda")
    return [x.requires_grad_() for x in (X, dt, A, B, C, D)]


def worst_error(scan: Scan, shape: Shape) -> float:
    """The largest relative error (of norms) among output, state and gradients, on one short sequence."""
    import torch

    from explore.kernels.ssd_scan.reference import ssd_scan_reference

    inputs = make_inputs(replace(shape, b=1, seq=256))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(inputs[0].shape, device="cuda", dtype=torch.float64)
    results = []
    for leaves, (Y, state) in ((inputs, scan(*inputs, shape.q)), (exact, ssd_scan_reference(*exact))):
        loss = (Y.double() * weight).sum() + state.double().sum()
        results.append((Y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)))
    return max(float((x.double() - truth).norm() / truth.norm()) for x, truth in zip(*results, strict=True))


def time_ms(scan: Scan, shape: Shape) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of forward and backward, as medians."""
    import torch
    from triton.testing import do_bench

    inputs = make_inputs(shape)
    dY = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            scan(*inputs, shape.q)

    def both() -> None:
        torch.autograd.grad(scan(*inputs, shape.q)[0], inputs, dY)

    return float(do_bench(forward, return_mode="median")), float(do_bench(both, return_mode="median"))


def measure(shapes: Sequence[Shape], card: Card) -> None:
    """Prints the time, the fraction of the bound and the error of every implementation at every shape."""
    import torch
    from torch._inductor.exc import InductorError

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16, medians, bound from the formulas of --model"
    )
    print(f"{'b seq h p g n q':28} {'':14} {'fwd ms':>8} {'of bound':>8} {'fwd+bwd':>8} {'of bound':>8} {'error':>8}")
    for shape in shapes:
        sizes = " ".join(str(getattr(shape, name)) for name in ("b", "seq", "h", "p", "g", "n", "q"))
        bound_fwd = card.bound_s(shape.flops_fwd(), shape.bytes_fwd()) * 1e3
        bound_bwd = card.bound_s(shape.flops_bwd(), shape.bytes_bwd()) * 1e3
        print(f"{sizes:28} {'roofline':14} {bound_fwd:8.3f} {'':8} {bound_fwd + bound_bwd:8.3f}")
        for name, scan in implementations().items():
            try:
                forward, both = time_ms(scan, shape)
                print(
                    f"{'':28} {name:14} {forward:8.3f} {bound_fwd / forward:8.0%} {both:8.3f}"
                    f" {(bound_fwd + bound_bwd) / both:8.0%} {worst_error(scan, shape):8.1e}"
                )
            except torch.cuda.OutOfMemoryError:
                print(f"{'':28} {name:14} out of memory")
            except InductorError as error:
                print(f"{'':28} {name:14} does not compile: {str(error).splitlines()[0]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns 2 if there is no GPU to time on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="print bytes, FLOPs and bound, and time nothing")
    parser.add_argument("--bandwidth", type=float, default=H100_BYTES_PER_S, help="bytes/s of the roofline")
    parser.add_argument("--peak", type=float, default=H100_FLOPS_PER_S, help="FLOP/s of the roofline")
    names = {"batch": "b", "seq": "seq", "heads": "h", "d-head": "p", "groups": "g", "d-state": "n", "chunk": "q"}
    for name, letter in names.items():
        parser.add_argument(f"--{name}", type=int, dest=letter, help="this size in every shape")
    options = parser.parse_args(arguments)
    given = {letter: getattr(options, letter) for letter in names.values() if getattr(options, letter) is not None}
    shapes = tuple(dict.fromkeys(replace(shape, **given) for shape in SHAPES))
    card = Card(options.bandwidth, options.peak)
    if options.model:
        print(model_table(shapes, card))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("bench: no CUDA device to time; --model prints the bound without one", file=sys.stderr)
        return 2
    measure(shapes, card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
