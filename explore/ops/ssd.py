"""Structured state-space duality: the Mamba-2 recurrence, step by step and in chunks.

Letters, as in the paper (arXiv 2405.21060): X input of a head, A decay rate of a head (negative),
B and C input and output maps shared by the heads of a group, D skip weight of a head, dt step size,
H state (d_head x d_state). Shapes: b batch, l seq, h n_heads, g n_groups, p d_head, n d_state,
c number of chunks, q positions of a chunk.

    H_t = exp(dt_t A) H_{t-1} + dt_t X_t B_t^T        Y_t = H_t C_t + D X_t
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.ops.mamba_ssm import ssd_mamba_ssm
from explore.ops.paths import OpPath, compiled, declare, path_of

declare(
    "ssd",
    OpPath("chunked", default_on="any", countable=True),
    OpPath("recurrent", reference=True, stepwise=True, decoding=True),
    OpPath("mamba_ssm", default_on="cuda", needs="mamba_ssm.ops.triton.ssd_combined"),
    OpPath("triton", default_on="cuda", needs="triton"),
    OpPath("compiled", compiled=True),
)


def ssd(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    chunk_size: int,
    state: Float[Tensor, "b h p n"] | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """Runs the recurrence by the path in use; one position that goes on from a state is one step of it.

    Args:
        chunk_size: positions that the chunked form handles by matrix products at once.
        state: state before the first position, zero when absent.
        in_place: the step may write the new state over the old one, and save the time of making a tensor.

    Returns:
        Outputs, and the state after the last position.
    """
    if path_of("ssd", X.device.type) == "recurrent":
        return ssd_recurrent(X, dt, A, B, C, D, state)
    if X.shape[1] == 1 and state is not None:
        return _ssd_step(X, dt, A, B, C, D, state, in_place)
    if path_of("ssd", X.device.type) == "mamba_ssm":
        if not X.is_cuda:
            raise ValueError(f"ssd: the path 'mamba_ssm' runs on CUDA only, not on {X.device.type}")
        return ssd_mamba_ssm(X, dt, A, B, C, D, chunk_size, state)
    if path_of("ssd", X.device.type) == "triton":
        from explore.kernels.ssd_scan import ssd_scan

        return ssd_scan(X, dt, A, B.to(X.dtype), C.to(X.dtype), D, chunk_size, state)
    return ssd_chunked(X, dt, A, B, C, D, chunk_size, state)


def ssd_recurrent(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The definition, one position after another: the truth that `ssd_chunked` is held against."""
    b, _, h, p = X.shape
    heads_per_group = h // B.shape[2]
    B, C = (M.repeat_interleave(heads_per_group, dim=2) for M in (B, C))
    H = X.new_zeros(b, h, p, B.shape[3]) if state is None else state
    outputs = []
    for X_t, dt_t, B_t, C_t in zip(*(M.unbind(1) for M in (X, dt, B, C)), strict=True):
        decay = torch.exp(dt_t * A)
        H = decay[..., None, None] * H + (dt_t[..., None] * X_t)[..., None] * B_t[:, :, None, :]
        outputs.append((H * C_t[:, :, None, :]).sum(-1) + D[:, None] * X_t)
    return torch.stack(outputs, dim=1), H


