"""The page of all commands, made from the application."""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer
from rich.text import Text

from explore.cli import app

KINDS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
"""What stands for a value of a type."""


def commands_page() -> str:
    """Every command with its help, arguments and options, by the panels of `explore --help`."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="explore")
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in group.commands.items():
        panels.setdefault(command.rich_help_panel or "Commands", []).append((name, command))
    lines = [
        "# Commands",
        "",
        "`explore --help` lists the commands, and `explore COMMAND --help` shows what is below. A mistake ends with",
        "one line and exit code 2; `EXPLORE_TRACEBACK=1` shows the traceback behind it.",
        "",
    ]
    for panel, commands in panels.items():
        lines += [f"- **{panel}**: " + ", ".join(f"[`{name}`](#{_anchor(name)})" for name, _ in commands)]
    for panel, commands in panels.items():
        lines += ["", f"## {panel}"]
        for name, command in commands:
            lines += ["", *_command(name, command, context)]
    return "\n".join(lines) + "\n"


def _anchor(name: str) -> str:
    return f"explore-{name}"


def _command(name: str, command: Any, context: Any) -> list[str]:
    lines = [f"### explore {name} {{#{_anchor(name)}}}", "", inspect.cleandoc(command.help or "").split("\f")[0]]
    if example := (command.epilog or "").removeprefix("Example: "):
        lines += ["", "```", *map(str.strip, example.splitlines()), "```"]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    if arguments:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| `{_argument(each)}` | {_cell(each.help)} |" for each in arguments]
    if options:
        lines += ["", "| option | meaning | default |", "|---|---|---|"]
        for each in sorted(options, key=lambda option: option.opts[0]):
            flag = " / ".join([*each.opts, *each.secondary_opts])
            value, allowed = ("", "") if each.is_flag else _value(each, context)
            lines.append(f"| `{flag}{value}` | {_cell(each.help)}{allowed} | {_default(each)} |")
    return lines


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _value(option: Any, context: Any) -> tuple[str, str]:
    """What stands for the value of an option, and the values that are allowed where they are few."""
    kind = option.display_type(context).strip("<>").removeprefix("list[").removesuffix("]").removesuffix(" range")
    if option.metavar:
        return f" {option.metavar}", ""
    if "|" in kind:
        return f" {option.name.upper()}", " One of " + ", ".join(f"`{value}`" for value in kind.split("|")) + "."
    return f" {KINDS.get(kind, kind.upper())}", ""


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or callable(value) or value == []:
        return ""
    return f"`{'on' if value is True else value}`"


def _cell(help_text: str | None) -> str:
    text = Text.from_markup(help_text or "").plain
    return re.sub(r"([|*])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
