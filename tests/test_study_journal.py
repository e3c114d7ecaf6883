"""The journal of a study: damaged lines are named, and abandoned locks are removed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from explore.study.journal import JournalError, WholeJournal
from explore.study.storage import JOURNAL, open_storage
from explore.study.watching import find_study


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal of a study with two trials, about twelve lines."""
    study = optuna.create_study(storage=open_storage(tmp_path / "runs"), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    return tmp_path / "runs" / JOURNAL


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[: len(line) // 2],
    "empty": lambda line: b"",
    "zeros": lambda line: bytes(len(line)),
    "flipped": lambda line: b"\x7b\xff" + line[2:],
    "two": lambda line: line + line,
    "list": lambda line: b"[1]",
    "no_code": lambda line: b'{"study_id": 0}',
    "other_code": lambda line: b'{"op_code": 99}',
    "other_types": lambda line: b'{"op_code": 4, "study_id": [], "worker_id": 3}',
    "carriage": lambda line: b"\r" + line[: len(line) // 2] + b"\r",
}


@pytest.mark.parametrize("number", [4, -1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_with_its_journal(journal: Path, damage: str, number: int) -> None:
    lines = journal.read_bytes().splitlines()
    lines[number] = DAMAGES[damage](lines[number])
    journal.write_bytes(b"\n".join(lines) + b"\n")
    place = number % len(lines) + 1
    for call in (lambda: open_storage(journal.parent), lambda: find_study(str(journal.parent))):
        with pytest.raises(JournalError) as refusal:
            call()
        text = str(refusal.value)
        assert text.startswith(f"{journal}: line {place} is damaged (")
        assert "move it away" in text
        assert "\n" not in text
        assert len(text) < 400 + len(str(journal))


def test_a_line_damaged_while_the_study_is_open_is_named(journal: Path) -> None:
    study = optuna.load_study(storage=open_storage(journal.parent), study_name="s")
    n = journal.read_bytes().count(b"\n")
    with journal.open("ab") as file:
        file.write(b"{}}\n")
    with pytest.raises(JournalError, match=rf"line {n + 1} is damaged"):
        study.get_trials()


def test_every_entry_is_read_once_and_in_order(tmp_path: Path) -> None:
    reader, writer = (WholeJournal(tmp_path / JOURNAL) for _ in range(2))
    writer.append_logs([{"i": i} for i in range(3)])
    assert [log["i"] for log in reader.read_logs(0)] == [0, 1, 2]
    writer.append_logs([{"i": 3}, {"i": 4}])
    assert [log["i"] for log in reader.read_logs(3)] == [3, 4]
    assert [log["i"] for log in WholeJournal(tmp_path / JOURNAL).read_logs(2)] == [2, 3, 4]
    assert list(reader.read_logs(5)) == []


def append(path: Path, *, stale_s: float = 0.2) -> None:
    """Appends an entry in a thread, because an abandoned lock would block forever."""
    journal = WholeJournal(path)
    journal.link.stale_s = stale_s
    ended = threading.Thread(target=journal.append_logs, args=([{"a": 1}],), daemon=True)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()
    assert list(WholeJournal(path).read_logs(0))[-1] == {"a": 1}
    assert not os.path.lexists(f"{path}.lock")


def test_a_dangling_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / "gone" / JOURNAL)
    append(tmp_path / JOURNAL)


def test_a_folder_moved_with_its_link_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    WholeJournal(tmp_path / "old" / JOURNAL).link.acquire()
    shutil.move(tmp_path / "old", tmp_path / "new")
    append(tmp_path / "new" / JOURNAL)


def test_a_stale_link_of_a_journal_in_use_is_removed(tmp_path: Path) -> None:
    """For example, the folder was copied and the original is in use."""
    (tmp_path / "busy").touch()
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / "busy")
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            os.utime(tmp_path / "busy")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        append(tmp_path / JOURNAL)
    finally:
        over.set()
        worker.join()


def test_a_link_held_alternately_by_others_is_not_removed(tmp_path: Path) -> None:
    link = WholeJournal(tmp_path / JOURNAL).link
    link.acquire()
    taken: list[float] = []

    def wait() -> None:
        other = WholeJournal(tmp_path / JOURNAL).link
        other.stale_s = 0.4
        other.acquire()
        taken.append(time.monotonic())

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    for _ in range(4):  # each holds it for less than the time after which it counts as stale
        time.sleep(0.2)
        (tmp_path / "next").symlink_to(tmp_path / JOURNAL)
        (tmp_path / "next").rename(f"{tmp_path / JOURNAL}.lock")
    assert not taken
    link.release()
    waiting.join(10)
    assert taken