def ssd_chunked(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    chunk_size: int,
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The chunked algorithm: attention-like products within a chunk, a short recurrence between chunks.

    A length that is no multiple of `chunk_size` ends in one shorter chunk, so nothing is padded.

    Source: arXiv 2405.21060, section 6 and listing 1; here the recurrence between chunks is a loop,
    and B and C stay shared within a group instead of being repeated for every head.
    """
    chunks = compiled(_ssd_chunks) if path_of("ssd", X.device.type) == "compiled" else _ssd_chunks
    seq = X.shape[1]
    whole = seq - seq % chunk_size
    if whole == 0:
        return chunks(X, dt, A, B, C, D, seq, state)
    if whole == seq:
        return chunks(X, dt, A, B, C, D, chunk_size, state)
    head, state = chunks(X[:, :whole], dt[:, :whole], A, B[:, :whole], C[:, :whole], D, chunk_size, state)
    tail, state = chunks(X[:, whole:], dt[:, whole:], A, B[:, whole:], C[:, whole:], D, seq - whole, state)
    return torch.cat((head, tail), dim=1), state


def _ssd_step(
    X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, in_place: bool
) -> tuple[Tensor, Tensor]:
    b, _, h, p = X.shape
    g, n = B.shape[2:]
    decay = torch.exp(dt[:, 0] * A)[..., None, None]
    dtX = (dt[:, 0, :, None] * X[:, 0]).reshape(b * g, -1, 1)  # all heads of a group below one another
    H = state.mul_(decay) if in_place else state * decay  # in the layout of the state
    rows = H.view(b * g, -1, n).baddbmm_(dtX.to(H.dtype), B.reshape(b * g, 1, n).to(H.dtype))
    # On a CPU a row times a matrix is several times as fast as a matrix times a column.
    Y = torch.bmm(C.reshape(b * g, 1, n).to(H.dtype), rows.transpose(1, 2)).view(b, 1, h, p)
    return Y + D[:, None] * X, H


def _ssd_chunks(
    X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, q: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, seq, h, p = X.shape
    g, n = B.shape[2:]
    r, c = h // g, seq // q  # heads of a group, chunks
    Xc = X.reshape(b, c, q, g, r, p)
    dtc = dt.reshape(b, c, q, g, r)
    Bc, Cc = (M.reshape(b, c, q, g, n).transpose(2, 3) for M in (B, C))  # b c g q n
    dtX = Xc * dtc[..., None]

    # Within the chunk; its positions are innermost in cum, else every loop over its square would transpose it.
    cum = (dtc * A.view(g, r)).permute(0, 1, 3, 4, 2).contiguous().cumsum(dim=-1)  # b c g r q
    CB = (Cc @ Bc.transpose(-1, -2)).tril()  # b c g q q
    Y: Tensor = _Within.apply(CB, cum, dtX.permute(0, 1, 3, 4, 2, 5))  # type: ignore[no-untyped-call]
    Y = Y.permute(0, 1, 4, 2, 3, 5)

    # What each chunk adds to the state at its end.
    to_end = (cum[..., -1:] - cum).exp().permute(0, 1, 4, 2, 3)
    inputs = (dtX * to_end[..., None]).permute(0, 1, 3, 2, 4, 5).reshape(b, c, g, q, r * p)
    added = (Bc.transpose(-1, -2) @ inputs.to(Bc.dtype)).view(b, c, g, n, r, p)

    # From chunk to chunk.
    H = cum.new_zeros(b, g, n, r, p) if state is None else state.view(b, g, r, p, n).permute(0, 1, 4, 2, 3)
    whole_chunk = cum[..., -1].exp()[:, :, :, None, :, None]
    before, H = _Between.apply(added, whole_chunk, H)  # type: ignore[no-untyped-call]

    # What the state before a chunk gives to its positions.
    carried = (Cc @ before.flatten(-2)).view(b, c, g, q, r, p).transpose(2, 3)
    Y = Y + carried * cum.exp().permute(0, 1, 4, 2, 3)[..., None]
    Y = Y.reshape(b, seq, h, p) + D[:, None] * X
    return Y.to(X.dtype), H.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)


class _Within(torch.autograd.Function):
    """Y = M dtX of every chunk and head, with M = C B^T . L and L_ij = exp(cum_i - cum_j), where C B^T is 0 for j > i.

    For j > i, L is 1, lest it overflow. cum is the sum of dt A from the chunk's first position on, so L_ij is what is
    left at i of an input at j. With T = M . dM its gradient is dcum_i = sum_j T_ij - sum_j T_ji. The sums are Y_i dY_i
    and dtX_i d(dtX)_i, which are cheaper, but have the diagonal of T in both, rounded differently: most of what is left
    of it would be noise.
    """

    @staticmethod
    def forward(
        ctx: Any, CB: Float[Tensor, "b c g q q"], cum: Float[Tensor, "b c g r q"], dtX: Float[Tensor, "b c g r q p"]
    ) -> Float[Tensor, "b c g r q p"]:
        L = (cum[..., :, None] - cum[..., None, :]).clamp_(max=0).exp_().to(CB.dtype)
        inputs = dtX.to(CB.dtype).contiguous()
        Y = (CB[:, :, :, None] * L) @ inputs
        ctx.save_for_backward(CB, L, inputs)
        ctx.dtypes = cum.dtype, dtX.dtype
        return Y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        CB, L, dtX = ctx.saved_tensors
        of_cum, of_dtX = ctx.dtypes
        dY = dY.to(CB.dtype).contiguous()
        M = CB[:, :, :, None] * L
        ddtX = M.transpose(-1, -2) @ dY
        dM = dY @ dtX.transpose(-1, -2)
        T = M.to(of_cum).mul_(dM)
        dcum = T.sum(-1) - T.sum(-2)
        return dM.mul_(L).sum(3), dcum, ddtX.to(of_dtX)


class _Between(torch.autograd.Function):
    """The recurrence from chunk to chunk: H_c = decay_c H_{c-1} + added_c, and the state before each chunk.

    Its gradient runs backwards: with d the gradient of H_c, dadded_c = d, ddecay_c = d . H_{c-1}, and the state before
    receives decay_c d beside what it gave to its chunk. States are stacked flat, since inductor takes a stack of such
    with a size of 1 for images, and puts the chunks innermost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        added: Float[Tensor, "b c g n r p"],
        decay: Float[Tensor, "b c g 1 r 1"],
        H: Float[Tensor, "b g n r p"],
    ) -> tuple[Float[Tensor, "b c g n r p"], Float[Tensor, "b g n r p"]]:
        before = []
        for keep, more in zip(decay.unbind(1), added.unbind(1), strict=True):
            before.append(H.to(added.dtype).flatten(1))
            H = keep * H + more
        states = torch.stack(before, dim=1).view(added.shape)
        ctx.save_for_backward(states, decay)
        return states, H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, decay = ctx.saved_tensors
        dadded, ddecay = [], []
        for keep, state, more in zip(*(M.unbind(1)[::-1] for M in (decay, states, dstates)), strict=True):
            dadded.append(d.to(states.dtype).flatten(1))
            ddecay.append((d * state).sum((2, 4)).flatten(1))
            d = keep * d + more
        of_added = torch.stack(dadded[::-1], dim=1).view(states.shape)
        of_decay = torch.stack(ddecay[::-1], dim=1).view(decay.shape)
        return of_added, of_decay, d
