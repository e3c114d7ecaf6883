"""Untrusted text: JSON from any source, and values quoted in error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

ECHO_CHARS = 80
GAP = "..."

_PASSWORDS = re.compile(
    r"""(\b[A-Za-z][\w+.-]+:/{1,3}[^\s/:@'"[]*)  # scheme and user
        :(?:[^\s'"]+(?=@)|(?!\d+\b|port\b)(?:[^'"\n]+(?=@)|[^\s'"]+))  # to the last @; without one, anything but a port
      | ([?&]\w*(?:pass|pwd|secret|token|key)\w*)=[^&\s'"]+""",
    re.VERBOSE,
)
"""Passwords in addresses of any scheme, before their host or in their query."""


def echo(value: object) -> str:
    """Formats a value for an error message: its `repr`, cut in the middle to 80 characters."""
    if isinstance(value, str) and len(value) > 4 * ECHO_CHARS:  # avoids escaping all of a long text
        value = value[: 2 * ECHO_CHARS] + value[-2 * ECHO_CHARS :]
    try:
        return shorten(repr(value))
    except (RecursionError, ValueError):  # a list in a list in a list ..., or an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too large to show"


def check_type(value: object, allowed: type | tuple[type, ...], rule: str) -> None:
    """Raises a one-sentence error for a value of the wrong type.

        check_type(runs, pd.DataFrame, "runs must be a table, as explore.load_runs gives it")

    Raises:
        TypeError: the message is the rule and the given value.
    """
    if not isinstance(value, allowed):
        name = type(value).__name__
        given = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
        raise TypeError(f"{rule}, got {echo(value) if isinstance(value, str | int | float | None) else given}")


def shorten(text: str, length: int = ECHO_CHARS) -> str:
    """Cuts a text in the middle to at most this many characters."""
    half = (length - len(GAP)) // 2
    return text if len(text) <= length else text[: length - len(GAP) - half] + GAP + text[-half:]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`did you mean 'NAME'? ` with the nearest allowed name; empty if none is close."""
    return "".join(f"did you mean {near!r}? " for near in get_close_matches(name, list(allowed), 1))


def hide_passwords(text: str) -> str:
    """Removes the passwords from database addresses in a line."""
    return _PASSWORDS.sub(lambda match: match[1] or match[2], text)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; skips a byte-order mark.

    Raises:
        ValueError: the text is not valid JSON; the message is one line.
    """
    try:
        return json.loads((text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, byte {error.start} is not ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON must not be nested this deeply") from None
    except ValueError:  # the only other case: Python refuses to convert so many digits
        raise ValueError("an integer in JSON must have at most 4,300 digits") from None
