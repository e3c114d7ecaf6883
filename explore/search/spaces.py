"""Pattern spaces: the patterns that a search may try; every draw is valid by construction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import optuna
from optuna.trial import BaseTrial
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from explore.config import Config, Frozen, FrozenMapping
from explore.pattern import MTP_MARK, PIPELINE_MARK, canonical, check_pattern
from explore.search.language import NO_LAYER, Language

__all__ = ["NO_LAYER", "PatternSampler", "PatternSpace"]

NO_RULES: FrozenMapping[str, Any] = FrozenMapping({})


@runtime_checkable
class PatternSampler(Protocol):
    """A sampler that draws whole patterns rather than letter by letter."""

    def plan(self, trial: optuna.Trial, space: PatternSpace, name: str) -> None:
        """Draws the trial's pattern `name`; the trial's next suggestions return its letters."""


class PatternSpace(Config):
    """All patterns that obey a set of rules.

    In Optuna a pattern is one categorical per layer position, `pattern_00`, `pattern_01` and so on, with the letters
    and `.` (no layer) as choices. A trial's pattern is the one in the space nearest to its letters, so each trial has a
    feasible pattern, and equal parameters give equal patterns. The samplers of `explore.search.samplers` store only
    letters of feasible patterns, for which the nearest pattern is the pattern itself. A stock Optuna sampler, which
    draws letter by letter, may store others; then `read` gives the pattern.

    Attributes:
        first: letters allowed first; default: any.
        last: letters allowed last; default: any.
        after: for a letter, the letters allowed directly before it; any if the letter is not a key.
        at_least: for a group of letters such as `M*`, the minimum number of its layers.
        at_most: for a group of letters, the maximum number of its layers.
    """

    letters: str
    min_layers: PositiveInt
    max_layers: Annotated[int, Field(ge=1, le=256)]
    first: str | None = None
    last: str | None = None
    after: Frozen[str, str] = NO_RULES
    at_least: Frozen[str, NonNegativeInt] = NO_RULES
    at_most: Frozen[str, NonNegativeInt] = NO_RULES

    @model_validator(mode="after")
    def _check(self) -> PatternSpace:
        marks = NO_LAYER + PIPELINE_MARK + MTP_MARK
        wrong = [letter for letter in self.letters if letter.isspace() or letter in marks]
        if not self.letters or wrong or len(set(self.letters)) < len(self.letters):
            raise ValueError(
                f"letters: {self.letters!r} must be different letters, none of them white space or {marks}"
            )
        if self.min_layers > self.max_layers:
            raise ValueError(f"min_layers: {self.min_layers} is above max_layers={self.max_layers}")
        named = {"first": self.first or "", "last": self.last or ""}
        named["after"] = "".join((*self.after.keys(), *self.after.values()))
        named |= {"at_least": "".join(self.at_least), "at_most": "".join(self.at_most)}
        for field, letters in named.items():
            if unknown := sorted(set(letters) - set(self.letters)):
                raise ValueError(f"{field}: {unknown[0]!r} is not among the letters {self.letters!r}")
        if multiple := [key for key in self.after if len(key) != 1]:
            raise ValueError(f"after: {multiple[0]!r} is not a single letter")
        if not self.size:
            raise ValueError("letters: no pattern keeps all the rules")
        return self

    @property
    def size(self) -> int:
        """Number of patterns."""
        return _language(self).size

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices at a position."""
        return (*self.letters, NO_LAYER)

    def check(self, pattern: str) -> None:
        """Checks that a pattern is in this space.

        Raises:
            ValueError: it is not; the message names the broken rule.
        """
        check_pattern(pattern, self.letters)
        pattern = canonical(pattern)
        n = len(pattern)
        if n < self.min_layers:
            raise ValueError(
                f"min_layers: a pattern must have at least {self.min_layers} layers, got {n} in {pattern!r}"
            )
        if n > self.max_layers:
            raise ValueError(
                f"max_layers: a pattern must have at most {self.max_layers} layers, got {n} in {pattern!r}"
            )
        for rule, allowed, letter in (("first", self.first, pattern[0]), ("last", self.last, pattern[-1])):
            if allowed is not None and letter not in allowed:
                raise ValueError(f"{rule} must be among {_names(allowed)}, got {letter!r} in {pattern!r}")
        for i, (before, letter) in enumerate(pairwise(pattern), start=2):
            if before not in (allowed := self.after.get(letter, self.letters)):
                raise ValueError(
                    f"after: the layer before {letter!r} must be among {_names(allowed)}, "
                    f"got {before!r} at position {i} of {pattern!r}"
                )
        for rule, bounds, sign in (("at_least", self.at_least, 1), ("at_most", self.at_most, -1)):
            for group, bound in bounds.items():
                count = sum(letter in group for letter in pattern)
                if sign * count < sign * bound:
                    words = rule.replace("_", " ")
                    raise ValueError(
                        f"{rule}: a pattern must have {words} {bound} layers of {group!r}, got {count} in {pattern!r}"
                    )

    def patterns(self) -> Iterator[str]:
        """Iterates over all patterns, in dictionary order of `letters`."""
        return _language(self).patterns()

    def pattern_at(self, index: int) -> str:
        """The pattern at an index in the order of `patterns`, from 0."""
        if not 0 <= index < self.size:
            raise ValueError(f"index: {index} is not below the size {self.size} of the space")
        return _language(self).unrank(index)

    def at(self, units: Sequence[float]) -> str:
        """The pattern at a point of the unit cube, one coordinate per position; uniform in, uniform out."""
        return _language(self).at(units)

    def draw(self, rng: np.random.Generator) -> str:
        """A uniformly random pattern of the space."""
        return _language(self).unrank(_below(self.size, rng))

    def nearest(self, letters: Sequence[str]) -> str:
        """The pattern that differs from the letters at the fewest positions, `.` filling up to `max_layers`."""
        asked = [*letters, *NO_LAYER * (self.max_layers - len(letters))]
        return _language(self).nearest(asked)

    def mutate(self, pattern: str, rng: np.random.Generator) -> str:
        """A pattern one edit away: a layer inserted, deleted or replaced, or two swapped.

        The kind of edit is drawn first, among those with a feasible result. If there is none, the result is any other
        pattern of the space, or the same one if there is no other.
        """
        pattern, language = canonical(pattern), _language(self)
        for kind in rng.permutation(len(_EDITS)):
            children = sorted(child for child in set(_EDITS[kind](pattern, self.letters)) if language.accepts(child))
            if children:
                return children[rng.integers(len(children))]
        if self.size == 1:
            return pattern
        index = _below(self.size - 1, rng)
        return language.unrank(index + (index >= language.rank(pattern)))

    def crossover(self, a: str, b: str, rng: np.random.Generator) -> str:
        """The beginning of `a` and the end of `b`, each cut once; `a` or `b` itself if no cut gives a new pattern."""
        a, b = canonical(a), canonical(b)
        language = _language(self)
        for cut in rng.permutation((len(a) + 1) * (len(b) + 1)):
            i, j = divmod(int(cut), len(b) + 1)
            child = a[:i] + b[j:]
            if child not in (a, b) and language.accepts(child):
                return child
        return (a, b)[rng.integers(2)]

    def suggest(self, trial: BaseTrial, name: str = "pattern") -> str:
        """Suggests a pattern for a trial, as a whole if the study's sampler is one of explore's."""
        names = self.names(name)
        if isinstance(trial, optuna.Trial) and names[0] not in trial.params:
            sampler = trial.study.sampler
            if isinstance(sampler, PatternSampler):
                sampler.plan(trial, self, name)
        return self.nearest([trial.suggest_categorical(position, self.choices) for position in names])

    def params(self, pattern: str, name: str = "pattern") -> dict[str, str]:
        """Parameters to enqueue so that a trial gets this pattern.

        Raises:
            ValueError: the pattern is not in this space.
        """
        self.check(pattern)
        return dict(zip(self.names(name), canonical(pattern).ljust(self.max_layers, NO_LAYER), strict=True))

    def read(self, params: Mapping[str, Any], name: str = "pattern") -> str | None:
        """The pattern of a trial with these parameters; None if they do not contain one."""
        letters = [params[position] for position in self.names(name) if position in params]
        whole = len(letters) == self.max_layers and set(letters) <= set(self.choices)
        return self.nearest(letters) if whole else None

    def names(self, name: str = "pattern") -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(f"{name}_{i:02d}" for i in range(self.max_layers))


