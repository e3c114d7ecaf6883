"""Loads a sweep file: a Python file that states one question and maps a trial to an experiment."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import optuna
import pandas as pd
from pydantic import ValidationError

from explore.config import explain
from explore.experiment import Experiment
from explore.foreign import check_type
from explore.frontier.gate import Gate
from explore.quantities import objectives as allowed_objectives
from explore.quantities import unknown
from explore.search.samplers import DEFAULT_SAMPLER, SAMPLERS, Grid
from explore.search.spaces import PatternSpace
from explore.study.averages import Merging
from explore.study.budgets import Budgets, RejectedError, check_not_tied
from explore.study.code import own_modules, sweep_tree
from explore.study.learning_rates import LearningRates
from explore.study.parameters import parse_file, set_parameters
from explore.study.pruning import FrontPruner, check_prunable

if TYPE_CHECKING:
    from explore.figures import RunFigure

Direction = Literal["minimize", "maximize"]
TRIES = 200
"""Number of consecutive rejected samples after which a search space counts as exhausted."""


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file.

    Attributes:
        path: the file.
        question: its docstring.
        experiment: a pure function of an Optuna trial.
        objectives: quantities of `explore.quantities.objectives`, each with its direction.
        baselines: parameters of trials to run first.
        sampler: name of the default sampler.
        grid: values of every parameter, for the sampler `grid`.
        seeds: number of runs per trial, with seeds 0, 1 and so on; objectives are means over them.
        budgets: budgets that every trial meets; `experiment` gets its model from them.
        learning_rates: learning-rate search within every trial.
        pruner: stops runs by their learning curves.
        merging: averages and scores checkpoints of runs without a learning-rate decay.
        rungs: fractions of the schedule, within the stable phase, at which every run saves its full state. Later
            runs with the same past start from there.
        tables: function from the tables of runs and of minimal pairs, and from those of `curves` and `documents` if it
            has parameters of these names, to result tables by name.
        figure: function from the result tables to a figure.
        gate: condition that runs of the smallest size must meet before the sweep continues.
        parameters: values that replace those of parameters declared in the file.
        examples: the experiments of the baselines, and one drawn at random.
    """

    path: Path
    question: str
    experiment: Callable[[optuna.Trial], Experiment]
    objectives: Mapping[str, Direction]
    baselines: Sequence[Mapping[str, Any]] = ()
    sampler: str = DEFAULT_SAMPLER
    grid: Grid | None = None
    seeds: int = 1
    budgets: Budgets | None = None
    learning_rates: LearningRates | None = None
    pruner: FrontPruner | None = None
    merging: Merging | None = None
    rungs: Sequence[float] = ()
    tables: Callable[..., Mapping[str, pd.DataFrame]] | None = None
    figure: Callable[[Mapping[str, pd.DataFrame]], RunFigure] | None = None
    gate: Gate | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Experiment] = ()

    def __repr__(self) -> str:
        objectives = ", ".join(f"{name} {direction}d" for name, direction in self.objectives.items())
        return f"Sweep({self.path}, {objectives})"

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def first(self) -> Sequence[Mapping[str, Any]]:
        """The grid points that the gate examines and that are no baselines: those of the smallest size.

        If all points have one size, they are those of the gate's own arms, if the grid has the arms.
        """
        if self.gate is None or self.grid is None:
            return ()
        values: dict[str, list[Any]] = {name: list(each) for name, each in self.grid.items()}
        values |= {name: [value] for name, value in self.gate.where.items() if name in values}
        if len(sizes := values.get(self.gate.size, [])) > 1:
            values[self.gate.size] = [min(sizes)]
        elif self.gate.arm in values:
            values[self.gate.arm] = [each for each in self.gate.arms if each in values[self.gate.arm]]
        points = self._points(values).values()
        return tuple(params for params, _ in points if params not in [dict(each) for each in self.baselines])

    @cached_property
    def design(self) -> tuple[Experiment, ...]:
        """All experiments of the grid, those of the gate first."""
        points = self._points({name: list(each) for name, each in (self.grid or {}).items()}).values()
        return tuple(experiment for _, experiment in sorted(points, key=lambda point: point[0] not in self.first))

    def _points(self, values: Mapping[str, Sequence[Any]]) -> dict[str, tuple[dict[str, Any], Experiment]]:
        """Parameters and experiments of the points of a grid that are not rejected, by key."""
        found: dict[str, tuple[dict[str, Any], Experiment]] = {}
        for combination in itertools.product(*values.values()):
            params = dict(zip(values, combination, strict=True))
            try:
                experiment = self.experiment(optuna.trial.FixedTrial(params))  # type: ignore[arg-type]
            except RejectedError:
                continue
            found.setdefault(experiment.key(), (params, experiment))
        return found

    @property
    def code(self) -> str:
        """The file's code without parts that change no result: comments, layout, docstring and reporting functions."""
        return ast.unparse(sweep_tree(self.path, self.parameters))

    @property
    def modules(self) -> dict[str, str]:
        """Code, by module name, of the user's modules that the file imports."""
        return own_modules(sweep_tree(self.path))


