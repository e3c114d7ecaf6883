"""Maps rows of the sorted choices to tokens, experts and tiles, all on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from explore.kernels.routed_experts.products import MAX_ROWS


class Routing(NamedTuple):
    """The n = t k choices sorted by expert, and the tiles of rows that cover them, one expert per tile.

    Attributes:
        choice: index in the flattened (t, k) of each sorted row; n int32.
        token: token of each sorted row; n int32.
        bounds: first row of each expert, and n; e + 1 int32.
        tile_expert: expert of each tile; e for an unused tile.
        tile_row: first row of each tile.
        rows: rows per tile.
        top_k: choices per token.
    """

    choice: Tensor
    token: Tensor
    bounds: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    rows: int
    top_k: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self[:5]


def route(chosen: Tensor, n_experts: int, dtype: torch.dtype) -> Routing:
    """Sorts the choices and cuts each expert's rows into tiles.

    The number of tiles depends on the data, and the host would have to wait for it. So the maximum number is launched,
    and unused tiles return at once. `bincount` would wait too, so bounds are found by binary search.
    """
    n, top_k = chosen.numel(), chosen.shape[1]
    rows = tile_rows(n, n_experts, dtype)
    expert, choice = chosen.flatten().to(torch.int32).sort(stable=True)
    bounds = torch.searchsorted(expert, _count(n_experts + 1, chosen), out_int32=True)
    tiles = (bounds.diff() + rows - 1) // rows
    ends = tiles.cumsum(0, dtype=torch.int32)
    tile = _count(max_tiles(n, n_experts, rows), chosen)
    tile_expert = torch.searchsorted(ends, tile, right=True, out_int32=True)
    owner = tile_expert.clamp(max=n_experts - 1)
    tile_row = bounds[owner] + (tile - (ends - tiles)[owner]) * rows
    choice = choice.to(torch.int32)
    return Routing(choice, choice // top_k, bounds, tile_expert, tile_row, rows, top_k)


def tile_rows(n: int, n_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: the mean load as a power of two, between 16 (the minimum for tensor cores) and the maximum."""
    most = MAX_ROWS if dtype.itemsize == 2 else MAX_ROWS // 2
    return min(most, max(16, int(triton.next_power_of_2(triton.cdiv(n, n_experts)))))


def max_tiles(n: int, n_experts: int, rows: int) -> int:
    """Maximum number of tiles: every expert's last tile holds at least one row."""
    return (n + min(n, n_experts) * (rows - 1)) // rows


def _count(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=like.device)
