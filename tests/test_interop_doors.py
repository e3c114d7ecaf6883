"""Import and export on the command line, and Megatron-LM's arguments."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from explore.data import load_tokenizer
from explore.experiment import Experiment
from explore.interop import load_model_folder, megatron_arguments
from explore.model import ModelConfig
from explore.presets import preset
from explore.runs import RunFolder
from explore.train import fit, load_model

BLOCKS: dict[str, dict[str, Any]] = {
    "M": {"n_heads": 2, "d_head": 16, "d_state": 8, "n_groups": 1, "chunk_size": 16},
    "*": {"n_heads": 2, "n_kv_heads": 1, "d_head": 16},
    "-": {"d_ff": 48},
    "E": {"n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 16},
}


def model(pattern: str, **changes: dict[str, Any]) -> ModelConfig:
    """Changes by the kind of the block, or a field of the model."""
    names = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    blocks = {letter: dict(block) for letter, block in BLOCKS.items()}
    for kind in names.keys() & changes.keys():
        blocks[names[kind]] |= changes.pop(kind)
    return ModelConfig.model_validate(
        {"d_model": 32, "vocab_size": 257, "pattern": pattern, "blocks": blocks, **changes}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("trained")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    content = {
        "name": "tiny",
        "model": model("ME*-").model_dump(mode="json"),
        "data": {"kind": "text", "corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32},
        "train": {"tokens": 1024, "batch_size": 4, "eval_tokens": 256},
    }
    return fit(Experiment.model_validate(content), folder / "runs", accelerator="cpu")


def test_a_trained_run_is_exported_to_transformers_and_imported_again(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_model(trained)
    ids = torch.tensor([load_tokenizer("bytes").encode("Paragraph 7 tells of 49 sheep.")])
    code, _, _ = run(capsys, monkeypatch, "export", trained.path, "--to", "hf", tmp_path / "hf")
    assert code == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("Paragraph").input_ids == list(b"Paragraph")
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
    card = (tmp_path / "hf" / "README.md").read_text()
    row = trained.row()
    assert row["key"] in card
    assert f"{row['test_bpb']:.4f}" in card

    code, out, _ = run(capsys, monkeypatch, "import", tmp_path / "hf", tmp_path / "own")
    assert code == 0
    assert "not clamped" not in out
    assert torch.equal(load_model_folder(tmp_path / "own")(ids), ours(ids))
    code, out, _ = run(capsys, monkeypatch, "cost", tmp_path / "own" / "model.json", "--json")
    assert json.loads(out)["params_total"] == row["params_total"]

    code, _, _ = run(capsys, monkeypatch, "export", tmp_path / "own", tmp_path / "again")
    assert code == 0
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_import_notes_where_transformers_would_clamp(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, monkeypatch, "export", trained.path, tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content | {"time_step_min": 0.001}))
    code, out, _ = run(capsys, monkeypatch, "import", tmp_path / "hf", tmp_path / "own")
    assert code == 0
    assert "transformers clamps it at 0.001" in out


@pytest.mark.slow
def test_parity_names_the_worst_cases(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "parity", "--cases", 4)
    assert code == 0
    assert out.startswith("4 random models")
    code, out, _ = run(capsys, monkeypatch, "parity", "--cases", 4, "--json")
    record = json.loads(out)
    assert record["cases"] == 4
    assert 0 < record["logits"]["logits"] <= 1e-4
    assert 0 < record["gradients"]["gradients"] <= 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("export", "RUN"), "error: DIR: a new or empty folder is required"),
        (("export", "RUN", "FULL"), "is there already"),
        (("export", "RUN", "NEW", "--to", "megatron"), "DIR: must not be combined with --to megatron, which prints"),
        (("export", "NEW", "OTHER"), "run must be a run folder, the start of its name"),
        (("export", "RUN", "NEW", "--to", "gguf"), "'gguf' is not one of"),
        (("import", "NEW", "OTHER"), "must be a folder with"),
        (("import", "FULL", "OTHER"), "weights.pt is a pickle, which is never read"),
        (("import", "FULL/weights.pt", "OTHER"), "a pickle is never read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    args: tuple[str, ...],
    message: str,
    trained: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.pt").write_bytes(b"")
    places = {"RUN": str(trained.path), "FULL": f"{tmp_path}/full", "NEW": f"{tmp_path}/new", "OTHER": f"{tmp_path}/x"}
    for name, place in places.items():
        args = tuple(arg.replace(name, place) for arg in args)
    code, _, err = run(capsys, monkeypatch, *args)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["weights.pt"]


def test_export_prints_the_arguments_of_megatron(
    trained: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "export", trained.path, "--to", "megatron")
    assert code == 0
    printed = shlex.split(out.replace("\\\n", ""), comments=True)
    arguments, _ = megatron_arguments(model("ME*-"), seq_len=32, mtp_weight=0.3)
    assert printed == [word for argument in arguments for word in argument]


def test_the_arguments_of_super_are_the_published_ones() -> None:
    # examples of Nemotron 3 Super in Megatron-LM's repository; the pattern carries the depths
    arguments, notes = megatron_arguments(preset("nemotron-3-super"), seq_len=8192, mtp_weight=0.3)
    printed = """--use-mcore-models --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec
      --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 2 --mamba-num-heads 128
      --ffn-hidden-size 2688 --kv-channels 128 --squared-relu --untie-embeddings-and-output-weights
      --init-method-std 0.014 --position-embedding-type none --attention-dropout 0.0 --hidden-dropout 0.0
      --disable-bias-linear --normalization RMSNorm --num-experts 512 --moe-router-topk 22
      --moe-shared-expert-intermediate-size 5376 --moe-latent-size 1024 --moe-router-score-function sigmoid
      --moe-grouped-gemm --moe-aux-loss-coeff 0.0001 --moe-router-topk-scaling-factor 5.0
      --moe-router-enable-expert-bias --moe-router-dtype fp32 --moe-router-load-balancing-type seq_aux_loss
      --mtp-loss-scaling-factor 0.3 --mtp-num-layers 2 --mtp-use-repeated-layer --seq-length 8192"""
    ours = {argument[0]: argument[1:] for argument in arguments}
    words = [tuple(part.split()) for part in f" {' '.join(printed.split())}".split(" --")[1:]]
    assert {f"--{name}": tuple(values) for name, *values in words}.items() <= ours.items()
    assert ours["--hybrid-layer-pattern"][0].endswith("EMEME/*E/*E")
    assert len(ours) == len(arguments)
    assert notes == ["optimizer, data, tokenizer and parallelism are left to you"]


def flags(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    return {argument[0]: argument[1:] for argument in megatron_arguments(config)[0]}


def test_options_that_only_some_models_have_become_arguments() -> None:
    assert "--untie-embeddings-and-output-weights" not in flags(model("M", tie_embeddings=True))  # type: ignore[arg-type]
    rotary = flags(model("*-", attention={"rope_theta": 500_000.0, "bias": "qkv"}, mlp={"activation": "swiglu"}))
    assert rotary["--rotary-base"] == ("500000",)
    assert rotary["--position-embedding-type"] == ("rope",)
    assert {"--add-qkv-bias", "--swiglu"} <= rotary.keys()
    softmax = {"router_score": "softmax", "expert_bias": False, "aux_loss_coef": 0}
    plain = flags(model("E", moe={**softmax, "normalize_weights": False, "n_shared": 0, "d_latent": None}))
    assert plain["--moe-router-load-balancing-type"] == ("none",)
    assert "--moe-router-pre-softmax" in plain
    assert not {"--moe-latent-size", "--moe-shared-expert-intermediate-size"} & plain.keys()
    assert "--moe-router-pre-softmax" not in flags(model("E", moe=softmax))
    separate = flags(model("M", mtp={"pattern": "*-", "n_depths": 2, "shared": False}))
    assert separate["--hybrid-layer-pattern"] == ("M/*-/*-",)
    assert "--mtp-use-repeated-layer" not in separate


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model("M", mamba={"d_conv": 3}), "blocks.M.d_conv: 3 cannot be written for Megatron-LM; only 4 can"),
        (model("M", mamba={"norm_eps": 1e-6}), "blocks.M.norm_eps: 1e-06"),
        (model("M", mamba={"dt_min": 0.01}), "blocks.M.dt_min: 0.01"),
        (model("*", attention={"window": 8}), r"blocks.\*.window: 8"),
        (model("*", attention={"qk_norm": True}), r"blocks.\*.qk_norm: True"),
        (model("*", attention={"sinks": True}), r"blocks.\*.sinks: True"),
        (model("*", attention={"output_gate": True}), r"blocks.\*.output_gate: True"),
        (model("*", attention={"d_conv": 4}), r"blocks.\*.d_conv: 4"),
        (model("*", attention={"rope_theta": 1e4, "d_rope": 2}), r"blocks.\*.d_rope: 2"),
        (model("*", attention={"bias": "all"}), r"blocks.\*.bias: 'all' .* only 'none' or 'qkv' can"),
        (model("*", attention={"rope_theta": 0.5}), r"blocks.\*.rope_theta: 0.5 .* only whole numbers can"),
        (model("-", mlp={"activation": "swiglu_clamped"}), "blocks.-.activation: 'swiglu_clamped'"),
        (model("-E", moe={"activation": "swiglu"}), "blocks.E.activation: 'swiglu' differs from 'relu2' of '-'"),
        (model("E", moe={"router_input": "latent"}), "blocks.E.router_input: 'latent'"),
        (model("E", moe={"latent_norm": "input"}), "blocks.E.latent_norm: 'input'"),
        (model("E", moe={"bias": True}), "blocks.E.bias: True"),
        (model("E", moe={"shared_gate": True}), "blocks.E.shared_gate: True"),
        (model("E", moe={"router_score": "softmax"}), "blocks.E.expert_bias: True"),
        (model("E", moe={"top_k": 1}), r"blocks.E.normalize_weights: True .* only False \(if top_k is 1\) can"),
        (model("E", moe={"normalize_weights": False}), "blocks.E.normalize_weights: False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_megatron_lacks_are_refused_by_name(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_arguments(config)
