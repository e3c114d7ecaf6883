"""Ranks all legal layouts of a model on a cluster, and explains what limits the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from explore.model import ModelConfig
from explore.plan.batch import Batch
from explore.plan.candidates import Candidates, candidates
from explore.plan.cluster import Cluster
from explore.plan.layout import DEGREES, Layout, check_ranks
from explore.plan.memory import memory
from explore.plan.plans import BINDS, GIB, Plan, capacity
from explore.plan.profile import profile
from explore.plan.relief import distinct_reliefs, relieved
from explore.plan.run import Run
from explore.plan.throughput import throughput

Objective = Literal["tokens_per_s", "gpus", "memory"]


class Wall(NamedTuple):
    """The limit on layouts with one value of one degree.

    Attributes:
        relative: best tokens per second among them, relative to the best of all; 0 if none fits.
        wall: what prevents them (`sizes`, `batch`, `pipeline` or `memory`), or the main wait of the best one.
        detail: explanation in words.
        n_layouts: number of legal layouts with this value.
    """

    degree: str
    value: int
    relative: float
    wall: str
    detail: str
    n_layouts: int


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        plans: plans, best first.
        walls: limits by degree and value.
        n_legal: number of costed layouts.
        n_fitting: number that fit, with relief if needed.
        least_bytes: bytes on the fullest rank of the layout with the lowest memory.
        capacity: memory per device for the counted tensors, in bytes.
        tokens_per_s_gpu: speed of the fastest fitting layout; 0 if none fits.
    """

    plans: tuple[Plan, ...]
    walls: tuple[Wall, ...]
    n_legal: int
    n_fitting: int
    least_bytes: float
    capacity: float
    tokens_per_s_gpu: float

    def refusal(self) -> str:
        """Explains why nothing fits and what could help."""
        return (
            f"no layout fits: the smallest needs {self.least_bytes / GIB:,.1f} GiB, "
            f"{(self.least_bytes - self.capacity) / GIB:,.1f} GiB above the {self.capacity / GIB:,.1f} GiB of a GPU; "
            "more GPUs, --zero 3, --moments bfloat16 or a narrower --precision may make it fit"
        )


class _Costed(NamedTuple):
    """Numbers of all layouts.

    Attributes:
        degrees: in the order of `DEGREES`.
        relief: index of the first relief with which the layout fits; -1 if none.
        least: bytes on its fullest rank with the relief that saves most.
        waits: index in `_WAITS` of its longest wait.
    """

    degrees: Int[np.ndarray, "n 7"]
    relief: Int[np.ndarray, " n"]
    bytes: Float[np.ndarray, " n"]
    least: Float[np.ndarray, " n"]
    rate: Float[np.ndarray, " n"]
    waits: Int[np.ndarray, " n"]


_WAITS = ("pipeline bubble", *BINDS.values())


def search(
    model: ModelConfig,
    cluster: Cluster,
    run: Run,
    fixed: Mapping[str, int] | None = None,
    *,
    objective: Objective = "tokens_per_s",
    pipeline: str | None = None,
    n: int = 10,
) -> Found:
    """Costs every legal layout, each with the cheapest relief that makes it fit, and ranks those that fit.

    Args:
        fixed: given degrees.
        objective: most tokens per second, fewest GPUs of the cluster (then most tokens per second), or least memory.
        pipeline: a layout of the pipeline for all.
        n: number of plans to return.

    Raises:
        ValueError: no layout is legal; the message says why.
    """
    fixed = fixed or {}
    check_ranks(fixed, cluster)
    if objective == "gpus":
        return _fewest(model, cluster, run, fixed, pipeline, n)
    shape, limit = profile(model, run.seq_len), capacity(run, cluster)
    legal = candidates(shape, run, cluster, fixed, pipeline)
    if not legal.groups:
        raise ValueError(f"no layout is legal: {legal.reason(fixed)}")
    parts = [_cost(Batch.of(shape, run, cluster, stages, degrees), degrees, limit) for stages, degrees in legal.groups]
    costed = _Costed(*map(np.concatenate, zip(*parts, strict=True)))
    fitting = np.flatnonzero(costed.relief >= 0)
    best = fitting[_order(costed, fitting, objective)][:n]
    plans = tuple(
        Plan(
            model,
            relieved(run, costed.relief[i]),
            Layout(**dict(zip(DEGREES, costed.degrees[i].tolist(), strict=True)), pipeline=pipeline),
            cluster,
        )
        for i in best
    )
    walls = _walls(costed, legal, limit, fixed)
    least, fastest = float(costed.least.min()), float(costed.rate.max())
    return Found(plans, walls, len(costed.rate), len(fitting), least, limit, fastest)


