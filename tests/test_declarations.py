"""A block declares all its properties in its own file, so a new block changes no other module."""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from explore.blocks import BLOCKS, KINDS, BlockKind
from explore.figures import family_styles
from explore.ops import PATHS
from explore.train import COMPILED

TOY = Path(__file__).resolve().parent / "toy_mixer"
EXPLORE = Path(__file__).resolve().parent.parent / "explore"
EXEMPT = ("blocks", "presets", "interop", "kernels")
"""Blocks themselves, models that were published, and formats of others, which have their own names for blocks."""

LETTERS = frozenset(kind.letter for kind in BLOCKS)
CLASSES = frozenset(
    name for kind in BLOCKS for name in (kind.config.__name__, type(kind.example.build(32)).__name__)
)  # fmt: skip
OF_LAYERS = re.compile(r"pattern|letter|layer|block|kind|component|strip")
"""Identifiers of what a letter is compared with; a letter such as `-` means other things elsewhere."""

SOURCES = [
    path
    for path in sorted(EXPLORE.rglob("*.py"))
    if path.relative_to(EXPLORE).parts[0] not in EXEMPT
]  # fmt: skip


def constants(node: ast.AST) -> set[str]:
    """The strings in an expression: itself, or the elements of a literal collection."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return set().union(*map(constants, node.elts))
    return set()


def identifiers(node: ast.AST) -> set[str]:
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def asks_for(subject: set[str], wanted: set[str]) -> bool:
    """Whether a comparison of `subject` with these strings tests the kind of a block; one of roles does not."""
    if "role" in subject:
        return False
    return bool(wanted & KINDS.keys()) or bool(wanted & LETTERS and any(map(OF_LAYERS.search, subject)))


def questions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and source of every test of the kind of a block: comparisons, cases, classes, tables by kind."""
    for node in ast.walk(tree):
        asked = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            wanted = set().union(*map(constants, sides))
            asked = asks_for(set().union(*map(identifiers, sides)), wanted)
            asked |= bool(CLASSES & {side.id for side in sides if isinstance(side, ast.Name)})
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            asked = name in ("isinstance", "issubclass") and bool(CLASSES & identifiers(node.args[1]))
            if isinstance(node.func, ast.Attribute) and node.func.attr in (
                "get",
                "pop",
                "count",
                "index",
                "startswith",
            ):
                asked = bool(node.args) and asks_for(identifiers(node.func.value), constants(node.args[0]))
        elif isinstance(node, ast.Match):
            cases = [part for case in node.cases for part in ast.walk(case.pattern)]
            wanted = set().union(*(constants(part.value) for part in cases if isinstance(part, ast.MatchValue)))
            asked = asks_for(identifiers(node.subject), wanted)
            asked |= any(bool(CLASSES & identifiers(part.cls)) for part in cases if isinstance(part, ast.MatchClass))
        elif isinstance(node, ast.Subscript):
            asked = asks_for(identifiers(node.value), constants(node.slice))
        elif isinstance(node, ast.Dict):
            keys = [constants(key) for key in node.keys if key is not None]
            asked = bool(set().union(*keys) & KINDS.keys())
        if asked:
            yield node.lineno, ast.unparse(node)[:100]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(EXPLORE)))
def test_no_module_outside_blocks_tests_the_kind_of_a_block(source: Path) -> None:
    assert list(questions(ast.parse(source.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        'if letter == "M": pass',
        'if "E" in model.pattern: pass',
        'if block.kind != "mamba2": pass',
        'if layer.kind in ("attention", "mla"): pass',
        'if row.entry.component == "attention": pass',
        'match letter:\n    case "M" | "*": pass',
        "match block:\n    case Mamba2Config(): pass",
        "if isinstance(block, AttentionConfig | MLAConfig): pass",
        "if isinstance(layer.mixer, blocks.MoE): pass",
        "if type(block) is MLPConfig: pass",
        'blocks["E"]',
        'blocks.get("E")',
        'pattern.count("*")',
        'names = {"mamba2": "Mamba-2"}',
    ],
)
def test_the_check_finds_every_way_to_test_a_kind(code: str) -> None:
    assert len(list(questions(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        'if experiment.data.kind == "text": pass',
        'if block.role == "attention": pass',
        'if sign == "-": pass',
        'path_of("attention")',
        'forced_paths(attention="sdpa")',
        "if isinstance(block, BlockConfig): pass",
        'blocks = {"M": {"n_heads": 4}}',
        "blocks[letter]",
    ],
)
def test_the_check_accepts_other_comparisons(code: str) -> None:
    assert list(questions(ast.parse(code))) == []


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.letter)
def test_declarations_of_a_block_name_its_own_components_ops_and_sizes(kind: BlockKind) -> None:
    config, rng = kind.config, random.Random(0)
    examples = [kind.example, config.default(256), *(config.random_example(rng) for _ in range(50))]
    components = {entry.component for example in examples for entry in example.entries(32, 20)}
    assert all(set(group.components) <= components for group in config.groups.values())
    assert [not group.components for group in config.groups.values()] == [True, *[False] * (len(config.groups) - 1)]
    assert all(set(line) <= components for line in config.lines.values())
    assert not config.colored_as or config.colored_as in config.groups
    for example in examples:
        own = {entry.component for entry in example.entries(32, 20)}
        assert all(counts.keys() <= own for counts in example.conventions(32, 20).values())
        assert all(PATHS[op] and op in COMPILED for op in example.regions(20))
        assert all(n > 0 for n in example.regions(20).values())
        assert config.settled(example.model_dump()) == {}
        for name, stops in example.stops(32).items():
            assert name in config.model_fields
            assert stops.values
    for name, call in kind.example.op_calls(32, 2, 20, torch.float32).items():
        assert name.partition(",")[0] in PATHS
        call().sum().backward()


def test_kinds_have_distinct_names() -> None:
    for names in (
        [kind.letter for kind in BLOCKS],
        [kind.config.label for kind in BLOCKS],
        list(KINDS),
        [name for kind in BLOCKS for name in kind.config.family_names],
    ):
        assert len(set(names)) == len(names)
    assert all(kind.config.family_names for kind in BLOCKS if kind.config.role in ("recurrent", "experts"))


def test_a_new_mixer_needs_an_op_a_block_and_one_entry(tmp_path: Path) -> None:
    shutil.copytree(EXPLORE, tmp_path / "explore", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(TOY / "op.py", tmp_path / "explore" / "ops" / "toy.py")
    shutil.copy(TOY / "block.py", tmp_path / "explore" / "blocks" / "toy.py")
    blocks = tmp_path / "explore" / "blocks" / "__init__.py"
    entry = '    BlockKind("T", ToyConfig, ToyConfig(d_toy=24)),\n)\n"""Patterns, JSON'
    text = blocks.read_text(encoding="utf-8").replace(')\n"""Patterns, JSON', entry)
    text = text.replace("\n\n\nclass", "\nfrom explore.blocks.toy import ToyConfig\n\n\nclass", 1)
    blocks.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(TOY / "check.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for style in family_styles(["Mamba + MLP", "attention LatentMoE", "MLP"]).values():  # a new family changes no other
        assert str(style) in done.stdout
