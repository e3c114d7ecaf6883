"""Finds lines shared by training and evaluation text: copies of parts of documents."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from explore.data.cache import cache_folder, open_array, save_array
from explore.data.documents import Chunk
from explore.data.progress import progress
from explore.data.splits import Part

LINE_CHARS = 32
"""Minimum characters of a compared line; shorter lines recur in many texts."""

FEWEST_LINES = 8
"""Minimum number of lines for a meaningful share."""

NOTED, REFUSED = 0.25, 0.9
"""Shares of evaluation lines in the training text that give a note; code of different projects shares 1/8."""

SAMPLE = 1 << 16
_LONGEST_LINE = 1 << 16
_DTYPE = np.dtype("<u8")


def check_overlap(parts: Sequence[Part]) -> list[str]:
    """Checks how many lines of val and test are in the training parts.

    Returns:
        One note for each part of val or test that shares many lines.

    Raises:
        ValueError: a part of val or test shares almost all its lines.
    """
    if len({part.split for part in parts}) == 1:
        return []
    samples = [(part, *_sample_of(part)) for part in parts]
    training = [(keys, mask) for part, keys, mask in samples if part.split == "train"]
    notes = []
    for part, keys, mask in samples:
        if part.split == "train":
            continue
        common = np.uint64(max([mask, *(mask for _, mask in training)]))
        some = keys[keys & common == 0]
        found = np.isin(some, np.concatenate([keys for keys, _ in training]))
        share = float(found.mean()) if len(some) >= FEWEST_LINES else 0.0
        finding = f"{share:.0%} of the lines of {Path(part.name).name} are in the training text"
        if share >= REFUSED:
            raise ValueError(f"{finding}; {part.split} must be text that is not in the training text")
        if share >= NOTED:
            notes.append(f"{finding}: scores on {part.split} are better than on new text")
    return notes


def sample_lines(chunks: Iterable[Chunk]) -> tuple[np.ndarray, int]:
    """Returns keys of the distinct lines of at least `LINE_CHARS`; for a long text, of a sample of them.

    Returns:
        The keys, and the mask of the sample: sampled keys are 0 in all bits of the mask.
    """
    keys, mask = set[int](), 0
    for line in map(str.strip, _lines(chunks)):
        if len(line) < LINE_CHARS:
            continue
        raw = line.encode()
        checksum = zlib.crc32(raw)
        if checksum & mask:
            continue
        keys.add(int.from_bytes(hashlib.blake2b(raw, digest_size=4).digest()) << 32 | checksum)
        if len(keys) > SAMPLE:
            mask = 2 * mask + 1
            keys = {key for key in keys if not key & mask}
    return np.array(sorted(keys), _DTYPE), mask


def _sample_of(part: Part) -> tuple[np.ndarray, int]:
    cached = cache_folder("documents") / f"{part.content_hash[:32]}.lines"
    if (found := open_array(cached, _DTYPE, {"lines_of": part.content_hash})) is not None:
        return found[0], int(found[1]["mask"])
    with progress(f"looking for lines of {Path(part.name).name} in other splits", None) as report:

        def chunks() -> Iterator[Chunk]:
            done = 0
            for opens, text in part.read():
                done += len(text)
                report(done)
                yield opens, text

        keys, mask = sample_lines(chunks())
    save_array(cached, keys, {"lines_of": part.content_hash, "mask": mask})
    return keys, mask


def _lines(chunks: Iterable[Chunk]) -> Iterator[str]:
    """Yields the lines of documents; lines longer than `_LONGEST_LINE` lose a part."""
    rest = ""
    for opens, text in chunks:
        if opens:
            yield rest
            rest = ""
        *lines, rest = (rest[:_LONGEST_LINE] + text).split("\n")
        yield from lines
    yield rest
