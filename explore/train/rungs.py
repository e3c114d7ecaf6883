"""Rungs: full checkpoints of the stable phase, from which any run with the same past can continue.

Under warm-up-stable-decay, the state of a run in its stable phase does not depend on the planned length of the run. A
rung is such a state with its own key, so that a shorter or longer sibling branches from it instead of starting over.

Source: warm-up-stable-decay, arXiv 2404.06395; decays of several lengths from one stable phase, arXiv 2405.18392.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from explore.archive import DamagedError, check_whole
from explore.checkpoints import BRANCH, LAST
from explore.experiment import Experiment
from explore.files import copy_whole, write_json
from explore.train.schedule import stable_steps

MOST_VALIDATIONS = 100_000


def curve_steps(experiment: Experiment, rungs: Sequence[float] = ()) -> dict[int, float]:
    """Returns the steps after which a run is validated, each with its fraction of the schedule.

    Raises:
        ValueError: validations would be too frequent, or a rung is outside the stable phase.
    """
    n_steps, every = experiment.n_steps, experiment.train.val_every
    if every is not None and n_steps // every > MOST_VALIDATIONS:
        raise ValueError(
            f"train.val_every: must be at least {n_steps // MOST_VALIDATIONS + 1} for {n_steps:,} steps, got {every}"
        )
    regular = {step: step / n_steps for step in range(every, n_steps + 1, every)} if every else {}
    return regular | rung_steps(experiment, rungs)


def rung_steps(experiment: Experiment, rungs: Sequence[float]) -> dict[int, float]:
    """Returns the number of steps at each of these fractions of the schedule.

    Raises:
        ValueError: a rung is outside the stable phase.
    """
    n_steps, stable = experiment.n_steps, stable_steps(experiment.n_steps, experiment.train)
    steps = {round(rung * n_steps): rung for rung in rungs}
    for step, rung in steps.items():
        if step < 1 or step not in stable:
            raise ValueError(
                f"rungs must be from {max(1, stable.start) / n_steps:.3g} to {(stable.stop - 1) / n_steps:.3g}, in the "
                f"stable phase, got {rung}, which is step {step} of {n_steps}"
            )
    return steps


def rung_path(runs: str | Path, experiment: Experiment, step: int) -> Path:
    """The path of an experiment's rung after `step` steps, beside the run folders."""
    return Path(runs) / "rungs" / f"{experiment.rung_key(step)}.ckpt"


def branch(runs: str | Path, experiment: Experiment, folder: Path) -> None:
    """Copies the furthest rung into a run that has no checkpoint yet, as its last checkpoint, and records the origin.

    A damaged rung is removed: it was a copy, and the next run that passes its step writes it again.
    """
    checkpoint, rungs = folder / "checkpoints" / LAST, Path(runs) / "rungs"
    if checkpoint.exists() or not rungs.is_dir():
        return
    stable = stable_steps(experiment.n_steps, experiment.train)
    found = {int(path.stem.rpartition("-")[2]) for path in rungs.glob("[!.]*-[0-9]*.ckpt")}
    for step in sorted((step for step in found if step in stable), reverse=True):
        rung = rung_path(runs, experiment, step)
        if not rung.exists():  # of another past
            continue
        try:
            check_whole(rung)
        except DamagedError:
            rung.unlink(missing_ok=True)
            continue
        write_json(folder / BRANCH, {"key": experiment.rung_key(step), "step": step})
        copy_whole(rung, checkpoint)
        return
