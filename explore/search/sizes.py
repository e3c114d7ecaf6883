"""Suggestions for the sizes of blocks that fit any width: what must divide is made to, so no draw is wasted.

All parameters have the same distribution in every trial, whatever `d_model` is: exponents of two and ratios. Where a
size must divide another, it is the largest power of two up to the suggested one that does; so at a width such as 96
two suggestions can come to the same sizes.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial

from explore.blocks import STANDARD_LETTERS, Draw, Powers


def suggest_sizes(
    trial: BaseTrial, letter: str, d_model: int, *, name: str | None = None, **draws: Draw
) -> dict[str, int]:
    """Sizes of a block, drawn from what its kind declares; the others keep their defaults.

    Args:
        letter: standard letter of the block.
        name: what the names of the parameters begin with; the kind of block when absent.
        draws: what is drawn instead of what is declared, by its name in `draws` of the block's config.

    Returns:
        Fields of the block's config.

    Raises:
        ValueError: no such letter, or something that this kind does not draw.
    """
    if letter not in STANDARD_LETTERS:
        raise ValueError(f"letter must be one of {' '.join(STANDARD_LETTERS)}, got {letter!r}")
    config = STANDARD_LETTERS[letter]
    if unknown := [each for each in draws if each not in config.draws]:
        known = ", ".join(config.draws) or "nothing"
        raise ValueError(f"{unknown[0]} must be one of what {config.label} draws: {known}")
    prefix = name or config.model_fields["kind"].default
    drawn = {each: _draw(trial, f"{prefix}_{each}", draw) for each, draw in {**config.draws, **draws}.items()}
    return config.sized(d_model, **drawn) if drawn else {}


def _draw(trial: BaseTrial, name: str, draw: Draw) -> Any:
    """A value. The parameter of a power of two is its exponent, so a sampler sees neighbours near each other."""
    if not isinstance(draw, Powers):
        return trial.suggest_categorical(name, draw)
    low, high = draw
    if not (0 < low <= high and low & (low - 1) == 0 and high & (high - 1) == 0):
        raise ValueError(f"{name} must be drawn from two powers of two in rising order, got {low} and {high}")
    exponent: int = trial.suggest_int(f"{name}_log2", low.bit_length() - 1, high.bit_length() - 1)
    return 1 << exponent