def load_sweep(path: str | Path, parameters: Mapping[str, Any] | None = None, *, or_script: bool = False) -> Sweep:
    """Runs a sweep file and checks it by sampling one experiment, before anything is created.

    Args:
        parameters: values that replace those of parameters declared in the file; they make another study.
        or_script: accept a script that trains in its own way. It has no `experiment`, and only what makes its tables
            and figure is loaded.

    Raises:
        TypeError: `path` is not a path.
        ValueError: the file does not exist, fails (the message has the line), or lacks a name or has one of the wrong
            type.
    """
    check_type(path, (str, Path), "path must be the path of a sweep file")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such sweep file")
    module = _run(path, parameters or {})
    question = (module.__doc__ or "").strip()
    if not question:
        raise ValueError(f"{path}: a docstring that states the question is missing")
    experiment = getattr(module, "experiment", None)
    if experiment is None and or_script:
        names = ("seeds", "tables", "figure", "gate")
        return Sweep(path, question, _nothing, {}, **_options(path, module, names))
    if not callable(experiment):
        script = f"; if it is a script, run it with python {path}" if hasattr(module, "tables") else ""
        raise ValueError(f"{path}: a function experiment(trial) -> Experiment is missing{script}")
    sweep = Sweep(path, question, experiment, _objectives(path, module), **_options(path, module))
    sweep = dataclasses.replace(sweep, parameters=dict(parameters or {}))
    if sweep.pruner is not None:
        try:
            check_prunable(sweep.objectives)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return dataclasses.replace(sweep, examples=_examples(sweep))


def _nothing(trial: optuna.Trial) -> Experiment:
    raise RejectedError("a script trains in its own way")


def _options(path: Path, module: ModuleType, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The optional definitions that a sweep file has, checked.

    Args:
        names: which of them; None for all.
    """
    allowed: Mapping[str, tuple[type | tuple[type, ...], str]] = {
        "baselines": (Sequence, "a sequence of mappings from parameter to value"),
        "sampler": (str, f"one of {', '.join(SAMPLERS)}"),
        "grid": (Mapping, "a mapping from parameter to its values"),
        "seeds": (int, "a number of at least 1"),
        "budgets": (Budgets, "explore.study.Budgets"),
        "learning_rates": (LearningRates, "explore.study.LearningRates"),
        "pruner": (FrontPruner, "explore.study.FrontPruner"),
        "merging": (Merging, "explore.study.Merging"),
        "rungs": (tuple, "a tuple of fractions of the schedule"),
        "tables": (FunctionType, "a function from the tables of runs and of minimal pairs to tables by name"),
        "figure": (FunctionType, "a function from these tables to a figure"),
        "gate": (Gate, "explore.frontier.gate.Gate"),
    }
    found = {name: getattr(module, name) for name in names or allowed if hasattr(module, name)}
    for name, value in found.items():
        kind, words = allowed[name]
        wrong = not isinstance(value, kind)
        if wrong or (name == "seeds" and int(value) < 1) or (name == "sampler" and value not in SAMPLERS):
            raise ValueError(f"{path}: {name} must be {words}, got {value!r}")
    if found.get("sampler") == "grid" and "grid" not in found:
        raise ValueError(f"{path}: grid: the sampler 'grid' needs a mapping from parameter to its values")
    if "gate" in found and names is None:
        _check_gated(path, found["gate"], found.get("sampler"), found.get("grid", {}))
    return found


def _check_gated(path: Path, gate: Gate, sampler: str | None, grid: Grid) -> None:
    """Checks that a sweep can train the trials first that its gate examines."""
    if sampler != "grid":
        raise ValueError(f"{path}: gate: must come with sampler = 'grid', got {sampler!r}")
    if gate.size not in grid and gate.arm not in grid:
        raise ValueError(f"{path}: gate: must come with a grid that has {gate.size!r} or {gate.arm!r}")
    if any(isinstance(values, PatternSpace) for values in grid.values()):
        raise ValueError(f"{path}: gate: must come with a grid of plain values, got one of patterns")


def _run(path: Path, parameters: Mapping[str, Any]) -> ModuleType:
    """Executes a file as a module without importing it; an import could write, or use old, compiled code next to it."""
    if path.suffix != ".py":
        raise ValueError(f"{path}: a sweep file ends in .py")
    module = ModuleType(f"sweep_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}")
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module
    tree = parse_file(path)
    if parameters:
        tree = set_parameters(tree, path, parameters)
    try:
        exec(compile(tree, path, "exec", dont_inherit=True), vars(module))
    except Exception as error:
        raise ValueError(f"{path}: {reason(error, path)}") from error
    return module


def _objectives(path: Path, module: ModuleType) -> Mapping[str, Direction]:
    objectives = getattr(module, "objectives", None)
    if not isinstance(objectives, Mapping) or not objectives:
        raise ValueError(f'{path}: objectives are missing, such as {{"val_bpb": "minimize", "flops_run": "minimize"}}')
    for column, direction in objectives.items():
        if column not in (allowed := allowed_objectives()):
            raise unknown(column, list(allowed), f"{path}: objectives")
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"{path}: objectives.{column} must be minimize or maximize, got {direction!r}")
    return objectives


def _examples(sweep: Sweep) -> tuple[Experiment, ...]:
    """Checks a sweep by making the experiments of its baselines, and one drawn at random."""
    examples = []
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
        try:
            check_not_tied(sweep.objectives, sweep.budgets, experiment)
        except ValueError as error:
            raise ValueError(f"{sweep.path}: {error}") from None
        examples.append(experiment)
        if not is_baseline:
            return tuple(examples)
    raise ValueError(f"{sweep.path}: {TRIES} samples in a row were rejected; the bounds leave no experiment")


def reason(error: BaseException, path: Path | None = None) -> str:
    """One line on what went wrong, with the line number in the sweep file if the error passed through it."""
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
