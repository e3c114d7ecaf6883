"""The commands and code of the README and the pages exist and run."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from command_line import run
from pages import PAGES, ROOT, Block, blocks, mentioned
from small_runs import write_corpus

import explore
from explore.cli import app
from explore.experiment import Experiment
from explore.presets import published_table
from explore.study import Sweep

CHEAP = {"compare", "cost", "data", "roofline"}
"""Commands that take less than a second and need no run."""
SMALL = {
    "tokens=200_000": "tokens=4_096, eval_tokens=4_096",
    "tokens=20_000": "tokens=2_048",
    '"tokens": 114_688': '"tokens": 4_096',
    "eval_tokens=65_536": "eval_tokens=4_096",
}
"""Budgets that the tests make smaller, in files and code."""
SMALL_OPTIONS = {"--trials": "2", "--tokens": "4096", "--train-bpe": "512", "--cases": "5"}
"""And on the command line."""
RUNNABLE = [
    name
    for name, path in PAGES.items()
    if name.startswith(("README", "docs")) and any(block.is_run for block in blocks(path))
]


def test_every_budget_that_is_made_smaller_is_in_a_file() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES.values(), *(ROOT / "sweeps").glob("*.py"))]
    assert [large for large in SMALL if not any(large in text for text in texts)] == []


def smaller(text: str) -> str:
    for large, small in SMALL.items():
        text = text.replace(large, small)
    return text


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists_with_its_options(page: str) -> None:
    group: Any = typer.main.get_command(app)
    whole = [arguments for block in blocks(PAGES[page]) for arguments in block.commands]
    for arguments in (*whole, *mentioned(PAGES[page])):
        if arguments[0].startswith("-"):
            continue
        assert arguments[0] in group.commands, f"{page}: explore {arguments[0]}"
        try:
            given = [
                str(ROOT) if each in ("RUN", "RUN2", "PARENT") else each for each in arguments[1:]
            ]  # a run has to be there
            group.commands[arguments[0]].make_context(arguments[0], given)
        except typer.TyperException as error:
            message = error.format_message()
            if arguments in whole or not message.startswith("Missing"):
                pytest.fail(f"{page}: explore {' '.join(arguments)}: {message}")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The module that makes the tables of the pages."""
    path = ROOT / "docs" / "site" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_pages_include_every_generated_table(tables: ModuleType) -> None:
    texts = [path.read_text(encoding="utf-8") for name, path in PAGES.items() if name.startswith("docs")]
    asked = re.findall(r"^<!-- table: (\S+) -->$", "\n".join(texts), flags=re.MULTILINE)
    assert set(asked) == set(tables.TABLES)


def test_the_page_of_python_names_all_exports_and_what_load_returns(tables: ModuleType) -> None:
    named = re.findall(r"^::: (\S+)$", tables.python_page(), flags=re.MULTILINE)
    others = {"explore.train.LoadedRun", "explore.roofline.costs_table"}
    assert set(named) == {f"explore.{name}" for name in explore.__all__ if name != "__version__"} | others
    assert all(pkgutil.resolve_name(name).__doc__ for name in named)


def test_the_table_of_published_counts_shows_every_one_of_them(tables: ModuleType) -> None:
    shown = re.findall(r"^\| (\S+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", tables.published(), flags=re.MULTILINE)
    table = [(row["preset"], float(row["published"]), f"{row['computed']:.3f}") for row in published_table()]
    assert [(name, float(printed), computed) for name, printed, computed in shown] == table


def test_a_page_names_everything_that_a_sweep_file_may_define() -> None:
    page = PAGES["docs/how-to/write-a-sweep.md"].read_text(encoding="utf-8")
    rows = " ".join(re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE))
    given = {each.name for each in fields(Sweep)} - {"path", "question", "experiment", "examples"}
    assert set(re.findall(r"`(\w+)`", rows)) == given


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sweeps of the repository, at a few tokens, and a corpus beside it."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(ROOT / "sweeps", work / "sweeps", ignore=shutil.ignore_patterns("records", "__pycache__"))
    (work / "sweeps" / "records").symlink_to(ROOT / "sweeps" / "records")
    for file in (work / "sweeps").glob("*.py"):
        file.write_text(smaller(file.read_text()))
    books = tmp_path / "books"
    books.mkdir()
    write_corpus(books)
    monkeypatch.chdir(work)
    return work


def write(block: Block) -> None:
    """Writes a block that is a file."""
    path = Path(block.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(smaller(block.text))


@pytest.mark.parametrize("page", RUNNABLE)
def test_quick_commands_of_a_page_run(
    page: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    for block in blocks(PAGES[page]):
        if block.title:
            write(block)
        elif block.mark == "" and block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.mark == "":
            for arguments in block.commands:
                if arguments[0] in CHEAP and "RUN" not in arguments:
                    code, _, err = run(capsys, monkeypatch, *arguments)
                    assert code == 0, f"explore {' '.join(arguments)}: {err}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs that replace RUN and RUN2."""
    from explore.train import fit

    example = ROOT / "sweeps" / "examples" / "latent_moe.json"
    runs = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        fit(Experiment.load(example, ["train.tokens=4096", "train.eval_tokens=4096", f"seed={seed}"]), runs)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_all_commands_of_a_page_run_in_order(
    page: str, place: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, place / "runs")
    parent, other = sorted((place / "runs").iterdir())
    names: dict[str, Any] = {}
    for block in filter(lambda block: block.is_run, blocks(PAGES[page])):
        if block.title:
            write(block)
        elif block.language == "python":
            exec(compile(smaller(block.text).replace("RUN", str(parent)), page, "exec"), names)
        for arguments in block.commands if not block.title else ():
            plan = next((parent / "plans").glob("*.json"), Path("PLAN"))
            given = [
                smaller(each).replace("RUN2", str(other)).replace("RUN", str(parent)).replace("PLAN", str(plan))
                for each in arguments
            ]
            for option in SMALL_OPTIONS.keys() & given if given[0] != "plan" else ():
                given[given.index(option) + 1] = SMALL_OPTIONS[option]
            if given[0] == "train":
                given += [word for name in ("tokens", "eval_tokens") for word in ("--set", f"train.{name}=4096")]
            if given[0] == "quantize":
                given += ["--calibration-tokens", "512"]
            code, _, err = run(capsys, monkeypatch, *given)
            assert code == 0, f"explore {' '.join(given)}: {err}"
