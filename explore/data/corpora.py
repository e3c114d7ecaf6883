"""A corpus: documents in three disjoint splits, and a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from explore.data import documents
from explore.data.documents import watched
from explore.data.known import CORPORA, KnownCorpus, locate
from explore.data.overlap import check_overlap
from explore.data.splits import SPLITS, Part, Split, cut_part, share_out, split_of, without_leaks
from explore.files import check_regular
from explore.foreign import echo

BLOCK_ROWS = 1 << 16


class Corpus:
    """Documents in train, val and test; a document is in exactly one of them.

    A split without its own part is taken from the training documents: the one in twenty (at least one) with the
    smallest digests, so that equal documents stay together. If there are fewer documents than splits, each document is
    instead cut at paragraphs, 90/5/5.

    Args:
        leaks: how to treat a document that is in two splits: `refuse` raises an error, `drop` removes it from training
            if it is in val or test, and from val if it is in test.

    Attributes:
        notes: notes for the user on how the splits were made, one line each.

    Raises:
        ValueError: a split without text, or a document in two splits.
    """

    def __init__(
        self,
        name: str,
        source: str,
        parts: Sequence[Part],
        licence: str | None = None,
        leaks: Literal["refuse", "drop"] = "refuse",
    ) -> None:
        self.name, self.source, self.licence = name, source, licence
        self.notes: tuple[str, ...] = ()
        parts = sorted(parts, key=lambda part: SPLITS.index(part.split))
        taken = [split for split in SPLITS if all(part.split != split for part in parts)]
        parts = without_leaks(name, parts, leaks)
        if taken and "train" not in taken:
            sources = [part for part in parts if part.split == "train"]  # training parts come first
            others = parts[len(sources) :]
            shared = share_out(sources, taken)
            parts = [*shared, *others] if shared else without_leaks(name, [*self._cut(sources, taken), *others], leaks)
        self._parts = parts
        for split in SPLITS:
            if not self.n_documents(split):
                raise ValueError(f"corpus: {echo(name)} has no text for {split}; every split needs a document")

    def _cut(self, sources: Sequence[Part], taken: Sequence[Split]) -> list[Part]:
        try:
            cut = [cut_part(part, taken) for part in sources]
        except ValueError as error:
            raise ValueError(f"corpus: {echo(self.name)}: {error}") from error
        self.notes = tuple(
            f"{Path(part.name).name} has too few lines: {' and '.join(taken)} are cut from its end between words"
            for part, cuts_line in cut
            if cuts_line
        )
        return [part for part, _ in cut]

    def documents(self, split: Split) -> Iterator[str]:
        """Reads the documents of one split again, in their order in the files."""
        return ("".join(chunks) for _, chunks in self.read([split]))

    def read(self, splits: Collection[Split] = SPLITS) -> Iterator[tuple[Split, Iterator[str]]]:
        """Reads every file of these splits once, and yields each document as chunks of text.

        Raises:
            ValueError: a file changed since it was opened.
        """
        wanted = [split in splits for split in SPLITS] + [False]
        for part in self._parts:
            if not any(wanted[owner] for owner in np.unique(part.owners)):
                continue
            for number, chunks in groupby(_checked(part), key=lambda numbered: numbered[0]):
                owner = part.owners[number]
                if wanted[owner]:
                    yield SPLITS[owner], (text for _, text in chunks)

    def content_hash(self, split: Split | None = None) -> str:
        """Hash of the documents of one split in order, or of all three splits; independent of names and paths."""
        if split is None:
            return hashlib.sha256("".join(map(self.content_hash, SPLITS)).encode()).hexdigest()
        digest = hashlib.sha256()
        for rows in self._rows(split):
            digest.update(rows["digest"].tobytes())
        return digest.hexdigest()

    def n_documents(self, split: Split) -> int:
        return sum(map(len, self._rows(split)))

    def n_bytes(self, split: Split) -> int:
        """Bytes of the split's text as UTF-8."""
        return sum(int(rows["n_bytes"].sum()) for rows in self._rows(split))

    @property
    def summary(self) -> dict[str, Any]:
        """Name, source, licence and, for each split, its parts, number of documents, bytes and hash."""
        return {
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "splits": {
                split: {
                    "parts": [part.name for part in self._parts if (part.owners == SPLITS.index(split)).any()],
                    "n_documents": self.n_documents(split),
                    "n_bytes": self.n_bytes(split),
                    "content_hash": self.content_hash(split),
                }
                for split in SPLITS
            },
        }

    def _rows(self, split: Split) -> Iterator[np.ndarray]:
        """The index of the split's documents, in blocks."""
        for part in self._parts:
            for start in range(0, len(part.index), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                yield part.index[block][part.owners[block] == SPLITS.index(split)]


def load_corpus(name: str, n_shards: int | None = None) -> Corpus:
    """Opens a corpus by name, by path, or from Hugging Face.

    In a folder, a file whose name starts with train, val, valid, validation, dev or test, or ends with it after
    a hyphen, is (a part of) that split; once there is a training file, files with other names are left out.

    Args:
        name: a name in `CORPORA`, a path to a .txt or .jsonl file (plain, .gz, .xz) or a folder of them, or
            `hf:` and the name or folder of a data set, followed by `:CONFIG` if it has several.
        n_shards: use only the first training files, in name order.

    Raises:
        ValueError: nothing has that name, or its text cannot be used for training.
    """
    if name.startswith("hf:"):
        from explore.data.hub import load_parts  # only here: it needs an optional dependency

        if n_shards is not None:
            raise ValueError(f"n_shards must be null for {echo(name)}, which has no training files, got {n_shards}")
        return Corpus(name, name, load_parts(name), leaks="drop")
    path = locate(name)
    files = _files(name, path)
    known = CORPORA.get(name)
    chosen = files if n_shards is None else _first_shards(name, files, n_shards)
    parts = [
        Part.whole(str(file), split, partial(documents.read_chunks, file), documents.index_file(file))
        for file, split in chosen
    ]
    if known is None:
        corpus = Corpus(name, str(path), parts)
        try:
            corpus.notes += tuple(check_overlap(parts))
        except ValueError as error:
            raise ValueError(f"corpus: {echo(name)}: {error}") from None
        return corpus
    _check_record(
        name, known, {documents.stem(file): part for (file, _), part in zip(chosen, parts, strict=True)}, n_shards
    )
    return Corpus(name, known.source, parts, known.licence)


def _checked(part: Part) -> Iterator[tuple[int, str]]:
    """Yields the chunks of a part, each with its document number; checks every document at its end."""
    digests = part.index["digest"]
    number = ended = -1

    def check(digest: bytes, n_bytes: int, blank: bool) -> None:
        nonlocal ended
        ended += 1
        if ended >= len(digests) or bytes(digests[ended]) != digest:
            raise _changed(part)

    for opens, text in watched(part.read(), check):
        number += opens
        if number >= len(digests):
            raise _changed(part)
        yield number, text
    if number + 1 != len(digests):
        raise _changed(part)


def _changed(part: Part) -> ValueError:
    return ValueError(f"corpus: {part.name} changed while it was read; try again")


def _files(name: str, path: Path) -> list[tuple[Path, Split]]:
    try:
        if not path.is_dir():
            check_regular(path)
            if not documents.is_text_file(path):
                raise ValueError(f"corpus: {echo(name)} must be {documents.ALLOWED}, or a folder of such files")
            return [(path, "train")]
        files = [file for file in sorted(path.iterdir()) if documents.is_text_file(file)]
        for file in files:
            check_regular(file)
    except OSError as error:
        raise ValueError(f"corpus: {echo(name)} cannot be read ({error.strerror})") from error
    if not files:
        raise ValueError(f"corpus: {echo(name)} holds no {documents.ALLOWED} file (subfolders are not searched)")
    named = [(file, split) for file in files if (split := split_of(documents.stem(file)))]
    if not named:
        return [(file, "train") for file in files]
    if all(split != "train" for _, split in named):
        raise ValueError(
            f"corpus: {echo(name)} has {named[0][0].name} but no training file; name one train*, "
            "or none of the files after a split"
        )
    return named


def _first_shards(name: str, files: list[tuple[Path, Split]], n_shards: int) -> list[tuple[Path, Split]]:
    if any(split not in {split for _, split in files} for split in SPLITS):
        raise ValueError(
            f"n_shards must be null for {echo(name)}, which does not have files for train, val and test, got {n_shards}"
        )
    train = [file for file in files if file[1] == "train"]
    if n_shards > len(train):
        raise ValueError(f"n_shards must be at most {len(train)}, the training files of {echo(name)}, got {n_shards}")
    return train[:n_shards] + [file for file in files if file[1] != "train"]


def _check_record(name: str, known: KnownCorpus, found: dict[str, Part], n_shards: int | None) -> None:
    train = [stem for stem in sorted(known.files) if split_of(stem) == "train"]
    left_out = set() if n_shards is None else set(train[n_shards:])
    expected = {stem: value for stem, value in known.files.items() if stem not in left_out}
    for stem in sorted(expected.keys() | found.keys()):
        value = found[stem].content_hash if stem in found else "no such file"
        if value != expected.get(stem):
            raise ValueError(
                f"corpus: {name!r}: {stem} must have the content hash {expected.get(stem, '(no such file on record)')}"
                f", found {value}; to use other text, give its path"
            )
