"""What the build adds to the pages: tables and lists of commands from the declarations, and figures from their code.

A page asks for a table with a line of its own, `<!-- table: letters -->`; the names are those of `tables.TABLES`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # before a figure is drawn

from commands import commands_page
from figures import gallery_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import TABLES, python_page

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"^<!-- table: ([\w-]+) -->$", re.MULTILINE)
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
LOG = "<!-- log: speed -->"
"""Stands for the dated entries in `docs/speed`, the newest first."""

log = logging.getLogger("mkdocs.hooks.pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that are made from the code and from files outside of `docs/`."""
    os.chdir(ROOT)
    pages: dict[str, str | bytes] = {
        "reference/commands.md": commands_page(),
        "reference/python.md": python_page(),
        "reference/changes.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "findings/index.md": _findings(),
    }
    pages |= gallery_page()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Puts tables and the speed log into a page that asks for them."""
    if LOG in markdown:
        entries = sorted((ROOT / "docs" / "speed").glob("*.md"), reverse=True)
        markdown = markdown.replace(LOG, "\n".join(entry.read_text(encoding="utf-8") for entry in entries))
    return MARK.sub(lambda mark: _table(mark[1], page.file.src_uri), markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Fails on anything that a page loads from a network: the site is to be read from its folder."""
    for tag in LOADED.findall(output):
        if 'rel="canonical"' not in tag:
            log.warning("%s loads from a network: %s", page.file.src_uri, tag)
    return output


def _table(name: str, where: str) -> str:
    if name not in TABLES:
        log.warning("%s asks for a table that does not exist: %s", where, name)
        return ""
    return TABLES[name]()


def _findings() -> str:
    """The findings, with links from where the site has them."""
    text = (ROOT / "FINDINGS.md").read_text(encoding="utf-8")
    return text.replace("](docs/findings/", "](").replace("](docs/", "](../")
