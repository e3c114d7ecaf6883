"""The help of every command on a terminal of 80 columns: no word is cut and lines break evenly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise

import pytest
from command_line import run
from typer.main import get_command
from typer.testing import CliRunner

from explore.cli import app
from explore.cli.app import App
from explore.presets import PRESETS

COLUMNS = 80
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def shown(*args: str, application: App = app) -> str:
    result = CliRunner().invoke(application, [*args, "--help"], env={"COLUMNS": str(COLUMNS)}, color=False)
    assert result.exit_code == 0, result.exception
    return result.output


def ragged(text: str, width: int) -> list[str]:
    """Lines of paragraphs that break although the next word fits."""
    lines = [line.strip() for line in text.splitlines()]
    return [
        line for line, after in pairwise(lines) if line and after and len(line) + 1 + len(after.split()[0]) <= width
    ]


def last_column(panels: str) -> str:
    """The text of the last column of the panels of options."""
    rows = [line.strip("│╭╮╰╯─ ") for line in panels.splitlines() if line.startswith("│")]
    return " ".join(re.split(r"\s{2,}", row)[-1] for row in rows if row)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_80_columns_and_loses_no_word(name: str) -> None:
    help_ = shown(name)
    assert max(map(len, help_.splitlines())) <= COLUMNS
    assert "…" not in help_
    before, options = help_.split("╭─", 1)
    assert " ".join(COMMANDS[name].callback.__doc__.split()) in " ".join(before.split())
    assert ragged(before, COLUMNS - 2) == []
    texts = last_column(options)
    for parameter in COMMANDS[name].params:
        assert all(option in options for option in parameter.opts if option.startswith("-"))
        assert parameter.help in texts


def test_the_check_detects_a_line_that_breaks_early() -> None:
    other = App(add_completion=False)

    @other.command()
    def one() -> None:
        """One line.

        A paragraph.
        """

    options = other.registered_commands[0]
    assert options.help == "One line.\n\nA paragraph."
    options.help = "One line.\n\nA paragraph\nthat breaks early."
    assert ragged(shown(application=other), COLUMNS - 2) == ["A paragraph"]


def test_choices_are_named_in_the_help_of_an_option() -> None:
    help_ = shown("cost")
    assert "Convention for counting FLOPs. One of exact, megatron, palm, 6nd. [default: exact]" in last_column(help_)
    assert re.search("--convention +NAME +Convention for", help_)
    assert re.search("--json +Print JSON", help_)


def test_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "--version") == (0, f"{version('hybrid-frontier')}\n", "")


def lines(*args: str) -> list[str]:
    """The output of a command on a terminal of 80 columns."""
    command = [sys.executable, "-c", "from explore.cli import main; main()", *args]
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--precision", "nvfp4"), ("--d-model", "8192", "--vocab-size", "128k")])
@pytest.mark.parametrize("by", ["letter", "component"])
def test_tables_and_totals_of_costs_lose_no_column_and_cut_no_word_at_80_columns(
    by: str, options: tuple[str, ...]
) -> None:
    table = lines("cost", "MEM*E", "--by", by, *options)
    heads = " ".join(line for line in table if line.startswith("letter"))
    for name in ("params", "active", "forward", "training", "prefill", "decode", "share", "weights", "moved"):
        assert f" {name} " in heads
    assert not [line for line in table if "…" in line or len(line) > COLUMNS]


@pytest.mark.slow
def test_each_preset_has_one_line_at_80_columns() -> None:
    listed = lines("cost", "--list")
    assert len(listed) == 1 + len(PRESETS)
    assert not [line for line in listed if "…" in line or len(line) > COLUMNS]


@pytest.mark.slow
def test_published_speed_ups_have_lines_of_at_most_80_columns() -> None:
    printed = lines("roofline", "--published")
    assert "Why prediction and publication differ:" in printed
    assert not [line for line in printed if "…" in line or len(line) > COLUMNS]
