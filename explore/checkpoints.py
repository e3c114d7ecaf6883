"""Trained models of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from explore.runs import RunFolder
from explore.weights import read_weights

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
