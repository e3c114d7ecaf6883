"""Weights of runs: read from checkpoints, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from explore.runs import RunFolder

if TYPE_CHECKING:
    from explore.model import LanguageModel


def load_model(run: RunFolder | str | Path) -> LanguageModel:
    """The trained model of a run, in evaluation mode.

    Raises:
        ValueError: the run has no checkpoint.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    path = folder.path / "checkpoints" / "last.ckpt"
    if not path.exists():
        raise ValueError(f"{folder.path}: no checkpoint; train the run first")
    model = folder.load_experiment().model.build()
    model.load_state_dict(read_weights(path))
    return model.eval()


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights and buffers in a checkpoint, by their names in the model."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits over names, dtypes, shapes and values of weights, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
