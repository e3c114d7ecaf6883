"""Data configs: JSON in and out, and a fingerprint of the content."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from explore.data import DataConfig, RecallData, TextData, load_corpus, load_tokenizer
from explore.data.known import ASSETS

CONFIGS = [
    TextData(),
    TextData(corpus="gutenberg", tokenizer="bytes", seq_len=64, n_shards=2),
    RecallData(),
    RecallData(n_pairs=3, n_queries=2, vocab_size=40),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_config_is_read_back_from_json(config: TextData | RecallData) -> None:
    adapter: TypeAdapter[TextData | RecallData] = TypeAdapter(DataConfig)
    assert adapter.validate_json(config.model_dump_json()) == config
    assert hash(adapter.validate_json(config.model_dump_json())) == hash(config)


def test_the_fingerprint_is_of_content_and_not_of_paths(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        text = lzma.decompress((ASSETS / f"austen-{split}.txt.xz").read_bytes())
        (tmp_path / f"{split}.txt").write_bytes(text)
    shutil.copy(ASSETS / "austen-bpe-2048.json", tmp_path / "copy.json")
    elsewhere = TextData(corpus=str(tmp_path), tokenizer=str(tmp_path / "copy.json"))
    assert elsewhere.fingerprint() == TextData().fingerprint()
    assert str(tmp_path) not in json.dumps(elsewhere.fingerprint())


def test_a_change_to_the_batches_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n\nThree.\n\nFour.")
    changed = [
        TextData(),
        TextData(seq_len=128),
        TextData(tokenizer="bytes"),
        TextData(corpus=str(tmp_path)),
        *CONFIGS[2:],
        RecallData(n_eval=9),
    ]
    assert len({json.dumps(config.fingerprint()) for config in changed}) == len(changed)


def test_the_fingerprint_names_the_content_of_each_split_and_of_the_tokenizer() -> None:
    corpus = load_corpus("austen")
    assert TextData(seq_len=32).fingerprint() == {
        "kind": "text",
        "seq_len": 32,
        "train": corpus.content_hash("train"),
        "val": corpus.content_hash("val"),
        "test": corpus.content_hash("test"),
        "tokenizer": load_tokenizer("austen-bpe-2048").content_hash,
    }


def test_a_split_shorter_than_one_window_is_named(tmp_path: Path) -> None:
    for name, text in {"train": "a" * 100, "val": "b" * 30, "test": "c" * 100}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=r"seq_len must be below 31, the number of tokens in val of .*, got 31"):
        TextData(corpus=str(tmp_path), tokenizer="bytes", seq_len=31).open(0)
    source = TextData(corpus=str(tmp_path), tokenizer="bytes", seq_len=30).open(0)
    assert (source.vocab_size, source.n_train_tokens) == (257, 101)


@pytest.mark.parametrize(
    ("fields", "place"),
    [({"seq_len": 0}, "seq_len"), ({"n_shards": 0}, "n_shards"), ({"sequence": 1}, "sequence")],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, int], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TextData(**fields)
    assert caught.value.errors()[0]["loc"] == (place,)
