"""Traffic between ranks in a step: bytes, links and transfer times."""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from explore.plan.batch import Batch
from explore.plan.cluster import LINK_EFFICIENCY, Cluster, LinkName
from explore.plan.memory import Ranks, params
from explore.plan.run import AllToAll

BF16 = 2.0
TENSOR_PASSES = 5
"""Gathers and scatters of a layer's tokens: two forward, two backward, and one for the gradients of weights."""
EXPERT_PASSES = 4
"""All-to-alls of a layer: to the experts and back, forward and backward."""


class Traffic(NamedTuple):
    """One number per kind of traffic, for every layout and pipeline rank.

    Attributes:
        tensor: gathers and scatters of tensor-parallel ranks.
        context: keys and values, or tokens for heads, of context-parallel ranks.
        experts: all-to-alls inside a domain.
        across: all-to-alls over the network, at the same time as those inside.
        pipeline: activations and their gradients from stage to stage.
        data: gradients, and weights after the step; with zero 3 weights for every micro-batch.
        expert_data: the same for experts, whose data-parallel groups are smaller.
    """

    tensor: Ranks
    context: Ranks
    experts: Ranks
    across: Ranks
    pipeline: Ranks
    data: Ranks
    expert_data: Ranks


def traffic(batch: Batch, ideal: bool = False) -> Traffic:
    """Seconds of a step in which each kind uses the links of a rank; with `ideal` at the full rate of every link."""
    return Traffic(*(sent / rate for sent, rate in zip(volumes(batch), rates(batch, ideal), strict=True)))


def volumes(batch: Batch) -> Traffic:
    """Bytes that a rank sends in a step."""
    run, per_rank, tp = batch.run, batch.per_rank, batch.tp
    m, d = batch.n_microbatches, batch.profile.model.d_model
    tokens = batch.micro_batch * run.seq_len / batch.cp  # of a micro-batch, on a tensor-parallel group
    tensor = m * (TENSOR_PASSES * tokens * d * BF16 * (1 - 1 / tp) * batch.profile.divided) @ per_rank.T
    numel = {int(cp): batch.profile.context_numel(int(cp)) for cp in set(batch.cp.flat)}
    # The backward pass sends keys, values and their gradients: twice as much as the forward pass.
    context = m * (3 * tokens / tp * BF16 * np.stack([numel[int(cp)] for cp in batch.cp.flat])) @ per_rank.T
    inside, across = (m * EXPERT_PASSES * each @ per_rank.T for each in _all_to_all(batch, tokens / tp))
    stage = tokens * d * BF16 / (tp if run.sequence_parallel else np.ones_like(tp))
    boundaries = 2 * (batch.vpp if batch.pp > 1 else 0)
    pipeline = np.broadcast_to(m * boundaries * stage, tensor.shape)
    return Traffic(tensor, context, inside, across, pipeline, *_data(batch))


def rates(batch: Batch, ideal: bool = False) -> Traffic:
    """Bytes per second of a rank, broadcastable over ranks."""
    fast, slow = _links(batch.cluster, ideal)
    everywhere = np.full_like(batch.tp, batch.cluster.n_gpus)
    return Traffic(
        tensor=_ring(batch, batch.tp, np.ones_like(batch.tp), ideal),
        context=_neighbour(batch, batch.tp * batch.cp, ideal),
        experts=np.full(batch.tp.shape, fast),
        across=np.full(batch.tp.shape, slow),
        pipeline=_neighbour(batch, everywhere, ideal),
        data=_ring(batch, batch.dp * batch.cp, batch.tp, ideal),
        expert_data=_ring(batch, batch.edp, batch.ep * batch.etp, ideal),
    )


def links(batch: Batch) -> dict[str, LinkName]:
    """The slowest link that each kind of traffic of the first layout uses."""
    tp, cp, dp, ep, etp, edp = (int(x[0, 0]) for x in (batch.tp, batch.cp, batch.dp, batch.ep, batch.etp, batch.edp))
    spans = {
        "tensor": tp,
        "context": tp * cp,
        "experts": 1,
        "pipeline": batch.cluster.n_gpus,
        "data": tp * cp * dp,
        "expert_data": ep * etp * edp,
    }
    return {"across": "network", **{kind: batch.cluster.link_of(span) for kind, span in spans.items()}}


def _data(batch: Batch) -> tuple[Ranks, Ranks]:
    """Gradients are scattered and weights gathered once per step; with zero 3 in both passes of every micro-batch."""
    run, m = batch.run, batch.n_microbatches
    dense, experts = params(batch)
    grad = 4.0 if run.grads == "float32" else 2.0
    # Narrow weights with two copies are gathered in bf16 and then rounded.
    once = grad + BF16 if run.zero else 2 * grad
    moved = m * (2 * BF16 + grad) if run.zero == 3 else once
    of_dense: np.ndarray = moved * (1 - 1 / (batch.dp * batch.cp)) * (dense @ batch.per_rank.T)
    of_experts: np.ndarray = moved * (1 - 1 / batch.edp) * (experts @ batch.per_rank.T)
    return of_dense, of_experts


