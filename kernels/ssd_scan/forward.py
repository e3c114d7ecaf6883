"""Kernels of the forward pass: cumulative decay, states, outputs.

Letters as in the README: q positions per chunk, c chunks, H state before a chunk, G gradient of the state after it, cum
the sum of dt A since the start of the chunk. A chunk is computed in blocks of BLOCK_L positions. BLOCK_P and BLOCK_N
are widths of tiles, powers of two; masks limit them to d_head and d_state.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter multiplies the bits of bf16 as integers, so it uses fp32; products of bf16 are exact in fp32."""


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns a b in fp32, plus acc if it is not None."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
@no_type_check
def cumsum_kernel(
    dt_ptr,
    A_ptr,
    steps_ptr,
    cum_ptr,
    seq,
    n_heads,
    chunk_size,
    n_chunks,
    dt_stride_b,
    dt_stride_l,
    dt_stride_h,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Turns dt (b, l, h) into steps (b, h, c, q), zero past the end, and sums dt A over each chunk into cum.

    A position past the end decays nothing, so the last entry of a chunk is always the decay of the whole chunk.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_Q)
    at = (chunk.to(tl.int64) * chunk_size + i)[None, :]
    known = head < n_heads
    inside = known[:, None] & (i < chunk_size)[None, :]
    dt = tl.load(
        dt_ptr + batch * dt_stride_b + at * dt_stride_l + head[:, None] * dt_stride_h,
        mask=inside & (at < seq),
        other=0.0,
    ).to(tl.float32)
    A = tl.load(A_ptr + head, mask=known, other=0.0)
    cum = tl.cumsum(dt * A[:, None], axis=1)
    row = ((batch * n_heads + head) * n_chunks + chunk) * chunk_size
    tl.store(steps_ptr + row[:, None] + i[None, :], dt, mask=inside)
    tl.store(cum_ptr + row[:, None] + i[None, :], cum, mask=inside)


@triton.jit
@no_type_check
def decay_between(cum_i, cum_j, i, j, length):
    """Returns exp(cum_i - cum_j) where j <= i < length, else zero. The mask comes before exp, which could overflow."""
    return tl.exp(tl.where((j <= i) & (i < length), cum_i - cum_j, float("-inf")))


