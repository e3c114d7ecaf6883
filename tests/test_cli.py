"""The command line: output that programs read, and one clear line for a user's mistake."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from explore import ModelConfig
from explore.cli import app
from explore.data import load_corpus, train_bpe
from explore.experiment import Experiment
from explore.presets import PRESETS, preset
from explore.roofline import Deployment, hardware
from explore.runs import RunFolder
from explore.train import fit

RECORDS = str(Path(__file__).parents[1] / "sweeps" / "records" / "latent_or_not.parquet")
EXPERIMENT = {
    "name": "tiny",
    "model": {
        "d_model": 32,
        "vocab_size": 257,
        "pattern": "ME",
        "blocks": {
            "M": {"n_heads": 2, "d_head": 16, "d_state": 8, "n_groups": 1, "chunk_size": 16},
            "E": {"n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 16},
        },
    },
    "data": {"kind": "text", "corpus": "", "tokenizer": "bytes", "seq_len": 32},
    "train": {"tokens": 1024, "batch_size": 4, "eval_tokens": 256},
}


@pytest.fixture
def experiment_file(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    content = json.loads(json.dumps(EXPERIMENT))
    content["data"]["corpus"] = str(corpus)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(content))
    return path


def test_cost_prints_the_counts_of_the_config_and_of_the_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "cost", "MEM*E", "--d-model", "256", "--vocab-size", "1024", "--json")
    printed = json.loads(out)
    model = ModelConfig(d_model=256, vocab_size=1024, pattern="MEM*E")
    with torch.device("meta"):
        built = sum(weight.numel() for weight in model.build().parameters())
    assert code == 0
    assert printed["params_total"] == built == sum(row["params"] for row in printed["ledger"])
    assert printed["flops_train"] == 3 * printed["flops_fwd"]
    assert printed["flops_fwd"] == pytest.approx(sum(row["flops_fwd"] for row in printed["ledger"]))
    assert {"params_active", "kv_bytes_per_token", "ssm_state_bytes"} <= printed.keys()


def test_cost_reads_models_and_experiments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiment_file: Path, tmp_path: Path
) -> None:
    model_file = tmp_path / "model.json"
    model_file.write_text(json.dumps(EXPERIMENT["model"]))
    printed = [run(capsys, monkeypatch, "cost", str(path), "--json")[1] for path in (experiment_file, model_file)]
    assert printed[0] == printed[1]


def test_cost_counts_presets_by_other_conventions_and_as_csv(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nemotron-3-super"
    totals = json.loads(run(capsys, monkeypatch, "cost", name, "--json")[1])
    assert totals["params_total"] == preset(name).cost(4096).params_total
    other = json.loads(run(capsys, monkeypatch, "cost", name, "--convention", "6nd", "--json")[1])
    assert other["flops_train"] == 3 * other["flops_fwd"] == 6 * totals["params_active_no_embeddings"]
    rows = list(csv.DictReader(run(capsys, monkeypatch, "cost", name, "--csv")[1].splitlines()))
    assert sum(int(row["params"]) for row in rows) == totals["params_total"] + totals["params_mtp"]
    lines = json.loads(run(capsys, monkeypatch, "cost", name, "--diff", "exact,6nd", "--json")[1])["lines"]
    assert {line["component"] for line in lines} >= {"attention", "ssd", "head"}
    assert "M       in_proj" in run(capsys, monkeypatch, "cost", "nemotron-3-nano", "--diff", "exact,megatron")[1]


def test_cost_lists_presets_with_their_published_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = json.loads(run(capsys, monkeypatch, "cost", "--list", "--json")[1])
    assert list(listed) == list(PRESETS)
    assert "nemotron-h-8b" in run(capsys, monkeypatch, "cost", "--list")[1]
    code, out, _ = run(capsys, monkeypatch, "cost", "--published")
    n = sum(len(entry.published) for entry in PRESETS.values())
    assert (code, f"{n} of {n} computed counts" in out) == (0, True)


def test_roofline_prints_the_computed_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("roofline", "nemotron-nano-2-9b", "--hardware", "a10g", "--context", "24576")
    printed = json.loads(run(capsys, monkeypatch, *args, "--json")[1])
    device = hardware("A10G")
    assert printed["largest_batch"] == Deployment(preset("nemotron-nano-2-9b"), device).largest_batch(24_576)
    assert "largest that fits" in run(capsys, monkeypatch, *args)[1]
    assert (
        "all-to-all of 8 devices"
        in run(capsys, monkeypatch, "roofline", "nemotron-3-nano", "--expert-parallel", "8", "--context", "1024")[1]
    )
    assert "1418" in run(capsys, monkeypatch, "roofline", "--published")[1]


def test_solve_meets_the_budgets_of_another_model_or_names_the_obstacle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("solve", "latentmoe-hybrid-73b-acc", "--like", "latentmoe-hybrid-73b-base", "--free", "top_k=16:24")
    code, out, _ = run(capsys, monkeypatch, *args, "--json")
    solved = json.loads(out)
    assert (code, solved["feasible"], solved["values"]) == (0, True, {"blocks.E.top_k": 22})
    assert all(abs(line["residual"]) < 0.01 for line in solved["residuals"])
    code, out, _ = run(
        capsys, monkeypatch, "solve", "-", "--target", "params_active_no_embeddings=3k", "--free", "d_ff=16:64"
    )
    assert code == 1
    assert "in the way: d_ff >= 16" in " ".join(out.split())


def test_prove_counts_random_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "prove", "--cases", "3", "--patterns", "10", "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["phases"]["decode"] == {"cases": 3, "agree": 3}
    assert printed["ledger_s"] > 0


@pytest.mark.parametrize("by", ["letter", "layer", "component"])
def test_cost_tables_show_every_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    code, out, _ = run(capsys, monkeypatch, "cost", "M*-E", "--by", by)
    assert code == 0
    assert "parameters" in out
    assert all(letter in out for letter in "M*-E")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cost", "MEX*E"], "unknown letter 'X' at position 3 of 'MEX*E'"),
        (["cost", "M*", "--d-model", "100"], "d_model: must be a multiple of 16"),
        (["cost", "E", "--set", "blocks.E.top_k=200"], "blocks.E.top_k: must be at most n_experts=128, got 200"),
        (["cost", "M", "--set", "blocks.M.d_stat=3"], "blocks.M.d_stat: unknown field"),
        (["cost", "M", "--set", "blocks"], "path.to.field=value"),
        (["cost", "nothing.json"], "nothing.json: cannot be read"),
        (["cost", "nemotron-3-nan"], "preset: 'nemotron-3-nan' is unknown; the nearest are nemotron-3-nano"),
        (["cost"], "TARGET: a pattern, preset or path is required"),
        (["cost", "M", "--seq-len", "0"], "error: --seq-len must be at least 1, got 0"),
        (["cost", "M", "--d-model", "0"], "error: --d-model must be at least 1, got 0"),
        (["train", "no_such.json", "--devices", "0"], "error: --devices must be at least 1, got 0"),
        (["watch", "no_such", "--every", "0.05"], "error: --every must be at least 0.1, got 0.05"),
        (["proxy", "wandb.me", "--port", "70000"], "error: --port must be at most 65535, got 70000"),
        (["cost", "M", "--kv-dtype", "int3"], "'int3' is not one of 'float32'"),
        (["cost", "M", "--diff", "exact"], "--diff must be of the form ONE,OTHER, such as exact,megatron, got 'exact'"),
        (["cost", "M", "--diff", "exact,flame"], "convention must be one of exact, megatron"),
        (["roofline", "M", "--hardware", "H10"], "got 'H10'; the nearest are H100"),
        (
            ["roofline", "M", "--batch-sizes", "1,x"],
            "--batch-sizes must be positive integers",
        ),
        (["roofline", "llama-3.1-70b"], "GiB too little"),
        (["solve", "M", "--target", "params=1M", "--free", "d_model"], "targets: 'params' is unknown; did you mean"),
        (
            ["solve", "M", "--target", "params_total", "--free", "d_model"],
            "--target must be of the form BUDGET=VALUE, such as params_total=30M, got 'params_total'",
        ),
        (["solve", "M", "--target", "params_total=1M", "--free", "d_modl"], "free must be among d_model"),
        (["solve", "M"], "--target, --like: exactly one of them is required"),
        (["cots"], "No such command 'cots'"),
        (["data", "no-such-corpus"], "no-such-corpus"),
        (["table", "no-such-folder"], "no-such-folder"),
        (["plot", RECORDS, "--x", "family"], "--x must be a quantity with numbers, got 'family'"),
        (["plot", RECORDS, "--y", "sotu_bbp"], "got 'sotu_bbp'; did you mean 'sotu_bpb'?"),
        (["plot", RECORDS, "--y", "recall"], "--y must be a quantity with numbers, got 'recall'; "),
        (["table", RECORDS, "--sort", "val_bbp"], "--sort must be a column, got 'val_bbp'; did you mean 'val_bpb'?"),
        (["sweep", "no_such_sweep.py"], "no_such_sweep.py: no such sweep file"),
        (["train", "no_such.json"], "no_such.json: cannot be read"),
        (["bench", "--path", "attention=fast"], "attention must be one of blocked"),
        (["bench", "--path", "atention=sdpa"], "atention must be one of attention"),
        (["bench", "--path", "attention"], "--path must be of the form OP=PATH, such as ssd=compiled, got 'attention'"),
        (
            ["bench", "--what", "decode", "--path", "linear=plain"],
            "--path: must come with --what train, profile or curves, got --what decode",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    code, out, err = run(capsys, monkeypatch, *args)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_mistake_in_an_experiment_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiment_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for override, message in (
        ("train.lrr=1", "train.lrr: unknown field"),
        ("model.vocab_size=100", "model.vocab_size: must be at least"),
        ("data.corpus=nowhere", "nowhere"),
    ):
        code, _, err = run(capsys, monkeypatch, "train", str(experiment_file), "--runs", str(runs), "--set", override)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not runs.exists()


def test_train_table_and_plot_work_on_one_run_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiment_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    args = ("train", str(experiment_file), "--runs", str(runs), "--set", "train.lr=1e-3", "--json")
    code, out, _ = run(capsys, monkeypatch, *args)
    result = json.loads(out)
    assert (code, result["status"]) == (0, "finished")
    assert RunFolder(Path(result["run"])).load_experiment().train.lr == 1e-3
    assert fit(Experiment.load(experiment_file, ["train.lr=1e-3"]), runs).result == {
        name: value for name, value in result.items() if name != "run"
    }
    code, out, _ = run(capsys, monkeypatch, "table", str(runs), "--json", "--out", str(tmp_path / "table.csv"))
    assert json.loads(out)[0]["val_bpb"] == pytest.approx(result["val_bpb"])
    assert (tmp_path / "table.csv").exists()
    code, out, _ = run(capsys, monkeypatch, "plot", str(runs))
    assert (runs / "frontier.png").exists()
    assert (runs / "frontier.svg").exists()


@pytest.fixture
def run_with_mtp(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiment_file: Path, tmp_path: Path
) -> str:
    args = ("train", str(experiment_file), "--runs", str(tmp_path / "runs"), "--set", "model.pattern=ME/*E/*E")
    blocks = ("--set", 'model.blocks.*={"n_heads": 2, "n_kv_heads": 1, "d_head": 16}')
    return str(json.loads(run(capsys, monkeypatch, *args, *blocks, "--json")[1])["run"])


@pytest.mark.slow
def test_a_run_generates_text_with_and_without_drafts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_with_mtp: str
) -> None:
    args = ("generate", run_with_mtp, "--prompt", "Para", "--max-new-tokens", "9", "--temperature", "0", "--json")
    plain, drafted = (json.loads(run(capsys, monkeypatch, *args, *more)[1]) for more in ((), ("--speculate",)))
    assert plain["continuations"] == drafted["continuations"]
    assert 1 <= drafted["acceptance_length"] <= 3
    two = json.loads(run(capsys, monkeypatch, *args, "--prompt", "Paragraph")[1])
    assert two["continuations"][0] == plain["continuations"][0]
    code, out, _ = run(capsys, monkeypatch, "eval", run_with_mtp, "--acceptance", "2", "--json")
    assert set(json.loads(out)["acceptance_length"]) == {"greedy", "temperature 1"}
    assert code == 0
    code, _, err = run(capsys, monkeypatch, "eval", run_with_mtp)
    assert (code, "--pairs, --corpus, --acceptance, --ngram, --whole: at least one" in err) == (2, True)
    code, _, err = run(capsys, monkeypatch, *args, "--top-p", "2")
    assert (code, "top_p must be above 0" in err) == (2, True)


def test_compiled_steps_generate_the_same_text_and_are_cached(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_with_mtp: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folders = []

    def compiled(function: Any, **_: Any) -> Any:
        folders.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        return function

    monkeypatch.setattr("explore.model.generation.compiled_step", compiled)
    monkeypatch.setattr("explore.ops.check_compiler", lambda: None)
    args = ("generate", run_with_mtp, "--prompt", "Para", "--max-new-tokens", "9", "--temperature", "0", "--json")
    plain, steps = (json.loads(run(capsys, monkeypatch, *args, *more)[1]) for more in ((), ("--compile",)))
    assert steps["continuations"] == plain["continuations"]
    assert set(folders) == {str(tmp_path / "cache" / "inductor")}


def test_an_exported_and_reimported_run_generates_the_same_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_with_mtp: str, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, monkeypatch, "export", run_with_mtp, "--to", "hf", "left")[0] == 0
    assert run(capsys, monkeypatch, "import", "left")[0] == 0
    args = ("--prompt", "Para", "--max-new-tokens", "9", "--temperature", "0", "--json")
    texts = [run(capsys, monkeypatch, "generate", folder, *args)[1] for folder in (run_with_mtp, "left-imported")]
    one, other = (json.loads(text)["continuations"] for text in texts)
    assert one == other
    code, _, err = run(capsys, monkeypatch, "eval", "left-imported", "--acceptance", "1")
    assert (code, "--acceptance must have a run, whose data it reads; left-imported is not one" in err) == (2, True)


@pytest.mark.slow
def test_transformers_generates_the_same_text_as_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_with_mtp: str
) -> None:
    code, out, err = run(capsys, monkeypatch, "parity", run_with_mtp, "--max-new-tokens", "12", "--json")
    assert code == 0, err
    compared = json.loads(out)
    assert compared["same"] == {"with speculation": True, "transformers in a fresh process": True}
    assert compared["text"] == compared["transformers_text"]


def test_every_command_shows_an_example() -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} >= {
        "cost",
        "train",
        "sweep",
        "table",
        "plot",
        "data",
        "roofline",
        "solve",
        "prove",
    }
    for command in app.registered_commands:
        assert "Example: explore" in (command.epilog or "")


def test_help_is_quick_to_import() -> None:
    code = "import sys, explore.cli; print([m for m in ('torch', 'pandas', 'optuna', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_tokenizer_smaller_than_the_vocabulary_is_noted_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiment_file: Path, tmp_path: Path
) -> None:
    args = ("train", str(experiment_file), "--runs", str(tmp_path / "runs"), "--json", "--set", "model.vocab_size=2048")
    for seed, n_notes in ((0, 1), (1, 0)):
        code, out, err = run(capsys, monkeypatch, *args, "--set", f"seed={seed}")
        assert (code, json.loads(out)["status"]) == (0, "finished")
        assert err.count("note: model.vocab_size is 2,048 and the data has 257 tokens: 1,791 rows") == n_notes


def test_data_ignores_a_byte_order_mark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400))
    shown = []
    for name, encoding in (("plain.txt", "utf-8"), ("marked [bold].txt", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding=encoding)
        code, out, _ = run(capsys, monkeypatch, "data", str(tmp_path / name), "--tokenizer", "bytes", "--json")
        assert code == 0
        shown.append(json.loads(out)["splits"])
        assert name in run(capsys, monkeypatch, "data", str(tmp_path / name), "--tokenizer", "bytes")[1]
    assert shown[0] == shown[1]
    assert sum(row["n_bytes"] for row in shown[0]) == len(text)


def test_a_tokenizer_is_trained_on_the_training_text_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "bpe.json"
    code, _, _ = run(capsys, monkeypatch, "data", str(tmp_path / "text.txt"), "--train-bpe", "300", "--out", str(out))
    assert code == 0
    trained = train_bpe(load_corpus(str(tmp_path / "text.txt")).documents("train"), 300)
    assert json.loads(out.read_text()) == json.loads(trained.to_str())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe.json", "text.txt"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "hf:"), "corpus: 'hf:' must name a data set: hf:NAME"),
        (("data", "hf::config"), "corpus: 'hf::config' must name a data set"),
        (("data", "FIFO"), "must be a file, got a FIFO"),
        (("data", "/dev/zero"), "must be a file, got a device"),
        (("data", "x" * 5000), "is neither a known name"),
        (("data", "TEXT", "--tokenizer", "FIFO"), "must be a file, got a FIFO"),
        (("data", "TEXT", "--tokenizer", "TEXT"), "must be a JSON file of the `tokenizers` package"),
        (("data", "TEXT", "--train-bpe", "300"), "--out: a path is required with --train-bpe"),
        (("data", "TEXT", "--train-bpe", "300", "--out", "FOLDER"), "--out: must be a file, got the folder"),
        (("data", "TEXT", "--train-bpe", "300", "--out", "FOLDER/a/b"), "--out: must be in a folder that exists"),
        (("data", "TEXT", "--train-bpe", "300", "--out", "TEXT/b"), "--out: must be in a folder that exists"),
        (
            ("data", "TEXT", "--train-bpe", "1000000000000", "--out", "NEW"),
            "vocab_size: 1000000000000 must be at least",
        ),
        (
            ("data", "TEXT", "--train-bpe", "9" * 5000, "--out", "NEW"),
            "--train-bpe must be at most 9223372036854775807, got 999",
        ),
        (("cost", "M" * 300 + "X"), "pattern: unknown letter 'X' at position 301"),
        (("cost", "m" * 5000), "preset: 'mmm"),
        (("cost", "FOREIGN"), "must be an experiment, a model (with the field pattern) or a config.json"),
        (("cost", "FIFO"), "must be a file, got a FIFO"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
def test_bad_input_gives_a_one_line_error_and_leaves_no_files(
    args: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(40)))
    (tmp_path / "foreign.json").write_text(
        json.dumps({"n_layer": 12, "ssm_cfg": {}} | {f"field{i}": i for i in range(99)})
    )
    os.mkfifo(tmp_path / "fifo.json")
    os.mkfifo(tmp_path / "fifo.txt")
    fifo = "fifo.json" if "--tokenizer" in args or args[0] == "cost" else "fifo.txt"
    places = {"TEXT": "text.txt", "FOREIGN": "foreign.json", "FIFO": fifo, "NEW": "new.json"}
    for name, place in places.items():
        args = tuple(arg.replace(name, str(tmp_path / place)) for arg in args)
    args = tuple(arg.replace("FOLDER", str(tmp_path)) for arg in args)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, monkeypatch, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) <= 400
    assert sorted(tmp_path.rglob("*")) == before
