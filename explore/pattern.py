"""Patterns: a model's layers as a string of letters, such as `MEM*E`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import product

from explore.blocks import BLOCKS, BlockConfig, Role
from explore.foreign import echo

PIPELINE_MARK = "|"
MTP_MARK = "/"


def canonical(pattern: str) -> str:
    """Removes white space and pipeline-stage marks, which do not affect the maths."""
    return "".join(pattern.replace(PIPELINE_MARK, "").split())


def split_mtp(pattern: str) -> tuple[str, list[str]]:
    """Splits a pattern into the model's layers and the layers of each multi-token prediction depth.

    Raises:
        ValueError: the depths are not all alike.
    """
    main, *depths = pattern.split(MTP_MARK)
    for depth in depths:
        if canonical(depth) != canonical(depths[0]):
            unlike = f"{echo(depths[0])} and {echo(depth)}"
            raise ValueError(f"pattern: all depths after {MTP_MARK!r} must be alike, got {unlike}")
    return main, depths


def check_pattern(pattern: str, letters: Collection[str]) -> None:
    """Checks that a pattern consists of known letters.

    Raises:
        ValueError: an unknown letter, with its position counted from 1, or no layer at all.
    """
    for position, letter in enumerate(pattern, start=1):
        if letter == PIPELINE_MARK or letter.isspace():
            continue
        if letter not in letters:
            known = " ".join(letters)
            raise ValueError(
                f"pattern: unknown letter {letter!r} at position {position} of {echo(pattern)}; known are {known}"
            )
    if not canonical(pattern):
        raise ValueError(f"pattern: {echo(pattern)} has no layer")


def resolve(pattern: str, blocks: Mapping[str, BlockConfig]) -> tuple[BlockConfig, ...]:
    """Returns the block config of every layer."""
    check_pattern(pattern, blocks.keys())
    return tuple(blocks[letter] for letter in canonical(pattern))


def counts(pattern: str) -> Counter[str]:
    """Counts the layers of each letter."""
    return Counter(canonical(pattern))


def distance(a: str, b: str) -> int:
    """Edit distance between two patterns: the number of layers to insert, remove or replace."""
    a, b = canonical(a), canonical(b)
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def family(pattern: str, blocks: Mapping[str, BlockConfig]) -> str:
    """Returns the model's family name for tables and figures, from the names and roles of its layers."""
    layers = resolve(pattern, blocks)
    present = {layer.family_name for layer in layers}
    recurrent = " + ".join(name for name in _names("recurrent") if name in present)
    experts = [name for name in _names("experts") if name in present]
    return _family(recurrent, any(layer.role == "attention" for layer in layers), experts[-1] if experts else "")


def families() -> tuple[str, ...]:
    """All names that `family` can return; recurrent mixers later in `BLOCKS` append theirs at the end."""
    recurrent = [""]
    for name in _names("recurrent"):
        recurrent += [f"{others} + {name}" if others else name for others in recurrent]
    experts = ["", *_names("experts")]
    return tuple(dict.fromkeys(_family(*parts) for parts in product(recurrent, (True, False), experts)))


def _names(role: Role) -> list[str]:
    """Returns the distinct family names of layers with a role."""
    return list(dict.fromkeys(name for kind in BLOCKS if kind.config.role == role for name in kind.config.family_names))


def _family(recurrent: str, attention: bool, experts: str) -> str:
    if not (recurrent and attention):
        mixer = recurrent or ("attention" if attention else "")
        return f"{mixer} {experts}".strip() if experts else f"{mixer} + MLP".removeprefix(" + ")
    # With experts, the first recurrent mixer is left unnamed: "hybrid MoE".
    hybrid = "hybrid" if experts and recurrent == _names("recurrent")[0] else f"{recurrent} hybrid"
    return f"{hybrid} {experts}".strip()
