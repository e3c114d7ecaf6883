"""Storages: the journal stays intact after kills and full disks, and calls wait for an unavailable server."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.storages.journal import JournalStorage
from small_sweeps import Postgres, finish, free_port, running_postgres, start, wait_until
from sqlalchemy.exc import OperationalError, PendingRollbackError

from explore.study import serve_storage
from explore.study.journal import WholeJournal
from explore.study.storage import JOURNAL, open_storage, patient, study_names

postgres = pytest.fixture(scope="module", name="postgres")(running_postgres)


def entries(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.mark.parametrize("torn", [b"", b'{"op_code": 4, "wor', b"x" * 10_000])
def test_a_truncated_last_line_is_not_read_and_is_replaced_by_the_next(tmp_path: Path, torn: bytes) -> None:
    study = optuna.create_study(storage=open_storage(tmp_path))
    study.enqueue_trial({"x": 1})
    journal = tmp_path / JOURNAL
    before = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(torn)
    opened = optuna.load_study(storage=open_storage(tmp_path), study_name=study.study_name)
    assert len(opened.trials) == 1
    opened.enqueue_trial({"x": 2})
    assert journal.read_bytes().startswith(before)
    assert [trial.system_attrs["fixed_params"]["x"] for trial in study.trials] == [1, 2]
    assert len(entries(journal)) == len(before.splitlines()) + 1


def test_a_journal_with_one_truncated_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"op_code"')
    WholeJournal(tmp_path / JOURNAL).append_logs([{"a": 1}])
    assert entries(tmp_path / JOURNAL) == [{"a": 1}]


def _write_until_full(path: Path, limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    journal = WholeJournal(path)
    try:
        while True:
            journal.append_logs([{"text": "x" * 1000}])
    except OSError as error:
        sys.exit(0 if error.errno in (errno.EFBIG, errno.ENOSPC) and error.filename == str(path) else 3)


@pytest.mark.slow
def test_a_write_that_does_not_fit_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.touch()
    finish(start(_write_until_full, path, 5_500))
    assert entries(path) == [{"text": "x" * 1000}] * 5
    WholeJournal(path).append_logs([{"a": 1}])
    assert entries(path)[-1] == {"a": 1}


def _hold_lock(path: Path, locked: Path) -> None:
    with WholeJournal(path)._held():
        locked.touch()
        time.sleep(100)


@pytest.mark.slow
def test_locks_of_a_killed_process_are_released_soon(tmp_path: Path) -> None:
    path, locked = tmp_path / "runs" / JOURNAL, tmp_path / "locked"
    path.parent.mkdir()
    holder = start(_hold_lock, path, locked)
    wait_until(locked.exists)
    with path.with_name(f"{JOURNAL}.flock").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.join()
    assert path.with_name(f"{JOURNAL}.lock").is_symlink()
    _append(path, "a", 1)
    assert entries(path) == [{"name": "a", "i": 0}]


def test_a_link_left_by_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the folder of runs is a relative path, as it is by default."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    killed = WholeJournal(Path("runs") / JOURNAL)
    killed.link.acquire()
    journal = WholeJournal(Path("runs") / JOURNAL)
    monkeypatch.setattr(journal.link, "stale_s", 0.2)
    ended = threading.Thread(target=journal.append_logs, args=([{"a": 1}],), daemon=True)
    ended.start()
    ended.join(10)
    assert entries(tmp_path / "runs" / JOURNAL) == [{"a": 1}]


def _append(path: Path, name: str, n: int) -> None:
    journal = WholeJournal(path)
    for i in range(n):
        journal.append_logs([{"name": name, "i": i}])


@pytest.mark.slow
def test_lines_of_several_writers_are_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    finish(*[start(_append, path, name, 50) for name in "abc"])
    for name in "abc":
        assert [entry["i"] for entry in entries(path) if entry["name"] == name] == list(range(50))


def test_study_names_stop_at_the_first_gap() -> None:
    storage = InMemoryStorage()
    for name in ("s", "s-3", "s-2", "s-5", "other"):
        optuna.create_study(storage=storage, study_name=name)
    assert study_names(storage, "s") == ["s", "s-2", "s-3"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot be opened"),
        ("nosuch://user:secret@host/name", "cannot be opened"),
        ("mysql+nosuch://user:secret@host/name", "cannot be opened"),
        ("grpc://localhost", "grpc://host:port"),
        ("grpc://user:secret@127.0.0.1:1", "grpc://host:port, without user and password"),
        ("postgresql:/user:secret@host/name", "cannot be opened"),
        ("postgresql+psycopg://127.0.0.1:1/name?password=secret", "refused"),
        ("postgresql+psycopg://127.0.0.1:1/name?passwrd=secret", "passwrd"),
        ("postgresql+psycopg://user:secret#1/name", "write @ as %40"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/name", "refused"),
        ("postgresql+psycopg://user:se@cr:et@127.0.0.1:1/name", "write @ as %40"),
        ("grpc://127.0.0.1:1", "onnect"),
        ("sqlite:////no/such/folder/study.db", "unable to open"),
    ],
)
def test_a_storage_that_does_not_open_is_one_line_without_the_password(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^--storage: ") as refusal:
        open_storage(tmp_path, url)
    text = str(refusal.value)
    assert message in text
    assert "\n" not in text
    assert "secret" not in text
    assert "cr:et" not in text
    assert "et@" not in text


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ValueError, match=r"package grpc: pip install 'hybrid-frontier\[cluster\]'"):
        open_storage(tmp_path, "grpc://127.0.0.1:1")
    for scheme, module, install in (
        ("postgresql", "psycopg", "'hybrid-frontier[cluster]'"),
        ("mysql", "pymysql", "'hybrid-frontier[cluster]'"),
        ("mysql+mysqldb", "MySQLdb", "mysqlclient"),
        ("oracle+oracledb", "oracledb", "oracledb"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            ValueError, match=rf"{re.escape(scheme)} needs the package {module}: pip install "
        ) as refusal:
            open_storage(tmp_path, f"{scheme}://user@127.0.0.1:1/name")
        assert str(refusal.value).endswith(install)


class Away(InMemoryStorage):
    """A storage that answers each call only after a few attempts."""

    def __init__(self, n: int, error: Exception) -> None:
        super().__init__()
        self.n, self.error, self.left = n, error, n

    def create_new_study(self, *args: Any, **kwargs: Any) -> int:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return super().create_new_study(*args, **kwargs)


def grpc_error(name: str) -> Exception:
    error = RuntimeError()
    error.code = lambda: SimpleNamespace(name=name)  # type: ignore[attr-defined]
    error.details = lambda: "in its words"  # type: ignore[attr-defined]
    return error


def wrapped(error: Exception) -> Exception:
    outer = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    outer.__cause__ = error
    return outer


GONE = OperationalError("SELECT", {}, Exception("the server closed the connection\nunexpectedly"))


CUT_OFF = PendingRollbackError("Can't reconnect until invalid transaction is rolled back.")


@pytest.mark.parametrize(
    "error", [GONE, wrapped(GONE), wrapped(CUT_OFF), ConnectionResetError(), grpc_error("UNAVAILABLE")]
)
def test_a_patient_storage_waits_and_returns_the_result(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    messages: list[str] = []
    study = optuna.create_study(storage=patient(Away(8, error), messages.append), study_name="s")
    assert study.study_name == "s"
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10]
    assert len(messages) == 4
    assert all("does not answer" in line and "\n" not in line for line in messages)


@pytest.mark.parametrize("error", [KeyError("x"), grpc_error("NOT_FOUND"), wrapped(ValueError("too long"))])
def test_a_patient_storage_does_not_retry_an_invalid_call(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("waited"))
    with pytest.raises(type(error)):
        optuna.create_study(storage=patient(Away(1, error), lambda line: None))


def test_a_patient_storage_gives_up_after_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    with pytest.raises(ValueError, match=r"^storage: no answer for 6\d\d s: .*closed the connection"):
        optuna.create_study(storage=patient(Away(10_000, GONE), lambda line: None))


def test_a_patient_storage_has_every_method_of_a_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    studies = [optuna.create_study(storage=open_storage(tmp_path, url), study_name="s")]
    studies.append(optuna.create_study(storage=open_storage(tmp_path), study_name="s"))
    for study in studies:
        study.enqueue_trial({"x": 0.25}, user_attrs={"a": 1})
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
        assert study.trials[0].value == 0.25
        assert study.best_trial.value is not None
        assert study.best_trial.value <= 0.25


def _create(url: str, folder: Path) -> None:
    study = optuna.create_study(storage=open_storage(folder, url), study_name="s", load_if_exists=True)
    study.tell(study.ask(), 1.0)


@pytest.mark.slow
def test_processes_may_open_an_empty_database_at_once(postgres: Postgres, tmp_path: Path) -> None:
    for _ in range(2):
        url = postgres.database()
        finish(*[start(_create, url, tmp_path) for _ in range(4)])
        study = optuna.load_study(storage=open_storage(tmp_path, url), study_name="s")
        assert sorted(trial.number for trial in study.trials) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_patient_storage_waits_for_a_restarted_server(postgres: Postgres, tmp_path: Path) -> None:
    messages: list[str] = []
    url = postgres.database()
    study = optuna.create_study(storage=open_storage(tmp_path, url, messages.append))
    study.enqueue_trial({"x": 1})
    postgres.stop()
    with pytest.raises(ValueError, match=r"cannot be opened: .*refused"):
        open_storage(tmp_path, url)
    postgres.start()
    assert len(study.trials) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["journal", "postgres"])
def test_a_proxy_serves_a_storage_to_other_processes(
    request: pytest.FixtureRequest, tmp_path: Path, place: str
) -> None:
    where = str(tmp_path)
    if place == "postgres":
        where = request.getfixturevalue("postgres").database()
    direct = optuna.create_study(
        storage=open_storage(tmp_path, where if "://" in where else None), study_name="s", directions=["minimize"] * 2
    )
    port = free_port()
    server = start(serve_storage, where, "127.0.0.1", port)
    try:
        far_storage = open_storage(tmp_path, f"grpc://127.0.0.1:{port}", patience_s=60)
        far = optuna.load_study(storage=far_storage, study_name="s")
        far.enqueue_trial({"x": 1.0}, user_attrs={"a": [1, {"b": None}]})
        trial = far.ask()
        assert trial.suggest_float("x", 0, 2) == 1.0
        trial.set_user_attr("lease", {"beat": 1})
        far.tell(trial, [1.0, 2.0])
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            far_storage.set_trial_user_attr(trial._trial_id, "late", 1)
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            optuna.create_study(storage=far_storage, study_name="s", directions=["minimize"] * 2)
        assert [t.values for t in direct.trials] == [[1.0, 2.0]]
        assert direct.trials[0].user_attrs == {"a": [1, {"b": None}], "lease": {"beat": 1}}
    finally:
        server.kill()
        server.join()


def test_a_storage_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^STORAGE must be a URL or a folder with a study.journal, got '.*'"):
        serve_storage(str(tmp_path), "127.0.0.1", free_port())
    with pytest.raises(ValueError, match=r"^STORAGE: postgresql\+psycopg://me@127.0.0.1:1/x cannot be opened"):
        serve_storage("postgresql+psycopg://me:secret@127.0.0.1:1/x", "127.0.0.1", free_port())


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    import socket

    open_storage(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--port: {port} on 127.0.0.1 cannot be listened on"):
            serve_storage(str(tmp_path), "127.0.0.1", port)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        open_storage(tmp_path / "file" / "runs")
    assert not isinstance(open_storage(tmp_path), os.PathLike)
    assert isinstance(open_storage(tmp_path), JournalStorage)
