"""Corpora: all text on disk is read, and each document is in one split."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import socket
import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore import files
from explore.data import SPLITS, documents, load_corpus, overlap
from explore.data.cutting import EVAL_SHARE, cut_places
from explore.data.splits import split_of

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
    assert "".join(text for _, text in documents.read_chunks(path)) == text


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
def test_a_file_name_determines_its_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_document_in_two_splits_is_refused_with_its_beginning(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", BOOKS[:10])
    write_jsonl(folder / "val.jsonl", BOOKS[10:12])
    write_jsonl(folder / "test.jsonl", [BOOKS[20], BOOKS[3]])
    with pytest.raises(ValueError, match=r"train \(train.jsonl\) and test \(test.jsonl\).*begins 'Book 3 — café"):
        load_corpus(str(folder))


def test_documents_without_a_split_are_split_90_5_5_without_repeats(folder: Path) -> None:
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


def plain_cut(text: str, n_eval: int) -> list[int]:
    """The rule, on a whole text in memory: among all ends of paragraphs or lines, the nearest to each share."""
    for boundary in (r"\n\s*\n", r"\n\s*\n|\n"):
        ends = [match.end() for match in re.finditer(boundary, text)]
        ends = [end for end in ends if len(text) - len(text.lstrip()) < end < len(text.rstrip())]
        if len(ends) >= n_eval:
            break
    else:
        raise ValueError
    cuts, first = [], 0
    for left in range(n_eval, 0, -1):
        target = (1 - left * EVAL_SHARE) * len(text)
        nearest = min(range(first, len(ends) - left + 1), key=lambda i: abs(ends[i] - target))
        cuts.append(ends[nearest])
        first = nearest + 1
    return cuts


@given(
    st.lists(st.text("ab \n\u3000é", min_size=1), min_size=1, max_size=30).map("\n".join),
    st.integers(1, 2),
    st.integers(1, 9),
)
def test_a_cut_found_in_chunks_equals_that_of_the_whole_text(text: str, n_eval: int, n_chars: int) -> None:
    chunks = [text[start : start + n_chars] for start in range(0, len(text), n_chars)]
    n_lines = len([line for line in text.split("\n") if line.strip()])
    try:
        places, within_line = cut_places(lambda: chunks, n_eval)
    except ValueError:
        assert n_lines <= n_eval
    else:
        assert (places, within_line) == (plain_cut(text, n_eval), False)
        parts = [text[start:end] for start, end in zip([0, *places], [*places, None], strict=True)]
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
    with pytest.raises(ValueError, match=r"n_shards must be at most 3, the training files of .*, got 4"):
        load_corpus(str(folder), n_shards=4)


def test_a_rewritten_file_is_hashed_again(folder: Path) -> None:
    path = write_jsonl(folder / "books.jsonl", BOOKS)
    first = load_corpus(str(path)).content_hash()
    write_jsonl(path, [text.swapcase() for text in BOOKS])
    os.utime(path, ns=(1, 1))
    second = load_corpus(str(path)).content_hash()
    assert first != second
    assert (
        second == load_corpus(str(write_jsonl(folder / "b.jsonl", [text.swapcase() for text in BOOKS]))).content_hash()
    )


def test_a_damaged_index_is_rebuilt(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(folder / "books.jsonl", BOOKS)
    monkeypatch.setattr(documents, "SETTLED_NS", 0)
    before = load_corpus(str(path)).content_hash()
    (index,) = (cache / "documents").glob("*.index")
    index.write_bytes(index.read_bytes()[:-7])
    assert load_corpus(str(path)).content_hash() == before


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl, line 3: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 1}\n',
            r'line 2: needs a string in the field "text".*body, id',
        ),
        ("a.jsonl", b'{"text": 5}\n', r'line 1: needs a string in the field "text", found 5'),
        ("a.jsonl", b'{"text": null}\n', r'line 1: needs a string in the field "text", found null'),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y", "m": ' + b"[" * 100_000, r"line 2: JSON must not be nested"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", r"line 1: an integer in JSON must have at most 4,300"),
        ("a.jsonl", b"[1]\n", r'line 1: needs a string in the field "text", found list'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1:.*surrogate"),
        ("a.txt", b"caf\xe9", r"a.txt: must be UTF-8, byte 3"),
        ("a.txt.xz", b"not an archive", r"a.txt.xz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], r"a.txt.gz cannot be read"),
        ("a.csv", b"text", r"must be .txt or .jsonl"),
        ("a.txt", b" \n", r"no text for train"),
        ("a.txt", b"one line", r"3 splits cannot be cut from 1 lines of text; at least 3 lines, or 1,000 characters"),
    ],
)
def test_bad_text_is_named_with_file_and_place(folder: Path, name: str, raw: bytes, message: str) -> None:
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(str(folder / name))
    assert "\n" not in str(caught.value)


def test_an_error_for_a_folder_that_is_not_a_corpus_gives_the_reason(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .txt or .jsonl"):
        load_corpus(str(folder))
    (folder / "val.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has val.txt but no training file"):
        load_corpus(str(folder))


NOVEL = "\n\n".join(
    f"Paragraph {i} tells of {i * i} sheep on {i % 7} hills and a shepherd.\nHe sleeps." for i in range(400)
)

ONE_LINE = " ".join(NOVEL.split())
SHORT_LINES = "\n".join(f"{i} sheep, {i * i} hills" for i in range(4000))
CHINESE = "\n".join("".join(random.Random(i).choices("天地玄黃宇宙洪荒日月盈昃辰宿列張", k=40)) for i in range(400))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": NOVEL, "val": NOVEL}, r"train \(train.txt\) and val \(val.txt\)"),
        ({"train": NOVEL, "test": NOVEL}, r"train \(train.txt\) and test \(test.txt\)"),
        ({"train": NOVEL, "val": NOVEL, "test": "other"}, r"train \(train.txt\) and val \(val.txt\)"),
        ({"train": "other " * 99, "val": NOVEL, "test": NOVEL}, r"val \(val.txt\) and test \(test.txt\)"),
        ({"train": NOVEL, "val": "\ufeff" + NOVEL}, r"train \(train.txt\) and val \(val.txt\)"),
        ({"train": NOVEL, "val": NOVEL + "\n"}, "100% of val.txt is in the training text; val must be"),
        ({"train": NOVEL.replace("\n", "\r\n"), "val": NOVEL}, "100% of val.txt is in the training text"),
        ({"train": NOVEL, "test": NOVEL[-3000:]}, r"\d+% of test.txt is in the training text; test must"),
        ({"train-0": "other " * 99, "train-1": NOVEL, "val": NOVEL[:3000]}, "of val.txt is in the training text"),
        ({"train": ONE_LINE, "val": ONE_LINE + "\n"}, "100% of val.txt is in the training text"),
        ({"train": ONE_LINE, "val": ONE_LINE[len(ONE_LINE) // 2 :]}, "of val.txt is in the training text"),
        ({"train": SHORT_LINES, "val": SHORT_LINES + "\nx"}, "100% of val.txt is in the training text"),
        ({"train": NOVEL, "val": NOVEL.replace(" ", "  ")}, "100% of val.txt is in the training text"),
        ({"train": NOVEL, "val": NOVEL.replace(" on ", "\non ")}, "100% of val.txt is in the training text"),
        ({"train": CHINESE, "val": CHINESE[5000:]}, "of val.txt is in the training text"),
    ],
)
def test_training_text_as_text_of_an_evaluation_is_refused(folder: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    with pytest.raises(ValueError, match=message):
        load_corpus(str(folder))


def test_splits_with_many_common_lines_are_noted(folder: Path) -> None:
    own = NOVEL.replace("sheep", "goats")
    for name, text in {"train": NOVEL, "val": own[:6000] + NOVEL[:6000], "test": own[6000:]}.items():
        (folder / f"{name}.txt").write_text(text)
    (note,) = load_corpus(str(folder)).notes
    assert re.fullmatch(r"(4[5-9]|5[0-5])% of val.txt is in the training text: scores on val .*", note)
    (folder / "val.txt").write_text(own[:6000])
    assert load_corpus(str(folder)).notes == ()


def test_passages_of_long_texts_are_sampled_consistently_across_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "SAMPLE", 100)
    lines = [f"line {i} of a text that has very many of them" for i in range(10_000)]
    whole, mask = overlap.sample_passages([(True, "\n".join(lines))])
    part, part_mask = overlap.sample_passages([(i == 0, f"{line}\n") for i, line in enumerate(lines[:2000])])
    assert len(whole) <= 100
    assert mask > part_mask > 0
    common = part[part & np.uint64(mask) == 0]
    assert len(common) >= 8
    assert set(common.tolist()) <= set(whole.tolist())


def text8(n_words: int) -> str:
    return " ".join(f"word{i}" for i in range(n_words))


@pytest.mark.parametrize("around", [("", ""), ("\n", "\n"), ("Title\n\n", "\n\nend"), ("One\nTwo\nThree\n", "")])
def test_a_giant_line_is_cut_between_words_with_a_note(folder: Path, around: tuple[str, str]) -> None:
    text = around[0] + text8(300_000) + around[1]
    (folder / "giant.txt").write_text(text)
    corpus = load_corpus(str(folder / "giant.txt"))
    parts = ["".join(corpus.documents(split)) for split in SPLITS]
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 3) for part in parts] == [0.9, 0.05, 0.05]
    assert all(part.startswith("word") and before[-1] == " " for before, part in pairwise(parts))
    assert corpus.notes == ("giant.txt has too few lines: val and test are cut from its end between words",)


def test_a_text_without_blanks_is_cut_at_the_exact_shares(folder: Path) -> None:
    (folder / "dna.txt").write_text("".join(random.Random(0).choices("ACGT", k=200_000)))
    corpus = load_corpus(str(folder / "dna.txt"))
    assert [corpus.n_bytes(split) for split in SPLITS] == [180_000, 10_000, 10_000]


def test_a_byte_order_mark_is_not_part_of_a_document(folder: Path) -> None:
    for name, text in {"with": "\ufeff" + NOVEL, "without": NOVEL}.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    record = json.dumps({"text": NOVEL}).encode()
    for name, mark in {"with": b"\xef\xbb\xbf", "without": b""}.items():
        (folder / f"{name}.jsonl").write_bytes(mark + record)
    hashes = {load_corpus(str(file)).content_hash() for file in folder.iterdir()}
    assert len(hashes) == 1
    (folder / "utf-16.txt").write_text(NOVEL, encoding="utf-16")
    with pytest.raises(ValueError, match=r"utf-16.txt: must be UTF-8, got UTF-16"):
        load_corpus(str(folder / "utf-16.txt"))


def test_a_text_replaced_at_equal_size_and_time_is_read_again(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(folder / "books.jsonl", BOOKS)
    time.sleep(2 * documents.SETTLED_NS / 1e9)
    before, status = load_corpus(str(path)).content_hash(), path.stat()
    assert len(list((cache / "documents").glob("*.index"))) == 1
    monkeypatch.setattr(documents, "index_chunks", None)
    assert load_corpus(str(path)).content_hash() == before
    monkeypatch.undo()
    monkeypatch.setenv("EXPLORE_CACHE", str(cache))
    write_jsonl(path, [text.swapcase() for text in BOOKS])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert load_corpus(str(path)).content_hash() != before


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl.gz"])
def test_a_path_that_is_not_a_regular_file_is_refused_without_blocking(folder: Path, name: str) -> None:
    write_jsonl(folder / "books.jsonl", BOOKS)
    os.mkfifo(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=rf"{name}: must be a file, got a FIFO"):
            load_corpus(str(path))
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name}: must be a file, got a folder"):
        load_corpus(str(folder))
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        (folder / name).rmdir()
        server.bind(name)
        with pytest.raises(ValueError, match=rf"{name}: must be a file, got a socket"):
            load_corpus(str(folder))
    with pytest.raises(ValueError, match=r"/dev/null: must be a file, got a device"):
        load_corpus("/dev/null")


@pytest.mark.parametrize(
    ("name", "pack"), [("bomb.txt.gz", gzip.compress), ("bomb.txt.xz", lzma.compress), ("bomb.jsonl.gz", gzip.compress)]
)
def test_a_decompression_bomb_is_refused_with_the_limit(
    folder: Path, name: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXPANSION_FREE_BYTES", 1 << 20)
    (folder / name).write_bytes(pack(bytes(1 << 24)))
    with pytest.raises(ValueError, match=rf"{name}: must hold at most \d+ times its size on disk"):
        load_corpus(str(folder / name))


def test_a_line_too_long_for_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LINE_BYTES", 10_000)
    path = write_jsonl(folder / "books.jsonl", [*BOOKS, "x" * 20_000])
    with pytest.raises(ValueError, match=r"books.jsonl, line 101: must have at most 10,000 bytes, got more"):
        load_corpus(str(path))


def test_shards_of_many_documents_are_split_as_with_a_dictionary(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", BOOKS[:70] + BOOKS[:10])
    write_jsonl(folder / "b.jsonl", BOOKS[50:])
    ranked = sorted({hashlib.sha256(text.encode()).digest() for text in BOOKS})
    owner = dict.fromkeys(ranked, "train") | dict.fromkeys(ranked[:5], "val") | dict.fromkeys(ranked[5:10], "test")
    corpus = load_corpus(str(folder))
    for split in SPLITS:
        expected = [
            text
            for text in BOOKS[:70] + BOOKS[:10] + BOOKS[50:]
            if owner[hashlib.sha256(text.encode()).digest()] == split
        ]
        assert list(corpus.documents(split)) == expected
