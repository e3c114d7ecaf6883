"""Corpora: what stands on disk is what is read, each document in one split."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore.data import SPLITS, load_corpus
from explore.data.documents import read_documents
from explore.data.splits import cut, split_of

BOOKS = [f"Book {i} — café\n\nChapter {i * i}.\n\nThe end of {i}.\n" for i in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    raw = "".join(json.dumps({"title": "t", "text": text}) + "\n" for text in texts).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(raw))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_the_ending_of_a_file_changes_neither_documents_nor_hash(folder: Path, suffix: str) -> None:
    plain = load_corpus(str(write_jsonl(folder / "plain.jsonl", BOOKS)))
    other = load_corpus(str(write_jsonl(folder / f"other.jsonl{suffix}", BOOKS)))
    assert other.content_hash() == plain.content_hash()
    assert sorted(text for split in SPLITS for text in other.documents(split)) == sorted(BOOKS)


def test_a_text_file_is_one_document_with_every_byte_kept(folder: Path) -> None:
    text = "One\r\n\r\nTwo é\n\nThree\n\n"
    path = folder / "a.txt"
    path.write_bytes(text.encode())
    assert list(read_documents(path)) == [text]


def test_changing_one_letter_changes_the_hash_of_its_split_alone(folder: Path) -> None:
    for split in SPLITS:
        (folder / f"{split}.txt").write_text(f"This is for {split}.")
    before = load_corpus(str(folder))
    (folder / "val.txt").write_text("This is for Val.")
    after = load_corpus(str(folder))
    assert [before.content_hash(s) == after.content_hash(s) for s in SPLITS] == [True, False, True]
    assert before.content_hash() != after.content_hash()


def test_the_hash_does_not_depend_on_how_documents_are_spread_over_files(folder: Path, tmp_path: Path) -> None:
    for name, texts in {
        "train-0": BOOKS[:50],
        "train-1": BOOKS[50:80],
        "val": BOOKS[80:90],
        "test": BOOKS[90:],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", texts)
    other = tmp_path / "other"
    other.mkdir()
    for name, texts in {"train": BOOKS[:80], "dev": BOOKS[80:90], "test": BOOKS[90:]}.items():
        write_jsonl(other / f"{name}.jsonl", texts)
    assert load_corpus(str(folder)).content_hash() == load_corpus(str(other)).content_hash()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("train-03", "train"),
        ("training_a", "train"),
        ("austen-train", "train"),
        ("my-own-train-00", "train"),
        ("val", "val"),
        ("valid.1", "val"),
        ("validation-00000-of-00002", "val"),
        ("Dev", "val"),
        ("test2", "test"),
        ("testament", None),
        ("value", None),
        ("trains-of-europe", None),
        ("crash-test-dummies", None),
        ("emma", None),
    ],
)
def test_a_file_name_says_its_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_document_in_two_splits_is_refused_with_its_beginning(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", BOOKS[:10])
    write_jsonl(folder / "val.jsonl", BOOKS[10:12])
    write_jsonl(folder / "test.jsonl", [BOOKS[20], BOOKS[3]])
    with pytest.raises(ValueError, match=r"train \(train.jsonl\) and test \(test.jsonl\).*begins 'Book 3 — café"):
        load_corpus(str(folder))


def test_documents_without_a_split_are_shared_out_90_5_5_and_each_once(folder: Path) -> None:
    corpus = load_corpus(str(write_jsonl(folder / "books.jsonl", BOOKS)))
    found = {split: list(corpus.documents(split)) for split in SPLITS}
    assert {split: len(texts) for split, texts in found.items()} == {"train": 90, "val": 5, "test": 5}
    assert sorted(chain(*found.values())) == sorted(BOOKS)


def test_equal_documents_fall_in_the_same_split(folder: Path) -> None:
    corpus = load_corpus(str(write_jsonl(folder / "books.jsonl", BOOKS + BOOKS[::-1])))
    found = {split: list(corpus.documents(split)) for split in SPLITS}
    assert sum(map(len, found.values())) == 2 * len(BOOKS)
    for texts in found.values():
        assert all(texts.count(text) == 2 for text in texts)


def test_the_order_of_documents_does_not_change_their_split(folder: Path) -> None:
    forth = load_corpus(str(write_jsonl(folder / "forth.jsonl", BOOKS)))
    back = load_corpus(str(write_jsonl(folder / "back.jsonl", BOOKS[::-1])))
    assert [set(forth.documents(s)) for s in SPLITS] == [set(back.documents(s)) for s in SPLITS]
    assert forth.content_hash("train") != back.content_hash("train")


def test_a_missing_split_is_taken_from_training_alone(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", BOOKS[:80])
    write_jsonl(folder / "val.jsonl", BOOKS[80:])
    corpus = load_corpus(str(folder))
    assert list(corpus.documents("val")) == BOOKS[80:]
    assert len(list(corpus.documents("test"))) == 4
    assert sorted([*corpus.documents("train"), *corpus.documents("test")]) == sorted(BOOKS[:80])


def test_a_single_document_is_cut_at_paragraphs_without_losing_a_byte(folder: Path) -> None:
    text = "\n\n".join(f"Paragraph {i}.\nSecond line." for i in range(200)) + "\n"
    (folder / "novel.txt").write_text(text)
    corpus = load_corpus(str(folder))
    parts = [next(corpus.documents(split)) for split in SPLITS]
    assert "".join(parts) == text
    assert all(part.startswith("Paragraph") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.9, 0.05, 0.05]


@given(st.lists(st.text("ab \n", min_size=1), min_size=1, max_size=30).map("\n".join), st.integers(1, 2))
def test_a_cut_loses_nothing_and_leaves_no_part_blank(text: str, n_eval: int) -> None:
    n_lines = len([line for line in text.split("\n") if line.strip()])
    try:
        parts = cut(text, n_eval)
    except ValueError:
        assert n_lines <= n_eval
    else:
        assert "".join(parts) == text
        assert len(parts) == 1 + n_eval
        assert all(part.strip() for part in parts)


def test_named_files_leave_other_files_out(folder: Path) -> None:
    for name in (*SPLITS, "README"):
        (folder / f"{name}.txt").write_text(f"text of {name}")
    corpus = load_corpus(str(folder))
    assert [list(corpus.documents(split)) for split in SPLITS] == [[f"text of {split}"] for split in SPLITS]


def test_the_first_shards_are_nested_subsets_in_name_order(folder: Path) -> None:
    for i in (2, 0, 1):
        write_jsonl(folder / f"train-{i}.jsonl", BOOKS[10 * i : 10 * i + 10])
    write_jsonl(folder / "val.jsonl", BOOKS[50:60])
    write_jsonl(folder / "test.jsonl", BOOKS[60:70])
    for k in (1, 2, 3):
        assert list(load_corpus(str(folder), n_shards=k).documents("train")) == BOOKS[: 10 * k]
    with pytest.raises(ValueError, match="n_shards: 4 must be at most 3"):
        load_corpus(str(folder), n_shards=4)


def test_a_rewritten_file_is_hashed_anew(folder: Path) -> None:
    path = write_jsonl(folder / "books.jsonl", BOOKS)
    first = load_corpus(str(path)).content_hash()
    write_jsonl(path, [text.swapcase() for text in BOOKS])
    os.utime(path, ns=(1, 1))
    second = load_corpus(str(path)).content_hash()
    assert first != second
    assert (
        second == load_corpus(str(write_jsonl(folder / "b.jsonl", [text.swapcase() for text in BOOKS]))).content_hash()
    )


def test_a_damaged_index_is_made_anew(folder: Path, cache: Path) -> None:
    path = write_jsonl(folder / "books.jsonl", BOOKS)
    before = load_corpus(str(path)).content_hash()
    (index,) = (cache / "documents").glob("*.npy")
    index.write_bytes(index.read_bytes()[:-7])
    assert load_corpus(str(path)).content_hash() == before


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 1}\n',
            r'line 2: needs a string in the field "text".*body, id',
        ),
        ("a.jsonl", b'{"text": 5}\n', r'line 1: needs a string in the field "text"'),
        ("a.jsonl", b"[1]\n", r'line 1: needs a string in the field "text", found list'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1:.*surrogate"),
        ("a.txt", b"caf\xe9", r"a.txt: must be UTF-8, byte 3"),
        ("a.txt.xz", b"not an archive", r"a.txt.xz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], r"a.txt.gz cannot be read"),
        ("a.csv", b"text", r"must be .txt or .jsonl"),
        ("a.txt", b" \n", r"no text for train"),
        ("a.txt", b"one line", r"3 splits cannot be cut from 1 lines"),
    ],
)
def test_bad_text_is_named_with_file_and_place(folder: Path, name: str, raw: bytes, message: str) -> None:
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(str(folder / name))
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_a_corpus_says_why(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .txt or .jsonl"):
        load_corpus(str(folder))
    (folder / "val.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has val.txt but no training file"):
        load_corpus(str(folder))
