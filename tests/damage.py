"""Damage that a power cut or a bad disk does to a file."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping


def cut(content: bytes) -> bytes:
    """The first half."""
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    """Zeros of the same length."""
    return bytes(len(content))


def flipped(content: bytes) -> bytes:
    """A file of `torch.save` with one bit of a number in its largest tensor flipped."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        record = max(archive.infolist(), key=lambda each: each.file_size)
    n_name, n_extra = struct.unpack_from("<HH", content, record.header_offset + 26)
    start = record.header_offset + 30 + n_name + n_extra
    place = start + (record.file_size // 2 | 7)  # the last byte of a number: sign and exponent
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


DAMAGE: Mapping[str, Callable[[bytes], bytes]] = {"cut": cut, "zeroed": zeroed, "flipped": flipped}
