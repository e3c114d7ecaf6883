"""Storage of studies: one journal file by default, or any Optuna storage; calls wait for an unreachable server."""

from __future__ import annotations

import random
import time
import warnings
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage

from explore.study.faults import FaultError
from explore.study.journal import open_journal
from explore.study.secrets import hide_secrets, without_password

JOURNAL = "study.journal"
PATIENCE_S = 600.0
"""Seconds that a server may be unreachable before a worker gives up."""
ATTEMPTS = 10
"""Attempts to create the tables of an empty database while another process does the same."""

DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
"""Default drivers, from the extra `cluster`, for URLs that name none."""
EXTRA = ("grpc", "psycopg", "pymysql")
"""Storage packages in the extra `cluster`."""
PACKAGES = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary"}
"""Package names on PyPI that differ from the module names."""

Say = Callable[[str], None]


def open_storage(
    runs: Path, url: str | None = None, say: Say = lambda line: None, patience_s: float = 0.0
) -> BaseStorage:
    """Opens the storage at a URL, or the journal in the folder of runs.

    Args:
        url: an SQLAlchemy URL such as `postgresql+psycopg://user@host/name`, or `grpc://host:port`.
        say: receives one line when a server does not answer and is waited for.
        patience_s: seconds to wait for the server on opening; later calls wait up to `PATIENCE_S`.

    Raises:
        ValueError: no server answers, or a required package is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        runs.mkdir(parents=True, exist_ok=True)
        return open_journal(runs / JOURNAL)
    return patient(_opened(url, "--storage", say, patience_s), say)


def check_storage(url: str) -> None:
    """Checks the URL of a storage and imports what it needs; connects to nothing and writes nothing.

    Raises:
        ValueError: it is not the URL of a storage, or a required package is missing.
    """
    _opened(url, "--storage", lambda line: None, 0.0, _check_url)


def _opened(
    url: str, option: str, say: Say, patience_s: float, open_: Callable[[str], Any] | None = None
) -> BaseStorage:
    """Opens the storage at a URL; any failure becomes a one-line error without the password."""
    try:
        opened: BaseStorage = wait_for(lambda: (open_ or _remote)(url), say, patience_s)
        return opened
    except ImportError as error:
        package = str(getattr(error.__cause__ or error, "name", None))
        install = "'hybrid-frontier[cluster]'" if package in EXTRA else PACKAGES.get(package, package)
        why = f"{url.partition(':')[0]} needs the package {package}: pip install {install}"
    except Exception as error:  # each kind of server raises its own errors
        why = hide_secrets(_first_line(error), url)
    raise ValueError(f"{option}: {without_password(url)} cannot be opened: {why}")


def _host_and_port(url: str) -> tuple[str, str]:
    host, _, port = url.partition("://")[2].rstrip("/").rpartition(":")
    if not (host and port.isdigit()) or "@" in host:
        raise ValueError("a gRPC proxy is named as grpc://host:port, without user and password")
    import_module("grpc")  # Optuna would report it later and at greater length
    return host, port


def _check_url(url: str) -> None:
    from sqlalchemy import create_engine

    if url.startswith("grpc://"):
        _host_and_port(url)
    else:
        create_engine(_with_driver(url))


def _remote(url: str) -> BaseStorage:
    if url.startswith("grpc://"):
        host, port = _host_and_port(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage: BaseStorage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    else:
        storage = optuna.storages.get_storage(_relational(url))
    storage.get_all_studies()
    return storage


def _with_driver(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, rest = url.partition("://")
    url = f"{DRIVERS.get(scheme, scheme)}{mark}{rest}"
    try:
        make_url(url)
    except (ArgumentError, ValueError):  # its message may contain part of the password
        raise ValueError("it is not a URL; in a password, write @ as %40, : as %3A and / as %2F") from None
    return url


def _relational(url: str) -> RDBStorage:
    """Optuna's relational storage. Retries: of processes that create tables at once, all but one fail."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    url = _with_driver(url)
    for attempt in range(ATTEMPTS):
        try:
            storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError):
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(random.random())
        else:
            weakref.finalize(storage, storage.engine.dispose)  # closes the connections, which nothing else does
            return storage
    raise AssertionError


