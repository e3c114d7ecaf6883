"""Workers: leases, claims, and resuming abandoned trials."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from small_sweeps import assert_same, done_by_key, finish, note, noted, quiet, start, study_of, wait_until, write_sweep

from explore import train
from explore.study import RejectedError, Sweep, TrialOptions, load_sweep, processes, run_sweep
from explore.study import claim as claims
from explore.study import lease as leases
from explore.study.claim import claim
from explore.study.identity import open_study
from explore.study.lease import INTERRUPTED, MOST_ATTEMPTS, RELEASED, Lease, Reaper, is_left, leave
from explore.study.storage import open_storage
from explore.study.worker import IDLE_S, Worker
from explore.train import LitLanguageModel, fitting

ELSEWHERE = "another-host/1"


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return optuna.create_study(storage=open_storage(tmp_path / "storage"), sampler=optuna.samplers.RandomSampler(0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list with one element: the time in seconds that the reaper reads."""
    now = [0.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    return now


def states(study: optuna.Study) -> str:
    return " ".join(trial.state.name for trial in study.trials)


def mark(trial: optuna.Trial, place: str, pid: int, beat: int = 0) -> None:
    trial.set_user_attr("lease", {"worker": "w", "place": place, "pid": pid, "beat": beat})


def gone() -> int:
    """PID of a process that has ended."""
    process = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(process, 0)
    return process


def worker(sweep: Sweep, runs: Path) -> Worker:
    return Worker(sweep, open_study(sweep, open_storage(runs)), runs, TrialOptions(notes=False), quiet())


# Leases


def test_a_lease_is_renewed_until_its_block_ends(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    trial = study.ask()
    with Lease(study, trial):
        wait_until(lambda: study.trials[0].user_attrs["lease"]["beat"] >= 3)
        assert study.trials[0].user_attrs["lease"]["pid"] == os.getpid()
    time.sleep(0.1)
    beat = study.trials[0].user_attrs["lease"]["beat"]
    time.sleep(0.1)
    assert study.trials[0].user_attrs["lease"]["beat"] == beat


def test_a_failed_heartbeat_is_followed_by_others(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    real, failures = study._storage.set_trial_user_attr, iter([OSError(28, "full")] * 3)

    def fails(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and (error := next(failures, None)):
            raise error
        real(*args)

    monkeypatch.setattr(study._storage, "set_trial_user_attr", fails)
    with Lease(study, study.ask()):
        wait_until(lambda: study.trials[0].user_attrs["lease"]["beat"] > 3, 20)


def test_the_trial_of_a_dead_process_is_requeued_immediately(study: optuna.Study) -> None:
    study.enqueue_trial({"x": 0.5}, user_attrs={"baseline": 0})
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    y = trial.suggest_float("y", 0, 1)
    mark(trial, leases._place(), gone())
    Reaper().reap(study)
    assert states(study) == "FAIL WAITING"
    retry = study.ask()
    assert (retry.suggest_float("x", 0, 1), retry.suggest_float("y", 0, 1)) == (0.5, y)
    assert retry.user_attrs == {"retry_of": 0, "draw": 0, "attempt": 2}
    assert is_left(study.trials[0])


def test_a_remote_lease_without_renewal_is_dead(study: optuna.Study, clock: list[float]) -> None:
    reaper, trial = Reaper(), study.ask()
    mark(trial, ELSEWHERE, 1)
    reaper.reap(study)
    for beat in range(1, 4):
        clock[0] += 0.9 * leases.LEASE_S
        mark(trial, ELSEWHERE, 1, beat)
        reaper.reap(study)
        assert states(study) == "RUNNING"
    clock[0] += 0.9 * leases.LEASE_S
    reaper.reap(study)
    assert states(study) == "RUNNING"
    clock[0] += 0.2 * leases.LEASE_S
    reaper.reap(study)
    assert states(study) == "FAIL WAITING"


def test_a_trial_that_never_had_a_lease_is_dead_after_one_beat(study: optuna.Study, clock: list[float]) -> None:
    reaper, _ = Reaper(), study.ask()
    reaper.reap(study)
    clock[0] += leases.BEAT_S - 0.1
    reaper.reap(study)
    assert states(study) == "RUNNING"
    clock[0] += 0.2
    reaper.reap(study)
    assert states(study) == "FAIL WAITING"


def test_a_live_trial_is_not_changed(study: optuna.Study, clock: list[float]) -> None:
    reaper, trial = Reaper(), study.ask()
    with Lease(study, trial):
        reaper.reap(study)
        assert states(study) == "RUNNING"


def test_reaping_resumes_after_a_kill(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = study.ask()
    mark(trial, leases._place(), gone())
    with monkeypatch.context() as patch:
        patch.setattr(study, "enqueue_trial", lambda *args, **kwargs: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            Reaper().reap(study)
    assert states(study) == "FAIL"
    Reaper().reap(study)
    Reaper().reap(study)
    assert states(study) == "FAIL WAITING"


def test_a_trial_that_keeps_killing_its_processes_fails(study: optuna.Study) -> None:
    for _ in range(MOST_ATTEMPTS):
        mark(study.ask(), leases._place(), gone())
        Reaper().reap(study)
    assert len(study.trials) == MOST_ATTEMPTS
    last = study.trials[-1]
    assert last.state == TrialState.FAIL
    assert last.user_attrs["outcome"] == "failed"
    assert last.user_attrs["reason"] == f"{MOST_ATTEMPTS} processes ended while they trained it"
    assert [is_left(trial) for trial in study.trials] == [True] * (MOST_ATTEMPTS - 1) + [False]


def test_giving_a_trial_back_does_not_count_as_an_attempt(study: optuna.Study) -> None:
    for _ in range(MOST_ATTEMPTS + 1):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        leave(study, trial._cached_frozen_trial, RELEASED)
        Reaper().reap(study)
    assert study.trials[-1].state == TrialState.WAITING
    assert len({trial.params["x"] for trial in study.trials[:-1]}) == 1
    assert {trial.user_attrs["draw"] for trial in study.trials[1:]} == {0}


def test_a_trial_that_ended_meanwhile_is_not_changed(study: optuna.Study) -> None:
    trial = study.ask()
    study.tell(trial, 1.0)
    leave(study, trial._cached_frozen_trial, INTERRUPTED)
    assert states(study) == "COMPLETE"


# Claims


def test_the_first_of_two_trials_claims_their_experiment(study: optuna.Study) -> None:
    first, second = study.ask(), study.ask()
    claim(study, first, "k", Reaper())
    with pytest.raises(RejectedError, match="repeats trial 0"):
        claim(study, second, "k", Reaper())
    claim(study, study.ask(), "another", Reaper())


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED])
def test_an_experiment_that_has_ended_is_not_claimed_again(study: optuna.Study, state: TrialState) -> None:
    trial = study.ask()
    claim(study, trial, "k", Reaper())
    study.tell(trial, [1.0] if state == TrialState.COMPLETE else None, state)
    with pytest.raises(RejectedError, match="repeats trial 0"):
        claim(study, study.ask(), "k", Reaper())


def test_a_confirmed_later_trial_keeps_the_experiment(study: optuna.Study) -> None:
    first, second = study.ask(), study.ask()
    claim(study, second, "k", Reaper())
    with pytest.raises(RejectedError, match="repeats trial 1"):
        claim(study, first, "k", Reaper())


def test_an_abandoned_or_rejected_claim_does_not_count(study: optuna.Study) -> None:
    left, rejected = study.ask(), study.ask()
    for trial in (left, rejected):
        trial.set_user_attr("key", "k")
    leave(study, left._cached_frozen_trial)
    rejected.set_user_attr("outcome", "rejected")
    study.tell(rejected, state=TrialState.PRUNED)
    claim(study, study.ask(), "k", Reaper())
    assert study.trials[-1].user_attrs["confirmed"]


def test_an_earlier_trial_waits_for_a_later_one_that_died_before_it_confirmed(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = study.ask(), study.ask()
    mark(first, leases._place(), os.getpid())
    mark(second, leases._place(), gone())
    second.set_user_attr("key", "k")
    pauses = iter(range(3))
    monkeypatch.setattr(time, "sleep", lambda seconds: next(pauses))
    claim(study, first, "k", Reaper())
    assert states(study) == "RUNNING FAIL WAITING"
    assert study.trials[0].user_attrs["confirmed"]


def _claim_once(study: optuna.Study, key: str, won: list[int], ready: threading.Barrier) -> None:
    trial = study.ask()
    mark(trial, leases._place(), os.getpid())
    ready.wait()
    try:
        claim(study, trial, key, Reaper())
        won.append(trial.number)
    except RejectedError as rejection:
        trial.set_user_attr("outcome", "rejected")
        trial.set_user_attr("reason", str(rejection))
        study.tell(trial, state=TrialState.PRUNED)


def test_only_one_thread_claims_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    optuna.create_study(storage=open_storage(tmp_path), study_name="s")
    studies = [optuna.load_study(storage=open_storage(tmp_path), study_name="s") for _ in range(4)]
    for round_ in range(8):
        won: list[int] = []
        ready = threading.Barrier(len(studies))
        threads = [threading.Thread(target=_claim_once, args=(s, f"k{round_}", won, ready)) for s in studies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def _claim_many(folder: Path, log: Path, n: int) -> None:
    study = optuna.load_study(storage=open_storage(folder), study_name="s")
    for i in range(n):
        trial = study.ask()
        mark(trial, leases._place(), os.getpid())
        try:
            claim(study, trial, f"k{i}", Reaper())
            note(log, f"won k{i}")
            study.tell(trial, 1.0)
        except RejectedError:
            trial.set_user_attr("outcome", "rejected")
            study.tell(trial, state=TrialState.PRUNED)


@pytest.mark.slow
def test_only_one_process_claims_an_experiment(tmp_path: Path) -> None:
    optuna.create_study(storage=open_storage(tmp_path), study_name="s")
    finish(*[start(_claim_many, tmp_path, tmp_path / "log", 12) for _ in range(4)])
    assert sorted(noted(tmp_path / "log", "won")) == sorted(f"k{i}" for i in range(12))


# The loop of a worker


def test_a_surplus_trial_is_given_back_and_keeps_its_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    one, other = worker(sweep, tmp_path / "runs"), worker(sweep, tmp_path / "runs")
    asked = one.study.ask()  # the only one that was wanted
    with Lease(one.study, asked):
        with monkeypatch.context() as patch:
            # The other one saw nothing of it when it asked.
            patch.setattr("explore.study.worker.time.sleep", lambda s: (_ for _ in ()).throw(KeyboardInterrupt))
            assert other._run_leased(other.study.ask(), 1) is None
        assert other.study.trials[-1].user_attrs["outcome"] == RELEASED
        other.reaper.reap(other.study)
        assert other.study.trials[-1].user_attrs["draw"] == 1
        one.run(asked)
    other.work(2)
    assert len(done_by_key(one.study)) == 2
    undisturbed = worker(sweep, tmp_path / "undisturbed")
    undisturbed.work(2)
    assert done_by_key(one.study) == done_by_key(undisturbed.study)


@pytest.mark.parametrize("sampler", ["random", "qmc", "grid", "tpe"])
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_process_that_ends_gives_its_trial_back_with_its_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, end: type[BaseException]
) -> None:
    sweep, real, calls = load_sweep(write_sweep(tmp_path, tokens=128)), train.fit, []

    def fit(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) % 2:
            raise end
        return real(*args, **kwargs)

    def run(runs: Path) -> Any:
        return run_sweep(sweep, 3, runs, sampler=sampler, options=TrialOptions(notes=False), console=quiet())

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", fit)
        for _ in range(3):
            with pytest.raises(end):
                run(tmp_path / "runs")
        assert run(tmp_path / "runs").complete == 3
    study = study_of(tmp_path / "runs")
    for trial in study.trials:
        if "retry_of" in trial.user_attrs:
            assert study.trials[trial.user_attrs["retry_of"]].params == trial.params
    if sampler != "tpe":
        run(tmp_path / "undisturbed")
        assert done_by_key(study) == done_by_key(study_of(tmp_path / "undisturbed"))


def test_ctrl_c_is_restored_after_lightning_turned_it_into_an_exit_and_the_next_one_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(write_sweep(tmp_path))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LitLanguageModel, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, 1, tmp_path / "runs", options=TrialOptions(notes=False), console=quiet())
    assert signal.getsignal(signal.SIGINT) is before
    assert study_of(tmp_path / "runs").trials[0].user_attrs["outcome"] == RELEASED


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES"])
def test_a_disk_that_cannot_be_written_stops_the_sweep_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    sweep, runs, number = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", getattr(errno, code)

    def fit(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), "last.ckpt")

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", fit)
        with pytest.raises(ValueError, match=rf"^last.ckpt: {os.strerror(number)}; the sweep stops here"):
            worker(sweep, runs).work(1)
    one = worker(sweep, runs)
    one.work(1)
    assert [trial.user_attrs["outcome"] for trial in one.study.trials] == [RELEASED, "done"]


def test_an_error_on_a_full_disk_is_a_fault_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that torch raises has no error number."""
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("file write failed")))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(ValueError, match=r"runs: the disk must have room for 2 checkpoints .*; the sweep stops here"):
        worker(load_sweep(write_sweep(tmp_path)), tmp_path / "runs").work(1)


def test_a_worker_waits_for_a_run_that_another_process_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    experiment = sweep.experiment(optuna.trial.FixedTrial(dict(sweep.baselines[0])))  # type: ignore[arg-type]
    folder = fitting.run_folder(runs, experiment.name, experiment.key()).path
    one, lock = worker(sweep, runs), ExitStack()
    lock.enter_context(fitting._locked(folder))
    real, pauses = time.sleep, []

    def pause(seconds: float) -> None:
        if seconds != IDLE_S:
            real(seconds)
            return
        pauses.append(seconds)
        if len(pauses) == 3:
            lock.close()

    monkeypatch.setattr(time, "sleep", pause)
    assert one.run(one.study.ask()).name == "done"
    assert len(pauses) == 3


@pytest.mark.parametrize("moment", ["_outcome", "tell"])
def test_a_trial_reaped_during_training_is_found_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Reaped before its outcome is reported, or after the last check."""
    sweep, runs, real, calls = load_sweep(write_sweep(tmp_path)), tmp_path / "runs", fitting.train_run, []
    monkeypatch.setattr(fitting, "train_run", lambda *args: (calls.append(args), real(*args))[1])
    slow = worker(sweep, runs)
    trial = slow.study.ask()
    place, name = (slow, "_outcome") if moment == "_outcome" else (slow.study, "tell")
    call = getattr(place, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        leave(slow.study, trial._cached_frozen_trial)
        return call(*args, **kwargs)

    monkeypatch.setattr(place, name, late)
    slow.run(trial)
    assert states(slow.study) == "FAIL"
    worker(sweep, runs).work(1)
    assert states(slow.study) == "FAIL COMPLETE"
    assert len(calls) == 1


def test_a_trial_reaped_before_its_lease_is_left_to_another_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(load_sweep(write_sweep(tmp_path)), tmp_path / "runs")
    ask = one.study.ask
    first = iter([True])

    def slow_ask() -> optuna.Trial:
        trial = ask()
        if next(first, False):
            leave(one.study, trial._cached_frozen_trial)
        return trial

    monkeypatch.setattr(one.study, "ask", slow_ask)
    one.work(1)
    assert states(one.study) == "FAIL COMPLETE"


def test_the_first_of_two_retries_of_a_trial_counts(tmp_path: Path) -> None:
    one = worker(load_sweep(write_sweep(tmp_path)), tmp_path / "runs")
    one.sweep = dataclasses.replace(one.sweep, experiment=_raises)
    leave(one.study, one.study.ask()._cached_frozen_trial)
    for _ in range(2):  # by two processes at once
        one.study.enqueue_trial({}, user_attrs={"retry_of": 0, "draw": 0})
    assert [one.run(one.study.ask()).name for _ in range(2)] == ["failed", "rejected"]


def _raises(trial: optuna.Trial) -> Any:
    raise ValueError("no experiment")


@pytest.mark.slow
def test_two_workers_share_the_trials_and_each_experiment_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, runs, real, started = write_sweep(tmp_path), tmp_path / "runs", processes.start_worker, []
    monkeypatch.setattr(
        processes, "start_worker", lambda post: started.append(os.environ["EXPLORE_THREADS"]) or real(post)
    )
    summary = run_sweep(load_sweep(file), 6, runs, workers=2, options=TrialOptions(notes=False), console=quiet())
    assert (summary.complete, summary.failed) == (6, 0)
    assert started == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2
    run_sweep(load_sweep(file), 6, tmp_path / "undisturbed", options=TrialOptions(notes=False), console=quiet())
    assert_same(done_by_key(study_of(runs)), done_by_key(study_of(tmp_path / "undisturbed")))


@pytest.mark.slow
def test_workers_may_be_jobs_of_submitit(tmp_path: Path) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    options = TrialOptions(notes=False)
    summary = run_sweep(sweep, 4, runs, workers=2, cluster="local", options=options, console=quiet())
    assert (summary.complete, summary.failed) == (4, 0)
    assert len(list((runs / "cluster").glob("*_submitted.pkl"))) == 2
    with pytest.raises(ValueError, match=r"^--cluster: local: .*nosuch"):
        run_sweep(sweep, 5, runs, cluster="local", cluster_options={"nosuch": 1}, options=options, console=quiet())
