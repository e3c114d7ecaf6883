"""Parameters of a sweep file: named values that `--set` changes and that are part of the study's identity."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from explore.foreign import echo
from explore.formatting import read_count
from explore.quantities import unknown

NAME = "parameters"
"""Name, in a sweep file, of the mapping from parameters to values."""


def parse_file(path: Path) -> ast.Module:
    """The syntax tree of a Python file, read as bytes: it may begin with a byte-order mark or declare its encoding.

    Raises:
        ValueError: it is not Python; the message is one line and has the line number.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange escapes; they appear when the code is compiled
            return ast.parse(path.read_bytes())
    except SyntaxError as error:
        line = "" if error.lineno is None else f"line {error.lineno}: "
        raise ValueError(f"{path}: {line}{error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL byte; too many brackets in one another
        raise ValueError(f"{path}: must be Python code ({str(error) or 'it is nested too deeply'})") from None


def declared_parameters(tree: ast.Module, path: Path) -> dict[str, Any]:
    """The parameters that a sweep file declares, with their values; empty if it declares none.

    Raises:
        ValueError: `parameters` is not a mapping from names to plain values.
    """
    if (statement := _statement(tree)) is None:
        return {}
    try:
        found = ast.literal_eval(statement.value)
    except (ValueError, TypeError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"{path}: line {statement.lineno}: {NAME} must be a mapping of plain values, such as "
            '{"tokens": 2_000_000}'
        )
    return found


def set_parameters(tree: ast.Module, path: Path, values: Mapping[str, Any]) -> ast.Module:
    """The tree with new parameter values, so that the study's code contains them.

    Raises:
        ValueError: the file does not declare one of them.
    """
    declared = declared_parameters(tree, path)
    for name in values:
        if not declared:
            raise ValueError(f'--set: {path} declares no parameters; write {NAME} = {{"{name}": ...}} there')
        if name not in declared:
            raise unknown(name, list(declared), "--set", f"a parameter of {path}")
    if values and (statement := _statement(tree)) is not None:
        node = ast.parse(repr(declared | dict(values)), mode="eval").body
        for each in ast.walk(node):
            ast.copy_location(each, statement.value)
        statement.value = node
    return tree


def read_parameters(path: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Reads `NAME=VALUE` texts; each value gets the type of the declared one. Numbers may be `2M` or `5e6`.

    Raises:
        ValueError: a text has another form, a parameter is not declared, or a value has another type.
    """
    if not texts:
        return {}
    if not path.is_file():
        raise ValueError(f"{path}: no such sweep file")
    tree = parse_file(path)
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(f"--set must be NAME=VALUE, such as tokens=2M, got {echo(name + equals + value)}")
    given = {name: value for name, _, value in pairs}
    set_parameters(tree, path, given)
    declared = declared_parameters(parse_file(path), path)
    return {name: _like(declared[name], value, name) for name, value in given.items()}


def _like(default: Any, text: str, name: str) -> Any:
    """The text as a value of the default's type."""
    if isinstance(default, str):
        return text
    kind = type(default)
    if kind in (int, float):
        try:
            value = read_count(text)
        except ValueError:
            value = None
        if value is not None and kind(value) == value:
            return kind(value)
        raise ValueError(f"--set: {name} must be {'a whole number' if kind is int else 'a number'}, got {echo(text)}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list if kind is tuple else kind):
        return kind(value) if kind is tuple else value
    raise ValueError(f"--set: {name} must be of the kind of {json.dumps(default, default=repr)}, got {echo(text)}")


def _statement(tree: ast.Module) -> Any:
    """The statement in which a sweep file declares its parameters."""
    for each in tree.body:
        match each:
            case ast.Assign(targets=[ast.Name(id=name)]) if name == NAME:
                return each
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()) if name == NAME:
                return each
    return None
