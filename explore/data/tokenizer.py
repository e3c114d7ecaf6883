"""Text to token ids and back: bytes, the shipped vocabulary, or any JSON file of the `tokenizers` package."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int64
from tokenizers import decoders, models, pre_tokenizers, trainers

from explore.data.known import ASSETS
from explore.files import check_regular, exists
from explore.foreign import echo, parse_json

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
TOKENIZERS: tuple[str, ...] = ("bytes", "austen-bpe-2048")

PIECE_CHARS = 1 << 16
"""Characters per piece of text, if cutting does not change its tokens."""

WHOLE_CHARS = 1 << 23
"""Characters per piece if it is not known where cutting is safe."""

LONGEST_WORD = 1 << 20
"""Most characters beyond the requested size without a blank; then the piece is cut, which may change a token."""

LARGEST_VOCABULARY = 1 << 20
"""Most entries of a vocabulary trained here."""

LARGEST_ID = (1 << 24) - 1
"""Largest allowed token id: tables have an entry for each id."""

# GPT-2's pattern never looks back, and none of its matches has a blank after a nonblank character.
_BLANK = re.compile(r"(?<=\S)[ \n]")


class Tokenizer(ABC):
    """Converts text to token ids and back. Special tokens are never parsed from text.

    Attributes:
        name: the name or path given to `load_tokenizer`.
        vocab_size: one more than the largest id.
        eot_id: id of the end-of-text token, which precedes each document.
        content_hash: hash of the tokenizer's behaviour, independent of its file.
        token_bytes: bytes of text per id; None if an id does not determine them.
    """

    name: str
    vocab_size: int
    eot_id: int
    content_hash: str
    token_bytes: Int64[np.ndarray, " vocab"] | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; special tokens have no text."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def pieces(self, chunks: Iterable[str], n_chars: int = PIECE_CHARS) -> Iterator[str]:
        """Cuts a document into pieces that are encoded separately.

        The pieces encode to the same ids as the whole if it is known where cutting is safe; otherwise only documents of
        more than `WHOLE_CHARS` are cut.

        Args:
            chunks: the document, cut at any positions.
            n_chars: minimum characters per piece; all but the last have more.
        """
        return cut_at_blanks(chunks, max(n_chars, WHOLE_CHARS))


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and one for the end of text."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.eot_id = "bytes", 257, 256
        self.content_hash = hashlib.sha256(b"byte values, then end of text").hexdigest()
        self.token_bytes = np.array([1] * 256 + [0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eot_id).decode(errors="replace")

    def pieces(self, chunks: Iterable[str], n_chars: int = PIECE_CHARS) -> Iterator[str]:
        return cut_at_blanks(chunks, n_chars)


class JsonTokenizer(Tokenizer):
    """A tokenizer in the JSON of the `tokenizers` package.

    Raises:
        ValueError: the text is not such JSON, or none of its tokens is a known end-of-text token.
    """

    def __init__(self, name: str, text: str) -> None:
        layout, self._tokenizer = _parsed(name, text)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab()
        ends = [vocab[end] for end in EOT_NAMES if end in vocab]
        if not ends:
            raise ValueError(
                f"tokenizer: {echo(name)} must have one of the tokens {', '.join(EOT_NAMES)} to end a document"
            )
        if (largest := max(vocab.values())) > LARGEST_ID:
            raise ValueError(f"tokenizer: {echo(name)} must have ids of at most {LARGEST_ID:,}, got {largest:,}")
        self.name, self.vocab_size, self.eot_id = name, largest + 1, ends[0]
        self.content_hash = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()
        complete = json.loads(self._tokenizer.to_str())  # a file may omit fields that have a default
        self.token_bytes = _byte_table(complete, vocab, self.vocab_size)
        plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        self._separable = (
            self.token_bytes is not None
            and plain.items() <= complete["pre_tokenizer"].items()
            and all(token["special"] for token in complete["added_tokens"])
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i != self.eot_id])

    def to_json(self) -> str:
        """The JSON of the `tokenizers` package."""
        return self._tokenizer.to_str()

    def pieces(self, chunks: Iterable[str], n_chars: int = PIECE_CHARS) -> Iterator[str]:
        return cut_at_blanks(chunks, n_chars) if self._separable else super().pieces(chunks, n_chars)


def cut_at_blanks(chunks: Iterable[str], n_chars: int) -> Iterator[str]:
    """Cuts a text before the first blank after every `n_chars` characters; also cuts words over `LONGEST_WORD`."""
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > n_chars:
            place = _BLANK.search(rest, start + n_chars, start + n_chars + LONGEST_WORD)
            if place is None and len(rest) - start < n_chars + LONGEST_WORD:
                break
            end = start + n_chars + LONGEST_WORD if place is None else place.start()
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def load_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer: a name in `TOKENIZERS`, or a JSON file of the `tokenizers` package.

    A relative path is searched in the working folder, then under `$EXPLORE_DATA`.

    Raises:
        ValueError: nothing has that name, or it cannot be used.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = ASSETS / f"{name}.json" if name in TOKENIZERS else Path(name).expanduser()
    if not exists(path) and (root := os.environ.get("EXPLORE_DATA")):
        path = Path(root).expanduser() / path
    if not exists(path):
        near = difflib.get_close_matches(name, TOKENIZERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"tokenizer: {echo(name)} is neither a known name ({', '.join(TOKENIZERS)}) nor a JSON file of the "
            f"`tokenizers` package, here or under EXPLORE_DATA{hint}"
        )
    return JsonTokenizer(name, _text_of(name, path))


def tokenizer_json(path: Path) -> str:
    """Reads a JSON file of the `tokenizers` package, whether or not a model can be trained with it.

    Raises:
        ValueError: it is not such a file.
    """
    text = _text_of(str(path), path)
    _parsed(str(path), text)
    return text


def _text_of(name: str, path: Path) -> str:
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {echo(name)} cannot be read ({error})") from error


def _parsed(name: str, text: str) -> tuple[Any, tokenizers.Tokenizer]:
    try:
        return parse_json(text), tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(
            f"tokenizer: {echo(name)} must be a JSON file of the `tokenizers` package ({str(error)[:160]})"
        ) from error


def check_vocab_size(vocab_size: int) -> None:
    """Raises an error for a vocabulary size that `train_bpe` cannot produce.

    Raises:
        ValueError: fewer than 257 entries, or more than 1,048,576.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if not smallest <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocab_size: {vocab_size} must be at least {smallest}, all bytes and the end of text, "
            f"and at most {LARGEST_VOCABULARY:,}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE: ids are the end of text (0), then 256 bytes, then merges by falling frequency.

    Args:
        texts: documents, or their pieces from `cut_at_blanks`.

    Raises:
        ValueError: fewer than 257 entries, or more than the text yields.
    """
    check_vocab_size(vocab_size)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    if trained.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size: {vocab_size} must be at most {trained.get_vocab_size()}, all this text yields")
    return trained


def _byte_table(layout: Mapping[str, Any], vocab: Mapping[str, int], size: int) -> Int64[np.ndarray, " vocab"] | None:
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if layout["normalizer"] is not None or not alphabet <= vocab.keys() or not _keeps_bytes(layout["pre_tokenizer"]):
        return None
    table = np.zeros(size, dtype=np.int64)
    for token, i in vocab.items():
        table[i] = len(token)
    for token in layout["added_tokens"]:
        if token["lstrip"] or token["rstrip"]:
            return None
        table[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return table


def _keeps_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    members = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kept = {"ByteLevel", "Digits", "Split"}
    return any(member["type"] == "ByteLevel" for member in members) and all(
        member["type"] in kept and not member.get("add_prefix_space") and member.get("behavior") != "Removed"
        for member in members
    )
