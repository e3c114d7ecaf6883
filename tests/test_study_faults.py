"""Faults of the machine stop a sweep, do not count as results, and end when the machine is repaired."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console
from small_sweeps import done_by_key, quiet, study_of, write_sweep

from explore import train
from explore.study import Sweep, SweepSummary, TrialOptions, load_sweep, needs, processes, run_sweep
from explore.study.faults import FaultError, fault_of
from explore.study.lease import RELEASED
from explore.study.needs import check_needs
from explore.study.storage import JOURNAL
from explore.study.sweep_file import TRIES
from explore.termination import TerminatedError, termination_handled
from explore.train import LitLanguageModel, capacity

STOPS = "; the sweep stops here; run the same command to resume it"


def run(sweep: Sweep, n_trials: int, runs: Path, **options: Any) -> SweepSummary:
    return run_sweep(sweep, n_trials, runs, **{"options": TrialOptions(notes=False), "console": quiet()} | options)


def outcomes(runs: Path) -> list[str]:
    trials = study_of(runs).trials
    return [trial.user_attrs.get("outcome", "") for trial in trials if trial.state != TrialState.WAITING]


class RecordingConsole(Console):
    """A console that records its output."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=500)

    @property
    def lines(self) -> list[str]:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue().splitlines()


# Checks before the first trial


def test_a_sweep_whose_corpus_is_missing_stops_before_its_first_trial(tmp_path: Path) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    (tmp_path / "corpus.txt").rename(tmp_path / "elsewhere.txt")
    for _ in range(2):
        with pytest.raises(FaultError, match=r"^corpus: '.*corpus\.txt' is neither a known name"):
            run(sweep, 2, runs)
        assert not runs.exists()
    (tmp_path / "elsewhere.txt").rename(tmp_path / "corpus.txt")
    assert run(sweep, 2, runs).complete == 2


def test_a_sweep_whose_tokenizer_is_missing_stops_before_its_first_trial(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, replaced={'tokenizer="bytes"': 'tokenizer="nowhere.json"'}))
    with pytest.raises(FaultError, match=r"nowhere\.json"):
        run(sweep, 2, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_disk_without_room_for_the_checkpoints_of_all_workers_is_found_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "some" / "runs"
    largest = max(4 * 3 * each.model.cost(32).params_total for each in sweep.examples)
    place = SimpleNamespace(f_bavail=2 * 2 * largest - 1, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: place)
    with pytest.raises(FaultError, match=r"runs: the disk must have room for 2 checkpoints of each of 2 workers \("):
        run(sweep, 2, runs, workers=2)
    assert not runs.exists()
    place.f_bavail = 1 << 40
    assert run(sweep, 1, runs).complete == 1


def test_a_model_that_does_not_fit_into_memory_is_found_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "memory_bytes", lambda: (1 << 40, 1000))
        with pytest.raises(FaultError, match=r"^memory: training needs at least .* would fit$"):
            run(sweep, 2, runs)
        check_needs(sweep.examples, runs, elsewhere=True)
    assert not runs.exists()
    assert run(sweep, 1, runs).complete == 1


def test_memory_without_room_for_all_workers_is_found_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    largest = max(capacity.needs(each).total for each in sweep.examples)
    for module in (capacity, needs):
        monkeypatch.setattr(module, "memory_bytes", lambda: (1 << 40, 3 * largest - 1))
    message = r"^memory: training with 3 workers needs at least .* for each\) and .* are free; workers=2 would fit$"
    with pytest.raises(FaultError, match=message):
        run(sweep, 2, runs, workers=3)
    assert not runs.exists()
    check_needs(sweep.examples, runs, 2)
    check_needs(sweep.examples, runs, 3, elsewhere=True)


