"""What a rank sends to others, and how long a link needs for it."""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from explore.plan.batch import Batch
from explore.plan.cluster import LINK_EFFICIENCY, Cluster, LinkName
from explore.plan.memory import Ranks, params

BF16 = 2.0
TENSOR_PASSES = 5
"""Gathers and scatters of a layer's tokens: two forward, two backward, and one for the gradients of weights."""
EXPERT_PASSES = 4
"""All-to-alls of a layer: to the experts and back, forward and backward."""


class Traffic(NamedTuple):
    """Seconds of a step that each rank's links are busy with.

    Attributes:
        tensor: gathers and scatters of tensor-parallel ranks.
        context: keys and values, or tokens for heads, of context-parallel ranks.
        experts: all-to-alls inside a domain.
        across: all-to-alls over the network, at the same time as those inside.
        pipeline: activations and their gradients from stage to stage.
        data: gradients, and weights after the step; with zero 3 weights for every micro-batch.
    """

    tensor: Ranks
    context: Ranks
    experts: Ranks
    across: Ranks
    pipeline: Ranks
    data: Ranks


def efficiency(cluster: Cluster, link: LinkName, ideal: bool) -> float:
    """Part of a link's rate that is reached."""
    if ideal:
        return 1.0
    own = LINK_EFFICIENCY.get((cluster.device.name, link))
    return LINK_EFFICIENCY[("", link)] if own is None else own


def traffic(batch: Batch, ideal: bool = False) -> Traffic:
    """Seconds of a step for each kind of traffic; with `ideal` at the full rate of every link."""
    cluster, run, per_rank = batch.cluster, batch.run, batch.per_rank
    m, d = batch.n_microbatches, batch.profile.model.d_model
    tokens = batch.micro_batch * run.seq_len / batch.cp  # of a micro-batch, on a tensor-parallel group
    tp = batch.tp
    passed = TENSOR_PASSES * tokens * d * BF16 * (1 - 1 / tp) * batch.profile.divided
    tensor = m * passed @ per_rank.T / _ring(batch, tp, 1, ideal)
    unique = {int(cp): batch.profile.context_numel(int(cp)) for cp in set(batch.cp.flat)}
    # Backward, keys, values and their gradients go round: twice as much as forward.
    sent = 3 * tokens / tp * BF16 * np.stack([unique[int(cp)] for cp in batch.cp.flat])
    context = m * sent @ per_rank.T / _neighbour(batch, tp * batch.cp, ideal)
    inside, across = (m * EXPERT_PASSES * each @ per_rank.T for each in all_to_all_s(batch, tokens / tp, ideal))
    stage = tokens * d * BF16 / (tp if run.sequence_parallel else np.ones_like(tp))
    boundaries = 2 * (batch.vpp if batch.pp > 1 else 0)
    pipeline = m * boundaries * stage / _neighbour(batch, np.full_like(tp, cluster.n_gpus), ideal)
    return Traffic(tensor, context, inside, across, np.broadcast_to(pipeline, tensor.shape), _data(batch, ideal))


def _data(batch: Batch, ideal: bool) -> Ranks:
    """Gradients are scattered and weights gathered once a step; with zero 3 for every micro-batch, forward and back."""
    run, m = batch.run, batch.n_microbatches
    dense, experts = params(batch)
    grad = 4.0 if run.grads == "float32" else 2.0
    # Narrow weights with two copies are gathered in bf16 and rounded after it.
    once = grad + BF16 if run.zero else 2 * grad
    moved = m * (2 * BF16 + grad) if run.zero == 3 else once
    seconds = np.zeros((len(batch.tp), batch.pp))
    for numel, ranks, stride in (
        (dense, batch.dp * batch.cp, batch.tp),
        (experts, batch.edp, batch.ep * batch.etp),
    ):
        share = moved * (1 - 1 / ranks)
        seconds = seconds + share * (numel @ batch.per_rank.T) / _ring(batch, ranks, stride, ideal)
    return seconds


