"""Patterns: a model's layers as a string of letters, such as `MEM*E`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from explore.blocks import BlockConfig, MoEConfig

PIPELINE_MARK = "|"
MTP_MARK = "/"


def canonical(pattern: str) -> str:
    """The pattern without white space and without pipeline-stage marks, which change nothing in the maths."""
    return "".join(pattern.replace(PIPELINE_MARK, "").split())


def split_mtp(pattern: str) -> tuple[str, list[str]]:
    """Divides a pattern into the model's layers and the layers of each depth of multi-token prediction.

    Raises:
        ValueError: the depths are not all alike.
    """
    main, *depths = pattern.split(MTP_MARK)
    if len({canonical(depth) for depth in depths}) > 1:
        raise ValueError(f"pattern: all depths after {MTP_MARK!r} must be alike, got {' and '.join(map(repr, depths))}")
    return main, depths


def check_pattern(pattern: str, letters: Collection[str]) -> None:
    """Refuses a pattern that is not made of known letters.

    Raises:
        ValueError: an unknown letter, with its position counted from 1, or no layer at all.
    """
    for position, letter in enumerate(pattern, start=1):
        if letter == PIPELINE_MARK or letter.isspace():
            continue
        if letter not in letters:
            known = " ".join(letters)
            raise ValueError(
                f"pattern: unknown letter {letter!r} at position {position} of {pattern!r}; known are {known}"
            )
    if not canonical(pattern):
        raise ValueError(f"pattern: {pattern!r} has no layer")


def resolve(pattern: str, blocks: Mapping[str, BlockConfig]) -> tuple[BlockConfig, ...]:
    """The block config of every layer."""
    check_pattern(pattern, blocks.keys())
    return tuple(blocks[letter] for letter in canonical(pattern))


def counts(pattern: str) -> Counter[str]:
    """Layers of each letter."""
    return Counter(canonical(pattern))


def distance(a: str, b: str) -> int:
    """Edit distance: layers inserted, removed or replaced to turn one pattern into the other."""
    a, b = canonical(a), canonical(b)
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def family(pattern: str, blocks: Mapping[str, BlockConfig]) -> str:
    """Name of the family that a model belongs to in tables and figures, by the kinds of its layers."""
    layers = resolve(pattern, blocks)
    roles = {block.role for block in layers}
    mamba, attention = "ssm" in roles, "attention" in roles
    experts = [block for block in layers if isinstance(block, MoEConfig)]
    if not experts:
        names = {(True, True): "Mamba hybrid", (True, False): "Mamba + MLP", (False, True): "attention + MLP"}
        return names.get((mamba, attention), "MLP")
    mixer = {(True, True): "hybrid ", (True, False): "Mamba ", (False, True): "attention "}.get((mamba, attention), "")
    latent = any(block.d_latent is not None for block in experts)
    return mixer + ("LatentMoE" if latent else "MoE")
