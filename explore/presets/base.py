"""What a preset is."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

from explore.model import ModelConfig


class Published(NamedTuple):
    """A number as it was printed.

    Attributes:
        quantity: name of the field of `Cost` that it is.
        printed: the number of parameters in billions, with the digits that were printed; 5.5e2 has two.
        note: what the print leaves out.
    """

    quantity: str
    printed: str
    note: str = ""

    def agrees(self, params: int) -> bool:
        """Whether a count rounds to what was printed."""
        printed = Decimal(self.printed)
        return (Decimal(params) / 10**9).quantize(printed) == printed


class Preset(NamedTuple):
    """A published system.

    Attributes:
        build: makes its model config.
        source: where its sizes are printed.
        published: its counts in print.
    """

    build: Callable[[], ModelConfig]
    source: str
    published: tuple[Published, ...] = ()
