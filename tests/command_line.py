"""Runs the command line in this process."""

from __future__ import annotations

import sys

import pytest

from explore.cli import main


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `explore` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["explore", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()
