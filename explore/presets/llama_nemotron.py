"""Llama-Nemotron: every block has its own feed-forward width, and many have no attention (from Puzzle)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from explore.model import ModelConfig
from explore.presets.base import Preset, Published

SOURCE = "Llama-Nemotron, arXiv 2505.00949; block by block from the released configurations"
BLOCKS_FILE = Path(__file__).with_name("llama_nemotron.json")
LETTERS = "-abcdefghijklmnopqrstuvwxyz"
"""Letters of the feed-forward widths, the most frequent width first."""


def heterogeneous(name: str) -> ModelConfig:
    """Builds a model from pairs of KV heads and feed-forward width; None marks a removed half."""
    released = json.loads(BLOCKS_FILE.read_text(encoding="utf-8"))[name]
    pairs = released["blocks"]
    (kv_heads,) = {kv for kv, _ in pairs if kv is not None}
    widths = [d_ff for _, d_ff in pairs if d_ff is not None]
    order = sorted(set(widths), key=lambda d_ff: (-widths.count(d_ff), d_ff))
    letter = dict(zip(order, LETTERS, strict=False))
    attention = {
        "n_heads": released["n_heads"],
        "n_kv_heads": kv_heads,
        "d_head": released["d_head"],
        "rope_theta": released["rope_theta"],
    }
    blocks: dict[str, Any] = {"*": attention}
    blocks |= {letter[d_ff]: {"kind": "mlp", "d_ff": d_ff, "activation": released["activation"]} for d_ff in order}
    return ModelConfig(
        d_model=released["d_model"],
        vocab_size=released["vocab_size"],
        pattern="".join(("" if kv is None else "*") + ("" if ff is None else letter[ff]) for kv, ff in pairs),
        blocks=blocks,
        tie_embeddings=released["tie_embeddings"],
    )


LLAMA_NEMOTRON: dict[str, Preset] = {
    "llama-nemotron-super-49b": Preset(
        partial(heterogeneous, "llama-nemotron-super-49b"), SOURCE, (Published("params_total", "49.87"),)
    ),
    "llama-nemotron-ultra-253b": Preset(
        partial(heterogeneous, "llama-nemotron-ultra-253b"), SOURCE, (Published("params_total", "253.40"),)
    ),
}