def _order(costed: _Costed, fitting: np.ndarray, objective: Objective) -> np.ndarray:
    """Ranks layouts; ties within 1%, the limit of the estimate, go to the layout that splits the model least."""
    rate, held, degrees = costed.rate[fitting], costed.bytes[fitting], costed.degrees[fitting]
    score = np.log(held) if objective == "memory" else -np.log(rate)
    divided = degrees[:, 0] * degrees[:, 1] * degrees[:, 2] * degrees[:, 5]
    steps = np.floor((score - score.min(initial=np.inf)) / 0.01)
    order: np.ndarray = np.lexsort((*degrees.T[::-1], -rate, divided, steps))
    return order


def _fewest(
    model: ModelConfig, cluster: Cluster, run: Run, fixed: Mapping[str, int], pipeline: str | None, n: int
) -> Found:
    """The search on the smallest part of the cluster, in powers of two, on which a layout fits."""
    sizes = [2**k for k in range(cluster.n_gpus.bit_length()) if 2**k < cluster.n_gpus]
    for size in sizes:
        try:
            found = search(model, replace(cluster, n_gpus=size), run, fixed, pipeline=pipeline, n=n)
        except ValueError:  # fewer GPUs than a given degree asks for
            continue
        if found.plans:
            return found
    return search(model, cluster, run, fixed, pipeline=pipeline, n=n)


def _cost(batch: Batch, degrees: np.ndarray, limit: float) -> _Costed:
    """Costs layouts of one pipeline, with the first relief that makes each fit."""
    n, left = len(degrees), np.arange(len(degrees))
    relief, waits = np.full(n, -1), np.zeros(n, dtype=np.int64)
    held, rate, least = np.zeros(n), np.zeros(n), np.full(n, np.inf)
    tokens = batch.run.global_batch * batch.run.seq_len / batch.cluster.n_gpus
    for i in distinct_reliefs(batch.profile, batch.run):
        if not len(left):
            break
        some = replace(batch.some(left), run=relieved(batch.run, i))
        needed = memory(some).total.max(axis=1)
        if some.run.offload_optimizer and batch.cluster.device.host_link is None:
            continue
        least[left] = np.minimum(least[left], needed)
        if (fits := needed <= limit).any():
            seconds, at = throughput(some.some(fits)), left[fits]
            relief[at], held[at], rate[at] = i, needed[fits], tokens / seconds.step_s
            waits[at] = np.stack([seconds.bubble_s, *(seconds.exposed_s[kind] for kind in BINDS)]).argmax(axis=0)
            left = left[~fits]
    tp, cp, ep, etp, micro_batch = degrees.T
    pp, vpp = np.full(n, batch.pp), np.full(n, batch.vpp)
    return _Costed(np.stack((tp, cp, pp, vpp, ep, etp, micro_batch), axis=1), relief, held, least, rate, waits)


def _walls(costed: _Costed, legal: Candidates, limit: float, fixed: Mapping[str, int]) -> tuple[Wall, ...]:
    """Returns the limit of every value of every free degree."""
    walls, best = [], float(costed.rate.max())
    for column, degree in enumerate(DEGREES):
        if degree in fixed:
            continue
        refused = {value: found for (name, value), found in legal.refusals.items() if name == degree}
        for value in sorted({*costed.degrees[:, column].tolist(), *refused}):
            of = np.flatnonzero(costed.degrees[:, column] == value)
            if not len(of):
                walls.append(Wall(degree, value, 0.0, *refused[value], 0))
            elif costed.rate[of].any():
                top = of[costed.rate[of].argmax()]
                relative = float(costed.rate[top]) / best
                walls.append(Wall(degree, value, relative, _WAITS[costed.waits[top]], "", len(of)))
            else:
                needed = float(costed.least[of].min())
                detail = f"at least {needed / GIB:,.0f} GiB are needed, and a GPU has {limit / GIB:,.0f} GiB"
                walls.append(Wall(degree, value, 0.0, "memory", detail, len(of)))
    return tuple(walls)
