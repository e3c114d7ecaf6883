"""Compiled, exported and recomputed models compared with the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.model import LanguageModel, ModelConfig, generate
from explore.ops import compiled_step, experts, forced_paths, hadamard, paths_that, quantize, rounding_generator
from explore.ops.quantize import Blocks, quantize_blocks, quantize_compiled
from explore.ops.rounding import rounding_noise
from explore.precision import FORMATS

BLOCKS: dict[str, Any] = {
    "M": {"kind": "mamba2", "n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 8},
    "G": {"kind": "gated_deltanet", "n_heads": 4, "n_key_heads": 2, "d_k": 8, "d_v": 12, "chunk_size": 8},
    "*": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "rope_theta": 1e4},
    "-": {"kind": "mlp", "d_ff": 48},
    "E": {"kind": "moe", "n_experts": 8, "top_k": 2, "d_expert": 16, "d_shared": 16},
    "L": {"kind": "moe", "n_experts": 8, "top_k": 3, "d_expert": 16, "d_shared": 16, "d_latent": 16},
    "N": {"kind": "mla", "n_heads": 4, "kv_rank": 16, "d_nope": 8, "d_rope": 4, "d_v": 8},
    "W": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "window": 24, "rope_theta": 1e4},
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the shape checks, which only tests have and which cannot be compiled."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def model(pattern: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    blocks = {letter: BLOCKS[letter] for letter in dict.fromkeys(pattern)}
    record = {"d_model": 32, "vocab_size": 64, "pattern": pattern, "blocks": blocks, **changes}
    return ModelConfig.model_validate(record).build()


def tokens(seq: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(64, (2, seq), generator=torch.Generator().manual_seed(seed))


def logits_and_gradients(lm: LanguageModel, call: Any) -> list[Tensor]:
    ids = tokens()
    logits = call(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return [logits, *torch.autograd.grad(loss, [*lm.parameters()])]


# Experts in one batch


@pytest.mark.parametrize("activation", ["relu2", "swiglu", "swiglu_clamped"])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 63])
@pytest.mark.parametrize("path", ["dense", "padded"])
def test_dense_and_padded_experts_equal_the_loop_with_all_gradients(
    activation: Any, with_biases: bool, n_tokens: int, path: str
) -> None:
    n, k, d, f = 7, 3, 6, 5  # at one token, experts without any
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weights, up, down = leaf(n_tokens, d), leaf(n_tokens, k), leaf(n, d, f), leaf(n, f, d)
    gate = None if activation == "relu2" else leaf(n, d, f)
    biases = (leaf(n, f), None if gate is None else leaf(n, f), leaf(n, d)) if with_biases else None
    chosen = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(n_tokens)])
    leaves = [leaf for leaf in (x, weights, up, gate, down, *(biases or ())) if leaf is not None]
    found = []
    for each in ("loop", path):
        with forced_paths(experts=each):
            y = experts(x, chosen, weights, up, gate, down, activation, biases)
        slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append((y, *torch.autograd.grad((y * slope).sum(), leaves)))
    for loop, other in zip(*found, strict=True):
        torch.testing.assert_close(other, loop, rtol=1e-10, atol=1e-10)


# Compilation and export


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["M*-", "M*-EL", "G-"])
def test_a_compiled_model_is_one_graph_with_the_same_logits_and_gradients(unchecked: None, pattern: str) -> None:
    lm = model(pattern)
    with forced_paths(experts="dense"):
        plain = logits_and_gradients(lm, lm)
        compiled = logits_and_gradients(lm, torch.compile(lm, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_only_the_loads_of_the_experts_break_the_graph(unchecked: None) -> None:
    lm = model("M*-E")
    plain = logits_and_gradients(lm, lm)
    compiled = logits_and_gradients(lm, torch.compile(lm, backend="aot_eager"))
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert reasons
    assert all("bincount" in reason or "_local_scalar_dense" in reason for reason in reasons)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")
def test_inductor_gives_the_same_logits_and_gradients(unchecked: None) -> None:
    lm = model("*L")
    plain = logits_and_gradients(lm, lm)
    with forced_paths(experts="dense"):
        compiled = logits_and_gradients(lm, torch.compile(lm, fullgraph=True))
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")
def test_compiled_ops_give_the_same_logits_and_gradients(unchecked: None) -> None:
    lm = model("MG*-")
    plain = logits_and_gradients(lm, lm)
    with forced_paths(**paths_that(lambda path: path.compiled)):
        found = logits_and_gradients(lm, lm)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["M*-", "EL", "M*-EL", "G-"])
def test_an_exported_forward_gives_the_same_logits(pattern: str) -> None:
    lm = model(pattern).eval()
    with forced_paths(experts="dense"):
        exported = torch.export.export(lm, (tokens(),)).module()
    for seed in range(3):  # other tokens go to other experts
        torch.testing.assert_close(exported(tokens(seed=seed)), lm(tokens(seed=seed)), rtol=1e-5, atol=1e-6)


# Recomputation


def losses_and_gradients(lm: LanguageModel) -> tuple[list[Tensor], int]:
    """Losses, loads and gradients, and the number of elements saved for the backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    ids = tokens(41)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lm.loss(ids[:, :-1], ids[:, 1:], mtp=True)
    waiting = kept
    deeper = [] if loss.mtp is None else [loss.mtp.mean()]
    total = sum(deeper, start=loss.cross_entropy + loss.aux_loss)
    gradients = torch.autograd.grad(total, [*lm.parameters()])
    loads = [stats.load for stats in loss.stats.values()]
    return [loss.cross_entropy, loss.aux_loss, *deeper, *loads, *gradients], waiting


