"""Published training runs, and the efficiencies that are fitted to half of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from explore.plan.batch import Batch, one
from explore.plan.cluster import Cluster
from explore.plan.layout import Layout
from explore.plan.profile import profile
from explore.plan.run import Run
from explore.plan.throughput import Rates, throughput
from explore.presets import preset

EXPERT_GROUPS = {"deepseek-v3": (8, 4)}
"""Models whose router first chooses groups of experts: number of groups, and number chosen."""
PULL = 0.01
"""Weight of the penalty that pulls log efficiencies to their mean, relative to one run's squared error."""


class PrintedRun(NamedTuple):
    """A published run: layout and measured speed.

    Attributes:
        fitted: whether the efficiencies are fitted to this run; the others are predicted.
    """

    model: str
    cluster: Cluster
    run: Run
    layout: Layout
    tokens_per_s: float
    tflops: float
    source: str
    fitted: bool

    def batch(self) -> Batch:
        return one(profile(preset(self.model), self.run.seq_len), self.run, self.cluster, self.layout)

    @property
    def implied_flops(self) -> tuple[float, float]:
        """Bounds on the training FLOPs per token implied by the published, rounded pair.

        TFLOP/s are rounded to integers. Tokens per second are rounded to integers, or to whole sequences per second of
        the cluster: all rows of release 26.04.01 are multiples of that.
        """
        sequence = self.run.seq_len / self.cluster.n_gpus
        half = 0.5 * (sequence if self.tokens_per_s % sequence == 0 else 1.0)
        return (
            (self.tflops - 0.5) * 1e12 / (self.tokens_per_s + half),
            (self.tflops + 0.5) * 1e12 / (self.tokens_per_s - half),
        )

    @property
    def tokens(self) -> float:
        """Tokens per step and GPU."""
        return self.run.global_batch * self.run.seq_len / self.cluster.n_gpus


@cache
def printed_runs() -> tuple[PrintedRun, ...]:
    """All published runs; every second one of each device and dtype is predicted, the others are fitted.

    If the source does not name their dtype, gradients and moments are bf16, as in Megatron-Bridge's recipes.
    Recomputation and offload are those of the recipe with the same layout (`src/megatron/bridge/perf_recipes`, August
    2026); the layers that a recipe offloads are part of the activations.
    """
    with Path(__file__).with_name("throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    runs, seen = [], dict[tuple[str, str], int]()
    for row in rows:
        number = {name: int(value) for name, value in row.items() if value.isdigit()}
        run = Run.model_validate(
            {name: number[name] for name in ("seq_len", "global_batch", "zero")}
            | {"precision": row["precision"], "recompute": row["recompute"].split()}
            | {"offload_activations": float(row["offload_activations"])}
            | {"grads": "bfloat16", "moments": "bfloat16", "memory_efficient_permutation": True}
            | {"expert_groups": EXPERT_GROUPS.get(row["model"])}
        )
        key = (row["device"], run.format.compute)
        seen[key] = seen.get(key, 0) + 1
        degrees: dict[str, Any] = {name: number[name] for name in ("tp", "pp", "cp", "vpp", "ep", "micro_batch")}
        degrees["pipeline"] = row["pipeline"] or None
        runs.append(
            PrintedRun(
                row["model"],
                Cluster.named(f"{row['device']}x{number['n_gpus']}"),
                run,
                Layout.model_validate(degrees),
                number["tokens_per_s"],
                number["tflops"],
                row["source"],
                seen[key] % 2 == 1,
            )
        )
    return tuple(runs)


def predicted_tokens_per_s(run: PrintedRun, rates: Rates | None = None) -> float:
    """Tokens per second and GPU of the estimate."""
    return run.tokens / float(throughput(run.batch(), rates).step_s[0])


def fit(runs: Sequence[PrintedRun]) -> tuple[dict[tuple[str, str], float], float]:
    """Efficiencies of products by device and dtype, and passes over memory, with the least squared log errors.

    Returns:
        The efficiencies, and the passes.
    """
    from scipy.optimize import minimize

    keys = sorted({(run.cluster.device.name, run.run.format.compute) for run in runs})
    # A step is affine in the reciprocal of the efficiency and in the passes.
    terms = []
    for run in runs:
        batch = run.batch()
        base, products, passes = (
            float(throughput(batch, Rates(*rates)).step_s[0]) for rates in ((1e9, 0.0), (1.0, 0.0), (1e9, 1.0))
        )
        key = keys.index((run.cluster.device.name, run.run.format.compute))
        terms.append((key, base, products - base, passes - base, run.tokens / run.tokens_per_s))

    def loss(x: np.ndarray) -> float:
        logs = x[:-1]
        errors = [
            math.log((base + products / math.exp(logs[key]) + passes * math.exp(x[-1])) / measured)
            for key, base, products, passes, measured in terms
        ]
        return sum(error**2 for error in errors) + PULL * float(np.sum((logs - logs.mean()) ** 2))

    best = minimize(loss, np.log([0.5] * len(keys) + [20.0]), method="L-BFGS-B").x
    return {key: float(value) for key, value in zip(keys, np.exp(best[:-1]), strict=True)}, float(np.exp(best[-1]))
