"""Signals that end a process: it ends in order, with the usual exit code, and nothing is lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import STEPS, TOKENS, result, tiny, train, write_corpus

from explore.runs import RunFolder
from explore.termination import TerminatedError, termination_handled
from explore.train import LitLanguageModel


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def call_in(patch: pytest.MonkeyPatch, hook: str, step: int, call: Callable[[], None]) -> None:
    """Calls a function in a hook of training, the first time after a number of steps."""
    original, left = getattr(LitLanguageModel, hook), [call]

    def called(self: LitLanguageModel, *args: Any, **kwargs: Any) -> Any:
        if self.global_step == step and left:
            left.pop()()
        return original(self, *args, **kwargs)

    patch.setattr(LitLanguageModel, hook, called)


def ask(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


def step_of(runs: Path) -> int:
    (path,) = runs.glob("*/checkpoints/last.ckpt")
    return int(torch.load(path, weights_only=True)["global_step"])


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    ours, theirs = (run.metrics.drop(columns="tokens_per_s") for run in (one, other))
    pd.testing.assert_frame_equal(ours, theirs)
    for score in ("val_loss", "test_loss", "max_violation"):
        assert result(one)[score] == result(other)[score]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("hook", "step", "ended_at"),
    [("training_step", 7, 8), ("training_step", 9, 10), ("training_step", 19, 20), ("validation_step", 10, 10)],
)
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(
    corpus: Path, tmp_path: Path, signum: int, hook: str, step: int, ended_at: int
) -> None:
    one = tiny(corpus, "E", train__val_every=5)
    with pytest.MonkeyPatch.context() as patch:
        call_in(patch, hook, step, lambda: ask(signum))
        with pytest.raises(TerminatedError) as end:
            train(one, tmp_path / "ended", checkpoint_every=6)
    assert end.value.code == 128 + signum
    assert step_of(tmp_path / "ended") == ended_at
    assert not list(tmp_path.glob("ended/*/result.json"))
    again = train(one, tmp_path / "ended", checkpoint_every=6)
    assert_same_run(again, train(one, tmp_path / "through", checkpoint_every=6))


def test_a_signal_before_the_first_step_is_over_ends_a_run_at_once(corpus: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        call_in(patch, "training_step", 0, ask)
        call_in(patch, "configure_gradient_clipping", 0, lambda: pytest.fail("the step went on"))
        with pytest.raises(TerminatedError):
            train(tiny(corpus, "-"), tmp_path)


def test_a_second_signal_ends_a_run_at_once(corpus: Path, tmp_path: Path) -> None:
    def twice() -> None:
        ask()
        ask()

    with pytest.MonkeyPatch.context() as patch:
        call_in(patch, "training_step", 5, twice)
        call_in(patch, "configure_gradient_clipping", 5, lambda: pytest.fail("the step went on"))
        with pytest.raises(TerminatedError):
            train(tiny(corpus, "-"), tmp_path)


def test_an_error_caused_by_a_signal_is_not_a_failure_of_the_run(corpus: Path, tmp_path: Path) -> None:
    def fail() -> None:
        ask()
        raise RuntimeError("the compiler was ended by the signal")

    with pytest.MonkeyPatch.context() as patch:
        call_in(patch, "training_step", 5, fail)
        with pytest.raises(TerminatedError):
            train(tiny(corpus, "-"), tmp_path)


def test_a_signal_while_a_model_is_scored_ends_the_run_at_once(corpus: Path, tmp_path: Path) -> None:
    from explore.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_splits", lambda *_: [ask(), pytest.fail("went on")])
        with pytest.raises(TerminatedError):
            train(tiny(corpus, "-"), tmp_path)
    assert step_of(tmp_path) == STEPS
    assert not list(tmp_path.glob("*/result.json"))


def test_handlers_are_set_only_in_the_block_and_foreign_ones_stay() -> None:
    def theirs(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_handled() as outer:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as under nohup
            with termination_handled() as inner:
                assert inner is outer
            with pytest.raises(TerminatedError):
                ask()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, theirs)
        with termination_handled() as requests:
            ask()
            assert requests.signum is None
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, before)


# The command


def start(folder: Path, *options: str, every: str = "1000", limit: int | None = None) -> subprocess.Popen[str]:
    """Runs `explore train` in its own process group, with a limit on the size of files."""
    command = [sys.executable, str(Path(sys.executable).with_name("explore")), "train", str(folder / "one.json")]
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    process = subprocess.Popen(
        [*command, "--runs", str(folder / "runs"), "--checkpoint-every", every, *options],
        env=kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if limit is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    return process


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def n_rows(runs: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("*/metrics.csv"))


def ended(process: subprocess.Popen[str], send: Callable[[], None]) -> str:
    """The error output of an ending process, which must be short."""
    try:
        send()
        return process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


LINE = "terminated; run the same command to resume\n"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(), ("--devices", "2"), ("--devices", "2", "--strategy", "fsdp")], ids=str)
@pytest.mark.parametrize("to_group", [False, True])
def test_the_command_ends_with_143_and_one_line(
    corpus: Path, tmp_path: Path, devices: tuple[str, ...], to_group: bool
) -> None:
    (tmp_path / "one.json").write_text(tiny(corpus, "E-", train__tokens=20_000 * TOKENS).model_dump_json())
    runs = tmp_path / "runs"
    stages: list[Callable[[], bool]] = [lambda: bool(list(runs.glob("*/experiment.json"))), lambda: n_rows(runs) > 3]
    for stage in stages:  # before training, and in it
        process = start(tmp_path, *devices)
        wait_for(stage, process)
        send = os.killpg if to_group else os.kill
        error = ended(process, lambda send=send, process=process: send(process.pid, signal.SIGTERM))  # type: ignore[misc]
        assert (process.returncode, error) == (128 + signal.SIGTERM, LINE)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    (folder,) = map(RunFolder, runs.iterdir())
    assert step_of(runs) >= folder.metrics["step"].max()


@pytest.mark.parametrize(("command", "line"), [("train", LINE), ("plot", "terminated\n"), ("export", "terminated\n")])
def test_only_commands_that_can_resume_say_so(
    command: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: Any, **__: Any) -> None:
        raise TerminatedError

    monkeypatch.setattr(sys, "argv", ["explore", command])
    app_module = import_module("explore.cli.app")  # the package has the application by the same name
    monkeypatch.setattr(app_module, "app", terminated)
    with pytest.raises(TerminatedError):
        app_module.main()
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_two_processes_report_ctrl_c_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(tiny(corpus, "E-", train__tokens=20_000 * TOKENS).model_dump_json())
    process = start(tmp_path, "--devices", "2")
    wait_for(lambda: n_rows(tmp_path / "runs") > 3, process)
    error = ended(process, lambda: os.killpg(process.pid, signal.SIGINT))
    assert (process.returncode, error) == (130, LINE.replace("terminated", "interrupted"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(), ("--devices", "2")], ids=str)
def test_a_full_disk_ends_all_processes_with_one_line(corpus: Path, tmp_path: Path, devices: tuple[str, ...]) -> None:
    one = tiny(corpus, "E-", train__tokens=20_000 * TOKENS)
    one.data.open(0)  # fills the token cache
    (tmp_path / "one.json").write_text(one.model_dump_json())
    for _ in range(2):
        process = start(tmp_path, *devices, every="10", limit=20_000)
        error = process.communicate(timeout=200)[1]
        assert process.returncode == 2, error
        (line,) = error.splitlines()
        assert line.startswith("error: ")
        assert os.strerror(errno.EFBIG) in line
        assert str(tmp_path / "runs") in line
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
