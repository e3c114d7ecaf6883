"""Acceptance length: tokens per pass of the main model with multi-token prediction as a draft."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Int
from torch import Tensor

from explore.model import GREEDY, LanguageModel, Sampling, Speculation, speculate


def acceptance_length(
    model: LanguageModel, prompts: Iterable[Int[Tensor, " prompt"]], max_new_tokens: int, sampling: Sampling = GREEDY
) -> float:
    """Mean tokens per verification pass in self-speculative decoding: the accepted drafts plus one.

    It lies between 1 and 1 + the number of depths.

    Raises:
        ValueError: the model has no multi-token prediction, or there are no prompts.
    """
    accepted: list[int] = []
    for prompt in prompts:
        accepted += speculate(model, prompt, max_new_tokens, sampling).accepted
    if not accepted:
        raise ValueError("prompts: there is none, or all continuations are too short for a draft")
    return Speculation(accepted=accepted).acceptance_length
