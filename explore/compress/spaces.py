"""Search spaces of children in closed form: layer counts and widths under a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from explore.compress.cutting import fields
from explore.compress.measures import Setting, measure
from explore.model import ModelConfig


@dataclass(frozen=True, eq=False)
class Grid:
    """The children of one parent by layer counts and widths.

    Costs are additive over layers, so only one layer of each letter and width is measured, never a whole child.

    Attributes:
        layers: allowed layer counts by letter.
        depths: allowed total counts; empty allows any.
        widths: allowed values by size, named as in `explore cut`: `d_model`, `d_ff` or `M.n_heads`.
    """

    parent: ModelConfig
    layers: Mapping[str, Sequence[int]]
    depths: tuple[int, ...]
    widths: Mapping[str, Sequence[int]]
    setting: Setting

    @cached_property
    def counts(self) -> pd.DataFrame:
        """The allowed layer counts, one column per letter."""
        rows = (row for row in product(*self.layers.values()) if not self.depths or sum(row) in self.depths)
        return pd.DataFrame(rows, columns=list(self.layers))

    def table(self) -> pd.DataFrame:
        """Lists every child: layer counts by letter, widths, and `memory_bytes`, ordered by width."""
        parts = []
        for widths in self._widths():
            total = np.full(len(self.counts), self._outside(widths))
            for letter in self.layers:
                total += self._layer(letter, widths)[1] * self.counts[letter].to_numpy()
            parts.append(
                self.counts.assign(**{name.rpartition(".")[2]: n for name, n in widths.items()}, memory_bytes=total)
            )
        return pd.concat(parts, ignore_index=True)

    def model(self, row: Mapping[Any, Any]) -> ModelConfig:
        """Returns the config of a child from a row of the table; layers are grouped by letter."""
        widths = {name: int(row[name.rpartition(".")[2]]) for name in self.widths}
        return self._model("".join(letter * int(row[letter]) for letter in self.layers), widths)

    def row_of(self, model: ModelConfig) -> dict[str, int]:
        """Returns the layer counts and widths of a model, by column of the table."""
        row = {
            letter: sum(block.kind == self.parent.blocks[letter].kind for block in model.layers)
            for letter in self.layers
        }
        for name in self.widths:
            letter, _, field = name.rpartition(".")
            blocks = [b for b in model.layers if letter in ("", self._letter_of(b.kind)) and field in fields(b.axes())]
            row[field] = model.d_model if name == "d_model" else int(getattr(blocks[0], field))
        return row

    def find(self, table: pd.DataFrame, model: ModelConfig) -> pd.DataFrame:
        """Marks the rows of the table that describe this model."""
        return table[np.logical_and.reduce([table[name] == n for name, n in self.row_of(model).items()])]

    def measured(self, name: str, row: Mapping[Any, Any]) -> float:
        """Returns one of `MEASURES` of a child."""
        return measure(name, self.model(row), self.setting)

    def _letter_of(self, kind: str) -> str:
        return next(letter for letter in self.layers if self.parent.blocks[letter].kind == kind)

    def _widths(self) -> Iterator[dict[str, int]]:
        for values in product(*self.widths.values()):
            yield dict(zip(self.widths, values, strict=True))

    @cached_property
    def _known(self) -> dict[tuple[str, tuple[int, ...]], tuple[float, float]]:
        return {}

    def _outside(self, widths: Mapping[str, int]) -> float:
        """Memory outside the layers."""
        letter = next(iter(self.layers))
        return self._layer(letter, widths)[0]

    def _layer(self, letter: str, widths: Mapping[str, int]) -> tuple[float, float]:
        """Returns the memory outside the layers, and that of one layer of a letter."""
        own = {name: n for name, n in widths.items() if self._is_of(name, letter)}
        key = (letter, tuple(own.values()))
        if key not in self._known:
            one, two = (measure("memory_bytes", self._model(n * letter, own), self.setting) for n in (1, 2))
            self._known[key] = (2 * one - two, two - one)
        return self._known[key]

    def _is_of(self, name: str, letter: str) -> bool:
        where, _, field = name.rpartition(".")
        return name == "d_model" or (where in ("", letter) and field in fields(self.parent.blocks[letter].axes()))

    def _model(self, pattern: str, widths: Mapping[str, int]) -> ModelConfig:
        blocks = {}
        for letter in dict.fromkeys(pattern):
            block = self.parent.blocks[letter]
            own = {
                name.rpartition(".")[2]: n
                for name, n in widths.items()
                if name != "d_model" and self._is_of(name, letter)
            }
            blocks[letter] = type(block).model_validate({**block.model_dump(), **own})
        content = {name: getattr(self.parent, name) for name in ModelConfig.model_fields}
        width = widths.get("d_model", self.parent.d_model)
        return ModelConfig.model_validate(
            {**content, "d_model": width, "pattern": pattern, "blocks": blocks, "mtp": None}
        )
