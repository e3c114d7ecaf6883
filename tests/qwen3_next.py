"""Weights of transformers' Qwen3-Next under our names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from explore.blocks import GatedDeltaNetConfig


def gated_deltanet_weights(theirs: Mapping[str, Tensor], config: GatedDeltaNetConfig) -> dict[str, Tensor]:
    """Weights of a Gated DeltaNet layer.

    Rows of their input projections come key head by key head, each with its queries, keys, values and gates; ours come
    all queries first, then all keys, values, gates z, b and a.
    """
    g, r = config.n_key_heads, config.n_heads // config.n_key_heads
    qkvz = _by_role(theirs["in_proj_qkvz.weight"], g, (config.d_k, config.d_k, r * config.d_v, r * config.d_v))
    kept = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    in_proj = torch.cat((qkvz, _by_role(theirs["in_proj_ba.weight"], g, (r, r))))
    return {"in_proj.weight": in_proj} | {name: theirs[name] for name in kept}


def _by_role(weight: Tensor, n_key_heads: int, rows: tuple[int, ...]) -> Tensor:
    """Rows that are grouped by key head, grouped by what they are for instead.

    Args:
        rows: of a key head, for each role.
    """
    return torch.cat([part.flatten(0, 1) for part in weight.unflatten(0, (n_key_heads, -1)).split(rows, dim=1)])
