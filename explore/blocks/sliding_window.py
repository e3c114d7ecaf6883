"""Causal attention over a sliding window."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt

from explore.blocks.attention import AttentionConfig
from explore.blocks.base import Call
from explore.blocks.declarations import Draw, Group, Powers, Stops, ladder


class SlidingWindowConfig(AttentionConfig):
    """Grouped-query attention in which a query attends to the last `window` positions, including its own.

    The cache holds at most `window` positions. The layer equals `AttentionConfig` with a window; its separate letter
    shows in a pattern which layers see the whole context.
    """

    label: ClassVar[str] = "sliding-window attention"
    groups: ClassVar[Mapping[str, Group]] = {
        "window projections": Group((0.04, 0.08, 0.28)),
        "window scores, KV": Group((0.14, 0.26, 0.82), ("attention",)),
    }
    draws: ClassVar[Mapping[str, Draw]] = {**AttentionConfig.draws, "window": Powers(32, 256)}

    kind: Literal["sliding_window"] = "sliding_window"  # type: ignore[assignment]  # a kind of its own
    window: PositiveInt

    @classmethod
    def default(cls, d_model: int) -> SlidingWindowConfig:
        """Heads as in attention; the window of gpt-oss."""
        return cls(**_heads(AttentionConfig.default(d_model)), window=128)

    @classmethod
    def random_example(cls, rng: random.Random) -> SlidingWindowConfig:
        return cls(**_heads(AttentionConfig.random_example(rng)), window=rng.randint(1, 30))

    @classmethod
    def sized(cls, d_model: int, **drawn: Any) -> dict[str, int]:
        """Heads as in attention; the window does not depend on the width."""
        return {**super().sized(d_model, **drawn), "window": drawn["window"]}

    def stops(self, d_model: int) -> Mapping[str, Stops]:
        return {**super().stops(d_model), "window": Stops(tuple(ladder(16, 8192, 16, 2)))}

    def op_calls(self, d_model: int, batch_size: int, seq_len: int, dtype: torch.dtype) -> Mapping[str, Call]:
        (call,) = super().op_calls(d_model, batch_size, seq_len, dtype).values()
        return {f"attention, window {self.window}": call}


def _heads(attention: AttentionConfig) -> dict[str, Any]:
    """Returns the fields of an attention config without its window."""
    return attention.model_dump(exclude={"kind", "window"})
