"""The `export` command: write a trained model for transformers or Megatron-LM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from explore.cli.app import app, out
from explore.cli.opening import RunOrModel, describe_size, load_run

Format = Literal["hf", "megatron", "te-quant", "model-optimizer"]


@app.command(
    rich_help_panel="Use trained models", epilog="Example: explore export runs/demo/MEM-1a2b3c4d --to hf exported"
)
def export(
    source: RunOrModel,
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="New or empty folder, for hf.")] = None,
    to: Annotated[Format, typer.Option(help="hf writes a folder; the other formats print.")] = "hf",
) -> None:
    """Write a trained model for transformers, or print Megatron-LM's arguments for training its architecture.

    te-quant prints the run's precision recipe for Megatron-LM's --te-precision-config-file; model-optimizer prints
    the names of the matching Model-Optimizer recipes.

    The folder has config.json, safetensors, tokenizer and model card; AutoModelForCausalLM and AutoTokenizer load it.
    A feature that the target format cannot represent is an error that names it.
    """
    if to != "hf":
        if folder is not None:
            raise ValueError(f"DIR: must not be combined with --to {to}, which prints; got {str(folder)!r}")
        if to == "megatron":
            _print_arguments(source)
        else:
            _print_recipe(source, to)
        return
    if folder is None:
        raise ValueError("DIR: a new or empty folder is required with --to hf")
    from explore.data import load_tokenizer
    from explore.interop import is_model_folder, load_model_folder, save_hf

    record: dict[str, Any] = {}
    tokenizer = None
    if is_model_folder(source):
        model = load_model_folder(source)
        if (source / "tokenizer.json").exists():
            tokenizer = load_tokenizer(str(source / "tokenizer.json"))
    else:
        _check_trained(source)
        experiment, model, record = load_run(source)
        if experiment.data.kind == "text":
            tokenizer = load_tokenizer(experiment.data.tokenizer)
    save_hf(model, folder, tokenizer, record)
    out.print(f"{folder}: {describe_size(model.config)}", highlight=False)
    if tokenizer is None:
        out.print("no tokenizer: the model was not trained on text", highlight=False)
    if model.config.mtp is not None:
        out.print("multi-token prediction is stored under mtp.*; transformers ignores it", highlight=False)


def _check_trained(source: Path) -> None:
    """Rejects a quantised run, whose formats transformers would drop."""
    from explore.runs import RunFolder

    if quantized := RunFolder(source).quantized:
        raise ValueError(
            f"{source}: must be a trained run with --to hf, got a quantised one, whose formats of activations, keys "
            f"and values, and state cannot be written for transformers; export its parent, {quantized['parent']['run']}"
        )


def _print_arguments(source: Path) -> None:
    from explore.interop import is_model_folder, load_model_config, megatron_arguments
    from explore.runs import RunFolder

    if is_model_folder(source):
        arguments, notes = megatron_arguments(load_model_config(source))
    else:
        experiment = RunFolder(source).load_experiment()
        arguments, notes = megatron_arguments(
            experiment.model, seq_len=experiment.data.seq_len, mtp_weight=experiment.train.mtp_weight
        )
    for note in notes:
        print(f"# {note}")
    print(" \\\n".join(shlex.join(argument) for argument in arguments))


def _print_recipe(source: Path, to: Format) -> None:
    from explore.interop import model_optimizer_names, te_quant
    from explore.interop.precision import MEGATRON, MODEL_OPTIMIZER, check_scales
    from explore.precision import Recipe
    from explore.runs import RunFolder

    run = RunFolder(source)
    experiment, quantized = run.load_experiment(), run.quantized
    check_scales(quantized.get("scales", "max"), MEGATRON if to == "te-quant" else MODEL_OPTIMIZER)
    recipe = Recipe.model_validate(quantized["recipe"]) if quantized else experiment.train.recipe
    if to == "te-quant":
        print(json.dumps(te_quant(experiment.model, recipe), indent=2))
    else:
        print("\n".join(model_optimizer_names(recipe)))
