"""Types of presets."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

from explore.model import ModelConfig


class Published(NamedTuple):
    """A published number.

    Attributes:
        quantity: the corresponding field of `Cost`.
        printed: billions of parameters, with the digits as published; 5.5e2 has two.
        note: what the published number leaves out.
    """

    quantity: str
    printed: str
    note: str = ""

    def agrees(self, params: int) -> bool:
        """Whether a count rounds to the published number."""
        printed = Decimal(self.printed)
        return (Decimal(params) / 10**9).quantize(printed) == printed


class Preset(NamedTuple):
    """A published system.

    Attributes:
        build: builds its model config.
        source: publication of its sizes.
        published: published counts.
    """

    build: Callable[[], ModelConfig]
    source: str
    published: tuple[Published, ...] = ()