def _ring(batch: Batch, ranks: np.ndarray, stride: np.ndarray | int, ideal: bool) -> np.ndarray:
    """Bytes per second of each rank in a collective of ranks a stride apart.

    Where it spans domains, members of one domain share the load of the network, each over its own adapter.
    """
    cluster = batch.cluster
    fast = cluster.rate("domain") * efficiency(cluster, "domain", ideal)
    slow = cluster.rate("network") * efficiency(cluster, "network", ideal)
    inside = np.maximum(1, np.minimum(ranks, cluster.domain_size // np.maximum(1, stride)))
    return np.where(ranks * stride <= cluster.domain_size, fast, np.minimum(fast, inside * slow))


def _neighbour(batch: Batch, span: np.ndarray, ideal: bool) -> np.ndarray:
    """Bytes per second between neighbours in a group that spans so many ranks."""
    cluster = batch.cluster
    fast = cluster.rate("domain") * efficiency(cluster, "domain", ideal)
    slow = cluster.rate("network") * efficiency(cluster, "network", ideal)
    return np.where(span <= cluster.domain_size, fast, slow)


def all_to_all_s(
    batch: Batch, tokens: Float[np.ndarray, "n 1"], ideal: bool
) -> tuple[Float[np.ndarray, "n items"], Float[np.ndarray, "n items"]]:
    """Seconds that links need to carry a micro-batch's tokens to its experts once: inside a domain, and across."""
    profile, run = batch.profile, batch.run
    pairs, index = np.unique(np.hstack((batch.ep, batch.etp)), axis=0, return_inverse=True)
    both = np.zeros((2, len(tokens), len(profile.names)))
    for i in np.flatnonzero(profile.top_k):
        k, width = int(profile.top_k[i]), profile.d_routed[i]
        per_byte = np.array(
            [all_to_all_bytes_s(batch.cluster, ep, etp, k, run.expert_groups, ideal) for ep, etp in pairs.tolist()]
        )
        # Of multi-token prediction every depth has its own; the pattern of a depth has one layer of experts.
        both[:, :, i] = tokens[:, 0] * width * BF16 * per_byte[index.reshape(-1)].T
    return both[0], both[1]


@lru_cache(maxsize=4096)
def all_to_all_bytes_s(
    cluster: Cluster, ep: int, etp: int, top_k: int, groups: tuple[int, int] | None = None, ideal: bool = False
) -> tuple[float, float]:
    """Seconds per byte of a token that an all-to-all keeps the links of a domain busy, and those of the network.

    One copy goes to each rank, and over the network one to each domain, inside which it goes on; both links are busy at
    once, so that it takes the longer.
    """
    inside = max(1, min(ep, cluster.domain_size // etp))
    domains = -(-ep // inside)
    fast = cluster.rate("domain") * efficiency(cluster, "domain", ideal)
    slow = cluster.rate("network") * efficiency(cluster, "network", ideal)
    over_domain = copies(ep, top_k, groups) * (1 - 1 / inside) / fast
    over_network = copies(domains, top_k, groups) * (1 - 1 / domains) / slow
    return over_domain, over_network


def copies(places: int, top_k: int, groups: tuple[int, int] | None = None) -> float:
    """How many of `places` that share all experts evenly a token is sent to, on average.

    Without groups G (1 - (1 - 1/G)^K); with them the experts come from some groups only, which are chosen first.
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


def naive_bytes_s(cluster: Cluster, ep: int, top_k: int, ideal: bool = False) -> float:
    """Seconds per byte of a token in an all-to-all that sends a copy to each expert, wherever it is."""
    inside = min(ep, cluster.domain_size)
    fast = cluster.rate("domain") * efficiency(cluster, "domain", ideal)
    slow = cluster.rate("network") * efficiency(cluster, "network", ideal)
    here, elsewhere = (inside - 1) / ep, (ep - inside) / ep
    return top_k * max(here / fast, elsewhere / slow)
