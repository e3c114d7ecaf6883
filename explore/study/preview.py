"""Preview of a sweep: the size of its space, its cost on this machine, and the differences it can resolve."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from explore import train
from explore.data import TextData, TextSource
from explore.evals.ngram import EVALUATED
from explore.experiment import Experiment
from explore.files import temporary_beside
from explore.frontier import fit_noise
from explore.frontier.intervals import resolvable
from explore.runs import PILOTS, RunFolder, find_runs
from explore.search.spaces import PatternSpace
from explore.study.budgets import RejectedError
from explore.study.sweep_file import Sweep
from explore.terminal import plain_console

PROBES = 400
MEASURED = 4
STEPS = 6


@dataclass(frozen=True)
class SeedNoise:
    """Spread between seeds of one experiment, at the cheapest and the most expensive of a sweep's examples.

    Attributes:
        sd: standard deviations of one run, in bits per byte.
        dof: degrees of freedom of `sd`.
        n: number of experiments run with more than one seed.
        kind: how the noise depends on training FLOPs, as in `explore.frontier.fit_noise`.
        bartlett_p: p value of Bartlett's test that the noise is equal at all sizes.
    """

    sd: tuple[float, float]
    dof: tuple[float, float]
    n: int
    kind: str
    bartlett_p: float

    def resolvable(self, seeds: int) -> tuple[float, float]:
        """Smallest difference between two trials of `seeds` seeds that a 5% test detects with 80% power."""
        low, high = (resolvable(sd * math.sqrt(2 / seeds), dof) for sd, dof in zip(self.sd, self.dof, strict=True))
        return low, high


@dataclass(frozen=True)
class Preview:
    """The preview of a sweep.

    Attributes:
        n_feasible: estimated number of feasible architectures; infinite if a parameter is continuous.
        n_feasible_error: standard error of the estimate.
        continuous: names of the continuous parameters.
        rejected: share of draws rejected before training.
        why: the most frequent reasons for rejection, with their counts.
        examples: example experiments, cheapest first.
        flops: training FLOPs of all trials, all seeds included; a trunk that runs share counts once.
        pilot_flops: training FLOPs of the learning-rate search, estimated with three pilots per trial.
        wall_s: expected seconds of the sweep on this machine; None if nothing was measured.
        noise: spread between seeds; None without runs of several seeds.
        differences: smallest resolvable difference between two trials, in bits per byte, for the cheapest and for the
            most expensive examples.
    """

    n_feasible: float
    n_feasible_error: float
    continuous: tuple[str, ...]
    rejected: float
    why: tuple[tuple[str, int], ...]
    examples: tuple[Experiment, ...]
    flops: float
    pilot_flops: float
    wall_s: float | None
    noise: SeedNoise | None
    differences: tuple[float, float] | None


class _Prober(optuna.samplers.RandomSampler):
    """Draws at random and multiplies the numbers of choices along each path.

    The mean product, counting infeasible probes as 0, estimates the number of feasible leaves in the tree of choices.
    Source: Knuth, Estimating the efficiency of backtrack programs, 1975.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.rng = np.random.default_rng(seed)
        self.letters: dict[str, str] = {}
        self.log_leaves, self.continuous = 0.0, set[str]()

    def start(self) -> None:
        """Begins a new probe."""
        self.letters, self.log_leaves = {}, 0.0

    def plan(self, trial: optuna.Trial, space: PatternSpace, name: str) -> None:
        self.letters |= space.params(space.draw(self.rng), name)
        self.log_leaves += math.log(space.size)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self.letters:
            return self.letters[param_name]
        match param_distribution:
            case CategoricalDistribution():
                self.log_leaves += math.log(len(param_distribution.choices))
            case IntDistribution():  # a logarithmic one has step 1
                n = (param_distribution.high - param_distribution.low) // param_distribution.step + 1
                self.log_leaves += math.log(n)
            case FloatDistribution(step=float(step)):
                self.log_leaves += math.log(round((param_distribution.high - param_distribution.low) / step) + 1)
            case FloatDistribution():
                self.continuous.add(param_name)
        return super().sample_independent(study, trial, param_name, param_distribution)


def preview(
    sweep: Sweep, n_trials: int, runs: Path, *, workers: int = 1, measure: bool = True, seed: int = 0
) -> Preview:
    """Probes the space of a sweep and times a few of its experiments in a temporary folder beside that of its runs.

    Args:
        runs: folder of the sweep's runs, which need not exist yet; the spread between seeds is estimated from them.
        workers: number of processes that would share the cores.
        measure: time experiments; without it, `wall_s` is None.
    """
    prober = _Prober(seed)
    study = optuna.create_study(directions=list(sweep.objectives.values()), sampler=prober)
    found: dict[str, Experiment] = {}
    leaves, why = [], Counter[str]()
    for _ in range(PROBES):
        prober.start()
        try:
            experiment = sweep.experiment(study.ask())
        except RejectedError as rejection:
            why[str(rejection)] += 1
            leaves.append(0.0)
            continue
        found.setdefault(experiment.key(), experiment)
        leaves.append(math.exp(prober.log_leaves))
    by_cost = sorted(found.values(), key=lambda each: each.flops_run)
    mean_flops = statistics.fmean(each.flops_run for each in by_cost)
    runs_each = n_trials * sweep.seeds
    own, pilots = 1 - _shared(sweep, by_cost), 3 * _pilots(sweep, by_cost)
    examples = _spread(by_cost, MEASURED)
    costs = (examples[0].flops_run, examples[-1].flops_run)
    noise = seed_noise(runs, costs) if runs.is_dir() else None
    run_s = _measured_s(examples, by_cost, workers, runs) if measure else None
    infinite = bool(prober.continuous)
    return Preview(
        n_feasible=math.inf if infinite else statistics.fmean(leaves),
        n_feasible_error=math.nan if infinite else statistics.stdev(leaves) / math.sqrt(len(leaves)),
        continuous=tuple(sorted(prober.continuous)),
        rejected=why.total() / PROBES,
        why=tuple(why.most_common(3)),
        examples=examples,
        flops=mean_flops * own * runs_each,
        pilot_flops=pilots * mean_flops * n_trials,
        wall_s=None if run_s is None else run_s * (own * runs_each + pilots * n_trials) / workers,
        noise=noise,
        differences=None if noise is None else noise.resolvable(sweep.seeds),
    )


