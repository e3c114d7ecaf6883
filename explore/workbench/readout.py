"""The numbers that a workbench shows for a state: a pure function of JSON that needs no browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.cost import Cost, bytes_of, decode_bytes, params_touched, state_bytes
from explore.figures.base import Color
from explore.figures.cost import MTP, group_colors, group_of
from explore.formatting.html import paint
from explore.model import ModelConfig
from explore.model.display import letter_kinds, letter_paints
from explore.roofline import Deployment, hardware
from explore.roofline.regimes import components
from explore.workbench.state import Controls

BOUNDS: Mapping[str, str] = {
    "weights": "reading weights",
    "kv": "reading keys and values",
    "state": "reading and writing state",
    "flops": "matrix products",
}
"""Possible limits of a decoding step."""

_BOUND_COLORS: Mapping[str, Color] = {
    "weights": (0.71, 0.71, 0.71),
    "kv": (0.53, 0.77, 1.00),
    "state": (0.85, 0.72, 0.50),
    "flops": (0.94, 0.41, 0.47),
}


def evaluate(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a state of the workbench.

    Args:
        state: the fields of `Controls`; `model` holds the fields of the model.

    Returns:
        The totals of `Cost` by name, and
        `flops_by_group`: forward FLOPs per token of each group of components, in the order of the bar;
        `cache_bytes`: bytes of keys, values and state of the whole batch;
        `decode_s`, `tokens_per_s`: minimum time of a decoding step of the batch, and tokens per second of the batch;
        `decode_by_bound`: seconds of that step by their limit in `BOUNDS`;
        `memory_bytes`, `fits`: memory of the device, and whether weights and cache fit into it.

    Raises:
        ValueError: the state is not valid; the message is one line.
    """
    read = Controls.read(state)
    return readout(read, read.build())


def readout(state: Controls, model: ModelConfig) -> dict[str, Any]:
    """Returns the numbers of `evaluate` for a state and its model."""
    ledger = model.ledger(state.seq_len)
    cost = Cost.of(ledger)
    deployed = Deployment(model, hardware(state.hardware))
    step_s = deployed.decode_s(state.seq_len, state.batch_size)
    cache = state.batch_size * deployed.state_bytes(state.seq_len)
    sums = dict.fromkeys(group_colors(), 0)
    for n, part in [*ledger.counted(), *((1, part) for part in ledger.mtp)]:
        for entry in part.entries:
            sums[group_of(model, part.letter, entry.component)] += n * entry.flops_seq
    return {
        **cost.to_dict(),
        "flops_by_group": {group: flops / state.seq_len for group, flops in sums.items() if flops},
        "cache_bytes": cache,
        "decode_s": step_s,
        "tokens_per_s": state.batch_size / step_s,
        "decode_by_bound": decode_by_bound(deployed, state.seq_len, state.batch_size),
        "memory_bytes": deployed.memory_bytes,
        "fits": deployed.weight_bytes + cache <= deployed.memory_bytes,
    }


def decode_by_bound(deployed: Deployment, context: int, batch_size: int) -> dict[str, float]:
    """Seconds of a decoding step on one device by their limit; they sum to `Deployment.decode_s`.

    The time of a component limited by memory is divided among its weights, its keys and values, and its state in
    proportion to their bytes.
    """
    seconds = dict.fromkeys(BOUNDS, 0.0)
    for n, entry in components(deployed.model.ledger(context)):
        flops_s = batch_size * entry.flops_step / deployed.flops_per_s
        moved = decode_bytes(entry, deployed.dtypes, batch_size)
        if flops_s >= moved / deployed.bandwidth:
            seconds["flops"] += n * flops_s
            continue
        weights = bytes_of(params_touched(entry, batch_size), deployed.dtypes.weight)
        kv = batch_size * state_bytes(entry, entry.kv_numel_seq, deployed.dtypes.kv)
        for name, part in (("weights", weights), ("kv", kv), ("state", moved - weights - kv)):
            seconds[name] += n * part / deployed.bandwidth
    return {name: value for name, value in seconds.items() if value > 0}


def letters(model: ModelConfig) -> list[dict[str, str]]:
    """The letters that a pattern may contain, each with its name and its colour in the figures."""
    paints = letter_paints(model.blocks)
    names = {letter: kind.label for letter, kind in letter_kinds(model.blocks).items()}
    return [{"letter": letter, "name": names.get(letter, MTP), **style._asdict()} for letter, style in paints.items()]


def groups() -> dict[str, dict[str, str]]:
    """The colours of the groups of components and of the limits of a decoding step."""
    return styles({**group_colors(), **_BOUND_COLORS})


def styles(colors: Mapping[str, Color]) -> dict[str, dict[str, str]]:
    """Colours for a style sheet, each with a readable text colour."""
    return {name: paint(color)._asdict() for name, color in colors.items()}


def code(fields: Mapping[str, Any]) -> str:
    """Returns Python code that builds the model with these fields."""
    lines = ["ModelConfig("]
    for name, value in fields.items():
        if name == "blocks":
            blocks = [f"        {letter!r}: {sizes!r}," for letter, sizes in value.items()]
            lines += ["    blocks={", *blocks, "    },"] if blocks else []
        else:
            lines.append(f"    {name}={value!r},")
    return "\n".join([*lines, ")"])
