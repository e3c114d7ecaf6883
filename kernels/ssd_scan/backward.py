"""Kernels of the backward pass: gradients of positions as sources and as outputs, and of the decay.

Letters as in `forward` and the README. A program holds one block of positions of a group and goes through some of the
group's heads, so that dB and dC, which the heads share, are sums in registers; partial sums of several programs are
added afterwards in a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from explore.kernels.ssd_scan.forward import decay_between, dot


@triton.jit
@no_type_check
def sources_kernel(
    X_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    steps_ptr,
    cum_ptr,
    G_ptr,
    dY_ptr,
    dX_ptr,
    dB_ptr,
    dD_ptr,
    own_ptr,
    later_ptr,
    state_ptr,
    seq,
    n_heads,
    n_groups,
    chunk_size,
    n_chunks,
    n_splits,
    heads_per_split,
    X_stride_b,
    X_stride_l,
    X_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    dY_stride_b,
    dY_stride_l,
    dY_stride_h,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of positions j as sources: dX, dB, and U_j . X_j in three parts: own, later and state.

    U_j is the gradient of dt_j X_j. Its parts come from the output at j itself, from later outputs, and from the state.
    """
    heads_per_group = n_heads // n_groups
    split = tl.program_id(0) % n_splits
    group = tl.program_id(0) // n_splits % n_groups
    batch = (tl.program_id(0) // (n_splits * n_groups)).to(tl.int64)
    block_count = tl.cdiv(chunk_size, BLOCK_L)
    chunk = (tl.program_id(1) // block_count).to(tl.int64)
    block = tl.program_id(1) % block_count
    begin = chunk * chunk_size
    length = tl.minimum(seq - begin, chunk_size)
    offset_p = tl.arange(0, BLOCK_P)
    offset_n = tl.arange(0, BLOCK_N)
    in_p = offset_p < P
    in_n = offset_n < N
    B_ptr += batch * B_stride_b + begin * B_stride_l + group * B_stride_g
    C_ptr += batch * C_stride_b + begin * C_stride_l + group * C_stride_g
    X_ptr += batch * X_stride_b + begin * X_stride_l
    dY_ptr += batch * dY_stride_b + begin * dY_stride_l

    j = block * BLOCK_L + tl.arange(0, BLOCK_L)
    in_j = j < length
    in_j_p = in_j[:, None] & in_p[None, :]
    in_j_n = in_j[:, None] & in_n[None, :]
    B = tl.load(B_ptr + j[:, None] * B_stride_l + offset_n[None, :], mask=in_j_n, other=0.0)
    dB = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    first_head = split * heads_per_split
    for k in range(first_head, tl.minimum(first_head + heads_per_split, heads_per_group)):
        head = group * heads_per_group + k
        row = (batch * n_heads + head) * n_chunks + chunk
        cum_row = cum_ptr + row * chunk_size
        cum_j = tl.load(cum_row + j, mask=in_j, other=0.0)
        dt_j = tl.load(steps_ptr + row * chunk_size + j, mask=in_j, other=0.0)
        X = tl.load(X_ptr + head * X_stride_h + j[:, None] * X_stride_l + offset_p[None, :], mask=in_j_p, other=0.0)
        G = tl.load(
            G_ptr + row * P * N + offset_p[:, None] * N + offset_n[None, :],
            mask=in_p[:, None] & in_n[None, :],
            other=0.0,
        )
        # Through the state after the chunk.
        to_end = tl.exp(tl.where(in_j, tl.load(cum_row + chunk_size - 1) - cum_j, float("-inf")))
        dX = dot(B, tl.trans(G), None, PRECISION) * to_end[:, None]
        state = tl.sum(dX * X.to(tl.float32), axis=1)
        dX *= dt_j[:, None]
        weighted = (X.to(tl.float32) * (dt_j * to_end)[:, None]).to(G.dtype)
        dB = dot(weighted, G, dB, PRECISION)
        # Through the outputs at this and later positions of the chunk; tiles are j by i.
        own = tl.zeros((BLOCK_L,), tl.float32)
        later = tl.zeros((BLOCK_L,), tl.float32)
        skip = tl.zeros((BLOCK_L,), tl.float32)
        D = tl.load(D_ptr + head)
        for first in range(block * BLOCK_L, length, BLOCK_K):
            i = first + tl.arange(0, BLOCK_K)
            in_i = i < length
            cum_i = tl.load(cum_row + i, mask=in_i, other=0.0)
            C = tl.load(
                C_ptr + i[:, None] * C_stride_l + offset_n[None, :], mask=in_i[:, None] & in_n[None, :], other=0.0
            )
            dY = tl.load(
                dY_ptr + head * dY_stride_h + i[:, None] * dY_stride_l + offset_p[None, :],
                mask=in_i[:, None] & in_p[None, :],
                other=0.0,
            )
            L = decay_between(cum_i[None, :], cum_j[:, None], i[None, :], j[:, None], length)
            mixed = dot(B, tl.trans(C), None, PRECISION) * L
            XdY = dot(X, tl.trans(dY), None, PRECISION)
            pairs = mixed * XdY
            same = i[None, :] == j[:, None]
            own += tl.sum(tl.where(same, pairs, 0.0), axis=1)
            later += tl.sum(tl.where(same, 0.0, pairs), axis=1)
            skip += tl.sum(tl.where(same, XdY, 0.0), axis=1)
            given = (mixed * dt_j[:, None] + tl.where(same, D, 0.0)).to(dY.dtype)
            dX = dot(given, dY, dX, PRECISION)
            dB = dot((XdY * L * dt_j[:, None]).to(C.dtype), C, dB, PRECISION)
        own_head = ((batch * seq + begin) * n_heads + head) * P
        tl.store(
            dX_ptr + own_head + j[:, None] * (n_heads * P) + offset_p[None, :],
            dX.to(dX_ptr.dtype.element_ty),
            mask=in_j_p,
        )
        tl.store(dD_ptr + row * block_count + block, tl.sum(skip))
        tl.store(own_ptr + row * chunk_size + j, own, mask=in_j)
        tl.store(later_ptr + row * chunk_size + j, later, mask=in_j)
        tl.store(state_ptr + row * chunk_size + j, state, mask=in_j)
    sums = tl.num_programs(0) // (n_splits * n_groups) * split + batch
    dB_ptr += ((sums * seq + begin) * n_groups + group) * N
    tl.store(dB_ptr + j[:, None] * (n_groups * N) + offset_n[None, :], dB.to(dB_ptr.dtype.element_ty), mask=in_j_n)


@triton.jit
@no_type_check
def outputs_backward_kernel(
    X_ptr,
    B_ptr,
    C_ptr,
    steps_ptr,
    cum_ptr,
    H_ptr,
    dY_ptr,
    dC_ptr,
    earlier_ptr,
    seq,
    n_heads,
    n_groups,
    chunk_size,
    n_chunks,
    n_splits,
    heads_per_split,
    X_stride_b,
    X_stride_l,
    X_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    dY_stride_b,
    dY_stride_l,
    dY_stride_h,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of positions i as outputs: dC, and the part of dY_i . Y_i that comes from before i."""
    heads_per_group = n_heads // n_groups
    split = tl.program_id(0) % n_splits
    group = tl.program_id(0) // n_splits % n_groups
    batch = (tl.program_id(0) // (n_splits * n_groups)).to(tl.int64)
    block_count = tl.cdiv(chunk_size, BLOCK_L)
    chunk = (tl.program_id(1) // block_count).to(tl.int64)
    block = tl.program_id(1) % block_count
    begin = chunk * chunk_size
    length = tl.minimum(seq - begin, chunk_size)
    offset_p = tl.arange(0, BLOCK_P)
    offset_n = tl.arange(0, BLOCK_N)
    in_p = offset_p < P
    in_n = offset_n < N
    B_ptr += batch * B_stride_b + begin * B_stride_l + group * B_stride_g
    C_ptr += batch * C_stride_b + begin * C_stride_l + group * C_stride_g
    X_ptr += batch * X_stride_b + begin * X_stride_l
    dY_ptr += batch * dY_stride_b + begin * dY_stride_l

    i = block * BLOCK_L + tl.arange(0, BLOCK_L)
    in_i = i < length
    in_i_n = in_i[:, None] & in_n[None, :]
    C = tl.load(C_ptr + i[:, None] * C_stride_l + offset_n[None, :], mask=in_i_n, other=0.0)
    dC = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    first_head = split * heads_per_split
    for k in range(first_head, tl.minimum(first_head + heads_per_split, heads_per_group)):
        head = group * heads_per_group + k
        row = (batch * n_heads + head) * n_chunks + chunk
        cum_row = cum_ptr + row * chunk_size
        cum_i = tl.load(cum_row + i, mask=in_i, other=0.0)
        dY = tl.load(
            dY_ptr + head * dY_stride_h + i[:, None] * dY_stride_l + offset_p[None, :],
            mask=in_i[:, None] & in_p[None, :],
            other=0.0,
        )
        H = tl.load(
            H_ptr + row * P * N + offset_p[:, None] * N + offset_n[None, :],
            mask=in_p[:, None] & in_n[None, :],
            other=0.0,
        )
        # From the state before the chunk.
        decayed = dY.to(tl.float32) * tl.exp(cum_i)[:, None]
        earlier = tl.sum(decayed * dot(C, tl.trans(H), None, PRECISION), axis=1)
        dC = dot(decayed.to(H.dtype), H, dC, PRECISION)
        # From this and earlier positions of the chunk; tiles are i by j.
        for first in range(0, tl.minimum((block + 1) * BLOCK_L, length), BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            in_j = j < length
            cum_j = tl.load(cum_row + j, mask=in_j, other=0.0)
            dt_j = tl.load(steps_ptr + row * chunk_size + j, mask=in_j, other=0.0)
            B = tl.load(
                B_ptr + j[:, None] * B_stride_l + offset_n[None, :], mask=in_j[:, None] & in_n[None, :], other=0.0
            )
            X = tl.load(
                X_ptr + head * X_stride_h + j[:, None] * X_stride_l + offset_p[None, :],
                mask=in_j[:, None] & in_p[None, :],
                other=0.0,
            )
            L = decay_between(cum_i[:, None], cum_j[None, :], i[:, None], j[None, :], length)
            mixed = dot(dY, tl.trans(X), None, PRECISION) * L * dt_j[None, :]
            pairs = mixed * dot(C, tl.trans(B), None, PRECISION)
            earlier += tl.sum(tl.where(i[:, None] == j[None, :], 0.0, pairs), axis=1)
            dC = dot(mixed.to(B.dtype), B, dC, PRECISION)
        tl.store(earlier_ptr + row * chunk_size + i, earlier, mask=in_i)
    sums = tl.num_programs(0) // (n_splits * n_groups) * split + batch
    dC_ptr += ((sums * seq + begin) * n_groups + group) * N
    tl.store(dC_ptr + i[:, None] * (n_groups * N) + offset_n[None, :], dC.to(dC_ptr.dtype.element_ty), mask=in_i_n)


@triton.jit
@no_type_check
def decay_backward_kernel(
    A_ptr,
    steps_ptr,
    own_ptr,
    later_ptr,
    state_ptr,
    earlier_ptr,
    kept_ptr,
    ddt_ptr,
    dA_ptr,
    seq,
    n_heads,
    chunk_size,
    n_chunks,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Gathers ddt (b, l, h) and each chunk's part of dA (b, c, h) from the sums over pairs of positions.

    The decay at t scales every pair j < t <= i. The sum over these pairs is the sum over all pairs with t <= i minus
    the sum over all pairs with t <= j. Pairs with i = j, the largest terms, are in neither sum.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, BLOCK_Q)
    at = (chunk.to(tl.int64) * chunk_size + t)[None, :]
    known = head < n_heads
    inside = known[:, None] & (t < chunk_size)[None, :] & (at < seq)
    row = (batch * n_heads + head) * n_chunks + chunk
    place = row[:, None] * chunk_size + t[None, :]
    A = tl.load(A_ptr + head, mask=known, other=0.0)
    kept = tl.load(kept_ptr + row, mask=known, other=0.0)
    dt = tl.load(steps_ptr + place, mask=inside, other=0.0)
    own = tl.load(own_ptr + place, mask=inside, other=0.0)
    later = tl.load(later_ptr + place, mask=inside, other=0.0)
    state = tl.load(state_ptr + place, mask=inside, other=0.0)
    earlier = tl.load(earlier_ptr + place, mask=inside, other=0.0)
    pairs = tl.cumsum(earlier - dt * later, axis=1, reverse=True)
    into_state = tl.cumsum(dt * state, axis=1) - dt * state
    decay = pairs + into_state + kept[:, None]
    ddt = A[:, None] * decay + own + later + state
    tl.store(ddt_ptr + (batch * seq + at) * n_heads + head[:, None], ddt, mask=inside)
    dA = tl.sum(tl.where(inside, decay * dt, 0.0), axis=1)
    tl.store(dA_ptr + (batch * n_chunks + chunk) * n_heads + head, dA, mask=known)
