"""Commands that lead to other systems and back: export, import, and the parity that both rest on."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import track

from explore.cli.app import Json, app, err, out

if TYPE_CHECKING:
    from explore.experiment import Experiment
    from explore.interop import Case
    from explore.model import LanguageModel, ModelConfig

Format = Literal["hf", "megatron"]


@app.command(
    rich_help_panel="Use what was trained", epilog="Example: explore export runs/demo/MEM-1a2b3c4d --to hf exported"
)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a folder that import wrote.")],
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="New or empty folder, for hf.")] = None,
    to: Annotated[Format, typer.Option(help="hf writes a folder; megatron prints arguments.")] = "hf",
) -> None:
    """Write a trained model for transformers, or print the arguments with which Megatron-LM trains its architecture.

    The folder has config.json, safetensors, tokenizer and model card; AutoModelForCausalLM and AutoTokenizer load it.
    What the other side cannot express is refused by name.
    """
    if to == "megatron":
        if folder is not None:
            raise ValueError(f"DIR: {str(folder)!r} is not needed; --to megatron prints")
        _print_arguments(source)
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
        experiment, model, record = _run(source)
        if experiment.data.kind == "text":
            tokenizer = load_tokenizer(experiment.data.tokenizer)
    save_hf(model, folder, tokenizer, record)
    out.print(f"{folder}: {_size(model.config)}", highlight=False)
    if tokenizer is None:
        out.print("no tokenizer: the model was not trained on text", highlight=False)
    if model.config.mtp is not None:
        out.print("multi-token prediction is stored under mtp.*; transformers ignores it", highlight=False)


@app.command(
    "import",
    rich_help_panel="Use what was trained",
    epilog="Example: explore import exported imported && explore cost imported/model.json",
)
def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a nemotron_h checkpoint.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="New or empty folder; DIR-imported, here, when absent.")
    ] = None,
) -> None:
    """Make a model of a nemotron_h checkpoint: model.json and model.safetensors, which other commands accept."""
    from explore.files import read_json
    from explore.interop import from_hf, save_model_folder

    model = from_hf(source)
    folder = folder or Path(f"{source.resolve().name}-imported")
    tokenizer = source / "tokenizer.json"
    save_model_folder(model, folder, tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None)
    out.print(f"{folder}: {_size(model.config)}", highlight=False)
    clamp = read_json(source / "config.json").get("time_step_min", 0.001)
    if clamp > 1e-20 and "M" in model.config.pattern:
        out.print(
            f"dt is not clamped here; transformers clamps it at {clamp:g} (time_step_min) and may give other logits",
            highlight=False,
        )


@app.command(rich_help_panel="Prove", epilog="Example: explore parity --cases 50; explore parity runs/mtp-0123abcd")
def parity(
    run: Annotated[
        Path | None, typer.Argument(help="A run on text: compare what it writes, and not random models.")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Random models.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the models.")] = 0,
    prompt: Annotated[str, typer.Option(help="What a run writes on from.")] = "It was",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a run writes.")] = 64,
    as_json: Json = False,
) -> None:
    """Compare random models with transformers' nemotron_h: logits and the gradients of all parameters, in fp32.

    Half of the models are exported and half imported. A gradient is compared with the largest of its parameter.
    With a RUN, export it, let transformers load it in a fresh process, and compare the greedy text of both.
    """
    import torch

    if run is not None:
        _compare_text(run, prompt, max_new_tokens, as_json)
        return
    from explore.interop import GRADIENT_TOLERANCE, LOGIT_TOLERANCE
    from explore.interop import parity as random_cases

    torch.set_num_threads(1)  # the models are tiny
    quiet = not err.is_terminal
    found = list(track(random_cases(cases, seed), "comparing", cases, console=err, transient=True, disable=quiet))
    logits, gradients = max(found, key=lambda case: case.logits), max(found, key=lambda case: case.gradients)
    if as_json:
        record = {"cases": len(found), "logits": _record(logits), "gradients": _record(gradients)}
        print(json.dumps(record, indent=2))
    else:
        out.print(
            f"{len(found)} random models in both implementations, fp32\n"
            f"largest difference of a logit: {logits.logits:.2e} (allowed {LOGIT_TOLERANCE:.0e}) {_name(logits)}\n"
            f"largest difference of a gradient, relative: {gradients.gradients:.2e} (allowed {GRADIENT_TOLERANCE:.0e}) "
            f"of {gradients.parameter} {_name(gradients)}",
            highlight=False,
            markup=False,
        )
    if logits.logits > LOGIT_TOLERANCE or gradients.gradients > GRADIENT_TOLERANCE:
        raise typer.Exit(1)


def _compare_text(source: Path, prompt: str, n: int, as_json: bool) -> None:
    """Greedy text of a run, plain, drafted where it can be, and by transformers in a fresh process."""
    import torch

    from explore.data import load_tokenizer
    from explore.interop import greedy_text, save_hf
    from explore.model import generate, speculate

    experiment, model, record = _run(source)
    if experiment.data.kind != "text":
        raise ValueError(f"RUN: {str(source)!r} was trained on {experiment.data.kind}, and this needs text")
    tokenizer = load_tokenizer(experiment.data.tokenizer)
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(prompt)])
    generate(model, tokens[None], 8)
    began = time.perf_counter()
    ours = generate(model, tokens[None], n)[0].tolist()
    result: dict[str, Any] = {"text": tokenizer.decode(ours), "tokens_per_s": n / (time.perf_counter() - began)}
    same = {}
    if model.config.mtp is not None:
        began = time.perf_counter()
        drafted = speculate(model, tokens, n)
        result |= {
            "speculative_tokens_per_s": n / (time.perf_counter() - began),
            "acceptance_length": drafted.acceptance_length,
        }
        same["with speculation"] = drafted.tokens == ours
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "exported", tokenizer, record)
        theirs, text = greedy_text(Path(folder) / "exported", prompt, n)
    same["transformers in a fresh process"] = theirs == ours and text == result["text"]
    if as_json:
        print(json.dumps(result | {"transformers_text": text, "same": same}, indent=2))
    else:
        out.print(
            f"ours:         {prompt}{result['text']}\ntransformers: {prompt}{text}", highlight=False, markup=False
        )
        out.print(f"{result['tokens_per_s']:,.0f} tokens/s", highlight=False)
        if "acceptance_length" in result:
            speed, length = result["speculative_tokens_per_s"], result["acceptance_length"]
            out.print(f"{speed:,.0f} tokens/s with speculation, acceptance length {length:.3f}", highlight=False)
        for other, equal in same.items():
            out.print(f"{other}: {'the same' if equal else 'OTHER'} {n} tokens", highlight=False)
    if not all(same.values()):
        raise typer.Exit(1)


def _print_arguments(source: Path) -> None:
    from explore.interop import is_model_folder, load_model_config, megatron_arguments

    if is_model_folder(source):
        arguments, notes = megatron_arguments(load_model_config(source))
    else:
        experiment = _experiment(source)
        arguments, notes = megatron_arguments(
            experiment.model, seq_len=experiment.data.seq_len, mtp_weight=experiment.train.mtp_weight
        )
    for note in notes:
        print(f"# {note}")
    print(" \\\n".join(shlex.join(argument) for argument in arguments))


def _experiment(folder: Path) -> Experiment:
    from explore.experiment import Experiment

    path = folder / "experiment.json"
    if not path.exists():
        raise ValueError(f"RUN: {str(folder)!r} has neither an experiment.json nor a model.json")
    return Experiment.load(path)


def _run(folder: Path) -> tuple[Experiment, LanguageModel, dict[str, Any]]:
    from explore.runs import RunFolder
    from explore.train import load_model

    experiment, run = _experiment(folder), RunFolder(folder)
    return experiment, load_model(run), {**run.row(), "seq_len": experiment.data.seq_len}


def _size(model: ModelConfig) -> str:
    cost = model.cost(1)
    return f"{model.pattern}, {cost.params_total + cost.params_mtp:,} parameters"


def _record(case: Case) -> dict[str, Any]:
    return {**case._asdict(), "model": case.model.model_dump(mode="json")}


def _name(case: Case) -> str:
    return f"in {case.model.pattern} of width {case.model.d_model}, {case.seq_len} tokens, {case.direction}"
