"""The Train tab of a workbench: whether a model fits on the GPUs in a layout, its speed, and its bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt, field_validator

from explore.config import Config
from explore.figures.base import Color
from explore.figures.plan import MEMORY
from explore.model import ModelConfig
from explore.plan import BINDS, DEGREES, GIB, Cluster, Layout, Plan, PrecisionName, Run, cheapest_relief, search
from explore.roofline import GPUS

GPUS_MAX, CONTEXT_MAX, BATCH_MAX, DEGREE_MAX, VPP_MAX = 2**14, 2**20, 2**14, 64, 12

PARTS: Mapping[str, Color] = {
    "compute": (0.00, 0.62, 0.45),
    "pipeline bubble": (0.71, 0.71, 0.71),
    **dict(
        zip(
            BINDS.values(),
            ((0.90, 0.62, 0.00), (0.94, 0.89, 0.26), (0.84, 0.37, 0.00), (0.80, 0.47, 0.65), (0.34, 0.71, 0.91)),
            strict=True,
        )
    ),
    "host transfers": (0.00, 0.45, 0.70),
    "optimizer": (0.40, 0.40, 0.40),
}
"""Parts of the time of a step, each with its colour."""


class Training(Config):
    """A training run and its layout.

    Attributes:
        gpu: name of a known GPU.
        n_gpus: number of GPUs in the cluster.
        seq_len: tokens per training sequence.
        global_batch: sequences per step.
        precision: precision of weights and products.
        tp: tensor-parallel ranks; the following fields are the other degrees of `Layout`.
    """

    gpu: str = "GB200"
    n_gpus: PositiveInt = 64
    seq_len: PositiveInt = 4096
    global_batch: PositiveInt = 1024
    precision: PrecisionName = "bf16"
    tp: PositiveInt = 1
    cp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    micro_batch: PositiveInt = 1

    @field_validator("gpu")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in GPUS:
            raise ValueError(f"must be one of {', '.join(GPUS)}, got {value!r}")
        return value

    @property
    def cluster(self) -> Cluster:
        return Cluster.named(f"{self.gpu}x{self.n_gpus}")

    @property
    def run(self) -> Run:
        return Run(
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            precision=self.precision,
            memory_efficient_permutation=True,
        )

    def best(self, model: ModelConfig) -> Training:
        """Returns this run with the best layout that a search finds.

        Raises:
            ValueError: no layout is legal, or none fits.
        """
        found = search(model, self.cluster, self.run, n=1)
        if not found.plans:
            raise ValueError(found.refusal())
        layout = found.plans[0].layout
        return self.model_copy(update={degree: getattr(layout, degree) for degree in DEGREES})

    def readout(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the numbers of the plan.

        Returns:
            `error`: why the layout is not possible; if it is empty, also
            `fits`, `relief`: whether the model fits, and the memory saving that makes it fit, if any;
            `needed_bytes`, `capacity_bytes`: memory needed by the fullest rank, and its capacity;
            `ranks`: bytes of each pipeline rank by kind;
            `tokens_per_s_gpu`, `tflops_estimate`, `tflops_ceiling`, `step_s`, `binds`, `layout`;
            `seconds`: the time of a step by part.
        """
        degrees = {degree: getattr(self, degree) for degree in DEGREES}
        try:
            plan = Plan.of(model, self.run, Layout(**degrees), self.cluster)
        except ValueError as error:
            return {"error": str(error)}
        relief = ""
        if not plan.fits and (found := cheapest_relief(plan)) is not None:
            plan, relief = found[0], str(found[1])
        ceiling, estimate = plan.tflops
        return {
            "error": "",
            "fits": plan.fits,
            "relief": relief,
            "needed_bytes": plan.needed,
            "capacity_bytes": plan.capacity,
            "ranks": [{kind: GIB * rank[kind] for kind in MEMORY} for rank in plan.ranks()],
            "tokens_per_s_gpu": plan.tokens_per_s_gpu,
            "tflops_estimate": estimate,
            "tflops_ceiling": ceiling,
            "step_s": plan.step_s,
            "binds": plan.binds,
            "layout": str(plan.layout),
            "seconds": {name: seconds for name, seconds in plan.parts.items() if seconds > 0},
        }

    def stops(self) -> dict[str, list[int]]:
        """The possible values of every slider."""
        most = {"n_gpus": GPUS_MAX, "seq_len": CONTEXT_MAX, "global_batch": BATCH_MAX, "vpp": VPP_MAX}
        stops = {}
        for name in ("n_gpus", "seq_len", "global_batch", *DEGREES):
            limit = most.get(name, DEGREE_MAX)
            values = range(1, limit + 1) if name == "vpp" else [2**k for k in range(limit.bit_length())]
            stops[name] = sorted({*values, getattr(self, name)})
        return stops
