"""Two references in plain PyTorch: the recurrence of the definition, and the chunked form with matrix products.

Letters as in the README.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def ssd_scan_reference(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The recurrence, position by position, in the dtype of its inputs."""
    heads_per_group = X.shape[2] // B.shape[2]
    B, C = (M.repeat_interleave(heads_per_group, dim=2) for M in (B, C))
    H = X.new_zeros(*X.shape[:1], *X.shape[2:], B.shape[3]) if state is None else state
    outputs = []
    for t in range(X.shape[1]):
        added = (dt[:, t, :, None] * X[:, t])[..., None] * B[:, t, :, None, :]
        H = torch.exp(dt[:, t] * A)[..., None, None] * H + added
        outputs.append((H * C[:, t, :, None, :]).sum(-1) + D[:, None] * X[:, t])
    return torch.stack(outputs, dim=1), H


def ssd_scan_chunked(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    chunk_size: int,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """Listing 1 of arXiv 2405.21060 from a zero state, for a length that is a multiple of `chunk_size`.

    `bench` compiles it with PyTorch for comparison.
    """
    b, seq, h, p = X.shape
    g, n = B.shape[2:]
    c, q, r = seq // chunk_size, chunk_size, h // g
    Xc = X.reshape(b, c, q, g, r, p)
    cum = (dt * A).reshape(b, c, q, g, r).permute(0, 1, 3, 4, 2).contiguous().cumsum(dim=-1)  # b c g r q
    dtc = dt.reshape(b, c, q, g, r)
    Bc, Cc = (M.reshape(b, c, q, g, n).transpose(2, 3) for M in (B, C))  # b c g q n
    dtX = (Xc * dtc[..., None]).permute(0, 1, 3, 4, 2, 5)  # b c g r q p
    future = torch.ones(q, q, dtype=torch.bool, device=X.device).triu(1)
    L = (cum[..., :, None] - cum[..., None, :]).masked_fill(future, -torch.inf).exp()
    mixed = (Cc @ Bc.transpose(-1, -2))[:, :, :, None] * L
    Y = mixed.to(X.dtype) @ dtX.to(X.dtype)
    to_end = (cum[..., -1:] - cum).exp()[..., None]
    added = (dtX * to_end).to(X.dtype).transpose(-1, -2) @ Bc[:, :, :, None]  # b c g r p n
    H = added.new_zeros(b, g, r, p, n, dtype=torch.float32)
    before = []
    for k in range(c):
        before.append(H)
        H = cum[:, k, ..., -1].exp()[..., None, None] * H + added[:, k]
    states = torch.stack(before, dim=1).to(X.dtype)
    Y = Y + (Cc[:, :, :, None] @ states.transpose(-1, -2)) * cum.exp()[..., None]
    Y = Y.permute(0, 1, 4, 2, 3, 5).reshape(b, seq, h, p) + D[:, None] * X
    return Y.to(X.dtype), H.reshape(b, h, p, n)
