"""The Triton kernels of routed experts compared with float64, in Triton's interpreter if there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from explore.kernels.routed_experts import bench, cost, forward, routed_experts
from explore.kernels.routed_experts.reference import reference
from explore.kernels.routed_experts.routing import max_tiles, route
from explore.ops import experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = ("relu2", "swiglu", "swiglu_clamped")
FP32, BF16 = 1e-5, 2e-2
"""Largest error over the largest entry: products of fp32, and of values that were rounded to bf16 on the way."""


@pytest.fixture(autouse=True)
def _nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes torch fill `empty` tensors with NaN, so that elements that no kernel wrote are detected."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or the reference would be refused on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Records the launched kernels: their names, and the bytes of their bf16 tensors."""
    launches, kernel = [], type(forward._inner)
    run = kernel.run

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        tensors = {each.data_ptr(): each for each in arguments if isinstance(each, Tensor)}
        nbytes = sum(each.nbytes for each in tensors.values() if each.dtype == torch.bfloat16)
        launches.append((self.fn.__name__, nbytes))
        return run(self, *arguments, **options)

    monkeypatch.setattr(kernel, "run", recording)
    return launches


Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def inputs(
    t: int, k: int, e: int, d: int, f: int, activation: str, dtype: torch.dtype = torch.float32, deviation: float = 4
) -> Leaves:
    """Random leaves; the last expert gets no token.

    Args:
        deviation: of what the activation reads; at 4 the clamp at 7 clamps.
    """
    torch.manual_seed(0)
    x, weights = torch.randn(t, d), torch.rand(t, k)
    up, gate = deviation * torch.randn(2, e, d, f) / d**0.5
    down = torch.randn(e, f, d) / f**0.5
    chosen = torch.rand(t, max(e - 1, 1)).argsort(1)[:, :k].to(DEVICE)
    x, weights, up, gate, down = (v.to(DEVICE, dtype).requires_grad_() for v in (x, weights, up, gate, down))
    return x, chosen, weights, up, None if activation == "relu2" else gate, down


def results(function: object, leaves: Leaves, activation: str) -> list[Tensor]:
    """The output, and the gradient of each leaf for one fixed gradient of the output."""
    y = function(*leaves, activation)  # type: ignore[operator]
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def double(leaves: Leaves) -> Leaves:
    return tuple(
        leaf.detach().double().requires_grad_(leaf.requires_grad)
        if leaf is not None and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    )  # type: ignore[return-value]


