"""Hugging Face data sets as parts of a corpus, from the hub or a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from explore.data.documents import Chunk, index_chunks
from explore.data.splits import Part, Split, split_of
from explore.foreign import echo


def load_parts(name: str) -> list[Part]:
    """Loads `hf:NAME`, `hf:NAME:CONFIG` or `hf:FOLDER` with `datasets.load_dataset`.

    Raises:
        ValueError: `datasets` is not installed, the data set cannot be loaded, or it has no text to train on.
    """
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path:
        raise ValueError(f"corpus: {echo(name)} must name a data set: hf:NAME, hf:NAME:CONFIG or hf:FOLDER")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"corpus: {echo(name)} needs an extra: pip install 'hybrid-frontier[hf]'") from error
    try:
        loaded = datasets.load_dataset(path, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"corpus: hf: must be followed by the name or folder of a data set, got {echo(name)} ({reason})"
        ) from error
    found = {key: split for key in loaded if (split := split_of(key))}
    if "train" not in found.values():
        raise ValueError(f"corpus: {echo(name)} must have a split train, found {echo(', '.join(loaded))}")
    return [_part(name, key, split, loaded[key]) for key, split in found.items()]


def _part(name: str, key: str, split: Split, dataset: Any) -> Part:
    if "text" not in dataset.column_names:
        raise ValueError(f'corpus: {echo(name)} needs the column "text", found {echo(", ".join(dataset.column_names))}')
    column = dataset.select_columns("text")

    def read() -> Iterator[Chunk]:
        return ((True, text) for rows in column.iter(batch_size=1000) for text in rows["text"] if text and text.strip())

    return Part.whole(f"{name}[{key}]", split, read, index_chunks(read()))
