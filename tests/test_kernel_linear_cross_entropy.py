"""The Triton kernel of the loss compared with its reference in float64, on CUDA or in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from explore.kernels.linear_cross_entropy import bench, linear_cross_entropy, passes
from explore.kernels.linear_cross_entropy.cost import Work, fused, materialised, tiled
from explore.kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32_RTOL = 1e-5
BF16_RTOL = 1e-2
"""Of a whole gradient, by norm: dZ is rounded to bf16 once (2^-9, or 2^-8 in the interpreter, which cuts off)."""

SMALL = passes.Tiles(rows=32, columns=64, inner=32, warps=4, stages=2)


def draw(
    tokens: int, vocab_size: int, d_model: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights and targets. Every third target is ignored; one is the last entry of the vocabulary."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, d_model, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, d_model, device=DEVICE) / d_model**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device=DEVICE)
    targets[1::3] = -100
    targets[0] = vocab_size - 1
    return hidden, weight, targets


def loss_and_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float) -> list[Tensor]:
    loss = function(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))]


def errors(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float = 1.0, rtol: float = FP32_RTOL
) -> dict[str, float]:
    """The loss and the gradients whose relative error exceeds `rtol`, with their errors."""
    truth = loss_and_gradients(
        reference, *(x.detach().double().requires_grad_() for x in (hidden, weight)), targets, upstream
    )
    found = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, upstream)
    assert [x.dtype for x in found] == [torch.float32, hidden.dtype, weight.dtype]
    assert [x.shape for x in found] == [x.shape for x in truth]
    sizes = {
        name: float((x.double() - y).norm() / y.norm())
        for name, x, y in zip(("loss", "hidden", "weight"), found, truth, strict=True)
    }
    return {name: size for name, size in sizes.items() if not size <= rtol}


@pytest.fixture(params=["real sizes", "small tiles and slices"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tiles and slices, or small ones, with which these shapes need several programs and launches."""
    if request.param != "real sizes":
        cut(monkeypatch, 48, 112)


def cut(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, chunk_vocab: int) -> None:
    monkeypatch.setattr(passes, "tiles_for", lambda *_: SMALL)
    monkeypatch.setattr(passes, "BAND", 2)
    monkeypatch.setattr(passes, "CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(passes, "CHUNK_VOCAB", chunk_vocab)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Records allocations and fills them with NaN, so that unwritten elements are detected."""
    made: list[Tensor] = []

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        new = empty(*args, **kwargs)
        if new.is_floating_point():
            made.append(new.fill_(torch.nan))
        return new

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", filled)
    return made


@pytest.mark.parametrize("tokens", [1, 63, 65])
@pytest.mark.parametrize(("vocab_size", "d_model"), [(17, 24), (257, 65)])
def test_loss_and_gradients_are_those_of_the_reference(
    tokens: int, vocab_size: int, d_model: int, tiling: None
) -> None:
    assert errors(*draw(tokens, vocab_size, d_model), upstream=-0.3) == {}


def test_a_vocabulary_of_several_real_tiles_is_the_reference() -> None:
    assert errors(*draw(65, 1000, 65)) == {}


def test_bf16_inputs_are_summed_in_fp32(tiling: None) -> None:
    assert errors(*draw(65, 257, 40, torch.bfloat16), upstream=3.0, rtol=BF16_RTOL) == {}
    hidden, weight, targets = draw(65, 257, 40, torch.bfloat16)
    truth = reference(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets).double(), truth, rtol=FP32_RTOL, atol=0)


def test_large_logits_neither_overflow_nor_vanish(tiling: None) -> None:
    hidden, weight, targets = draw(65, 257, 24)
    whole = [(100 * x.detach()).round().requires_grad_() for x in (hidden, weight)]  # logits are exact in fp32
    assert float((whole[0] @ whole[1].T).detach().abs().max()) > 1e4
    assert errors(*whole, targets) == {}


