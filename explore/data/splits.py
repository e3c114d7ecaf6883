"""Train, val and test: which split a name means, and which document goes where."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt8

from explore.data.cache import cache_folder, open_array, save_array
from explore.data.cutting import EVAL_SHARE, cut_chunks, cut_places
from explore.data.documents import INDEX_DTYPE, Chunk, index_chunks
from explore.foreign import echo

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

TRAIN, NOWHERE = 0, len(SPLITS)
"""Owner of a training document, as index in `SPLITS`, and of a document that is left out."""

WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
# `train-00`, `train_part1`, `austen-train`, `my-corpus-train-00`; but not `testament` or `crash-test-dummies`.
_NAMED = re.compile(rf"(?:({_WORD})(?![a-z]).*|.+[-_.]({_WORD})(?:[-_.]?\d.*)?)")


@dataclass(frozen=True, eq=False)
class Part:
    """Documents from one source: a file, or one split of a data set.

    Attributes:
        split: the split that its name means.
        read: a function that opens the part and yields its documents in chunks, in order.
        index: digest and length of each document.
        owners: index in `SPLITS` of each document, or `NOWHERE`; None assigns all to `split`.
    """

    name: str
    split: Split
    read: Callable[[], Iterator[Chunk]]
    index: np.ndarray
    owners: UInt8[np.ndarray, " documents"]

    @classmethod
    def whole(cls, name: str, split: Split, read: Callable[[], Iterator[Chunk]], index: np.ndarray) -> Part:
        """Makes a part whose documents are all in the split of its name."""
        return cls(name, split, read, index, np.full(len(index), SPLITS.index(split), np.uint8))

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.index["digest"].tobytes()).hexdigest()

    def document(self, number: int) -> Iterator[str]:
        """The chunks of one document."""
        found = -1
        for opens, text in self.read():
            found += opens
            if found > number:
                return
            if found == number:
                yield text


def split_of(name: str) -> Split | None:
    """The split that the name of a file or of a data set's split means, or None."""
    match = _NAMED.fullmatch(name.lower())
    return WORDS[match[1] or match[2]] if match else None


