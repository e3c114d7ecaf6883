"""Finds passages shared by training and evaluation text: copies of parts of documents."""

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

SHORTEST = 32
"""Minimum bytes of a compared passage; shorter ones recur in many texts."""

FEWEST = 8
"""Minimum number of passages for a meaningful share."""

NOTED, REFUSED = 0.25, 0.9
"""Shares of evaluation passages in the training text that give a note; code of different projects shares 1/20."""

ENDING = 6
"""A word ends a passage if the checksum of its last bytes is a multiple of this number."""

LONG_WORD = 64
"""A word of more bytes ends a passage: text without blanks, such as Chinese, has one long word for each line."""

SAMPLE = 1 << 16
_LONGEST_PASSAGE = 1 << 16
_DTYPE = np.dtype("<u8")
_IS_BLANK = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


def check_overlap(parts: Sequence[Part]) -> list[str]:
    """Checks how much of the text of val and test is in the training parts.

    Returns:
        One note for each part of val or test that shares many passages.

    Raises:
        ValueError: a part of val or test shares almost all its passages.
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
        share = float(found.mean()) if len(some) >= FEWEST else 0.0
        finding = f"{share:.0%} of {Path(part.name).name} is in the training text"
        if share >= REFUSED:
            raise ValueError(f"{finding}; {part.split} must be text that is not in the training text")
        if share >= NOTED:
            notes.append(f"{finding}: scores on {part.split} are better than on new text")
    return notes


def sample_passages(chunks: Iterable[Chunk]) -> tuple[np.ndarray, int]:
    """Returns keys of the distinct passages of at least `SHORTEST` bytes; for a long text, of a sample of them.

    Returns:
        The keys, and the mask of the sample: sampled keys are 0 in all bits of the mask.
    """
    keys, mask = set[int](), 0
    for passage in _passages(chunks):
        words = b" ".join(passage.split())
        if len(words) < SHORTEST:
            continue
        checksum = zlib.crc32(words)
        if checksum & mask:
            continue
        keys.add(int.from_bytes(hashlib.blake2b(words, digest_size=4).digest()) << 32 | checksum)
        if len(keys) > SAMPLE:
            mask = 2 * mask + 1
            keys = {key for key in keys if not key & mask}
    return np.array(sorted(keys), _DTYPE), mask


def _sample_of(part: Part) -> tuple[np.ndarray, int]:
    cached = cache_folder("documents") / f"{part.content_hash[:32]}.passages"
    if (found := open_array(cached, _DTYPE, {"passages_of": part.content_hash})) is not None:
        return found[0], int(found[1]["mask"])
    with progress(f"looking for text of {Path(part.name).name} in other splits", None) as report:

        def chunks() -> Iterator[Chunk]:
            done = 0
            for opens, text in part.read():
                done += len(text)
                report(done)
                yield opens, text

        keys, mask = sample_passages(chunks())
    save_array(cached, keys, {"passages_of": part.content_hash, "mask": mask})
    return keys, mask


def _passages(chunks: Iterable[Chunk]) -> Iterator[bytes]:
    """Cuts documents into passages; those longer than `_LONGEST_PASSAGE` lose a part.

    Only the words themselves decide where a passage ends. So a copy is cut as the original is, except at its ends,
    wherever it begins and however its lines are broken.
    """
    rest = b""
    for opens, text in chunks:
        if opens:
            yield rest
            rest = b""
        data = rest[:_LONGEST_PASSAGE] + text.encode(errors="surrogatepass")
        start = 0
        for end in _ends(data):
            yield data[start:end]
            start = end
        rest = data[start:]
    yield rest


def _ends(text: bytes) -> list[int]:
    """The positions after words that end a passage: words with certain last three bytes, and long ones."""
    data = np.frombuffer(text, np.uint8)
    blank = _IS_BLANK[data]
    last = np.flatnonzero(blank[1:] & ~blank[:-1])  # the last byte of each word that a blank follows
    first = np.flatnonzero(~blank & np.insert(blank[:-1], 0, True))[: len(last)]
    length = last - first + 1
    checksum = np.zeros(len(last), np.uint32)
    for i, factor in enumerate((131, 1511, 7879)):
        checksum += data[last - i] * np.where(length > i, factor, 0).astype(np.uint32)
    ends: list[int] = (last[(checksum % ENDING == 0) | (length > LONG_WORD)] + 1).tolist()
    return ends
