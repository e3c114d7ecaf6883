"""Compares published numbers with those that the planner computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from explore.cost import flops_train
from explore.plan.cluster import Cluster
from explore.plan.golden import GOLDEN
from explore.plan.golden import SOURCE as GOLDEN_SOURCE
from explore.plan.layout import Layout
from explore.plan.memory import WORKSPACE_BYTES
from explore.plan.plans import GIB, Plan
from explore.plan.relief import cheapest_relief
from explore.plan.run import Run
from explore.plan.runs import EXPERT_GROUPS, predicted_tokens_per_s, printed_runs
from explore.plan.throughput import ceiling_s
from explore.plan.traffic import all_to_all_s
from explore.presets import preset

REPORT = "arXiv 2603.07685"


class Held(NamedTuple):
    """A published number and the same one computed.

    Attributes:
        ok: whether they agree within the section's bound; None without a bound.
    """

    section: str
    name: str
    published: float
    computed: float
    unit: str
    ok: bool | None
    note: str
    source: str

    @property
    def difference(self) -> float:
        """Relative difference from the published number."""
        return self.computed / self.published - 1

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"difference": self.difference}


def _within(published: float, computed: float, bound: float) -> bool:
    return abs(computed / published - 1) <= bound


def published() -> list[Held]:
    """All rows, section by section."""
    return [*_memory(), *_golden(), *_flops(), *_all_to_all(), *_layouts(), *_throughput()]


def table_3(**run: Any) -> Plan:
    """The run of tables 3 and 4 of the report; the published numbers are for the third pipeline rank."""
    fields = {"seq_len": 4096, "global_batch": 8192} | run
    layout = Layout(pp=4, ep=64, pipeline="Et*4|(tttt|)*14tmL")
    return Plan.of(preset("deepseek-v3"), Run(**fields), layout, Cluster.named("GB200x256"))


RANK = 2


def _memory() -> Iterator[Held]:
    parts = table_3().ranks()[RANK]

    def row(
        name: str, printed: float, gib: float, bound: float | None = 0.015, note: str = "", table: str = "3"
    ) -> Held:
        ok = None if bound is None else _within(printed, gib, bound)
        return Held("memory", name, printed, gib, "GiB", ok, note, f"{REPORT}, table {table}")

    yield row("weights and gradients", 36.4, parts["weights"] + parts["grads"])
    yield row("main weights and optimizer", 32.1, parts["optimizer"])
    yield row("activations", 131.0, parts["activations"])
    yield row("total", 199.5, parts["total"])
    efficient = table_3(memory_efficient_permutation=True).ranks()[RANK]
    yield row(
        "memory-efficient permutation saves", 26.3, parts["activations"] - efficient["activations"], table="3, 4.1.2"
    )
    moments = table_3(moments="bfloat16").ranks()[RANK]["optimizer"]
    yield row(
        "bf16 moments save", 11.0, parts["optimizer"] - moments, 0.1, "print says 10 to 12", table="3, section 4.1.6"
    )
    narrow = table_3(memory_efficient_permutation=True, precision="fp8").ranks()[RANK]["activations"]
    halved = table_3(precision="fp8").ranks()[RANK]["activations"]
    yield row(
        "FP8 activations save", 16.0, parts["activations"] - halved, None,
        "print halves every input of a linear layer; attention's output and the router's input stay in bf16 as well",
        "3, section 4.1.3",
    )  # fmt: skip
    saved, total = 0.0, 42.4
    for module, name, printed in (
        ("mla_up_proj", "MLA up-projection", 30.4),
        ("moe_act", "SwiGLU", 3.8),
        ("layernorm", "LayerNorm", 8.2),
    ):
        recomputed = table_3(memory_efficient_permutation=True, precision="fp8", recompute=(module,))
        in_bf16 = table_3(memory_efficient_permutation=True, recompute=(module,))
        gain = narrow - recomputed.ranks()[RANK]["activations"]
        wide = efficient["activations"] - in_bf16.ranks()[RANK]["activations"]
        saved += gain
        note = f"print agrees with activations in FP8; in bf16 {wide:.1f}"
        yield row(f"recomputing {name} saves", printed, gain, note=note, table="4")
    yield row("recomputing all three saves", total, saved, note="in FP8", table="4")
    llama = preset("llama-3.1-405b")
    whole = Plan.of(llama, Run(zero=0), Layout(), Cluster.named("H100x1")).memory
    for name, held, printed in (
        ("parameters", whole.weights, 810.0), ("gradients", whole.grads, 1620.0), ("Adam", whole.optimizer, 4860.0),
    ):  # fmt: skip
        gb = float(held.max()) / llama.cost(1).params_total * 405
        note = "bytes of a parameter, times the 405 billion of print"
        yield Held(
            "memory", f"Llama 3.1 405B, {name}", printed, gb, "GB", _within(printed, gb, 1e-9), note,
            "MoE Parallel Folding, arXiv 2504.14960",
        )  # fmt: skip


def _golden() -> Iterator[Held]:
    note = f"with {WORKSPACE_BYTES / GIB:.2f} GiB that no formula explains"
    for case in GOLDEN:
        last = case.plan().ranks()[-1]
        total = last["total"] + WORKSPACE_BYTES / GIB
        for name, printed, gib, bound in (
            ("steady", case.steady_gib, total - last["activations"], 0.03),
            ("peak", case.peak_gib, total, 0.15),
        ):
            ok = _within(printed, gib, bound)
            yield Held("golden", f"{case.name}, {name}", printed, gib, "GiB", ok, note, GOLDEN_SOURCE)


UNTIL_26_04 = {"gpt-oss-120b": ("experts", 1 / 3)}
"""Components that Megatron-Bridge counted in part up to release 26.04, and the part that it left out.

