"""The C++ attention compared with its definition in float64."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from explore.kernels.causal_attention import causal_attention, handles
from explore.ops import attention, forced_paths

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
"""Largest norm of a difference over the norm of the exact tensor, or of the outputs: a gradient can be zero."""
SHAPES = {
    "two blocks of keys": (1, 2, 1, 600, 600, 8, 8, None, False),
    "a window over two blocks of keys": (1, 2, 2, 700, 700, 8, 8, 90, True),
    "groups of three heads": (2, 6, 2, 130, 130, 16, 16, None, False),
    "one position": (2, 2, 2, 1, 1, 4, 4, None, True),
    "a window of one": (1, 2, 1, 70, 70, 4, 4, 1, False),
    "values wider than keys": (2, 2, 1, 65, 65, 6, 10, None, True),
    "keys before the first query": (2, 4, 1, 5, 133, 8, 6, None, True),
    "one query of a long context": (1, 1, 1, 1, 900, 8, 8, 700, False),
}


def made(shape: Sequence[int], with_sinks: bool, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v in the layout of a model, and sinks, with values that the dtype can represent."""
    b, h, g, queries, keys, d, e = shape
    torch.manual_seed(0)
    sizes = ((queries, h, d), (keys, g, d), (keys, g, e))
    q, k, v = (torch.randn(b, *size).to(dtype).transpose(1, 2) for size in sizes)
    return [q, k, v, *([torch.randn(h)] if with_sinks else [])]


def outputs_and_gradients(path: str, inputs: list[Tensor], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype if i < 3 else torch.promote_types(dtype, x.dtype)) for i, x in enumerate(inputs)]
    q, k, v, *sinks = [x.requires_grad_() for x in leaves]
    with forced_paths(attention=path):
        y = attention(q, k, v, window, sinks[0] if sinks else None)
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_the_definition(name: str, dtype: torch.dtype) -> None:
    *shape, window, with_sinks = SHAPES[name]
    inputs = made(shape, with_sinks, dtype)
    if not handles(*inputs[:3]):
        pytest.skip("this CPU has no bf16 instructions")
    exact = outputs_and_gradients("written_out", inputs, window, torch.float64)
    for found, truth in zip(outputs_and_gradients("compiled", inputs, window, dtype), exact, strict=True):
        assert (found.double() - truth).norm() <= TOLERANCES[dtype] * max(truth.norm(), exact[0].norm())


def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    q, k, v = made((1, 2, 1, 600, 600, 8, 8), False, torch.float32)
    with forced_paths(attention="written_out"):
        exact = attention(1e4 * q.double(), k.double(), v.double())
    torch.testing.assert_close(causal_attention(1e4 * q, k, v).double(), exact, rtol=1e-3, atol=1e-3)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs = made((2, 4, 2, 200, 200, 8, 8), False, torch.float32)
    n_threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(outputs_and_gradients("compiled", inputs, None, torch.float32))
    finally:
        torch.set_num_threads(n_threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_views_of_a_wider_tensor_are_read_in_place() -> None:
    """MLA splits keys and values of a head from one tensor."""
    torch.manual_seed(0)
    both = torch.randn(2, 70, 2, 20).transpose(1, 2)
    q, k, v = both[..., :8].clone(), both[..., :8], both[..., 8:]
    whole = causal_attention(q, k.contiguous(), v.contiguous())
    assert torch.equal(causal_attention(q, k, v), whole)


@pytest.mark.parametrize(
    "dtypes", [[torch.float64] * 3, [torch.float16] * 3, [torch.float32, torch.float32, torch.bfloat16]]
)
def test_other_dtypes_are_refused_by_the_kernel_and_computed_by_the_op(dtypes: list[torch.dtype]) -> None:
    q, k, v = (x.to(dtype) for x, dtype in zip(made((1, 2, 1, 9, 9, 4, 4), False, torch.float32), dtypes, strict=True))
    with pytest.raises(ValueError, match=r"^q, k and v must be on a CPU, all fp32 or .* got torch\.float"):
        causal_attention(q, k, v)
    with forced_paths(attention="compiled"):
        assert attention(q, k, v).dtype == v.dtype
