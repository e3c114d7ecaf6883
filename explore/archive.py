"""Checkpoint files: checked for damage, and read.

A checkpoint is torch's zip archive, in which every record has a CRC-32. torch does not look at it where it maps a
file, and a flipped bit would go on as another number, so `check_whole` compares them all.
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

BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(RuntimeError, NotImplementedError, ValueError, LookupError, OverflowError),
)
"""What Python's reader of zip archives raises where an archive is not what was written."""


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


def check_whole(path: Path) -> None:
    """Compares all records of a checkpoint with their checksums.

    Raises:
        DamagedError: one differs, or the file is cut, empty or something else.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except BROKEN as error:
        raise DamagedError(f"{path}: is damaged ({' '.join(str(error).split())})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a position before the start of the file
            raise
        raise DamagedError(f"{path}: is damaged ({error.strerror})") from None
    if damaged is not None:
        raise DamagedError(f"{path}: is damaged (checksum of {damaged})")


def load_checkpoint(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """The content of a checkpoint that was checked.

    Args:
        mmap: map the file; otherwise read it into memory that may be written to.

    Raises:
        ValueError: the file is no checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: must hold tensors and plain values only; other objects are never read") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path}: must be a checkpoint, with a state_dict")
    return content


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights and buffers in a checkpoint, by their names in the model.

    Raises:
        DamagedError: the checkpoint is not whole.
        ValueError: the file is no checkpoint.
    """
    check_whole(checkpoint)
    return weights_in(load_checkpoint(checkpoint))


def weights_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights and buffers in the content of a checkpoint, by their names in the model."""
    return {name.removeprefix("model."): weight for name, weight in content["state_dict"].items()}
