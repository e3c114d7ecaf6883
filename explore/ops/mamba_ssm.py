"""The Mamba-2 recurrence with the kernels of the package mamba-ssm (state-spaces), if it is installed.

Letters as in `explore.ops.ssd`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def ssd_mamba_ssm(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    chunk_size: int,
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The chunked algorithm in Triton. `dt` is the final step size, so the kernel adds no bias and does not clamp it.

    Raises:
        ValueError: the package is not installed.

    Source: mamba-ssm 2.3.2.post1, mamba_ssm/ops/triton/ssd_combined.py.
    """
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        raise ValueError("ssd: the path 'mamba_ssm' needs the package mamba-ssm, which cannot be imported") from None
    Y, after = mamba_chunk_scan_combined(
        X, dt, A, B, C, chunk_size, D=D, initial_states=state, dt_softplus=False, return_final_states=True
    )
    return Y, after
