"""A sweep file: one question, as a Python file that says how a trial becomes an experiment."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import optuna
from pydantic import ValidationError

from explore.config import explain
from explore.experiment import Experiment
from explore.runs import COLUMNS

Direction = Literal["minimize", "maximize"]
TRIES = 200
"""Samples that may be rejected in a row before a search space counts as exhausted."""


class RejectedError(ValueError):
    """A sweep file's answer to a trial that must not be trained, with the reason; it costs nothing."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file defines.

    Attributes:
        path: the file.
        question: its docstring.
        experiment: a pure function of an Optuna trial.
        objectives: columns of the table of runs, and which way is better.
        baselines: parameters of trials that are run first.
    """

    path: Path
    question: str
    experiment: Callable[[optuna.Trial], Experiment]
    objectives: Mapping[str, Direction]
    baselines: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.path.stem


def load_sweep(path: Path) -> Sweep:
    """Runs a sweep file and checks it by sampling one experiment, before anything is created.

    Raises:
        ValueError: no such file, an error in it by its line, or a name that is missing or of the wrong kind.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such sweep file")
    module = _run(path)
    question = (module.__doc__ or "").strip()
    if not question:
        raise ValueError(f"{path}: a docstring that states the question is missing")
    experiment = getattr(module, "experiment", None)
    if not callable(experiment):
        raise ValueError(f"{path}: a function experiment(trial) -> Experiment is missing")
    sweep = Sweep(path, question, experiment, _objectives(path, module), tuple(getattr(module, "baselines", ())))
    _check(sweep)
    return sweep


def _run(path: Path) -> ModuleType:
    name = f"sweep_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: a sweep file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: {reason(error, path)}") from error
    return module


def _objectives(path: Path, module: ModuleType) -> Mapping[str, Direction]:
    objectives = getattr(module, "objectives", None)
    if not isinstance(objectives, Mapping) or not objectives:
        raise ValueError(f'{path}: objectives are missing, such as {{"val_bpb": "minimize", "flops_run": "minimize"}}')
    for column, direction in objectives.items():
        if COLUMNS.get(column) not in ("float64", "Int64"):
            numeric = ", ".join(name for name, dtype in COLUMNS.items() if dtype in ("float64", "Int64"))
            raise ValueError(
                f"{path}: objectives: {column!r} is not a number in the table of runs; allowed are {numeric}"
            )
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"{path}: objectives.{column}: {direction!r} is not allowed; minimize and maximize are")
    return objectives


def _check(sweep: Sweep) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    scratch = optuna.create_study(
        directions=list(sweep.objectives.values()), sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for baseline in sweep.baselines:
        scratch.enqueue_trial(dict(baseline))
    for attempt in range(len(sweep.baselines) + TRIES):
        is_baseline = attempt < len(sweep.baselines)
        try:
            experiment = sweep.experiment(scratch.ask())
        except RejectedError as rejection:
            if is_baseline:
                raise ValueError(f"{sweep.path}: baseline {attempt} is rejected: {rejection}") from None
            continue
        except Exception as error:
            raise ValueError(f"{sweep.path}: experiment(trial): {reason(error, sweep.path)}") from error
        if not isinstance(experiment, Experiment):
            raise ValueError(f"{sweep.path}: experiment(trial) returned {type(experiment).__name__}, not an Experiment")
        if not is_baseline:
            return
    raise ValueError(f"{sweep.path}: {TRIES} samples in a row were rejected; the bounds leave no experiment")


def reason(error: BaseException, path: Path | None = None) -> str:
    """One line that says what went wrong, with the line of the sweep file where it passed through it."""
    message = explain(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
    text = message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if path is not None and traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return text if line is None else f"line {line}: {text}"
