"""Scores of a trained parent: the contribution of each axis index and each layer on a text."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from explore.archive import read_partial
from explore.blocks import Axis, BlockConfig
from explore.compress.observing import CHANNELS, EFFECTS, EXPERTS, Observer
from explore.compress.parent import finished, open_parent
from explore.compress.surgery import Indices
from explore.data.progress import progress
from explore.files import replacing
from explore.foreign import echo
from explore.model import ModelConfig
from explore.runs import DIGEST, UNREADABLE_TABLE, RunFolder
from explore.weights import weights_digest

__all__ = ["Scores", "finished", "flops_of_scoring", "score", "weak_halves"]

TOKENS = 131_072
"""Default number of training tokens to read."""

MANY_BATCHES, SPARSE = 16, 4
"""From this many batches on, only one in `SPARSE` measures the effect of removing layers, the slowest part."""

SAVE_EVERY_S = 10.0
"""Seconds between saves of the sums; a kill loses at most this much work."""

VERSION = 1
"""Part of every key; increase it when the same text may give different scores."""

COLUMNS = ("what", "layer", "axis", "index", "inner", "score")
TEXTS = ("what", "axis")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one parent on one text.

    Attributes:
        table: columns what (activation, frequency, moment, principal, or a layer effect), layer (-1 for the whole
            model), axis, index, inner (index on a second axis, -1 without one) and score.
        about: key, digest of the parent's weights, and seed and length of the text.
    """

    table: pd.DataFrame
    about: Mapping[str, Any]

    @property
    def key(self) -> str:
        return str(self.about["key"])

    @cached_property
    def _rows(self) -> dict[tuple[str, int, str], pd.DataFrame]:
        grouped: Any = self.table.groupby(["what", "layer", "axis"], sort=False)
        return {(str(what), int(layer), str(axis)): rows for (what, layer, axis), rows in grouped}

    def values(self, what: str, layer: int, axis: str, inner: Indices | None = None) -> list[float] | None:
        """Returns scores by index; None if there are none.

        Args:
            inner: indices of the second axis to include.
        """
        if (rows := self._rows.get((what, layer, axis))) is None:
            return None
        if (rows["inner"] >= 0).any():
            if inner is not None:
                rows = rows[rows["inner"].isin(inner)]
            squares = (rows["score"] ** 2).groupby(rows["index"]).sum()
            return [float(value) for value in squares.sort_index() ** 0.5]
        return [float(value) for value in rows.sort_values("index")["score"]]

    def of(self, what: str, layer: int, block: BlockConfig, axis: Axis, inner: Indices | None = None) -> list[float]:
        """Returns the scores of an axis; without its own, each index sums the scores inside it."""
        found = self.values(what, layer, axis.name, inner)
        found = self.values("activation", layer, axis.name, inner) if found is None else found
        if found is not None:
            return found
        within = next(each for each in block.axes() if each.within == axis.name)
        parts = torch.tensor(self.of(what, layer, block, within), dtype=torch.float64)
        return [float(value) for value in parts.view(axis.size, -1).sum(1)]

    def matrix(self, layer: int, axis: str) -> Tensor | None:
        """Returns the principal axes as columns, largest variance first."""
        if (rows := self._rows.get(("principal", layer, axis))) is None:
            return None
        size = int(rows["index"].max()) + 1
        return torch.tensor(rows.sort_values(["index", "inner"])["score"].to_numpy()).view(size, size)

    def layers(self, effect: str) -> list[float]:
        """Returns the effect of removing each layer, by index."""
        rows = self.table[(self.table["what"] == effect) & (self.table["axis"] == "layer")]
        return [float(value) for value in rows.sort_values("layer")["score"]]

    def save(self, path: str | Path) -> None:
        """Writes the table as parquet, with `about` and a digest of both in its metadata."""
        table = self.table.copy()
        table.attrs.update({**self.about, DIGEST: _digest(self.table, self.about)})
        with replacing(path) as temporary:
            table.to_parquet(temporary, index=False)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads a file that `save` wrote; files of older versions have no digest.

        Raises:
            ValueError: the file cannot be read, is not a table of scores, or is damaged.
        """
        try:
            table = pd.read_parquet(path)
            about = {str(name): value for name, value in table.attrs.items() if name != DIGEST}
            is_scores = tuple(table.columns) == COLUMNS and "key" in about
            is_whole = not is_scores or table.attrs.get(DIGEST) in (None, _digest(table, about))
        except UNREADABLE_TABLE as error:
            raise ValueError(f"{path}: is not a table of scores ({echo(' '.join(str(error).split()))})") from None
        if not is_scores:
            raise ValueError(f"{path}: is not a table of scores; its columns must be {', '.join(COLUMNS)}")
        if not is_whole:
            raise ValueError(f"{path}: is damaged, since {DIGEST} does not match its scores; delete it and score again")
        return cls(table, about)


def score(
    run: RunFolder | str | Path,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    batch_size: int = 8,
    data: str | Path | None = None,
) -> tuple[Scores, Path]:
    """Scores a finished run or imported checkpoint on part of its training split; existing scores are reused.

    After a kill, the same call resumes from the last save and gives the same numbers.

    Args:
        tokens: tokens to read, in whole batches and at most one pass over the split.
        seed: seed of the reading order.
        batch_size: sequences per forward pass.
        data: run or experiment whose data an imported checkpoint is scored on.

    Returns:
        The scores and the path of their file in the parent's folder.

    Raises:
        ValueError: the run is not finished, or a number is below 1.
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = open_parent(run, data)
    experiment, model = folder.experiment, folder.model
    source = experiment.data.open(seed)
    most = source.n_train_tokens or tokens
    batch_tokens = batch_size * experiment.data.seq_len
    n_batches = max(1, min(tokens, most) // batch_tokens)
    every = SPARSE if n_batches >= MANY_BATCHES else 1
    about: dict[str, Any] = {
        "parent": weights_digest(model.state_dict()),
        "split": "train",
        "seed": seed,
        "batch_size": batch_size,
        "seq_len": experiment.data.seq_len,
        "tokens": n_batches * batch_tokens,
        "layer_tokens": -(-n_batches // every) * batch_tokens,
        "version": VERSION,
    }
    content = json.dumps({**about, "data": experiment.data.fingerprint()}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    path = folder.path / f"scores-{key[:8]}.parquet"
    if path.exists() and (found := Scores.load(path)).key == key:
        return found, path
    observer, partial = Observer(model), path.with_suffix(".partial")
    with progress(f"scoring {folder.path.name}", n_batches) as report:
        begin = _resume(observer, partial, key)
        saved = time.monotonic()
        for step in range(begin, n_batches):
            observer.observe(source.batch(step, batch_size), effects=step % every == 0)
            report(step + 1)
            if time.monotonic() - saved > SAVE_EVERY_S and step + 1 < n_batches:
                with replacing(partial) as temporary:
                    torch.save({"key": key, "step": step + 1, "sums": observer.sums}, temporary)
                saved = time.monotonic()
    about |= {"key": key, "flops": flops_of_scoring(model.config, experiment.data.seq_len, about)}
    scores = Scores(pd.DataFrame(list(_table(observer)), columns=list(COLUMNS)), about)
    scores.save(path)
    partial.unlink(missing_ok=True)
    return scores, path


def weak_halves(scores: Scores, model: ModelConfig) -> dict[tuple[int, str], float]:
    """Fraction of the total score in the weaker half of the indices, by layer and axis; layer -1 is the whole model."""
    found = {(-1, "d_model"): _weak_half(scores.values("activation", -1, "d_model") or [])}
    for i, block in enumerate(model.layers):
        for axis in block.axes():
            if axis.size > 1 and not axis.prefix:
                found[i, axis.name] = _weak_half(scores.of("activation", i, block, axis))
    return found


def _weak_half(values: Sequence[float]) -> float:
    weaker, total = sorted(values)[: len(values) // 2], sum(values)
    return sum(weaker) / total if total else 0.0


def flops_of_scoring(model: ModelConfig, seq_len: int, about: Mapping[str, Any]) -> float:
    """FLOPs of one forward pass over all tokens, plus one from each layer on over the tokens that score layers."""
    layers = [
        sum(entry.flops_seq for entry in block.entries(model.d_model, seq_len)) / seq_len for block in model.layers
    ]
    head = 2 * model.d_model * model.vocab_size
    without = sum(sum(layers[i + 1 :]) + head for i in range(len(layers)))
    return float(about["tokens"] * (sum(layers) + head) + about["layer_tokens"] * without)


def _digest(table: pd.DataFrame, about: Mapping[str, Any]) -> str:
    """SHA-256 of scores and what they are about, which is kept in the metadata of their file."""
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in COLUMNS:
        column = table[name]
        digest.update("\n".join(column).encode() if name in TEXTS else column.to_numpy("float64").tobytes())
    return digest.hexdigest()


def _resume(observer: Observer, partial: Path, key: str) -> int:
    """Loads the sums of an earlier process; returns the next batch."""
    if not (state := read_partial(partial, key)):
        return 0
    observer.sums = dict(state["sums"])
    return int(state["step"])


def _table(observer: Observer) -> Iterator[tuple[str, int, str, int, int, float]]:
    model, sums = observer.model, observer.sums
    stream = sum(sums[name].sqrt() for name in sums if name.startswith("stream/"))
    assert isinstance(stream, Tensor)
    yield from _rows("activation", -1, "d_model", stream)
    for effect in EFFECTS:
        for i, without in enumerate(observer.effect(effect)):
            yield effect, i, "layer", 0, -1, without
    for name, value in sums.items():
        if name.startswith("moment/"):
            yield from _rows("moment", -1, name.removeprefix("moment/"), value / sums["n/tokens"])
    for i, block in enumerate(model.config.layers):
        for axis in block.axes():
            yield from _axis(sums, i, axis)
        if (load := sums.get(f"load/{i}")) is not None:
            yield from _rows("activation", i, EXPERTS, sums[f"reap/{i}"] / load.clamp(min=1))
            yield from _rows("frequency", i, EXPERTS, load / load.sum())
            yield from _rows("activation", i, CHANNELS, sums[f"activation/{i}/{CHANNELS}/0"].sqrt())


def _axis(sums: Mapping[str, Tensor], layer: int, axis: Axis) -> Iterator[tuple[str, int, str, int, int, float]]:
    parts = [sums[name].sqrt() for name in sums if name.startswith(f"activation/{layer}/{axis.name}/")]
    if axis.probe is None or not parts:
        return
    if (covariance := sums.get(f"covariance/{layer}/{axis.name}")) is not None:
        principal = torch.linalg.eigh(covariance).eigenvectors.flip(1)
        for i, row in enumerate(principal.tolist()):
            for k, value in enumerate(row):
                yield "principal", layer, axis.name, i, k, value
    whole = parts[0]
    for part in parts[1:]:
        whole = whole * part
    if axis.probe.squares:
        pairs = whole.view(axis.size, -1) if axis.inner else whole.view(-1, axis.size)
        if axis.inner:
            for i, row in enumerate(pairs.tolist()):
                for k, value in enumerate(row):
                    yield "activation", layer, axis.name, i, k, value
            return
        whole = pairs.square().sum(0).sqrt()
    yield from _rows("activation", layer, axis.name, whole)


def _rows(what: str, layer: int, axis: str, values: Tensor) -> Iterator[tuple[str, int, str, int, int, float]]:
    for i, value in enumerate(values.tolist()):
        yield what, layer, axis, i, -1, value
