"""Assigns layers to pipeline stages, and counts the micro-batches in flight on a rank.

A unit is a transformer layer of Megatron-LM (`t`): a mixer and the MLP or experts after it if the pattern alternates in
this way, else one letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from explore.model import ModelConfig
from explore.pattern import MTP_MARK, PIPELINE_MARK, canonical, split_mtp

EMBEDDING, LAYER, MTP, LOSS = "E", "t", "m", "L"


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline in the order of the layers; stage `v * pp + r` is the `v`-th of rank `r`.

    Attributes:
        unit: letters of a unit.
        items: items of every stage: E embedding, t a unit, m a depth of multi-token prediction, L final norm,
            head and loss.
    """

    pp: int
    unit: int
    items: tuple[str, ...]

    @property
    def vpp(self) -> int:
        return len(self.items) // self.pp

    def letters(self, pattern: str) -> list[str]:
        """The layers of every stage, in letters."""
        ends = np.cumsum([self.unit * items.count(LAYER) for items in self.items]).tolist()
        return [pattern[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def megatron(self) -> str:
        """The pipeline as Megatron-LM's `--pipeline-model-parallel-layout`, in its shortest form."""
        groups: list[tuple[str, int]] = []
        for items in self.items:
            if groups and groups[-1][0] == items:
                groups[-1] = (items, groups[-1][1] + 1)
            else:
                groups.append((items, 1))
        text = ""
        for i, (items, n) in enumerate(groups):
            last = i == len(groups) - 1
            whole = n - last  # the last stage has no mark after it
            if whole > 1:
                text += f"({items}{PIPELINE_MARK})*{whole}"
            elif whole:
                text += _short(items) + PIPELINE_MARK
            text += _short(items) if last else ""
        return text

    def hybrid(self, model: ModelConfig) -> str:
        """The pipeline as a pattern with `|` between stages, Megatron-LM's form for hybrids."""
        text = PIPELINE_MARK.join(self.letters(model.pattern))
        return text if model.mtp is None else text + (MTP_MARK + model.mtp.pattern) * model.mtp.n_depths


def _short(items: str) -> str:
    return re.sub(r"t{3,}", lambda run: f"t*{len(run[0])}", items)


def unit_of(model: ModelConfig) -> int:
    """Number of letters of a unit: 2 if every other layer is an MLP or experts, else 1."""
    feeds = [block.role in ("mlp", "experts") for block in model.layers]
    return 2 if len(feeds) % 2 == 0 and feeds == [False, True] * (len(feeds) // 2) else 1


def read(text: str, model: ModelConfig, pp: int) -> Stages:
    """Reads a pipeline layout: Megatron-LM's string of `E`, `t`, `m` and `L`, or a pattern with `|`.

    Raises:
        ValueError: an unknown character, or stages or layers that do not match the model.
    """
    if LAYER in text:
        stages, unit = tuple(_expand(text).split(PIPELINE_MARK)), 1
    else:
        main, _ = split_mtp(text)
        if canonical(main) != model.pattern:
            raise ValueError(
                f"pipeline layout must have the layers {model.pattern[:60]!r}, got {canonical(main)[:60]!r}"
            )
        parts = main.split(PIPELINE_MARK)
        tail = MTP * _depths(model) + LOSS
        items = [LAYER * len(canonical(part)) for part in parts]
        stages, unit = (
            (EMBEDDING + items[0], *items[1:-1], items[-1] + tail)
            if len(items) > 1
            else (EMBEDDING + items[0] + tail,),
            1,
        )
    whole = "".join(stages)
    n_layers, n_mtp = whole.count(LAYER), _depths(model)
    if n_layers * 2 == model.n_layers and unit_of(model) == 2:
        unit = 2
    expected = EMBEDDING + LAYER * (model.n_layers // unit) + MTP * n_mtp + LOSS
    if whole != expected:
        allowed = " or ".join(f"{model.n_layers // u} 't'" for u in {unit_of(model), 1})
        raise ValueError(
            f"pipeline layout must be E, {allowed}, {n_mtp} 'm' and L in this order, got {n_layers} 't': {text[:60]!r}"
        )
    if sum(MTP in items for items in stages) > 1:
        raise ValueError(f"pipeline layout must have all {n_mtp} 'm' in one stage, got {text[:60]!r}")
    if len(stages) % pp:
        raise ValueError(f"pp must divide the {len(stages)} stages of the pipeline layout, got {pp}")
    return Stages(pp, unit, stages)


def _depths(model: ModelConfig) -> int:
    return 0 if model.mtp is None else model.mtp.n_depths


def _expand(text: str) -> str:
    """Writes repetitions out: first those of parentheses, then those of one item, as Megatron-LM does."""
    text = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d{1,4})", r"([^|*])\*(\d{1,4})"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    if unknown := set(text) - set(EMBEDDING + LAYER + MTP + LOSS + PIPELINE_MARK):
        raise ValueError(
            f"pipeline layout must be of E, t, m, L, |, (...)*N and x*N, got {min(unknown)!r} in {text[:60]!r}"
        )
    return text


def balanced(model: ModelConfig, costs: Sequence[float], pp: int, vpp: int) -> Stages:
    """Splits the items into consecutive stages so that the most expensive stage is as cheap as possible.

    Args:
        costs: costs of embedding, units, multi-token prediction if there is one, and loss, in this order.

    Raises:
        ValueError: there are more stages than items.
    """
    n, unit = pp * vpp, unit_of(model)
    items, weights = [EMBEDDING, *LAYER * (model.n_layers // unit)], list(costs)
    if model.mtp is None:
        items += [LOSS]
    elif unit == 2:
        items += [MTP * model.mtp.n_depths, LOSS]
    else:  # in a pattern of a hybrid it can only come before the loss
        items += [MTP * model.mtp.n_depths + LOSS]
        weights[-2:] = [weights[-2] + weights[-1]]
    if n > len(items):
        raise ValueError(f"pp * vpp must be at most {len(items)}, embedding, layers and loss of the model, got {n}")
    low, high = max(*weights, sum(weights) / n), sum(weights)
    found = [len(items)] if n == 1 else _cuts(weights, n, high)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        cuts = _cuts(weights, n, middle)
        if len(cuts) == n:
            found, high = cuts, middle
        else:
            low = middle
    return Stages(pp, unit, tuple("".join(items[i:j]) for i, j in zip([0, *found], found, strict=False)))


def _cuts(weights: list[float], n: int, capacity: float) -> list[int]:
    """Ends of stages that are filled one after another; more than `n` if the capacity is too small.

    Each stage leaves at least one item for every later stage.
    """
    ends: list[int] = []
    filled = 0.0
    for i, weight in enumerate(weights):
        left = len(weights) - i
        if i and (filled + weight > capacity or left == n - len(ends) - 1):
            ends.append(i)
            filled = 0.0
        filled += weight
    return [*ends, len(weights)]


@lru_cache(maxsize=1024)
def in_flight(pp: int, vpp: int, n_microbatches: int) -> Float[np.ndarray, "pp times vpp"]:
    """Micro-batches in flight per stage of a rank, at every moment that may be its memory peak.

    Without interleaving at most pp - rank are in flight. With interleaving there are 2 (pp - rank - 1) + (vpp - 1) pp
    + 1 pairs of micro-batch and stage, and they change as forward and backward passes alternate.

    Source: Megatron-LM, megatron/core/pipeline_parallel/schedules.py.
    """
    if vpp == 1:
        return np.array([[[min(n_microbatches, pp - rank)]] for rank in range(pp)], dtype=float)
    total, period = n_microbatches * vpp, pp * vpp
    step = np.arange(total + 1)
    forward = np.stack([_passed(step, v, pp, vpp) for v in range(vpp)], axis=-1)
    backward = forward[:, ::-1]
    times = min(period, total) + 1
    counts = np.zeros((pp, times, vpp))
    for rank in range(pp):
        begun = min(total, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1)
        for ended in range(times):
            if begun + ended <= total:
                counts[rank, ended] = forward[begun + ended] - backward[ended]
    return counts


def _passed(step: np.ndarray, v: int, pp: int, vpp: int) -> np.ndarray:
    """Passes of stage `v` among the first steps: pp micro-batches of one stage after pp of another."""
    whole, rest = np.divmod(step, pp * vpp)
    passed: np.ndarray = whole * pp + np.clip(rest - v * pp, 0, pp)
    return passed


def fullest(
    counts: Float[np.ndarray, "pp times vpp"], sizes: Float[np.ndarray, "n pp vpp"]
) -> Float[np.ndarray, "n pp"]:
    """Peak size held by each rank, when one micro-batch of a stage holds `sizes`."""
    by_rank = np.matmul(np.moveaxis(sizes, -2, 0), counts.swapaxes(1, 2))  # pp n times
    most: np.ndarray = np.moveaxis(by_rank.max(axis=-1), 0, -1)
    return most
