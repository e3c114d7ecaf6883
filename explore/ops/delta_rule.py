"""The gated delta rule, step by step and in chunks.

Letters, as in the paper (arXiv 2412.06464): Q, K, V queries, keys and values, alpha decay of the state (0 to 1), beta
strength of a write (0 to 1), S state (d_v x d_k). Shapes: b batch, l seq, h value heads, g key heads, k d_k, v d_v,
r value heads per key head, c number of chunks, q positions per chunk.

    S_t = alpha_t S_{t-1} (I - beta_t K_t K_t^T) + beta_t V_t K_t^T        Y_t = S_t Q_t

Each step multiplies the decayed state by the key, and moves the result towards the value by the fraction beta. Keys
must have at most unit length, or the state may grow without bound. The caller normalises Q and K. The published models
also scale Q by d_k^(-1/2). Value heads i r to (i + 1) r - 1 share key head i.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.ops.paths import OpPath, declare, path_of

declare(
    "delta_rule",
    OpPath("chunked", default_on="any", countable=True),
    OpPath("recurrent", reference=True, stepwise=True, decoding=True),
)


def delta_rule(
    Q: Float[Tensor, "b l g k"],
    K: Float[Tensor, "b l g k"],
    V: Float[Tensor, "b l h v"],
    log_alpha: Float[Tensor, "b l h"],
    beta: Float[Tensor, "b l h"],
    chunk_size: int,
    state: Float[Tensor, "b h v k"] | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[Tensor, "b l h v"], Float[Tensor, "b h v k"]]:
    """Runs the recurrence by the selected path; a single position with a state is computed as one step.

    Args:
        chunk_size: number of positions in a chunk of the chunked form.
        state: state before the first position; zero if absent.
        in_place: a single step may overwrite `state`, which saves allocating a new one.

    Returns:
        Outputs, and the state after the last position.
    """
    if path_of("delta_rule", V.device.type) == "recurrent":
        return delta_rule_recurrent(Q, K, V, log_alpha, beta, state)
    if V.shape[1] == 1 and state is not None:
        return _step(Q, K, V, log_alpha, beta, state, in_place)
    return delta_rule_chunked(Q, K, V, log_alpha, beta, chunk_size, state)


def delta_rule_recurrent(
    Q: Float[Tensor, "b l g k"],
    K: Float[Tensor, "b l g k"],
    V: Float[Tensor, "b l h v"],
    log_alpha: Float[Tensor, "b l h"],
    beta: Float[Tensor, "b l h"],
    state: Float[Tensor, "b h v k"] | None = None,
) -> tuple[Float[Tensor, "b l h v"], Float[Tensor, "b h v k"]]:
    """The recurrence of the definition, position by position: the reference for `delta_rule_chunked`."""
    b, _, h, v = V.shape
    Q, K = (M.repeat_interleave(h // K.shape[2], dim=2) for M in (Q, K))  # b l h k
    S = log_alpha.new_zeros(b, h, v, K.shape[3]) if state is None else state
    outputs = []
    for Q_t, K_t, V_t, log_alpha_t, beta_t in zip(*(M.unbind(1) for M in (Q, K, V, log_alpha, beta)), strict=True):
        S = log_alpha_t.exp()[..., None, None] * S
        error = V_t - (S * K_t[:, :, None, :]).sum(-1)  # b h v
        S = S + (beta_t[..., None] * error)[..., None] * K_t[:, :, None, :]
        outputs.append((S * Q_t[:, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1).to(V.dtype), S


def delta_rule_chunked(
    Q: Float[Tensor, "b l g k"],
    K: Float[Tensor, "b l g k"],
    V: Float[Tensor, "b l h v"],
    log_alpha: Float[Tensor, "b l h"],
    beta: Float[Tensor, "b l h"],
    chunk_size: int,
    state: Float[Tensor, "b h v k"] | None = None,
) -> tuple[Float[Tensor, "b l h v"], Float[Tensor, "b h v k"]]:
    """The WY form: matrix products within a chunk, a short recurrence between chunks.

    Let gamma_i be the decay from the start of the chunk to position i, and L_ij = gamma_i / gamma_j for j <= i. Then

        T = I + strictly lower triangle of (beta_i L_ij K_i . K_j)
        U = T^-1 (beta V)            W = T^-1 (beta gamma K)
        N = U - W S^T                Y = gamma Q S^T + (lower triangle of L . Q K^T) N
        S' = gamma_q S + N^T (gamma_q / gamma K)

    Row i of N is the value that position i writes at its key. S and S' are the states before and after the chunk. If
    the length is not a multiple of `chunk_size`, the last chunk is shorter. Nothing is padded. `chunked_flops` counts
    the products.

    Source: arXiv 2412.06464, section 3.3. Here T is solved by substitution, and K K^T and Q K^T are computed once per
    key head instead of once per value head.
    """
    inputs, seq = (Q, K, V, log_alpha, beta), V.shape[1]
    whole = seq - seq % chunk_size
    if whole == 0:
        return _chunks(inputs, seq, state)
    if whole == seq:
        return _chunks(inputs, chunk_size, state)
    head, state = _chunks(tuple(M[:, :whole] for M in inputs), chunk_size, state)
    tail, state = _chunks(tuple(M[:, whole:] for M in inputs), seq - whole, state)
    return torch.cat((head, tail), dim=1), state


def _step(
    Q: Tensor, K: Tensor, V: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, in_place: bool
) -> tuple[Tensor, Tensor]:
    b, _, h, v = V.shape
    g, k = K.shape[2:]
    decay = log_alpha.exp().view(b, h, 1, 1).to(state.dtype)
    key, query = (M.reshape(b * g, 1, k).to(state.dtype) for M in (K, Q))
    # On a CPU a row times a matrix is several times faster than a matrix times a column. The product takes the old
    # state, not the decayed one: autograd saves the operand, and the decayed state is overwritten below.
    held = torch.bmm(key, state.reshape(b * g, -1, k).mT).view(b, h, v) * decay[..., 0]
    error = (beta.view(b, h, 1) * (V[:, 0] - held)).to(state.dtype)
    S = state.mul_(decay) if in_place else state * decay
    # The value heads that share a key head are stacked, so one outer product writes to all of them.
    rows = S.reshape(b * g, -1, k).baddbmm_(error.reshape(b * g, -1, 1), key)  # b*g r*v k
    Y = torch.bmm(query, rows.mT).view(b, 1, h, v)
    return Y.to(V.dtype), rows.view(b, h, v, k)


def _chunks(inputs: tuple[Tensor, ...], q: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    Q, K, V, log_alpha, beta = inputs
    b, seq, h, v = V.shape
    g, k = K.shape[2:]
    r, c = h // g, seq // q
    # Chunks are the outermost axis, so each of them is contiguous in the loop below. Positions are next to the widths.
    # A product of two tensors has the layout of its first factor, so the contiguous factor always comes first.
    Qc, Kc = (M.reshape(b, c, q, g, k).permute(1, 0, 3, 2, 4).contiguous() for M in (Q, K))  # c b g q k
    Vc = V.reshape(b, c, q, g, r, v).permute(1, 0, 3, 4, 2, 5)  # c b g r q v
    log_alpha, beta = (M.reshape(b, c, q, g, r).permute(1, 0, 3, 4, 2).contiguous() for M in (log_alpha, beta))

    # The decay from one position to another is a quotient of products. Sums of logarithms avoid underflow.
    log_gamma = log_alpha.cumsum(-1)  # c b g r q
    gamma = log_gamma.exp()
    to_end = (log_gamma[..., -1:] - log_gamma).exp()

    # Within the chunks: U holds the values that the positions would write if the state before the chunk were zero.
    # W S^T is the part that this state already holds. Computing -W is cheaper than a subtraction later.
    KK = Kc @ Kc.mT  # c b g q q
    QK = (Qc @ Kc.mT).tril()  # c b g q q
    T, scores = _Decayed.apply(KK, QK, log_gamma, beta)  # type: ignore[no-untyped-call]  # c b g r q q
    betaV = (beta[..., None] * Vc).to(T.dtype)  # c b g r q v
    minusK = ((-beta * gamma)[..., None] * Kc[:, :, :, None]).to(T.dtype)  # c b g r q k
    U = torch.linalg.solve_triangular(T, betaV, upper=False, unitriangular=True)
    minusW = torch.linalg.solve_triangular(T, minusK, upper=False, unitriangular=True)

    # From chunk to chunk. Batch and heads are one axis, so each factor of a chunk is (b*h, q, width).
    queries = gamma[..., None] * Qc[:, :, :, None]
    keys = to_end[..., None] * Kc[:, :, :, None]
    parts = (M.flatten(1, 3).unbind() for M in (U, minusW, queries, keys, scores, gamma[..., -1:, None]))
    S = T.new_zeros(b * h, v, k) if state is None else state.reshape(b * h, v, k).to(T.dtype)
    outputs = []
    for U_c, minusW_c, Q_c, K_c, scores_c, whole_chunk in zip(*parts, strict=True):
        N = U_c + minusW_c @ S.mT  # b*h q v
        outputs.append(Q_c @ S.mT + scores_c @ N)
        S = whole_chunk * S + N.mT @ K_c
    Y = torch.stack(outputs).view(c, b, h, q, v).permute(1, 0, 3, 2, 4).reshape(b, seq, h, v)
    return Y.to(V.dtype), S.view(b, h, v, k)


class _Decayed(torch.autograd.Function):
    """T_ij = beta_i L_ij (K K^T)_ij and the scores L . Q K^T of all heads, with L_ij = exp(log_gamma_i - log_gamma_j).

    For j > i the exponent could overflow, so L is set to 1. This changes no result: there Q K^T is 0, and the solver
    reads neither that part of T nor its diagonal. The gradient of log_gamma_i is the sum of row i of L . dL minus the
    sum of column i.

    The gradient is hand-written to save memory traffic. L is the only saved tensor of the size of T, and the backward
    pass works in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        KK: Float[Tensor, "c b g q q"],
        QK: Float[Tensor, "c b g q q"],
        log_gamma: Float[Tensor, "c b g r q"],
        beta: Float[Tensor, "c b g r q"],
    ) -> tuple[Float[Tensor, "c b g r q q"], Float[Tensor, "c b g r q q"]]:
        L = (log_gamma[..., :, None] - log_gamma[..., None, :]).clamp_(max=0).exp_()
        ctx.save_for_backward(KK, QK, L, beta)
        return (beta[..., None] * L).mul_(KK[:, :, :, None]), L * QK[:, :, :, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dT: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        KK, QK, L, beta = ctx.saved_tensors
        dT, dscores = dT * L, dscores * L
        dQK = dscores.sum(3)
        by_row = dT * KK[:, :, :, None]  # c b g r q q; the sum of row i is the gradient of beta_i
        dbeta = by_row.sum(-1)
        dKK = dT.mul_(beta[..., None]).sum(3)
        LdL = by_row.mul_(beta[..., None]).addcmul_(dscores, QK[:, :, :, None])
        return dKK.to(KK.dtype), dQK.to(QK.dtype), LdL.sum(-1) - LdL.sum(-2), dbeta


def chunked_flops(seq_len: int, n_heads: int, n_key_heads: int, d_k: int, d_v: int, chunk_size: int) -> dict[str, int]:
    """FLOPs of a forward pass of the chunked form over one sequence, by product.

    A chunk has n = chunk_size positions; a shorter last chunk has n = seq_len % chunk_size. A chunk takes

    - per key head: 2 n^2 d_k for K K^T, and the same for Q K^T;
    - per value head: n (n - 1) (d_k + d_v) for the solves of U and W, because row i of the triangle has i - 1 products
      in each column; 2 n d_k d_v each for W S^T, Q S^T and N^T K; and 2 n^2 d_v for the scores times N.

    The backward pass takes twice as many plus `backward_extra_flops`.
    """
    lengths = _lengths(seq_len, chunk_size)
    squares = sum(count * n * n for n, count in lengths)
    state = 2 * n_heads * d_k * d_v * seq_len
    return {
        "K K^T": 2 * n_key_heads * d_k * squares,
        "Q K^T": 2 * n_key_heads * d_k * squares,
        "solve": n_heads * (d_k + d_v) * (squares - seq_len),
        "W S^T": state,
        "Q S^T": state,
        "(L * Q K^T) N": 2 * n_heads * d_v * squares,
        "N^T K": state,
    }


def backward_extra_flops(seq_len: int, n_heads: int, d_k: int, d_v: int, chunk_size: int) -> int:
    """FLOPs of a backward pass of the chunked form beyond twice `chunked_flops`.

    Only the solves need more. Solving T X = B for n positions takes n (n - 1) FLOPs per column. Its gradients are
    dB = T^-T dX, which takes the same number, and dT = -dB X^T, which takes 2 n^2 per column, because the whole square
    is computed although only its strictly lower triangle is used. Together that is n (n + 1) more than twice the solve,
    for each of the d_k + d_v columns of every value head.
    """
    squares = sum(count * n * n for n, count in _lengths(seq_len, chunk_size))
    return n_heads * (d_k + d_v) * (squares + seq_len)


def step_flops(n_heads: int, d_k: int, d_v: int) -> dict[str, int]:
    """FLOPs of one recurrent step of one sequence, under the names of the corresponding products of the chunked form.

    The state is multiplied by the key (W S^T), updated by an outer product (N^T K), and multiplied by the query
    (Q S^T).
    """
    return dict.fromkeys(("W S^T", "Q S^T", "N^T K"), 2 * n_heads * d_k * d_v)


def _lengths(seq_len: int, chunk_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Lengths of the chunks, each with the number of chunks of that length."""
    whole, rest = divmod(seq_len, chunk_size)
    return (chunk_size, whole), (rest, 1)
