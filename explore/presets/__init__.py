"""Published systems by name, with their sources and published counts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from explore.files import read_json
from explore.foreign import check_type, echo
from explore.model import ModelConfig
from explore.presets.base import Preset, Published
from explore.presets.comparators import COMPARATORS
from explore.presets.latentmoe import LATENTMOE
from explore.presets.llama_nemotron import LLAMA_NEMOTRON
from explore.presets.nemotron import NEMOTRON
from explore.presets.qwen3_next import QWEN3_NEXT
from explore.presets.released import from_released, is_released, language_part, with_new_names

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {**NEMOTRON, **LATENTMOE, **LLAMA_NEMOTRON, **COMPARATORS, **QWEN3_NEXT}
)


@cache
def _built(name: str) -> ModelConfig:
    return PRESETS[name].build()


def preset(name: str) -> ModelConfig:
    """Returns the model config of a published system, or of a released `config.json`.

    Raises:
        ValueError: no such system; the message suggests the nearest names.
    """
    check_type(name, str, "preset must be the name of a published system")
    if name in PRESETS:
        return _built(name)
    if name.endswith(".json") and is_released(content := read_json(Path(name))):
        return from_released(content)
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise ValueError(f"preset: {echo(name)} is unknown{hint} (explore cost --list shows all)")


def published_table() -> list[dict[str, Any]]:
    """Compares every published count with the computed one, in billions of parameters.

    Returns:
        Records of preset, quantity, published (as printed), computed, whether the computed number rounds to the
        printed digits (`agrees`), note and source.
    """
    records = []
    for name, entry in PRESETS.items():
        cost = preset(name).cost(4096)
        for number in entry.published:
            params = getattr(cost, number.quantity)
            records.append(
                {
                    "preset": name,
                    "quantity": number.quantity,
                    "published": number.printed,
                    "computed": params / 1e9,
                    "agrees": number.agrees(params),
                    "note": number.note,
                    "source": entry.source,
                }
            )
    return records


__all__ = [
    "PRESETS",
    "Preset",
    "Published",
    "from_released",
    "is_released",
    "language_part",
    "preset",
    "published_table",
    "with_new_names",
]
