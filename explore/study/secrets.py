"""Removes secrets from storage URLs: passwords and every value in a query."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST = 4
"""Minimum length of a query value that may be a secret; a shorter one is a number or a switch."""


class _Parts(NamedTuple):
    """The part of a URL that may be shown, and its secrets."""

    shown: str
    secrets: tuple[str, ...]


def without_password(url: str) -> str:
    """The URL of a storage without password and query, also if it is malformed."""
    return _parts(url).shown


def hide_secrets(text: str, url: str) -> str:
    """A text, such as a database error, without the secrets of the storage's URL."""
    secrets = {form for secret in _parts(url).secrets for form in (secret, unquote(secret)) if form}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def hide_in_arguments(url: str | None) -> None:
    """Takes the secrets of a URL out of `sys.argv`, which Weights & Biases keeps with every run."""
    if url:
        sys.argv[:] = [argument.replace(url, without_password(url)) for argument in sys.argv]


def _parts(url: str) -> _Parts:
    """Splits a URL; when in doubt, treats a part as a password."""
    scheme = match[0] if (match := re.match(r"[\w+.-]+:/{1,3}|[\w+.-]*//", url)) else ""
    rest = url[len(scheme) :]
    if not scheme and "@" not in rest:  # no URL
        return _Parts(url, ())
    account, at, place = rest.rpartition("@")
    if "?" in account:  # in a password or before it
        return _Parts(f"{scheme}{HIDDEN}", tuple(re.split("[:/?&=@]", rest)))
    user, _, password = account.partition(":")
    place, _, query = place.partition("?")
    values = [value for pair in re.split("[&;]", query) if len(value := pair.partition("=")[2]) >= SHORTEST]
    forgotten = ""
    # A colon without a port: the user may have forgotten the @ after a password.
    if not scheme.endswith("///") and (wrong := re.match(r"(\[[^\]]*\]|[^:/\[]*):(?!\d+(?:/|$))", place)):
        place, forgotten = wrong[1], place[wrong.end() :]
    return _Parts(f"{scheme}{user}{at}{place}", (password, forgotten, *values))
