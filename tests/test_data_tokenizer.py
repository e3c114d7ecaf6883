"""Tokenizers: text comes back whole, and every byte is counted."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from explore.data import EOT, TOKENIZERS, load_corpus, load_tokenizer, train_bpe
from explore.data.known import ASSETS


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path_factory.mktemp("cache")))


BYTE_LEVEL = [load_tokenizer(name) for name in TOKENIZERS]
TEXTS = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from("ab 's\n\t.9é—日🙂")) | st.just(f"a{EOT}b")


def test_the_shipped_vocabulary_is_trained_on_the_embedded_text_and_nothing_else() -> None:
    shipped = json.loads((ASSETS / "austen-bpe-2048.json").read_text(encoding="utf-8"))
    trained = train_bpe(load_corpus("austen").documents("train"), 2048)
    assert json.loads(trained.to_str()) == shipped
    assert len(shipped["model"]["vocab"]) == 2048
    assert shipped["model"]["vocab"][EOT] == 0


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL, ids=TOKENIZERS)
@given(text=TEXTS)
def test_decoding_undoes_encoding(tokenizer, text) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL, ids=TOKENIZERS)
@given(text=TEXTS)
def test_the_byte_table_counts_the_bytes_of_the_text(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.eot_id] == 0
    assert tokenizer.eot_id not in ids
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL, ids=TOKENIZERS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8), n_chars=st.integers(1, 20))
def test_pieces_encode_to_the_ids_of_the_whole(tokenizer, texts, n_chars) -> None:
    text = "\n".join(texts)
    pieces = list(tokenizer.pieces([text], n_chars))
    assert list(chain(*tokenizer.encode_batch(pieces))) == tokenizer.encode(text)


def test_no_piece_ends_within_blanks_that_a_token_may_join(tmp_path: Path) -> None:
    text = "a\n\n\n\nb \n\n c" * 9
    train_bpe([text], 262).save(str(tmp_path / "blanks.json"))
    tokenizer = load_tokenizer(str(tmp_path / "blanks.json"))
    assert any(set(tokenizer.decode([i])) == {"\n"} for i in range(257, 262))
    for n_chars in range(1, 9):
        assert list(chain(*tokenizer.encode_batch(list(tokenizer.pieces([text], n_chars))))) == tokenizer.encode(text)


def test_a_novel_is_cut_into_pieces_of_bounded_size() -> None:
    text = next(load_corpus("austen").documents("val"))
    pieces = list(BYTE_LEVEL[1].pieces([text], 10_000))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 20_000


def test_the_hash_follows_the_vocabulary_and_not_the_path_or_the_layout(tmp_path: Path) -> None:
    shipped = json.loads((ASSETS / "austen-bpe-2048.json").read_text(encoding="utf-8"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(dict(reversed(shipped.items())), indent=3))
    assert load_tokenizer(str(path)).content_hash == BYTE_LEVEL[1].content_hash
    merges = shipped["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    path.write_text(json.dumps(shipped))
    assert load_tokenizer(str(path)).content_hash != BYTE_LEVEL[1].content_hash


def test_a_tokenizer_that_changes_the_text_has_no_byte_table(tmp_path: Path) -> None:
    def table(change: str) -> object:
        layout = tokenizers.Tokenizer.from_file(str(ASSETS / "austen-bpe-2048.json"))
        if change == "normalizer":
            layout.normalizer = normalizers.NFC()
        if change == "prefix space":
            layout.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        if change == "removed":
            split = pre_tokenizers.Split(" ", "removed")
            layout.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        layout.save(str(tmp_path / "t.json"))
        return load_tokenizer(str(tmp_path / "t.json")).token_bytes

    assert table("nothing") is not None
    assert table("normalizer") is table("prefix space") is table("removed") is None


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path) -> None:
    layout = tokenizers.Tokenizer.from_file(str(ASSETS / "austen-bpe-2048.json"))
    layout.enable_truncation(3)
    layout.enable_padding(length=50)
    layout.save(str(tmp_path / "t.json"))
    text = "It is a truth universally acknowledged"
    assert load_tokenizer(str(tmp_path / "t.json")).encode(text) == BYTE_LEVEL[1].encode(text)


def test_a_wrong_tokenizer_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'byts' is neither a known name \(bytes, .*did you mean 'bytes'"):
        load_tokenizer("byts")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a.json' must be a JSON file of the `tokenizers` package"):
        load_tokenizer(str(tmp_path / "a.json"))
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "b.json"))
    with pytest.raises(ValueError, match=r"b.json' must have one of the tokens <\|endoftext\|>, "):
        load_tokenizer(str(tmp_path / "b.json"))


def test_a_vocabulary_of_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: 256 must be at least 257"):
        train_bpe(["text"], 256)
    with pytest.raises(ValueError, match="vocab_size: 400 must be at most 258"):
        train_bpe(["aa"], 400)
