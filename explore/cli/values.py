"""Values of options: whole numbers with or without a suffix, and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from explore.config import LARGEST
from explore.foreign import echo, shorten
from explore.formatting import read_count


def integer(low: float | None, high: float | None) -> Callable[[str | int], int]:
    """A reader of whole numbers in a range, with or without k, M or B: `4096`, `128k`."""

    def read(text: str | int) -> int:
        if isinstance(text, int):
            return text
        digits = text.strip().removeprefix("-").removeprefix("+")
        is_long = digits.isdecimal() and len(digits) > len(str(LARGEST))
        try:
            value = LARGEST + 1 if is_long else int(text) if digits.isdecimal() else read_count(text)
        except ValueError:
            value = 0.5
        if value != int(value):
            raise typer.BadParameter(f"must be a whole number, with or without k, M, B or T, got {echo(text)}")
        most = LARGEST if high is None else int(high)
        if low is not None and (value < low or text.startswith("-")):
            raise typer.BadParameter(f"must be at least {low:g}, got {shorten(text)}")
        if value > most:
            raise typer.BadParameter(f"must be at most {most}, got {shorten(text)}")
        return int(value)

    return read


def path(text: str | Path) -> Path:
    """Reads a path; an empty one would mean the current folder."""
    if text == "":
        raise typer.BadParameter("must be a path, got ''")
    return Path(text)
