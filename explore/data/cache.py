"""The cache folder: what can be made again, never pickled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached file, under `$EXPLORE_CACHE` or `~/.cache/explore`.

    Raises:
        ValueError: the folder cannot be made.
    """
    root = os.environ.get("EXPLORE_CACHE") or "~/.cache/explore"
    folder = Path(root).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"EXPLORE_CACHE: {root!r} must be a folder that can be written ({error.strerror})") from error
    return folder
