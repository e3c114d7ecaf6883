"""The `figures` command: regenerate figures, tables and quoted numbers from committed records, or check them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from explore.cli.app import app, err, out

TEMPLATE, TEXT = "FINDINGS.template.md", "FINDINGS.md"


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore figures --check, as CI does; explore figures latent_or_not draws one of them",
)
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Studies, by file name (default: all).")] = None,
    sweeps: Annotated[Path, typer.Option(help="Folder of sweep files, with their records in records/.")] = Path(
        "sweeps"
    ),
    output: Annotated[Path, typer.Option("--out", help="Folder of the figures and tables.")] = Path("docs/findings"),
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; exit with 1 if a file differs from its records or a claim passes no gate."
        ),
    ] = False,
) -> None:
    """Regenerate every figure and table of the findings from records, as PDF, SVG, PNG and CSV; train nothing."""
    from explore.findings import find_findings, text_drift, ungated_claims, write_text

    found = find_findings(sweeps)
    if unknown := set(names or ()) - {finding.name for finding in found}:
        allowed = ", ".join(finding.name for finding in found)
        raise ValueError(f"NAMES must be studies with records ({allowed}), got {', '.join(sorted(unknown))}")
    chosen = [finding for finding in found if not names or finding.name in names]
    template, text = output / TEMPLATE, sweeps.parent / TEXT
    if check:
        drifted = [line for finding in chosen for line in finding.drift(output)]
        if template.exists():
            drifted += text_drift(template, text, found)
            drifted += [f"{text}: {line}" for line in ungated_claims(template.read_text(encoding="utf-8"), found)]
        for line in drifted:
            err.print(line, highlight=False, soft_wrap=True)
        if drifted:
            sys.exit(1)
        out.print(f"{len(chosen)} findings match their records: {sum(len(each.runs) for each in chosen)} runs")
        return
    for finding in chosen:
        with err.status(Text(f"{finding.name}: {len(finding.runs)} runs")):
            paths = finding.write(output)
        for path in paths:
            out.print(f"wrote {path}", highlight=False)
    if template.exists():
        for path in write_text(template, text, found):
            out.print(f"wrote {path}", highlight=False)
