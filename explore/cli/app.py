"""The application, its consoles, and how it reports a mistake."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from explore.foreign import hide_passwords, shorten
from explore.machine import is_passing
from explore.terminal import plain_console, replace_unprintable
from explore.termination import TerminatedError, termination_handled

app = typer.Typer(
    help="Explore hybrids of Mamba-2, attention, MLP and (latent) mixture-of-experts layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Set EXPLORE_TRACEBACK=1 to see the traceback behind an error.",
)
out = plain_console(stderr=False, soft_wrap=True)
err = plain_console()
INTERRUPTED = 130
GOES_ON = "the same command goes on from the last checkpoint"
LONGEST_ERROR = 390


def main() -> None:
    """Runs the command line; a user's mistake, or a fault of the machine, is one line and exit code 2."""
    replace_unprintable()
    try:
        with termination_handled():
            code = app(standalone_mode=False)
        if code == INTERRUPTED:  # into which Typer turns Ctrl-C
            print(f"interrupted; {GOES_ON}", file=sys.stderr)
        sys.exit(code)
    except TerminatedError as end:
        if end.code:
            print(f"terminated; {GOES_ON}", file=sys.stderr)
        raise
    except typer.TyperException as error:  # of the arguments; without any, help has been shown
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _refuse(ValueError(f"{message}; see --help")) if message else sys.exit(2)
    except Exception as error:
        expected = isinstance(error, ValueError | OSError | OverflowError) or is_passing(error)
        if not expected or os.environ.get("EXPLORE_TRACEBACK"):
            raise
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    from pydantic import ValidationError

    from explore.config import explain

    message = explain(error) if isinstance(error, ValidationError) else str(error) or type(error).__name__
    if isinstance(error, OverflowError):
        message = f"a number is too large to count with ({error})"
    line = hide_passwords(" ".join(message.split()))
    print(f"error: {shorten(line, LONGEST_ERROR)}", file=sys.stderr)
    sys.exit(2)


def note(text: str) -> None:
    """Says something in one line, apart from the output that programs read."""
    err.print(f"note: {text}", highlight=False, soft_wrap=True)
