"""`explore watch`: the state of a study, seen from another process."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState
from rich.console import Console

from explore.cli import main
from explore.study.live import SweepTable
from explore.study.watching import find_study, watch
from explore.terminal import NotebookOutput, plain_console


def new_study(runs: Path, name: str = "experts") -> optuna.Study:
    runs.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    study = optuna.create_study(study_name=name, storage=storage, directions=["minimize", "minimize"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["val_bpb", "flops_run"])
    return study


def tell(study: optuna.Study, bits: float, pattern: str = "MEM*E", state: TrialState = TrialState.COMPLETE) -> None:
    trial = study.ask()
    about = {"family": "hybrid MoE", "pattern": pattern, "params_total": 1_230_000, "took_s": 3.0, "outcome": "done"}
    for name, value in about.items():
        trial.set_user_attr(name, value)
    study.tell(trial, [bits, 1e12] if state == TrialState.COMPLETE else None, state)


def run_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["explore", "watch", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err.splitlines()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    study = new_study(tmp_path / "experts")
    tell(study, 2.5)
    tell(study, 2.25, "M-M-")
    study.ask()
    return tmp_path / "experts"


@pytest.mark.parametrize("place", ["", "study.journal"], ids=["folder", "journal"])
def test_once_prints_the_state_of_a_study(
    runs: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (runs / "study.journal").read_bytes()
    code, out, err = run_cli(capsys, monkeypatch, str(runs / place), "--once", "--trials", "9")
    assert (code, err) == (0, [])
    assert "experts: 2 of 9 trials" in out
    assert all(text in out for text in ("MEM*E", "M-M-", "2.25", "val bpb"))
    assert (runs / "study.journal").read_bytes() == before


def test_a_study_is_found_by_its_name_in_any_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    optuna.create_study(study_name="elsewhere", storage=url)
    code, out, _ = run_cli(capsys, monkeypatch, "elsewhere", "--storage", url, "--once")
    assert (code, out) == (0, "elsewhere: no trials yet\n")
    code, _, err = run_cli(capsys, monkeypatch, "elsewere", "--storage", url, "--once")
    assert (code, len(err)) == (2, 1)
    assert "STUDY: 'elsewere' is not in " in err[0]
    assert err[0].endswith("which holds elsewhere")


def test_the_newest_study_of_a_journal_is_shown_unless_one_is_named(runs: Path) -> None:
    new_study(runs, "experts-2")
    assert find_study(str(runs)).study.study_name == "experts-2"
    assert find_study(str(runs), name="experts").study.study_name == "experts"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "'{root}/nowhere' does not exist; there are {root}/experts"),
        ("experts/deeper", "'{root}/experts/deeper' does not exist; name a folder that `explore sweep` wrote"),
        ("", "'{root}' holds no study.journal; there are {root}/experts"),
        ("experts/notes.txt", "{root}/experts/notes.txt: must be a journal of Optuna, but its first line is not ("),
        ("empty", "{root}/empty/study.journal holds no study yet"),
    ],
)
def test_an_error_for_an_unknown_study_names_the_existing_ones(
    runs: Path, place: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = runs.parent
    (runs / "notes.txt").write_text("no\njournal\n")
    if place == "empty":
        (root / "empty").mkdir()
        (root / "empty" / "study.journal").touch()
    code, _, err = run_cli(capsys, monkeypatch, str(root / place), "--once")
    assert (code, len(err)) == (2, 1)
    assert message.format(root=root) in err[0]


def test_a_watched_study_is_drawn_until_its_trials_are_done(runs: Path) -> None:
    study, screen = find_study(str(runs)).study, io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40)
    watching = threading.Thread(target=watch, args=(study, console, 4), kwargs={"every_s": 0.05}, daemon=True)
    watching.start()
    other = find_study(str(runs)).study
    for bits in (2.125, 2.0625):
        assert watching.is_alive()
        tell(other, bits)
        deadline = time.monotonic() + 30
        while f"{bits:.4g}" not in screen.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    watching.join(timeout=20)
    assert not watching.is_alive()
    assert "4 of 4 trials" in screen.getvalue()


def test_a_study_shows_its_target_number_of_trials(runs: Path) -> None:
    study, screen = find_study(str(runs)).study, io.StringIO()
    study.set_user_attr("n_trials", 2)
    watch(study, Console(file=screen, force_terminal=True, width=100), every_s=0.05)
    assert "2 of 2 trials" in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_finished_study_is_printed_whole(runs: Path, is_terminal: bool) -> None:
    study, screen = find_study(str(runs)).study, io.StringIO()
    for i in range(40):
        tell(study, 2.125, "E" * (i + 1))
    watch(study, Console(file=screen, force_terminal=is_terminal, width=120, height=24), 42)
    assert "42 of 42 trials" in screen.getvalue()
    assert all(f" {'E' * (i + 1)} " in screen.getvalue() for i in range(40))


@pytest.mark.parametrize(
    ("width", "missing"),
    [(100, []), (60, ["model"]), (40, ["params", "model", "state"]), (30, ["params", "model", "state", "curve"])],
)
def test_columns_that_do_not_fit_are_left_out_the_curves_last(runs: Path, width: int, missing: list[str]) -> None:
    study, screen = find_study(str(runs)).study, io.StringIO()
    trial = study.ask()
    trial.set_user_attr("curve", [[step, 3 - step / 10] for step in range(10)])
    study.tell(trial, [2.0, 1e12])
    watch(study, Console(file=screen, width=width), once=True)
    shown = screen.getvalue()
    assert "…" not in shown
    assert ("█▇▆▆▅▄▃▃▂▁" in shown) == ("curve" not in missing)
    heads = shown.splitlines()[1]
    assert [name for name in ("params", "model", "state", "curve") if name not in heads] == missing
    assert max(map(len, shown.splitlines())) <= width


def test_without_a_terminal_each_ended_trial_is_one_line(runs: Path) -> None:
    study, screen = find_study(str(runs)).study, io.StringIO()
    watching = threading.Thread(
        target=watch, args=(study, Console(file=screen, width=200), 3), kwargs={"every_s": 0.05}
    )
    watching.start()
    time.sleep(0.3)
    tell(find_study(str(runs)).study, 2.125, "E-E")
    watching.join(timeout=20)
    head, line = screen.getvalue().splitlines()
    assert head.split()[:3] == ["trial", "model", "pattern"]
    assert "E-E" in line


def test_in_a_notebook_the_html_table_is_updated_in_place(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, shown = find_study(str(runs)).study, []
    monkeypatch.setattr(NotebookOutput, "show", lambda self, html: shown.append(html))
    screen = io.StringIO()
    with SweepTable(study, 4, plain_console(file=screen, force_jupyter=True)) as table:
        tell(find_study(str(runs)).study, 2.125, "<E>")
        table.refresh()
    assert screen.getvalue() == ""
    assert "2 of 4 trials" in shown[0]
    assert "3 of 4 trials" in shown[-1]
    assert all(
        text in shown[-1] for text in ("MEM*E", "M-M-", "&lt;E&gt;", "2.1250", "val bpb", "starting", "width:75.0%")
    )
    assert "curve" not in shown[-1]  # which no trial has


@pytest.mark.slow
def test_ctrl_c_leaves_without_an_error(runs: Path) -> None:
    """A real terminal of 100 columns that sends the signal of Ctrl-C."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    # With the handler of a terminal's process: under nohup the signal would be ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from explore.cli import main; main()"
    command = [sys.executable, "-c", code, "watch", str(runs), "--trials", "9"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    screen = b""
    deadline = time.monotonic() + 60
    while b"2 of 9 trials" not in screen:
        if time.monotonic() > deadline or not select.select([ours], [], [], 60)[0]:
            process.kill()
            pytest.fail(f"the study was not drawn: {screen[-500:]!r}")
        screen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(ours, 4096):
            screen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert b"Traceback" not in screen
    assert b"rror" not in screen
