"""Depth pruning: repeatedly removes the least important layer and scores the remaining ones.

Source: Nemotron Nano 2, arXiv 2508.14444, section 4, where layers are removed by the change of the logits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from explore.compress.observing import EFFECTS, Observer
from explore.compress.parent import open_parent
from explore.data.cache import sealed
from explore.data.progress import progress
from explore.files import read_json, write_json
from explore.model import LanguageModel
from explore.runs import RunFolder
from explore.weights import weights_digest

TOKENS = 16_384
"""Default number of training tokens per round."""


class Order(NamedTuple):
    """Layers in order of removal.

    Attributes:
        layers: their indices in the parent.
        effects: effect of removing each, given that the earlier ones are gone.
        flops: FLOPs of all rounds.
    """

    layers: tuple[int, ...]
    effects: tuple[float, ...]
    flops: float


def one_by_one(
    run: RunFolder | str | Path,
    n: int,
    *,
    effect: str = "mse",
    tokens: int = TOKENS,
    seed: int = 0,
    batch_size: int = 8,
    data: str | Path | None = None,
) -> Order:
    """Returns the `n` layers to remove; each is the least important once the earlier ones are gone.

    Rounds are stored in the parent's folder, so a later call continues from them, also for more layers.

    Args:
        effect: measure of a layer's importance, one of `EFFECTS`.
        tokens: training tokens to read, in whole batches, at least one batch.
        seed: seed of the reading order.
        batch_size: sequences per forward pass.
        data: run or experiment whose data an imported checkpoint is scored on.

    Raises:
        ValueError: an unknown effect, removal of all layers, or a number below 1.
    """
    if effect not in EFFECTS:
        raise ValueError(f"effect must be one of {', '.join(EFFECTS)}, got {effect!r}")
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    parent = open_parent(run, data)
    model, seq_len = parent.model, parent.experiment.data.seq_len
    if not 0 <= n < (n_layers := model.config.n_layers):
        raise ValueError(f"drop: must be from 0 to {n_layers - 1} of {n_layers} layers, got {n}")
    n_batches = max(1, tokens // (batch_size * seq_len))
    about: dict[str, Any] = {
        "parent": weights_digest(model.state_dict()),
        "effect": effect,
        "seed": seed,
        "batch_size": batch_size,
        "tokens": n_batches * batch_size * seq_len,
        "data": parent.experiment.data.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = parent.path / f"depth-{key[:8]}.json"
    rounds = _kept_rounds(path, key, n_layers)
    source = parent.experiment.data.open(seed)
    with progress("leaving out layers", n) as report:
        while len(rounds) < n:
            gone = [each["layer"] for each in rounds]
            left = [i for i in range(n_layers) if i not in gone]
            observer = Observer(_shorter(model, left))
            for step in range(n_batches):
                observer.observe_layers(source.batch(step, batch_size))
            values = observer.effect(effect)
            least = min(range(len(left)), key=lambda k: (values[k], k))
            flops = about["tokens"] * _flops_of_round(model, left, seq_len)
            rounds.append({"layer": left[least], "effect": values[least], "flops": flops})
            write_json(path, sealed({"key": key, "about": about, "rounds": rounds}, hashlib.sha256()))
            report(len(rounds))
    used = rounds[:n]
    layers, effects = (tuple(each[name] for each in used) for name in ("layer", "effect"))
    return Order(layers, effects, float(sum(each["flops"] for each in used)))


def _kept_rounds(path: Path, key: str, n_layers: int) -> list[dict[str, Any]]:
    """The stored rounds; none if the file is missing, damaged or of another key. Older versions stored no digest."""
    try:
        content = read_json(path)
        is_whole = "sha256" not in content or sealed(content, hashlib.sha256()) == content
        if content["key"] != key or not is_whole:
            return []
        rounds = [
            {"layer": int(each["layer"]), "effect": float(each["effect"]), "flops": float(each["flops"])}
            for each in content["rounds"]
        ]
    except (ValueError, LookupError, TypeError, ArithmeticError):
        return []
    layers = [each["layer"] for each in rounds]
    return rounds if len(set(layers)) == len(layers) and set(layers) < set(range(n_layers)) else []


def _shorter(model: LanguageModel, layers: list[int]) -> LanguageModel:
    """Returns a view of a model that runs only some layers and shares its weights."""
    pattern = "".join(model.config.pattern[i] for i in layers)
    view = LanguageModel.__new__(LanguageModel)
    view.__dict__ = {**model.__dict__, "_modules": {**model._modules}}
    view.config = model.config.model_copy(update={"pattern": pattern})
    view.layers = nn.ModuleList(model.layers[i] for i in layers)
    return view


def _flops_of_round(model: LanguageModel, layers: list[int], seq_len: int) -> float:
    """FLOPs per token: one forward pass, plus one from each layer on."""
    blocks = [model.config.layers[i] for i in layers]
    each = [
        sum(entry.flops_seq for entry in block.entries(model.config.d_model, seq_len)) / seq_len for block in blocks
    ]
    head = 2 * model.config.d_model * model.config.vocab_size
    return sum(each) + head + sum(sum(each[i + 1 :]) + head for i in range(len(each)))
