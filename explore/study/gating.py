"""Sweeps with a gate: the smallest size is trained first, and the rest only if the gate passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from explore.frontier.floors import add_floors
from explore.frontier.gate import GATE_FILE, GateReport, gate_report, gate_runs
from explore.records import pack_runs
from explore.study.crew import SweepSummary, run_sweep
from explore.study.sweep_file import Sweep
from explore.table import save_table


def run_gated(
    sweep: Sweep, n_trials: int, runs: Path, *, ungated: bool = False, records: Path | None = None, **options: Any
) -> tuple[SweepSummary, GateReport | None]:
    """Runs a sweep as `run_sweep` does, smallest size first, and stops after it if the gate fails.

    Args:
        ungated: continue even if the gate fails.
        options: as for `run_sweep`.

    Returns:
        The summary of the study and the gate's report. The report is None without a gate, or until all trials of the
        smallest size have ended.
    """
    if sweep.gate is None:
        return run_sweep(sweep, n_trials, runs, records=records, **options), None
    first = len(sweep.baselines) + len(sweep.first)
    summary = run_sweep(sweep, min(n_trials, first), runs, records=records, **options)
    if n_trials < first:
        return summary, None
    report = _checked(sweep, runs)
    if (report.passed or ungated) and n_trials > first:
        summary = run_sweep(sweep, n_trials, runs, records=records, **options)
        report = _checked(sweep, runs)  # trials of the same size may have followed
    if records is not None:
        pack_runs(records, runs)  # with the floors
    return summary, report


def _checked(sweep: Sweep, runs: Path) -> GateReport:
    """The report of a sweep's gate, also written beside its runs; the baseline first gets its floor at every size."""
    assert sweep.gate is not None
    if sweep.gate.floor is None:
        rows = sweep.gate.selected(gate_runs(runs))
        add_floors(runs, names=rows.loc[rows[sweep.gate.arm] == sweep.gate.baseline, "run"])
    report = gate_report(sweep.gate, sweep.seeds, runs)
    save_table(report.table(), runs / GATE_FILE)
    return report
