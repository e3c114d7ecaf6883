"""A corpus: documents in three splits that share none, and a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from explore.data import documents
from explore.data.documents import digest
from explore.data.known import CORPORA, KnownCorpus, locate
from explore.data.splits import EVAL_SHARE, SPLITS, Part, Split, cut_part, split_of


class Corpus:
    """Documents in train, val and test; a document stands in exactly one of them.

    A split that has no part of its own is taken from the training documents: the documents with the smallest
    digests, one in twenty (at least one), so that equal documents stay together. Where there are fewer documents
    than splits, each is cut at paragraphs instead, 90/5/5.

    Args:
        leaks: what to do with a document that stands in parts of two splits: `refuse` the corpus, or `drop`
            it from training in favour of val, and from val in favour of test.

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
        parts = sorted(parts, key=lambda part: SPLITS.index(part.split))
        taken = [split for split in SPLITS if all(part.split != split for part in parts)]
        if taken and sum(len(set(part.digests)) for part in parts if part.split == "train") <= len(taken):
            parts, taken = [piece for part in parts for piece in cut_part(name, part, taken)], []
        self._owner: dict[bytes, Split] = {}
        for part in parts:
            for key in part.digests:
                if self._owner.get(key, part.split) != part.split and leaks == "refuse":
                    raise ValueError(_leak(name, parts, key))
                self._owner[key] = part.split
        ranked = sorted(key for key, split in self._owner.items() if split == "train")
        share = max(1, round(EVAL_SHARE * len(ranked)))
        for i, split in enumerate(taken):
            self._owner.update(dict.fromkeys(ranked[i * share : (i + 1) * share], split))
        self._parts = {
            split: [part for part in parts if part.split == ("train" if split in taken else split)] for split in SPLITS
        }
        self._rows = {split: [row for part in self._parts[split] for row in self._own(part, split)] for split in SPLITS}
        for split, rows in self._rows.items():
            if not rows:
                raise ValueError(f"corpus: {name!r} has no text for {split}; every split needs at least one document")

    def documents(self, split: Split) -> Iterator[str]:
        """Reads the documents of one split again, in their order in the files."""
        for part in self._parts[split]:
            for text in part.read():
                owner = self._owner.get(digest(text))
                if owner is None:
                    raise ValueError(f"corpus: {part.name} changed while it was read; try again")
                if owner == split:
                    yield text

    def content_hash(self, split: Split | None = None) -> str:
        """Hash of the documents of one split in order, or of all three; says nothing of names or paths."""
        if split is None:
            return hashlib.sha256("".join(map(self.content_hash, SPLITS)).encode()).hexdigest()
        return hashlib.sha256(b"".join(key for key, _ in self._rows[split])).hexdigest()

    def n_documents(self, split: Split) -> int:
        return len(self._rows[split])

    def n_bytes(self, split: Split) -> int:
        """Bytes of the split's text as UTF-8."""
        return sum(n_bytes for _, n_bytes in self._rows[split])

    @property
    def summary(self) -> dict[str, Any]:
        """Name, source, licence and, for each split, its parts, number of documents, bytes and hash."""
        return {
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "splits": {
                split: {
                    "parts": [part.name for part in self._parts[split]],
                    "n_documents": self.n_documents(split),
                    "n_bytes": self.n_bytes(split),
                    "content_hash": self.content_hash(split),
                }
                for split in SPLITS
            },
        }

    def _own(self, part: Part, split: Split) -> Iterator[tuple[bytes, int]]:
        rows = zip(part.digests, part.index["n_bytes"].tolist(), strict=True)
        return ((key, n_bytes) for key, n_bytes in rows if self._owner[key] == split)


def load_corpus(name: str, n_shards: int | None = None) -> Corpus:
    """Opens a corpus by name, by path, or from Hugging Face.

    In a folder, a file whose name starts with train, val, valid, validation, dev or test, or ends with it after
    a hyphen, is (a part of) that split; once there is a training file, files with other names are left out.

    Args:
        name: a name in `CORPORA`, a path to a .txt or .jsonl file (plain, .gz, .xz) or a folder of them, or
            `hf:` and the name or folder of a data set, with `:CONFIG` behind it where it has several.
        n_shards: use only the first training files, in name order.

    Raises:
        ValueError: nothing stands under that name, or what stands there is not fit for training.
    """
    if name.startswith("hf:"):
        from explore.data.hub import load_parts  # the only door to an optional dependency

        if n_shards is not None:
            raise ValueError(f"n_shards: {n_shards} needs training files, which {name!r} does not have; allowed: null")
        return Corpus(name, name, load_parts(name), leaks="drop")
    path = locate(name)
    files = _files(name, path)
    known = CORPORA.get(name)
    chosen = files if n_shards is None else _first_shards(name, files, n_shards)
    parts = [
        Part(str(file), split, partial(documents.read_documents, file), documents.index_file(file))
        for file, split in chosen
    ]
    if known is None:
        return Corpus(name, str(path), parts)
    _check_record(
        name, known, {documents.stem(file): part for (file, _), part in zip(chosen, parts, strict=True)}, n_shards
    )
    return Corpus(name, known.source, parts, known.licence)


def _files(name: str, path: Path) -> list[tuple[Path, Split]]:
    if path.is_file():
        if not documents.is_text_file(path):
            raise ValueError(f"corpus: {name!r} must be {documents.ALLOWED}, or a folder of such files")
        return [(path, "train")]
    files = [file for file in sorted(path.iterdir()) if documents.is_text_file(file)]
    if not files:
        raise ValueError(f"corpus: {name!r} holds no {documents.ALLOWED} file (subfolders are not searched)")
    named = [(file, split) for file in files if (split := split_of(documents.stem(file)))]
    if not named:
        return [(file, "train") for file in files]
    if all(split != "train" for _, split in named):
        raise ValueError(
            f"corpus: {name!r} has {named[0][0].name} but no training file; name one train*, "
            "or none of the files after a split"
        )
    return named


def _first_shards(name: str, files: list[tuple[Path, Split]], n_shards: int) -> list[tuple[Path, Split]]:
    if any(split not in {split for _, split in files} for split in SPLITS):
        raise ValueError(
            f"n_shards: {n_shards} needs a corpus with files for train, val and test, which {name!r} is not; "
            "allowed: null"
        )
    train = [file for file in files if file[1] == "train"]
    if n_shards > len(train):
        raise ValueError(f"n_shards: {n_shards} must be at most {len(train)}, the training files of {name!r}")
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


def _leak(name: str, parts: Sequence[Part], key: bytes) -> str:
    holders = [part for part in parts if key in set(part.digests)]
    text = next(text for text in holders[0].read() if digest(text) == key)
    places = " and ".join(f"{part.split} ({Path(part.name).name})" for part in holders)
    return (
        f"corpus: {name!r}: the same document stands in {places}, and a document may stand in one split only; "
        f"it begins {text[:60]!r}"
    )
