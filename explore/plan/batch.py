"""Layouts that share a pipeline, as arrays, to cost thousands per second; a single layout is a batch of one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from explore.plan.cluster import Cluster
from explore.plan.layout import Layout
from explore.plan.profile import Profile
from explore.plan.run import Run
from explore.plan.stages import Stages, balanced, in_flight, read, unit_of

Numbers = Int[np.ndarray, "n 1"]


@dataclass(frozen=True)
class Batch:
    """Layouts that share a pipeline and the number of its micro-batches.

    Attributes:
        n_microbatches: micro-batches per step in one pipeline.
        counts: number of each item in each stage of each rank.
        tp: a column, like the other degrees; results add ranks or items as the second axis.
    """

    profile: Profile
    run: Run
    cluster: Cluster
    stages: Stages
    n_microbatches: int
    counts: Float[np.ndarray, "pp vpp items"]
    tp: Numbers
    cp: Numbers
    ep: Numbers
    etp: Numbers
    micro_batch: Numbers

    @classmethod
    def of(cls, profile: Profile, run: Run, cluster: Cluster, stages: Stages, degrees: Int[np.ndarray, "n 5"]) -> Batch:
        """Layouts of one pipeline.

        Args:
            degrees: tp, cp, ep, etp and micro_batch of each, all with the same number of micro-batches.
        """
        tp, cp, _, _, micro_batch = degrees[0].tolist()
        m = run.global_batch * tp * cp * stages.pp // (micro_batch * cluster.n_gpus)
        columns = np.split(degrees, 5, axis=1)
        return cls(profile, run, cluster, stages, m, profile.counts(stages), *columns)

    def some(self, chosen: np.ndarray) -> Batch:
        """Selects layouts by index or mask."""
        degrees = {name: getattr(self, name)[chosen] for name in ("tp", "cp", "ep", "etp", "micro_batch")}
        return replace(self, **degrees)

    @property
    def pp(self) -> int:
        return self.stages.pp

    @property
    def vpp(self) -> int:
        return self.stages.vpp

    @property
    def per_rank(self) -> Float[np.ndarray, "pp items"]:
        """Number of each item on each rank."""
        total: np.ndarray = self.counts.sum(axis=1)
        return total

    @property
    def dp(self) -> Numbers:
        ranks: np.ndarray = self.cluster.n_gpus // (self.tp * self.cp * self.pp)
        return ranks

    @property
    def edp(self) -> Numbers:
        ranks: np.ndarray = self.cluster.n_gpus // (self.etp * self.ep * self.pp)
        return ranks

    @property
    def bubble(self) -> float:
        """Ratio of a rank's waiting time to its working time."""
        return (self.pp - 1) / (self.vpp * self.n_microbatches)

    def in_flight(self) -> Float[np.ndarray, "pp times vpp"]:
        """Micro-batches of every stage that are in flight at each moment."""
        enough = 4 * self.pp  # beyond it the schedule only repeats
        m = min(enough, self.n_microbatches)
        return in_flight(self.pp, self.vpp, m)


def one(profile: Profile, run: Run, cluster: Cluster, layout: Layout) -> Batch:
    """A batch of one layout.

    Raises:
        ValueError: the pipeline is not valid.
    """
    degrees = np.array([[layout.tp, layout.cp, layout.ep, layout.etp, layout.micro_batch]], dtype=np.int64)
    stages = stages_of(profile, layout.pp, layout.vpp, layout.pipeline)
    return Batch.of(profile, run, cluster, stages, degrees)


def stages_of(profile: Profile, pp: int, vpp: int, pipeline: str | None = None) -> Stages:
    """A balanced pipeline, or the one that a layout string names.

    Raises:
        ValueError: the string is not valid, or there are more stages than layers.
    """
    if pipeline is None:
        unit = unit_of(profile.model)
        return balanced(profile.model, profile.costs(unit), pp, vpp)
    stages = read(pipeline, profile.model, pp)
    if vpp not in (1, stages.vpp):
        raise ValueError(f"vpp must be {stages.vpp}, the stages of the pipeline layout over pp={pp}, got {vpp}")
    return stages
