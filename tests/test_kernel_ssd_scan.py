"""The Triton SSD scan compared with its definition in float64, in Triton's interpreter if there is no CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from explore.kernels import ssd_scan as package
from explore.kernels.ssd_scan import ssd_scan
from explore.kernels.ssd_scan.bench import Card, Shape, compute_bound_from, model_table
from explore.kernels.ssd_scan.reference import ssd_scan_chunked, ssd_scan_reference

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONLY_INTERPRETED = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
NAMES = ("Y", "state", "dX", "ddt", "dA", "dB", "dC", "dD", "dstate")
FP32_TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2  # of norms; the gradients of B and C sum several values rounded to 2**-9


def made(
    b: int, seq: int, h: int, p: int, g: int, n: int, *, dtype: torch.dtype = torch.float32, with_state: bool = True
) -> list[Tensor]:
    """X, dt, A, B, C, D, the state or an empty one, and weights of both outputs in a loss."""
    torch.manual_seed(0)
    X, B, C = (torch.randn(shape).to(dtype) for shape in ((b, seq, h, p), (b, seq, g, n), (b, seq, g, n)))
    dt, A, D = F.softplus(torch.randn(b, seq, h) - 1), -torch.randn(h).exp(), torch.randn(h)
    state = torch.randn(b if with_state else 0, h, p, n)
    return [x.to(DEVICE) for x in (X, dt, A, B, C, D, state, torch.randn(b, seq, h, p), torch.randn(b, h, p, n))]


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], *chunk_size: int, dtype: Any = None
) -> dict[str, Tensor]:
    *inputs, weight_y, weight_state = tensors
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    if leaves[6].shape[0] != leaves[0].shape[0]:
        leaves.pop()
    Y, after = function(*leaves[:6], *chunk_size, *leaves[6:])
    loss = (Y * weight_y.to(dtype or torch.float32)).sum() + (after * weight_state.to(after.dtype)).sum()
    found = (Y, after, *torch.autograd.grad(loss, leaves))
    return {name: x.detach() for name, x in zip(NAMES, found, strict=False)}


def truth_of(tensors: list[Tensor]) -> dict[str, Tensor]:
    return outputs_and_gradients(ssd_scan_reference, tensors, dtype=torch.float64)


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """For every tensor, the norm of the error over the norm of the reference; NaN if the tensor has one."""
    assert found.keys() == truth.keys()
    apart = {name: float((found[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}
    # With one position nothing but a state decays, so the true gradient may be zero.
    wrong = {
        name: distance
        for name, distance in apart.items()
        if not (distance <= tolerance or (not truth[name].any() and not found[name].any()))
    }
    assert not wrong, wrong


def fill_memory(monkeypatch: pytest.MonkeyPatch, value: float) -> list[Tensor]:
    """Makes torch fill new memory with `value`, and returns the list of new tensors."""
    made_here, empty = [], torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made_here.append(empty(*args, **kwargs))
        if made_here[-1].is_floating_point():  # an autotuner asks for integers, of which none is no number
            made_here[-1].fill_(value)
        return made_here[-1]

    monkeypatch.setattr(package.torch, "empty", filled)
    return made_here


@pytest.fixture(autouse=True)
def _what_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_memory(monkeypatch, torch.nan)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("seq", "chunk_size", "n_groups", "d_state"),
    [
        (1, 64, 1, 5),
        (63, 64, 2, 5),
        (64, 64, 1, 16),
        (65, 64, 2, 16),
        (65, 32, 1, 5),
        (200, 64, 2, 5),
        (200, 90, 1, 16),
    ],
)
def test_the_kernel_equals_the_recurrence_with_all_gradients(
    seq: int, chunk_size: int, n_groups: int, d_state: int, with_state: bool
) -> None:
    tensors = made(1, seq, 2, 3, n_groups, d_state, with_state=with_state)
    assert_close(outputs_and_gradients(ssd_scan, tensors, chunk_size), truth_of(tensors), FP32_TOLERANCE)


@pytest.mark.parametrize(("d_head", "d_state"), [(20, 72), (72, 20), (130, 7), (3, 130)])
def test_several_tiles_and_large_tiles_give_the_same_results(d_head: int, d_state: int) -> None:
    tensors = made(1, 70, 2, d_head, 1, d_state)
    assert_close(outputs_and_gradients(ssd_scan, tensors, 48), truth_of(tensors), FP32_TOLERANCE)


@pytest.mark.parametrize("seq", [65, 200])
def test_bf16_is_close_to_the_recurrence_of_the_same_rounded_inputs(seq: int) -> None:
    tensors = made(1, seq, 2, 20, 1, 16, dtype=torch.bfloat16)
    found = outputs_and_gradients(ssd_scan, tensors, 64)
    rounded, exact = {"Y", "dX", "dB", "dC"}, {"state", "ddt", "dA", "dD", "dstate"}
    assert {name: x.dtype for name, x in found.items()} == (
        dict.fromkeys(rounded, torch.bfloat16) | dict.fromkeys(exact, torch.float32)
    )
    assert_close(found, truth_of(tensors), BF16_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 20, 10_000])
def test_heads_split_among_programs_sum_to_the_same(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_programs_wanted", lambda device: programs)
    tensors = made(2, 20, 10, 3, 2, 5)
    assert_close(outputs_and_gradients(ssd_scan, tensors, 16), truth_of(tensors), FP32_TOLERANCE)


@pytest.mark.slow
def test_unwritten_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = made(2, 40, 4, 3, 2, 5)
    results = []
    for value in (torch.nan, 7.0):
        new = fill_memory(monkeypatch, value)
        results.append(outputs_and_gradients(ssd_scan, tensors, 32))
        assert len(new) > 10
    for first, second in zip(*(result.values() for result in results), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("of", [0, 1])
def test_either_output_alone_has_its_gradients(of: int) -> None:
    tensors = made(1, 50, 2, 3, 1, 5)
    results = []
    for scan, chunk, dtype in ((ssd_scan, (16,), None), (ssd_scan_reference, (), torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors[:7]]
        output = scan(*leaves[:6], *chunk, leaves[6])[of]
        results.append(torch.autograd.grad(output.sum(), leaves, allow_unused=True, materialize_grads=True))
    found, truth = (dict(zip(NAMES[2:], result, strict=True)) for result in results)
    assert_close(found, truth, FP32_TOLERANCE)


def test_views_of_one_projection_are_read_without_a_copy() -> None:
    b, seq, h, p, g, n = 2, 40, 4, 3, 2, 5
    X, dt, A, B, C, D, state, *_ = made(b, seq, h, p, g, n)
    xBC = torch.cat((X.flatten(2), B.flatten(2), C.flatten(2)), dim=-1)
    x, B_view, C_view = xBC.split((h * p, g * n, g * n), dim=-1)
    views = [x.unflatten(2, (h, p)), dt.transpose(0, 1).contiguous().transpose(0, 1), A]
    views += [B_view.unflatten(2, (g, n)), C_view.unflatten(2, (g, n)), D]
    assert not views[0].is_contiguous()
    for found, same in zip(ssd_scan(*views, 16, state), ssd_scan(X, dt, A, B, C, D, 16, state), strict=True):
        assert torch.equal(found, same)
    turned = [M.transpose(2, 3).contiguous().transpose(2, 3) for M in (X, B, C)]
    found, _ = ssd_scan(turned[0], dt, A, turned[1], turned[2], D, 16, state)
    assert torch.equal(found, ssd_scan(X, dt, A, B, C, D, 16, state)[0])


def test_a_sequence_in_two_pieces_gives_the_same_as_in_one_piece() -> None:
    X, dt, A, B, C, D, *_ = made(2, 50, 4, 3, 2, 5)
    Y, state = ssd_scan(X, dt, A, B, C, D, 16)
    first, between = ssd_scan(X[:, :21], dt[:, :21], A, B[:, :21], C[:, :21], D, 16)
    second, last = ssd_scan(X[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, 16, between)
    torch.testing.assert_close(torch.cat((first, second), dim=1), Y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)


def test_strong_decay_and_long_chunks_stay_finite() -> None:
    X, dt, A, B, C, D, *rest = made(1, 250, 2, 4, 1, 4)
    tensors = [X, dt + 5, -16 * torch.ones_like(A), B, C, D, *rest]
    found, truth = outputs_and_gradients(ssd_scan, tensors, 256), truth_of(tensors)
    rounding = 2.0**-24 * float((tensors[1] * 16).sum(1).max())  # of the decay that is summed over the chunk
    assert rounding > 1e-4
    assert_close({"dA": found.pop("dA")}, {"dA": truth.pop("dA")}, 2 * rounding)
    assert_close(found, truth, FP32_TOLERANCE)


def test_the_gradient_of_the_decay_does_not_cancel_away_in_bf16() -> None:
    """With little interaction between positions, the pairs i = j are by far the largest."""
    X, dt, A, B, C, D, *rest = made(1, 128, 2, 16, 1, 16, dtype=torch.bfloat16, with_state=False)
    tensors = [X, dt + 4, A - 1, B, C, D, *rest]
    found, truth = outputs_and_gradients(ssd_scan, tensors, 64), truth_of(tensors)
    assert_close({"dA": found["dA"]}, {"dA": truth["dA"]}, BF16_TOLERANCE)


def test_a_second_derivative_is_refused() -> None:
    X, *others = made(1, 4, 2, 3, 1, 5, with_state=False)[:6]
    X = X.requires_grad_()
    (gradient,) = torch.autograd.grad(ssd_scan(X, *others, 4)[0].square().sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(1, 4, 2, 3, dtype=torch.float64)}, "X, B and C must all be .*, got torch.float64, "),
        ({"B": torch.zeros(1, 4, 1, 5, dtype=torch.bfloat16)}, "must all be .*, got torch.float32, torch.bfloat16"),
        ({"chunk_size": 0}, "chunk_size must be from 1 to .*, got 0"),
        ({"B": torch.zeros(1, 4, 3, 5), "C": torch.zeros(1, 4, 3, 5)}, "n_groups must divide n_heads, .*, got 3"),
        ({name: torch.zeros(1, 4, 1, 2**14) for name in "BC"}, "d_head x d_state must fit .*, got 3 x 16384"),
        (
            {name: torch.zeros(1, 0, 1, 5) for name in "BC"}
            | {"X": torch.zeros(1, 0, 2, 3), "dt": torch.zeros(1, 0, 2)},
            r"X must not be empty, got shape \(1, 0, 2, 3\)",
        ),
    ],
)
def test_inputs_that_the_kernels_do_not_support_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("X", "dt", "A", "B", "C", "D")
    arguments = dict(zip(names, made(1, 4, 2, 3, 1, 5), strict=False)) | {"chunk_size": 4}
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        ssd_scan(**arguments | change)


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    code = (
        "import torch\nfrom explore.kernels.ssd_scan import ssd_scan\nx = torch.zeros(1, 1, 1, 1)\n"
        "try: ssd_scan(x, x[..., 0], x[0, 0, 0], x, x, x[0, 0, 0], 1)\nexcept ValueError as error: print(error)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "device must be cuda, or cpu with TRITON_INTERPRET=1, got cpu\n"


def test_the_chunked_form_that_bench_compiles_is_the_recurrence() -> None:
    tensors = [x.double() for x in made(2, 48, 4, 3, 2, 5, with_state=False)]
    found = outputs_and_gradients(ssd_scan_chunked, tensors, 16)
    # It keeps its states in fp32, as a compiled training step would.
    assert_close(found, truth_of(tensors), 1e-6)


@ONLY_INTERPRETED
def test_the_flops_of_the_formulas_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of one tile and one block per chunk, so that all pairs of a chunk are products of whole tiles."""
    from triton.runtime.interpreter import InterpreterBuilder

    flops, create_dot = [0], InterpreterBuilder.create_dot

    def counting(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        flops[0] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    tensors = made(2, 48, 4, 32, 2, 16)
    leaves = [x.requires_grad_() for x in tensors[:6]]
    shape = Shape(b=2, seq=48, h=4, p=32, g=2, n=16, q=16)
    Y, _ = ssd_scan(*leaves, 16)
    forward = flops[0]
    Y.sum().backward()
    assert forward == shape.flops_fwd(pairs=16)
    assert flops[0] - forward == shape.flops_bwd(pairs=16)


def test_the_bytes_of_the_formulas_are_those_of_the_tensors_each_kernel_takes() -> None:
    b, seq, h, p, g, n, q = 2, 64, 8, 16, 2, 32, 16
    X, BC, H, row = 2 * b * seq * h * p, 2 * b * seq * g * n, 2 * b * (seq // q) * h * p * n, 4 * b * seq * h
    kernels_fwd = {"cumsum": 3 * row, "states": X + BC + 2 * row + H, "outputs": 2 * X + 2 * BC + H + 2 * row}
    kernels_bwd = {
        "states": X + BC + 2 * row + H,
        "states in reverse": X + BC + row + 2 * H,
        "sources": 3 * X + 3 * BC + H + 5 * row,
        "outputs": 2 * X + 3 * BC + H + 3 * row,
        "decay": 6 * row,
    }
    shape = Shape(b, seq, h, p, g, n, q)
    assert shape.bytes_fwd() == sum(kernels_fwd.values())
    assert shape.bytes_bwd() == sum(kernels_bwd.values())


def test_the_limit_changes_where_flops_and_bytes_take_equally_long() -> None:
    card, shape = Card(bytes_per_s=1e12, flops_per_s=1e14), Shape(b=1, seq=2**16, h=8, p=64, g=1, n=128, q=16)
    for phase in ("fwd", "bwd"):
        q = compute_bound_from(shape, card, phase)
        sides = []
        for size in (q - 16, q):
            at = Shape(b=1, seq=2**16, h=8, p=64, g=1, n=128, q=size)
            sides.append(getattr(at, f"flops_{phase}")() / 1e14 >= getattr(at, f"bytes_{phase}")() / 1e12)
        assert sides == [False, True]
    assert f"{shape.bytes_fwd() / 1e9:.3f}" in model_table([shape], card).splitlines()[2].split()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to time")
def test_bench_prints_its_model_and_needs_a_gpu_for_times() -> None:
    script = [sys.executable, str(ROOT / "kernels" / "ssd_scan" / "bench.py")]
    timing = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (timing.returncode, timing.stdout, len(timing.stderr.splitlines())) == (2, "", 1)
    assert "no CUDA device" in timing.stderr
    model = subprocess.run([*script, "--model", "--chunk", "128"], capture_output=True, text=True, check=True)
    assert "memory" in model.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("d_head", "d_state", "dtype"), [(64, 128, "bf16"), (128, 256, "fp32"), (256, 256, "bf16")])
def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory(
    d_head: int, d_state: int, dtype: str, tmp_path: Path
) -> None:
    """Triton compiles without a GPU, and this finds errors that the interpreter accepts."""
    code = COMPILE.format(d_head=d_head, d_state=d_state, dtype=dtype)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.splitlines()]
    assert len(shared) == 7
    assert max(shared) <= 227 * 1024


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from explore.kernels.ssd_scan import _sizes, backward, forward

