"""The token cache: made once, believed only when whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from explore.data import Corpus, load_corpus, load_tokenizer, token_stream, tokens
from explore.data.tokens import HEADER_BYTES

DOCUMENTS = [f"Number {i}: naïve café, 日本.\n\nEnd{'.' * i}\n" for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return load_corpus(str(path))


@pytest.mark.parametrize("name", ["bytes", "austen-bpe-2048"])
@pytest.mark.parametrize("batch_chars", [1, 100, 1 << 20])
def test_the_stream_is_each_document_behind_an_end_of_text(
    corpus: Corpus, name: str, batch_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARS", batch_chars)
    tokenizer = load_tokenizer(name)
    texts = list(corpus.documents("train"))
    stream = token_stream(corpus, "train", tokenizer)
    assert stream.ids.tolist() == [i for text in texts for i in [tokenizer.eot_id, *tokenizer.encode(text)]]
    assert (stream.n_bytes, stream.n_documents) == (sum(len(text.encode()) for text in texts), len(texts))
    assert stream.ids.dtype == np.uint16
    assert not stream.ids.flags.writeable


def test_a_second_opening_reads_the_file_and_encodes_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    first = token_stream(corpus, "train", tokenizer)
    monkeypatch.setattr(tokenizer, "encode_batch", None)
    assert np.array_equal(token_stream(corpus, "train", tokenizer).ids, first.ids)


def test_another_text_or_tokenizer_has_another_file(corpus: Corpus, cache: Path) -> None:
    for name in ("bytes", "austen-bpe-2048"):
        for split in ("train", "val"):
            token_stream(corpus, split, load_tokenizer(name))
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0\0",
        lambda raw: raw[:HEADER_BYTES],
        lambda raw: b"",
        lambda raw: b" " * HEADER_BYTES + raw[HEADER_BYTES:],
        lambda raw: raw.replace(b"content_hash", b"content_hush", 1),
        lambda raw: b"[]".ljust(HEADER_BYTES) + raw[HEADER_BYTES:],
    ],
    ids=["truncated", "longer", "header only", "empty", "no header", "no hash", "other header"],
)
def test_a_damaged_file_is_made_anew(corpus: Corpus, cache: Path, damage) -> None:
    tokenizer = load_tokenizer("bytes")
    before = np.array(token_stream(corpus, "train", tokenizer).ids)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(token_stream(corpus, "train", tokenizer).ids, before)
    assert path.read_bytes() == whole


def test_a_writer_that_dies_leaves_nothing_behind(corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(tokens, "BATCH_CHARS", 200)
    encode, seen = tokenizer.encode_batch, []

    def dies(texts: list[str]) -> list[list[int]]:
        assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
        seen.extend(texts)
        if len(seen) > 10:
            raise KeyboardInterrupt
        return encode(texts)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            token_stream(corpus, "train", tokenizer)
    assert list(cache.iterdir()) == []
    assert token_stream(corpus, "train", tokenizer).n_documents == corpus.n_documents("train")


def test_a_tokenizer_that_loses_bytes_it_counts_is_refused(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [list(text[1:].encode()) for text in texts])
    with pytest.raises(ValueError, match="'bytes' must keep every byte"):
        token_stream(corpus, "train", tokenizer)


def test_text_that_changes_while_it_is_read_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    def read() -> Iterator[str]:
        return corpus.documents("train")

    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "something else"}))
    with pytest.raises(ValueError, match=r"documents.jsonl changed while it was read"):
        list(read())


def test_a_large_vocabulary_takes_four_bytes_a_token(corpus: Corpus, tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "</s>": 1, "Number": 1 << 16}
    large = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    large.save(str(tmp_path / "large.json"))
    stream = token_stream(corpus, "train", load_tokenizer(str(tmp_path / "large.json")))
    assert stream.ids.dtype == np.uint32
    assert np.count_nonzero(stream.ids == 1 << 16) == corpus.n_documents("train")
