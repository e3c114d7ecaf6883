"""Tokenizers: decoding restores the text, and every byte is counted."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from explore.data import EOT, TOKENIZERS, load_corpus, load_tokenizer, tokenizer, train_bpe
from explore.data.known import ASSETS


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path_factory.mktemp("cache")))


BYTE_LEVEL = [load_tokenizer(name) for name in TOKENIZERS]
TEXTS = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from("ab 's\n\t.9é—日🙂")) | st.just(f"a{EOT}b")


def test_the_shipped_vocabulary_is_trained_only_on_the_embedded_text() -> None:
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


def test_the_hash_depends_on_the_vocabulary_and_not_on_path_or_layout(tmp_path: Path) -> None:
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


def test_an_error_for_a_wrong_tokenizer_names_the_allowed_ones(tmp_path: Path) -> None:
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
    for size in (1 << 21, 10**12):
        with pytest.raises(ValueError, match=r"vocab_size: \d+ must be at least 257, .*, and at most 1,048,576"):
            train_bpe(["text"], size)
    with pytest.raises(ValueError, match="vocab_size: 400 must be at most 258"):
        train_bpe(["aa"], 400)


@given(
    text=st.text(st.sampled_from("ab \n\té日"), max_size=200),
    n_chars=st.integers(1, 20),
    n_chunk=st.integers(1, 30),
)
def test_pieces_are_bounded_and_do_not_depend_on_how_a_text_is_read(text: str, n_chars: int, n_chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONGEST_WORD", 8)
        chunks = [text[start : start + n_chunk] for start in range(0, len(text), n_chunk)]
        pieces = list(tokenizer.cut_at_blanks(chunks, n_chars))
        assert "".join(pieces) == text
        assert pieces == list(tokenizer.cut_at_blanks([text], n_chars))
        assert all(len(piece) <= n_chars + 8 for piece in pieces[:-1])
        assert all(len(piece) >= n_chars for piece in pieces[:-1])


def test_a_cut_before_a_blank_changes_no_token_after_any_character() -> None:
    places = [*range(0x3000), *range(0x3000, 0x20000, 61)]
    characters = [c for c in map(chr, places) if not c.isspace() and not "\ud800" <= c <= "\udfff"]
    for blank in (" ", "\n", "  ", " \n", "\n\n"):
        heads, tails = [f"x{c}" for c in characters], [f"{blank}y{c}" for c in characters]
        whole = BYTE_LEVEL[1].encode_batch([head + tail for head, tail in zip(heads, tails, strict=True)])
        parts = zip(BYTE_LEVEL[1].encode_batch(heads), BYTE_LEVEL[1].encode_batch(tails), strict=True)
        assert whole == [head + tail for head, tail in parts]


def test_a_word_of_megabytes_is_encoded_in_pieces() -> None:
    text = "a" * 3_000_000
    pieces = list(BYTE_LEVEL[1].pieces([text]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= tokenizer.PIECE_CHARS + tokenizer.LONGEST_WORD


def test_a_document_is_not_cut_for_a_tokenizer_with_unknown_boundaries(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(str(tmp_path / "words.json"))
    assert list(loaded.pieces(["word " * 200_000] * 8)) == ["word " * 1_600_000]
    pieces = list(loaded.pieces(["word " * 200_000] * 9))
    assert "".join(pieces) == "word " * 1_800_000
    assert len(pieces) == 2


@pytest.mark.parametrize(
    "left_out", ["normalizer", "added_tokens", "post_processor", "decoder", "truncation", "version"]
)
def test_settings_missing_in_a_tokenizer_file_have_defaults(tmp_path: Path, left_out: str) -> None:
    layout = json.loads((ASSETS / "austen-bpe-2048.json").read_text(encoding="utf-8"))
    del layout[left_out]
    (tmp_path / "a.json").write_text(json.dumps(layout), encoding="utf-8-sig")
    loaded, text = load_tokenizer(str(tmp_path / "a.json")), "It is a truth universally acknowledged"
    assert loaded.encode(text) == BYTE_LEVEL[1].encode(text)
    assert loaded.eot_id == 0


def test_without_pre_tokenizer_there_is_no_byte_table(tmp_path: Path) -> None:
    layout = json.loads((ASSETS / "austen-bpe-2048.json").read_text(encoding="utf-8"))
    del layout["pre_tokenizer"]
    (tmp_path / "a.json").write_text(json.dumps(layout))
    assert load_tokenizer(str(tmp_path / "a.json")).token_bytes is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "JSON must not be nested this deeply"),
        ("null", "must be a JSON file of the `tokenizers` package"),
        ('{"model": {"type": "BPE", "vocab": {"a": ' + "9" * 5000 + '}, "merges": []}}', "at most 4,300 digits"),
        (
            '{"model": {"type": "WordLevel", "vocab": {"</s>": 4000000000, "a": 0}, "unk_token": "a"}}',
            "must have ids of at most 16,777,215, got 4,000,000,000",
        ),
    ],
)
def test_an_error_for_an_unusable_tokenizer_gives_the_reason(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(tmp_path / "a.json"))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