def ranks(parts: Sequence[Part]) -> Int32[np.ndarray, " documents"]:
    """Rank of each document's digest among the distinct digests, in byte order."""
    index = parts[0].index if len(parts) == 1 else np.concatenate([part.index for part in parts])
    # A row is five words of 8 bytes; the first four are the digest.
    words = np.ascontiguousarray(index).view(">u8").reshape(-1, INDEX_DTYPE.itemsize // 8)[:, :4]
    order = np.lexsort(words.T[::-1])
    differs = np.zeros(len(order), bool)  # from its predecessor
    for word in words.T:
        differs[1:] |= word[order[1:]] != word[order[:-1]]
    found = np.empty(len(order), np.int32)
    found[order] = np.cumsum(differs, dtype=np.int32)
    return found


def with_owners(parts: Sequence[Part], owners: UInt8[np.ndarray, " documents"]) -> list[Part]:
    """Returns the parts with new owners of their documents; `owners` concatenates the parts."""
    ends = np.cumsum([len(part.index) for part in parts])[:-1]
    return [replace(part, owners=some) for part, some in zip(parts, np.split(owners, ends), strict=True)]


def share_out(sources: Sequence[Part], taken: Sequence[Split]) -> list[Part] | None:
    """Moves one in twenty of the training documents, by smallest digest, to each split in `taken`.

    At least one each; equal documents stay together.

    Returns:
        The parts with their new owners; None if there are too few different documents.
    """
    rank, owners = ranks(sources), np.concatenate([part.owners for part in sources])
    training = owners == TRAIN
    present = np.zeros(len(rank), bool)
    present[rank[training]] = True
    n_different = np.count_nonzero(present)
    if n_different <= len(taken):
        return None
    share = max(1, round(EVAL_SHARE * n_different))
    place = np.cumsum(present, dtype=np.int32) - 1  # rank of a digest among those of training documents
    moved = np.full(len(rank), TRAIN, np.uint8)
    for i, split in enumerate(taken):
        moved[i * share : (i + 1) * share] = SPLITS.index(split)
    owners[training] = moved[place[rank[training]]]
    return with_owners(sources, owners)


def without_leaks(name: str, parts: Sequence[Part], leaks: Literal["refuse", "drop"]) -> list[Part]:
    """Finds documents that are in two splits; raises an error or drops them from the earlier split.

    Raises:
        ValueError: there is such a document and `leaks` is `refuse`.
    """
    if len(set().union(*(np.unique(part.owners).tolist() for part in parts)) - {NOWHERE}) < 2:
        return list(parts)
    rank, owners = ranks(parts), np.concatenate([part.owners for part in parts])
    kept = owners != NOWHERE
    last = np.zeros(len(rank), np.uint8)  # the split of each digest
    np.maximum.at(last, rank[kept], owners[kept])
    leaked = kept & (owners != last[rank])
    if not leaked.any():
        return list(parts)
    if leaks == "drop":
        owners[leaked] = NOWHERE
        return with_owners(parts, owners)
    copies = np.flatnonzero(kept & (rank == rank[leaked.argmax()]))
    firsts = np.cumsum([0, *(len(part.index) for part in parts)])
    holders = [parts[int(np.searchsorted(firsts, row, side="right")) - 1] for row in copies]
    places = dict.fromkeys(
        f"{SPLITS[owners[row]]} ({Path(part.name).name})" for row, part in zip(copies, holders, strict=True)
    )
    number = int(copies[0] - firsts[parts.index(holders[0])])
    beginning = next(holders[0].document(number))[:60]
    raise ValueError(
        f"corpus: {echo(name)}: the same document is in {' and '.join(places)}, and a document may be in one split "
        f"only; it begins {beginning!r}"
    )


def cut_part(part: Part, taken: Sequence[Split]) -> tuple[Part, bool]:
    """Cuts each training document of a part into one piece for training and one for each split in `taken`.

    Returns:
        The part with its pieces as documents, and whether a cut falls within a line.

    Raises:
        ValueError: a document is too short.
    """
    digests, owners = part.index["digest"].tolist(), part.owners.tolist()
    key = hashlib.sha256(f"{part.content_hash} {owners} {len(taken)}".encode()).hexdigest()
    cached = cache_folder("documents") / f"{key[:32]}.pieces"
    found = open_array(cached, INDEX_DTYPE, {"pieces": key})
    cuts: dict[str, list[int]] = {} if found is None else found[1]["cuts"]
    cuts_line = False if found is None else bool(found[1]["cuts_line"])
    if found is None:
        for number, (digest, owner) in enumerate(zip(digests, owners, strict=True)):
            if owner == TRAIN and digest.hex() not in cuts:
                cuts[digest.hex()], within = cut_places(partial(part.document, number), len(taken))
                cuts_line = cuts_line or within
    places = [cuts[digest.hex()] if owner == TRAIN else [] for digest, owner in zip(digests, owners, strict=True)]

    def read() -> Iterator[Chunk]:
        # A document that was added since is detected by its digest.
        return cut_chunks(part.read(), lambda number: places[number] if number < len(places) else [])

    index = index_chunks(read()) if found is None else found[0]
    if len(index) != len(places) + sum(map(len, places)):
        raise ValueError(f"a piece of {part.name} without text would be a split")
    if found is None:
        save_array(cached, index, {"pieces": key, "cuts": cuts, "cuts_line": cuts_line})
    pieces = [TRAIN, *(SPLITS.index(split) for split in taken)]
    owner_of_pieces = [piece for owner in owners for piece in (pieces if owner == TRAIN else [owner])]
    return replace(part, read=read, index=index, owners=np.array(owner_of_pieces, np.uint8)), cuts_line
