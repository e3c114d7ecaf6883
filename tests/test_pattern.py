"""Patterns: their letters, their marks, their distance and their families."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore.blocks import BLOCKS, MoEConfig
from explore.pattern import canonical, check_pattern, counts, distance, families, family, resolve, split_mtp

EXAMPLES = {kind.letter: kind.example for kind in BLOCKS}
README = Path(__file__).parents[1] / "README.md"
patterns = st.text("ME*", max_size=6)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("MX", "pattern: unknown letter 'X' at position 2 of 'MX'; known are " + " ".join(EXAMPLES)),
        ("M | eM", "pattern: unknown letter 'e' at position 5 of 'M | eM'"),
        ("", "pattern: '' has no layer"),
        (" | ", "pattern: ' \\| ' has no layer"),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_position_as_it_was_typed(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", "\\*")):
        check_pattern(pattern, EXAMPLES)


def test_each_slash_adds_an_equal_depth_of_multi_token_prediction() -> None:
    assert split_mtp("ME") == ("ME", [])
    assert split_mtp("M|E/*E/* E") == ("M|E", ["*E", "* E"])
    with pytest.raises(ValueError, match=r"pattern: all depths after '/' must be alike, got '\*E' and 'M'"):
        split_mtp("ME/*E/M")


@given(pieces=st.lists(patterns, min_size=1, max_size=4), mark=st.sampled_from(["|", " ", "\n", " | ", "\t"]))
def test_stage_marks_and_white_space_change_nothing(pieces: list[str], mark: str) -> None:
    layers = "".join(pieces)
    marked = mark.join(pieces)
    assert canonical(marked) == layers
    assert canonical(canonical(marked)) == layers
    assert counts(marked) == {letter: layers.count(letter) for letter in set(layers)}
    assert distance(marked, layers) == 0


def test_a_pattern_resolves_to_one_block_a_layer() -> None:
    assert resolve("M|E M", EXAMPLES) == (EXAMPLES["M"], EXAMPLES["E"], EXAMPLES["M"])


@given(a=patterns, b=patterns)
def test_distance_is_the_recursive_edit_distance(a: str, b: str) -> None:
    def recursive(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        change = recursive(a[1:], b[1:]) + (a[0] != b[0])
        return min(change, recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1)

    assert distance(a, b) == recursive(a, b) == distance(b, a)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*-*-", "attention + MLP"),
        ("M-M-", "Mamba + MLP"),
        ("MMMM", "Mamba + MLP"),
        ("M-*-", "Mamba hybrid"),
        ("--", "MLP"),
        ("ME*E", "hybrid LatentMoE"),
        ("MEME", "Mamba LatentMoE"),
        ("*E", "attention LatentMoE"),
        ("E", "LatentMoE"),
        ("MS*S", "hybrid MoE"),
        ("MS|MS", "Mamba MoE"),
        ("*S", "attention MoE"),
        ("S-", "MoE"),
        ("MSE", "Mamba LatentMoE"),
        ("G-G-", "Gated DeltaNet + MLP"),
        ("GS*S", "Gated DeltaNet hybrid MoE"),
        ("MG*-", "Mamba + Gated DeltaNet hybrid"),
    ],
)
def test_families_follow_the_kinds_of_layers_and_not_their_letters(pattern: str, name: str) -> None:
    standard = MoEConfig(n_experts=8, top_k=2, d_expert=24, d_shared=32)
    assert family(pattern, EXAMPLES | {"S": standard}) == name


@given(pattern=st.text("".join(EXAMPLES) + "S", min_size=1, max_size=6))
def test_every_family_is_listed(pattern: str) -> None:
    standard = MoEConfig(n_experts=8, top_k=2, d_expert=24, d_shared=32)
    assert family(pattern, EXAMPLES | {"S": standard}) in families()


def test_the_families_of_the_known_blocks_are_complete() -> None:
    assert set(families()) >= {
        "Mamba hybrid", "Mamba + MLP", "attention + MLP", "MLP", "hybrid MoE", "Mamba MoE", "attention MoE", "MoE",
        "hybrid LatentMoE", "Mamba LatentMoE", "attention LatentMoE", "LatentMoE",
    }  # fmt: skip
    assert len(set(families())) == len(families())


def test_the_readme_explains_every_letter() -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert [kind.letter for kind in BLOCKS if f"`{kind.letter}` " not in readme] == []
