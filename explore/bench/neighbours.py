"""Training speed beside busy processes, with our choice of threads and with torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from explore.bench.training import in_a_process
from explore.threads import COUNTS, OWN, SHARE, n_cores

TORCH = {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(n_cores())}
"""Defaults of OpenMP and torch: all cores, and long spinning."""

MOST = 2


def time_neighbours(shape: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Trains a LatentMoE hybrid alone and beside one and two busy processes.

    Args:
        seconds: approximate duration of each of the six measurements.

    Yields:
        Records of neighbours, threads, tokens_per_s, of_idle (its ratio to the speed alone), torch_tokens_per_s (with
        torch's own choice of threads and waiting), and torch_of_idle.
    """
    alone: tuple[float, float] | None = None
    for n in range(MOST + 1):
        with _busy(n):
            ours = _run(shape, seconds, {})
            torchs = _run(shape, seconds, TORCH)
        speeds = ours["tokens_per_s"], torchs["tokens_per_s"]
        alone = alone or speeds
        yield {
            "neighbours": n,
            "threads": ours["threads"],
            "tokens_per_s": speeds[0],
            "of_idle": speeds[0] / alone[0],
            "torch_tokens_per_s": speeds[1],
            "torch_of_idle": speeds[1] / alone[1],
        }


def _run(shape: str, seconds: float, variables: dict[str, str]) -> dict[str, Any]:
    inherited = {name: value for name, value in os.environ.items() if name not in (*COUNTS, *OWN, SHARE)}
    return in_a_process(inherited | variables, what="run", shape=shape, seconds=seconds)


@contextmanager
def _busy(n: int) -> Iterator[None]:
    """Keeps `n` processes busy, each using one core."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