def _links(cluster: Cluster, ideal: bool) -> tuple[float, float]:
    """Bytes per second of a device inside its domain, and over the network."""
    fast = cluster.rate("domain") * efficiency(cluster, "domain", ideal)
    return fast, cluster.rate("network") * efficiency(cluster, "network", ideal)


def efficiency(cluster: Cluster, link: LinkName, ideal: bool = False) -> float:
    """Fraction of the rate of a link that traffic reaches."""
    if ideal:
        return 1.0
    own = LINK_EFFICIENCY.get((cluster.device.name, link))
    return LINK_EFFICIENCY[("", link)] if own is None else own


def _ring(batch: Batch, ranks: np.ndarray, stride: np.ndarray, ideal: bool) -> np.ndarray:
    """Bytes per second of each rank in a collective of ranks a stride apart.

    If a collective spans domains, the members of a domain share the load of the network, each over its own adapter.
    """
    cluster = batch.cluster
    fast, slow = _links(cluster, ideal)
    inside = np.maximum(1, np.minimum(ranks, cluster.domain_size // np.maximum(1, stride)))
    return np.where(ranks * stride <= cluster.domain_size, fast, np.minimum(fast, inside * slow))


def _neighbour(batch: Batch, span: np.ndarray, ideal: bool) -> np.ndarray:
    """Bytes per second between neighbours in a group that spans that many ranks."""
    fast, slow = _links(batch.cluster, ideal)
    return np.where(span <= batch.cluster.domain_size, fast, slow)


def _all_to_all(
    batch: Batch, tokens: Float[np.ndarray, "n 1"]
) -> tuple[Float[np.ndarray, "n items"], Float[np.ndarray, "n items"]]:
    """Bytes that send the tokens of a micro-batch to the experts of every item once, inside a domain and across."""
    profile, run = batch.profile, batch.run
    pairs, index = np.unique(np.hstack((batch.ep, batch.etp)), axis=0, return_inverse=True)
    both = np.zeros((2, len(tokens), len(profile.names)))
    for i in np.flatnonzero(profile.top_k):
        k, size = int(profile.top_k[i]), batch.cluster.domain_size
        sent = [copies_sent(size, ep, etp, k, run.all_to_all, run.expert_groups) for ep, etp in pairs.tolist()]
        both[:, :, i] = tokens[:, 0] * profile.d_routed[i] * BF16 * np.array(sent)[index.reshape(-1)].T
    return both[0], both[1]


def all_to_all_s(
    cluster: Cluster, sent: float, ep: int, top_k: int, mode: AllToAll, groups: tuple[int, int] | None = None
) -> float:
    """Seconds of one all-to-all in which every rank sends `sent` bytes of tokens; both links work at once."""
    copied = copies_sent(cluster.domain_size, ep, 1, top_k, mode, groups)
    return max(sent * n / rate for n, rate in zip(copied, _links(cluster, ideal=False), strict=True))


@lru_cache(maxsize=4096)
def copies_sent(
    domain_size: int, ep: int, etp: int, top_k: int, mode: AllToAll, groups: tuple[int, int] | None = None
) -> tuple[float, float]:
    """Copies of a token that an all-to-all sends on average: inside its domain, and over the network."""
    inside = max(1, min(ep, domain_size // etp))
    domains = -(-ep // inside)
    if mode == "node":
        return copies(ep, top_k, groups) * (1 - 1 / inside), copies(domains, top_k, groups) * (1 - 1 / domains)
    n = top_k if mode == "naive" else copies(ep, top_k, groups)
    return n * (inside - 1) / ep, n * (ep - inside) / ep


def copies(places: int, top_k: int, groups: tuple[int, int] | None = None) -> float:
    """Mean number of destinations per token among `places` that hold equal shares of the experts.

    Without expert groups it is G (1 - (1 - 1/G)^K). With groups, a token first chooses groups and then their experts.
    """
    if groups is None or groups[0] == groups[1]:
        return places * (1 - (1 - 1 / places) ** top_k)
    n, chosen = groups
    if places >= n:
        candidates = places * chosen / n
        return candidates * (1 - (1 - 1 / candidates) ** top_k)
    here = n // places  # groups of a place, of which a token has chosen `j`
    ways = comb(n, chosen)
    return places * sum(
        comb(here, j) * comb(n - here, chosen - j) / ways * (1 - (1 - j / chosen) ** top_k)
        for j in range(1, min(here, chosen) + 1)
    )
