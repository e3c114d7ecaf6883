"""How many threads a process computes with, and how they wait: so that a busy neighbour costs its share and no more.

OpenMP's threads wait for one another by spinning. When a neighbour holds a core, the thread that lost it keeps all
others spinning, and two threads run at a twentieth of their speed. Two remedies, both needed: threads that give up
spinning soon, and no more threads than there are free cores.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SPINS = {"GOMP_SPINCOUNT": "50000", "KMP_BLOCKTIME": "1"}
"""How long threads spin before they sleep: rounds of GNU's OpenMP, milliseconds of Intel's.

A thread that sleeps at once costs a quarter of the speed on an idle machine. One that spins for longer than the
scheduler's slice gains nothing there, and costs most of the speed beside a busy process.
"""

OWN = ("OMP_WAIT_POLICY", *SPINS)
"""Variables by which a user says how threads wait; any of them wins over `SPINS`."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user says how many threads there are."""

SHARE = "EXPLORE_THREADS"
"""Variable by which a sweep gives each of its workers a share of the cores."""

SAMPLE_S = 0.2
EVERY_S = 5.0

_chosen: list[int] = []  # the count that `use_free_cores` set last in this process, if it did


def choose_waiting() -> None:
    """Limits spinning, unless the user has said how threads wait or torch, which reads it, is loaded already."""
    if "torch" not in sys.modules and not any(name in os.environ for name in OWN):
        os.environ.update(SPINS)


def use_free_cores(n_processes: int = 1) -> int:
    """Sets the number of torch's threads to the cores that other processes leave free, at least one.

    A number that the user set, by OpenMP's variables or `torch.set_num_threads`, stays.

    Args:
        n_processes: processes that train together and divide the cores among them.

    Returns:
        Threads that torch has now.
    """
    import torch

    if not _set_by_user():
        _use(free_cores() if _limit(n_processes) > 1 else 1, n_processes)
    return torch.get_num_threads()


class CoreWatch:
    """Follows the load of the machine: the number of threads is that of the free cores, looked at every few seconds.

    Args:
        n_processes: as of `use_free_cores`.
    """

    def __init__(self, n_processes: int = 1) -> None:
        self._n_processes = n_processes
        self._before = _usage()

    def look(self) -> None:
        """Sets the number of threads anew once `EVERY_S` have passed since that was done."""
        if time.monotonic() - self._before.at < EVERY_S or _set_by_user() or _limit(self._n_processes) == 1:
            return
        now = _usage()
        _use(_free_between(self._before, now), self._n_processes)
        self._before = now


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
    """The variables that say how threads wait, as they are set now, for the record of a run."""
    return {name: os.environ[name] for name in OWN if name in os.environ}


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores(sample_s: float = SAMPLE_S) -> int:
    """Cores that this process may use and that other processes leave idle, over a short sample, rounded.

    All cores where the system does not tell, as outside of Linux.
    """
    before = _usage()
    if before.idle_s is not None:
        time.sleep(sample_s)
    return _free_between(before, _usage())


@dataclass(frozen=True)
class _Usage:
    """Seconds on the clock, those that the cores have been idle (None where the system does not tell), and our own."""

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
    """Seconds that the cores have been idle since the system started; None where it does not tell."""
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
