"""Reliefs that make a layout fit: recomputing activations, and offloading optimizer state to the host."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from explore.plan.plans import Plan
from explore.plan.profile import Profile
from explore.plan.run import Run


class Relief(NamedTuple):
    """Modules to recompute, and what else saves memory."""

    recompute: tuple[str, ...] = ()
    offload_optimizer: bool = False
    memory_efficient_permutation: bool = True

    def __str__(self) -> str:
        parts = {
            "memory-efficient permutation": self.memory_efficient_permutation,
            f"recompute {', '.join(self.recompute)}": self.recompute,
            "offload the optimizer's state": self.offload_optimizer,
        }
        return "; ".join(name for name, on in parts.items() if on)


CHEAP: tuple[str, ...] = ("layernorm", "moe_act")
RELIEFS = (
    Relief(memory_efficient_permutation=False),
    Relief(),
    Relief(CHEAP),
    Relief((*CHEAP, "mla_up_proj")),
    Relief((*CHEAP, "mla_up_proj", "mlp", "shared_experts")),
    Relief((*CHEAP, "mla_up_proj"), offload_optimizer=True),
    Relief((*CHEAP, "mla_up_proj", "mlp", "shared_experts"), offload_optimizer=True),
    Relief(("full",)),
    Relief(("full",), offload_optimizer=True),
)
"""Reliefs from cheap to expensive; a search uses the first that makes a layout fit."""


@lru_cache(maxsize=256)
def relieved(run: Run, i: int) -> Run:
    """Returns a run with the `i`-th relief added."""
    relief = RELIEFS[i]
    return run.model_copy(
        update={
            "recompute": tuple(dict.fromkeys((*run.recompute, *relief.recompute))),
            "offload_optimizer": run.offload_optimizer or relief.offload_optimizer,
            "memory_efficient_permutation": run.memory_efficient_permutation or relief.memory_efficient_permutation,
        }
    )


@lru_cache(maxsize=256)
def distinct_reliefs(shape: Profile, run: Run) -> tuple[int, ...]:
    """Returns the indices of reliefs that affect this model, and of the first, which changes nothing."""
    seen, distinct = set(), []
    for i in range(len(RELIEFS)):
        changed = relieved(run, i)
        key = (shape.saved(changed).tobytes(), changed.offload_optimizer, "full" in changed.recompute)
        if key not in seen:
            seen.add(key)
            distinct.append(i)
    return tuple(distinct)


def cheapest_relief(plan: Plan) -> tuple[Plan, Relief] | None:
    """Returns the fastest plan that fits with one relief, and that relief, or None."""
    host = plan.cluster.device.host_link is not None
    fitting = [
        (other, relief)
        for i, relief in enumerate(RELIEFS)
        if (host or not relief.offload_optimizer) and (other := replace(plan, run=relieved(plan.run, i))).fits
    ]
    return min(fitting, key=lambda pair: pair[0].step_s) if fitting else None
