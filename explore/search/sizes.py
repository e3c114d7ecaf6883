"""Suggests block sizes that are valid at any width, so no draw is wasted.

Parameters are exponents of two and ratios, so their distributions are the same in every trial, whatever `d_model` is.
A size that must divide another becomes the largest power of two, up to the suggested one, that divides it; so at width
96, for example, two suggestions can give the same sizes.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial

from explore.blocks import STANDARD_LETTERS, Draw, Powers


def suggest_sizes(
    trial: BaseTrial, letter: str, d_model: int, *, name: str | None = None, **draws: Draw
) -> dict[str, int]:
    """Sizes of a block, drawn from the ranges that its kind declares; other sizes keep their defaults.

    Args:
        letter: standard letter of the block.
        name: prefix of the parameters' names; default: the kind of block.
        draws: ranges that replace declared ones, by their names in `draws` of the block's config.

    Returns:
        Fields of the block's config.

    Raises:
        ValueError: the letter is unknown, or its kind does not draw one of `draws`.
    """
    if letter not in STANDARD_LETTERS:
        raise ValueError(f"letter must be one of {' '.join(STANDARD_LETTERS)}, got {letter!r}")
    config = STANDARD_LETTERS[letter]
    if unknown := [each for each in draws if each not in config.draws]:
        known = ", ".join(config.draws) or "nothing"
        raise ValueError(f"draws must be among those of {config.label} ({known}), got {unknown[0]!r}")
    prefix = name or config.model_fields["kind"].default
    drawn = {each: _draw(trial, f"{prefix}_{each}", draw) for each, draw in {**config.draws, **draws}.items()}
    return config.sized(d_model, **drawn) if drawn else {}


def _draw(trial: BaseTrial, name: str, draw: Draw) -> Any:
    """Draws a value. A power of two is parametrised by its exponent, so neighbours are close for a sampler."""
    if not isinstance(draw, Powers):
        return trial.suggest_categorical(name, draw)
    low, high = draw
    if not (0 < low <= high and low & (low - 1) == 0 and high & (high - 1) == 0):
        raise ValueError(f"{name} must be drawn from two powers of two in rising order, got {low} and {high}")
    exponent: int = trial.suggest_int(f"{name}_log2", low.bit_length() - 1, high.bit_length() - 1)
    return 1 << exponent
