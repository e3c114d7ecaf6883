"""Number of threads of a process, and how they wait, so that a busy neighbour costs only its share of the speed.

OpenMP's threads wait for each other by spinning. If another process takes a core, the thread that lost it keeps all
others spinning, and two threads run at a twentieth of their speed. Two remedies are both needed: threads that stop
spinning soon, and no more threads than free cores.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SPINS = {"GOMP_SPINCOUNT": "50000", "KMP_BLOCKTIME": "1"}
"""How long threads spin before they sleep: rounds of GNU's OpenMP, milliseconds of Intel's.

Sleeping at once costs a quarter of the speed on an idle machine. Spinning for longer than the scheduler's time slice
gains nothing there, and costs most of the speed beside a busy process.
"""

OWN = ("OMP_WAIT_POLICY", *SPINS)
"""Environment variables that set how threads wait; any of them overrides `SPINS`."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set the number of threads."""

SHARE = "EXPLORE_THREADS"
"""Environment variable with which a sweep gives each worker its share of the cores."""

SAMPLE_S = 0.2
EVERY_S = 5.0

_chosen: list[int] = []  # the count that `use_free_cores` set last in this process, if it did


def choose_waiting() -> None:
    """Limits spinning, unless the user set how threads wait or torch, which reads the setting, is already loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in OWN):
        os.environ.update(SPINS)


def use_free_cores(n_processes: int = 1) -> int:
    """Sets the number of torch's threads to the number of free cores, at least one.

    A number set by the user, with OpenMP's variables or `torch.set_num_threads`, is kept.

    Args:
        n_processes: number of processes that train together and share the cores.

    Returns:
        The number of torch's threads.
    """
    import torch

    if not _set_by_user():
        _use(free_cores() if _limit(n_processes) > 1 else 1, n_processes)
    return torch.get_num_threads()


class CoreWatch:
    """Adjusts the number of threads to the number of free cores every few seconds.

    Args:
        n_processes: as for `use_free_cores`.
    """

    def __init__(self, n_processes: int = 1) -> None:
        self._n_processes = n_processes
        self._before = _usage()

    def look(self) -> None:
        """Updates the number of threads if `EVERY_S` seconds have passed since the last update."""
        if time.monotonic() - self._before.at < EVERY_S or _set_by_user() or _limit(self._n_processes) == 1:
            return
        now = _usage()
        _use(_free_between(self._before, now), self._n_processes)
        self._before = now


def use_all_cores() -> None:
    """Sets the number of torch's threads to that of a new process, however many cores are free.

    For results whose last bits, which depend on the number of threads, must be the same whatever ran before or runs
    beside. A number set by the user is kept.
    """
    if not _set_by_user():
        _use(_limit(1), 1)


def _set_by_user() -> bool:
    import torch

    return any(name in os.environ for name in COUNTS) or torch.get_num_threads() not in (*_chosen, n_cores())


def _limit(n_processes: int) -> int:
    return int(os.environ.get(SHARE, n_cores())) // n_processes


def _use(free: int, n_processes: int) -> None:
    import torch

    _chosen[:] = [max(1, min(_limit(n_processes), free))]
    torch.set_num_threads(*_chosen)


def waiting() -> dict[str, str]:
    """The current environment variables that set how threads wait, for the record of a run."""
    return {name: os.environ[name] for name in OWN if name in os.environ}


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores(sample_s: float = SAMPLE_S) -> int:
    """Number of usable cores that other processes leave idle, rounded, over a short sample.

    All cores if the system does not report it, as outside Linux.
    """
    before = _usage()
    if before.idle_s is not None:
        time.sleep(sample_s)
    return _free_between(before, _usage())


@dataclass(frozen=True)
class _Usage:
    """Elapsed seconds, idle seconds of the cores (None if unknown), and CPU seconds of this process."""

    at: float
    idle_s: float | None
    own_s: float


def _usage() -> _Usage:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return _Usage(time.monotonic(), _idle_s(cores), _own_s())


def _free_between(before: _Usage, after: _Usage) -> int:
    if before.idle_s is None or after.idle_s is None:
        return n_cores()
    return round((after.idle_s - before.idle_s + after.own_s - before.own_s) / (after.at - before.at))


def _idle_s(cores: set[int]) -> float | None:
    """Seconds that the cores have been idle since the system started; None if it does not report them."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    idle = 0
    for line in lines:
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            idle += int(ticks[3]) + int(ticks[4])  # idle, and waiting for a disk
    return idle / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system
