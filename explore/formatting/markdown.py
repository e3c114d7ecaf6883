"""Formats text from users, such as names and reasons, as Markdown that shows it literally."""

from __future__ import annotations

import html
import re

_MARKS = frozenset("`\\<[")
"""Characters that end inline code or mean something to renderers that do not follow CommonMark there."""


def inline(text: str) -> str:
    """Escapes any text to one literal line of Markdown: no HTML, no links, no new table cells."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", escaped)


def code(text: str) -> str:
    """Formats any text as one line of inline code in a table; text with markup is escaped instead."""
    line = " ".join(text.split())
    return inline(line) if not line or _MARKS & set(line) else "`" + line.replace("|", "\\|") + "`"
