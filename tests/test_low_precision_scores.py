"""Runs in low precision are scored and continued with the products of the end of their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run as run_command
from small_runs import TOKENS, result, tiny, train, write_corpus

import explore
from explore.data import load_tokenizer
from explore.evals import bits_per_byte, minimal_pair_accuracy, read_minimal_pairs
from explore.model import LanguageModel, generate, quantizable_parts
from explore.ops import CalibratedQuantizer
from explore.precision import Recipe
from explore.quantizing import Quantization, quantize_run
from explore.runs import RunFolder
from explore.train import load_model
from explore.train.models import load_trained

ATTENTION = {"*": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, "d_head": 32}}
ENDINGS: dict[str, Any] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "in bf16 at its end": {"base": "nvfp4", "until": 0.5},
    "backward only": {"base": "nvfp4", "forward": False},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A run in each precision, with scores of whole splits."""
    settings = {"train__tokens": 6 * TOKENS, "train__evaluation": "whole", "train__lr": 0.02}
    root = tmp_path_factory.mktemp("runs")
    return {
        name: train(tiny(corpus, "*-", model__blocks=ATTENTION, train__precision=precision, **settings), root)
        for name, precision in ENDINGS.items()
    }


def greedy(model: LanguageModel, prompt: str) -> str:
    tokenizer = load_tokenizer("bytes")
    tokens = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(prompt)]])
    new = generate(model, tokens, 24, eot_id=tokenizer.eot_id)[0].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.eot_id)] if tokenizer.eot_id in new else new)


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(48)[None])


@pytest.mark.parametrize("name", ENDINGS)
def test_documents_scored_by_the_command_equal_those_of_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: dict[str, RunFolder], name: str
) -> None:
    run = runs[name]
    before = run.evals["documents"]
    code, _, err = run_command(capsys, monkeypatch, "eval", run.path, "--whole", "--save")
    assert (code, err) == (0, "")
    assert RunFolder(run.path).evals["documents"] == before


@pytest.mark.parametrize("name", ENDINGS)
def test_only_runs_with_quantised_products_differ_from_their_bare_weights(
    runs: dict[str, RunFolder], name: str
) -> None:
    bare, model = load_model(runs[name]), load_trained(runs[name])
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in bare.state_dict().items()
    }
    has_quantizers = any(part.module.quantizer is not None for part in quantizable_parts(model))
    assert has_quantizers == (name not in ("fp32", "bf16"))
    assert torch.allclose(logits(model), logits(bare), rtol=1e-4, atol=1e-5) == (name not in ("nvfp4", "mxfp8"))


@pytest.mark.parametrize("name", ["fp32", "bf16", "nvfp4", "mxfp8"])
def test_other_text_is_scored_with_the_recipe_and_otherwise_in_fp32(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    corpus: Path,
    runs: dict[str, RunFolder],
    name: str,
) -> None:
    pairs = [(f"{i} times {i + 1} is {i * i + i}.", f"{i} times {i + 1} is {i * i + i + j}.") for i in range(9, 40)
             for j in (1, 10)]  # fmt: skip
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"uid": "sums", "good": good, "bad": bad}) for good, bad in pairs))
    command = ("eval", runs[name].path, "--corpus", corpus, "--pairs", path, "--json")
    _, out, _ = run_command(capsys, monkeypatch, *command)
    found = json.loads(out)
    model, batches = load_trained(runs[name]), list(tiny(corpus, "-").data.open(0).eval_batches("test", 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=name not in ("fp32", "bf16")):
        assert found["bpb"] == {str(corpus): bits_per_byte(model, batches).bits_per_byte}
        shares = minimal_pair_accuracy(model, load_tokenizer("bytes"), read_minimal_pairs(path))
        assert found["pairs"] == {"sums": shares}
    bare = bits_per_byte(load_model(runs[name]), batches).bits_per_byte
    assert (found["bpb"][str(corpus)] == bare) == (name in ("fp32", "bf16"))


@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_the_command_continues_text_with_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: dict[str, RunFolder], name: str
) -> None:
    options = ("--prompt", "train 3", "--max-new-tokens", 24, "--temperature", 0, "--json")
    _, out, _ = run_command(capsys, monkeypatch, "generate", runs[name].path, *options)
    (made,) = json.loads(out)["continuations"]
    assert made["text"] == greedy(load_trained(runs[name]), "train 3")
    assert (made["text"] == greedy(load_model(runs[name]), "train 3")) == (name == "bf16")


@pytest.mark.parametrize("name", ["fp32", "bf16", "nvfp4", "mxfp8"])
def test_an_opened_run_scores_as_in_training_and_writes_the_same_text_before_and_after(
    corpus: Path, runs: dict[str, RunFolder], name: str
) -> None:
    opened = explore.load(runs[name])
    before = opened.generate("train 3", 24, temperature=0)
    scores = opened.evaluate(str(corpus))
    assert opened.generate("train 3", 24, temperature=0) == before
    assert before == "train 3" + greedy(load_trained(runs[name]), "train 3")
    assert {key: scores[key] for key in ("val_bpb", "test_bpb")} == {
        key: result(runs[name])[key] for key in ("val_bpb", "test_bpb")
    }
    same = pytest.approx(scores["test_bpb"], rel=1e-6)
    assert (scores[f"{corpus.name}_bpb"] == same) == (name != "bf16")  # which scores other text in fp32


def test_a_quantised_child_keeps_its_own_formats(runs: dict[str, RunFolder]) -> None:
    child = quantize_run(runs["mxfp8"], Quantization(recipe=Recipe(format="fp8"), calibration_tokens=256))
    quantizers = [part.module.quantizer for part in quantizable_parts(load_trained(child))]
    assert {(type(each), each.format) for each in quantizers if each is not None} == {(CalibratedQuantizer, "fp8")}
    assert torch.equal(logits(load_trained(child)), logits(load_model(child)))
