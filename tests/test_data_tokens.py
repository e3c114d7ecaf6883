"""The token cache: written once, and used only if it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from explore.data import Corpus, TokenStream, load_corpus, load_tokenizer, token_streams, tokens
from explore.data.cache import HEADER_BYTES
from explore.data.splits import Split
from explore.data.tokenizer import Tokenizer

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


def token_stream(corpus: Corpus, split: Split, tokenizer: Tokenizer) -> TokenStream:
    return token_streams(corpus, tokenizer, [split])[split]


@pytest.mark.parametrize("name", ["bytes", "austen-bpe-2048"])
@pytest.mark.parametrize("batch_chars", [1, 100, 1 << 20])
def test_each_document_of_the_stream_follows_an_end_of_text(
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


def test_the_second_opening_reads_the_cached_tokens(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    first = token_stream(corpus, "train", tokenizer)
    monkeypatch.setattr(tokenizer, "encode_batch", None)
    assert np.array_equal(token_stream(corpus, "train", tokenizer).ids, first.ids)


def test_each_text_and_tokenizer_has_its_own_cache_file(corpus: Corpus, cache: Path) -> None:
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
        lambda raw: raw[:HEADER_BYTES] + bytes(len(raw) - HEADER_BYTES),
        lambda raw: b"[]".ljust(HEADER_BYTES) + raw[HEADER_BYTES:],
    ],
    ids=["truncated", "longer", "header only", "empty", "no header", "no hash", "zeroed", "other header"],
)
def test_a_damaged_token_file_is_rebuilt(corpus: Corpus, cache: Path, damage) -> None:
    tokenizer = load_tokenizer("bytes")
    before = np.array(token_stream(corpus, "train", tokenizer).ids)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(token_stream(corpus, "train", tokenizer).ids, before)
    assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_detected(corpus: Corpus, cache: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    before = np.array(token_stream(corpus, "val", tokenizer).ids)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    end = whole.index(b"}") + 1  # of the header, behind which blanks do not matter
    for place in [*range(0, end, 11), *range(HEADER_BYTES, len(whole), 11)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert np.array_equal(token_stream(corpus, "val", tokenizer).ids, before)
        assert path.read_bytes() == whole


def interrupt(corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Tokenizes until `after` pieces are encoded, and returns the pieces."""
    encode, seen = tokenizer.encode_batch, list[str]()

    def dies(texts: list[str]) -> list[list[int]]:
        if len(seen) >= after:
            raise KeyboardInterrupt
        seen.extend(texts)
        return encode(texts)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode_batch", dies)
        with contextlib.suppress(KeyboardInterrupt):
            token_streams(corpus, tokenizer)
    return seen


def test_a_kill_loses_at_most_the_last_shard(corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARS", 100)
    monkeypatch.setattr(tokens, "SHARD_BATCHES", 2)
    tokenizer = load_tokenizer("austen-bpe-2048")
    everything = interrupt(corpus, tokenizer, monkeypatch, after=10**9)
    expected = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert len(expected) == 3
    for after in range(0, len(everything), 3):
        shutil.rmtree(cache)
        first = interrupt(corpus, tokenizer, monkeypatch, after)
        finished = [path for path in cache.iterdir() if path.suffix != ".partial"]
        assert all(path.read_bytes() == expected[path.name] for path in finished)
        again = interrupt(corpus, tokenizer, monkeypatch, after=10**9)
        shard = 2 * (100 + max(map(len, DOCUMENTS)))
        assert sum(map(len, first)) + sum(map(len, again)) <= sum(map(len, everything)) + 3 * shard
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == expected


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:HEADER_BYTES] + bytes(len(raw)), bytes])
def test_damaged_progress_is_discarded(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARS", 100)
    monkeypatch.setattr(tokens, "SHARD_BATCHES", 1)
    tokenizer = load_tokenizer("bytes")
    interrupt(corpus, tokenizer, monkeypatch, after=10)
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    stream = token_streams(corpus, tokenizer)["train"]
    assert stream.ids.tolist() == [i for text in corpus.documents("train") for i in [256, *text.encode()]]


def test_one_of_two_processes_tokenizes_and_the_other_waits(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    encode, encoded = tokenizer.encode_batch, list[str]()

    def slow(texts: list[str]) -> list[list[int]]:
        time.sleep(0.05)
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", slow)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 200)
    with ThreadPoolExecutor(3) as pool:
        streams = [each.result() for each in [pool.submit(token_streams, corpus, tokenizer) for _ in range(3)]]
    assert sorted(encoded) == sorted(DOCUMENTS)
    assert all(np.array_equal(each["train"].ids, streams[0]["train"].ids) for each in streams)


def test_abandoned_temporary_files_are_removed(corpus: Corpus, cache: Path) -> None:
    cache.mkdir(parents=True)
    for name in (".0123abcd.tmp.tokens", "old.partial", "new.partial", "other.tokens"):
        (cache / name).write_bytes(b"x")
    os.utime(cache / "old.partial", (0, 0))
    token_streams(corpus, load_tokenizer("bytes"))
    assert {path.name for path in cache.iterdir() if path.name in ("old.partial", "new.partial", "other.tokens")} == {
        "new.partial",
        "other.tokens",
    }
    assert not list(cache.glob(".*"))


def test_a_tokenizer_that_loses_bytes_it_counts_is_refused(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [list(text[1:].encode()) for text in texts])
    with pytest.raises(ValueError, match="'bytes' must keep every byte"):
        token_stream(corpus, "train", tokenizer)
    assert list(cache.iterdir()) == []


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
