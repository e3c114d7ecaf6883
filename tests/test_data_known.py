"""Named corpora and data sets: the text on record, or an error that says how to get it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from explore.data import CORPORA, SPLITS, KnownCorpus, known, load_corpus

BOOKS = [f"Book {i} — café\n\nChapter {i * i}.\n\nThe end of {i}.\n" for i in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"title": "t", "text": text}) + "\n" for text in texts))
    return path


def test_the_embedded_corpus_is_six_novels_with_the_bytes_on_record() -> None:
    corpus = load_corpus("austen")
    assert {split: corpus.n_bytes(split) for split in SPLITS} == {"train": 3122329, "val": 433230, "test": 466759}
    for split, opening in {"train": "EMMA", "val": "NORTHANGER ABBEY", "test": "Persuasion"}.items():
        (text,) = corpus.documents(split)
        assert text.startswith(opening)
        assert len(text.encode()) == corpus.n_bytes(split)
        key = hashlib.sha256(hashlib.sha256(text.encode()).digest()).hexdigest()
        assert corpus.content_hash(split) == key


def test_an_error_for_an_unknown_corpus_suggests_near_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'austn' is neither a known name \(austen, .*did you mean 'austen'"):
        load_corpus("austn")
    monkeypatch.delenv("EXPLORE_DATA", raising=False)
    with pytest.raises(ValueError, match=r"'gutenberg' .*EXPLORE_DATA.* is not set"):
        load_corpus("gutenberg")
    monkeypatch.setenv("EXPLORE_DATA", "/nowhere")
    with pytest.raises(ValueError, match="needs the folder /nowhere/gutenberg, which does not exist"):
        load_corpus("gutenberg")


def test_a_named_corpus_must_have_the_text_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("train-0", "train-1", "val", "test"):
        (folder / f"{name}.txt").write_text(f"text of {name}")
    once = hashlib.sha256
    files = {
        name: once(once(f"text of {name}".encode()).digest()).hexdigest()
        for name in ("train-0", "train-1", "val", "test")
    }
    monkeypatch.setenv("EXPLORE_DATA", str(tmp_path))
    for module in (known, sys.modules["explore.data.corpora"]):
        monkeypatch.setattr(module, "CORPORA", {"tiny": KnownCorpus("here", "free", files)})
    assert list(load_corpus("tiny").documents("train")) == ["text of train-0", "text of train-1"]
    assert list(load_corpus("tiny", 1).documents("train")) == ["text of train-0"]
    (folder / "train-1.txt").write_text("other text")
    assert list(load_corpus("tiny", 1).documents("train")) == ["text of train-0"]
    with pytest.raises(ValueError, match="'tiny': train-1 must have the content hash"):
        load_corpus("tiny")
    (folder / "train-1.txt").unlink()
    with pytest.raises(ValueError, match=r"'tiny': train-1 must have the content hash .* found no such file"):
        load_corpus("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, record in CORPORA.items() if record.folder is None])
def test_the_data_folder_holds_the_text_on_record(name: str) -> None:
    if not os.environ.get("EXPLORE_DATA"):
        pytest.skip("EXPLORE_DATA is not set")
    corpus = load_corpus(name, n_shards=1 if name == "gutenberg" else None)
    assert all(corpus.n_documents(split) for split in SPLITS)


def test_a_hugging_face_folder_is_a_corpus_without_evaluation_text_in_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write_jsonl(folder / "train.jsonl", [*BOOKS[:80], "", BOOKS[85]])
    write_jsonl(folder / "validation.jsonl", BOOKS[80:90])
    write_jsonl(folder / "test.jsonl", BOOKS[90:])
    corpus = load_corpus(f"hf:{folder}")
    assert [list(corpus.documents(s)) for s in SPLITS] == [BOOKS[:80], BOOKS[80:90], BOOKS[90:]]
    with pytest.raises(ValueError, match=r"n_shards must be null for .*, got 1"):
        load_corpus(f"hf:{folder}", n_shards=1)
    with pytest.raises(ValueError, match=r"must be followed by the name or folder of a data set, got 'hf:/nowhere'"):
        load_corpus("hf:/nowhere")


def test_without_datasets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'hybrid-frontier\[hf\]'"):
        load_corpus("hf:anything")
