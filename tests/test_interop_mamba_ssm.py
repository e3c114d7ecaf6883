"""The adapter to mamba-ssm's kernels, with the released signature and a stand-in that computes the result."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explore.ops import forced_paths, ssd, ssd_recurrent
from explore.ops.mamba_ssm import ssd_mamba_ssm

MODULE = "mamba_ssm.ops.triton.ssd_combined"
RELEASED = "2.3.2.post1"
SIGNATURE = (  # of mamba_chunk_scan_combined in that version
    "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, "
    "dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, return_varlen_states=False)"
)


def mamba_chunk_scan_combined(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    dt_softplus: Any = False,
    dt_limit: Any = (0.0, float("inf")),
    return_final_states: Any = False,
    return_varlen_states: Any = False,
) -> Any:
    """Computes the released function and asserts its shapes."""
    batch, seqlen, nheads, headdim = x.shape
    _, _, ngroups, dstate = B.shape
    assert nheads % ngroups == 0
    assert B.shape == C.shape == (batch, seqlen, ngroups, dstate)
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert D is None or D.shape in ((nheads,), (nheads, headdim))
    assert initial_states is None or initial_states.shape == (batch, nheads, headdim, dstate)
    assert (z, seq_idx, cu_seqlens, return_varlen_states) == (None, None, None, False)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    out, final = ssd_recurrent(x, dt.clamp(*dt_limit), A, B, C, torch.zeros_like(A) if D is None else D, initial_states)
    return (out, final) if return_final_states else out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = MODULE.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    monkeypatch.setattr(sys.modules[MODULE], "mamba_chunk_scan_combined", mamba_chunk_scan_combined, raising=False)


def inputs(seq: int, with_state: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    b, h, p, g, n = 2, 4, 3, 2, 5
    shapes = ((b, seq, h, p), (b, seq, h), (h,), (b, seq, g, n), (b, seq, g, n), (h,), (b, h, p, n))
    X, dt, A, B, C, D, H = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return (X, F.softplus(dt), -A.exp(), B, C, D, *((H,) if with_state else ()))


def test_the_stand_in_has_the_released_signature() -> None:
    parameters = inspect.signature(mamba_chunk_scan_combined).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(bare)) == SIGNATURE, RELEASED


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("seq", [1, 9, 64])
def test_the_adapter_calls_the_kernel_with_our_recurrence(seq: int, with_state: bool) -> None:
    X, dt, A, B, C, D, *state = inputs(seq, with_state)
    before = [part.clone() for part in state]
    found = ssd_mamba_ssm(X, dt, A, B, C, D, 16, *state)
    torch.testing.assert_close(found, ssd_recurrent(X, dt, A, B, C, D, *state))
    assert all(torch.equal(part, kept) for part, kept in zip(state, before, strict=True))


def test_without_the_package_the_path_is_refused_by_name() -> None:
    X, dt, A, B, C, D = inputs(9, with_state=False)
    with pytest.raises(ValueError, match="ssd: the path 'mamba_ssm' needs the package mamba-ssm"):
        ssd_mamba_ssm(X, dt, A, B, C, D, 16)


@pytest.mark.usefixtures("stand_in")
def test_on_a_cpu_the_path_is_refused_and_never_the_default() -> None:
    X, dt, A, B, C, D = inputs(9, with_state=False)
    torch.testing.assert_close(ssd(X, dt, A, B, C, D, 16), ssd_recurrent(X, dt, A, B, C, D))
    with forced_paths(ssd="mamba_ssm"), pytest.raises(ValueError, match="runs on CUDA only, not on cpu"):
        ssd(X, dt, A, B, C, D, 16)


@pytest.mark.gpu
def test_the_kernels_compute_the_recurrence() -> None:
    pytest.importorskip("mamba_ssm")
    X, dt, A, B, C, D = (x.float().cuda() for x in inputs(200, with_state=False))
    with forced_paths(ssd="mamba_ssm"):
        found = ssd(X, dt, A, B, C, D, 64)
    torch.testing.assert_close(found, ssd_recurrent(X, dt, A, B, C, D), rtol=1e-2, atol=1e-2)
