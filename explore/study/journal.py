"""Optuna's journal file, made safe against partial lines, damaged lines and stale locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalStorage

from explore.foreign import parse_json
from explore.study.faults import FaultError

STALE_S = 5.0
"""Seconds after which a lock counts as stale and is removed; a live process never holds one for this long."""
POLL_S = 0.01


class JournalError(FaultError):
    """A journal has a damaged line."""


def open_journal(path: Path) -> JournalStorage:
    """Opens a journal file, creating it if missing.

    Raises:
        JournalError: a line cannot be read; the message names the file and the line.
    """
    journal = WholeJournal(path)
    try:
        return JournalStorage(journal)
    except JournalError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:  # valid JSON, wrong content
        raise journal.damaged(f"{type(error).__name__}: {error}") from None


class WholeJournal(JournalFileBackend):
    """A journal that never keeps a partial line after a kill or a full disk; its lock ends with its process."""

    def __init__(self, path: Path) -> None:
        # The link must lead to the file from its own folder too, or Optuna never finds out that it is stale.
        self.path, self.link = path, _Link(str(path.resolve()))
        self._line = 0
        super().__init__(str(path), self.link)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The entries from this number on.

        Raises:
            JournalError: an entry is damaged.
        """
        known = log_number_from in self._log_number_offset
        self._line = log_number_from if known else 0
        with self.path.open("rb") as file:
            file.seek(self._log_number_offset[self._line])
            *lines, _ = file.read().split(b"\n")  # the last piece is still being written, or was cut off
        for raw in lines:
            self._log_number_offset[self._line + 1] = self._log_number_offset[self._line] + len(raw) + 1
            self._line += 1
            if self._line > log_number_from:
                yield self._parsed(raw)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._held(), self.path.open("r+b", buffering=0) as file:
            whole = _whole_lines(file)
            file.seek(whole)
            file.truncate()
            try:
                if file.write(lines) != len(lines):  # the rest would not fit
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(whole)
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def damaged(self, why: str) -> JournalError:
        """The error for the line that was read last."""
        if self._line == 1:
            return JournalError(f"{self.path}: must be a journal of Optuna, but its first line is not ({why})")
        return JournalError(
            f"{self.path}: line {self._line} is damaged ({why}); restore the file, or move it away: "
            "a new study takes up the runs that have ended"
        )

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            log = parse_json(raw)
        except ValueError as error:
            raise self.damaged(str(error)) from None
        if not isinstance(log, dict):
            raise self.damaged(f"must be a JSON object, got {type(log).__name__}")
        return log

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Holds the write lock among all processes; the system releases it if its process dies.

        Also takes Optuna's lock, a symlink next to the file, because optuna-dashboard respects that one.
        """
        with self.path.with_name(f"{self.path.name}.flock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.link.acquire()
            try:
                yield
            finally:
                self.link.release()


class _Link(JournalFileSymlinkLock):
    """Optuna's lock, a symlink next to the journal; a stale link is removed, whatever it points to.

    Optuna judges staleness by the link's target. It waits for ever if the target does not exist, as after the folder
    was moved, or if it is another journal in use.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, grace_period=None)
        self.stale_s = STALE_S

    def acquire(self) -> bool:
        held, since = None, time.monotonic()
        while True:
            with suppress(FileExistsError):
                Path(self._lock_file).symlink_to(self._lock_target_file)
                return True
            with suppress(FileNotFoundError):  # its holder has just removed it
                status = os.lstat(self._lock_file)
                if held != (held := (status.st_ino, status.st_mtime_ns)):
                    since = time.monotonic()
                elif time.monotonic() - since > self.stale_s:
                    with suppress(RuntimeError):  # another process has removed it
                        self.release()
            time.sleep(POLL_S)


def _whole_lines(file: Any) -> int:
    """Size of a file up to the end of its last complete line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            return int(start + newline + 1)
        end = start
    return 0
