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

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
TOKENIZERS: tuple[str, ...] = ("bytes", "austen-bpe-2048")
PIECE_CHARS = 1 << 16


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are never read out of text, so a byte stays a byte.

    Attributes:
        name: as it was asked for.
        vocab_size: one more than the largest id.
        eot_id: stands before each document.
        content_hash: says what the tokenizer does, whatever file it came from.
        token_bytes: number of bytes of text that each id stands for; None where an id does not determine it.
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
        """The text of the ids; special tokens stand for none."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def pieces(self, text: str, n_chars: int = PIECE_CHARS) -> Iterator[str]:
        """Cuts a long text where its pieces encode to the same ids as the whole, if such places are known."""
        yield text


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8, and the end of text."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.eot_id = "bytes", 257, 256
        self.content_hash = hashlib.sha256(b"byte values, then end of text").hexdigest()
        self.token_bytes = np.array([1] * 256 + [0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eot_id).decode(errors="replace")

    def pieces(self, text: str, n_chars: int = PIECE_CHARS) -> Iterator[str]:
        yield from (text[start : start + n_chars] for start in range(0, len(text), n_chars))


class JsonTokenizer(Tokenizer):
    """A tokenizer in the JSON of the `tokenizers` package.

    Raises:
        ValueError: the text is not such JSON, or none of the tokens is known to end a text.
    """

    def __init__(self, name: str, text: str) -> None:
        try:
            layout = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(
                f"tokenizer: {name!r} must be a JSON file of the `tokenizers` package ({error})"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab()
        ends = [vocab[end] for end in EOT_NAMES if end in vocab]
        if not ends:
            raise ValueError(
                f"tokenizer: {name!r} must have one of the tokens {', '.join(EOT_NAMES)} to end a document"
            )
        self.name, self.vocab_size, self.eot_id = name, max(vocab.values()) + 1, ends[0]
        self.content_hash = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()
        self.token_bytes = _byte_table(layout, vocab, self.vocab_size)
        plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        self._separable = (
            self.token_bytes is not None
            and plain.items() <= layout["pre_tokenizer"].items()
            and all(token["special"] for token in layout["added_tokens"])
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i != self.eot_id])

    def to_json(self) -> str:
        """The JSON of the `tokenizers` package."""
        return self._tokenizer.to_str()

    def pieces(self, text: str, n_chars: int = PIECE_CHARS) -> Iterator[str]:
        # GPT-2's pattern never looks back, and none of its matches runs from a visible character into a newline.
        place = re.compile(r"(?<=[!-~])\n")
        start = 0
        while self._separable and (match := place.search(text, start + n_chars)):
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]


def load_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer: a name in `TOKENIZERS`, or a JSON file of the `tokenizers` package.

    A relative path is looked for in the working folder, then under the folder that `EXPLORE_DATA` names.

    Raises:
        ValueError: nothing stands under that name, or it cannot be used.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = ASSETS / f"{name}.json" if name in TOKENIZERS else Path(name).expanduser()
    if not path.is_file() and (root := os.environ.get("EXPLORE_DATA")):
        path = Path(root).expanduser() / path
    if not path.is_file():
        near = difflib.get_close_matches(name, TOKENIZERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"tokenizer: {name!r} is neither a known name ({', '.join(TOKENIZERS)}) nor a JSON file of the "
            f"`tokenizers` package, here or under EXPLORE_DATA{hint}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {name!r} cannot be read ({error})") from error
    return JsonTokenizer(name, text)


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE: the end of text is id 0, then 256 bytes, then merges, most frequent first.

    Raises:
        ValueError: fewer than 257 entries, or more than the text yields.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"vocab_size: {vocab_size} must be at least {len(alphabet) + 1}: all bytes and the end of text"
        )
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