A gated MLP whose activation is not SiLU was counted as two matrices, not three, and a window as the whole sequence.
Source: src/megatron/bridge/training/utils/flop_utils.py before its commits eaddead3f and baa0259bd.
"""


def _flops() -> Iterator[Held]:
    """FLOPs of a token that each pair of TFLOP/s and tokens/s implies, within the rounding of both."""
    for run in printed_runs():
        ledger = preset(run.model).ledger(run.run.seq_len)
        counts = {name: flops_train(ledger, name) for name in ("exact", "megatron")}
        note = f"exact {counts['exact'] / 1e9:.1f}, as Megatron-LM counts {counts['megatron'] / 1e9:.1f}"
        if run.model in UNTIL_26_04 and "26.04" in run.source:
            component, part = UNTIL_26_04[run.model]
            counted = 3 * sum(row.entry.flops_seq for row in ledger if row.entry.component == component)
            counts = {"old": counts["megatron"] - part * counted / ledger.seq_len}
            note += f", as Megatron-Bridge counted until 26.04 {counts['old'] / 1e9:.1f}"
        printed = run.tflops * 1e12 / run.tokens_per_s
        nearest = min(counts.values(), key=lambda value: abs(value / printed - 1))
        low, high = run.implied_flops
        ok = low * (1 - 0.015) <= nearest <= high * (1 + 0.015)
        note += f"; print means {low / 1e9:.1f} to {high / 1e9:.1f}"
        name = f"{run.model}, {run.cluster.name}, {run.run.precision}"
        yield Held("flops", name, printed / 1e9, nearest / 1e9, "GFLOP/token", ok, note, run.source)


ALL_TO_ALL = {
    ("GB200", 8): (391, 353), ("GB200", 16): (578, 527), ("GB200", 32): (612, 646), ("GB200", 64): (675, 744),
    ("H100", 8): (661, 624), ("H100", 16): (1485, 1688), ("H100", 32): (3064, 3088), ("H100", 64): (4626, 4398),
}  # fmt: skip
"""Microseconds of HybridEP's dispatch and combine, by device and expert-parallel ranks: table 7 of the report."""

NAIVE = {
    ("GB200", 8): 735, ("GB200", 16): 743, ("GB200", 32): 769, ("GB200", 64): 930,
    ("H100", 8): 1265, ("H100", 16): 5774, ("H100", 32): 8059, ("H100", 64): 9164,
}  # fmt: skip
"""Microseconds of a dispatch that sends a copy to each expert: the plain all-to-all of the same table."""


def _all_to_all() -> Iterator[Held]:
    sent, note = 4096 * 7168 * 2.0, "experts from 4 of 8 groups, as DeepSeek-V3 routes"
    for (device, ep), printed in ALL_TO_ALL.items():
        cluster = Cluster.named(f"{device}x64")
        micros = 1e6 * all_to_all_s(cluster, sent, ep, 8, "node", EXPERT_GROUPS["deepseek-v3"])
        for name, value in zip(("dispatch", "combine"), printed, strict=True):
            ok = _within(value, micros, 0.15)
            yield Held("all-to-all", f"{device} EP{ep}, {name}", value, micros, "µs", ok, note, f"{REPORT}, table 7")
    for (device, ep), value in NAIVE.items():
        micros = 1e6 * all_to_all_s(Cluster.named(f"{device}x64"), sent, ep, 8, "naive")
        name, note = f"{device} EP{ep}, naive dispatch", "the efficiencies of links are those fitted to HybridEP"
        yield Held("all-to-all", name, value, micros, "µs", None, note, f"{REPORT}, table 7")


def _layouts() -> Iterator[Held]:
    """Memory of the fullest rank over the capacity: at most 1 for every layout that ran."""
    for run in printed_runs():
        plan, note = Plan.of(preset(run.model), run.run, run.layout, run.cluster), "ran"
        if not plan.fits and (found := cheapest_relief(plan)) is not None:
            note = f"ran; fits here only with: {found[1]}"
        name = f"{run.model}, {run.cluster.name}, {run.run.precision}, {run.layout}"
        yield Held("layouts", name, 1.0, plan.needed / plan.capacity, "of memory", plan.fits, note, run.source)
    plan = replace(table_3(), cluster=Cluster.named("H100x256"))
    yield Held(
        "layouts", "deepseek-v3, H100x256, bf16, PP4 VPP4 EP64 MBS1", 199.5e9 / plan.cluster.device.memory_bytes,
        plan.needed / plan.capacity, "of memory", not plan.fits, "does not fit", f"{REPORT}, section 4.1.1",
    )  # fmt: skip


def _throughput() -> Iterator[Held]:
    """Tokens per second of the estimate; a row holds where the published number is not above the ceiling."""
    for run in printed_runs():
        ceiling = run.tokens / float(ceiling_s(run.batch())[0])
        half = "fitted" if run.fitted else "predicted"
        name = f"{run.model}, {run.cluster.name}, {run.run.precision}, {run.layout}"
        yield Held(
            "throughput", name, run.tokens_per_s, predicted_tokens_per_s(run), "tokens/s",
            run.tokens_per_s <= ceiling, f"{half}; ceiling {ceiling:,.0f}", run.source,
        )  # fmt: skip