def test_ignored_targets_alone_give_zero_loss(tiling: None) -> None:
    hidden, weight, targets = draw(33, 257, 24)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100), 1.0)
    assert float(loss) == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_no_tokens_cost_nothing() -> None:
    hidden, weight, targets = draw(1, 17, 24)
    hidden = hidden[:0].detach().requires_grad_()
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, targets[:0], 1.0)
    assert float(loss) == 0
    assert [gradient.shape for gradient in gradients] == [(0, 24), (17, 24)]
    assert (gradients[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_unwritten_memory_is_read_or_returned(dtype: torch.dtype, tiling: None, taken: list[Tensor]) -> None:
    hidden, weight, targets = draw(65, 257, 24, dtype)
    found = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 1.0)
    assert taken
    assert all(x.isfinite().all() for x in found)


@pytest.mark.slow
def test_the_result_is_the_same_to_the_bit_every_time(tiling: None) -> None:
    first, second = (loss_and_gradients(linear_cross_entropy, *draw(65, 257, 24), 1.0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_no_memory_of_the_size_of_the_logits_is_taken(monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]) -> None:
    cut(monkeypatch, 32, 64)
    hidden, weight, targets = draw(64, 320, 8)
    loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 1.0)
    assert max(x.numel() for x in taken if x.shape != weight.shape) == 32 * 64


def test_an_unneeded_gradient_is_not_computed(taken: list[Tensor]) -> None:
    hidden, weight, targets = draw(5, 17, 24)
    for wanted, frozen in ((hidden, weight), (weight, hidden)):
        args = [x.detach() if x is frozen else x for x in (hidden, weight)]
        taken.clear()
        (gradient,) = torch.autograd.grad(linear_cross_entropy(*args, targets), wanted)
        assert torch.equal(gradient, torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), wanted)[0])
        assert sum(x.shape == frozen.shape for x in taken) == 1  # that of the second call, which needs both


