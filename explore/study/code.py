"""The code behind a study: a sweep file and the user's modules that it imports."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from explore.study.parameters import parse_file, set_parameters

REPORTING = ("tables", "figure", "gate")
"""Names in a sweep file that affect only how results are reported; they may change during a study."""

INSTALLED = tuple(
    {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {Path(path).resolve() for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
)
"""Folders of standard and installed modules; a run records their versions instead of their code."""


def sweep_tree(path: Path, parameters: Mapping[str, Any] = MappingProxyType({})) -> ast.Module:
    """The syntax tree of a sweep file without its docstring and its reporting functions.

    Args:
        parameters: values that replace those in the file.
    """
    tree = set_parameters(parse_file(path), path, parameters)
    tree.body = [each for each in tree.body if not _only_reports(each)]
    return tree


def own_modules(tree: ast.Module) -> dict[str, str]:
    """Code, by module name, of the user's modules that a file imports directly or indirectly.

    These are modules imported in this process that are neither installed nor part of explore.
    """
    found: dict[str, str] = {}
    names = sorted(_imported(tree, ""))
    while names:
        name = names.pop()
        module = sys.modules.get(name)
        if name in found or module is None or (path := _own_file(name, module)) is None:
            continue
        content = parse_file(path)
        found[name] = ast.unparse(_without_docstring(content))
        names += sorted(_imported(content, name if hasattr(module, "__path__") else name.rpartition(".")[0]))
    return dict(sorted(found.items()))


def _own_file(name: str, module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or name.partition(".")[0] == __package__.partition(".")[0]:
        return None
    path = Path(file).resolve()
    return None if any(path.is_relative_to(folder) for folder in INSTALLED) else path


def _imported(tree: ast.Module, package: str) -> set[str]:
    """Names of the modules that code may import, and of their parent packages."""
    names: set[str] = set()
    for each in ast.walk(tree):
        match each:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=level):
                base = module or ""
                if level:
                    base = resolve_name("." * level + base, package) if package else ""
                names |= {base} | {f"{base}.{alias.name}" for alias in aliases}
    return {parent for name in names for parent in _with_packages(name)}


def _with_packages(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _without_docstring(tree: ast.Module) -> ast.Module:
    tree.body = [each for each in tree.body if not _is_text(each)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _only_reports(statement: ast.stmt) -> bool:
    """Whether a statement of a sweep file affects only how results are reported."""
    match statement:
        case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
            return name in REPORTING
        case ast.ImportFrom(module=str(module)):
            return module.startswith(("explore.figures", "explore.frontier"))
    return _is_text(statement)
