"""A plan: a model, a run and a layout on a cluster, with their memory and speed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from explore.foreign import shorten
from explore.formatting import plain
from explore.formatting.html import block, line, note, table
from explore.model import ModelConfig
from explore.plan.batch import Batch, one, stages_of
from explore.plan.cluster import LINKS, Cluster
from explore.plan.layout import Layout, check
from explore.plan.memory import WORKSPACE_BYTES, Memory, memory
from explore.plan.profile import profile
from explore.plan.run import Run
from explore.plan.throughput import HIDDEN, Throughput, ceiling_s, efficiency, throughput
from explore.plan.traffic import efficiency as link_efficiency
from explore.plan.traffic import links, traffic, volumes

GIB = 2**30
BINDS = {
    "tensor": "tensor-parallel traffic",
    "context": "context-parallel traffic",
    "experts": "all-to-all",
    "pipeline": "pipeline traffic",
    "data": "data-parallel traffic",
}
"""Possible bottlenecks of a step besides products: traffic, with its name."""
KINDS = BINDS | {
    "experts": "all-to-all in domains",
    "across": "all-to-all across domains",
    "data": "data-parallel traffic, dense",
    "expert_data": "data-parallel traffic, experts",
}
"""Kinds of traffic."""


@dataclass(frozen=True)
class Plan:
    """A costed layout, in bytes and seconds."""

    model: ModelConfig
    run: Run
    layout: Layout
    cluster: Cluster

    @classmethod
    def of(cls, model: ModelConfig, run: Run, layout: Layout, cluster: Cluster) -> Plan:
        """A plan of a legal layout.

        Raises:
            ValueError: a degree does not divide a size; the message suggests values that do.
        """
        vpp = stages_of(profile(model, run.seq_len), layout.pp, layout.vpp, layout.pipeline).vpp
        layout = layout.model_copy(update={"vpp": vpp})
        check(model, run, layout, cluster)
        return cls(model, run, layout, cluster)

    def __repr__(self) -> str:
        letters = shorten(self.model.pattern, 40)
        return f"Plan({letters} on {self.cluster.name}, {self.layout}, {self.run.precision}, {self._verdict()})"

    def _repr_html_(self) -> str:
        gib = ((f"rank {i}", *(f"{size:.1f}" for size in rank.values())) for i, rank in enumerate(self.ranks()))
        header = ("GiB", *self.ranks()[0])
        return block(
            line(f"{self.layout} on {self.cluster.name}", f"{self.run.precision}, {self._verdict()}"),
            table(header, gib),
            note(
                f"{self.capacity / GIB:.1f} GiB for each GPU; a step takes {self.step_s:.3g} s, most of it {self.binds}"
            ),
        )

    def _verdict(self) -> str:
        """Whether it fits, and how fast it trains."""
        if not self.fits:
            return f"needs {self.needed / GIB:.1f} of {self.capacity / GIB:.1f} GiB"
        return f"fits, {plain(round(self.tokens_per_s_gpu))} tokens/s/GPU"

    @cached_property
    def batch(self) -> Batch:
        return one(profile(self.model, self.run.seq_len), self.run, self.cluster, self.layout)

    @cached_property
    def memory(self) -> Memory:
        return memory(self.batch)

    @cached_property
    def throughput(self) -> Throughput:
        return throughput(self.batch)

    @property
    def capacity(self) -> float:
        """Memory of a device for what is counted."""
        return capacity(self.run, self.cluster)

    @property
    def needed(self) -> float:
        """Memory of the fullest rank."""
        return float(self.memory.total.max())

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step, estimated."""
        return float(self.throughput.step_s[0])

    @property
    def tokens_per_step(self) -> int:
        return self.run.global_batch * self.run.seq_len

    @property
    def tokens_per_s_gpu(self) -> float:
        return self.tokens_per_step / self.cluster.n_gpus / self.step_s

    @property
    def tflops(self) -> tuple[float, float]:
        """TFLOP/s per GPU, as ceiling and estimate; recomputation does not count."""
        flops = self.batch.profile.flops_train * self.tokens_per_step / self.cluster.n_gpus / 1e12
        return flops / float(ceiling_s(self.batch)[0]), flops / self.step_s

    @property
    def binds(self) -> str:
        """The step's main bottleneck; memory if the plan does not fit."""
        return "memory" if not self.fits else max(self.parts, key=lambda name: self.parts[name])

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by cause; they sum to `step_s`."""
        t = self.throughput
        named = {
            "compute": t.compute_s,
            "pipeline bubble": t.bubble_s,
            **{BINDS[kind]: seconds for kind, seconds in t.exposed_s.items()},
            "host transfers": t.offload_s,
            "optimizer": t.optimizer_s,
        }
        return {name: float(seconds[0]) for name, seconds in named.items()}

    def traffic(self) -> list[dict[str, Any]]:
        """The traffic of the busiest rank in a step.

        Returns:
            For each kind of traffic the slowest `link` it uses, `gb`, `seconds` at the link's
            efficiency, and the assumed fraction `hidden` behind computation.
        """
        sent, seconds, link = volumes(self.batch)._asdict(), traffic(self.batch)._asdict(), links(self.batch)
        return [
            {
                "kind": KINDS[kind],
                "link": link[kind],
                "gb": float(sent[kind].max()) / 1e9,
                "seconds": float(seconds[kind].max()),
                "hidden": HIDDEN.get(kind, HIDDEN["data"]),
            }
            for kind in sent
            if sent[kind].any()
        ]

    def days(self, tokens: float) -> float:
        """Days of training on `tokens` tokens."""
        return tokens / (self.tokens_per_s_gpu * self.cluster.n_gpus) / 86_400

    def assumptions(self) -> dict[str, Any]:
        """Assumptions of the estimate."""
        part, fitted = efficiency(self.cluster.device.name, self.run.format.compute)
        return {
            "product_efficiency": part,
            "product_efficiency_fitted": fitted,
            "link_efficiency": {link: link_efficiency(self.cluster, link) for link in LINKS},
            "hidden_traffic": dict(HIDDEN),
            "reserve": self.run.reserve,
            "workspace_gib": WORKSPACE_BYTES / GIB,
        }

    def pipeline(self) -> str:
        """Megatron-LM's layout of the pipeline."""
        stages = self.batch.stages
        return stages.megatron() if stages.unit == 2 else stages.hybrid(self.model)

    def ranks(self) -> list[dict[str, float]]:
        """GiB of every rank of the pipeline: weights, grads, optimizer, activations, and their total."""
        rows = []
        for rank in range(self.batch.pp):
            parts = {name: float(sizes[0, rank]) / GIB for name, sizes in self.memory._asdict().items()}
            rows.append(parts | {"total": sum(parts.values())})
        return rows

    def to_dict(self, tokens: float | None = None) -> dict[str, Any]:
        """JSON content for other programs."""
        ceiling, estimate = self.tflops
        record: dict[str, Any] = {
            "fits": self.fits,
            "capacity_gib": self.capacity / GIB,
            "ranks": self.ranks(),
            "tflops_ceiling": ceiling,
            "tflops_estimate": estimate,
            "tokens_per_s_gpu": self.tokens_per_s_gpu,
            "step_s": self.step_s,
            "binds": self.binds,
            "bubble": self.batch.bubble,
            "all_to_all_s": float(self.throughput.experts_s[0]),
            "seconds": self.parts,
            "traffic": self.traffic(),
            "layout": self.layout.model_dump(mode="json", exclude={"pipeline"})
            | {"dp": self.layout.dp(self.cluster.n_gpus), "edp": self.layout.edp(self.cluster.n_gpus)}
            | {"pipeline": self.pipeline()},
            "cluster": self.cluster.name,
            "run": self.run.model_dump(mode="json"),
            "assumptions": self.assumptions(),
        }
        if tokens is not None:
            days = self.days(tokens)
            record |= {"tokens": tokens, "days": days, "gpu_hours": days * 24 * self.cluster.n_gpus}
        return record


def capacity(run: Run, cluster: Cluster) -> float:
    """Memory per device for the counted tensors: device memory minus driver, reserve and workspace."""
    return (1 - run.reserve) * cluster.usable_bytes - WORKSPACE_BYTES
