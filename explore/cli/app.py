"""The Typer application, its consoles, and how it reports errors."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from explore.cli.errors import cut_values, plain
from explore.cli.rules import CheckedCommand, Rule, option_name
from explore.cli.values import integer, path
from explore.foreign import hide_passwords, shorten
from explore.machine import is_passing
from explore.terminal import plain_console, replace_unprintable
from explore.termination import TerminatedError, termination_handled


def reflow(text: str) -> str:
    """Joins each paragraph of a docstring into one line, so that the terminal wraps it at its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


class App(typer.Typer):
    """A Typer application whose help fits 80 columns.

    Docstrings are reflowed; Typer would keep the line breaks of the source. An option's type is one short word, which
    leaves room for its help; its choices are listed in the help. Each example is on a separate line. All integers may
    have a suffix, such as 128k, and no path may be empty.
    """

    def command(self, *args: Any, rules: tuple[Rule, ...] = (), **options: Any) -> Callable[..., Any]:
        """Registers a command; takes the arguments of `typer.Typer.command`, and the rules of its options."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            options.setdefault("help", reflow(function.__doc__ or ""))
            if epilog := options.get("epilog"):
                options["epilog"] = epilog.replace("; explore ", "\n         explore ")
            annotations = inspect.get_annotations(function, eval_str=True)
            inspect.unwrap(function).__annotations__ = annotations  # Typer reads them from here
            for name, annotation in annotations.items():
                _complete(name, annotation)
            options.setdefault("cls", type("Command", (CheckedCommand,), {"rules": rules}))
            return super(App, self).command(*args, **options)(function)

        return add


_TYPES = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
"""The word that help shows for the type of an option; a flag takes no value."""


def _complete(name: str, annotation: Any) -> None:
    """Sets a short type word on an option that has none, lists its choices in its help, and sets its parser."""
    if get_origin(annotation) is not Annotated:
        return
    kind, *metadata = get_args(annotation)
    while get_origin(kind) in (Union, UnionType, list):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    for each in metadata:
        if isinstance(each, ArgumentInfo | OptionInfo) and each.parser is None:
            each.parser = {int: integer(each.min, each.max), Path: path}.get(kind)
        if isinstance(each, ArgumentInfo):
            each.metavar = each.metavar or name.upper()
        elif isinstance(each, OptionInfo) and each.metavar is None:
            choices = [str(choice) for choice in get_args(kind)]
            each.metavar = "NAME" if choices else _TYPES.get(kind, "TEXT")
            if not all(re.search(rf"\b{re.escape(choice)}\b", each.help or "") for choice in choices):
                each.help = f"{each.help} One of {', '.join(choices)}."


app = App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Set EXPLORE_TRACEBACK=1 to see the traceback behind an error.",
)


def _print_version(chosen: bool) -> bool:
    from explore import __version__

    if chosen:
        print(__version__)
        raise typer.Exit
    return chosen


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and exit.", callback=_print_version)
    ] = False,
) -> None:
    """Explore hybrids of Mamba-2, attention, MLP and (latent) mixture-of-experts layers."""


out = plain_console(stderr=False, soft_wrap=True)
err = plain_console()
INTERRUPTED = 130
RESUMED = ("train", "distil", "sweep", "score", "cut", "puzzle", "quantize")
"""Commands that save their progress, so that a second call resumes."""
LONGEST_ERROR = 390


def main() -> None:
    """Runs the command line; a user's mistake or a machine fault prints one line and exits with code 2."""
    replace_unprintable()
    try:
        with termination_handled():
            code = app(standalone_mode=False)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code
            _report_end("interrupted")
        sys.exit(code)
    except TerminatedError as end:
        if end.code:
            _report_end("terminated")
        raise
    except typer.TyperException as error:  # wrong arguments; without any arguments, help has been shown
        if line := _named(error):
            _refuse(ValueError(line))
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _refuse(ValueError(f"{message}; see --help")) if message else sys.exit(2)
    except Exception as error:
        expected = isinstance(error, ValueError | OSError | OverflowError) or is_passing(error)
        if not expected or os.environ.get("EXPLORE_TRACEBACK"):
            raise
        _refuse(error)


def _report_end(how: str) -> None:
    resumes = len(sys.argv) > 1 and sys.argv[1] in RESUMED
    print(f"{how}; run the same command to resume" if resumes else how, file=sys.stderr)


def _named(error: Exception) -> str:
    """`--devices must be at least 1, got 0` for a value that an option refuses; empty for other errors."""
    from pydantic import ValidationError

    from explore.config import bound

    if not (isinstance(error, typer.BadParameter) and error.param is not None):
        return ""
    words = error.message
    if isinstance(cause := error.__cause__, ValidationError):
        problem = cause.errors()[0]
        found = bound(problem["msg"])
        words = f"{found}, got {shorten(str(problem['input']))}" if found else ""
    return f"{option_name(error.param)} {words}" if words.startswith("must ") else ""


def _refuse(error: Exception) -> NoReturn:
    line = hide_passwords(" ".join(plain(error).split()))
    print(f"error: {shorten(cut_values(line), LONGEST_ERROR)}", file=sys.stderr)
    sys.exit(2)


def note(text: str) -> None:
    """Prints one line to stderr, which keeps it out of the output that programs read."""
    err.print(f"note: {text}", highlight=False, soft_wrap=True)