@lru_cache(maxsize=64)
def _language(space: PatternSpace) -> Language:
    first = space.letters if space.first is None else space.first
    last = space.letters if space.last is None else space.last
    lengths = (space.min_layers, space.max_layers)
    return Language(space.letters, lengths, first, last, space.after, space.at_least, space.at_most)


def _below(n: int, rng: np.random.Generator) -> int:
    """A uniform integer below `n`, however large."""
    bits = (n - 1).bit_length()
    while True:
        value = int.from_bytes(rng.bytes((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < n:
            return value


def _names(letters: str) -> str:
    return " ".join(letters) or "none"


def _insertions(p: str, letters: str) -> list[str]:
    return [p[:i] + letter + p[i:] for i in range(len(p) + 1) for letter in letters]


def _deletions(p: str, letters: str) -> list[str]:
    return [p[:i] + p[i + 1 :] for i in range(len(p))]


def _replacements(p: str, letters: str) -> list[str]:
    return [p[:i] + letter + p[i + 1 :] for i in range(len(p)) for letter in letters if letter != p[i]]


def _swaps(p: str, letters: str) -> list[str]:
    pairs = [(i, j) for i in range(len(p)) for j in range(i + 1, len(p)) if p[i] != p[j]]
    return [p[:i] + p[j] + p[i + 1 : j] + p[i] + p[j + 1 :] for i, j in pairs]


_EDITS = (_insertions, _deletions, _replacements, _swaps)