@triton.jit
@no_type_check
def states_kernel(
    V_ptr,
    M_ptr,
    steps_ptr,
    cum_ptr,
    start_ptr,
    walked_ptr,
    end_ptr,
    before_ptr,
    kept_ptr,
    seq,
    n_heads,
    n_groups,
    chunk_size,
    n_chunks,
    V_stride_b,
    V_stride_l,
    V_stride_h,
    M_stride_b,
    M_stride_l,
    M_stride_g,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes a head's state over the whole sequence in registers and writes it once per chunk.

    Without REVERSE, V is X and M is B. The kernel writes H before every chunk and the state after the last position.
    With REVERSE, V is dY and M is C. The kernel writes G after every chunk, the gradient of the initial state, and for
    every chunk its part of <G, exp(cum_q) H>, which is added to the decay gradient of each position of the chunk.
    """
    batch = (tl.program_id(0) // n_heads).to(tl.int64)
    head = tl.program_id(0) % n_heads
    group = head // (n_heads // n_groups)
    n_tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offset_p = tl.program_id(1) // n_tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    offset_n = tl.program_id(1) % n_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p = offset_p < P
    in_n = offset_n < N
    in_tile = in_p[:, None] & in_n[None, :]
    tile = offset_p[:, None] * N + offset_n[None, :]
    row = batch * n_heads + head
    V_ptr += batch * V_stride_b + head * V_stride_h
    M_ptr += batch * M_stride_b + group * M_stride_g
    cum_ptr += row * n_chunks * chunk_size
    steps_ptr += row * n_chunks * chunk_size
    block_count = tl.cdiv(chunk_size, BLOCK_L)

    H = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_START:
        H += tl.load(start_ptr + row * P * N + tile, mask=in_tile, other=0.0)
    # One flat loop, so that all of it is pipelined. Each block decays the state by its part of the chunk's decay.
    for k in range(n_chunks * block_count):
        turn = n_chunks * block_count - 1 - k if REVERSE else k
        chunk = turn // block_count
        first = turn % block_count * BLOCK_L
        last = tl.minimum(first + BLOCK_L, chunk_size) - 1
        i = first + tl.arange(0, BLOCK_L)
        begin = chunk.to(tl.int64) * chunk_size
        inside = i < tl.minimum(seq - begin, chunk_size)
        cum_chunk = cum_ptr + begin
        cum = tl.load(cum_chunk + i, mask=inside, other=0.0)
        cum_start = tl.load(cum_chunk + first - 1, mask=first > 0, other=0.0)
        cum_last = tl.load(cum_chunk + last)
        V = tl.load(
            V_ptr + begin * V_stride_l + i[:, None] * V_stride_l + offset_p[None, :],
            mask=inside[:, None] & in_p[None, :],
            other=0.0,
        )
        M = tl.load(
            M_ptr + begin * M_stride_l + i[:, None] * M_stride_l + offset_n[None, :],
            mask=inside[:, None] & in_n[None, :],
            other=0.0,
        )
        walked = (row * n_chunks + chunk) * P * N + tile
        if REVERSE:
            edge = last == chunk_size - 1
            at_edge = (offset_p < tl.where(edge, P, 0))[:, None] & in_n[None, :]
            before = tl.load(before_ptr + walked, mask=at_edge, other=0.0).to(tl.float32)
            kept = (row * n_chunks + chunk) * tl.num_programs(1) + tl.program_id(1)
            tl.store(kept_ptr + kept, tl.exp(cum_last) * tl.sum(H * before), mask=edge)
            weight = tl.exp(tl.where(inside, cum - cum_start, float("-inf")))
        else:
            at_edge = (offset_p < tl.where(first == 0, P, 0))[:, None] & in_n[None, :]
            steps = tl.load(steps_ptr + begin + i, mask=inside, other=0.0)
            weight = steps * tl.exp(tl.where(inside, cum_last - cum, float("-inf")))
        tl.store(walked_ptr + walked, H.to(walked_ptr.dtype.element_ty), mask=at_edge)
        weighted = (V.to(tl.float32) * weight[:, None]).to(M.dtype)
        H = dot(tl.trans(weighted), M, H * tl.exp(cum_last - cum_start), PRECISION)
    tl.store(end_ptr + row * P * N + tile, H, mask=in_tile)


@triton.jit
@no_type_check
def outputs_kernel(
    X_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    steps_ptr,
    cum_ptr,
    H_ptr,
    Y_ptr,
    seq,
    n_heads,
    n_groups,
    chunk_size,
    n_chunks,
    X_stride_b,
    X_stride_l,
    X_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y_i = exp(cum_i) H C_i + sum over j <= i of (C_i . B_j) exp(cum_i - cum_j) dt_j X_j + D X_i, a block of i."""
    batch = (tl.program_id(0) // n_heads).to(tl.int64)
    head = tl.program_id(0) % n_heads
    group = head // (n_heads // n_groups)
    block_count = tl.cdiv(chunk_size, BLOCK_L)
    chunk = (tl.program_id(1) // block_count).to(tl.int64)
    block = tl.program_id(1) % block_count
    begin = chunk * chunk_size
    length = tl.minimum(seq - begin, chunk_size)
    offset_p = tl.arange(0, BLOCK_P)
    offset_n = tl.arange(0, BLOCK_N)
    in_p = offset_p < P
    in_n = offset_n < N
    row = batch * n_heads + head
    cum_ptr += (row * n_chunks + chunk) * chunk_size
    steps_ptr += (row * n_chunks + chunk) * chunk_size
    X_ptr += batch * X_stride_b + begin * X_stride_l + head * X_stride_h
    B_ptr += batch * B_stride_b + begin * B_stride_l + group * B_stride_g
    C_ptr += batch * C_stride_b + begin * C_stride_l + group * C_stride_g

    i = block * BLOCK_L + tl.arange(0, BLOCK_L)
    in_i = i < length
    cum_i = tl.load(cum_ptr + i, mask=in_i, other=0.0)
    C = tl.load(C_ptr + i[:, None] * C_stride_l + offset_n[None, :], mask=in_i[:, None] & in_n[None, :], other=0.0)
    H = tl.load(
        H_ptr + (row * n_chunks + chunk) * P * N + offset_p[:, None] * N + offset_n[None, :],
        mask=in_p[:, None] & in_n[None, :],
        other=0.0,
    )
    Y = dot(C, tl.trans(H), None, PRECISION) * tl.exp(cum_i)[:, None]
    for first in range(0, tl.minimum((block + 1) * BLOCK_L, length), BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        in_j = j < length
        cum_j = tl.load(cum_ptr + j, mask=in_j, other=0.0)
        dt_j = tl.load(steps_ptr + j, mask=in_j, other=0.0)
        B = tl.load(
            B_ptr + j[:, None] * B_stride_l + offset_n[None, :],
            mask=in_j[:, None] & in_n[None, :],
            other=0.0,
        )
        X = tl.load(
            X_ptr + j[:, None] * X_stride_l + offset_p[None, :],
            mask=in_j[:, None] & in_p[None, :],
            other=0.0,
        )
        L = decay_between(cum_i[:, None], cum_j[None, :], i[:, None], j[None, :], length)
        mixed = dot(C, tl.trans(B), None, PRECISION) * L * dt_j[None, :]
        Y = dot(mixed.to(X.dtype), X, Y, PRECISION)
    own = in_i[:, None] & in_p[None, :]
    X = tl.load(X_ptr + i[:, None] * X_stride_l + offset_p[None, :], mask=own, other=0.0)
    Y += tl.load(D_ptr + head) * X.to(tl.float32)
    Y_ptr += ((batch * seq + begin) * n_heads + head) * P
    tl.store(Y_ptr + i[:, None] * (n_heads * P) + offset_p[None, :], Y.to(Y_ptr.dtype.element_ty), mask=own)
