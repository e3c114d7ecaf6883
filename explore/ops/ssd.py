"""Structured state-space duality: the Mamba-2 recurrence, step by step and in chunks.

Letters, as in the paper (arXiv 2405.21060): X input of a head, A decay rate of a head (negative),
B and C input and output maps shared by the heads of a group, D skip weight of a head, dt step size,
H state (d_head x d_state). Shapes: b batch, l seq, h n_heads, g n_groups, r heads per group, p d_head, n d_state,
c number of chunks, q positions per chunk. Head i r + j is head j of group i, so h splits into g r.

    H_t = exp(dt_t A) H_{t-1} + dt_t X_t B_t^T        Y_t = H_t C_t + D X_t
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.ops.compilation import or_uncompiled
from explore.ops.mamba_ssm import ssd_mamba_ssm
from explore.ops.paths import OpPath, declare, path_of

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
    """Runs the recurrence by the selected path; a single position with a state is computed as one step.

    Args:
        chunk_size: number of positions in a chunk of the chunked form.
        state: state before the first position; zero if absent.
        in_place: a single step may overwrite `state`, which saves allocating a new one.

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
    if path_of("ssd", X.device.type) == "compiled":
        return _kernel()(X, dt, A, B, C, D, chunk_size, state)
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
    """The recurrence of the definition, position by position: the reference for `ssd_chunked`."""
    b, _, h, p = X.shape
    heads_per_group = h // B.shape[2]
    B, C = (M.repeat_interleave(heads_per_group, dim=2) for M in (B, C))  # b l h n
    H = X.new_zeros(b, h, p, B.shape[3]) if state is None else state
    outputs = []
    for X_t, dt_t, B_t, C_t in zip(*(M.unbind(1) for M in (X, dt, B, C)), strict=True):
        decay = torch.exp(dt_t * A)  # b h
        # Add the outer product of dt X (b h p 1) and B (b h 1 n) to the state (b h p n). Then multiply the state by C.
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

    If the length is not a multiple of `chunk_size`, the last chunk is shorter. Nothing is padded.

    Source: arXiv 2405.21060, section 6 and listing 1. Here the recurrence between chunks is a loop, and B and C are
    shared within a group instead of repeated for every head.
    """
    seq = X.shape[1]
    whole = seq - seq % chunk_size
    if whole == 0:
        return _ssd_chunks(X, dt, A, B, C, D, seq, state)
    if whole == seq:
        return _ssd_chunks(X, dt, A, B, C, D, chunk_size, state)
    head, state = _ssd_chunks(X[:, :whole], dt[:, :whole], A, B[:, :whole], C[:, :whole], D, chunk_size, state)
    tail, state = _ssd_chunks(X[:, whole:], dt[:, whole:], A, B[:, whole:], C[:, whole:], D, seq - whole, state)
    return torch.cat((head, tail), dim=1), state


@cache
def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """The C++ kernel, with `ssd_chunked` where the compiler fails or the kernel cannot handle the tensors."""
    from explore.kernels.ssd_chunks import handles, ssd_chunks

    def fast(
        X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_size: int, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return (ssd_chunks if handles(X, B, C) else ssd_chunked)(X, dt, A, B, C, D, chunk_size, state)

    return or_uncompiled(fast, ssd_chunked)


def _ssd_step(
    X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, in_place: bool
) -> tuple[Tensor, Tensor]:
    b, _, h, p = X.shape
    g, n = B.shape[2:]
    decay = torch.exp(dt[:, 0] * A)[..., None, None]  # b h 1 1
    # The heads of a group share B and C. Stacked, their states are one matrix of r*p rows. One outer product with B
    # updates all of them, and one product with C reads all of them.
    dtX = (dt[:, 0, :, None] * X[:, 0]).reshape(b * g, -1, 1)  # b*g r*p 1
    H = state.mul_(decay) if in_place else state * decay  # b h p n
    rows = H.view(b * g, -1, n).baddbmm_(dtX.to(H.dtype), B.reshape(b * g, 1, n).to(H.dtype))  # b*g r*p n
    # On a CPU a row times a matrix is several times faster than a matrix times a column.
    Y = torch.bmm(C.reshape(b * g, 1, n).to(H.dtype), rows.transpose(1, 2)).view(b, 1, h, p)  # from b*g 1 r*p
    return Y + D[:, None] * X, H


def _ssd_chunks(
    X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, q: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, seq, h, p = X.shape
    g, n = B.shape[2:]
    r, c = h // g, seq // q
    Xc = X.reshape(b, c, q, g, r, p)
    dtc = dt.reshape(b, c, q, g, r)
    Bc, Cc = (M.reshape(b, c, q, g, n).transpose(2, 3) for M in (B, C))  # b c g q n
    dtX = Xc * dtc[..., None]  # b c q g r p

    # Within the chunks. cum_i is the sum of dt A from the first position of the chunk to i. Positions are the innermost
    # axis, because a q by q matrix is computed from cum. Any other layout needs a transpose in each loop over it.
    cum = (dtc * A.view(g, r)).permute(0, 1, 3, 4, 2).contiguous().cumsum(dim=-1)  # b c g r q
    # Weight of the input at column j in the output at row i, before decay. It is the same for all heads of a group.
    CB = (Cc @ Bc.transpose(-1, -2)).tril()  # b c g q q
    Y: Tensor = _Within.apply(CB, cum, dtX.permute(0, 1, 3, 4, 2, 5))  # type: ignore[no-untyped-call]
    Y = Y.permute(0, 1, 4, 2, 3, 5)  # b c g r q p to b c q g r p, the order of the sequence

    # Contribution of each chunk to the state at its end: its inputs, decayed from their position to the end, times B.
    to_end = (cum[..., -1:] - cum).exp().permute(0, 1, 4, 2, 3)  # b c q g r
    # The heads of a group share B, so they lie side by side in r*p columns and need one product per group.
    inputs = (dtX * to_end[..., None]).permute(0, 1, 3, 2, 4, 5).reshape(b, c, g, q, r * p)
    added = (Bc.transpose(-1, -2) @ inputs.to(Bc.dtype)).view(b, c, g, n, r, p)

    # From chunk to chunk. Here a state is n by r*p, the transpose of the state passed in and returned. With this layout
    # neither the product above nor the one below needs a transpose.
    H = cum.new_zeros(b, g, n, r, p) if state is None else state.view(b, g, r, p, n).permute(0, 1, 4, 2, 3)
    whole_chunk = cum[..., -1].exp()[:, :, :, None, :, None]  # b c g 1 r 1
    before, H = _Between.apply(added, whole_chunk, H)  # type: ignore[no-untyped-call]  # b c g n r p, b g n r p

    # Contribution of the state before a chunk to its positions: C times the state, decayed from the chunk's start.
    carried = (Cc @ before.flatten(-2)).view(b, c, g, q, r, p).transpose(2, 3)  # b c q g r p
    Y = Y + carried * cum.exp().permute(0, 1, 4, 2, 3)[..., None]
    Y = Y.reshape(b, seq, h, p) + D[:, None] * X
    return Y.to(X.dtype), H.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)


class _Within(torch.autograd.Function):
    """Y = M dtX for every chunk and head, with M = C B^T . L and L_ij = exp(cum_i - cum_j); C B^T is 0 for j > i.

    L_ij is the share of the input at j that remains at i. For j > i the exponent could overflow, so L is set to 1.

    With T = M . dM, the gradient of cum is dcum_i = sum_j T_ij - sum_j T_ji. The two sums equal Y_i . dY_i and
    dtX_i . d(dtX)_i, which are cheaper to compute. They are not used here because of rounding. Both contain the
    diagonal of T, which should cancel; but each rounds it differently, and if the decay is strong the difference is
    mostly noise.
    """

    @staticmethod
    def forward(
        ctx: Any, CB: Float[Tensor, "b c g q q"], cum: Float[Tensor, "b c g r q"], dtX: Float[Tensor, "b c g r q p"]
    ) -> Float[Tensor, "b c g r q p"]:
        # Row i is the position of the output, column j that of the input. CB has one matrix per group, broadcast over
        # the heads of L.
        L = (cum[..., :, None] - cum[..., None, :]).clamp_(max=0).exp_().to(CB.dtype)  # b c g r q q
        inputs = dtX.to(CB.dtype).contiguous()
        Y = (CB[:, :, :, None] * L) @ inputs
        # M is not saved. The backward pass recomputes it from L and from CB, which is r times smaller.
        ctx.save_for_backward(CB, L, inputs)
        ctx.dtypes = cum.dtype, dtX.dtype
        return Y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        CB, L, dtX = ctx.saved_tensors
        cum_dtype, dtX_dtype = ctx.dtypes
        dY = dY.to(CB.dtype).contiguous()
        M = CB[:, :, :, None] * L  # b c g r q q, as are dM and T
        ddtX = M.transpose(-1, -2) @ dY  # b c g r q p
        dM = dY @ dtX.transpose(-1, -2)
        T = M.to(cum_dtype).mul_(dM)
        dcum = T.sum(-1) - T.sum(-2)  # b c g r q
        # The heads of a group share CB, so its gradient is the sum of theirs. The backward pass of tril discards the
        # part above the diagonal.
        return dM.mul_(L).sum(3), dcum, ddtX.to(dtX_dtype)


class _Between(torch.autograd.Function):
    """The recurrence from chunk to chunk: H_c = decay_c H_{c-1} + added_c, and the state before each chunk.

    The gradient is computed from the last chunk to the first. Let d be the gradient of H_c. Then dadded_c = d and
    ddecay_c = d . H_{c-1}. The gradient of H_{c-1} is decay_c d plus the gradient of the output `before_c`, which the
    positions of chunk c read.

    States are flattened before they are stacked. Otherwise inductor treats a stack of such tensors with an axis of
    size 1 as images and makes the chunks the innermost axis.
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
            # Stored in the dtype of the products that read it. The running state keeps its own dtype, usually fp32.
            before.append(H.to(added.dtype).flatten(1))
            H = keep * H + more
        states = torch.stack(before, dim=1).view(added.shape)  # b c g n r p
        ctx.save_for_backward(states, decay)
        return states, H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, decay = ctx.saved_tensors
        # From the last chunk to the first. d starts as the gradient of the final state.
        dadded, ddecay = [], []
        for keep, state, more in zip(*(M.unbind(1)[::-1] for M in (decay, states, dstates)), strict=True):
            dadded.append(d.to(states.dtype).flatten(1))
            ddecay.append((d * state).sum((2, 4)).flatten(1))  # sum over n and p: a head has one decay
            d = keep * d + more
        added_gradient = torch.stack(dadded[::-1], dim=1).view(states.shape)
        decay_gradient = torch.stack(ddecay[::-1], dim=1).view(decay.shape)
        return added_gradient, decay_gradient, d
