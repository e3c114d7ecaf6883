"""Printed text is unchanged for any names and on any terminal."""

from __future__ import annotations

import ast
import ctypes
import io
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from explore.cli import main
from explore.solve import solve
from explore.terminal import c_output_discarded, plain_console, replace_unprintable
from explore.train.callbacks import ProgressBar, Throughput

PACKAGE = Path(__file__).parents[1] / "explore"
NAME = "[red]x[/blue] :rocket: [/]"


def test_a_console_prints_every_letter_of_lines_and_tables() -> None:
    screen = io.StringIO()
    console = plain_console(file=screen, width=120)
    table = Table(NAME, title=NAME, caption=NAME)
    table.add_row(NAME)
    console.print(NAME, style="bold", highlight=False)
    console.print(table)
    assert screen.getvalue().count(NAME) == 5


def test_the_progress_bar_of_a_run_shows_its_name() -> None:
    screen = io.StringIO()
    bar = ProgressBar(3, NAME, Throughput(1), plain_console(file=screen, width=200))
    bar.progress.add_task(NAME, total=3, status="")
    bar.progress.console.print(bar.progress)
    assert NAME in screen.getvalue()


def calls(source: Path) -> set[str]:
    """Names of the functions that a file calls."""
    found = [node.func for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    return {getattr(each, "attr", getattr(each, "id", "")) for each in found}


@pytest.mark.parametrize(
    "source", sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts), ids=lambda path: path.stem
)
def test_every_console_is_a_plain_one(source: Path) -> None:
    if source.name != "terminal.py":
        assert not {"Console", "escape_markup", "from_markup"} & calls(source)
        assert not re.search(r"rich\.markup|\[/?(bold|dim|red|green|yellow)\]", source.read_text())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_shows_question_marks_for_unsupported_characters(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    replace_unprintable()
    plain_console(stderr=False, width=40).print("● front \udcff")
    sys.stdout.flush()
    assert screen.getvalue().decode(encoding) == "? front ?\n"


@pytest.mark.slow
def test_commands_print_in_ascii() -> None:
    code = "import sys; sys.argv = ['explore', 'solve', '-', '--target', 'params_total=1M', '--free', 'd_ff', "
    code += "'--vocab-size', '300']; from explore.cli import main; main()"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "params_total" in done.stdout


def write_run(folder: Path, name: str) -> None:
    """The record of a finished run with only the fields that a table needs."""
    folder.mkdir(parents=True)
    experiment = {"name": name, "model": {"pattern": "M*", "d_model": 64}, "train": {"lr": 1e-3}}
    records = {
        "experiment.json": {"key": "0" * 64, "experiment": experiment},
        "cost.json": {"family": NAME, "params_total": 10},
        "result.json": {"status": "finished", "val_bpb": 2.0, "flops_run": 1e12},
    }
    for file, content in records.items():
        (folder / file).write_text(json.dumps(content))


def test_a_table_shows_names_and_folders_with_every_letter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "[bold]runs[/dim]"
    write_run(root / "one", NAME)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["explore", "table", str(root), "--out", str(root / "all :rocket:.csv")])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().out
    assert not end.value.code
    assert NAME in shown
    assert f"wrote {root}/all :rocket:.csv" in shown


def test_lines_that_a_c_library_prints_do_not_reach_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    print("before")
    with c_output_discarded():
        c.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
    print("after")
    c.puts(b"not discarded")
    c.fflush(None)
    assert capfd.readouterr().out.splitlines() == ["before", "after", "not discarded"]


@pytest.mark.parametrize("use", ["compress.program", "solve.search"])
def test_the_integer_program_prints_nothing(use: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    module = import_module(f"explore.{use}")
    real = module.milp

    def chatty(*args: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"noise")
        return real(*args, **options)

    monkeypatch.setattr(module, "milp", chatty)
    if use == "compress.program":
        assert module.solve([[2.0, 1.0]], [[0.0, 0.0]]).options == (1,)
    else:
        experts = {"E": {"n_experts": 32}}
        model = {"vocab_size": 512, "pattern": "MEM*E-", "d_model": 128, "blocks": experts}
        solve(model, {"params_total": 2e6, "params_active": 1e6}, ["d_ff", "d_expert", "d_shared"])
    assert capfd.readouterr().out == ""
