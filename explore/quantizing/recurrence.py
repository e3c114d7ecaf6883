"""When a recurrent state should be rounded stochastically: a linear recurrence whose exact state is known.

s_t = a s_{t-1} + u_t is rounded after every token. Rounding to nearest has the smaller error in one step, but it undoes
a change of less than half the distance between neighbouring values, and does so again at every token: errors of one
sign add up, or the state does not move. Stochastic rounding has at least twice the variance and no bias.

a: decay; u: input; s: state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from explore.ops import StateRounding, value_spacing
from explore.precision import ELEMENTS, FORMATS, FormatName

GROUPS, GROUP = 4, 128
"""Elements of a state: groups along its last axis, and the elements of one, which share a scale in int8."""


@torch.no_grad()
def rounding_errors(
    decays: Sequence[float] = (0.9, 0.99, 0.999, 0.9999),
    lengths: Sequence[int] = (64, 512, 4096),
    formats: Sequence[FormatName] = ("fp16", "int8", "fp8"),
    *,
    hold: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors of a rounded state after some lengths, for both roundings.

    Args:
        formats: formats with one scale for a tensor, for a block of int8, or without a scale.
        hold: tokens for which an input stays the same before another is drawn; inputs are Gaussian.
        seed: of inputs and of stochastic rounding.

    Returns:
        One row per format, decay and length: `update`, the median over elements of the last change of the exact state
        in units of the distance between neighbouring values; `nearest` and `stochastic`, the root mean square error
        relative to the state; and `better`, the rounding with the smaller error.

    Raises:
        ValueError: hold is below 1, or a format shares its scales otherwise.
    """
    if hold < 1:
        raise ValueError(f"hold must be at least 1, got {hold}")
    for format in formats:
        if FORMATS[format].scaling not in ("none", "tensor", "block"):
            raise ValueError(f"formats must be fp16, bf16, fp8 or int8, got {format!r}")
    generator = torch.Generator().manual_seed(seed)
    a = torch.tensor(decays).view(-1, 1, 1)
    rounders = {
        (format, rounding): StateRounding(state=format, stochastic_state=rounding == "stochastic", seed=seed)
        for format in formats
        for rounding in ("nearest", "stochastic")
    }
    exact = before = u = torch.zeros(len(decays), GROUPS, GROUP)
    states = dict.fromkeys(rounders, exact)
    rows: list[dict[str, Any]] = []
    for t in range(1, max(lengths) + 1):
        if (t - 1) % hold == 0:
            u = torch.randn(1, GROUPS, GROUP, generator=generator)  # the same for every decay
        before, exact = exact, a * exact + u
        states = {each: rounders[each].recurrent(a * state + u, t) for each, state in states.items()}
        if t not in lengths:
            continue
        for format in formats:
            errors = {name: _size(states[format, name] - exact) / _size(exact) for name in ("nearest", "stochastic")}
            update = ((exact - before).abs() / _spacing(exact, format)).flatten(1).median(1).values
            for i, decay in enumerate(decays):
                pair = {name: float(each[i]) for name, each in errors.items()}
                better = min(pair, key=lambda name: pair[name])
                row = {"format": format, "decay": decay, "length": t, "update": float(update[i])}
                rows.append(row | pair | {"better": better})
    return pd.DataFrame(rows).sort_values(["format", "decay", "length"], ignore_index=True)


def _size(x: Float[Tensor, "rows groups group"]) -> Float[Tensor, " rows"]:
    """Root mean square of every row."""
    return x.double().square().mean((1, 2)).sqrt().float()


def _spacing(x: Float[Tensor, "rows groups group"], format: FormatName) -> Float[Tensor, "rows groups group"]:
    """Distance from each element to the next value that the format has at its scale."""
    entry = FORMATS[format]
    if entry.scaling == "none":
        return value_spacing(x.abs(), entry.element)
    amax = x.abs().amax(2 if entry.scaling == "block" else (1, 2), keepdim=True)
    scale = ELEMENTS[entry.element].largest / amax
    return value_spacing(x.abs() * scale, entry.element) / scale
