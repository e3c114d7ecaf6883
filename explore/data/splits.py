"""Train, val and test: how a name says it, and how a document is cut where there are too few to share out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from explore.data.documents import index_documents

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

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

EVAL_SHARE = 0.05


@dataclass(frozen=True)
class Part:
    """Documents that come from one place: a file, or one split of a data set.

    Attributes:
        read: opens the part and yields its documents, in order.
        index: digest and length of each of them.
    """

    name: str
    split: Split
    read: Callable[[], Iterator[str]]
    index: np.ndarray

    @property
    def digests(self) -> list[bytes]:
        found: list[bytes] = self.index["digest"].tolist()
        return found

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.index["digest"].tobytes()).hexdigest()


def split_of(name: str) -> Split | None:
    """The split that a file or data set split says it is, by its name."""
    match = _NAMED.fullmatch(name.lower())
    return WORDS[match[1] or match[2]] if match else None


def cut_part(name: str, part: Part, taken: Sequence[Split]) -> Iterator[Part]:
    """The part as one part for each split that has none of its own; parts of val and test stay as they are.

    Raises:
        ValueError: a document has too few lines.
    """
    if part.split != "train":
        yield part
        return
    for i, split in enumerate(("train", *taken)):

        def read(i: int = i) -> Iterator[str]:
            return (cut(text, len(taken))[i] for text in part.read())

        try:
            yield replace(part, split=split, read=read, index=index_documents(read()))
        except ValueError as error:
            raise ValueError(f"corpus: {name!r}: {error}") from error


def cut(text: str, n_eval: int) -> list[str]:
    """Cuts one document at paragraphs (or lines, if it has too few) into contiguous parts.

    Returns:
        1 + n_eval parts; all but the first hold about one twentieth of the characters each.

    Raises:
        ValueError: fewer paragraphs and lines than parts.
    """
    ends: list[int] = []
    for boundary in (r"\n\s*\n", r"\n\s*\n|\n"):
        ends = [match.end() for match in re.finditer(boundary, text)]
        ends = [end for end in ends if len(text) - len(text.lstrip()) < end < len(text.rstrip())]
        if len(ends) >= n_eval:
            break
    else:
        raise ValueError(f"{1 + n_eval} splits cannot be cut from {len(ends) + 1} lines of text")
    cuts, first = [0], 0
    for left in range(n_eval, 0, -1):
        target = (1 - left * EVAL_SHARE) * len(text)
        open_ends = range(first, len(ends) - left + 1)
        nearest = min(open_ends, key=lambda i: abs(ends[i] - target))
        cuts.append(ends[nearest])
        first = nearest + 1
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
