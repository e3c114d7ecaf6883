"""Search for the lattice point nearest to the targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from heapq import nsmallest
from itertools import chain, product
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ValidationError
from scipy.optimize import Bounds, LinearConstraint, milp

from explore import pattern as patterns
from explore.blocks import KINDS, STANDARD_LETTERS, BlockConfig
from explore.config import explain
from explore.foreign import echo
from explore.model import ModelConfig
from explore.solve.budgets import RANGES, Free, off
from explore.terminal import c_output_discarded

SMOOTH = RANGES.keys() - {"d_model"}
"""Fields in which every budget is smooth and non-decreasing; `d_model` is not, since the number of heads jumps."""

EXHAUSTIVE = 1_000
"""Lattices with up to this many points are searched exhaustively."""
MAX_JUMPS, MAX_GROUPS = 256, 32
"""Numbers of choices of dimensions that jump: those examined, and those to descend from."""
CLOSE = 1e-4
"""Worst error below which the search stops."""

Point = tuple[int, ...]


class Search:
    """Searches the lattice of the free dimensions for the point nearest to the targets."""

    def __init__(
        self, content: Mapping[str, Any], free: tuple[Free, ...], targets: Mapping[str, float], seq_len: int
    ) -> None:
        self.content, self.free, self.targets, self.seq_len = content, free, targets, seq_len
        blocks = content.get("blocks") or {}
        if not isinstance(content.get("pattern"), str) or not isinstance(blocks, Mapping):
            raise ValueError("model: a pattern is required, and blocks, if there are any, as a mapping of letters")
        for letter, block in blocks.items():
            if not isinstance(block, Mapping | BlockConfig):
                raise ValueError(f"blocks.{letter} must be a mapping of fields, got {echo(block)}")
        self.blocks = {letter: dict(block) for letter, block in blocks.items()}
        self.places = self._places()
        self.found: dict[Point, tuple[float, ...] | None] = {}

    def _places(self) -> list[list[tuple[str, str]]]:
        """The fields that each free dimension sets, as (letter, field); no letter for a field of the model."""
        mtp = self.content.get("mtp")
        mtp_pattern = mtp.get("pattern") if isinstance(mtp, Mapping) else getattr(mtp, "pattern", "")
        letters = patterns.canonical(self.content["pattern"].replace(patterns.MTP_MARK, "") + str(mtp_pattern or ""))
        fields = {"": _counts(ModelConfig)}
        for letter in dict.fromkeys(letters):
            kind = self.blocks.get(letter, {}).get("kind")
            config = KINDS.get(str(kind)) if kind else STANDARD_LETTERS.get(letter)
            fields[letter] = _counts(config) if config else []
        places: list[list[tuple[str, str]]] = []
        for each in self.free:
            letter, _, name = each.field.removeprefix("blocks.").rpartition(".")
            where = [letter] if letter or name in fields[""] else list(fields)
            here = [(place, name) for place in where if name in fields.get(place, ())]
            if not here:
                allowed = [path((place, known)) for place, names in fields.items() for known in names]
                raise ValueError(f"free must be among {', '.join(allowed)} for this pattern, got {echo(each.field)}")
            if taken := [place for place in here if place in chain(*places)]:
                raise ValueError(f"free: {path(taken[0])} is named twice")
            places.append(here)
        return places

    def changed(self, free: Sequence[Free] | None = None, targets: Mapping[str, float] | None = None) -> Search:
        """A search for the same model with other dimensions or targets."""
        return Search(self.content, tuple(free or self.free), targets or self.targets, self.seq_len)

    def model(self, point: Point) -> ModelConfig:
        """The model at a point.

        Raises:
            ValueError: the model is invalid.
        """
        content, blocks = dict(self.content), dict(self.blocks)
        for value, places in zip(point, self.places, strict=True):
            for letter, name in places:
                if letter:
                    blocks[letter] = {**blocks.get(letter, {}), name: value}
                else:
                    content[name] = value
        model = ModelConfig.model_validate({**content, "blocks": blocks})
        for letter, name in chain(*self.places):
            width = getattr(model.blocks[letter], name) if name == "d_latent" else 0
            if width > model.d_model:
                raise ValueError(f"d_latent: {width} is above d_model={model.d_model}")
        return model

    def refusal(self, point: Point) -> str:
        """Why the model at a point is invalid; empty if it is valid."""
        try:
            self.model(point)
        except ValidationError as error:
            return explain(error)
        except ValueError as error:
            return str(error)
        return ""

    def budgets(self, point: Point) -> tuple[float, ...] | None:
        """The point's value of each targeted budget; None if its model is invalid."""
        if point not in self.found:
            try:
                cost = self.model(point).cost(self.seq_len)
                self.found[point] = tuple(getattr(cost, name) for name in self.targets)
            except ValueError:
                self.found[point] = None
        return self.found[point]

    def score(self, point: Point) -> float:
        """Distance from the worst target, as the logarithm of a ratio."""
        values = self.budgets(point)
        return math.inf if values is None else max(map(off, values, self.targets.values()))

    def best(self) -> Point:
        """The point with the lowest score: exhaustive on a small lattice, by descent on a large one."""
        whole = math.prod(len(each.lattice) for each in self.free) <= EXHAUSTIVE
        best = self._lowest(1, product(*(each.lattice for each in self.free)))[0] if whole else self._descend()
        if reason := self.refusal(best):
            raise ValueError(f"free: no candidate is a valid model; for example: {reason}")
        return best

    def _lowest(self, n: int, points: Iterable[Point]) -> list[Point]:
        return nsmallest(n, points, key=lambda point: (self.score(point), point))

    def _descend(self) -> Point:
        """Descends from the best points of a coarse lattice, separately for each choice of the dimensions that jump."""
        jumps = [i for i, each in enumerate(self.free) if each.name not in SMOOTH]
        smooth = len(self.free) - len(jumps)
        n_jump = int(MAX_JUMPS ** (1 / max(1, len(jumps))))
        combos = math.prod(min(n_jump, len(self.free[i].lattice)) for i in jumps)
        n_smooth = max(3, int((EXHAUSTIVE / combos) ** (1 / max(1, smooth))))
        spread = [each.spread(n_jump if i in jumps else n_smooth) for i, each in enumerate(self.free)]
        groups: dict[Point, list[Point]] = {}
        for point in product(*spread):
            groups.setdefault(tuple(point[i] for i in jumps), []).append(point)
        ranked = sorted(
            (self._bound(points), self.score(starts[0]), starts, points)
            for points in groups.values()
            for starts in [self._lowest(2 if jumps else 16, points)]
        )
        best = min((starts[0] for _, _, starts, _ in ranked), key=self.score)
        for bound, _, starts, points in ranked[:MAX_GROUPS]:
            # Budgets grow with every smooth dimension, so no point of a group can beat the group's bound.
            hopeless = bound >= self.score(best) and all(map(self.budgets, points))
            for start in () if hopeless else starts:
                if self.score(best) > CLOSE and self.budgets(start) is not None:
                    best = min(best, self._polish(start), key=self.score)
        return best

    def _bound(self, points: list[Point]) -> float:
        """The lowest score possible for budgets between the minimum and maximum over these points."""
        found = [values for values in map(self.budgets, points) if values is not None]
        if not found:
            return math.inf
        spans = [(min(values), max(values)) for values in zip(*found, strict=True)]
        nearest = [min(max(t, low), high) for t, (low, high) in zip(self.targets.values(), spans, strict=True)]
        return max(map(off, nearest, self.targets.values()))

    def _polish(self, point: Point) -> Point:
        """Repeatedly solves the problem linearised around a point, in whole steps, while the score improves."""
        radius = 0.5
        while True:
            reach = [max(1, int(radius * value / each.step)) for each, value in zip(self.free, point, strict=True)]
            nearer = self._step(point, reach)
            if self.score(nearer) < self.score(point):
                point, radius = nearer, min(1, 2 * radius)
            elif max(reach) > 1:
                radius /= 3
            else:
                [nearer] = self._lowest(1, product(*map(neighbours, self.free, point)))
                if self.score(nearer) == self.score(point):
                    return point
                point = nearer

    def _step(self, point: Point, reach: Sequence[int]) -> Point:
        """The point within `reach` steps with the smallest worst relative error, if all budgets were linear."""
        n, here, targets = len(point), self.budgets(point), np.array([*self.targets.values()])
        assert here is not None
        slopes, below, above = np.zeros((len(targets), n)), np.zeros(n), np.zeros(n)
        for i, (each, value) in enumerate(zip(self.free, point, strict=True)):
            for by, bound in ((-1, below), (1, above)):
                other = value + by * each.step
                there = self.budgets((*point[:i], other, *point[i + 1 :])) if other in each.lattice else None
                if there is not None:
                    end = each.lattice[0 if by < 0 else -1]
                    bound[i] = by * min(reach[i], abs(end - value) // each.step)
                    slopes[:, i] = by * (np.array(there) - here) / targets
        error, ones = np.array(here) / targets - 1, np.ones((len(targets), 1))
        both = LinearConstraint(np.block([[slopes, -ones], [-slopes, -ones]]), -np.inf, np.append(-error, error))
        whole, bounds = np.array([1] * n + [0]), Bounds([*below, 0], [*above, np.inf])
        with c_output_discarded():
            found = milp(np.eye(n + 1)[n], integrality=whole, bounds=bounds, constraints=both)
        moves = [0] * n if found.x is None else np.round(found.x[:n]).astype(int).tolist()
        return tuple(value + by * each.step for each, value, by in zip(self.free, point, moves, strict=True))


def path(place: tuple[str, str]) -> str:
    """The full path of a letter and a field."""
    return "blocks." + ".".join(place) if place[0] else place[1]


def _counts(config: type[BaseModel]) -> list[str]:
    """Names of the integer fields."""
    kinds = {name: (info.annotation, *get_args(info.annotation)) for name, info in config.model_fields.items()}
    return [name for name, found in kinds.items() if int in {getattr(kind, "__origin__", kind) for kind in found}]


def neighbours(free: Free, value: int) -> list[int]:
    """A value and its allowed neighbours."""
    return [near for near in (value - free.step, value, value + free.step) if near in free.lattice]
