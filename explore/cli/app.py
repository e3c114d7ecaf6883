"""The application, its consoles, and how it reports a mistake."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Explore hybrids of Mamba-2, attention, MLP and (latent) mixture-of-experts layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Set EXPLORE_TRACEBACK=1 to see the traceback behind an error.",
)
out = Console(soft_wrap=True)
err = Console(stderr=True)
INTERRUPTED = 130
LONGEST_ERROR = 390


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # into which Typer turns Ctrl-C
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(code)
    except typer.TyperException as error:  # of the arguments; without any, help has been shown
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _refuse(ValueError(f"{message}; see --help")) if message else sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get("EXPLORE_TRACEBACK"):
            raise
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    from pydantic import ValidationError

    from explore.config import explain

    message = explain(error) if isinstance(error, ValidationError) else str(error)
    line = " ".join(message.split())
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR - 100]} ... {line[-90:]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def note(text: str) -> None:
    """Says something in one line, apart from the output that programs read."""
    err.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)