@pytest.mark.parametrize("total", [2000, 1 << 40])
def test_a_trial_for_which_the_memory_is_too_small_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    """The message says whether another machine is needed or other processes must end first."""
    sweep, runs, real = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", train.fit

    def fit(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(capacity, "memory_bytes", lambda: (total, 1000))
        return real(*args, **options)

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(FaultError, match=rf"^memory: training needs at least .* would fit{STOPS}$"):
        run(sweep, 2, runs)
    assert outcomes(runs) == [RELEASED]


# Faults during a sweep


def test_a_corpus_lost_during_a_sweep_stops_it_and_it_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs, real, calls = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", train.fit, []

    def fit(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            (tmp_path / "corpus.txt").rename(tmp_path / "elsewhere.txt")
        return real(*args, **options)

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(FaultError, match=rf"is neither a known name.*{STOPS}$"):
        run(sweep, 3, runs)
    assert outcomes(runs) == ["done", RELEASED]
    (tmp_path / "elsewhere.txt").rename(tmp_path / "corpus.txt")
    assert run(sweep, 3, runs).complete == 3
    run(sweep, 3, tmp_path / "undisturbed")
    assert done_by_key(study_of(runs)) == done_by_key(study_of(tmp_path / "undisturbed"))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAULTS: dict[str, Callable[[], BaseException]] = {
    **{
        name: lambda name=name: OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "last.ckpt")
        for name in ("EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "EAGAIN")
    },
    "timeout": lambda: TimeoutError("timed out"),
    "memory": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "storage": lambda: optuna.exceptions.StorageInternalError("An exception is raised during the commit."),
    "files": lambda: caused(ValueError("open files: at least 60 must be allowed"), OSError(errno.EMFILE, "too many")),
    "away": lambda: FaultError("storage: no answer for 600 s: the server closed the connection"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_machine_gives_the_trial_back_and_stops_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path, tokens=128)), tmp_path / "runs"

    def fit(*args: Any, **options: Any) -> Any:
        raise FAULTS[name]()

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", fit)
        with pytest.raises(FaultError, match=rf"{STOPS}$") as stop:
            run(sweep, 3, runs)
    assert "\n" not in str(stop.value)
    text = str(FAULTS[name]())
    assert (
        text.partition("] ")[2].partition(":")[0] in str(stop.value)
        if name.startswith("E")
        else text in str(stop.value)
    )
    assert outcomes(runs) == [RELEASED]
    assert run(sweep, 1, runs).complete == 1
    assert outcomes(runs) == [RELEASED, "done"]


def test_an_error_of_torch_on_a_full_disk_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos 56960 vs 56912")
    assert fault_of(error, tmp_path) is None
    error.__context__ = OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # raised while that was handled
    assert fault_of(error, tmp_path) == f"{tmp_path}: {os.strerror(errno.EFBIG)}"


def test_an_error_of_the_trial_is_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*args: Any, **options: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "fit", fit)
    assert run(load_sweep(write_sweep(tmp_path)), 2, tmp_path / "runs").failed == 2


# Texts and modules that change during a study


def test_a_corpus_that_changed_under_its_study_is_refused_with_the_difference(tmp_path: Path) -> None:
    sweep, runs, corpus = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", tmp_path / "corpus.txt"
    run(sweep, 1, runs)
    text = corpus.read_text()
    corpus.write_text(text.replace("Paragraph 7 ", "Paragraph 8 "))
    with pytest.raises(FaultError, match=r"^data: \w+(, \w+)* of '.*corpus\.txt' changed since the study 'width'.*new"):
        run(sweep, 2, runs)
    assert outcomes(runs) == ["done"]
    assert run(sweep, 1, runs, new_study=True).complete == 1
    corpus.write_text(text)
    with pytest.raises(FaultError, match="'width-2'"):
        run(sweep, 2, runs)


def test_a_corpus_that_changes_between_trials_stops_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, runs, real = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", train.fit

    def fit(*args: Any, **options: Any) -> Any:
        folder = real(*args, **options)
        with (tmp_path / "corpus.txt").open("a") as file:
            file.write("\n\nOne more paragraph.")
        return folder

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(FaultError, match=rf"changed since the study.*{STOPS}$"):
        run(sweep, 3, runs)
    assert outcomes(runs) == ["done", RELEASED]


def test_a_study_of_an_older_version_records_its_current_texts(tmp_path: Path) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    run(sweep, 1, runs)
    journal = runs / JOURNAL
    kept = [line for line in journal.read_text().splitlines() if '"data-' not in line and '"modules"' not in line]
    assert len(kept) < len(journal.read_text().splitlines())
    journal.write_text("\n".join(kept) + "\n")
    assert run(sweep, 2, runs).complete == 2
    (tmp_path / "corpus.txt").write_text((tmp_path / "corpus.txt").read_text().replace("sheep", "goats"))
    with pytest.raises(FaultError, match="changed since the study"):
        run(sweep, 3, runs)


# Exhausted spaces, and failure of all trials


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_an_exhausted_space_is_reported_and_draws_stop(tmp_path: Path, sampler: str) -> None:
    replaced = {
        'trial.suggest_float("lr", 1e-3, 1e-2, log=True)': "4e-3",
        ', "lr": 0.004}': "}",
        ', "lr": [0.002, 0.004]}': "}",
        "32, 96, step=32": "32, 64, step=32",
        '"n_layers", 1, 3': '"n_layers", 1, 2',
        "> 200": "> 100",
    }
    sweep, runs = load_sweep(write_sweep(tmp_path, replaced=replaced, tokens=128)), tmp_path / "runs"
    console, n_drawn = RecordingConsole(), []
    for _ in range(2):
        summary = run(sweep, 9, runs, sampler=sampler, console=console)
        assert (summary.complete, summary.failed) == (3, 0)
        n_drawn.append(len(study_of(runs).trials))
    assert n_drawn[0] == n_drawn[1]
    lines = [line for line in console.lines if "of 9 trials" in line]
    assert len(lines) == 2
    assert lines[0].startswith("width: 3 of 9 trials: ")
    if sampler == "grid":
        assert lines[0].endswith("all 4 points of the grid have been drawn")
    else:
        assert f"of the last {TRIES} draws " in lines[0]
        assert " repeat an experiment of the study and " in lines[0]
        assert " were rejected, such as: too large" in lines[0]


@pytest.mark.parametrize("about", [{}, {"exhausted": True}])
def test_queued_trials_are_trained_although_the_space_is_exhausted(tmp_path: Path, about: dict[str, Any]) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path, tokens=128)), tmp_path / "runs"
    run(sweep, 1, runs)
    study = study_of(runs)
    for _ in range(TRIES):
        trial = study.ask()
        for name, value in {"outcome": "rejected", "reason": "repeats trial 0", **about}.items():
            trial.set_user_attr(name, value)
        study.tell(trial, state=TrialState.PRUNED)
    assert run(sweep, 2, runs).complete == 1
    study.enqueue_trial({"d_model": 64, "n_layers": 1, "lr": 0.002})
    assert run(sweep, 2, runs).complete == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_has_exit_code_1_if_all_trials_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    from explore.cli import main

    file, runs = write_sweep(tmp_path, tokens=128), tmp_path / "runs"
    command = ["explore", "sweep", str(file), "--runs", str(runs), "--no-notes", "--workers", "1", "--trials"]

    def code(n_trials: int) -> object:
        monkeypatch.setattr("sys.argv", [*command, str(n_trials), *(["--json"] if as_json else [])])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("broken")))
        assert code(2) == 1
    captured = capsys.readouterr()
    assert "all 2 trials failed; the last one: RuntimeError: broken" in captured.err
    assert code(3) == 0