def _shared(sweep: Sweep, population: Sequence[Experiment]) -> float:
    """Fraction of the training FLOPs that branches do not spend, since another run has trained their trunk."""
    trunks, shared = set[str](), 0.0
    for each in population:
        for rung in sorted(sweep.rungs, reverse=True):
            step = round(rung * each.n_steps)
            if (trunk := each.rung_key(step)) in trunks:
                shared += each.flops_run * step / each.n_steps
                break
            trunks.add(trunk)
    return shared / sum(each.flops_run for each in population)


def _pilots(sweep: Sweep, population: Sequence[Experiment]) -> float:
    """Training FLOPs of one pilot per trial, as a fraction of those of a run; trials may share pilots."""
    if (rates := sweep.learning_rates) is None:
        return 0.0
    return rates.share * len({rates.pilot(each, rates.start).key() for each in population}) / len(population)


def seed_noise(runs: Path, costs: tuple[float, float]) -> SeedNoise | None:
    """The spread of `val_bpb` between seeds, from the finished runs below a folder.

    Args:
        costs: training FLOPs at which to estimate the spread.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        folders: Sequence[RunFolder] = find_runs(runs)
    except ValueError:
        return None
    for folder in folders:
        row, record = folder.row(), dict(folder.experiment.get("experiment") or {})
        if row["status"] == "finished" and isinstance(row["val_bpb"], float):
            record.pop("seed", None)
            record.pop("name", None)
            groups[repr(sorted(record.items()))].append((row["val_bpb"], row["flops_run"]))
    repeated = [np.array(values) for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    unknown = np.zeros(len(costs))  # sizes without repeats of their own
    squares = np.array([((each[:, 0] - each[:, 0].mean()) ** 2).sum() for each in repeated])
    dof = np.array([len(each) - 1.0 for each in repeated])
    sizes = np.array([*(each[:, 1].mean() for each in repeated), *costs])
    noise = fit_noise(np.append(squares, unknown), np.append(dof, unknown), sizes)
    sd, found = noise.sd[-2:].tolist(), noise.dof[-2:].tolist()
    return SeedNoise((sd[0], sd[1]), (found[0], found[1]), len(repeated), noise.kind, noise.bartlett_p)


def _spread(by_cost: Sequence[Experiment], n: int) -> tuple[Experiment, ...]:
    if len(by_cost) <= n:
        return tuple(by_cost)
    return tuple(by_cost[round(i * (len(by_cost) - 1) / (n - 1))] for i in range(n))


def _measured_s(examples: Sequence[Experiment], population: Sequence[Experiment], workers: int, runs: Path) -> float:
    """Mean seconds per run, estimated from a few steps of some experiments with a worker's number of threads.

    Checkpoints are written to the disk that the sweep will use. They count as pilots, so that no table of runs shows
    them; the next dry run removes those of a killed one.
    """
    import torch

    place = runs.absolute()
    while not place.parent.is_dir():
        place = place.parent
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    per_flop, overhead = [], []
    try:
        with temporary_beside(place, folder=True) as folder:
            for example in examples:
                changes: dict[str, Any] = {"tokens": STEPS * example.batch_tokens, "eval_tokens": example.batch_tokens}
                changes |= {"flops": None, "val_every": None, "stop_recall": None, "evaluation": "opening"}
                short = example.model_copy(update={"train": example.train.model_copy(update=changes)})
                began = time.perf_counter()
                run = train.fit(short, folder / PILOTS, console=plain_console(quiet=True))
                took = time.perf_counter() - began
                result = run.result or {}
                if (train_s := result.get("train_s")) and result.get("status") == "finished":
                    per_flop.append(train_s / result["flops_run"])
                    overhead.append(took - train_s)
    finally:
        torch.set_num_threads(threads)
    if not per_flop:
        return math.nan
    flop_s, set_up_s = statistics.fmean(per_flop), min(overhead)
    return statistics.fmean(set_up_s + flop_s * (each.flops_run + _evaluation_flops(each)) for each in population)


def _evaluation_flops(experiment: Experiment) -> float:
    """Forward FLOPs of a run's evaluations: every validation, then both splits.

    Evaluations of unknown length count as 0: without `eval_tokens`, of splits that are not read in full.
    """
    cost, training = experiment.model.cost(experiment.data.seq_len), experiment.train
    n_validations = experiment.n_steps // training.val_every if training.val_every else 0
    last = 2 * (training.eval_tokens or 0)
    if training.evaluation == "whole" and isinstance(experiment.data, TextData):
        last = _whole_targets(experiment.data)
    return (n_validations * (training.eval_tokens or 0) + last) * cost.flops_fwd


@cache
def _whole_targets(data: TextData) -> int:
    """Predicted tokens of both evaluation splits."""
    source = data.open(0)
    assert isinstance(source, TextSource)
    return sum(source.n_targets(split) for split in EVALUATED)
