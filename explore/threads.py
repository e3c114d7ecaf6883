"""How many threads a process computes with, and how they wait: so that a busy neighbour costs its share and no more.

OpenMP's threads wait for one another by spinning. When a neighbour holds a core, the thread that lost it keeps all
others spinning, and two threads run at a twentieth of their speed. Two remedies, both needed: threads that give up
spinning soon, and no more threads than there are free cores.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SPINS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long threads spin before they sleep: rounds of GNU's OpenMP, milliseconds of Intel's."""

OWN = ("OMP_WAIT_POLICY", *SPINS)
"""Variables by which a user says how threads wait; any of them wins over `SPINS`."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user says how many threads there are."""

SHARE = "EXPLORE_THREADS"
"""Variable by which a sweep gives each of its workers a share of the cores."""

SAMPLE_S = 0.2

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

    set_by_user = any(name in os.environ for name in COUNTS) or torch.get_num_threads() not in (*_chosen, n_cores())
    if not set_by_user:
        limit = int(os.environ.get(SHARE, n_cores())) // n_processes
        _chosen[:] = [max(1, min(limit, free_cores())) if limit > 1 else 1]
        torch.set_num_threads(*_chosen)
    return torch.get_num_threads()


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
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    before, own_before = _idle_s(cores), _own_s()
    if before is None:
        return n_cores()
    began = time.monotonic()
    time.sleep(sample_s)
    after, own_after = _idle_s(cores), _own_s()
    if after is None:
        return n_cores()
    return round((after - before + own_after - own_before) / (time.monotonic() - began))


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
