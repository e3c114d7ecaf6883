"""Checkpoint merging: averaging checkpoints of the stable phase instead of decaying the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from explore.archive import DamagedError, check_whole, load_checkpoint, read_weights
from explore.checkpoints import check_owner
from explore.experiment import Experiment
from explore.files import replacing, write_json
from explore.model import LanguageModel
from explore.runs import RunFolder
from explore.train.models import evaluate
from explore.train.schedule import stable_steps

Shape = Literal["flat", "minus_sqrt"]


class Window(NamedTuple):
    """Checkpoints to merge, by step, and their weights."""

    shape: Shape
    steps: tuple[int, ...]
    paths: tuple[Path, ...]
    weights: tuple[float, ...]


def decay_weights(n: int, shape: Shape) -> tuple[float, ...]:
    """Returns weights, with sum 1, under which an average of n equally spaced checkpoints imitates a decay.

    With theta_i the checkpoints, and a decay that multiplies the change from theta_i to theta_(i+1) by the factor
    f(i / n) of its schedule, f(0) = 1 and f(1) = 0, the decayed weights are, summed by parts,

        theta_1 + sum over i < n of f(i / n) (theta_(i+1) - theta_i) = sum over i of w_i theta_i
        w_i = f((i - 1) / n) - f(i / n),   i = 1 ... n.

    `flat` is f(p) = 1 - p, a linear decay: w_i = 1 / n. `minus_sqrt` is f(p) = 1 - sqrt(p):
    w_i = (sqrt(i) - sqrt(i - 1)) / sqrt(n), most for the earliest. The approximation: the changes are taken from the
    stable phase, as if the factor did not alter them.

    Source: warm-up-stable-merge, arXiv 2507.17634; there too, the weights express the decay.

    Raises:
        ValueError: the shape is unknown, or n is below 1.
    """
    if n < 1:
        raise ValueError(f"last must be at least 1 checkpoint, got {n}")
    match shape:
        case "flat":
            return (1 / n,) * n
        case "minus_sqrt":
            return tuple((math.sqrt(i) - math.sqrt(i - 1)) / math.sqrt(n) for i in range(1, n + 1))
        case _:
            raise ValueError(f"shape must be flat or minus_sqrt, got {shape!r}")


def merge_weights(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted average of checkpoints, buffers such as the routers' biases included.

    Floating-point tensors are summed in fp32; others are taken from the last checkpoint.
    """
    sums: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, tensor in read_weights(path).items():
            if not tensor.is_floating_point():
                sums[name] = tensor.clone()
            elif name in sums:
                sums[name].add_(tensor.float(), alpha=weight)
            else:
                sums[name] = weight * tensor.float()
    last = read_weights(paths[-1])
    return {name: tensor.to(last[name].dtype) for name, tensor in sums.items()}


def merge_window(folder: RunFolder, last: int = 5, shape: Shape = "minus_sqrt") -> Window:
    """Returns the last checkpoints that a run kept in its stable phase, after warm-up and before decay.

    Raises:
        ValueError: fewer were kept, one is damaged or belongs to another run, or the shape is unknown.
    """
    weights = decay_weights(last, shape)
    experiment = folder.load_experiment()
    stable = stable_steps(experiment.n_steps, experiment.train)
    found = {int(path.stem[5:]): path for path in (folder.path / "checkpoints").glob("step-*.ckpt")}
    kept = sorted(step for step in found if step in stable)
    if last > len(kept):
        hint = "" if kept else "; train with keep_every to keep some"
        raise ValueError(
            f"last must be at most {len(kept)}, the checkpoints that {folder.path} kept in its stable phase, "
            f"steps {stable.start} to {stable.stop - 1}, got {last}{hint}"
        )
    steps = tuple(kept[-last:])
    if len({b - a for a, b in pairwise(steps)}) > 1:
        raise ValueError(f"last: the last {last} checkpoints of {folder.path} are not equally far apart: steps {steps}")
    for step in steps:
        _check(found[step], folder)
    return Window(shape, steps, tuple(found[step] for step in steps), weights)


def _check(path: Path, folder: RunFolder) -> None:
    try:
        check_whole(path)
    except DamagedError as error:
        raise DamagedError(f"{error}; merge fewer, or train the run again") from None
    check_owner(path, load_checkpoint(path), folder.key, folder.path)


def score_merge(folder: RunFolder, last: int = 5, shape: Shape = "minus_sqrt", *, save: bool = False) -> dict[str, Any]:
    """Scores the merged model and the last of its checkpoints, and writes both into `merged.json`, by shape.

    Args:
        save: whether to save the merged weights as `checkpoints/merged.ckpt`.

    Returns:
        The entry of the shape in `merged.json`: shape, steps, weights, the scores as in `result.json`, and under `last`
        the scores of the last checkpoint.

    Raises:
        ValueError: fewer were kept, or the shape is unknown.
    """
    window = merge_window(folder, last, shape)
    experiment = folder.load_experiment()
    source = experiment.data.open(experiment.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    merged, result = merge_weights(window.paths, window.weights), folder.result or {}
    scores = evaluate(experiment, source, _model(experiment, merged).to(device))
    if folder.status == "finished" and result.get("step") == window.steps[-1]:
        before = {name: result.get(name) for name in scores}
    else:
        before = evaluate(experiment, source, _model(experiment, read_weights(window.paths[-1])).to(device))
    record = {"shape": shape, "steps": [*window.steps], "weights": [*window.weights], **scores, "last": before}
    if save:
        state = {f"model.{name}": tensor for name, tensor in merged.items()}
        with replacing(folder.path / "checkpoints" / "merged.ckpt") as temporary:
            torch.save({"state_dict": state, "global_step": window.steps[-1]}, temporary)
    write_json(folder.path / "merged.json", {**folder.merged, shape: record})
    return record


def _model(experiment: Experiment, weights: dict[str, Tensor]) -> LanguageModel:
    model = experiment.model.build()
    model.load_state_dict(weights)
    return model.eval()
