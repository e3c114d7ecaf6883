"""A sweep that takes a second, workers that are cheap to start and to kill, and a PostgreSQL server for tests."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

SWEEP = '''"""Does width help?"""

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.study import RejectedError

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
baselines = ({"d_model": 32, "n_layers": 2, "lr": 0.004},)
grid = {"d_model": [32, 64], "n_layers": [1, 2], "lr": [0.002, 0.004]}
sampler = "random"


def experiment(trial):
    d_model = trial.suggest_int("d_model", 32, 96, step=32)
    n_layers = trial.suggest_int("n_layers", 1, 3)
    lr = trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    if d_model * n_layers > 200:
        raise RejectedError("too large")
    model = ModelConfig(d_model=d_model, vocab_size=257, pattern="-" * n_layers, blocks={"-": {"d_ff": 64}})
    data = TextData(corpus=CORPUS, tokenizer="bytes", seq_len=32)
    train = TrainConfig(tokens=TOKENS, batch_size=4, lr=lr, eval_tokens=128)
    return Experiment(name="s", model=model, data=data, train=train)
'''


def write_sweep(
    folder: Path, name: str = "width", tokens: int = 512, replaced: Mapping[str, str] | None = None
) -> Path:
    """A sweep file with its corpus beside it.

    Args:
        replaced: pieces of the file's text, and what stands there instead.
    """
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    text = SWEEP.replace("CORPUS", repr(str(corpus))).replace("TOKENS", str(tokens))
    for old, new in (replaced or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


GATED = {
    'sampler = "random"': """sampler = "grid"
seeds = 3
gate = Gate(baseline=2, worse=(1,), trivial=(1,), effect=EFFECT, source="print", arm="n_layers", min_steps=1,
            min_tokens=0.0, value="val_bpb", floor=FLOOR)""",
    "from explore.study import": "from explore.frontier.gate import Gate\nfrom explore.study import",
}


def write_gated(folder: Path, floor: str = "0.1") -> Path:
    """A sweep file with a gate on its number of layers, in a new folder.

    Args:
        floor: the floor of the gate, as code.
    """
    folder.mkdir()
    replaced = {old: new.replace("EFFECT", "10.0").replace("FLOOR", floor) for old, new in GATED.items()}
    replaced['grid = {"d_model": [32, 64], "n_layers": [1, 2], "lr": [0.002, 0.004]}'] = (
        'grid = {"d_model": [64, 32], "n_layers": [2, 1], "lr": [0.002]}'
    )
    replaced['baselines = ({"d_model": 32, "n_layers": 2, "lr": 0.004},)'] = ""
    return write_sweep(folder, replaced=replaced, tokens=256)


def quiet() -> Console:
    return Console(quiet=True)


def study_of(runs: Path, name: str = "width", url: str | None = None) -> optuna.Study:
    from explore.study.storage import open_storage

    return optuna.load_study(study_name=name, storage=open_storage(runs, url))


def done_by_key(study: optuna.Study) -> dict[str, list[float]]:
    """Values of the complete trials by the keys of their experiments, which must be distinct."""
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    found = {trial.user_attrs["key"]: list(trial.values) for trial in done}
    assert len(found) == len(done), "an experiment counts twice"
    return found


def assert_same(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values == pytest.approx(expected[key], abs=1e-6)


# Workers. A server that has imported everything forks them, so a start does not take five seconds.


def start(target: Callable[..., Any], *args: Any, **kwargs: Any) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["explore.study", "explore.train.fitting", "small_sweeps"])
    process = context.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process


def work(
    file: Path,
    runs: Path,
    n_trials: int,
    log: Path | None = None,
    before: Callable[[], None] | None = None,
    **kwargs: Any,
) -> None:
    """Runs a sweep in this process; writes to `log` that it has the study, what it trains, and an error at the end."""
    from explore.study import TrialOptions, crew, load_sweep, run_sweep
    from explore.train import fitting, loop

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    train, write, open_study = fitting.train_run, loop.write_json, crew.open_study

    def noted_open(*args: Any, **options: Any) -> optuna.Study:
        study = open_study(*args, **options)
        note(log, f"open {study.study_name}")
        return study

    def noted_train(run: Any) -> Any:
        note(log, f"start {run.key[:8]}")
        return train(run)

    def noted_write(path: Path, record: Any) -> None:
        write(path, record)
        if path.name == "result.json":
            note(log, f"end {path.parent.name[-8:]}")

    fitting.train_run, loop.write_json, crew.open_study = noted_train, noted_write, noted_open
    if before is not None:
        before()
    try:
        run_sweep(
            load_sweep(file),
            n_trials,
            runs,
            options=TrialOptions(checkpoint_every=10, notes=False),
            console=quiet(),
            **kwargs,
        )
    except (ValueError, OSError) as error:
        note(log, f"error {error}")
        print(error, file=sys.stderr)
        sys.exit(2)


def note(log: Path | None, line: str) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(f"{line}\n")


def noted(log: Path, kind: str) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(kind)]


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def finish(*processes: Any, seconds: float = 90.0) -> None:
    """Waits until processes end successfully."""
    try:
        for process in processes:
            process.join(seconds)
            assert process.exitcode == 0, f"exit code {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# PostgreSQL


def postgres_programs() -> Path | None:
    """Folder of the programs of the newest server, where Debian installs them or where `postgres` is found."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    where = str(found[-1]) if found else shutil.which("postgres")
    return Path(where).parent if where else None


class Postgres:
    """A server on a free port with its own data folder; PostgreSQL refuses root, so root starts it as another user."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.port = programs, folder, free_port()
        self.somebody: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = {user.pw_name: user for user in pwd.getpwall()}
            user = names.get("postgres") or names["nobody"]
            os.chown(folder, user.pw_uid, user.pw_gid)
            self.somebody = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.n_databases = 0
        self._run("initdb", "--pgdata", str(folder / "data"), "--auth", "trust", "--username", "explore", "--no-sync")

    def _run(self, program: str, *options: str, check: bool = True) -> int:
        command = [str(self.programs / program), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        done = subprocess.run(command, cwd=self.folder, check=check, **quiet, **self.somebody)  # type: ignore[call-overload]
        return int(done.returncode)

    def start(self) -> None:
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder), "-c", "fsync=off"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [str(self.programs / "postgres"), *options, "-c", "listen_addresses=127.0.0.1"],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self.somebody,
            )
        where = ("-h", str(self.folder), "-p", str(self.port))
        wait_until(lambda: self._run("pg_isready", *where, check=False) == 0)

    def stop(self) -> None:
        """Ends the server immediately, with clients connected."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def database(self) -> str:
        """URL of an empty database."""
        self.n_databases += 1
        self._run("createdb", "-h", str(self.folder), "-p", str(self.port), "-U", "explore", f"d{self.n_databases}")
        return f"postgresql+psycopg://explore@127.0.0.1:{self.port}/d{self.n_databases}"


def running_postgres() -> Iterator[Postgres]:
    """A server for the duration of a fixture; skips if PostgreSQL is not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("the programs of a PostgreSQL server are not installed")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # the name of a socket must be short, and somebody else's
    server = Postgres(programs, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
