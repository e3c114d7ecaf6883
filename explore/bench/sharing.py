"""Throughput of all cores, used as threads of one run or as single-threaded runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from explore.bench.families import SHAPES, families
from explore.bench.training import in_a_process
from explore.threads import COUNTS, SHARE, n_cores

FAMILY = "hybrid LatentMoE"


def time_sharing(seconds: float, shapes: tuple[str, ...] = tuple(SHAPES)) -> Iterator[dict[str, Any]]:
    """Trains one LatentMoE hybrid with all cores, and then one per core at the same time.

    Args:
        seconds: approximate duration of a measurement.

    Yields:
        Rows of the table of `explore.study.sharing`: shape, training FLOPs of a step (flops_step),
        together_tokens_per_s, apart_tokens_per_s (of all runs), cores, and the processor.
    """
    for shape in shapes:
        size, cores = SHAPES[shape], n_cores()
        (together,) = _speeds(shape, seconds, 1, cores)
        apart = _speeds(shape, seconds, cores, 1)
        yield {
            "shape": shape,
            "flops_step": families(size.d_model)[FAMILY].cost(size.seq_len).flops_train * size.batch_tokens,
            "together_tokens_per_s": together["tokens_per_s"],
            "apart_tokens_per_s": sum(one["tokens_per_s"] for one in apart),
            "cores": cores,
            "device": together["device"],
        }


def _speeds(shape: str, seconds: float, n: int, n_threads: int) -> list[dict[str, Any]]:
    """Results of `n` runs at the same time."""
    inherited = {name: value for name, value in os.environ.items() if name not in COUNTS}
    task = {"what": "run", "family": FAMILY, "shape": shape, "seconds": seconds}

    def one(_: int) -> dict[str, Any]:
        return in_a_process(inherited | {SHARE: str(n_threads)}, **task)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))
