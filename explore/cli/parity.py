"""The `parity` command: compare models with their transformers counterparts."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from explore.cli.app import app, err, out
from explore.cli.opening import load_run, run_argument
from explore.cli.options import Json
from explore.cli.rules import Apart, Needs

if TYPE_CHECKING:
    from explore.interop import Case


@app.command(
    rich_help_panel="Prove",
    epilog="Example: explore parity --cases 50; explore parity runs/mtp-0123abcd",
    rules=(Needs("--prompt --max-new-tokens", "RUN"), Apart("--cases", "RUN"), Apart("--seed", "RUN")),
)
def parity(
    run: Annotated[
        Path | None, run_argument("a run trained on text: compare its greedy text instead of random models")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Number of random models.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random models.")] = 0,
    prompt: Annotated[str, typer.Option(help="Text that the run continues.")] = "It was",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="COUNT", help="Number of tokens to generate.")] = 64,
    as_json: Json = False,
) -> None:
    """Compare random models with transformers' nemotron_h: logits and the gradients of all parameters, in fp32.

    Half of the models are exported and half imported. Gradient errors are relative to the parameter's largest
    gradient. With a RUN, export it, load it with transformers in a fresh process, and compare their greedy text.
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
        )
    if logits.logits > LOGIT_TOLERANCE or gradients.gradients > GRADIENT_TOLERANCE:
        raise typer.Exit(1)


def _compare_text(source: Path, prompt: str, n: int, as_json: bool) -> None:
    """Compares a run's greedy text with speculative decoding (if the run has MTP) and with transformers."""
    import torch

    from explore.data import load_tokenizer
    from explore.interop import greedy_text, save_hf
    from explore.model import generate, speculate

    experiment, model, record = load_run(source)
    if experiment.data.kind != "text":
        raise ValueError(f"RUN: {str(source)!r} must be trained on text, got {experiment.data.kind}")
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
        out.print(f"ours:         {prompt}{result['text']}\ntransformers: {prompt}{text}", highlight=False)
        out.print(f"{result['tokens_per_s']:,.0f} tokens/s", highlight=False)
        if "acceptance_length" in result:
            speed, length = result["speculative_tokens_per_s"], result["acceptance_length"]
            out.print(f"{speed:,.0f} tokens/s with speculation, acceptance length {length:.3f}", highlight=False)
        for other, equal in same.items():
            out.print(f"{other}: {'the same' if equal else 'DIFFERENT'} {n} tokens", highlight=False)
    if not all(same.values()):
        raise typer.Exit(1)


def _record(case: Case) -> dict[str, Any]:
    return {**case._asdict(), "model": case.model.model_dump(mode="json")}


def _name(case: Case) -> str:
    return f"in {case.model.pattern} of width {case.model.d_model}, {case.seq_len} tokens, {case.direction}"