def serve_storage(place: str, host: str, port: int, say: Say = lambda line: None) -> None:
    """Serves a storage through Optuna's gRPC proxy until the process ends.

    Args:
        place: a URL, or a folder of runs.
        say: receives one line once the storage is open.

    Raises:
        ValueError: the storage does not open, or the port is unavailable.
    """
    if "://" not in place and not (Path(place) / JOURNAL).exists():
        raise ValueError(f"STORAGE must be a URL or a folder with a {JOURNAL}, got {without_password(place)!r}")
    storage = _opened(place, "STORAGE", lambda line: None, 0.0) if "://" in place else open_storage(Path(place))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        say(f"serving {without_password(place)} on grpc://{host}:{port}")
        try:
            optuna.storages.run_grpc_proxy_server(storage, host=host, port=port)
        except RuntimeError as error:
            raise ValueError(f"--port: {port} on {host} cannot be listened on: {_first_line(error)}") from None


def patient(storage: BaseStorage, say: Say, patience_s: float = PATIENCE_S) -> BaseStorage:
    """Wraps a storage so that every call waits for a server that does not answer.

    Raises:
        FaultError: from its calls, if the server has been unreachable for `patience_s` seconds.
    """

    def waiting(name: str) -> Callable[..., Any]:
        call = getattr(storage, name)
        return lambda _, *args, **kwargs: wait_for(lambda: call(*args, **kwargs), say, patience_s)

    names = BaseStorage.__abstractmethods__ | {"get_trial_id_from_study_id_trial_number", "remove_session"}
    made: BaseStorage = type("PatientStorage", (BaseStorage,), {name: waiting(name) for name in names})()
    return made


def wait_for(call: Callable[[], Any], say: Say, patience_s: float) -> Any:
    """Repeats a call until the server answers.

    Raises:
        FaultError: the server has been unreachable for `patience_s` seconds.
    """
    since, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except Exception as error:
            if not _is_away(error) or patience_s == 0:
                raise
            away_s = time.monotonic() - since
            if away_s > patience_s:
                raise FaultError(f"storage: no answer for {away_s:.0f} s: {_first_line(error)}") from None
            if pause > 1:
                say(f"the storage does not answer ({_first_line(error)}); waiting")
            time.sleep(pause)
            pause = min(2 * pause, 10)


def _is_away(error: BaseException) -> bool:
    """Whether the error means that the server is temporarily unreachable, not that the call is wrong."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    error = _cause(error)
    # PendingRollbackError: the server disappeared during a transaction, which Optuna has since rolled back.
    if isinstance(error, InterfaceError | OperationalError | ConnectionError | PendingRollbackError):
        return True
    code = getattr(error, "code", None)  # of grpc.RpcError
    return callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "CANCELLED", "UNKNOWN")


def _cause(error: BaseException) -> BaseException:
    """The cause behind Optuna's generic error for database failures."""
    return error.__cause__ or error if isinstance(error, optuna.exceptions.StorageInternalError) else error


def _first_line(error: BaseException) -> str:
    error = _cause(error)
    details = getattr(error, "details", None)  # of grpc.RpcError
    text = str(details() if callable(details) else error).strip()
    return (text.splitlines() or [type(error).__name__])[0]


def objectives_of(study: optuna.Study) -> dict[str, str]:
    """Names of a study's objectives, each with its direction: `minimize` or `maximize`."""
    names = study.metric_names or [f"objective {i}" for i in range(len(study.directions))]
    return {name: direction.name.lower() for name, direction in zip(names, study.directions, strict=True)}


def study_names(storage: BaseStorage, stem: str) -> list[str]:
    """Names of the studies of a sweep, the oldest first: `stem`, then `stem-2` and so on."""
    names = {study.study_name for study in storage.get_all_studies()}
    found, number = [], 1
    while (name := stem if number == 1 else f"{stem}-{number}") in names:
        found.append(name)
        number += 1
    return found
