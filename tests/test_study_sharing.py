"""The default number of workers of a sweep, from a measured table, trials, cores and memory."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_sweeps import quiet, write_sweep

from explore import study
from explore.bench import sharing as bench
from explore.cli import main
from explore.study import TrialOptions, choose_workers, load_sweep, run_sweep, sharing
from explore.study.sharing import workers_for
from explore.table import save_table

STEP = 6 * 1000.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Four cores, much memory, no accelerator, and a table in which steps of up to 6000 FLOPs are shared."""
    monkeypatch.setattr(sharing, "n_cores", lambda: 4)
    monkeypatch.setattr(sharing, "memory_bytes", lambda: (math.inf, math.inf))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    rows = [(1000.0, 100.0, 300.0), (STEP, 100.0, 111.0), (9000.0, 100.0, 109.0)]
    save_table(pd.DataFrame(rows, columns=[*sharing.NUMBERS]), sharing.own_table())
    return monkeypatch


@pytest.mark.parametrize(
    ("flops_step", "n_trials", "expected"), [(10.0, 9, 4), (10.0, 3, 3), (STEP, 9, 4), (STEP + 1, 9, 1), (1.0, 1, 1)]
)
def test_small_models_have_a_worker_for_each_core(
    machine: pytest.MonkeyPatch, flops_step: float, n_trials: int, expected: int
) -> None:
    assert workers_for(flops_step, n_trials) == expected


def test_the_mean_of_the_experiments_counts(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    examples = load_sweep(write_sweep(tmp_path)).examples
    steps = [each.flops_run / each.n_steps for each in examples]
    assert min(steps) < max(steps)
    machine.setattr(sharing, "_largest_step", lambda path: statistics.fmean(steps))
    assert choose_workers(examples, 9) == 4
    machine.setattr(sharing, "_largest_step", lambda path: statistics.fmean(steps) * (1 - 1e-9))
    assert choose_workers(examples, 9) == 1


def test_there_are_as_many_workers_as_fit_into_memory(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(sharing, "memory_bytes", lambda: (math.inf, 3.0 * sharing.WORKER_BYTES + 1))
    assert workers_for(1.0, 9) == 3
    machine.setattr(sharing, "memory_bytes", lambda: (math.inf, 0.0))
    assert workers_for(1.0, 9) == 1


def test_one_worker_has_the_device_alone(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.accelerator, "is_available", lambda: True)
    assert workers_for(1.0, 9) == 1


def test_a_table_without_gain_means_one_worker_and_a_broken_table_is_refused(machine: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame([(1000.0, 100.0, 90.0)], columns=[*sharing.NUMBERS])
    save_table(table, sharing.own_table())
    assert workers_for(1.0, 9) == 1
    for broken in (table.iloc[:0], table.drop(columns="flops_step"), table.assign(flops_step=float("nan"))):
        save_table(broken, sharing.own_table())
        with pytest.raises(ValueError, match=r"sharing\.csv: .*--what sharing --save` measures it again$"):
            workers_for(1.0, 9)


def test_the_shipped_table_shares_the_models_of_the_demo() -> None:
    sweep = load_sweep(Path(__file__).parents[1] / "sweeps" / "first_frontier.py")
    largest = sharing._largest_step(sharing.SHIPPED)
    assert all(each.flops_run / each.n_steps < largest for each in sweep.examples)


def test_the_bench_measures_the_table_of_sharing(machine: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def run(variables: Any, **task: Any) -> dict[str, Any]:
        assert task["what"] == "run"
        asked.append((task["shape"], variables[sharing_variable()]))
        return {"tokens_per_s": 50.0 + 25 * (variables[sharing_variable()] == "1"), "threads": 1, "device": "here"}

    machine.setattr(bench, "in_a_process", run)
    machine.setattr(bench, "n_cores", lambda: 4)
    records = list(bench.time_sharing(1.0, ("tiny", "small")))
    assert asked == [("tiny", "4"), *[("tiny", "1")] * 4, ("small", "4"), *[("small", "1")] * 4]
    assert [(row["together_tokens_per_s"], row["apart_tokens_per_s"]) for row in records] == [(50.0, 300.0)] * 2
    save_table(pd.DataFrame(records), sharing.own_table())
    assert sharing._largest_step(sharing.own_table()) == records[1]["flops_step"]


def sharing_variable() -> str:
    from explore.threads import SHARE

    return SHARE


@pytest.mark.parametrize(("options", "expected"), [((), 3), (("--workers", "1"), 1), (("--cluster", "local"), 1)])
def test_the_command_chooses_the_number_of_workers_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: int
) -> None:
    file, asked = write_sweep(tmp_path), []

    def run(*args: Any, workers: int, **options: Any) -> Any:
        asked.append(workers)
        return study.SweepSummary("s", 1, 0, 0, 0), None

    monkeypatch.setattr(study, "run_gated", run)
    monkeypatch.setattr(study, "choose_workers", lambda examples, n_trials: 3 if examples and n_trials == 7 else 0)
    monkeypatch.setattr(sys, "argv", ["explore", "sweep", str(file), "--trials", "7", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert asked == [expected]


def test_a_dry_run_predicts_with_the_chosen_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def preview(*_: Any, workers: int, **options: Any) -> Any:
        asked.append(workers)
        raise ValueError("enough")

    monkeypatch.setattr(study, "preview", preview)
    monkeypatch.setattr(study, "choose_workers", lambda examples, n_trials: 3)
    monkeypatch.setattr(sys, "argv", ["explore", "sweep", str(write_sweep(tmp_path)), "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    assert asked == [3]


def test_a_sweep_draws_its_frontier_early_rarely_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from explore.study import mirroring

    drawn: list[int] = []
    monkeypatch.setattr(mirroring, "save_figure", lambda figure, path: [path])
    monkeypatch.setattr(mirroring, "plot_frontier", lambda table, *_: drawn.append(len(table)))
    sweep, runs = load_sweep(write_sweep(tmp_path, tokens=128)), tmp_path / "runs"
    monkeypatch.setattr("explore.study.worker.annotate", lambda *args: None)
    run_sweep(sweep, 8, runs, console=quiet())
    assert drawn == [3, 6, 8]
    run_sweep(sweep, 8, runs, console=quiet(), options=TrialOptions(notes=False))
    assert drawn == [3, 6, 8]
