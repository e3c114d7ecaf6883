"""The block kinds that patterns use. To add one, write a file here and add an entry to `BLOCKS`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from explore.blocks.attention import Attention, AttentionConfig
from explore.blocks.base import BlockConfig, Linear, Mixer, RMSNorm, RoutedMixer, RouterStats
from explore.blocks.declarations import (
    D_MODEL,
    ROLES,
    WHOLE,
    Axis,
    Dim,
    Draw,
    FusedNorm,
    Group,
    Layout,
    Powers,
    Probe,
    Role,
    Stops,
    Uncounted,
    ladder,
)
from explore.blocks.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from explore.blocks.latent import latent_acc, latent_eff
from explore.blocks.linear_map import LinearMapConfig
from explore.blocks.mamba2 import Mamba2, Mamba2Config
from explore.blocks.mla import MLA, MLAConfig
from explore.blocks.mlp import MLP, MLPConfig
from explore.blocks.moe import MoE, MoEConfig
from explore.blocks.sliding_window import SlidingWindowConfig
from explore.blocks.state import KVCache, LatentCache, RecurrentState, State, WindowCache


class BlockKind(NamedTuple):
    """A kind of block: its standard letter (Megatron's, if it has one), its config, and a small example."""

    letter: str
    config: type[BlockConfig]
    example: BlockConfig


BLOCKS: tuple[BlockKind, ...] = (
    BlockKind("M", Mamba2Config, Mamba2Config(n_heads=4, d_head=8, d_state=16, n_groups=2, chunk_size=16)),
    BlockKind("G", GatedDeltaNetConfig, GatedDeltaNetConfig(n_heads=4, n_key_heads=2, d_k=8, d_v=12, chunk_size=16)),
    BlockKind("*", AttentionConfig, AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8)),
    BlockKind("W", SlidingWindowConfig, SlidingWindowConfig(n_heads=4, n_kv_heads=2, d_head=8, window=6)),
    BlockKind("L", MLAConfig, MLAConfig(n_heads=4, q_rank=12, kv_rank=16, d_nope=8, d_rope=4, d_v=8)),
    BlockKind("-", MLPConfig, MLPConfig(d_ff=48)),
    BlockKind("E", MoEConfig, MoEConfig(n_experts=8, top_k=2, d_expert=24, d_shared=32, d_latent=16)),
    BlockKind("P", LinearMapConfig, LinearMapConfig()),
)
"""Patterns, JSON, cost tables, figures and tests read this."""

STANDARD_LETTERS: Mapping[str, type[BlockConfig]] = {kind.letter: kind.config for kind in BLOCKS}

KINDS: Mapping[str, type[BlockConfig]] = {kind.config.model_fields["kind"].default: kind.config for kind in BLOCKS}
"""Config classes by the `kind` field of their JSON."""

GROUPS: Mapping[str, Group] = {
    name: group
    for role in ROLES
    for kind in BLOCKS
    if kind.config.role == role
    for name, group in kind.config.groups.items()
}
"""Component groups of all kinds, in the order a bar stacks them; groups of one role are adjacent."""

if TYPE_CHECKING:
    AnyBlock = BlockConfig
else:
    AnyBlock = Annotated[reduce(or_, (kind.config for kind in BLOCKS)), Field(discriminator="kind")]

__all__ = [
    "BLOCKS",
    "D_MODEL",
    "GROUPS",
    "KINDS",
    "MLA",
    "MLP",
    "ROLES",
    "STANDARD_LETTERS",
    "WHOLE",
    "AnyBlock",
    "Attention",
    "AttentionConfig",
    "Axis",
    "BlockConfig",
    "BlockKind",
    "Dim",
    "Draw",
    "FusedNorm",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "Group",
    "KVCache",
    "LatentCache",
    "Layout",
    "Linear",
    "LinearMapConfig",
    "MLAConfig",
    "MLPConfig",
    "Mamba2",
    "Mamba2Config",
    "Mixer",
    "MoE",
    "MoEConfig",
    "Powers",
    "Probe",
    "RMSNorm",
    "RecurrentState",
    "Role",
    "RoutedMixer",
    "RouterStats",
    "SlidingWindowConfig",
    "State",
    "Stops",
    "Uncounted",
    "WindowCache",
    "ladder",
    "latent_acc",
    "latent_eff",
]