@pytest.mark.parametrize("pattern", ["M*-", "M*-EL", "G*-", "*E/*E/*E"])
def test_recomputation_keeps_less_and_changes_nothing(pattern: str) -> None:
    lm = model(pattern) if "/" not in pattern else mtp_model(pattern)
    plain, kept = losses_and_gradients(lm)
    lm.recompute = True
    again, kept_less = losses_and_gradients(lm)
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert kept_less < kept / 2


def test_recomputation_uses_the_paths_forced_in_the_forward_pass() -> None:
    lm, ids = model("M*-"), tokens(41)
    lm.recompute = True
    with forced_paths(ssd="recurrent", attention="written_out"):
        loss = lm.loss(ids[:, :-1], ids[:, 1:]).cross_entropy
    gradients = torch.autograd.grad(loss, [*lm.parameters()])  # of other tensors, if other paths ran again
    lm.recompute = False
    plain = torch.autograd.grad(lm.loss(ids[:, :-1], ids[:, 1:]).cross_entropy, [*lm.parameters()])
    for ours, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def mtp_model(pattern: str) -> LanguageModel:
    torch.manual_seed(0)
    blocks = {letter: BLOCKS[letter] for letter in "*E"}
    record = {"d_model": 32, "vocab_size": 64, "pattern": pattern, "blocks": blocks}
    return ModelConfig.model_validate(record).build()


def test_recomputation_leaves_decoding_alone() -> None:
    lm = model("M*E")
    ids = tokens(9)
    lm.recompute = True
    state = lm.new_state()
    pieces = torch.cat([lm(ids[:, :5], state), lm(ids[:, 5:], state)], dim=1)
    torch.testing.assert_close(pieces, lm(ids), rtol=1e-4, atol=1e-5)


# Quantisers


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["fp16", "fp8-blocks", "mxfp8", "nvfp4"])
def test_a_compiled_quantiser_gives_the_same_bits(unchecked: None, name: str) -> None:
    """A compiler may remove a cast and its inverse, or replace a division by a product with the reciprocal."""
    x = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(quantize_blocks, dynamic=False)
    noise = rounding_noise(x, rounding_generator(0, 0, 0, "x"))
    for drawn, axis, scale_rounding in ((None, 0, "nearest"), (noise, 1, "up")):
        arguments = (x, drawn, Blocks(FORMATS[name], axis, scale_rounding=scale_rounding))
        assert torch.equal(compiled(*arguments), quantize_blocks(*arguments)), scale_rounding


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_quantiser_gives_the_same_bits_for_any_number_of_rows(unchecked: None) -> None:
    for n_rows in (48, 96, 32):
        x = torch.randn(n_rows, 40, generator=torch.Generator().manual_seed(n_rows))
        amax = x.abs().amax(1, keepdim=True).unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, 0)
        noise = rounding_noise(x, rounding_generator(0, 0, 0, "x"))
        how = Blocks(FORMATS["nvfp4"], 0, scale_rounding="up")
        assert torch.equal(quantize_compiled(x, noise, how, amax), quantize_blocks(x, noise, how, amax))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_rotation_gives_the_same_bits(unchecked: None) -> None:
    x = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    rotated = torch.compile(lambda x: quantize_blocks(hadamard(x, 0), None, Blocks(FORMATS["nvfp4"], 0)))
    assert torch.equal(rotated(x), quantize(hadamard(x, 0), "nvfp4", block_axis=0))


# A compiled step of decoding


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "batch"), [("ME*", 2), ("L*", 2), ("E*", 6), ("G*", 2)])
def test_a_step_compiled_once_gives_the_same_tokens_also_after_the_weights_have_changed(
    unchecked: None, pattern: str, batch: int
) -> None:
    lm, prompts = model(pattern, init_std=0.3).eval(), torch.randint(64, (batch, 20))
    before = generate(lm, prompts, 20)
    assert torch.equal(generate(lm, prompts, 20, compiled=True), before)
    lm.init_weights()
    after = generate(lm, prompts, 20)
    assert not torch.equal(after, before)
    assert torch.equal(generate(lm, prompts, 20, compiled=True), after)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def traced(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are traced as for compilation and run uncompiled."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options: compile_(function, backend="eager"))
    compiled_step.cache_clear()
    with torch.compiler.config.patch(dynamic_sources=""):
        yield
    compiled_step.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "n_prompt", "n_graphs"),
    [
        ("M*E*", 20, 1),
        ("N-", 20, 1),
        ("G*-", 20, 1),
        ("W*", 25, 1),  # the window is full from the start
        ("W*", 2, 1),  # it never is
        ("W*", 20, 2),  # one graph until it is full, and one after
    ],
)
def test_a_step_is_compiled_once_however_long_the_context_gets(
    traced: None, pattern: str, n_prompt: int, n_graphs: int
) -> None:
    lm, prompts = model(pattern, init_std=0.3).eval(), tokens(n_prompt)
    assert torch.equal(generate(lm, prompts, 20, compiled=True), generate(lm, prompts, 20))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_texts_of_similar_length_share_one_compiled_step(traced: None) -> None:
    lm = model("M*E", init_std=0.3).eval()
    lengths = [(20, 20), (9, 30), (33, 31), (1, 12)]
    for n_prompt, n_new in lengths:  # at most 64 positions each
        prompts = tokens(n_prompt)
        assert torch.equal(generate(lm, prompts, n_new, compiled=True), generate(lm, prompts, n_new))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    generate(lm, tokens(40), 25, compiled=True)  # 65
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_compiled_step_is_refused_if_it_cannot_help() -> None:
    with pytest.raises(ValueError, match="compiled must be False on meta, got True"):
        generate(model("M").to("meta"), tokens().to("meta"), 2, compiled=True)