def test_inputs_may_be_views_with_any_strides() -> None:
    hidden, weight, targets = draw(9, 17, 24)
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    assert not strided[0].is_contiguous()
    assert errors(*strided, targets) == {}


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, targets = draw(9, 17, 24)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 1.0)
    truth = loss_and_gradients(
        lambda h, w, y: linear_cross_entropy(h.bfloat16(), w.bfloat16(), y), hidden, weight, targets, 1.0
    )
    for a, b in zip((loss, *gradients), truth, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", [-1, 17, 31, 300])
def test_a_target_outside_the_vocabulary_gives_nan(target: int) -> None:
    hidden, weight, targets = draw(9, 17, 24)
    targets[4] = target
    assert linear_cross_entropy(hidden, weight, targets).isnan()


def test_inputs_without_a_kernel_are_refused() -> None:
    hidden, weight, targets = draw(9, 17, 24)
    with pytest.raises(ValueError, match=r"hidden and weight must both be .*, got torch.bfloat16 and torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match=r"got torch.float64 and torch.float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets)
    with pytest.raises(ValueError, match=r"weight must have at least one entry .*, got shape \(0, 24\)"):
        linear_cross_entropy(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match=r"must be on one CUDA device.*, got .*, meta and "):
        linear_cross_entropy(hidden, weight.to("meta"), targets)


@pytest.mark.parametrize("shape", [(65, 257, 24), (64, 64, 8), (32, 100, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_counts_the_allocated_memory(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]
) -> None:
    cut(monkeypatch, 32, 64)
    hidden, weight, targets = draw(*shape, dtype)
    work = tiled(*shape, dtype.itemsize, SMALL.columns, 32, 64)
    taken.clear()
    loss = linear_cross_entropy(hidden, weight, targets)
    tokens = shape[0]
    per_token = 2 * 4 * tokens  # lse and loss
    assert sum(x.nbytes for x in taken) - per_token == work.extra_bytes_fwd
    taken.clear()
    torch.autograd.grad(loss, (hidden, weight))
    gradients = hidden.nbytes + weight.nbytes
    assert sum(x.nbytes for x in taken) - gradients == work.extra_bytes_bwd


def test_the_model_counts_the_flops_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets = draw(9, 17, 24)
    with FlopCounterMode(display=False) as fwd:
        loss = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    with FlopCounterMode(display=False) as bwd:
        loss.backward()
    plain, kernel = materialised(9, 17, 24, 4), tiled(9, 17, 24, 4)
    assert (plain.flops_fwd, plain.flops_bwd) == (fwd.get_total_flops(), bwd.get_total_flops())
    assert (kernel.flops_fwd, kernel.flops_bwd) == (
        fwd.get_total_flops(),
        fwd.get_total_flops() + bwd.get_total_flops(),
    )
    assert fused(9, 17, 24, 4).flops_bwd == plain.flops_bwd


def test_the_bound_is_the_slower_of_arithmetic_and_memory_in_each_pass() -> None:
    work = Work(flops_fwd=989e12, bytes_fwd=1, flops_bwd=1, bytes_bwd=2 * 3.35e12, extra_bytes_fwd=0, extra_bytes_bwd=0)
    assert (work.bound_fwd_s, work.bound_s) == (1, 3)


def test_the_bench_prints_its_model_and_ends_with_an_error_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.main(["--model", "--tokens", "100", "--vocab-size", "10", "--d-model", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"{2 * 100 * 10 * 5:.3e}" in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


COMPILE = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from explore.kernels.linear_cross_entropy import passes, tiles

FP32 = dict.fromkeys("partial_lse target_logit lse losses upstream before".split(), "*fp32")

def compiled(kernel, dtype, shape, ones, **constants):
    pointers = {"targets": "*i64", **FP32, **dict.fromkeys("H W dZ A B out".split(), f"*{dtype}")}
    constants |= dict.fromkeys(ones, 1)  # Triton makes a constant of an argument that is 1
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name], aligned[(i,)] = pointers.get(name, "i32"), [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

found = []
for dtype, torch_dtype, precision in (
    ("bf16", torch.bfloat16, "ieee"), ("fp32", torch.float32, "tf32"), ("fp32", torch.float32, "ieee")
):
    shape = passes.tiles_for(torch_dtype, precision, passes.H100_SHARED_BYTES)
    how = dict(ROWS=shape.rows, COLUMNS=shape.columns, INNER=shape.inner, BAND=passes.BAND)
    how |= dict(PRECISION=precision, WIDEN=False)
    for kernel, ones, more in (
        (tiles.partial_lse_kernel, "", {}),
        (tiles.partial_lse_kernel, "tokens vocab_size d_model", {}),
        (tiles.logit_gradient_kernel, "", {}),
        (tiles.logit_gradient_kernel, "tokens vocab_size d_model", {}),
        (tiles.product_kernel, "a_row", {"ADD": True}),
        (tiles.product_kernel, "a_inner", {"ADD": False}),
        (tiles.product_kernel, "a_inner n_rows n_columns n_inner a_rows", {"ADD": True}),
    ):
        made = compiled(kernel, dtype, shape, ones.split(), **how, **more)
        ptx = made.asm["ptx"]
        found.append([kernel.fn.__name__, dtype, precision, ones, made.metadata.shared, "wgmma.mma_async" in ptx])
for ones in ((), ("tokens", "n_tiles")):
    compiled(tiles.combine_kernel, "fp32", shape, ones, ROWS=32, TILES=64)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory(tmp_path: Path) -> None:
    """The compiler needs no GPU and finds errors that the interpreter accepts."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3 * 7
    for kernel, dtype, precision, ones, shared, on_tensor_cores in found:
        assert shared <= passes.H100_SHARED_BYTES, (kernel, dtype, precision, ones)
        assert on_tensor_cores == (dtype == "bf16" or precision == "tf32"), (kernel, dtype, precision, ones)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocab_size", "d_model"), [(8192, 50_257, 768), (9001, 32_000, 2048)])
def test_real_sizes_on_a_gpu_are_the_reference(
    tokens: int, vocab_size: int, d_model: int, dtype: torch.dtype, taken: list[Tensor]
) -> None:
    rtol = FP32_RTOL if dtype == torch.float32 else BF16_RTOL
    assert errors(*draw(tokens, vocab_size, d_model, dtype), upstream=1 / tokens, rtol=rtol) == {}