# Signals


def test_a_trial_ended_by_a_signal_is_given_back_although_its_compiler_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal to the process group also kills the compiler; its error must not count as the trial's."""
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"

    def killed(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the compiler has died")

    with monkeypatch.context() as patch, termination_handled():
        patch.setattr(LitLanguageModel, "training_step", killed)
        with pytest.raises(TerminatedError) as end:
            run(sweep, 1, runs)
    assert end.value.code == 143
    assert outcomes(runs) == [RELEASED]
    assert run(sweep, 1, runs).complete == 1


def test_started_workers_end_if_one_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    worker = SimpleNamespace(
        terminate=lambda: ended.append("terminated"), join=lambda *_: None, kill=lambda: ended.append("killed")
    )
    started: list[Any] = []

    def start(post: Any) -> Any:
        if started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(worker)
        return worker, None

    monkeypatch.setattr(processes, "start_worker", start)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
        run(load_sweep(write_sweep(tmp_path)), 2, tmp_path / "runs", workers=2)
    assert ended == ["terminated", "killed"]


# Missing results


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", None])
def test_a_result_damaged_after_its_trial_is_reported_and_recomputed(tmp_path: Path, content: str | None) -> None:
    sweep, runs, console = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", RecordingConsole()
    run(sweep, 2, runs)
    folder = runs / study_of(runs).trials[1].user_attrs["run"]
    before = (folder / "result.json").read_text()
    if content is None:
        (folder / "result.json").unlink()
    else:
        (folder / "result.json").write_text(content)
    assert run(sweep, 2, runs, console=console).complete == 2
    expected = f"{folder}: trial 1 is complete, but its result is damaged or missing; computing it again"
    assert [line for line in console.lines if "damaged" in line] == [expected]
    assert '"status": "finished"' in (folder / "result.json").read_text()
    values = [line for line in before.splitlines() if '"val_bpb"' in line or '"flops_run"' in line]
    assert all(line in (folder / "result.json").read_text() for line in values)


def test_a_run_with_a_damaged_experiment_is_reported(tmp_path: Path) -> None:
    sweep, runs, console = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", RecordingConsole()
    run(sweep, 1, runs)
    folder = runs / study_of(runs).trials[0].user_attrs["run"]
    for name in ("result.json", "experiment.json"):
        (folder / name).write_text("")
    run(sweep, 1, runs, console=console)
    assert any("its result cannot be computed again: " in line for line in console.lines)
