"""Memory of each rank of a pipeline: weights, gradients, optimizer state, and tensors saved for the backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from explore.plan.batch import Batch
from explore.plan.profile import EXPERTS, WHOLE, WIDTH
from explore.plan.stages import fullest

MAIN_BYTES = 4.0
"""Bytes of an fp32 main weight; the products use a rounded copy."""
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0}
WORKSPACE_BYTES = 0.11 * 2**30
"""Allocated memory that the formulas do not explain, in bytes.

Source: the mean difference of the five hybrid cases in `golden`, 0.104 to 0.133 GiB.
"""

Ranks = Float[np.ndarray, "n pp"]


class Memory(NamedTuple):
    """Bytes per layout and rank at the peak of a step."""

    weights: Ranks
    grads: Ranks
    optimizer: Ranks
    activations: Ranks

    @property
    def total(self) -> Ranks:
        total: np.ndarray = self.weights + self.grads + self.optimizer + self.activations
        return total


def memory(batch: Batch) -> Memory:
    """Memory of every rank."""
    run, per_rank = batch.run, batch.per_rank
    dense, experts = params(batch)
    narrow, wide = (_weights(batch, i) for i in (0, 1))
    spared = run.format.transposed_copy if batch.cluster.device.transposes_fp8 else 0.0
    weight_bytes = narrow * (run.format.weight - spared) + wide * 2.0
    d, edp = batch.dp * batch.cp, batch.edp
    grad = 4.0 if run.grads == "float32" else 2.0
    # bf16 gradients are converted to fp32 for the optimizer, each rank on its own shard.
    state = MAIN_BYTES + 2 * MOMENT_BYTES[run.moments] + (4.0 if run.grads == "bfloat16" else 0.0)
    if run.offload_optimizer:
        state = 0.0
    shares = (d, edp) if run.zero >= 1 else (1, 1)
    optimizer = state * (dense / shares[0] + experts / shares[1])
    shares = (d, edp) if run.zero >= 2 else (1, 1)
    grads = grad * (dense / shares[0] + experts / shares[1])
    weights = weight_bytes @ per_rank.T
    if run.zero == 3:
        # Two layers are gathered at a time: the one in use and the next one.
        gathered = 2 * (weight_bytes[:, None, :] * (per_rank > 0)).max(axis=-1)
        share = (dense / d + experts / edp) / np.maximum(dense + experts, 1)
        weights = np.minimum(weights, (weight_bytes * share) @ per_rank.T + gathered)
    return Memory(weights, grads @ per_rank.T, optimizer @ per_rank.T, activations(batch))


def params(batch: Batch) -> tuple[Float[np.ndarray, "n items"], Float[np.ndarray, "n items"]]:
    """Parameters of every item on one rank: of all dense layers, and of experts."""
    weights = _stored(batch).sum(axis=-1)
    return weights[:, WIDTH] / batch.tp + weights[:, WHOLE], weights[:, EXPERTS] / (batch.ep * batch.etp)


def _weights(batch: Batch, i: int) -> Float[np.ndarray, "n items"]:
    weights = _stored(batch)[..., i]
    held: np.ndarray = weights[:, WIDTH] / batch.tp + weights[:, WHOLE] + weights[:, EXPERTS] / (batch.ep * batch.etp)
    return held


def _stored(batch: Batch) -> Float[np.ndarray, "items 3 2"]:
    """Parameters of every item; a tied matrix is stored once if one rank has both ends of the model."""
    weights = batch.profile.weights
    if batch.profile.model.tie_embeddings and batch.pp == 1:
        weights = weights.copy()
        weights[-3] = 0
    return weights


def saved(batch: Batch) -> Float[np.ndarray, "n items"]:
    """Bytes that one micro-batch saves for every item on one rank."""
    tokens, width, expert_width, expert_tokens = batch.profile.saved(batch.run).T
    tp = batch.tp if batch.run.sequence_parallel else np.ones_like(batch.tp)
    kept: np.ndarray = tokens / tp + width / batch.tp + expert_width / tp + expert_tokens * batch.etp / tp
    of_rank: np.ndarray = kept * batch.micro_batch / batch.cp
    return of_rank


def activations(batch: Batch) -> Ranks:
    """Bytes saved by all micro-batches in flight, plus whole layers during their recomputation."""
    kept = saved(batch)
    if "full" in batch.run.recompute and batch.stages.unit == 2:
        kept = kept.copy()
        kept[:, : len(batch.profile.names) - 3] /= 2  # a unit of two letters saves only its first input
    most = fullest(
        batch.in_flight(),
        np.matmul(kept, batch.counts.reshape(-1, kept.shape[1]).T).reshape(len(kept), batch.pp, batch.vpp),
    )
    if "full" in batch.run.recompute:
        most = most + _working(batch)
    left: np.ndarray = most * (1 - batch.run.offload_activations)
    return left


def _working(batch: Batch) -> Ranks:
    """Activations of one unit during recomputation: the largest letters of each rank."""
    without = batch.run.model_copy(update={"recompute": ()})
    whole = saved(replace(batch, run=without))[:, : len(batch.profile.names) - 3]
    present = whole[:, None, :] * (batch.per_rank[:, : whole.shape[1]] > 0)
    largest: np.ndarray = np.sort(present, axis=-1)[..., -batch.stages.unit :].sum(axis=-1)
    return largest
