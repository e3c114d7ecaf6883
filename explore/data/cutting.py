"""Finds where to cut a long document into contiguous parts, reading it once in chunks."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from explore.data.documents import Chunk

EVAL_SHARE = 0.05

SMALLEST_TRAIN = 0.1
"""A cut at lines must leave at least this share of the text for training."""

SHORTEST_LINE_CUT = 1000
"""Characters that a text needs to be cut within a line."""

_WORD_CHARS = 1 << 16

# A run of blanks with a newline in it, from its first newline to its last.
_RUN = re.compile(r"\n(?:\s*\n)?")


def cut_places(read: Callable[[], Iterable[str]], n_eval: int) -> tuple[list[int], bool]:
    """Finds where to cut a document into 1 + n_eval parts: each but the first has about 1/20 of the characters.

    Cuts are at paragraphs, or at lines if there are too few paragraphs. A text with too few lines, or with almost all
    its characters in the last ones, is cut between words.

    Args:
        read: opens the document and yields its text in chunks.

    Returns:
        Number of characters before each cut, and whether a cut falls within a line.

    Raises:
        ValueError: the text is too short.
    """
    paragraphs, lines, n_chars = _Ends(n_eval), _Ends(n_eval), 0
    for found, n_chars in _line_ends(read()):
        paragraphs.extend([end for end, blank_between in found if blank_between], n_chars)
        lines.extend([end for end, _ in found], n_chars)
    targets = [(1 - left * EVAL_SHARE) * n_chars for left in range(n_eval, 0, -1)]
    candidates = [_nearest(ends.kept, targets) for ends in (paragraphs, lines) if ends.n >= n_eval]
    for places in candidates:
        if places[0] >= SMALLEST_TRAIN * n_chars or n_chars < SHORTEST_LINE_CUT:
            return places, False
    if n_chars >= SHORTEST_LINE_CUT:
        return _word_starts(read(), [int(target) for target in targets]), True
    raise ValueError(
        f"{1 + n_eval} splits cannot be cut from {lines.n + 1} lines of text; "
        f"at least {1 + n_eval} lines, or {SHORTEST_LINE_CUT:,} characters, are needed"
    )


def cut_chunks(chunks: Iterable[Chunk], places: Callable[[int], Sequence[int]]) -> Iterator[Chunk]:
    """Yields the same text, but with a new document at each place that `places` returns for a document number."""
    number, position, ahead = -1, 0, list[int]()
    for opens, text in chunks:
        if opens:
            number, position = number + 1, 0
            ahead = list(places(number))
        start = 0
        while ahead and ahead[0] < position + len(text):
            end = ahead.pop(0) - position
            if end > start:
                yield opens, text[start:end]
            opens, start = True, end
        yield opens, text[start:]
        position += len(text)


class _Ends:
    """Ends of lines or paragraphs: their number, and those that are still candidates for a cut.

    Cuts lie near the end of the text, so only the last few ends in the first nine tenths are kept.
    """

    def __init__(self, n_eval: int) -> None:
        self.n_eval, self.n, self.kept = n_eval, 0, array("Q")

    def extend(self, ends: Sequence[int], n_chars: int) -> None:
        """Adds ends in the first `n_chars` characters."""
        self.n += len(ends)
        self.kept.extend(ends)
        before = bisect_right(self.kept, (1 - self.n_eval * EVAL_SHARE) * n_chars)
        if (n := before - self.n_eval) > len(self.kept) // 8:
            del self.kept[:n]


def _line_ends(chunks: Iterable[str]) -> Iterator[tuple[list[tuple[int, bool]], int]]:
    """Yields, per chunk, the starts of nonblank lines except the first, and the number of characters up to its end.

    Each start has a flag for a preceding blank line, and may be reported one chunk late.
    """
    n_chars, begun = 0, False
    n_newlines, end = 0, 0  # of the current run of blanks
    for chunk in chunks:
        first, last = len(chunk) - len(chunk.lstrip()), len(chunk.rstrip())
        blanks = chunk[:first]
        if newlines := blanks.count("\n"):
            n_newlines, end = n_newlines + newlines, n_chars + blanks.rindex("\n") + 1
        found: list[tuple[int, bool]] = []
        if first < len(chunk):
            if begun and n_newlines:
                found.append((end, n_newlines > 1))
            found += [(n_chars + m.end(), m.end() - m.start() > 1) for m in _RUN.finditer(chunk, first, last)]
            blanks = chunk[last:]
            begun, n_newlines, end = True, blanks.count("\n"), n_chars + last + blanks.rfind("\n") + 1
        n_chars += len(chunk)
        yield found, n_chars


def _nearest(ends: Sequence[int], targets: Sequence[float]) -> list[int]:
    """Chooses a different end near each target."""
    places, first = [], 0
    for left, target in zip(range(len(targets), 0, -1), targets, strict=True):
        nearest = min(range(first, len(ends) - left + 1), key=lambda i: abs(ends[i] - target))
        places.append(ends[nearest])
        first = nearest + 1
    return places


def _word_starts(chunks: Iterable[str], targets: Sequence[int]) -> list[int]:
    """The start of the last word at or before each target; the target itself if no word starts near it."""
    places: list[int] = []
    tail, n_chars = "", 0
    for chunk in chunks:
        text, start = tail + chunk, n_chars - len(tail)
        n_chars += len(chunk)
        while len(places) < len(targets) and targets[len(places)] <= n_chars:
            target = targets[len(places)]
            window = text[: target - start][-_WORD_CHARS:]
            *before, word = window.rsplit(maxsplit=1) or [""]
            place = target - (0 if window[-1:].isspace() or not before else len(word))
            places.append(place if place > (places[-1] if places else 0) else target)
        tail = text[-_WORD_CHARS:]
    return places
