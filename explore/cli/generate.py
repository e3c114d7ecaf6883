"""The `generate` command: continue prompts with a trained run."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from explore.cli.app import app, err, out
from explore.cli.opening import RunOrModel, open_run
from explore.cli.options import Json
from explore.cli.rules import Apart

if TYPE_CHECKING:
    from explore.model import LanguageModel


@app.command(
    rich_help_panel="Use trained models",
    epilog='Example: explore generate runs/my-run-0123abcd --prompt "It was" --temperature 0.8 --top-p 0.95',
    rules=(Apart("--compile", "--speculate"),),
)
def generate(
    run: RunOrModel,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeatable.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Maximum number of tokens to generate.")
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many of the most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most probable tokens that together have this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate", help="Speculative decoding; the model must have multi-token prediction, which drafts."
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step first (up to a minute); for long texts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with a trained run; prompts of equal length are decoded as one batch."""
    from explore.model import Sampling

    if compiled:
        from explore.ops import check_compiler
        from explore.train import keep_compiled

        check_compiler()
        keep_compiled()
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, tokenizer, _ = open_run(run)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompt]
    began = time.perf_counter()
    texts, lengths = _continued(model, prompts, max_new_tokens, sampling, tokenizer.eot_id, speculate, compiled)
    seconds = time.perf_counter() - began
    n_tokens = sum(map(len, texts))
    record: dict[str, Any] = {"tokens_per_s": n_tokens / seconds}
    if lengths:
        record["acceptance_length"] = sum(lengths) / len(lengths)
    written = [tokenizer.decode(tokens) for tokens in texts]
    if as_json:
        pairs = [{"prompt": text, "text": new} for text, new in zip(prompt, written, strict=True)]
        print(json.dumps(record | {"seed": seed, "continuations": pairs}, indent=2))
        return
    for text, new in zip(prompt, written, strict=True):
        out.print(Text.assemble((text, "bold"), new))
    drafted = f", acceptance length {record['acceptance_length']:.3f}" if lengths else ""
    err.print(f"{n_tokens} tokens, {record['tokens_per_s']:,.0f} tokens/s{drafted}", highlight=False)


def _continued(
    model: LanguageModel,
    prompts: list[list[int]],
    n: int,
    sampling: Any,
    eot_id: int,
    speculate: bool,
    compiled: bool,
) -> tuple[list[list[int]], list[float]]:
    """New tokens of every prompt, and their acceptance lengths if drafted."""
    import torch

    from explore.model import generate
    from explore.model import speculate as drafted

    if speculate:
        found = [drafted(model, torch.tensor(prompt), n, sampling, eot_id) for prompt in prompts]
        return [each.tokens for each in found], [each.acceptance_length for each in found]
    texts: list[list[int]] = [[] for _ in prompts]
    for length in sorted(set(map(len, prompts))):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        new = generate(model, torch.tensor([prompts[i] for i in rows]), n, sampling, eot_id, compiled)
        for i, tokens in zip(rows, new.tolist(), strict=True):
            texts[i] = tokens[: tokens.index(eot_id)] if eot_id in tokens else tokens
    return texts, []
