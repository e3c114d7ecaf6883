"""The code blocks of the README and of the pages in docs/, and functions to run them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "FINDINGS.md",
        ROOT / "sweeps" / "README.md",
        ROOT / "kernels" / "README.md",
        *sorted(path for path in (ROOT / "docs").rglob("*.md") if "template" not in path.name),
    )
}

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run: slow|not run: [^>]+) -->\n+)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`(explore [a-z][^`]*)`")


class Block(NamedTuple):
    """A code block of a page.

    Attributes:
        mark: what the comment above it says; empty without one.
        title: file that the page says it is.
    """

    language: str
    text: str
    mark: str
    title: str

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith("not run")

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of every call of explore."""
        return [] if self.language in ("python", "json", "text") else [*_commands(self.text)]


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(each["language"], each["text"], each["mark"] or "", each["title"] or "") for each in found]


def mentioned(page: Path) -> list[list[str]]:
    """Arguments of every call of explore that the text of a page mentions; they need not be complete."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [shlex.split(" ".join(each.split()))[1:] for each in INLINE.findall(text)]


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "explore":
            yield words[1:]
