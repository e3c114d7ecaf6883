"""Experiments: fields of the key, steps of a budget, and errors for an invalid file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from explore.data import TextData
from explore.experiment import Experiment, TrainConfig, set_field
from explore.model import ModelConfig
from explore.runs import read_packed

SWEEPS = Path(__file__).parents[1] / "sweeps"
RECORDS = sorted((SWEEPS / "records").glob("*.parquet"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, n in (("train", 200), ("val", 20), ("test", 20)):
        (folder / f"{split}.txt").write_text("".join(f"{split} line {i} says {i * i}.\n" for i in range(n)))
    return folder


def content(corpus: Path, **changes: Any) -> dict[str, Any]:
    record = {
        "name": "tiny",
        "model": {"d_model": 64, "vocab_size": 257, "pattern": "M*-"},
        "data": {"kind": "text", "corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32},
        "train": {"tokens": 2560, "batch_size": 4},
    }
    for path, value in changes.items():
        set_field(record, f"{path.replace('__', '.')}={json.dumps(value)}")
    return record


def experiment(corpus: Path, **changes: Any) -> Experiment:
    return Experiment.model_validate(content(corpus, **changes))


def written(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_the_key_ignores_the_name_and_the_path_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    key = experiment(corpus).key()
    elsewhere = shutil.copytree(corpus, tmp_path / "elsewhere")
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    assert experiment(corpus, name="another").key() == key
    assert experiment(elsewhere).key() == key


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"train__lr": 1e-3},
        {"train__precision": "bf16"},
        {"train__tokens": 5120},
        {"model__pattern": "M*-M"},
        {"data__seq_len": 16},
        {"data__tokenizer": "austen-bpe-2048", "model__vocab_size": 2048},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_every_field_that_affects_the_result(corpus: Path, change: dict[str, Any]) -> None:
    assert experiment(corpus, **change).key() != experiment(corpus).key()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_key_changes_with_the_text_of_every_split(corpus: Path, split: str) -> None:
    key = experiment(corpus).key()
    with (corpus / f"{split}.txt").open("a") as file:
        file.write("one more line\n")
    assert experiment(corpus).key() != key


@pytest.mark.parametrize(
    ("name", "key", "stable_key"),
    [
        (
            "latent_moe",
            "a837db6dd79a98b0c25fd790f2e485b1cd20be1c3fdc89dd00c118b25266d565",
            "d7e488b36bd950a1b60582f02f58384476471ba1d623c19b4e388110b978b5a0",
        ),
        (
            "latent_moe_mtp",
            "b3d449ff1c613d0e4a6f056d2f9b7f87a339535230c41ac6596daefb34293344",
            "c8ed57a2d139f9567a6a83fb9ef51e349af8cf72d2c0f4a992332a6bb8c2138a",
        ),
    ],
)
def test_the_keys_of_the_examples_are_unchanged(name: str, key: str, stable_key: str) -> None:
    one = Experiment.load(SWEEPS / "examples" / f"{name}.json")
    assert (one.key(), one.stable_key()) == (key, stable_key)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_still_has_its_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in read_packed(path):
        data, written = run.environment["data"], run.experiment["experiment"]
        with monkeypatch.context() as patch:
            patch.setattr(TextData, "fingerprint", lambda _, data=data: data)  # most of the corpora are elsewhere
            assert run.load_experiment().key() == run.key
        content = {"numerics": 3, "data": data, **{name: written[name] for name in ("model", "train", "seed")}}
        assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == run.key


def test_start_and_objective_are_written_only_if_they_differ_from_the_default(corpus: Path) -> None:
    one = experiment(corpus)
    assert experiment(corpus, start={"kind": "fresh"}, train__objective={"kind": "next_token"}) == one
    assert one.model_dump(mode="json").keys() == {"name", "model", "data", "train", "seed"}
    assert "objective" not in one.model_dump(mode="json")["train"]


def test_a_new_field_of_a_block_changes_the_key_only_if_it_is_used(corpus: Path) -> None:
    one = experiment(corpus, model__pattern="*-")
    keys = {
        experiment(corpus, model__pattern="*-", model__blocks={"*": {"output_gate": gate}}).key()
        for gate in (False, True)
    }
    assert one.key() in keys
    assert len(keys) == 2


def test_an_explicit_default_does_not_change_the_key(corpus: Path) -> None:
    assert experiment(corpus, train__optimizer="adamw", seed=0).key() == experiment(corpus).key()


@pytest.mark.parametrize("pattern", ["-", "M*E", "MEM*E-"])
def test_json_gives_the_same_experiment_back(corpus: Path, tmp_path: Path, pattern: str) -> None:
    one = experiment(corpus, model__pattern=pattern, train__betas=[0.8, 0.99], seed=3)
    assert Experiment.model_validate_json(one.model_dump_json()) == one
    assert Experiment.load(written(tmp_path / "plain.json", one.model_dump(mode="json"))) == one
    record = {"key": one.key(), "experiment": one.model_dump(mode="json")}
    loaded = Experiment.load(written(tmp_path / "record.json", record))
    assert loaded == one
    assert hash(loaded) == hash(one)


def test_overrides_win_over_the_file(corpus: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.json", content(corpus))
    loaded = Experiment.load(path, ["train.lr=0.5", "name=bare text", "seed=7", "train.optimizer=muon"])
    assert loaded == experiment(corpus, train__lr=0.5, name="bare text", seed=7, train__optimizer="muon")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1", {"a": 1, "b": {"c": 2}}),
        ("b.c=null", {"b": {"c": None}}),
        ("b.d.e=[1, 2]", {"b": {"c": 2, "d": {"e": [1, 2]}}}),
        ("b.c=x=y", {"b": {"c": "x=y"}}),
    ],
)
def test_an_override_writes_json_or_bare_text(override: str, expected: dict[str, Any]) -> None:
    record: dict[str, Any] = {"b": {"c": 2}}
    set_field(record, override)
    assert record == expected


@pytest.mark.parametrize("override", ["train.lr", "=1", "b.c.d=1"])
def test_an_override_that_cannot_be_written_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ValueError, match=r"^--set: [^\n]*$"):
        set_field({"b": {"c": 2}}, override)


@pytest.mark.parametrize("budget", [{}, {"tokens": 100, "flops": 1e6}], ids=["none", "both"])
def test_exactly_one_budget_is_allowed(budget: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of tokens and flops must be given"):
        TrainConfig(**budget)


def test_warmup_and_decay_may_not_exceed_the_run() -> None:
    with pytest.raises(ValidationError, match="warmup: must be at most 1 - decay"):
        TrainConfig(tokens=100, warmup=0.6, decay=0.5)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (128, 1), (191, 1), (193, 2), (2560, 20)])
def test_a_token_budget_is_rounded_to_whole_steps(corpus: Path, tokens: int, steps: int) -> None:
    one = experiment(corpus, train__tokens=tokens)
    assert one.batch_tokens == 4 * 32
    assert one.n_steps == steps
    assert one.flops_run == 3 * one.model.cost(32).flops_fwd * steps * 128


@pytest.mark.parametrize("steps", [1, 20, 333])
def test_a_flop_budget_pays_for_the_steps_that_cost_that_much(corpus: Path, steps: int) -> None:
    spent = experiment(corpus, train__tokens=128 * steps).flops_run
    record = content(corpus)
    record["train"] = {"flops": spent, "batch_size": 4}
    one = Experiment.model_validate(record)
    assert one.n_steps == steps
    assert one.flops_run == spent


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("train.lrr=1", "train.lrr: unknown field; did you mean lr?"),
        ("model.d_modell=1", "model.d_modell: unknown field; did you mean d_model?"),
        ("data.seqlen=1", "data.seqlen: unknown field; did you mean seq_len?"),
        ("train.lr=0", "train.lr: must be above 0, got 0"),
        ("start.kind=warm", "start.kind: must be fresh or parent, got 'warm'"),
        ("train.objective.kind=kl", "train.objective.kind: must be next_token or distillation, got 'kl'"),
        ("seed=18446744073709551616", "seed must be at most 9223372036854775807, got 18446744073709551616"),
        ("train.tokens=1e16", "train.tokens: must be at most 1000000000000000, got 1e+16"),
        ("train.betas=[1, 0.5]", "train.betas.0: must be below 1, got 1"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: must be below 1, got 1.0"),
        ("train.flops=1", "train: exactly one of tokens and flops must be given, got tokens=2560 flops=1.0"),
    ],
)
def test_a_field_that_is_not_allowed_is_named_by_its_path_in_one_line(
    corpus: Path, tmp_path: Path, change: str, reason: str
) -> None:
    path = written(tmp_path / "tiny.json", content(corpus))
    with pytest.raises(ValueError, match="tiny") as caught:
        Experiment.load(path, [change])
    assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "must hold a JSON object, got list")],
)
def test_a_file_without_a_valid_experiment_is_refused_in_one_line(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        Experiment.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_tokenizer_is_noted_unless_it_is_padding(tmp_path: Path) -> None:
    (tmp_path / "giant.txt").write_text(" ".join(f"word{i}" for i in range(3000)))
    data = TextData(corpus=str(tmp_path / "giant.txt"), tokenizer="bytes", seq_len=32)
    cut = "giant.txt has too few lines: val and test are cut from its end between words"
    for vocab_size, expected in ((257, []), (384, []), (385, ["128 rows"]), (2048, ["1,791 rows"])):
        model = ModelConfig.model_validate({"d_model": 64, "vocab_size": vocab_size, "pattern": "M"})
        experiment = Experiment(name="a", model=model, data=data, train=TrainConfig(tokens=64))
        notes = experiment.notes(data.open(0))
        assert notes[0] == cut
        assert [note.split(": ")[1][: len(rows)] for note, rows in zip(notes[1:], expected, strict=True)] == expected


def test_flops_for_more_tokens_than_any_training_are_refused(corpus: Path) -> None:
    record = content(corpus)
    record["train"] = {"flops": 1e300, "batch_size": 4}
    with pytest.raises(
        ValidationError, match=r"train\.flops: must be at most \S+, the FLOPs of 1,000,000,000,000,000 to"
    ):
        Experiment.model_validate(record)
