"""Finds the largest micro-batch, context or model that fits in a given layout, or in any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from explore.model import ModelConfig
from explore.plan.cluster import Cluster
from explore.plan.layout import DEGREES, Layout
from explore.plan.plans import GIB, Plan
from explore.plan.relief import cheapest_relief
from explore.plan.run import Run
from explore.plan.search import search
from explore.solve import solve

What = Literal["batch", "context", "model"]
TOKENS = 1024
"""Contexts are multiples of this number of tokens."""
MODEL_STEPS = 9
"""Number of bisections for the parameters of a model, which gives 2%."""
LARGEST = 2**20


class Largest(NamedTuple):
    """The largest size that fits.

    Attributes:
        value: sequences of a micro-batch, tokens of a sequence, or parameters.
        plan: plan in which it fits.
    """

    what: What
    value: float
    plan: Plan


def largest(
    what: What,
    model: ModelConfig,
    cluster: Cluster,
    run: Run,
    fixed: Mapping[str, int],
    *,
    pipeline: str | None = None,
    free: tuple[str, ...] = ("d_model",),
) -> Largest:
    """Finds the largest micro-batch, context or model that fits, with relief (such as recomputation) if needed.

    Args:
        fixed: given degrees; all values of the others are tried.
        free: dimensions of the model that the solver may change, in the solver's syntax.

    Raises:
        ValueError: not even the smallest fits.
    """
    if what == "model":
        return _model(model, cluster, run, fixed, pipeline, free)
    multiple = TOKENS * 2 * fixed.get("cp", 1)
    if what == "batch":
        sizes: list[int] = [2**k for k in range(run.global_batch.bit_length()) if run.global_batch % 2**k == 0]

        def attempt(size: int) -> Plan | None:
            return _fitting(model, cluster, run, {**fixed, "micro_batch": size}, pipeline)

    else:
        sizes = [multiple * 2**k for k in range(LARGEST.bit_length()) if multiple * 2**k <= LARGEST]

        def attempt(size: int) -> Plan | None:
            return _fitting(model, cluster, run.model_copy(update={"seq_len": size}), fixed, pipeline)

    if (best := _last(sizes, attempt)) is None:
        raise ValueError(f"--largest {what}: not even {sizes[0]:,} fits")
    if what == "context":  # between two powers of two in eighths
        size = best[0]
        longer = sorted({size + size * k // 8 // multiple * multiple for k in range(1, 8)} - {size})
        best = _last(longer, attempt) or best
    return Largest(what, *best)


def _last(sizes: list[int], attempt: Callable[[int], Plan | None]) -> tuple[int, Plan] | None:
    """The last size that fits, by bisection: memory grows with it."""
    best: tuple[int, Plan] | None = None
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if (plan := attempt(sizes[middle])) is None:
            high = middle
        else:
            best, low = (sizes[middle], plan), middle + 1
    return best


def _model(
    model: ModelConfig,
    cluster: Cluster,
    run: Run,
    fixed: Mapping[str, int],
    pipeline: str | None,
    free: tuple[str, ...],
) -> Largest:
    content: dict[str, Any] = model.model_dump(mode="json")
    params = model.cost(1).params_total

    def attempt(target: float) -> tuple[float, Plan] | None:
        scaled = solve(content, {"params_total": target}, list(free), tolerance=0.1).model
        plan = _fitting(scaled, cluster, run, fixed, pipeline)
        return None if plan is None else (float(scaled.cost(1).params_total), plan)

    low, high, best = params / 64, params * 64, None
    for _ in range(MODEL_STEPS):
        middle = (low * high) ** 0.5
        if (found := attempt(middle)) is None:
            high = middle
        else:
            low, best = middle, found
    if best is None:
        raise ValueError(f"--largest model: not even {low / 1e9:.3g} billion parameters fit")
    return Largest("model", *best)


def _fitting(
    model: ModelConfig, cluster: Cluster, run: Run, fixed: Mapping[str, int], pipeline: str | None
) -> Plan | None:
    """Returns a plan that fits, or None."""
    try:
        if all(degree in fixed for degree in DEGREES):
            plan = Plan.of(model, run, Layout(**fixed, pipeline=pipeline), cluster)
            found = None if plan.fits else cheapest_relief(plan)
            return plan if plan.fits else found[0] if found else None
        plans = search(model, cluster, run, fixed, pipeline=pipeline, n=1).plans
    except ValueError:
        return None
    return plans[0] if plans else None


def describe(found: Largest) -> str:
    """Summarises the result in one line."""
    plan = found.plan
    unit = {"batch": "sequences of a micro-batch", "context": "tokens of a sequence", "model": "parameters"}[found.what]
    value = f"{found.value / 1e9:.4g} billion" if found.what == "model" else f"{found.value:,.0f}"
    held = f"{plan.needed / GIB:.0f} of {plan.capacity / GIB:.0f} GiB"
    return f"largest {found.what}: {value} {unit}, with {plan.layout} ({held})"
