"""The language of a pattern space: a finite automaton that counts, ranks and repairs patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

NO_LAYER = "."
"""Marks the positions after a pattern's last layer."""


class RuleState(NamedTuple):
    """State of the rules after some layers: the last letter, and the count of each counted group."""

    last: str
    counts: tuple[int, ...]


class Language:
    """All strings of `letters` that keep the rules of a `PatternSpace`, in dictionary order of its letters.

    Counts are exact at any size. A prefix comes before its continuations.
    """

    def __init__(
        self,
        letters: str,
        lengths: tuple[int, int],
        first: str,
        last: str,
        before: Mapping[str, str],
        at_least: Mapping[str, int],
        at_most: Mapping[str, int],
    ) -> None:
        self.letters, self.first, self.last, self.before = letters, first, last, before
        self.shortest, self.longest = lengths
        self.groups = tuple(sorted({*at_least, *at_most}))
        self.floors = tuple(at_least.get(group, 0) for group in self.groups)
        self.ceilings = tuple(at_most.get(group) for group in self.groups)
        self.start = RuleState("", (0,) * len(self.groups))
        self.ways = lru_cache(maxsize=None)(self._ways)

    @property
    def size(self) -> int:
        """Number of strings."""
        return self.ways(0, self.start)

    def step(self, state: RuleState, letter: str) -> RuleState | None:
        """The state after one more layer; None if a rule forbids the letter."""
        allowed = self.before.get(letter, self.letters) if state.last else self.first
        if (state.last or letter) not in allowed:
            return None
        counts = []
        for group, floor, ceiling, count in zip(self.groups, self.floors, self.ceilings, state.counts, strict=True):
            count += letter in group
            if ceiling is not None and count > ceiling:
                return None
            counts.append(min(count, floor) if ceiling is None else count)  # counts above the floor are equivalent
        return RuleState(letter, tuple(counts))

    def may_end(self, n: int, state: RuleState) -> bool:
        """Whether a pattern may end after `n` layers that led to `state`."""
        enough = all(count >= floor for count, floor in zip(state.counts, self.floors, strict=True))
        return self.shortest <= n <= self.longest and state.last in self.last and state.last != "" and enough

    def _ways(self, n: int, state: RuleState) -> int:
        return self.may_end(n, state) + sum(self.ways(n + 1, after) for _, after in self.steps(n, state))

    def steps(self, n: int, state: RuleState) -> Iterator[tuple[str, RuleState]]:
        """The letters that may follow after `n` layers, even if no pattern can be completed from them."""
        if n < self.longest:
            for letter in self.letters:
                if (after := self.step(state, letter)) is not None:
                    yield letter, after

    def accepts(self, pattern: str) -> bool:
        """Whether the pattern obeys all rules."""
        state: RuleState | None = self.start
        for letter in pattern:
            if letter not in self.letters or state is None or (state := self.step(state, letter)) is None:
                return False
        return state is not None and self.may_end(len(pattern), state)

    def patterns(self, n: int = 0, state: RuleState | None = None) -> Iterator[str]:
        """Iterates over all strings in order."""
        state = state or self.start
        if self.may_end(n, state):
            yield ""
        for letter, after in self.steps(n, state):
            if self.ways(n + 1, after):
                for rest in self.patterns(n + 1, after):
                    yield letter + rest

    def unrank(self, index: int) -> str:
        """The string at an index in the order, from 0."""
        pattern, state = "", self.start
        while True:
            if self.may_end(len(pattern), state):
                if index == 0:
                    return pattern
                index -= 1
            for letter, after in self.steps(len(pattern), state):
                ways = self.ways(len(pattern) + 1, after)
                if index < ways:
                    pattern, state = pattern + letter, after
                    break
                index -= ways
            else:
                raise AssertionError("index is not below size")

    def rank(self, pattern: str) -> int:
        """The index of an accepted string in the order."""
        index, state = 0, self.start
        for n, letter in enumerate(pattern):
            index += self.may_end(n, state)
            for other, after in self.steps(n, state):
                if other == letter:
                    state = after
                    break
                index += self.ways(n + 1, after)
        return index

    def at(self, units: Sequence[float]) -> str:
        """The string at a point of the unit cube, one coordinate per position; uniform points give uniform strings.

        Coordinate n picks letter n from its distribution given the letters before it.
        """
        pattern, state = "", self.start
        for n in range(self.longest):
            ways = self.ways(n, state)
            options = [(letter, after, self.ways(n + 1, after)) for letter, after in self.steps(n, state)]
            options = [option for option in options if option[2]]
            reached = 0
            for letter, after, weight in options:
                reached += weight
                if units[n] < reached / ways:
                    pattern, state = pattern + letter, after
                    break
            else:
                if self.may_end(n, state):
                    return pattern
                letter, state, _ = options[-1]  # the weights sum to 1 only up to rounding
                pattern += letter
        return pattern

    def nearest(self, asked: Sequence[str]) -> str:
        """The string that differs from the requested letters, including `NO_LAYER`, at the fewest positions.

        Ties go to the string that agrees longest from the start, then to the first in letter order.
        """
        if self.accepts(whole := "".join(asked).rstrip(NO_LAYER)):
            return whole

        @cache
        def best(n: int, state: RuleState) -> tuple[float, str, RuleState | None]:
            """Fewest changes from position n on, with the letter chosen at n and the state after it."""
            chosen: tuple[float, str, RuleState | None] = (float("inf"), NO_LAYER, None)
            options: list[tuple[str, RuleState | None]] = [*self.steps(n, state), (NO_LAYER, None)]
            if n < self.longest:
                options.sort(key=lambda option: option[0] != asked[n])
            for letter, after in options:
                if after is not None and self.ways(n + 1, after):
                    changes = (letter != asked[n]) + best(n + 1, after)[0]
                elif after is None and self.may_end(n, state):
                    changes = float(sum(other != NO_LAYER for other in asked[n:]))
                else:
                    continue
                if changes < chosen[0]:
                    chosen = (changes, letter, after)
            return chosen

        pattern, state = "", self.start
        while (found := best(len(pattern), state))[2] is not None:
            pattern, state = pattern + found[1], found[2]
        return pattern
