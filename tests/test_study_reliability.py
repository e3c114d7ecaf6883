"""Reliability: after any kill, restart or full disk, no experiment is lost and none is trained twice."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from small_sweeps import (
    Postgres,
    assert_same,
    done_by_key,
    finish,
    free_port,
    noted,
    quiet,
    running_postgres,
    start,
    study_of,
    wait_until,
    work,
    write_sweep,
)

from explore import train
from explore.runs import RunFolder, walk_runs
from explore.study import TrialOptions, load_sweep, run_sweep, serve_storage
from explore.study.lease import is_left
from explore.study.progress import is_counted

pytestmark = pytest.mark.slow
KILLS = 10
TRIALS = 6
TOKENS = 6_400
"""Fifty steps: about as long as a kill needs to hit one."""


postgres = pytest.fixture(scope="module", name="postgres")(running_postgres)


def progress(runs: Path, log: Path) -> int:
    """Number of lines of the journal, the log and the metrics, as a measure of progress."""
    files = [runs / "study.journal", log, *runs.glob("*/metrics.csv")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.exists())


def undisturbed(file: Path, runs: Path, n_trials: int = TRIALS, **options: Any) -> dict[str, list[float]]:
    run_sweep(load_sweep(file), n_trials, runs, options=TrialOptions(notes=False), console=quiet(), **options)
    return done_by_key(study_of(runs))


def check_nothing_lost_or_doubled(
    study: optuna.Study, runs: Path, log: Path, n_killed: int, n_trials: int = TRIALS
) -> None:
    """Checks that every trial ended or has a retry with its parameters, and that each experiment was trained once."""
    done_by_key(study)
    assert sum(map(is_counted, study.trials)) == n_trials
    assert not [trial.number for trial in study.trials if trial.user_attrs.get("outcome") == "failed"]
    retries = {trial.user_attrs["retry_of"]: trial for trial in study.trials if "retry_of" in trial.user_attrs}
    for trial in study.trials:
        assert trial.state.is_finished() or trial.state == TrialState.WAITING
        if is_left(trial):
            retry = retries[trial.number]
            assert {**retry.system_attrs["fixed_params"], **retry.params}.items() >= trial.params.items()
    starts, ends = Counter(noted(log, "start")), Counter(noted(log, "end"))
    folders = {str(folder.key)[:8] for folder in walk_runs(runs, pilots=True)}
    assert set(starts) == folders
    assert starts.total() <= len(folders) + n_killed, "more was begun than was killed"
    assert max(ends.values()) == 1, "an experiment was trained to its end twice"
    lines = log.read_text().splitlines()
    for key in ends:
        assert f"start {key}" not in lines[lines.index(f"end {key}") :], "an experiment that had ended was begun again"


def check_each_alone(study: optuna.Study, runs: Path, alone: Path) -> None:
    """Checks that every experiment has the result of an undisturbed run."""
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        experiment = RunFolder(runs / trial.user_attrs["run"]).load_experiment()
        row = train.fit(experiment, alone, console=quiet()).row()
        assert trial.values == pytest.approx([row["val_bpb"], row["flops_run"]], abs=1e-6)


SEARCHED = {
    "import RejectedError": "import LearningRates, RejectedError",
    "grid = ": "learning_rates = LearningRates(low=1e-3, high=8e-3, start=2e-3)\ngrid = ",
    'trial.suggest_float("lr", 1e-3, 1e-2, log=True)': "2e-3",
    ', "lr": 0.004}': "}",
}
PRUNED = {
    "import RejectedError": "import FrontPruner, RejectedError",
    "grid = ": "pruner = FrontPruner(margin=0.0, min_trials=1)\ngrid = ",
    "eval_tokens=128": "eval_tokens=128, val_every=10",
}
SWEEPS: dict[str, tuple[str, dict[str, str]]] = {
    "random": ("random", {}),
    "grid": ("grid", {}),
    "tpe": ("tpe", {}),
    "learning rates": ("random", SEARCHED),
    "front pruner": ("random", PRUNED),
}
"""What is killed: a sampler, and what is changed in the sweep file."""


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("name", SWEEPS)
def test_ten_kills_lose_nothing_and_train_nothing_twice(tmp_path: Path, name: str, n_workers: int) -> None:
    """With two workers, one or both are killed."""
    sampler, replaced = SWEEPS[name]
    file, runs, log = write_sweep(tmp_path, tokens=TOKENS, replaced=replaced), tmp_path / "runs", tmp_path / "log"
    rng = random.Random(f"{name} {n_workers}")
    crew: list[Any] = []
    n_killed = 0
    for _ in range(KILLS):
        crew += [start(work, file, runs, TRIALS, log, sampler=sampler) for _ in range(n_workers - len(crew))]
        aim = progress(runs, log) + rng.randint(1, 25)
        wait_until(lambda aim=aim, crew=crew: progress(runs, log) >= aim or not any(w.is_alive() for w in crew))
        time.sleep(rng.uniform(0, 0.05))
        for worker in rng.sample(crew, rng.randint(1, n_workers)):
            crew.remove(worker)
            n_killed += worker.is_alive()
            worker.kill()
            worker.join()
    assert n_killed >= KILLS / 2, "the sweep was over before it was killed"
    finish(*crew, start(work, file, runs, TRIALS, log))
    study = study_of(runs)
    check_nothing_lost_or_doubled(study, runs, log, n_killed)
    if name == "front pruner":
        assert study.get_trials(states=[TrialState.PRUNED]), "nothing was pruned"
    if replaced or sampler == "tpe":
        check_each_alone(study, runs, tmp_path / "alone")
    else:
        assert_same(done_by_key(study), undisturbed(file, tmp_path / "undisturbed", sampler=sampler))


def test_two_sweeps_started_together_train_nothing_twice(tmp_path: Path) -> None:
    file, runs, log = write_sweep(tmp_path, tokens=1280), tmp_path / "runs", tmp_path / "log"
    finish(*[start(work, file, runs, TRIALS, log, sampler="grid") for _ in range(3)])
    study = study_of(runs)
    check_nothing_lost_or_doubled(study, runs, log, 0)
    assert Counter(noted(log, "start")) == Counter(noted(log, "end")) == {key[:8]: 1 for key in done_by_key(study)}
    assert len(study.get_trials(states=[TrialState.COMPLETE])) == TRIALS
    assert_same(done_by_key(study), undisturbed(file, tmp_path / "undisturbed", sampler="grid"))


def test_a_sweep_waits_for_a_restarted_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    file, runs, log, url = (
        write_sweep(tmp_path, tokens=TOKENS),
        tmp_path / "runs",
        tmp_path / "log",
        postgres.database(),
    )
    crew = [start(work, file, runs, TRIALS, log, storage=url) for _ in range(2)]
    wait_until(lambda: len(noted(log, "open")) == len(crew))  # one that is not open yet is refused, not waited for
    for n_ended in (1, 3):
        wait_until(lambda n=n_ended: len(noted(log, "end")) >= n)  # type: ignore[misc]
        postgres.stop()
        time.sleep(1)
        postgres.start()
    finish(*crew)
    study = study_of(runs, url=url)
    check_nothing_lost_or_doubled(study, runs, log, 0)
    assert_same(done_by_key(study), undisturbed(file, tmp_path / "undisturbed"))


def test_killed_workers_resume_in_postgresql_and_through_a_proxy(tmp_path: Path, postgres: Postgres) -> None:
    file, runs, log, port = write_sweep(tmp_path, tokens=TOKENS), tmp_path / "runs", tmp_path / "log", free_port()
    url = postgres.database()
    server = start(serve_storage, url, "127.0.0.1", port)
    wait_until(lambda: _listens(port))
    places = [url, f"grpc://127.0.0.1:{port}"]
    try:
        for n_starts in (1, 3):
            crew = [start(work, file, runs, TRIALS, log, storage=place) for place in places]
            wait_until(lambda n=n_starts: len(noted(log, "start")) >= n)  # type: ignore[misc]
            time.sleep(0.2)
            for worker in crew:
                worker.kill()
                worker.join()
        finish(start(work, file, runs, TRIALS, log, storage=places[1]))
    finally:
        server.kill()
        server.join()
    study = study_of(runs, url=url)
    check_nothing_lost_or_doubled(study, runs, log, 4)
    assert_same(done_by_key(study), undisturbed(file, tmp_path / "undisturbed"))


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


# Disks


def _limit_files(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("n_bytes", [300, 4_000, 12_000, 60_000])
def test_a_full_disk_stops_the_sweep_with_a_clear_line_and_it_resumes_later(tmp_path: Path, n_bytes: int) -> None:
    """The limit is reached while writing the cache, the journal, records or a checkpoint."""
    file, runs, log = write_sweep(tmp_path), tmp_path / "runs", tmp_path / "log"
    worker = start(work, file, runs, 2, log, partial(_limit_files, n_bytes))
    worker.join(120)
    (error,) = noted(log, "error")
    assert worker.exitcode == 2
    assert str(runs) in error or os.environ["EXPLORE_CACHE"] in error
    assert os.strerror(errno.EFBIG) in error or os.strerror(errno.ENOSPC) in error
    assert "\n" not in error
    finish(start(work, file, runs, 2, log))
    assert_same(done_by_key(study_of(runs)), undisturbed(file, tmp_path / "undisturbed", 2))


def _command(file: Path, runs: Path, *options: str) -> list[str]:
    command = [sys.executable, "-c", "from explore.cli import main; main()", "sweep", str(file), "--no-notes"]
    return [*command, "--runs", str(runs), "--trials", "3", *(options or ("--workers", "1"))]


def test_a_read_only_folder_is_a_clear_line(tmp_path: Path) -> None:
    file, runs = write_sweep(tmp_path), tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    command = _command(file, runs)
    if os.geteuid() == 0:  # whom only these rights let write anywhere
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(runs) in line
    assert os.strerror(errno.EACCES) in line
    assert not list(runs.iterdir())


# The command, its workers, and signals


def children_of(pid: int) -> list[int]:
    """Workers of a crew: its child processes spawned by Python."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "spawn_main" in folder.joinpath("cmdline").read_text():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(folder: Path, n_workers: int) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Starts the command and waits until all workers are training."""
    file, runs = write_sweep(folder, tokens=4_000_000), folder / "runs"
    command = [*_command(file, runs, "--workers", str(n_workers)), "--checkpoint-every", "5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(list(runs.glob("*/checkpoints/last.ckpt"))) == n_workers, 120)
        yield process, runs
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize(
    ("signum", "to_all", "n_workers", "code"),
    [
        (signal.SIGINT, True, 2, 130),  # as a terminal does
        (signal.SIGTERM, True, 2, 143),  # as a batch system does
        (signal.SIGTERM, False, 2, 143),
        (signal.SIGTERM, False, 1, 143),
    ],
)
def test_a_signal_ends_all_workers_and_leaves_their_trials_to_the_next_start(
    tmp_path: Path, signum: signal.Signals, to_all: bool, n_workers: int, code: int
) -> None:
    with running(tmp_path, n_workers) as (process, runs):
        workers = children_of(process.pid)
        assert len(workers) == (n_workers if n_workers > 1 else 0)
        os.killpg(process.pid, signum) if to_all else os.kill(process.pid, signum)
        _, error = process.communicate(timeout=120)
    assert process.returncode == code
    (line,) = error.splitlines()
    assert line.startswith("interrupted; " if signum == signal.SIGINT else "terminated; ")
    assert not any(map(is_alive, workers))
    outcomes = [trial.user_attrs.get("outcome") for trial in study_of(runs).trials if trial.state != TrialState.WAITING]
    assert outcomes == ["released"] * n_workers


def test_a_killed_worker_is_replaced_and_a_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    with running(tmp_path, 2) as (process, runs):
        killed, other = children_of(process.pid)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len([pid for pid in children_of(process.pid) if is_alive(pid) and pid != killed]) == 2)
        workers = children_of(process.pid)
        assert other in workers
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, workers)), 30)
    assert study_of(runs).trials
