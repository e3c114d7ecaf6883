"""Errors for features that a target system cannot express; nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from explore.blocks import BlockConfig
from explore.model import ModelConfig

B = TypeVar("B", bound=BlockConfig)


def refuse(field: str, value: Any, target: str, allowed: str) -> ValueError:
    """Returns the error for a value that the target cannot represent."""
    return ValueError(f"{field}: {value!r} cannot be written for {target}; only {allowed} can")


def require(path: str, config: Any, allowed: Mapping[str, tuple[Any, ...]], target: str) -> None:
    """Rejects the first field of `config` whose value the target cannot represent.

    Raises:
        ValueError: there is such a field.
    """
    for field, values in allowed.items():
        if (value := getattr(config, field)) not in values:
            raise refuse(f"{path}.{field}", value, target, " or ".join(map(repr, values)))


def one_config_a_kind(
    model: ModelConfig, kinds: Mapping[type[BlockConfig], str], target: str
) -> dict[str, BlockConfig]:
    """Returns the block config of every standard letter that a model uses.

    Args:
        kinds: kinds that the target supports, with its letters.

    Raises:
        ValueError: the target lacks a kind, or two letters of one kind have different sizes.
    """
    found: dict[str, tuple[str, BlockConfig]] = {}
    for letter, block in model.blocks.items():
        standard = kinds.get(type(block))
        if standard is None:
            known = ", ".join(repr(kind.model_fields["kind"].default) for kind in kinds)
            raise refuse(f"blocks.{letter}.kind", block.kind, target, known)
        first, known_block = found.setdefault(standard, (letter, block))
        for field in type(block).model_fields:
            value, other = getattr(block, field), getattr(known_block, field)
            if value != other:
                raise ValueError(
                    f"blocks.{letter}.{field}: {value!r} differs from {other!r} of {first!r}; "
                    f"{target} has one set of sizes for all {block.kind} layers"
                )
    return {standard: block for standard, (_, block) in found.items()}


def standard_pattern(pattern: str, model: ModelConfig, kinds: Mapping[type[BlockConfig], str]) -> str:
    """Translates a pattern to the target's letters."""
    return "".join(kinds[type(model.blocks[letter])] for letter in pattern)


def of_kind(blocks: Mapping[str, BlockConfig], letter: str, kind: type[B]) -> B | None:
    """Returns the config of a standard letter, or None if the model has no such layers."""
    block = blocks.get(letter)
    assert block is None or isinstance(block, kind)
    return block