def assert_near(found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < tolerance, f"result {i}: {float(error):.1e}"  # a NaN fails too


SHAPES = {  # t k e d f
    "one token": (1, 1, 1, 16, 16),
    "one token, three choices": (1, 3, 5, 5, 3),
    "more experts than choices": (7, 2, 20, 12, 20),
    "one row short of a tile": (63, 1, 2, 37, 150),
    "one row above a tile": (65, 1, 2, 150, 37),
    "several tiles an expert": (65, 3, 4, 33, 47),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient_are_those_of_the_reference(shape: tuple[int, ...], activation: str) -> None:
    leaves = inputs(*shape, activation)
    truth = results(reference, double(leaves), activation)
    assert_near(results(routed_experts, leaves, activation), truth, FP32)


@pytest.mark.parametrize("load", ["all on one expert", "all on the last expert", "the same expert twice"])
def test_no_token_is_dropped_at_any_load(load: str) -> None:
    x, chosen, weights, up, gate, down = inputs(63, 2, 6, 18, 22, "swiglu")
    chosen = {
        "all on one expert": torch.full_like(chosen, 2),
        "all on the last expert": torch.full_like(chosen, 5),
        "the same expert twice": chosen[:, :1].expand(-1, 2),
    }[load]
    leaves = (x, chosen, weights, up, gate, down)
    assert_near(results(routed_experts, leaves, "swiglu"), results(reference, double(leaves), "swiglu"), FP32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_inputs_are_summed_in_fp32_by_the_experts(activation: str) -> None:
    # At a clamp a gradient jumps, and values that round to its other side would decide: they stay below it.
    leaves = inputs(65, 2, 3, 150, 70, activation, torch.bfloat16, deviation=1)
    found = results(routed_experts, leaves, activation)
    assert {each.dtype for each in found} == {torch.bfloat16}
    assert_near(found, results(reference, double(leaves), activation), BF16)


def test_weights_may_have_another_dtype() -> None:
    x, chosen, weights, *matrices = inputs(7, 2, 3, 18, 22, "relu2", torch.bfloat16)
    weights = weights.detach().float().requires_grad_()
    (_, _, found, *_) = results(routed_experts, (x, chosen, weights, *matrices), "relu2")
    assert found.dtype == torch.float32
    assert (found != found.bfloat16()).any()


def test_tensors_may_lie_in_memory_in_any_order() -> None:
    leaves = inputs(9, 2, 3, 18, 22, "swiglu")
    turned = tuple(
        leaf.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_(leaf.requires_grad)
        for leaf in leaves
        if leaf is not None
    )
    assert not any(leaf.is_contiguous() for leaf in turned)
    pairs = zip(*(results(routed_experts, each, "swiglu") for each in (leaves, turned)), strict=True)  # type: ignore[arg-type]
    for a, b in pairs:
        assert torch.equal(a, b)


def test_no_tokens_give_no_rows_and_gradients_of_zero() -> None:
    y, dx, dweights, *matrices = results(routed_experts, inputs(0, 2, 3, 18, 22, "swiglu"), "swiglu")
    assert y.shape == dx.shape == (0, 18)
    assert dweights.shape == (0, 2)
    assert not any(gradient.any() for gradient in matrices)


def test_an_expert_without_tokens_gets_gradients_of_zero() -> None:
    *_, dup, dgate, ddown = results(routed_experts, inputs(7, 2, 4, 18, 22, "swiglu"), "swiglu")
    for gradient in (dup, dgate, ddown):
        assert gradient[:-1].any()
        assert not gradient[-1].any()


def test_two_calls_give_the_same_bits() -> None:
    leaves = inputs(65, 3, 4, 33, 47, "swiglu", torch.bfloat16)
    first, second = (results(routed_experts, leaves, "swiglu") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_unwritten_memory_is_nan_in_these_tests() -> None:
    """Otherwise the tests of this file could not detect elements that a kernel does not write."""
    x = torch.zeros(3, device=DEVICE)
    assert x.new_empty(1000).isnan().all()
    assert torch.empty_like(x).isnan().all()


def test_only_the_gradients_that_are_wanted_are_computed(launched: list[tuple[str, int]]) -> None:
    for wanted, expected in enumerate([["_scatter"], [], *[["_rows_by_rows"]] * 3]):
        leaves = list(inputs(7, 2, 3, 18, 22, "swiglu"))
        tensors = [leaves[i].detach() for i in (0, 2, 3, 4, 5)]
        tensors[wanted].requires_grad_()
        x, weights, *matrices = tensors
        y = routed_experts(x, leaves[1], weights, *matrices, "swiglu")
        launched.clear()
        y.sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(5)]
        assert [name for name, _ in launched] == ["_inner_backward", *expected]


def test_the_operation_of_the_package_is_the_same() -> None:
    for activation in ACTIVATIONS:
        leaves = double(inputs(31, 2, 5, 9, 11, activation))
        for a, b in zip(results(experts, leaves, activation), results(reference, leaves, activation), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("n", "n_experts"), list(product((1, 16, 63, 300), (1, 5, 40))))
def test_tiles_hold_every_choice_once_and_one_expert_each(n: int, n_experts: int) -> None:
    torch.manual_seed(0)
    uniform = torch.randint(n_experts, (n, 1), device=DEVICE)
    spread = torch.arange(n, device=DEVICE)[:, None].clamp(max=n_experts - 1)  # one each, and the rest on the last
    for chosen in (uniform, spread, torch.full_like(uniform, n_experts - 1)):
        routing = route(chosen, n_experts, torch.bfloat16)
        assert routing.choice.sort().values.tolist() == list(range(n))
        held = []
        for expert, start in zip(routing.tile_expert.tolist(), routing.tile_row.tolist(), strict=True):
            if expert == n_experts:
                continue
            rows = range(start, min(start + routing.rows, int(routing.bounds[expert + 1])))
            assert len(rows) > 0
            assert {int(chosen.flatten()[routing.choice[row]]) for row in rows} == {expert}
            held += rows
        assert sorted(held) == list(range(n))


def test_the_host_never_waits_for_the_choices() -> None:
    """The meta device has no values, so reading one raises."""
    routing = route(torch.empty(300, 2, dtype=torch.int64, device="meta"), 5, torch.bfloat16)
    assert [len(tensor) for tensor in routing.tensors()] == [600, 600, 6, *[max_tiles(600, 5, 128)] * 2]


def test_the_maximum_number_of_tiles_is_reached() -> None:
    for n, n_experts, rows in product((1, 5, 16, 17, 100), (1, 3, 8), (4, 16)):
        used = min(n, n_experts)
        spare = n - used  # one choice each, and the rest in whole tiles on the first, which keeps the last row free
        loads = [1 + spare // rows * rows, *[1] * (used - 1)]
        if used > 1:
            loads[1] += spare % rows
        else:
            loads[0] += spare % rows
        assert sum(-(-load // rows) for load in loads) == max_tiles(n, n_experts, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of relu2, swiglu, swiglu_clamped, got 'gelu'"),
        ({"activation": "relu2"}, "gate must be None for the activation 'relu2', got a tensor"),
        ({"gate": None}, "gate must be given for 'swiglu', got None"),
        ({"x": torch.zeros(4, 6, dtype=torch.float64, device=DEVICE)}, "x must be float32 .*, got torch.float64"),
        ({"down": torch.zeros(3, 5, 6, dtype=torch.bfloat16, device=DEVICE)}, "down must be .*, got torch.bfloat16"),
        ({"up": torch.zeros(3, 6, 5, device="meta")}, "up must be on .*, the device of x, got meta"),
        ({"weights": torch.zeros(4, 1, device=DEVICE)}, r"weights must have shape \(4, 2\) .*, got \(4, 1\)"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, object], message: str) -> None:
    x, chosen, weights, up, gate, down = inputs(4, 2, 3, 6, 5, "swiglu")
    arguments = {"x": x, "chosen": chosen, "weights": weights, "up": up, "gate": gate, "down": down}
    unchecked = getattr(routed_experts, "__wrapped__", routed_experts)  # the tests' type checker would refuse first
    with pytest.raises(ValueError, match=message):
        unchecked(**{**arguments, "activation": "swiglu", **change})


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_flops_are_those_that_torch_counts(activation: str) -> None:
    leaves = inputs(31, 2, 5, 9, 11, activation)
    shape = cost.Shape(31, 2, 5, 9, 11, gated=activation != "relu2")
    with FlopCounterMode(display=False) as forward_counter:
        reference(*leaves, activation)
    with FlopCounterMode(display=False) as counter:
        results(reference, leaves, activation)
    forward, backward = cost.total(cost.forward(shape, keep=True)), cost.total(cost.backward(shape))
    assert forward_counter.get_total_flops() == forward.flops == cost.total(cost.forward_unfused(shape)).flops
    assert counter.get_total_flops() == forward.flops + backward.flops
    assert cost.total(cost.backward_unfused(shape)).flops == backward.flops


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("keep", [False, True])
def test_bytes_are_those_of_the_tensors_passed_to_kernels(
    keep: bool, activation: str, launched: list[tuple[str, int]]
) -> None:
    x, chosen, weights, *matrices = inputs(31, 2, 5, 9, 11, activation, torch.bfloat16)
    chosen[0] = 4  # so that every expert holds a token
    weights = weights.detach().float().requires_grad_()
    shape = cost.Shape(31, 2, 5, 9, 11, gated=activation != "relu2")
    passes = cost.forward(shape, keep)
    with torch.set_grad_enabled(keep):
        y = routed_experts(x, chosen, weights, *matrices, activation)
    if keep:
        y.sum().backward()
        passes += cost.backward(shape)
    assert sorted(nbytes for _, nbytes in launched) == sorted(each.bytes for each in passes if each.name != "combine")


@pytest.mark.parametrize("gated", [False, True])
def test_the_bench_compares_with_the_same_function(gated: bool) -> None:
    shape = cost.Shape(t=24, k=2, e=4, d=16, f=32, gated=gated)
    activation = "swiglu" if gated else "relu2"
    leaves = bench.in_dtype(bench.inputs(shape, torch.device(DEVICE), torch.bfloat16), torch.float64)
    truth = bench.results(partial(reference, activation=activation), leaves)
    padded = partial(bench.padded, activation=activation, capacity=24)
    for a, b in zip(bench.results(padded, leaves), truth, strict=True):
        torch.testing.assert_close(a, b)
    found = bench.results(partial(bench.grouped, activation=activation), bench.in_dtype(leaves, torch.bfloat16))
    assert_near(found, truth, BF16)


def test_the_bench_prints_its_model_and_needs_a_gpu_for_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--model", "--shape", "8", "2", "4", "16", "32"]) == 0
    printed = capsys.readouterr().out
    forward = cost.total(cost.forward(cost.Shape(8, 2, 4, 16, 32, gated=False), keep=False))
    (line,) = [line for line in printed.splitlines() if line.startswith("forward  ")]
    assert line.split()[1:3] == [f"{forward.flops / 1e9:.1f}", f"{forward.bytes / 1e6:.1f}"]
    if DEVICE == "cpu":
        assert bench.main([]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from explore.kernels.routed_experts import products, routed_experts

def run(kernel, *values, grid, warmup, **options):
    signature, constants, divisible = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        name = parameter.name
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert done.metadata.shared <= SHARED, (kernel.__name__, done.metadata.shared)
    print(kernel.__name__, "wgmma" in done.asm["ptx"])

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
SHARED = 227 * 1024
JITFunction.run = run
products._shared_memory = lambda device: SHARED
triton.knobs.runtime.interpret = True  # the kernels were made to be compiled; this lets tensors of the CPU in
t, e, d, f = 256, 2, 256, 128
leaf = lambda *shape: torch.zeros(shape, dtype=getattr(torch, "DTYPE"), requires_grad=True)
gate = None if "ACTIVATION" == "relu2" else leaf(e, d, f)
chosen = torch.zeros(t, 1, dtype=torch.int64)
routed_experts(leaf(t, d), chosen, leaf(t, 1), leaf(e, d, f), gate, leaf(e, f, d), "ACTIVATION").sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kernel_compiles_for_an_h100(
    activation: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Checks what the interpreter does not; it needs no GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = COMPILE.replace("DTYPE", dtype).replace("ACTIVATION", activation)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [
        "_inner",
        "_scatter",
        "_inner_backward",
        "_scatter",
        *["_rows_by_rows"] * (2 if activation == "relu2" else 3),
    ]
    assert done.stdout.split() == [word for kernel in kernels for word in (kernel, str(dtype == "bfloat16"))]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_sizes_on_a_gpu(activation: str) -> None:
    leaves = inputs(4096, 6, 65, 1000, 1408, activation, torch.bfloat16, deviation=1)
    found = results(routed_experts, leaves, activation)
    assert_near(found, results(reference, double(leaves), activation), BF16)
    for a, b in zip(found, results(routed_experts, leaves, activation), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_autocast_changes_nothing_on_a_gpu() -> None:
    leaves = inputs(256, 2, 8, 64, 48, "relu2", torch.bfloat16, deviation=1)
    alone = results(routed_experts, leaves, "relu2")
    with torch.autocast("cuda", torch.bfloat16):
        within = results(routed_experts, leaves, "relu2")
    for a, b in zip(alone, within, strict=True):
        assert torch.equal(a, b)
