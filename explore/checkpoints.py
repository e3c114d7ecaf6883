"""Checkpoints of runs: which one to resume from, the state of the run in it, and the model of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from explore.archive import DamagedError, check_whole, load_checkpoint, weights_in
from explore.files import read_json
from explore.precision import Recipe
from explore.runs import RunFolder, find_run
from explore.weights import check_shapes, weights_digest

if TYPE_CHECKING:
    from explore.model import LanguageModel, ModelConfig

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""Checkpoint files from which a run resumes: the last one, and the previous one until the run ends."""

RESUMED = ("optimizer_states", "loops", "pytorch-lightning_version")
"""What Lightning needs in a checkpoint to resume, besides weights and step."""

BRANCH = "branch.json"
"""File of a run folder that names the rung from which the run branched."""


class Standing(NamedTuple):
    """The state of a run in its checkpoint.

    Attributes:
        step: optimizer steps done.
        files: texts, up to this step, of the files that grow with the run, by name; None in checkpoints of versions
            that did not store them.
    """

    step: int
    files: Mapping[str, str] | None


def last_whole(folder: Path) -> tuple[Path | None, str | None]:
    """Finds the checkpoint to resume from: the last in the folder, or the previous one if that is damaged.

    Returns:
        The path, or None without a checkpoint; and a note for the user if it is not the last, else None.

    Raises:
        DamagedError: there are checkpoints, and all are damaged.
    """
    damage: DamagedError | None = None
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            check_whole(path)
        except DamagedError as error:
            damage = damage or error
        else:
            return path, None if damage is None else f"{damage}; the run resumes from the previous checkpoint"
    if damage is not None:
        raise DamagedError(f"{damage}, and there is no other; delete {folder} to train from the start")
    return None, None


def standing(path: Path, key: str, folder: Path, config: ModelConfig) -> Standing:
    """Reads the state of the run with this key from a checked checkpoint; a missing one means the start.

    Args:
        folder: folder of the run.
        config: model of the run.

    Raises:
        ValueError: the checkpoint belongs to another experiment or model, or lacks what a resumed run needs.
    """
    if not path.exists():
        return Standing(0, {})
    content = load_checkpoint(path)
    if type(step := content.get("global_step")) is not int or step < 0:
        raise ValueError(f"{path}: must be a checkpoint, with the number of optimizer steps in global_step")
    is_own = check_owner(path, content, key, folder)
    with torch.device("meta"):
        check_shapes(config.build().state_dict(), weights_in(content), str(path))
    if missing := [name for name in RESUMED if name not in content]:
        raise ValueError(f"{path}: must have all that a resumed run needs, but {missing[0]} is missing")
    return Standing(step, content.get("files") if is_own else {})


def load_model(run: RunFolder | str | Path) -> LanguageModel:
    """Loads the model of a run in evaluation mode. A quantised model is rebuilt from its parent's weights.

    Raises:
        ValueError: the run has no checkpoint, or one that is damaged or belongs to another experiment; or the parent of
            a quantised run is not beside it with its original weights.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    if record := folder.quantized:
        return _quantized(folder, record)
    path = folder.path / "checkpoints" / LAST
    if not path.exists():
        raise ValueError(f"{folder.path}: no checkpoint; train the run first")
    try:
        check_whole(path)
    except DamagedError as error:
        raise DamagedError(f"{error}; delete it and result.json, and train the run again") from None
    content = load_checkpoint(path)
    check_owner(path, content, folder.key, folder.path)
    model, weights = folder.load_experiment().model.build(), weights_in(content)
    check_shapes(model.state_dict(), weights, str(path))
    model.load_state_dict(weights)
    return model.eval()


def check_owner(path: Path, content: Mapping[str, Any], key: str | None, folder: Path) -> bool:
    """Whether a checkpoint was written by the run of this key (True) or by the run from which it branched (False).

    Args:
        folder: of the run.

    Raises:
        ValueError: neither of them has written it.
    """
    owner = content.get("key", key)  # checkpoints of earlier versions have no key
    if owner == key:
        return True
    branched = branched_from(folder)
    if branched is None or branched["step"] != content["global_step"]:
        raise ValueError(
            f"{path}: must be of the experiment {str(key)[:8]}, got a checkpoint of {str(owner)[:8]}; "
            "delete it to train from the start"
        )
    return False


def branched_from(folder: Path) -> dict[str, Any] | None:
    """Key and step of the rung from which a run branched, or None if it did not branch."""
    return read_json(folder / BRANCH) if (folder / BRANCH).exists() else None


def _quantized(folder: RunFolder, record: dict[str, Any]) -> LanguageModel:
    from explore.model import QuantizedModel

    about = record["parent"]
    parent = find_run(folder.path.resolve().parent, about["key"])
    if parent is None:
        raise ValueError(
            f"{folder.path}: the run {about['run']} must be beside it: it has the weights that are quantised"
        )
    model = load_model(parent)
    if (digest := weights_digest(model.state_dict())) != about["digest"]:
        raise ValueError(
            f"{folder.path}: the digest of the weights of {about['run']} must be {about['digest'][:12]}, "
            f"got {digest[:12]}"
        )
    recipe = Recipe.model_validate(record["recipe"])
    made = QuantizedModel(model, record["scales"], square_weights=recipe.square_weights, amax=record["amax"])
    made.apply(recipe, record["seed"])
    return model
