"""Axes of every weight of a model: those of its blocks, under full weight names, and `d_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from explore.blocks import D_MODEL, WHOLE, BlockConfig, Dim
from explore.model.config import ModelConfig


class Place(NamedTuple):
    """The dimensions of a weight, and the layer and block they belong to.

    Attributes:
        layer: index of the layer; None outside the main layers, where `d_model` is the only axis that can be cut.
        block: config of the weight's layer, also in multi-token prediction; None outside layers.
    """

    layer: int | None
    block: BlockConfig | None
    dims: tuple[Dim, ...]


def model_layout(config: ModelConfig) -> Mapping[str, Place]:
    """Returns the place of every weight and buffer by name, including those that an option removes.

    Raises:
        ValueError: a kind of block declares no layout.
    """
    layout = {
        "embedding.weight": Place(None, None, (WHOLE, D_MODEL)),
        "norm.weight": Place(None, None, (D_MODEL,)),
        "head.weight": Place(None, None, (WHOLE, D_MODEL)),
    }
    for i, block in enumerate(config.layers):
        layout |= _layer(f"layers.{i}", block, i)
    for k in range(0 if config.mtp is None else config.mtp.n_stored):
        assert config.mtp is not None
        for name in ("embedding_norm", "hidden_norm", "norm"):
            layout[f"mtp.{k}.{name}.weight"] = Place(None, None, (D_MODEL,))
        layout[f"mtp.{k}.eh_proj.weight"] = Place(None, None, (D_MODEL, 2 * D_MODEL))
        for j, letter in enumerate(config.mtp.pattern):
            layout |= _layer(f"mtp.{k}.layers.{j}", config.blocks[letter], None)
    return layout


def _layer(name: str, block: BlockConfig, layer: int | None) -> dict[str, Place]:
    mixer = block.layout()
    if not mixer:
        raise ValueError(f"{name}: {block.label} declares no layout of its weights, so it cannot be cut")
    norm = {f"{name}.norm.weight": Place(layer, block, (D_MODEL,))}
    return norm | {f"{name}.mixer.{weight}": Place(layer, block, dims) for weight, dims in mixer.items()}
