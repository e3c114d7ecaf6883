"""Quantising a trained run: the choice of formats, the child's record, and refusals."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from small_runs import TOKENS, result, tiny, train, write_corpus
from torch import Tensor
from torch.nn import functional as F

from explore.checkpoints import load_model
from explore.cli.quantize import _request
from explore.cost import in_formats, storage
from explore.experiment import Experiment
from explore.figures import bits_table, plot_bits
from explore.model import Component, QuantizedModel, calibrate, generate
from explore.ops import quantize
from explore.precision import Recipe, Rule
from explore.quantizing import Quantization, Reference, choose, quantize_run
from explore.records import pack_runs, unpack_runs
from explore.runs import RunFolder, find_runs
from explore.table import load_runs
from explore.train import score

BLOCKS = {
    "M": {"kind": "mamba2", "n_heads": 2, "d_head": 16, "d_state": 16, "n_groups": 1, "chunk_size": 32},
    "E": {"kind": "moe", "n_experts": 2, "top_k": 1, "d_expert": 16, "d_shared": 16, "d_latent": 16},
    "*": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, "d_head": 16},
}
ASKED = {"bits": 6.5, "scales": "mse", "calibration_tokens": 256}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, pattern: str = "ME*", **changes: Any) -> Experiment:
    return tiny(corpus, pattern, model__blocks=BLOCKS, train__tokens=8 * TOKENS, **{"model__d_model": 32, **changes})


@pytest.fixture(scope="module")
def parent(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(experiment(corpus, train__lr=0.02), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def child(parent: RunFolder) -> RunFolder:
    return quantize_run(parent, request(kv="fp8", state="int8", state_rounding="stochastic"))


def request(recipe: Recipe | None = None, bits: float | None = 6.5, **decoding: Any) -> Quantization:
    recipe = (recipe or Recipe()).model_copy(update=decoding)
    return Quantization.model_validate(ASKED | {"recipe": recipe, "bits": bits})


def copied(parent: RunFolder, root: Path) -> RunFolder:
    """A copy of the parent in another folder, without measurements."""
    ignored = shutil.ignore_patterns("sensitivities.json")
    return RunFolder(Path(shutil.copytree(parent.path, root / parent.path.name, ignore=ignored)))


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens)


# The choice


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_equals_the_best_of_an_exhaustive_search(seed: int) -> None:
    rng = random.Random(seed)
    formats, n = ("bf16", "fp8", "nvfp4"), 6
    width = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}
    # Few different sensitivities, so that many choices are equally good.
    sensitivity = {
        str(i): dict(zip(formats, (0.0, *sorted(rng.choices((1e-6, 2e-6, 5e-5), k=2))), strict=True)) for i in range(n)
    }
    bits = {str(i): {format: rng.choice((64, 512, 1024)) * width[format] for format in formats} for i in range(n)}
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        least, most = (sum(end(row.values()) for row in bits.values()) for end in (min, max))
        budget = least + share * (most - least)
        found = choose(sensitivity, bits, budget)
        tried = [
            (
                round(sum(sensitivity[str(i)][format] for i, format in enumerate(each)) * 1e7),
                sum(bits[str(i)][format] for i, format in enumerate(each)),
            )
            for each in itertools.product(formats, repeat=n)
        ]
        best = min(each for each in tried if each[1] <= budget)
        assert (round(found.sensitivity * 1e7), found.bits) == best
        assert found.bits == sum(bits[name][format] for name, format in found.formats.items())
        assert "Optimal" in found.status


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="budget must be at least 45 bits, got 44"):
        choose({"a": {"bf16": 0.0, "nvfp4": 1.0}}, {"a": {"bf16": 160, "nvfp4": 45}}, 44)


# The child


@pytest.mark.slow
def test_a_child_meets_its_budget_and_records_its_cost(parent: RunFolder, child: RunFolder) -> None:
    record, cost = child.quantized, child.cost
    recipe = Recipe.model_validate(record["recipe"])
    ledger = child.load_experiment().model.ledger(32)
    assert 6 < cost["bits_per_element"] <= 6.5
    assert {name: cost[name] for name in ("bits_per_element", "weight_bytes")} == storage(in_formats(ledger, recipe))
    flops = sum(row.entry.flops_seq for row in in_formats(ledger, recipe) if row.entry.is_quantized) / 32
    assert (cost["flops_fwd_quantized"], cost["flops_train_quantized"]) == (flops, 0)
    assert record["choice"]["bits_per_element"] == pytest.approx(cost["bits_per_element"])
    assert set(record["formats"]) == set(record["sensitivities"])
    assert set(record["formats"].values()) <= {"bf16", "fp8", "nvfp4"}
    assert record["choice"]["sensitivity"] == pytest.approx(
        sum(record["sensitivities"][name][format] for name, format in record["formats"].items())
    )
    assert record["parent"] == {"run": parent.path.name, "key": parent.key, "digest": record["parent"]["digest"]}
    assert record["calibration"] == {"split": "train", "tokens": 256, "seed": 0}
    assert (recipe.kv, recipe.state, recipe.state_rounding) == ("fp8", "int8", "stochastic")


def test_the_scores_of_a_child_are_those_of_the_model_that_it_opens(parent: RunFolder, child: RunFolder) -> None:
    one = child.load_experiment()
    source, model = one.data.open(one.seed), load_model(child)
    scores = result(child)
    assert {name: scores[name] for name in ("val_bpb", "test_bpb", "val_loss", "test_loss", "recall")} == score(
        one, source, model
    )
    assert scores["val_bpb"] != result(parent)["val_bpb"]
    kl, n, first = 0.0, 0, list[Tensor]()
    trained = load_model(parent)
    for batch in source.eval_batches("val", 128, None):
        p, q = (logits(each, batch.inputs).log_softmax(-1) for each in (trained, model))
        kept = batch.targets != -100
        first.append(-p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0][:, :2][kept[:, :2]])
        kl += float(F.kl_div(q[kept], p[kept], reduction="sum", log_target=True))
        n += int(kept.sum())
    assert scores["kl"] == pytest.approx(kl / n, rel=1e-4)
    assert scores["losses_by_position"]["parent"][0] == pytest.approx(float(torch.cat(first).mean()), rel=1e-5)
    assert scores["kl_decoded"] != scores["kl"]
    assert {name: len(losses) for name, losses in scores["losses_by_position"].items()} == {
        "parent": 16, "quantized": 16, "decoded": 16,
    }  # fmt: skip


def test_a_sensitivity_is_the_divergence_with_one_component_quantised(parent: RunFolder, child: RunFolder) -> None:
    one = parent.load_experiment()
    batch = one.data.open(0).batch(0, 8)
    model, trained = load_model(parent), load_model(parent)
    quantized = QuantizedModel(model, "mse", amax=calibrate(model, [(batch.inputs, batch.targets)]))
    for component, format in ((Component(0, "M", "in_proj"), "nvfp4"), (Component(1, "E", "experts"), "fp8")):
        quantized.put(component, format)
        p, q = (logits(each, batch.inputs).log_softmax(-1) for each in (trained, model))
        quantized.put(component, None)
        kl = float(F.kl_div(q, p, reduction="sum", log_target=True)) / batch.inputs.numel()
        assert child.quantized["sensitivities"][str(component)][format] == pytest.approx(kl, rel=1e-3)


def test_a_child_with_the_same_key_is_reused(parent: RunFolder, child: RunFolder) -> None:
    written = (child.path / "result.json").stat().st_mtime_ns
    again = quantize_run(parent, request(kv="fp8", state="int8", state_rounding="stochastic"), name="another-name")
    assert again.path == child.path
    assert (child.path / "result.json").stat().st_mtime_ns == written
    keys = {
        request().key("key", "digest"),
        request(kv="fp8").key("key", "digest"),
        request(bits=6).key("key", "digest"),
    }
    assert len(keys | {request().key("key", "other"), request().key("other", "digest")}) == 5


def test_a_kill_keeps_finished_measurements(
    parent: RunFolder, child: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, asked = copied(parent, tmp_path), request(kv="fp8", state="int8", state_rounding="stochastic")
    compare, measured = Reference.compare, list[int]()

    def counted(self: Reference, model: Any, **options: Any) -> Any:
        measured.append(1)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return compare(self, model, **options)

    monkeypatch.setattr(Reference, "compare", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_run(other, asked)
    assert [run.status for run in find_runs(tmp_path)].count("unfinished") == 1
    kept = len(measured) - 1
    made = quantize_run(other, asked)
    n_formats = 2 * len(child.quantized["sensitivities"])
    assert len(measured) - 5 == n_formats - kept + 3  # and the parent, the child, and the child token by token
    assert made.path.name == child.path.name
    assert made.quantized == child.quantized
    assert {**result(made), "finished_at": ""} == {**result(child), "finished_at": ""}


def test_other_budgets_and_decoding_formats_measure_nothing_again(
    parent: RunFolder, child: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, measured = Reference.compare, list[int]()
    monkeypatch.setattr(Reference, "compare", lambda *args, **options: measured.append(1) or compare(*args, **options))
    larger = quantize_run(parent, request(bits=9), name="9-bits")
    assert len(measured) == 2
    assert larger.quantized["choice"]["sensitivity"] < child.quantized["choice"]["sensitivity"]
    assert result(larger)["kl"] < result(child)["kl"]
    assert result(larger)["kl_decoded"] is None


def test_a_child_needs_its_parent_beside_it_with_the_same_weights(
    parent: RunFolder, child: RunFolder, tmp_path: Path
) -> None:
    alone = RunFolder(Path(shutil.copytree(child.path, tmp_path / child.path.name)))
    with pytest.raises(ValueError, match=f"the run {parent.path.name} must be beside it"):
        load_model(alone)
    other = copied(parent, tmp_path)
    tokens = torch.arange(32)[None]
    assert torch.equal(logits(load_model(alone), tokens), logits(load_model(child), tokens))
    path = other.path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.head.weight"] += 1
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"the digest of the weights of {parent.path.name} must be"):
        load_model(alone)


def test_a_recipe_quantises_the_named_components(parent: RunFolder) -> None:
    recipe = Recipe(rules=(Rule(format="fp8", components=("in_proj",)),), kv="int8")
    made = quantize_run(parent, Quantization(recipe=recipe, calibration_tokens=256))
    assert made.quantized["formats"]["layers.0.in_proj"] == "fp8"
    assert set(made.quantized["formats"].values()) == {"fp8", "bf16"}
    assert "sensitivities" not in made.quantized
    model, trained = load_model(made), load_model(parent)
    wanted = quantize(trained.layers[0].mixer.in_proj.weight, "fp8")
    assert torch.equal(model.layers[0].mixer.in_proj.weight, wanted)
    assert torch.equal(model.embedding.weight, quantize(trained.embedding.weight, "bf16"))
    assert generate(model, torch.arange(4)[None], 5).shape == (1, 5)
    assert model.state_rounding.kv == "int8"


def test_the_rows_of_children_have_bits_and_formats_and_survive_packing(
    parent: RunFolder, child: RunFolder, tmp_path: Path
) -> None:
    row = load_runs(child.path.parent).set_index("run").loc[child.path.name]
    assert row["quantized_from"] == parent.path.name
    assert row["bits_per_element"] == child.cost["bits_per_element"]
    assert row["weight_bytes"] == child.cost["weight_bytes"]
    assert (row["scales"], row["kv_format"], row["state_format"], row["state_rounding"]) == (
        "mse", "fp8", "int8", "stochastic",
    )  # fmt: skip
    assert row["kl"] == result(child)["kl"]
    assert load_runs(parent.path).iloc[0]["bits_per_element"] == 16
    assert row["kv_bytes"] == 0.5 * load_runs(parent.path).iloc[0]["kv_bytes"]
    pack_runs(tmp_path / "runs.parquet", child.path.parent)
    unpack_runs(tmp_path / "runs.parquet", tmp_path / "again")
    assert RunFolder(tmp_path / "again" / child.path.name).quantized == child.quantized


def test_recall_is_scored_if_a_run_has_it(tmp_path: Path) -> None:
    content = {
        "name": "recall", "model": {"d_model": 32, "vocab_size": 32, "pattern": "M*", "blocks": BLOCKS},
        "data": {"kind": "recall", "seq_len": 32, "n_pairs": 4, "vocab_size": 32, "n_eval": 16},
        "train": {"tokens": 4 * TOKENS, "batch_size": 4},
    }  # fmt: skip
    run = train(Experiment.model_validate(content), tmp_path)
    made = quantize_run(run, Quantization(recipe=Recipe(format="mxfp8"), calibration_tokens=128))
    assert result(made)["recall"] is not None
    assert result(made)["val_bpb"] is None
    assert None in result(made)["losses_by_position"]["quantized"]


# The command


def test_the_command_prints_json_and_tables_of_80_columns(
    parent: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    args = ("quantize", parent.path, "--bits", "6.5", "--calibration-tokens", "256")
    code, text, _ = run(capsys, monkeypatch, *args, "--json")
    record = json.loads(text)
    assert code == 0
    assert record["bits_per_element"] <= 6.5
    made = RunFolder(Path(record["run"]))
    assert {name: record[name] for name in ("val_bpb", "test_bpb", "kl")} == {
        name: result(made)[name] for name in ("val_bpb", "test_bpb", "kl")
    }
    assert record["formats"] == made.quantized["formats"]
    code, text, _ = run(capsys, monkeypatch, *args, "--figure", tmp_path / "bits")
    assert code == 0
    lines = [line for line in text.splitlines() if not line.startswith("wrote")]
    assert max(map(len, lines)) <= 80
    assert f"{record['bits_per_element']:.3f}" in text
    assert (tmp_path / "bits.png").exists()
    code, text, _ = run(capsys, monkeypatch, "generate", made.path, "--prompt", "val", "--max-new-tokens", "4")
    assert code == 0
    code, _, err = run(capsys, monkeypatch, "quantize", made.path, "--bits", "6.5")
    assert (code, "must be a trained run, got a quantised one" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4.3"], "bits must be at least 4.7"),
        (["--bits", "0"], "bits: must be above 0, got 0"),
        (["--bits", "nan"], "bits: input should be a finite number"),
        (["--bits", "6", "--calibration-tokens", "1000000"], "calibration_tokens must be at most"),
        (["--bits", "6", "--precision", "fp8"], "--bits, --precision: exactly one of them is required"),
        ([], "--bits, --precision: exactly one of them is required"),
        (["--precision", "fp9"], "precision must be one of"),
        (["--precision", "unknown.json"], "got 'in_prj'; did you mean 'in_proj'?"),
        (["--precision", "nothing.json"], "precision.rules.0 must match a component of the model"),
        (["--bits", "6", "--formats", "nvfp4,bf16"], "formats must be narrower than bf16"),
        (["--bits", "6", "--formats", "mxfp4"], "precision: mxfp4 needs widths that are multiples of 32, got 16 in"),
        (["--precision", "mxfp4"], "layer 1 (E); 32 would fit"),
        (["--precision", "rotated.json"], "precision.hadamard must not name forward for a trained model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    parent: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    alone = copied(parent, tmp_path / "runs")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    contents = {
        "unknown.json": {"rules": [{"format": "fp8", "components": ["in_prj"]}]},
        "nothing.json": {"rules": [{"format": "fp8", "letters": "L"}]},
        "rotated.json": {"format": "nvfp4", "hadamard": ["forward"]},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    code, out, err = run(capsys, monkeypatch, "quantize", alone.path, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(path for path in tmp_path.rglob("*") if path.name not in contents) == before


def test_a_run_that_is_not_finished_is_refused(parent: RunFolder, tmp_path: Path) -> None:
    other = copied(parent, tmp_path)
    (other.path / "result.json").unlink()
    with pytest.raises(ValueError, match="must be a finished run, got one that is unfinished"):
        quantize_run(other, request())


# The figure


def test_the_figure_draws_children_by_scales_and_the_parent(parent: RunFolder, child: RunFolder) -> None:
    runs = load_runs(child.path.parent)
    table = bits_table(runs, parent.path.name)
    wanted = runs[runs["quantized_from"] == parent.path.name].sort_values("bits_per_element")
    assert table["bits_per_element"].tolist() == wanted["bits_per_element"].tolist()
    assert set(table["parent"]) == {result(parent)["test_bpb"]}
    axes = plot_bits(runs, parent.path.name).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    rows = table[table["scales"] == "mse"]
    assert drawn["scales by mse"] == rows[["bits_per_element", "test_bpb"]].to_numpy().tolist()
    assert drawn["before quantisation"][0][1] == result(parent)["test_bpb"]
    assert axes.get_xlabel() == "Bits per parameter"


def test_the_figure_survives_a_run_without_children(parent: RunFolder) -> None:
    assert plot_bits(load_runs(parent.path), parent.path.name).axes


@pytest.mark.parametrize(
    ("bits", "precision", "scales"),
    [(None, "super-ptq", "mse"), (None, "ultra-ptq", "four_over_six"), (None, "fp8-ptq", "max"), (5.0, None, "mse")],
)
def test_weight_scales_are_those_of_the_published_recipe_unless_given(
    bits: float | None, precision: str | None, scales: str
) -> None:
    assert _request(bits, precision, "nvfp4,fp8", None, {}, (8192, 0, 0)).scales == scales
    assert _request(bits, precision, "nvfp4,fp8", "max", {}, (8192, 0, 0)).scales == "max"
