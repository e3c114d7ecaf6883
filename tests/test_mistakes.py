"""Input of a person is applied or refused, and an error suggests what may have been meant."""

from __future__ import annotations

import json
import os
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from pydantic import ValidationError

from explore.blocks import STANDARD_LETTERS
from explore.blocks.declarations import divisors
from explore.config import LARGEST, explain, set_field
from explore.cost import D_MODEL, HARDWARE, SEQ_LEN, VOCAB_SIZE
from explore.data import TextData
from explore.experiment import Experiment, TrainConfig
from explore.model import GREEDY, ModelConfig, Sampling
from explore.presets import preset
from explore.solve import match, solve
from explore.workbench import Workbench

MODEL = {"d_model": 256, "vocab_size": 300, "pattern": "M*-E"}
EXPERIMENT = {"name": "one", "model": MODEL, "data": {"kind": "text"}, "train": {"tokens": 1000}}
RUN = str(Path(__file__).parents[1] / "sweeps" / "records" / "latent_or_not.parquet")


def refusal(config: type[Any], content: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        config.model_validate(content)
    return explain(caught.value)


# Unknown fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": MODEL}, "modle: unknown field; did you mean model? (and 4 more)"),
        ({**EXPERIMENT, "lr": 1}, "lr: unknown field; did you mean train.lr?"),
        (
            {**EXPERIMENT, "vocab_size": 1},
            "vocab_size: unknown field; did you mean model.vocab_size or data.vocab_size?",
        ),
        ({**EXPERIMENT, "E": {"top_k": 1}}, "E: unknown field; did you mean model.blocks.E?"),
        ({**EXPERIMENT, "qqqqq": 1}, "qqqqq: unknown field"),
        ({**EXPERIMENT, "data": {"kind": "text", "corpsu": "a"}}, "data.corpsu: unknown field; did you mean corpus?"),
        (
            {**EXPERIMENT, "model": {**MODEL, "blocks": {"M": {"d_stat": 3}}}},
            "model.blocks.M.d_stat: unknown field; did you mean d_state?",
        ),
    ],
)
def test_an_unknown_field_is_reported_with_a_suggestion(content: dict[str, Any], message: str) -> None:
    assert refusal(Experiment, content) == message


def test_a_long_path_and_a_long_value_are_cut() -> None:
    assert len(refusal(TrainConfig, {"tokens": 1, "x" * 100_000: 1})) < 150
    assert len(refusal(TrainConfig, {"tokens": "x" * 100_000})) < 200


# Numbers


def test_a_count_may_have_a_suffix_and_has_the_same_key() -> None:
    train = TrainConfig.model_validate({"tokens": "200k", "eval_tokens": "1.5M", "lr": "0.002"})
    assert train == TrainConfig(tokens=200_000, eval_tokens=1_500_000, lr=0.002)
    short, plain = (
        Experiment.model_validate({**EXPERIMENT, "train": {"tokens": tokens}}) for tokens in ("20k", 20_000)
    )
    assert short.key() == plain.key()
    wide, plain_wide = (ModelConfig.model_validate({**MODEL, "d_model": d_model}) for d_model in ("1.024k", 1024))
    assert wide == plain_wide


def test_text_that_looks_like_a_count_stays_text_in_text_fields() -> None:
    named = Experiment.model_validate({**EXPERIMENT, "name": "5M", "data": {"kind": "text", "corpus": "10k"}})
    assert isinstance(named.data, TextData)
    assert (named.name, named.data.corpus) == ("5M", "10k")


@pytest.mark.parametrize("value", [LARGEST + 1, str(LARGEST + 1), 10**400, "9" * 4000, "10E"])
def test_a_number_too_large_to_count_is_refused(value: object) -> None:
    for change in ({"vocab_size": value}, {"d_model": value}, {"blocks": {"M": {"d_state": value}}}):
        line = refusal(ModelConfig, {**MODEL, **change})
        assert "must be" in line or "too large" in line
        assert len(line) < 300


