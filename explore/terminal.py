"""The terminal: every console of this project prints text as it is."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console


def plain_console(*, stderr: bool = True, **options: Any) -> Console:
    """A console that takes no part of a text for markup or for an emoji.

    Names, folders, prompts and reasons may hold `[red]`, `[/]` or `:rocket:`; they are printed with every letter. Style
    is given beside the text, by `style=` or as a `rich.text.Text`.

    Args:
        stderr: print to standard error, else to standard output.
        options: of `rich.console.Console`.
    """
    return Console(stderr=stderr, markup=False, emoji=False, **options)


def replace_unprintable() -> None:
    """Lets standard output and standard error print a `?` for what a terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
