"""Ranks the parts of a parent: by scores, by weight magnitude, at random, or in reverse as a control."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from explore.blocks import Axis
from explore.compress.observing import owners
from explore.compress.scores import Scores
from explore.compress.surgery import Indices
from explore.model import ModelConfig
from explore.model.layout import Place, model_layout

METHODS = ("activation", "frequency", "magnitude", "random", "reverse")
"""activation: contribution of each index on a text (REAP for experts); frequency: the same, but experts by load;
magnitude: weight norms; random; reverse: least active first."""

SCORED = ("activation", "frequency", "reverse")
"""Methods that need scores on a text."""


class Ranking(ABC):
    """Ranking of all parts of a parent; the highest scores are kept."""

    @abstractmethod
    def stream(self) -> Sequence[float]:
        """Scores of the residual stream's channels."""

    @abstractmethod
    def axis(self, layer: int, axis: Axis, keep: Mapping[str, Indices]) -> Sequence[float]:
        """Scores of the indices of one layer's axis.

        Args:
            keep: indices kept on axes chosen earlier.
        """

    @abstractmethod
    def layers(self) -> Sequence[float]:
        """Scores of whole layers."""


class ByScores(Ranking):
    """Ranks by scores on a text, or in reverse."""

    def __init__(self, model: ModelConfig, scores: Scores, by: str, effect: str) -> None:
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
    """Ranks at random, from a seed."""

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
    """Ranks by weight norms of an index: their product within a block, the sum of squares elsewhere."""

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
    """Sums a weight's squares by index of an axis; None if the weight lacks the axis."""
    sizes, square = {each.name: each.size for each in axes}, weight.double().square()
    for k, dim in enumerate(place.dims):
        if not any(axis.name in stretch for stretch in dim):
            continue
        outer = [j for j, other in enumerate(place.dims) if other == ((axis.within,),)]
        if outer:  # each index of another dimension has its own indices
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
    """Returns the ranking of a method.

    Args:
        scores: scores, required by `activation`, `frequency` and `reverse`.
        effect: effect that ranks layers when there are scores.
        seed: seed of the random ranking.
    """
    if by == "random":
        return AtRandom(model, seed)
    if by == "magnitude":
        return ByMagnitude(model, weights)
    assert scores is not None
    return ByScores(model, scores, by, effect)