def test_the_largest_sizes_are_counted() -> None:
    model = ModelConfig.model_validate({**MODEL, "vocab_size": LARGEST, "blocks": {"-": {"d_ff": LARGEST}}})
    assert model.cost(LARGEST).flops_train > 1e22
    with pytest.raises(ValueError, match="seq_len must be at least 1 and at most"):
        model.ledger(LARGEST + 1)


# Letters


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"e": {"d_latent": 64}}, "blocks: unknown letter 'e'; did you mean 'E'?"),
        ({"Q": {}}, "blocks: unknown letter 'Q'; known are M G"),
        ({"MM": {"kind": "mamba2"}}, "blocks: a letter must be one character that patterns can have, got 'MM'"),
        ({"/": {"kind": "mamba2"}}, "blocks: a letter must be one character that patterns can have, got '/'"),
        ({" ": {"kind": "mamba2"}}, "blocks: a letter must be one character that patterns can have, got ' '"),
    ],
)
def test_a_block_that_no_pattern_can_use_is_refused(blocks: dict[str, Any], message: str) -> None:
    assert refusal(ModelConfig, {**MODEL, "blocks": blocks}).startswith(message)


def test_depths_of_the_pattern_and_of_mtp_must_agree() -> None:
    assert refusal(ModelConfig, {**MODEL, "pattern": "M/*/*", "mtp": {"n_depths": 3}}).startswith("mtp: n_depths must")
    assert ModelConfig.model_validate({**MODEL, "pattern": "M/*", "mtp": {"n_depths": 3}}).mtp is not None
    assert "must be at most 128" in refusal(ModelConfig, {**MODEL, "mtp": {"pattern": "M", "n_depths": 10**9}})


@pytest.mark.parametrize("seq_len", [1, 2])
def test_sequences_must_be_longer_than_there_are_depths(seq_len: int) -> None:
    model = {**MODEL, "mtp": {"pattern": "*", "n_depths": 2}}
    content = {**EXPERIMENT, "model": model, "data": {"kind": "text", "seq_len": seq_len}}
    assert refusal(Experiment, content) == f"model.mtp: n_depths must be below data.seq_len={seq_len}, got 2"
    Experiment.model_validate({**content, "data": {"kind": "text", "seq_len": 3}})


# Copies


def test_a_copy_with_another_width_is_the_model_of_that_width() -> None:
    model = ModelConfig.model_validate(
        {**MODEL, "blocks": {"E": {"d_latent": 32, "n_experts": 16}, "M": {"d_state": 8}}}
    )
    for wide in (model.replace(d_model=512), model.model_copy(update={"d_model": 512})):
        assert wide == ModelConfig.model_validate(
            {**MODEL, "d_model": 512, "blocks": {"E": {"d_latent": 32, "n_experts": 16}, "M": {"d_state": 8}}}
        )
    assert model.replace(d_model=256) == model.model_copy() == model


def test_a_copy_keeps_fields_that_are_not_named() -> None:
    model = ModelConfig.model_validate({**MODEL, "pattern": "ME/*", "blocks": {"E": {"d_latent": 32, "n_experts": 16}}})
    other = model.replace(blocks={"E": {"top_k": 2}})
    assert other.blocks["E"] == model.blocks["E"].model_copy(update={"top_k": 2})
    assert (other.blocks["M"], other.mtp) == (model.blocks["M"], model.mtp)
    assert model.replace(pattern="ME-").blocks["-"] == STANDARD_LETTERS["-"].default(256)
    assert model.replace(pattern="M/*/*").mtp == ModelConfig.model_validate({**MODEL, "pattern": "M/*/*"}).mtp
    own = {"kind": "mlp", "d_ff": 24}
    assert model.replace(pattern="MX", blocks={"X": own}).blocks["X"].model_dump()["d_ff"] == 24


