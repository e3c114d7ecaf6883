"""Layouts: how layers, tensors, tokens and experts are split across devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt

from explore.config import Config
from explore.model import ModelConfig
from explore.plan.cluster import Cluster
from explore.plan.run import Run

DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp", "micro_batch")


class Layout(Config):
    """Degrees of parallelism.

    Attention and dense layers use tp * cp * dp * pp ranks, experts etp * ep * edp * pp; only the pipeline is
    shared. Ranks are numbered in this order; the first degree varies fastest.

    Attributes:
        tp: tensor parallelism; ranks split heads and inner widths.
        cp: context parallelism; ranks split the tokens of a sequence.
        pp: number of pipeline ranks.
        vpp: number of pipeline stages per rank.
        ep: expert parallelism; ranks split the experts.
        etp: expert tensor parallelism; ranks split an expert's inner width.
        micro_batch: sequences per micro-batch.
        pipeline: Megatron's layout string, or a pattern with `|` between stages; None balances the stages.
    """

    tp: PositiveInt = 1
    cp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    micro_batch: PositiveInt = 1
    pipeline: str | None = None

    def dp(self, n_gpus: int) -> int:
        """Data-parallel ranks of dense layers."""
        return n_gpus // (self.tp * self.cp * self.pp)

    def edp(self, n_gpus: int) -> int:
        """Data-parallel ranks of experts."""
        return n_gpus // (self.etp * self.ep * self.pp)

    def n_microbatches(self, run: Run, n_gpus: int) -> int:
        """Micro-batches of an optimizer step that pass through one pipeline."""
        return run.global_batch // (self.micro_batch * self.dp(n_gpus))

    def __str__(self) -> str:
        degrees = [f"{name.upper()}{getattr(self, name)}" for name in DEGREES[:-1] if getattr(self, name) > 1]
        return " ".join([*degrees, f"MBS{self.micro_batch}"])


def check(model: ModelConfig, run: Run, layout: Layout, cluster: Cluster) -> None:
    """Checks that a layout is possible, regardless of memory.

    Raises:
        ValueError: a degree does not divide a size; the message suggests values that do.
    """
    check_ranks(layout.model_dump(), cluster)
    w = cluster.n_gpus
    for letter, block in model.blocks.items():
        try:
            block.check_parallel(layout.tp, layout.cp, layout.ep, layout.etp)
        except ValueError as error:
            raise ValueError(f"{error} (blocks.{letter})") from None
    if layout.ep * layout.etp > 1 and all(block.role != "experts" for block in model.blocks.values()):
        raise ValueError(f"ep * etp must be 1 for a model without experts, got {layout.ep * layout.etp}")
    if model.vocab_size % layout.tp:
        raise ValueError(f"tp must divide vocab_size={model.vocab_size}, got {layout.tp}")
    # Each rank takes a piece of the early and one of the late tokens, which balances the number of keys.
    if layout.cp > 1 and run.seq_len % (2 * layout.cp):
        raise ValueError(f"2 * cp must divide seq_len={run.seq_len:,}, got cp={layout.cp}")
    per_step = layout.micro_batch * layout.dp(w)
    if run.global_batch % per_step:
        raise ValueError(
            f"micro_batch * dp must divide global_batch={run.global_batch:,}, got {layout.micro_batch} * "
            f"{layout.dp(w)}; a global batch of {max(1, round(run.global_batch / per_step)) * per_step:,} would do"
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise ValueError(f"vpp must be 1 if pp is 1, got {layout.vpp}")
    if layout.vpp > 1 and layout.n_microbatches(run, w) % layout.pp:
        raise ValueError(
            f"pp must divide the {layout.n_microbatches(run, w)} micro-batches of a step if vpp is above 1, "
            f"got {layout.pp}"
        )


def check_ranks(degrees: Mapping[str, Any], cluster: Cluster) -> None:
    """Checks that the degrees fit on a cluster and divide its number of GPUs.

    Args:
        degrees: by name; a degree that is missing counts as 1.

    Raises:
        ValueError: too many ranks, or a number that does not divide the GPUs; the message lists the nearest that do.
    """
    w = cluster.n_gpus
    for names in (("tp", "cp", "pp"), ("etp", "ep", "pp")):
        ranks = math.prod(degrees.get(name, 1) for name in names)
        product = " * ".join(names)
        if ranks > w:
            raise ValueError(f"{product} must be at most the {w:,} GPUs of {cluster.name}, got {ranks:,}")
        if w % ranks:
            raise ValueError(
                f"{product} must divide the {w:,} GPUs of {cluster.name}, got {ranks:,}; {_near_divisors(w, ranks)} do"
            )


def _near_divisors(n: int, wanted: int) -> str:
    """Names the divisors of `n` just below and above a number."""
    divisors = sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    return " and ".join(f"{d:,}" for d in below + above)