ROUNDED = {{"X", "B", "C", "V", "M", "H", "G", "dY", "Y", "dX", "walked", "before"}}
dtype = {{"bf16": torch.bfloat16, "fp32": torch.float32}}["{dtype}"]
X, B = (torch.empty(1, 512, 2, width, dtype=dtype, device="meta") for width in ({d_head}, {d_state}))
sizes = _sizes(X, B, 256)
tiles = sizes.tiles | {{"PRECISION": "tf32"}}
state_tiles = sizes.state_tiles | {{"PRECISION": "tf32", "HAS_START": True}}
for kernel, constants in (
    (forward.cumsum_kernel, sizes.decay_tiles),
    (forward.states_kernel, state_tiles | {{"REVERSE": False}}),
    (forward.states_kernel, state_tiles | {{"REVERSE": True}}),
    (forward.outputs_kernel, tiles),
    (backward.sources_kernel, tiles),
    (backward.outputs_backward_kernel, tiles),
    (backward.decay_backward_kernel, sizes.decay_tiles),
):
    signature, known, options = {{}}, {{}}, {{}}
    for name, value in constants.items():
        (known if name in kernel.arg_names else options)[name] = value
    for name in kernel.arg_names:
        pointer = "*{dtype}" if name.removesuffix("_ptr") in ROUNDED else "*fp32"
        signature[name] = "constexpr" if name in known else pointer if name.endswith("_ptr") else "i32"
    attributes = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in known}}
    source = ASTSource(kernel, signature, known, attributes)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared)
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
@pytest.mark.parametrize(("p", "n", "g"), [(64, 128, 1), (64, 128, 8), (128, 64, 4), (64, 256, 2)])
def test_real_sizes_on_a_gpu(p: int, n: int, g: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = made(2, 1000, 16, p, g, n, dtype=dtype)
    assert_close(outputs_and_gradients(ssd_scan, tensors, 256), truth_of(tensors), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm")
def test_mamba_ssm_gives_the_same_on_a_gpu() -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    X, dt, A, B, C, D, state, *_ = made(2, 1000, 16, 64, 2, 128, dtype=torch.bfloat16)
    theirs = mamba_chunk_scan_combined(X, dt, A, B, C, 256, D=D, initial_states=state, return_final_states=True)
    for ours, other in zip(ssd_scan(X, dt, A, B, C, D, 256, state), theirs, strict=True):
        assert float((ours.float() - other.float()).norm() / other.float().norm()) < BF16_TOLERANCE