@pytest.mark.parametrize("change", [{"d_model": "banana"}, {"d_modle": 64}, {"blocks": "banana"}, {"vocab_size": 0}])
def test_a_copy_is_validated(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate(MODEL).model_copy(update=change)
    with pytest.raises(ValidationError):
        TrainConfig(tokens=1).model_copy(update={"tokens": None})


# The command line


def test_set_creates_absent_fields_and_refuses_invalid_paths() -> None:
    content: dict[str, Any] = {"mtp": None}
    set_field(content, "mtp.n_depths=2")
    assert content == {"mtp": {"n_depths": 2}}
    for override in ("mtp", "=3", ".a=3", "a..b=3", "a.=3"):
        with pytest.raises(ValueError, match=r"must have the form path\.to\.field=value"):
            set_field(content, override)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("cost", "E", "--set", "E.d_latent=64"), "E: unknown field; did you mean blocks.E?"),
        (("cost", "E", "--set", "blocks.e.d_latent=64"), "blocks: unknown letter 'e'; did you mean 'E'?"),
        (("cost", "M", "--set", "blocks.E.d_latent=64"), "the letter must be in the pattern 'M', got 'blocks.E.d_la"),
        (
            ("solve", "M-", "--free", "d_ff", "--target", "params_total=1M", "--set", "blocks.E.top_k=2"),
            "the letter must",
        ),
        (("train", "FILE", "--set", "model.blocks.e.top_k=2"), "unknown letter 'e'; did you mean 'E'?"),
        (("train", "FILE", "--set", "model.blocks.L.n_heads=2"), "the letter must be in the pattern 'M*-E'"),
        (("train", "FILE", "--set", "E.top_k=2"), "E: unknown field; did you mean model.blocks.E?"),
        (("cost", "nemotron-3-nano", "--d-model", "512"), "--d-model: must come with a pattern, got 'nemotron-3-nano'"),
        (("roofline", "FILE", "--vocab-size", "512"), "use --set vocab_size=512"),
        (("cost", "FOLDER"), "must be a file, or a folder with one of experiment.json"),
        (
            ("cost", "M", "--seq-len", "12q"),
            "--seq-len must be a whole number, with or without k, M, B or T, got '12q'",
        ),
        (("cost", "M", "--seq-len", "9" * 400), "--seq-len must be at most 9223372036854775807, got 999"),
        (("cost", "M", "--d-model", "9" * 400), "--d-model must be at most"),
        (("roofline", "M", "--batch-sizes", "9" * 400), "must be positive integers"),
        (("roofline", "M", "--tensor-parallel", "9" * 400), "--tensor-parallel must be at most"),
        (("cost", "M", "--set", "d_model=" + "[" * 100_000), "d_model: input should be a valid integer"),
        (("cost", "M", "--set", "d_model=" + "9" * 5000), "count must be a number"),
        (("cost", "M", "--set", "d_model." + "a." * 50_000 + "b=1"), "'d_model' in"),
        (("train", "FILE", "--set", "seed=" + "{" * 100_000), "seed: input should be a valid integer"),
        (("train", "DEEP"), "JSON must not be nested this deeply"),
        (("train", "DIGITS"), "an integer in JSON must have at most 4,300 digits"),
        (("train", "FIFO"), "must be a file, got a FIFO"),
        (("solve", "NUMBER", "--free", "d_ff", "--target", "params_total=1M"), "must be an experiment, a model"),
        (("solve", "KIND", "--free", "d_ff", "--target", "params_total=1M"), "no candidate is a valid model"),
        (("solve", "M-", "--free", "d_ff=1:" + "9" * 40, "--target", "params_total=1M"), "high must be at most"),
        (("solve", "M-", "--free", "d_ff", "--target", "params_total=1M", "--tolerance", "inf"), "tolerance must be"),
        (("plot", RUN, "--corpus", "gutenbrg"), "--corpus must be a corpus, got 'gutenbrg'; did you mean 'gutenberg'?"),
        (("cost", "M", "--list"), "TARGET: must not be combined with --list, which takes only --json, got 'M'"),
        (("cost", "M", "--json", "--csv"), "--csv: must not be combined with --json"),
        (("data", "FILE", "--out", "x.json"), "--out: must come with --train-bpe"),
        (("eval", "FILE", "--corpus", "austen", "--limit", "3"), "--limit: must come with --pairs"),
        (("eval", "FILE", "--acceptance", "3", "--tokens", "3"), "--tokens: must come with --corpus"),
        (("plot", RUN, "--y", "recall"), "--y must be a quantity with numbers, got 'recall'; "),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
