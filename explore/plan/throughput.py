"""Step time: an estimate with fitted efficiencies, and a lower bound that no published run beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from explore.cost import Dtype
from explore.plan.batch import Batch
from explore.plan.memory import Ranks, memory, saved
from explore.plan.profile import DENSE, FULL, ROUTED
from explore.plan.traffic import traffic

HIDDEN: Mapping[str, float] = MappingProxyType(
    {"tensor": 0.5, "context": 0.9, "experts": 0.5, "across": 0.93, "pipeline": 0.9, "data": 0.9}
)
"""Assumed fraction of each kind of traffic hidden behind computation.

In arXiv 2603.07685, section 4.2.3, 93% of the all-to-alls over the network are hidden behind another micro-batch.
"""

EFFICIENCY: Mapping[tuple[str, Dtype], float] = MappingProxyType(
    {
        ("B200", "bfloat16"): 0.30,
        ("B200", "float4"): 0.14,
        ("B200", "float8"): 0.49,
        ("B300", "bfloat16"): 0.34,
        ("B300", "float4"): 0.24,
        ("B300", "float8"): 0.64,
        ("GB200", "bfloat16"): 0.51,
        ("GB200", "float4"): 0.55,
        ("GB200", "float8"): 0.64,
        ("GB300", "bfloat16"): 0.44,
        ("GB300", "float4"): 0.55,
        ("GB300", "float8"): 0.61,
        ("H100", "bfloat16"): 0.69,
        ("H100", "float8"): 0.57,
    }
)
"""Fraction of the peak rate that products reach, by device and dtype, fitted by `explore.plan.runs.fit`."""
PASSES = 25.7
"""Passes per step over the saved tensors in memory: norms, activations, permutations, quantisation and
unmodelled work; fitted with `EFFICIENCY`."""


class Rates(NamedTuple):
    """Fitted rates: fraction of the peak that products reach, and memory passes over saved tensors."""

    products: float
    passes: float


class Throughput(NamedTuple):
    """Seconds of a step of every layout, and their parts.

    Attributes:
        step_s: estimated seconds of the whole step.
        compute_s: products and memory traffic of the slowest rank, including recomputation.
        bubble_s: waiting while the pipeline fills and drains.
        exposed_s: traffic not hidden, by kind.
        offload_s: host transfers not hidden.
        optimizer_s: reading and writing gradients, weights and optimizer state.
        experts_s: all-to-alls, hidden or not.
    """

    step_s: Float[np.ndarray, " n"]
    compute_s: Float[np.ndarray, " n"]
    bubble_s: Float[np.ndarray, " n"]
    exposed_s: dict[str, Float[np.ndarray, " n"]]
    offload_s: Float[np.ndarray, " n"]
    optimizer_s: Float[np.ndarray, " n"]
    experts_s: Float[np.ndarray, " n"]


def efficiency(device: str, dtype: Dtype) -> tuple[float, bool]:
    """Fraction of the peak that products reach, and whether it was fitted on this device.

    For other devices it is the mean of the fitted fractions of that dtype.
    """
    if (device, dtype) in EFFICIENCY:
        return EFFICIENCY[device, dtype], True
    known = [value for (_, fitted), value in EFFICIENCY.items() if fitted == dtype]
    return sum(known) / len(known) if known else 0.5, False


def products_s(batch: Batch, *, again: bool = True) -> Ranks:
    """Seconds of a micro-batch's products on every rank at the peak rate, forward and backward.

    Args:
        again: include recomputed products.
    """
    profile, run, device = batch.profile, batch.run, batch.cluster.device
    narrow, full = device.peak(run.format.compute), device.peak("bfloat16")
    flops = profile.flops
    seconds = 3 * ((flops[:, DENSE] + flops[:, ROUTED]) / narrow + flops[:, FULL] / full)
    if again and run.recompute:
        seconds = seconds + batch.profile.recomputed(run.recompute) / narrow
    shared = batch.micro_batch / (batch.tp * batch.cp)
    per_rank: np.ndarray = shared * (batch.per_rank @ seconds)[None, :]
    return per_rank


def moved_s(batch: Batch) -> Ranks:
    """Seconds of one memory pass over the saved tensors of a micro-batch, plus a third of it for recomputed ones."""
    run = batch.run.model_copy(update={"recompute": (), "precision": "bf16"})
    whole, kept = (
        saved(replace(batch, run=run)),
        saved(replace(batch, run=batch.run.model_copy(update={"precision": "bf16"}))),
    )
    moved: np.ndarray = (whole + (whole - kept) / 3) @ batch.per_rank.T
    return moved / batch.cluster.device.bandwidth


def throughput(batch: Batch, rates: Rates | None = None) -> Throughput:
    """Seconds of a step of every layout.

    Args:
        rates: rates of products and memory; None uses the fitted ones.
    """
    run, device, m = batch.run, batch.cluster.device, batch.n_microbatches
    rates = rates or Rates(efficiency(device.name, run.format.compute)[0], PASSES)
    compute = m * (products_s(batch) / rates.products + moved_s(batch) * rates.passes).max(axis=1)
    bubble = compute * batch.bubble
    sent = traffic(batch)
    by_kind = sent._asdict() | {"data": sent.data + sent.expert_data}
    exposed = {kind: by_kind[kind].max(axis=1) * (1 - hidden) for kind, hidden in HIDDEN.items()}
    exposed["experts"] = np.maximum(exposed["experts"], exposed.pop("across"))
    held = memory(batch)
    offload = _offload(batch, compute)
    optimizer = _optimizer(batch, held.optimizer)
    step = compute + bubble + sum(exposed.values()) + offload + optimizer
    all_to_all = np.maximum(sent.experts, sent.across).max(axis=1)
    return Throughput(step, compute, bubble, exposed, offload, optimizer, all_to_all)


def ceiling_s(batch: Batch) -> Float[np.ndarray, " n"]:
    """Lower bound of the seconds of a step: products at the peak rate, nothing computed twice, all traffic hidden.

    The bound includes filling and draining the pipeline, and traffic at the full rate of every link.
    """
    products = batch.n_microbatches * products_s(batch, again=False).max(axis=1) * (1 + batch.bubble)
    sent = traffic(batch, ideal=True)
    busiest = np.max([(sent.data + sent.expert_data).max(axis=1), *(each.max(axis=1) for each in sent[:-2])], axis=0)
    longest: np.ndarray = np.maximum(products, busiest)
    return longest


def _offload(batch: Batch, compute: np.ndarray) -> np.ndarray:
    """Transfers that are not hidden: optimizer state around its step, and activations slower than products."""
    run, host = batch.run, batch.cluster.device.host_link
    seconds = np.zeros_like(compute)
    if host is None:
        return seconds
    if run.offload_optimizer:
        inside = run.model_copy(update={"offload_optimizer": False})
        state = memory(replace(batch, run=inside)).optimizer.max(axis=1)
        seconds = seconds + 2 * state / host
    if run.offload_activations:
        kept = (saved(batch) @ batch.per_rank.T).max(axis=1)
        moved = 2 * batch.n_microbatches * kept * run.offload_activations / host
        seconds = seconds + np.maximum(0, moved - compute)
    return seconds


def _optimizer(batch: Batch, state: np.ndarray) -> np.ndarray:
    """The optimizer reads its state and gradients, and writes state and weights: about twice the state."""
    seconds: np.ndarray = 2.5 * state.max(axis=1) / batch.cluster.device.bandwidth
    return seconds
