"""Learning-rate schedule: warm-up, stable, decay."""

from __future__ import annotations

import math

from explore.experiment import TrainConfig


def wsd(step: int, n_steps: int, config: TrainConfig) -> float:
    """Returns the factor on the peak learning rate at a step, counted from 0.

    It rises linearly over the first fraction `warmup` of the steps, stays at 1, and falls over the last fraction
    `decay`; the last step has exactly `final_lr_ratio`.

    Source: warm-up-stable-decay, arXiv 2404.06395; minus-sqrt, arXiv 2405.18392.
    """
    warmup_steps, decay_steps = config.warmup_steps(n_steps), round(config.decay * n_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    into_decay = min(step, n_steps - 1) - (n_steps - decay_steps) + 1
    if into_decay <= 0:
        return 1.0
    progress = into_decay / decay_steps
    fall = math.sqrt(progress) if config.decay_shape == "minus_sqrt" else progress
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 - fall)


def stable_steps(n_steps: int, config: TrainConfig) -> range:
    """The numbers of completed steps at which warm-up is over and decay has not begun."""
    return range(config.warmup_steps(n_steps), n_steps - round(config.decay * n_steps) + 1)
