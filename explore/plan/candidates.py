"""Legal layouts, grouped by pipeline, and reasons why the others are not legal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from explore.model import ModelConfig
from explore.plan.batch import stages_of
from explore.plan.cluster import Cluster
from explore.plan.profile import Profile
from explore.plan.run import Run
from explore.plan.stages import Stages

MAX_VPP, MAX_MICRO_BATCH = 12, 4
SHORTEST = 512
"""Smallest number of tokens of a sequence on a context-parallel rank."""


@dataclass
class Candidates:
    """Legal layouts.

    Attributes:
        groups: a pipeline and tp, cp, ep, etp and micro_batch of its layouts, with equal numbers of micro-batches.
        refusals: first wall and reason found, by degree and value.
    """

    groups: list[tuple[Stages, Int[np.ndarray, "n 5"]]] = field(default_factory=list)
    refusals: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)

    def refuse(self, degree: str, value: int, wall: str, reason: str) -> None:
        self.refusals.setdefault((degree, value), (wall, reason))

    def reason(self, fixed: Mapping[str, int]) -> str:
        """Explains why nothing is legal: the error of a given degree, or else the first error of sizes or batch."""
        of_given = [text for (degree, value), (_, text) in self.refusals.items() if fixed.get(degree) == value]
        order = ("sizes", "batch", "pipeline")
        others = [text for wall in order for found, text in self.refusals.values() if found == wall]
        ranks = "no degrees of parallelism divide the number of GPUs"
        return next(iter([*of_given, *others, ranks]))


def candidates(
    shape: Profile, run: Run, cluster: Cluster, fixed: Mapping[str, int], pipeline: str | None = None
) -> Candidates:
    """All legal layouts with some degrees given; tp, cp and pp are powers of two, ep divides the experts."""
    legal, w = Candidates(), cluster.n_gpus
    groups: dict[tuple[Stages, int], list[tuple[int, int, int, int, int]]] = defaultdict(list)
    pipelines = list(_pipelines(shape, cluster, fixed, pipeline, legal))
    micro_batches = _values(fixed, "micro_batch", [2**k for k in range(MAX_MICRO_BATCH.bit_length())])
    divisions = list(_divisions(shape, run, cluster, fixed, legal))
    for pp, of_pp in _by_ranks(pipelines).items():
        for tp, cp, ep, etp in divisions:
            if w % (tp * cp * pp) or w % (ep * etp * pp):
                continue
            dp = w // (tp * cp * pp)
            for micro_batch in micro_batches:
                m, rest = divmod(run.global_batch, micro_batch * dp)
                if rest:
                    reason = f"micro_batch * dp must divide global_batch={run.global_batch:,}, got {micro_batch} * {dp}"
                    legal.refuse("micro_batch", micro_batch, "batch", reason)
                    continue
                for stages in of_pp:
                    if stages.vpp > 1 and m % pp:
                        reason = f"pp must divide the micro-batches of a step if vpp is above 1, got {pp} and {m}"
                        legal.refuse("vpp", stages.vpp, "pipeline", reason)
                    else:
                        groups[stages, m].append((tp, cp, ep, etp, micro_batch))
    legal.groups = [(stages, np.array(rows, dtype=np.int64)) for (stages, _), rows in groups.items()]
    return legal


def _divisions(
    shape: Profile, run: Run, cluster: Cluster, fixed: Mapping[str, int], legal: Candidates
) -> Iterator[tuple[int, int, int, int]]:
    """Degrees of tensor, context, expert and expert-tensor parallelism that divide the model."""
    w, model = cluster.n_gpus, shape.model
    powers = [2**k for k in range(w.bit_length()) if w % 2**k == 0]
    n_experts = max(block.routing()[0] for block in model.blocks.values())
    divisors = [k for k in range(1, n_experts + 1) if n_experts % k == 0 and w % k == 0] or [1]
    experts = [
        (ep, etp)
        for ep in _values(fixed, "ep", divisors)
        for etp in _values(fixed, "etp", powers if n_experts else [1])
        if _allowed(legal, "ep", ep, _refusal(model, ep=ep, etp=etp) or _without_experts(ep * etp, n_experts))
    ]
    for tp in _values(fixed, "tp", [k for k in powers if k <= cluster.domain_size]):
        vocab = f"tp must divide vocab_size={model.vocab_size}, got {tp}" if model.vocab_size % tp else ""
        if not _allowed(legal, "tp", tp, _refusal(model, tp=tp) or vocab):
            continue
        for cp in _values(fixed, "cp", [k for k in powers if k <= max(1, run.seq_len // SHORTEST)]):
            uneven = f"2 * cp must divide seq_len={run.seq_len:,}, got cp={cp}" if run.seq_len % (2 * cp) else ""
            if cp == 1 or _allowed(legal, "cp", cp, uneven or _refusal(model, tp=tp, cp=cp)):
                # An expert is split over tp ranks or not at all.
                yield from ((tp, cp, ep, etp) for ep, etp in experts if etp in (1, tp) or "etp" in fixed)


def _pipelines(
    shape: Profile, cluster: Cluster, fixed: Mapping[str, int], pipeline: str | None, legal: Candidates
) -> Iterator[Stages]:
    """Pipelines that have enough ranks and layers."""
    powers = [2**k for k in range(cluster.n_gpus.bit_length()) if cluster.n_gpus % 2**k == 0]
    for pp in _values(fixed, "pp", powers):
        for vpp in [1] if pipeline else _values(fixed, "vpp", list(range(1, MAX_VPP + 1)) if pp > 1 else [1]):
            try:
                yield stages_of(shape, pp, vpp, pipeline)
            except ValueError as error:
                legal.refuse(
                    "pp" if vpp == 1 or "vpp" in fixed else "vpp", pp if vpp == 1 else vpp, "pipeline", str(error)
                )
                break


def _by_ranks(pipelines: list[Stages]) -> dict[int, list[Stages]]:
    ranks: dict[int, list[Stages]] = defaultdict(list)
    for stages in pipelines:
        ranks[stages.pp].append(stages)
    return ranks


def _values(fixed: Mapping[str, int], degree: str, otherwise: list[int]) -> list[int]:
    return [fixed[degree]] if degree in fixed else otherwise


def _allowed(legal: Candidates, degree: str, value: int, refusal: str) -> bool:
    if refusal:
        legal.refuse(degree, value, "sizes", refusal)
    return not refusal


def _without_experts(ranks: int, n_experts: int) -> str:
    return f"ep * etp must be 1 for a model without experts, got {ranks}" if ranks > 1 and not n_experts else ""


def _refusal(model: ModelConfig, **degrees: int) -> str:
    for letter, block in model.blocks.items():
        try:
            block.check_parallel(**degrees)
        except ValueError as error:
            return f"{error} (blocks.{letter})"
    return ""
