"""Reads checkpoint files after checking them for damage.

A checkpoint is torch's zip archive, in which every record has a CRC-32. torch ignores it when it maps a file, so a
flipped bit would silently become another number; `check_whole` compares them all.
"""

from __future__ import annotations

import errno
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explore.files import check_regular
from explore.machine import is_passing
from explore.terminal import plain_console

BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(RuntimeError, NotImplementedError, ValueError, LookupError, OverflowError),
)
"""Errors of Python's zip reader for a damaged archive."""


class DamagedError(ValueError):
    """A checkpoint is damaged."""


def check_whole(path: Path) -> None:
    """Compares all records of a checkpoint with their checksums.

    Raises:
        DamagedError: a checksum differs, or the file is truncated, empty or not a checkpoint.
        ValueError: it is a FIFO, a socket or a device.
        OSError: the file cannot be read.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except BROKEN as error:
        raise DamagedError(f"{path}: is damaged ({' '.join(str(error).split())})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position before the start of the file
            raise
        raise DamagedError(f"{path}: is damaged ({error.strerror})") from None
    if damaged is not None:
        raise DamagedError(f"{path}: is damaged (checksum of {damaged})")


def load_checkpoint(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """Returns the content of a checked checkpoint.

    Args:
        mmap: whether to map the file; otherwise it is read into writable memory.

    Raises:
        ValueError: the file is not a checkpoint with weights.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: must hold tensors and plain values only; other objects are never read") from None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{path}: must be a checkpoint, with tensors in state_dict")
    return dict(content)


def read_partial(path: Path, key: str) -> dict[str, Any]:
    """Returns the work that an earlier process saved under this key; empty if there is none.

    A damaged file is removed with a note on stderr, so that the work starts over.

    Args:
        path: a file of `torch.save` that holds a dictionary, with the key under `key`.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: it does not fit into memory.
    """
    if not path.exists():
        return {}
    try:
        check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *BROKEN) as error:
        if is_passing(error):
            raise
        found = " ".join(str(error).split())
        line = found if isinstance(error, DamagedError) else f"{path}: is damaged ({found[:100]})"
        path.unlink(missing_ok=True)
        note = f"note: {line}; it is removed, and the work starts over"
        plain_console().print(note, highlight=False, soft_wrap=True)
        return {}
    return content if isinstance(content, dict) and content.get("key") == key else {}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights and buffers in a checkpoint, by their names in the model.

    Raises:
        DamagedError: the checkpoint is damaged.
        ValueError: the file is not a checkpoint.
    """
    check_whole(checkpoint)
    return weights_in(load_checkpoint(checkpoint))


def weights_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights and buffers in the content of a checkpoint, by their names in the model."""
    return {name.removeprefix("model."): weight for name, weight in content["state_dict"].items()}
