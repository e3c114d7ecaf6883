"""Text from elsewhere: JSON that anyone may have written, and values as error messages quote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

ECHO_CHARS = 80
GAP = "..."

_PASSWORDS = re.compile(
    r"""((?:postgres|mysql|mariadb|oracle|mssql|grpc|redis|https?)[\w+]*:/{1,3}[^\s/:@'"[]*)  # scheme and user
        :(?:[^\s'"]+(?=@)|(?!\d+\b)[^\s'"]+)  # up to the last @; or, if it was forgotten, what is no port
      | ([?&]\w*(?:pass|pwd|secret|token)\w*)=[^&\s'"]+""",
    re.VERBOSE,
)
"""Passwords in the addresses of databases, before their host or in their query."""


def echo(value: object) -> str:
    """A value as an error message shows it: its `repr`, cut in the middle to 80 characters."""
    if isinstance(value, str) and len(value) > 4 * ECHO_CHARS:  # a long one need not be escaped whole
        value = value[: 2 * ECHO_CHARS] + value[-2 * ECHO_CHARS :]
    try:
        return shorten(repr(value))
    except (RecursionError, ValueError):  # a list in a list in a list ..., or an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too large to show"


def check_type(value: object, allowed: type | tuple[type, ...], rule: str) -> None:
    """Refuses a value of another type in one sentence.

        check_type(runs, pd.DataFrame, "runs must be a table, as explore.load_runs gives it")

    Raises:
        TypeError: the rule, and what was given instead.
    """
    if not isinstance(value, allowed):
        name = type(value).__name__
        given = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
        raise TypeError(f"{rule}, got {echo(value) if isinstance(value, str | int | float | None) else given}")


def shorten(text: str, length: int = ECHO_CHARS) -> str:
    """A text of at most this many characters, cut in the middle."""
    half = (length - len(GAP)) // 2
    return text if len(text) <= length else text[: length - len(GAP) - half] + GAP + text[-half:]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`did you mean 'NAME'? ` with the nearest name that is allowed; empty where none is near."""
    return "".join(f"did you mean {near!r}? " for near in get_close_matches(name, list(allowed), 1))


def hide_passwords(text: str) -> str:
    """A line with the addresses of databases in it, without their passwords."""
    return _PASSWORDS.sub(lambda match: match[1] or match[2], text)


def parse_json(text: str | bytes) -> Any:
    """Reads JSON; a byte-order mark is skipped.

    Raises:
        ValueError: what is wrong, in one line.
    """
    try:
        return json.loads((text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, byte {error.start} is not ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON must not be nested this deeply") from None
    except ValueError:  # the only one left: Python refuses to convert so many digits
        raise ValueError("an integer in JSON must have at most 4,300 digits") from None
