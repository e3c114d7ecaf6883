"""Spaces: counts compared with enumeration, uniform draws, valid edits, and sizes that always fit."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FixedTrial
from pydantic import ValidationError
from scipy.stats import chisquare

from explore.blocks import STANDARD_LETTERS, Powers
from explore.model import ModelConfig
from explore.pattern import distance
from explore.search.sizes import suggest_sizes
from explore.search.spaces import PatternSpace

SMALL = PatternSpace(letters="M*-E", min_layers=3, max_layers=4, first="M*", last="-E")
RULED = PatternSpace(
    letters="M*-E",
    min_layers=2,
    max_layers=6,
    first="M*",
    last="-E",
    after={"*": "-E", "-": "M*", "E": "M*"},
    at_least={"*": 1, "-E": 2},
    at_most={"*": 2, "M*": 4},
)
SPACES = {
    "small": SMALL,
    "ruled": RULED,
    "all": PatternSpace(letters="ab", min_layers=1, max_layers=5),
    "counted": PatternSpace(letters="abc", min_layers=3, max_layers=5, at_least={"ab": 2, "b": 1}, at_most={"a": 2}),
    "one": PatternSpace(letters="M", min_layers=2, max_layers=2),
    "far": PatternSpace(letters="ab", min_layers=6, max_layers=6, after={"a": "a", "b": "b"}),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def keeps(space: PatternSpace, pattern: str) -> bool:
    """The rules, implemented literally."""

    def count(group: str) -> int:
        return sum(pattern.count(letter) for letter in group)

    return (
        space.min_layers <= len(pattern) <= space.max_layers
        and pattern[0] in (space.first or space.letters)
        and pattern[-1] in (space.last or space.letters)
        and all(a in space.after.get(b, space.letters) for a, b in itertools.pairwise(pattern))
        and all(count(group) >= bound for group, bound in space.at_least.items())
        and all(count(group) <= bound for group, bound in space.at_most.items())
    )


@cache
def by_brute_force(space: PatternSpace) -> frozenset[str]:
    strings = itertools.chain.from_iterable(
        itertools.product(space.letters, repeat=n) for n in range(1, space.max_layers + 1)
    )
    return frozenset(pattern for pattern in map("".join, strings) if keeps(space, pattern))


@each_space
def test_the_space_has_the_strings_that_satisfy_the_rules(space: PatternSpace) -> None:
    patterns = list(space.patterns())
    assert len(patterns) == len(set(patterns)) == space.size
    assert set(patterns) == by_brute_force(space)
    assert [space.pattern_at(index) for index in range(space.size)] == patterns


@each_space
def test_check_accepts_exactly_the_space(space: PatternSpace) -> None:
    inside = by_brute_force(space)
    for n in range(1, space.max_layers + 1):
        for pattern in map("".join, itertools.product(space.letters, repeat=n)):
            if pattern in inside:
                space.check(pattern)
            else:
                with pytest.raises(ValueError, match=r"layers|must be among"):
                    space.check(pattern)
    for pattern in sorted(inside)[:20]:
        with pytest.raises(ValueError, match="max_layers: "):
            space.check(pattern.ljust(space.max_layers + 1, space.letters[0]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("M", "min_layers: a pattern must have at least 2 layers, got 1 in 'M'"),
        ("M-M-M-M-", "max_layers: a pattern must have at most 6 layers, got 8 in 'M-M-M-M-'"),
        ("-*-", "first must be among M *, got '-' in '-*-'"),
        ("M-*", "last must be among - E, got '*' in 'M-*'"),
        ("M-E", "after: the layer before 'E' must be among M *, got '-' at position 3 of 'M-E'"),
        ("M-ME", "at_least: a pattern must have at least 1 layers of '*', got 0 in 'M-ME'"),
        ("*-*-*-", "at_most: a pattern must have at most 2 layers of '*', got 3 in '*-*-*-'"),
        ("M-X", "pattern: unknown letter 'X' at position 3 of 'M-X'; known are M * - E"),
    ],
)
def test_a_refusal_names_the_rule_in_one_line(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as refusal:
        RULED.check(pattern)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"letters": "MM"}, "letters: 'MM'"),
        ({"letters": "M."}, "letters: 'M.'"),
        ({"min_layers": 9}, "min_layers: 9 is above max_layers=4"),
        ({"first": "X"}, "first: 'X' is not among the letters"),
        ({"at_most": {"MX": 1}}, "at_most: 'X' is not among the letters"),
        ({"after": {"M-": "M"}}, "after: 'M-' is not a single letter"),
        ({"at_most": {"-E": 0}}, "no pattern keeps all the rules"),
    ],
)
def test_an_invalid_space_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PatternSpace(**{**SMALL.model_dump(), **fields})


def test_a_space_is_a_config() -> None:
    assert PatternSpace.model_validate_json(RULED.model_dump_json()) == RULED
    assert len({RULED, RULED.model_copy(), SMALL}) == 2


def test_large_spaces_are_counted_exactly() -> None:
    """Pairs of mixer and feed-forward layer: 4 kinds of pair, and exactly two of the 26 pairs have attention."""
    pairs = PatternSpace(
        letters="M*-E",
        min_layers=52,
        max_layers=52,
        first="M*",
        after={"M": "-E", "*": "-E", "-": "M*", "E": "M*"},
        at_least={"*": 2},
        at_most={"*": 2},
    )
    assert pairs.size == 2**26 * (26 * 25 // 2)
    drawn = pairs.draw(np.random.default_rng(0))
    pairs.check(drawn)


@each_space
def test_draws_are_uniform(space: PatternSpace) -> None:
    rng = np.random.default_rng(0)
    counts = Counter(space.draw(rng) for _ in range(20 * space.size))
    if space.size > 1:
        assert chisquare([counts[pattern] for pattern in space.patterns()]).pvalue > 1e-3
    assert counts.keys() <= set(space.patterns())


@each_space
def test_uniform_points_of_the_cube_give_uniform_patterns(space: PatternSpace) -> None:
    points = np.random.default_rng(1).random((20 * space.size, space.max_layers))
    counts = Counter(space.at(point.tolist()) for point in points)
    if space.size > 1:
        assert chisquare([counts[pattern] for pattern in space.patterns()]).pvalue > 1e-3


def one_edit_away(a: str, b: str) -> bool:
    swapped = len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 2 and sorted(a) == sorted(b)
    return distance(a, b) == 1 or swapped


@each_space
def test_a_mutation_is_a_different_pattern_of_the_space_at_distance_one_if_possible(space: PatternSpace) -> None:
    rng, inside = np.random.default_rng(2), by_brute_force(space)
    for pattern in sorted(inside)[:: max(1, len(inside) // 10)]:
        near = {other for other in inside if one_edit_away(pattern, other)}
        found = {space.mutate(pattern, rng) for _ in range(100)}
        if near:
            assert found <= near
            assert len(near) > 8 or found == near
        else:
            assert found == (inside - {pattern} or {pattern})


@each_space
def test_a_child_is_the_beginning_of_one_parent_and_the_end_of_the_other(space: PatternSpace) -> None:
    rng, patterns = np.random.default_rng(3), list(space.patterns())
    for _ in range(200):
        a, b = (patterns[i] for i in rng.integers(len(patterns), size=2))
        child = space.crossover(a, b, rng)
        joined = {a[:i] + b[j:] for i in range(len(a) + 1) for j in range(len(b) + 1)} & set(patterns)
        assert child in joined
        assert child not in (a, b) or joined <= {a, b}


@each_space
def test_repair_changes_the_fewest_letters(space: PatternSpace) -> None:
    rng, padded = np.random.default_rng(4), [p.ljust(space.max_layers, ".") for p in by_brute_force(space)]
    for _ in range(100):
        asked = [str(letter) for letter in rng.choice(list(space.choices), size=space.max_layers)]
        found = space.nearest(asked)
        changes = sum(x != y for x, y in zip(asked, found.ljust(space.max_layers, "."), strict=True))
        assert found in by_brute_force(space)
        assert changes == min(sum(x != y for x, y in zip(asked, other, strict=True)) for other in padded)


@each_space
def test_parameters_of_a_pattern_reproduce_it_in_any_trial(space: PatternSpace) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for pattern in itertools.islice(space.patterns(), 20):
        params = space.params(pattern)
        assert space.suggest(FixedTrial(params)) == pattern
        assert space.read(params) == pattern
        study.enqueue_trial(params)
        trial = study.ask()
        assert space.suggest(trial) == pattern
        assert trial.params == params


def test_a_pattern_has_one_representation() -> None:
    assert SMALL.params("M | *-") == {"pattern_00": "M", "pattern_01": "*", "pattern_02": "-", "pattern_03": "."}
    with pytest.raises(ValueError, match="first"):
        SMALL.params("-M-")
    assert SMALL.read({"pattern_00": "M"}) is None


def test_a_stock_sampler_gets_the_pattern_nearest_to_its_letters() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    different = 0
    for _ in range(50):
        trial = study.ask()
        pattern = RULED.suggest(trial)
        RULED.check(pattern)
        assert pattern == RULED.suggest(FixedTrial(trial.params)) == RULED.read(trial.params)
        different += "".join(trial.params.values()).rstrip(".") != pattern
    assert different > 25


def test_random_sizes_always_build_a_model_and_divide_as_required() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    families, letters = set(), "".join(STANDARD_LETTERS)
    for d_model in itertools.islice(itertools.cycle(range(64, 513, 32)), 300):
        trial = study.ask()
        blocks = {letter: suggest_sizes(trial, letter, d_model) for letter in letters}
        model = ModelConfig(d_model=d_model, vocab_size=512, pattern=letters, blocks=blocks)
        mamba, attention, moe = model.blocks["M"], model.blocks["*"], model.blocks["E"]
        assert mamba.n_heads * mamba.d_head == d_model << trial.params["mamba2_expand_log2"]
        assert attention.n_heads * attention.d_head == d_model
        assert (moe.d_latent is None) == (trial.params["moe_compression_log2"] == 0)
        assert moe.d_latent is None or d_model % moe.d_latent == 0
        assert all(STANDARD_LETTERS[letter].settled(block.model_dump()) == {} for letter, block in model.blocks.items())
        families.add(model.family)
    assert {family.split()[-1] for family in families} == {"MoE", "LatentMoE"}


@pytest.mark.parametrize("letter", STANDARD_LETTERS)
def test_sizes_have_the_same_distributions_at_every_width_and_are_named_as_declared(letter: str) -> None:
    def distributions(d_model: int) -> dict[str, Any]:
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        suggest_sizes(trial, letter, d_model, name="x")
        return trial.distributions

    assert distributions(64) == distributions(96) == distributions(512)
    assert [name.removesuffix("_log2") for name in distributions(64)] == [
        f"x_{size}" for size in STANDARD_LETTERS[letter].draws
    ]


def test_declared_draws_can_be_overridden() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        sizes = suggest_sizes(study.ask(), "E", 96, n_experts=Powers(16, 32), ratio=(0.5,), compression=Powers(2, 2))
        assert sizes["n_experts"] in (16, 32)
        assert (sizes["d_expert"], sizes["d_latent"]) == (48, 48)


@pytest.mark.parametrize(
    ("letter", "draws", "message"),
    [
        ("M", {"d_head": Powers(24, 64)}, "mamba2_d_head must be drawn from two powers of two .*, got 24 and 64"),
        (
            "M",
            {"n_head": Powers(8, 64)},
            r"draws must be among those of Mamba-2 \(expand, d_head, d_state, n_groups\), got 'n_head'",
        ),
        ("?", {}, r"letter must be one of M .*, got '\?'"),
    ],
)
def test_invalid_draws_are_refused(letter: str, draws: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_sizes(FixedTrial({"mamba2_expand_log2": 1}), letter, 64, **draws)
