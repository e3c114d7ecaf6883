"""Rankings of the parts of a parent: by scores, by the size of weights, at random, or the worst first as a control."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from explore.blocks import Axis
from explore.compress.observing import EFFECTS, owners
from explore.compress.scores import Scores
from explore.compress.surgery import Indices
from explore.model import ModelConfig
from explore.model.layout import Place, model_layout

METHODS = ("activation", "frequency", "magnitude", "random", "reverse")
"""activation: what each index contributes on a text, for experts REAP; frequency: as that, but experts by their load;
magnitude: norms of weights; random; reverse: the least active first."""

SCORED = ("activation", "frequency", "reverse")
"""Methods that need a text."""


class Ranking(ABC):
    """Scores of all parts of a parent; the highest are kept."""

    @abstractmethod
    def stream(self) -> Sequence[float]:
        """Of the channels of the residual stream."""

    @abstractmethod
    def axis(self, layer: int, axis: Axis, keep: Mapping[str, Indices]) -> Sequence[float]:
        """Of the indices of an axis of one layer.

        Args:
            keep: what is kept of axes that were chosen before.
        """

    @abstractmethod
    def layers(self) -> Sequence[float]:
        """Of whole layers."""


class ByScores(Ranking):
    """By what a text shows, or the other way round."""

    def __init__(self, model: ModelConfig, scores: Scores, by: str, effect: str) -> None:
        if effect not in EFFECTS:
            raise ValueError(f"effect must be one of {', '.join(EFFECTS)}, got {effect!r}")
        self.model, self.scores, self.effect = model, scores, effect
        self.what, self.sign = ("frequency" if by == "frequency" else "activation"), (-1.0 if by == "reverse" else 1.0)

    def stream(self) -> Sequence[float]:
        return self._signed(self.scores.values("activation", -1, "d_model") or [])

    def axis(self, layer: int, axis: Axis, keep: Mapping[str, Indices]) -> Sequence[float]:
        return self._signed(self.scores.of(self.what, layer, self.model.layers[layer], axis, keep.get(axis.inner)))

    def layers(self) -> Sequence[float]:
        return self._signed(self.scores.layers(self.effect))

    def _signed(self, values: Sequence[float]) -> Sequence[float]:
        return [self.sign * value for value in values]


class AtRandom(Ranking):
    """At random, from a seed."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed = model, seed

    def stream(self) -> Sequence[float]:
        return self._draw("d_model", self.model.d_model)

    def axis(self, layer: int, axis: Axis, keep: Mapping[str, Indices]) -> Sequence[float]:
        return self._draw(f"{layer}.{axis.name}", axis.size)

    def layers(self) -> Sequence[float]:
        return self._draw("layers", self.model.n_layers)

    def _draw(self, what: str, n: int) -> Sequence[float]:
        rng = random.Random(f"{self.seed}/{what}")
        return [rng.random() for _ in range(n)]


class ByMagnitude(Ranking):
    """By the norms of the weights that an index has: their product within a block, their sum of squares elsewhere."""

    def __init__(self, model: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights, self.layout = model, weights, model_layout(model)

    def stream(self) -> Sequence[float]:
        total = torch.zeros(self.model.d_model, dtype=torch.float64)
        axis = Axis("d_model", self.model.d_model)
        for name, weight in self.weights.items():
            if (found := squares(weight, self.layout[name], (axis,), axis)) is not None:
                total += found
        return total.sqrt().tolist()

    def axis(self, layer: int, axis: Axis, keep: Mapping[str, Indices]) -> Sequence[float]:
        block, powers = self.model.layers[layer], dict(axis.powers)
        score = torch.ones(axis.size, dtype=torch.float64)
        for name, weight in self.weights.items():
            local = name.removeprefix(f"layers.{layer}.mixer.")
            if local != name and weight.ndim > 1 and (not powers or local in powers):
                found = squares(weight, self.layout[name], block.axes(), axis)
                score *= 1 if found is None else found.sqrt() ** powers.get(local, 1)
        return score.tolist()

    def layers(self) -> Sequence[float]:
        total = [0.0] * self.model.n_layers
        for name, weight in self.weights.items():
            if (layer := self.layout[name].layer) is not None:
                total[layer] += float(weight.double().square().sum())
        return total


def squares(weight: Tensor, place: Place, axes: Sequence[Axis], axis: Axis) -> Tensor | None:
    """Sums of the squares of a weight by the index of an axis that they belong to; None where it does not have it."""
    sizes, square = {each.name: each.size for each in axes}, weight.double().square()
    for k, dim in enumerate(place.dims):
        if not any(axis.name in stretch for stretch in dim):
            continue
        outer = [j for j, other in enumerate(place.dims) if other == ((axis.within,),)]
        if outer:  # every index of another dimension has indices of its own
            return square.movedim((outer[0], k), (0, 1)).flatten(2).sum(-1).flatten()
        lines = square.sum([j for j in range(square.ndim) if j != k]) if square.ndim > 1 else square
        total = torch.zeros(axis.size, dtype=torch.float64)
        for s, stretch in enumerate(dim):
            if axis.name in stretch:
                columns, owner = owners(dim, s, axis.name, sizes)
                total.index_add_(0, owner, lines[columns])
        return total
    return None


def ranking(
    by: str, model: ModelConfig, weights: Mapping[str, Tensor], scores: Scores | None, *, effect: str, seed: int
) -> Ranking:
    """The ranking of a method.

    Args:
        scores: required by the methods that need a text.
        effect: what layers are ranked by where there are scores.
        seed: of the random ranking.
    """
    if by == "random":
        return AtRandom(model, seed)
    if by == "magnitude":
        return ByMagnitude(model, weights)
    assert scores is not None
    return ByScores(model, scores, by, effect)
