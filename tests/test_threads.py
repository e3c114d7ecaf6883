"""Threads: how they wait, how many there are, and that a choice of the user wins."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_runs import TOKENS, tiny, train, write_corpus

from explore import threads
from explore.bench import neighbours
from explore.train import fitting

LINUX = hasattr(os, "sched_getaffinity")
FREE = {name: value for name, value in os.environ.items() if name not in (*threads.COUNTS, *threads.OWN)}
SAY = "import os; print({name: os.environ[name] for name in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME') if name in os.environ})"


def printed(code: str, **variables: str) -> str:
    """The output of a new process."""
    command = [sys.executable, "-c", f"{code}; {SAY}"]
    return subprocess.run(command, env=FREE | variables, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_explore_limits_spinning() -> None:
    assert printed("import explore") == str(threads.SPINS)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("KMP_BLOCKTIME", "200")])
def test_a_wait_policy_of_the_user_is_kept(name: str, value: str) -> None:
    expected = {name: value} if name in threads.SPINS else {}
    assert printed("import explore", **{name: value}) == str(expected)


def test_nothing_is_set_once_torch_is_loaded() -> None:
    assert printed("import torch, explore") == "{}"


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process with four cores and no chosen number of threads."""
    before = torch.get_num_threads()
    for name in (*threads.COUNTS, threads.SHARE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_chosen", [])
    monkeypatch.setattr(threads, "n_cores", lambda: 4)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(("free", "expected"), [(4, 4), (3, 3), (1, 1), (0, 1)])
def test_there_are_as_many_threads_as_free_cores_and_at_least_one(
    torch_threads: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    torch_threads.setattr(threads, "free_cores", lambda: free)
    assert threads.use_free_cores() == torch.get_num_threads() == expected


def test_all_cores_are_used_again_after_a_busy_run(torch_threads: pytest.MonkeyPatch) -> None:
    torch_threads.setattr(threads, "free_cores", lambda: 1)
    assert threads.use_free_cores() == 1
    threads.use_all_cores()
    assert torch.get_num_threads() == 4
    torch_threads.setenv(threads.SHARE, "2")
    threads.use_all_cores()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(3)  # by the user
    threads.use_all_cores()
    assert torch.get_num_threads() == 3


def test_threads_are_restored_when_a_neighbour_has_ended(torch_threads: pytest.MonkeyPatch) -> None:
    torch_threads.setattr(threads, "free_cores", lambda: 1)
    assert threads.use_free_cores() == 1
    torch_threads.setattr(threads, "free_cores", lambda: 4)
    assert threads.use_free_cores() == 4


@pytest.mark.parametrize(("share", "n_processes", "expected"), [("2", 1, 2), ("4", 2, 2), ("1", 1, 1), ("1", 2, 1)])
def test_a_worker_keeps_to_its_share(
    torch_threads: pytest.MonkeyPatch, share: str, n_processes: int, expected: int
) -> None:
    torch_threads.setenv(threads.SHARE, share)
    torch_threads.setattr(threads, "free_cores", lambda: 4)
    assert threads.use_free_cores(n_processes) == expected


def test_a_number_of_threads_of_the_user_is_kept(torch_threads: pytest.MonkeyPatch) -> None:
    torch_threads.setattr(threads, "free_cores", lambda: 1)
    torch.set_num_threads(3)
    assert threads.use_free_cores() == 3
    torch.set_num_threads(4)
    torch_threads.setenv("OMP_NUM_THREADS", "4")
    assert threads.use_free_cores() == 4


def machine(monkeypatch: pytest.MonkeyPatch, *usages: tuple[float, float, float]) -> None:
    """Returns, at each call, the time, the idle seconds of all cores, and the seconds used by this process."""
    answers = iter([threads._Usage(*usage) for usage in usages])
    monkeypatch.setattr(threads, "_usage", lambda: next(answers))


def test_free_cores_are_those_left_idle_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (10.0, 100.0, 7.0), (10.5, 100.5, 7.25))
    assert threads.free_cores(0) == 2  # one core idle and half of one used here: 1.5, rounded to even


def test_a_run_yields_cores_to_a_neighbour_and_takes_them_back(torch_threads: pytest.MonkeyPatch) -> None:
    machine(torch_threads, (0.0, 0.0, 0.0), (6.0, 1.0, 11.0), (12.0, 19.0, 17.0))
    torch_threads.setattr(threads.time, "monotonic", iter([4.0, 6.0, 7.0, 12.0]).__next__)
    watch = threads.CoreWatch()
    seen = []
    for _ in range(4):
        watch.look()
        seen.append(torch.get_num_threads())
    assert seen == [4, 2, 2, 4]  # too early, two cores busy elsewhere, too early again, all free


def test_a_run_keeps_the_threads_of_the_user_at_any_load(torch_threads: pytest.MonkeyPatch) -> None:
    machine(torch_threads, (0.0, 0.0, 0.0))
    torch_threads.setattr(threads.time, "monotonic", lambda: 6.0)
    watch = threads.CoreWatch()
    torch.set_num_threads(3)
    watch.look()
    assert torch.get_num_threads() == 3


def test_all_cores_are_free_if_the_load_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_idle_s", lambda cores: None)
    assert threads.free_cores() == threads.n_cores()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_idle_time_is_at_most_wall_time() -> None:
    assert 0 <= threads.free_cores(0.1) <= threads.n_cores() + 1


def test_the_record_of_a_run_has_its_cores_and_how_its_threads_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in threads.OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "123")
    monkeypatch.setenv("KMP_BLOCKTIME", "4")
    (tmp_path / "text").mkdir()
    run = train(tiny(write_corpus(tmp_path / "text"), "-", train__tokens=TOKENS), tmp_path / "runs")
    assert run.environment["cores"] == (len(os.sched_getaffinity(0)) if LINUX else os.cpu_count())
    assert run.environment["waiting"] == {"GOMP_SPINCOUNT": "123", "KMP_BLOCKTIME": "4"}