def test_a_change_that_cannot_be_applied_is_one_short_line(
    args: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    files = {
        "FILE": json.dumps(EXPERIMENT),
        "DEEP": "[" * 100_000,
        "DIGITS": '{"seed": ' + "9" * 5000 + "}",
        "NUMBER": '{"model": 5}',
        "KIND": json.dumps(
            {**MODEL, "pattern": "-", "blocks": {"-": {"kind": []}, "M": {"kind": {}}}, "mtp": {"pattern": 5}}
        ),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    os.mkfifo(tmp_path / "FIFO.json")
    (tmp_path / "FOLDER.json").mkdir()
    args = tuple(str(tmp_path / f"{arg}.json") if arg in (*files, "FIFO", "FOLDER") else arg for arg in args)
    if "FOLDER" in args[1]:
        args = (args[0], str((tmp_path / "FOLDER.json").rename(tmp_path / "folder")))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, monkeypatch, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert len(err) <= 400
    assert sorted(tmp_path.rglob("*")) == before


def test_counts_on_the_command_line_may_have_a_suffix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = run(capsys, monkeypatch, "cost", "M", "--json", "--seq-len", "128k", "--vocab-size", "2k")
    assert short == run(capsys, monkeypatch, "cost", "M", "--json", "--seq-len", "128000", "--vocab-size", "2000")
    assert short[0] == 0


def test_a_run_folder_is_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "experiment.json").write_text(json.dumps({"key": "0", "experiment": EXPERIMENT}))
    found = [run(capsys, monkeypatch, "cost", str(path), "--json") for path in (tmp_path, tmp_path / "experiment.json")]
    assert found[0] == found[1]
    assert found[0][0] == 0


def test_a_preset_takes_other_sizes_by_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("cost", "nemotron-3-nano", "--json", "--set", "vocab_size=512")
    expected = preset("nemotron-3-nano").replace(vocab_size=512).cost(SEQ_LEN).params_total
    assert json.loads(run(capsys, monkeypatch, *args)[1])["params_total"] == expected


def test_all_commands_and_the_workbench_have_the_same_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(d_model=D_MODEL, vocab_size=VOCAB_SIZE, pattern="M*")
    cost = json.loads(run(capsys, monkeypatch, "cost", "M*", "--json")[1])
    roofline = json.loads(run(capsys, monkeypatch, "roofline", "M*", "--json")[1])
    bench = Workbench("M*")
    assert (cost["params_total"], cost["seq_len"]) == (model.cost(SEQ_LEN).params_total, SEQ_LEN)
    assert (roofline["context"], roofline["hardware"]) == (SEQ_LEN, HARDWARE)
    assert roofline["state_bytes"] == model.cost(SEQ_LEN).state_bytes
    assert bench.config == model
    assert (bench.view["state"]["seq_len"], bench.view["state"]["hardware"]) == (SEQ_LEN, HARDWARE)
    assert {signature(each).parameters["seq_len"].default for each in (solve, match)} == {SEQ_LEN}


# Runs that cannot be compared


def write_run(folder: Path, corpus: str, val_bpb: float, flops: float, **result: Any) -> None:
    """The record of a finished run with only the fields that a front needs."""
    folder.mkdir(parents=True)
    experiment = {"name": folder.name, "model": {"pattern": "M*"}, "data": {"kind": "text", "corpus": corpus}}
    records = {
        "experiment": {"key": folder.name, "experiment": experiment},
        "environment": {"data": {"kind": "text", "train": "0", "val": f"val of {corpus}", "test": "1"}},
        "result": {"status": "finished", "val_bpb": val_bpb, "flops_run": flops, **result},
    }
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_runs_on_two_texts_have_separate_fronts_in_a_table_and_no_common_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for i, (corpus, val_bpb, flops) in enumerate(
        [("a", 2.0, 1e12), ("a", 2.1, 2e12), ("b", 3.0, 1e12), ("b", 2.9, 2e12)]
    ):
        write_run(tmp_path / f"{corpus}{i}", corpus, val_bpb, flops)
    shown = run(capsys, monkeypatch, "table", str(tmp_path))[1]
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("●") and "front of" not in line] == [
        ["●", "a0"], ["●", "b3"], ["●", "b2"]
    ]  # fmt: skip
    assert "corpus" in shown
    picture = tmp_path / "picture.png"
    code, _, err = run(capsys, monkeypatch, "plot", str(tmp_path), "--out", str(picture))
    assert (code, picture.exists()) == (2, False)
    assert "val_bpb cannot be compared between runs on different data; there are 2 on 'a', 2 on 'b'" in err
    assert run(capsys, monkeypatch, "plot", str(tmp_path), "--out", str(picture), "--corpus", "a")[0] == 0
    assert picture.exists()
    for folder in tmp_path.glob("a*"):
        shutil.rmtree(folder)
    assert "all: corpus b" in run(capsys, monkeypatch, "table", str(tmp_path))[1].splitlines()


