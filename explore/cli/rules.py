"""Rules for the options of a command: an option that would have no effect is refused before the command runs.

A condition names an option (`--list`) or an argument (`TARGET`) that the user gives, or a value (`--what=curves`) that
an option has, given or by default. Several conditions are separated by blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import typer
from typer.core import TyperCommand, TyperOption

from explore.foreign import echo

MAY_BE_EMPTY = ("--prompt", "--entity")
"""Options whose text may be empty."""


class Options:
    """The options and arguments of a command: their values, and which of them the user gave."""

    def __init__(self, context: typer.Context) -> None:
        self.values: dict[str, Any] = {}
        self.given: list[str] = []
        for parameter in context.command.params:
            key = str(parameter.name)
            name, value = option_name(parameter), context.params.get(key)
            source = context.get_parameter_source(key)
            self.values[name] = value
            if source is not None and source.name == "COMMANDLINE" and value not in (None, (), []):
                self.given.append(name)

    def meet(self, condition: str) -> bool:
        """Whether a condition holds."""
        name, _, wanted = condition.partition("=")
        if not wanted:
            return name in self.given
        value = self.values[name]
        found = value if isinstance(value, list | tuple) else [value]
        return any(str(each).partition("=")[0] == wanted for each in found)

    def shown(self, name: str) -> str:
        """`, got VALUE` for an argument, whose name is not on the command line; empty for an option."""
        value = self.values[name]
        if name.startswith("--"):
            return ""
        return f", got {echo(' '.join(map(str, value)) if isinstance(value, list | tuple) else str(value))}"


class Rule(Protocol):
    """A rule that the options of a command keep or break."""

    def problem(self, options: Options) -> str:
        """What is wrong with the options, in one line; empty if nothing is."""


class Only(NamedTuple):
    """With `mode`, no other options have an effect than those that it takes."""

    mode: str
    takes: str = ""

    def problem(self, options: Options) -> str:
        if not options.meet(self.mode):
            return ""
        return _others_given(options, _text(self.mode), self.takes, [*self.takes.split(), self.mode.partition("=")[0]])


class Needs(NamedTuple):
    """Each of these options has an effect only with one of the others."""

    options: str
    others: str

    def problem(self, options: Options) -> str:
        if any(map(options.meet, self.others.split())):
            return ""
        for name in filter(options.meet, self.options.split()):
            heads = {other.partition("=")[0] for other in self.others.split()}
            if len(heads) > 1 or heads == {self.others}:
                return f"{name}: must come with {_joined(map(_text, self.others.split()), 'or')}{options.shown(name)}"
            head = heads.pop()  # one option, with one of several values
            values = _joined((other.partition("=")[2] for other in self.others.split()), "or")
            value = options.values[head]
            got = "" if value is None else f", got {head} {value}"
            return f"{name}: must come with {head} {values}{got}"
        return ""


class Apart(NamedTuple):
    """An option that has no effect, or takes it from the others, if one of them is given.

    Attributes:
        unless: a condition under which both have an effect.
    """

    option: str
    others: str
    unless: str = ""

    def problem(self, options: Options) -> str:
        if not options.meet(self.option) or (self.unless and options.meet(self.unless)):
            return ""
        given = [_text(other) for other in self.others.split() if options.meet(other)]
        without = f" without {_text(self.unless)}" if self.unless else ""
        return f"{_text(self.option)}: must not be combined with {_joined(given, 'or')}{without}" if given else ""


def refuse_others(context: typer.Context, mode: str, takes: str) -> None:
    """Refuses all options but those that have an effect in a mode, which no condition can name.

    Args:
        mode: what the user asks for, as the message names it, such as `a preset`.
        takes: the options that have an effect, separated by blanks.

    Raises:
        ValueError: another option is given.
    """
    options = Options(context)
    if problem := _others_given(options, mode, takes, takes.split()):
        raise ValueError(problem)


def _others_given(options: Options, mode: str, takes: str, allowed: Sequence[str]) -> str:
    for name in options.given:
        if name not in allowed:
            took = f"only {_joined(takes.split(), 'and')}" if takes else "no other option"
            return f"{name}: must not be combined with {mode}, which takes {took}{options.shown(name)}"
    return ""


def check(context: typer.Context, *rules: Rule) -> None:
    """Refuses options that are empty or break a rule.

    Raises:
        ValueError: the message names the option.
    """
    options = Options(context)
    for name in options.given:
        value = options.values[name]
        if name not in MAY_BE_EMPTY and "" in (value if isinstance(value, list | tuple) else [value]):
            raise ValueError(f"{name} must not be empty")
    for rule in rules:
        if problem := rule.problem(options):
            raise ValueError(problem)


class CheckedCommand(TyperCommand):
    """A command that checks its rules before it runs."""

    rules: tuple[Rule, ...] = ()

    def invoke(self, ctx: Any) -> Any:
        check(ctx, *self.rules)
        return super().invoke(ctx)


def option_name(parameter: Any) -> str:
    """The name of a parameter as users know it: `--seq-len`, or the word for an argument in the help."""
    if isinstance(parameter, TyperOption):
        return next(name for name in parameter.opts if name.startswith("--"))
    return str(parameter.metavar or parameter.name).upper()


def _text(condition: str) -> str:
    return condition.replace("=", " ")


def _joined(words: Any, last: str) -> str:
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else str(end)