def test_a_run_beside_busy_processes_says_and_records_its_threads(
    torch_threads: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_threads.setattr(threads, "free_cores", lambda: 2)
    torch_threads.setattr(fitting, "n_cores", lambda: 4)
    (tmp_path / "text").mkdir()
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    one = tiny(write_corpus(tmp_path / "text"), "-", train__tokens=TOKENS)
    run = train(one, tmp_path / "runs", console=console)
    assert "threads: 2 of 4, as other processes are busy\n" in console.file.getvalue()
    assert run.environment["threads"] == 2


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_beside_a_busy_process_keeps_30_percent_of_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ours is measured: torch's own choice takes most of the time beside a busy process."""
    measured = neighbours._run

    def ours(shape: str, seconds: float, variables: dict[str, str]) -> dict[str, Any]:
        return {"tokens_per_s": 100.0} if variables else measured(shape, seconds, variables)

    monkeypatch.setattr(neighbours, "_run", ours)
    records: Any = neighbours.time_neighbours("tiny", 0.5)
    with contextlib.closing(records):
        alone, beside = itertools.islice(records, 2)
    numbers = ("tokens_per_s", "of_idle", "torch_tokens_per_s", "torch_of_idle")
    for n, record in enumerate((alone, beside)):
        assert record.keys() == {"neighbours", "threads", *numbers}
        assert record["neighbours"] == n
        assert 1 <= record["threads"] <= threads.n_cores()
        assert all(record[name] > 0 for name in numbers)
        for kind in ("", "torch_"):
            ratio = record[f"{kind}tokens_per_s"] / alone[f"{kind}tokens_per_s"]
            assert record[f"{kind}of_idle"] == pytest.approx(ratio)
    assert alone["of_idle"] == alone["torch_of_idle"] == 1
    assert beside["of_idle"] > 0.3