def test_a_figure_without_a_point_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_run(tmp_path / "one", "a", 2.0, 1e12, status="pruned", test_bpb=2.0)
    for more in ((), ("--y", "recall"), ("--y", "test_bpb")):
        code, _, err = run(capsys, monkeypatch, "plot", str(tmp_path), *more)
        assert (code, err.count("\n")) == (2, 1)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1e308", "NaN", '"x"', "{}", "[[]]", "9" * 5000, "[" * 5000])
def test_a_table_reads_records_with_any_number(
    number: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_run(tmp_path / "one", "a", 2.0, 1e12)
    fields = ("params_total", "params_mtp", "flops_train", "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "family")
    (tmp_path / "one" / "cost.json").write_text("{" + ", ".join(f'"{name}": {number}' for name in fields) + "}")
    assert run(capsys, monkeypatch, "table", str(tmp_path), "--json", "--unfinished")[0] == 0


# Extreme sizes and temperatures


@pytest.mark.parametrize("heads", [10**9, 2**62, LARGEST])
def test_the_workbench_takes_any_number_of_heads(heads: int) -> None:
    sizes = {"n_heads": heads, "n_kv_heads": 1, "d_head": 64}
    shown = Workbench("*", blocks={"*": sizes}).view
    [slider] = [each for each in shown["sliders"] if each["label"] == "n_kv_heads"]
    assert slider["values"][0] == 1
    assert slider["values"][-1] == heads
    assert not any(heads % value for value in slider["values"])


@pytest.mark.parametrize("n", [1, 2, 12, 97, 360, 10**6])
def test_all_divisors_of_a_usual_number_are_found(n: int) -> None:
    assert divisors(n) == [k for k in range(1, n + 1) if n % k == 0]


@pytest.mark.parametrize("temperature", [1e-38, 1e-320, 1e-31])
def test_the_coldest_temperatures_take_the_most_probable_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 100.0, -50.0], [3.0, 2.0, 1.0]])
    assert torch.equal(Sampling(temperature).probabilities(logits), GREEDY.probabilities(logits))
    assert Sampling(temperature).draw(logits, torch.Generator().manual_seed(0)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [2e-30, 1e-20, 1e-3])
def test_colder_and_colder_temperatures_come_near_the_most_probable_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 100.0, -50.0], [3.0, 2.0, 1.0]])
    torch.testing.assert_close(Sampling(temperature).probabilities(logits), GREEDY.probabilities(logits))
