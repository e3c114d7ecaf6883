"""Batches of text: each window once per epoch, each evaluated token once, each byte counted."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from explore.data import IGNORED, TextData, TextSource, TokenStream, load_corpus, load_tokenizer

DOCUMENTS = [f"Number {i}: naïve café, 日本.\n\nEnd{'.' * (i % 7)}\n" for i in range(120)]
BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


@pytest.fixture
def words(tmp_path: Path) -> str:
    vocab = {"[UNK]": 0, "</s>": 1, "Number": 2, "End": 3}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def counting(n_tokens: int, seq_len: int, seed: int) -> TextSource:
    """A source in which every token is its position, so that a batch shows where it was cut."""
    stream = TokenStream(np.arange(n_tokens), n_bytes=0, n_documents=1)
    tokenizer = load_tokenizer("bytes")
    tokenizer.token_bytes = None
    return TextSource(dict.fromkeys(("train", "val", "test"), stream), tokenizer, seq_len, seed)


@given(n_tokens=st.integers(2, 400), seq_len=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_predicts_no_token_twice_and_leaves_out_less_than_two_windows(
    n_tokens: int, seq_len: int, seed: int, epoch: int
) -> None:
    assume(n_tokens > seq_len)
    source = counting(n_tokens, seq_len, seed)
    n = source.windows_per_epoch
    batches = [source.batch(step, 1) for step in range(epoch * n, (epoch + 1) * n)]
    for batch in batches:
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(seq_len))
    targets = torch.cat([batch.targets for batch in batches]).flatten().sort().values
    assert torch.equal(targets, torch.arange(len(targets)) + targets[0])
    assert 1 <= targets[0] <= seq_len
    assert targets[-1] < n_tokens
    assert n_tokens - len(targets) <= 2 * seq_len


@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
def test_a_batch_depends_only_on_seed_and_step(seed: int, steps: list[int]) -> None:
    source = counting(1000, 16, seed)
    forth = {step: source.batch(step, 4).inputs for step in steps}
    back = {step: source.batch(step, 4).inputs for step in reversed(steps)}
    fresh = {step: counting(1000, 16, seed).batch(step, 4).inputs for step in steps}
    assert all(torch.equal(forth[step], back[step]) and torch.equal(forth[step], fresh[step]) for step in steps)


def test_a_batch_is_the_windows_of_smaller_batches_in_order() -> None:
    source = counting(500, 8, 3)
    whole = source.batch(2, 30).inputs
    assert torch.equal(whole, torch.cat([source.batch(step, 1).inputs for step in range(60, 90)]))


def test_seeds_and_epochs_differ_in_order_and_in_offset() -> None:
    def start(seed: int, epoch: int) -> tuple[int, ...]:
        source = counting(1000, 16, seed)
        n = source.windows_per_epoch
        return tuple(source.batch(epoch, n).inputs[:, 0].tolist())

    starts = {start(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(starts) == 16
    assert len({min(order) for order in starts}) > 4
    assert len({tuple(np.argsort(order)) for order in starts}) == 16


def test_a_source_survives_pickling() -> None:
    source = counting(100, 8, 0)
    assert torch.equal(pickle.loads(pickle.dumps(source)).batch(5, 2).inputs, source.batch(5, 2).inputs)


@given(n_tokens=st.integers(2, 200), seq_len=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_evaluation_predicts_every_token_except_the_first_once_in_order(
    n_tokens: int, seq_len: int, batch_size: int
) -> None:
    source = counting(max(n_tokens, seq_len + 1), seq_len, 0)
    batches = list(source.eval_batches("val", batch_size))
    asked = torch.cat([batch.targets[batch.targets != IGNORED] for batch in batches])
    assert asked.tolist() == list(range(1, source.streams["val"].n_tokens))
    for batch in batches:
        real = batch.targets != IGNORED
        assert torch.equal(batch.inputs[real] + 1, batch.targets[real])
        assert batch.inputs.shape[1] == seq_len
    assert all(len(batch.inputs) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("name", ["bytes", "austen-bpe-2048"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_bytes_of_all_batches_are_the_bytes_of_the_split(corpus: str, name: str, batch_size: int) -> None:
    source = TextData(corpus=corpus, tokenizer=name, seq_len=24).open(0)
    for split in ("val", "test"):
        text = "".join(load_corpus(corpus).documents(split))
        batches = list(source.eval_batches(split, batch_size))
        assert sum(batch.n_bytes or 0 for batch in batches) == len(text.encode())


@pytest.mark.parametrize("name", ["bytes", "austen-bpe-2048"])
def test_the_bytes_of_a_batch_are_those_of_its_decoded_targets(corpus: str, name: str) -> None:
    source = TextData(corpus=corpus, tokenizer=name, seq_len=24).open(0)
    tokenizer = load_tokenizer(name)
    for batch in [source.batch(0, 4), source.batch(7, 1), *source.eval_batches("val", 2)]:
        ids = batch.targets[batch.targets != IGNORED].tolist()
        # A window may begin or end within a character, so single tokens are decoded as Latin letters of ByteLevel.
        pieces = (
            len(tokenizer._tokenizer.id_to_token(i)) if name != "bytes" else 1 for i in ids if i != tokenizer.eot_id
        )
        assert batch.n_bytes == sum(pieces)


@pytest.mark.parametrize(("max_tokens", "windows"), [(1, 1), (24, 1), (47, 1), (48, 2), (100, 4), (10**9, None)])
def test_max_tokens_takes_the_first_whole_windows(corpus: str, max_tokens: int, windows: int | None) -> None:
    source = TextData(corpus=corpus, tokenizer="bytes", seq_len=24).open(0)
    full = torch.cat([batch.targets for batch in source.eval_batches("val", 1)])
    part = list(source.eval_batches("val", 3, max_tokens))
    targets = torch.cat([batch.targets for batch in part])
    assert torch.equal(targets, full[:windows])
    kept = targets[(targets != IGNORED) & (targets != BYTES.eot_id)]
    assert sum(batch.n_bytes or 0 for batch in part) == len(kept)


def test_a_tokenizer_without_byte_table_counts_the_whole_split_and_refuses_a_part(corpus: str, words: str) -> None:
    source = TextData(corpus=corpus, tokenizer=words, seq_len=4).open(0)
    n_bytes = load_corpus(corpus).n_bytes("val")
    for batch_size in (1, 2, 1000):
        batches = list(source.eval_batches("val", batch_size))
        assert sum(batch.n_bytes or 0 for batch in batches) == n_bytes
    assert source.batch(0, 2).n_bytes is None
    assert list(source.eval_batches("val", 1, max_tokens=10**6))
    with pytest.raises(ValueError, match=r"max_tokens must be null with the tokenizer .*words.json', got 8"):
        source.eval_batches("val", 1, max_tokens=8)


def test_a_uniform_guess_has_the_same_bits_per_byte_for_every_batching() -> None:
    source = TextData(tokenizer="bytes", seq_len=512).open(0)
    batches = list(source.eval_batches("val", 16))
    n_targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    n_bytes = sum(batch.n_bytes or 0 for batch in batches)
    assert math.isclose(n_targets * math.log2(257) / n_bytes, math.log2(257))
    assert n_bytes == 433230
