"""Error messages on one line, with values of at most 80 characters."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from explore.foreign import ECHO_CHARS, shorten

_LONG = ECHO_CHARS + 1
_QUOTED = re.compile(rf"""(?<!\w)(?P<mark>['"])(?:(?!(?P=mark)).){{{_LONG},}}?(?P=mark)(?!\w)""")
"""A long text in quotation marks, with blanks or without; an apostrophe within a word is none."""
_WORD = re.compile(rf"\S{{{_LONG},}}")
_PART = re.compile(rf"""[^\s/'"]{{{_LONG},}}""")
"""A long name between two slashes."""

NAME_BYTES = 255
"""Bytes of the longest name of a file on the usual file systems."""


def plain(error: Exception) -> str:
    """The message of an error, without the number of an operating-system error."""
    from pydantic import ValidationError

    from explore.config import explain

    if isinstance(error, ValidationError):
        return explain(error)
    if isinstance(error, OverflowError):
        return f"a number is too large ({error})"
    if isinstance(error, OSError) and error.strerror:
        given = error.filename2 or error.filename  # of a rename, the new name
        name = "" if given is None else os.fsdecode(given)
        if error.errno == errno.ENAMETOOLONG and name:
            longest = max(len(os.fsencode(part)) for part in name.split("/"))
            if longest > NAME_BYTES:
                return f"{name}: the name of a file must have at most {NAME_BYTES} bytes, got {longest}"
        return f"{name}: {error.strerror}" if name else error.strerror
    return str(error) or type(error).__name__


def cut_values(line: str) -> str:
    """Cuts every value in a line to 80 characters; a path in a folder that exists stays whole, for copying."""
    return _WORD.sub(_cut_word, _QUOTED.sub(_cut, line))


def _cut(match: re.Match[str]) -> str:
    return match[0] if _is_here(match[0]) else shorten(match[0])


def _cut_word(match: re.Match[str]) -> str:
    return _PART.sub(lambda part: shorten(part[0]), match[0]) if _is_here(match[0]) else shorten(match[0])


def _is_here(word: str) -> bool:
    from explore.files import exists

    path = word.strip("'\"():,;")
    return "/" in path and exists(Path(path).parent)
