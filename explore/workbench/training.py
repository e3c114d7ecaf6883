"""What a workbench shows of a training run: whether a model fits on GPUs in a layout, and what binds."""

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
"""What the time of a step is spent on, and its colour."""


class Training(Config):
    """A training run and its layout.

    Attributes:
        gpu: name of a known GPU.
        n_gpus: GPUs of the cluster.
        seq_len: tokens of a training sequence.
        global_batch: sequences of a step.
        precision: of weights and products.
        tp: tensor-parallel ranks; the other degrees are those of `Layout`.
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
        """The same run with the best layout of a search.

        Raises:
            ValueError: no layout is legal, or none fits.
        """
        found = search(model, self.cluster, self.run, n=1)
        if not found.plans:
            raise ValueError(found.refusal())
        layout = found.plans[0].layout
        return self.model_copy(update={degree: getattr(layout, degree) for degree in DEGREES})

    def readout(self, model: ModelConfig) -> dict[str, Any]:
        """The numbers of the plan.

        Returns:
            `error`: why the layout is not possible, else empty, and with it
            `fits`, `relief`: whether it fits, and what saves the memory that this needs;
            `needed_bytes`, `capacity_bytes`: of the fullest rank;
            `ranks`: bytes of each pipeline rank by kind;
            `tokens_per_s_gpu`, `tflops_estimate`, `tflops_ceiling`, `step_s`, `binds`, `layout`;
            `seconds`: of a step, by what they are spent on.
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
        """The values that every slider may be moved to."""
        most = {"n_gpus": GPUS_MAX, "seq_len": CONTEXT_MAX, "global_batch": BATCH_MAX, "vpp": VPP_MAX}
        stops = {}
        for name in ("n_gpus", "seq_len", "global_batch", *DEGREES):
            limit = most.get(name, DEGREE_MAX)
            values = range(1, limit + 1) if name == "vpp" else [2**k for k in range(limit.bit_length())]
            stops[name] = sorted({*values, getattr(self, name)})
        return stops
