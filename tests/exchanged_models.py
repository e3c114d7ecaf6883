"""Small models for tests that exchange checkpoints with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explore.model import LanguageModel, ModelConfig

SIZES: dict[str, dict[str, Any]] = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 8, "dt_min": 0.01},
    "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8},
    "-": {"d_ff": 24},
    "E": {"n_experts": 6, "top_k": 2, "d_expert": 12, "d_latent": 16, "n_shared": 2, "d_shared": 12},
}


def config(pattern: str = "ME*-", blocks: dict[str, dict[str, Any]] | None = None, **fields: Any) -> ModelConfig:
    sizes = {letter: {**size, **(blocks or {}).get(letter, {})} for letter, size in SIZES.items()}
    content = {"d_model": 32, "vocab_size": 300, "pattern": pattern, "blocks": {**(blocks or {}), **sizes}}
    return ModelConfig.model_validate({**content, **fields})


def drawn(model: ModelConfig) -> LanguageModel:
    """A model in which no weight is a special value."""
    torch.manual_seed(0)
    built = model.build().eval()
    with torch.no_grad():
        for weight in (*built.parameters(), *built.buffers()):
            weight += 0.1 * torch.randn_like(weight)
    return built


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def edit(folder: Path, **fields: Any) -> None:
    """Changes fields of config.json; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: v for name, v in content.items() if v is not None}))
