"""Weight names here and in nemotron_h, and reading of checkpoints in either of its two namings.

In transformers' modules the experts of a layer are one tensor (`experts.up_proj`) and the trunk is `model`; in
released files, and in what transformers writes, every expert has its own (`experts.0.up_proj.weight`) and the trunk
is `backbone`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from explore.blocks import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, MoEConfig
from explore.model import ModelConfig

Shape = tuple[int, ...]
HEAD, EMBEDDING = "lm_head.weight", "model.embeddings.weight"


class Rename(NamedTuple):
    """One weight: its name here, its name in transformers' modules, and whether its last two axes are swapped."""

    ours: str
    theirs: str
    transposed: bool = False


_MIXERS: Mapping[type[BlockConfig], tuple[Rename, ...]] = {
    Mamba2Config: tuple(
        Rename(name, name)
        for name in (
            *("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight"),
            "out_proj.weight",
        )
    ),
    AttentionConfig: tuple(Rename(f"{name}_proj.weight", f"{name}_proj.weight") for name in "qkvo"),
    MLPConfig: (Rename("up.weight", "up_proj.weight"), Rename("down.weight", "down_proj.weight")),
    MoEConfig: (
        Rename("router.weight", "gate.weight"),
        Rename("expert_bias", "gate.e_score_correction_bias"),
        Rename("up", "experts.up_proj", transposed=True),
        Rename("down", "experts.down_proj", transposed=True),
        Rename("latent_down.weight", "fc1_latent_proj.weight"),
        Rename("latent_up.weight", "fc2_latent_proj.weight"),
        Rename("shared.up.weight", "shared_experts.up_proj.weight"),
        Rename("shared.down.weight", "shared_experts.down_proj.weight"),
    ),
}


def renames(config: ModelConfig) -> list[Rename]:
    """Every weight of a model, multi-token prediction included."""
    found = [Rename("embedding.weight", EMBEDDING)]
    for i, letter in enumerate(config.pattern):
        found += _layer(config.blocks[letter], f"layers.{i}", f"model.layers.{i}")
    found += [Rename("norm.weight", "model.norm_f.weight"), Rename("head.weight", HEAD)]
    if config.mtp is not None:
        n = len(config.mtp.pattern)
        for k in range(config.mtp.n_stored):
            first, last = f"mtp.layers.{k * n}", f"mtp.layers.{(k + 1) * n - 1}"
            found += [
                Rename(f"mtp.{k}.embedding_norm.weight", f"{first}.enorm.weight"),
                Rename(f"mtp.{k}.hidden_norm.weight", f"{first}.hnorm.weight"),
                Rename(f"mtp.{k}.eh_proj.weight", f"{first}.eh_proj.weight"),
                Rename(f"mtp.{k}.norm.weight", f"{last}.final_layernorm.weight"),
            ]
            for i, letter in enumerate(config.mtp.pattern):
                found += _layer(config.blocks[letter], f"mtp.{k}.layers.{i}", f"mtp.layers.{k * n + i}")
    return found


def _layer(block: BlockConfig, ours: str, theirs: str) -> Iterator[Rename]:
    yield Rename(f"{ours}.norm.weight", f"{theirs}.norm.weight")
    for rename in _MIXERS[type(block)]:
        if "latent" in rename.ours and isinstance(block, MoEConfig) and block.d_latent is None:
            continue
        yield Rename(f"{ours}.mixer.{rename.ours}", f"{theirs}.mixer.{rename.theirs}", rename.transposed)


def to_theirs(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Copies this kit's tensors (weights or gradients) under the names of transformers' modules."""
    return {theirs: _copy(tensors[ours], transposed) for ours, theirs, transposed in renames(config)}


def to_ours(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Copies transformers' tensors under this kit's names."""
    return {ours: _copy(tensors[theirs], transposed) for ours, theirs, transposed in renames(config)}


def as_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of transformers' modules as in files, with one tensor per expert."""
    released = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^model\.", "backbone.", name)
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            parent, _, projection = name.rpartition(".")
            released.update({f"{parent}.{e}.{projection}.weight": w.contiguous() for e, w in enumerate(tensor)})
        else:
            released[name] = tensor
    return released


def read_checkpoint(
    config: ModelConfig, shapes: Mapping[str, Shape], load: Callable[[str], Tensor], where: str
) -> dict[str, Tensor]:
    """Builds this kit's state dict from a checkpoint in either naming; checks all tensors before reading any.

    Args:
        shapes: shape of every tensor in the checkpoint, by its name there.
        load: reads one tensor.
        where: name of the checkpoint in errors.

    Raises:
        ValueError: a tensor is missing, unexpected or of the wrong shape, or a tied head differs from the embedding.
    """
    named = {re.sub(r"^backbone\.", "model.", name): name for name in shapes}
    if twice := [name for name in shapes if name not in named.values()]:
        raise ValueError(f"{where}: tensor {twice[0]} is there twice, under backbone and under model")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in config.build().state_dict().items()}
    single: dict[str, str] = {}
    stacked: dict[str, list[str]] = {}
    for ours, theirs, transposed in renames(config):
        shape = expected[ours]
        if transposed:
            shape = (shape[0], shape[2], shape[1])
        if theirs == HEAD and config.tie_embeddings and HEAD not in named:
            continue
        if transposed and theirs not in named:
            parent, _, projection = theirs.rpartition(".")
            parts = [f"{parent}.{e}.{projection}.weight" for e in range(shape[0])]
            stacked[theirs] = [_claim(part, named, shapes, shape[1:], where) for part in parts]
        else:
            single[theirs] = _claim(theirs, named, shapes, shape, where)
    if named:
        extra = next(iter(named.values()))
        more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        raise ValueError(f"{where}: tensor {extra} has no place in the model of its config{more}")
    tensors = {theirs: load(name) for theirs, name in single.items()}
    tensors |= {theirs: torch.stack([load(name) for name in names]) for theirs, names in stacked.items()}
    if config.tie_embeddings and not torch.equal(tensors.setdefault(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING]):
        raise ValueError(
            f"{where}: {HEAD} differs from {EMBEDDING} though tie_word_embeddings is true; with false it can be read"
        )
    return to_ours(tensors, config)


def _claim(name: str, named: dict[str, str], shapes: Mapping[str, Shape], shape: Shape, where: str) -> str:
    """Removes a tensor from the unused ones and returns its name in the checkpoint."""
    if name not in named:
        raise ValueError(f"{where}: tensor {name} is missing")
    if (found := tuple(shapes[named[name]])) != shape:
        raise ValueError(f"{where}: tensor {named[name]} has the shape {found}; {shape} is needed")
    return named.pop(name)


def _copy(tensor: Tensor, transposed: bool) -> Tensor:
    tensor = tensor.detach()
    return (tensor.transpose(-1, -2) if transposed else tensor).clone(memory_format=torch.contiguous_format)
