"""Commands that use a trained run: evaluate it, and let it write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import Json, app, err, out

if TYPE_CHECKING:
    from torch import Tensor

    from explore.data import TextData, Tokenizer
    from explore.model import LanguageModel

Run = Annotated[Path, typer.Argument(help="A run folder, or a folder that import wrote.")]
PROMPT_TOKENS = 64


@app.command(
    "eval",
    rich_help_panel="Use what was trained",
    epilog="Example: explore eval runs/my-run-0123abcd --pairs blimp.jsonl.gz",
)
def evaluate(
    run: Run,
    pairs: Annotated[list[Path] | None, typer.Option(help="BLiMP or Zorro file of minimal pairs; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pairs of each paradigm.")] = None,
    acceptance: Annotated[
        int | None, typer.Option(min=1, help="Acceptance length of drafts, over so many prompts of the test text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Minimal-pair accuracy of a trained run, or the acceptance length of its multi-token prediction."""
    from explore.evals import acceptance_length, minimal_pair_accuracy, read_minimal_pairs
    from explore.model import GREEDY, Sampling

    if not pairs and acceptance is None:
        raise ValueError("--pairs, --acceptance: at least one of them is required")
    read = {path: read_minimal_pairs(path, limit) for path in pairs or []}
    model, tokenizer, data = _opened(run)
    results: dict[str, Any] = {str(path): minimal_pair_accuracy(model, tokenizer, some) for path, some in read.items()}
    if acceptance is not None:
        if data is None:
            raise ValueError(f"--acceptance: {run} is no run, and its prompts are a run's test text")
        prompts = list(_prompts(data, acceptance))
        results["acceptance_length"] = {
            name: acceptance_length(model, prompts, PROMPT_TOKENS, sampling)
            for name, sampling in (("greedy", GREEDY), ("temperature 1", Sampling()))
        }
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for path in map(str, read):
        view = Table("paradigm", "accuracy", title=path, title_justify="left")
        for uid, share in sorted(results[path].items()):
            view.add_row(uid, f"{share:.3f}")
        view.add_section()
        view.add_row("mean of paradigms", f"{sum(results[path].values()) / len(results[path]):.3f}")
        out.print(view)
    if acceptance is not None:
        lengths = ", ".join(f"{length:.3f} {name}" for name, length in results["acceptance_length"].items())
        out.print(f"acceptance length over {acceptance} prompts of the test text: {lengths}", highlight=False)


@app.command(
    rich_help_panel="Use what was trained",
    epilog='Example: explore generate runs/my-run-0123abcd --prompt "It was" --temperature 0.8 --top-p 0.95',
)
def generate(
    run: Run,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; repeatable.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the tokens that together have this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Let multi-token prediction draft; needs a model that has it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let a trained run write: prompts of equal length are decoded as one batch, with their state kept."""
    from explore.model import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    model, tokenizer, _ = _opened(run)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompt]
    began = time.perf_counter()
    texts, lengths = _continued(model, prompts, max_new_tokens, sampling, tokenizer.eot_id, speculate)
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
        out.print(f"[bold]{_plain(text)}[/bold]{_plain(new)}", highlight=False)
    drafted = f", acceptance length {record['acceptance_length']:.3f}" if lengths else ""
    err.print(f"{n_tokens} tokens, {record['tokens_per_s']:,.0f} tokens/s{drafted}", highlight=False)


def _continued(
    model: LanguageModel, prompts: list[list[int]], n: int, sampling: Any, eot_id: int, speculate: bool
) -> tuple[list[list[int]], list[float]]:
    """New tokens of every prompt, and the acceptance lengths where they were drafted."""
    import torch

    from explore.model import generate
    from explore.model import speculate as drafted

    if speculate:
        found = [drafted(model, torch.tensor(prompt), n, sampling, eot_id) for prompt in prompts]
        return [each.tokens for each in found], [each.acceptance_length for each in found]
    texts: list[list[int]] = [[] for _ in prompts]
    for length in sorted(set(map(len, prompts))):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        new = generate(model, torch.tensor([prompts[i] for i in rows]), n, sampling, eot_id)
        for i, tokens in zip(rows, new.tolist(), strict=True):
            texts[i] = tokens[: tokens.index(eot_id)] if eot_id in tokens else tokens
    return texts, []


def _opened(run: Path) -> tuple[LanguageModel, Tokenizer, TextData | None]:
    """The model and tokenizer of a run, and its data; there is none with a folder that import wrote."""
    from explore.data import TextData, load_tokenizer
    from explore.experiment import Experiment
    from explore.interop import is_model_folder, load_model_folder
    from explore.runs import RunFolder
    from explore.train import load_model

    if is_model_folder(run):
        return load_model_folder(run), load_tokenizer(str(run / "tokenizer.json")), None
    data = Experiment.load(run / "experiment.json").data
    if not isinstance(data, TextData):
        raise ValueError(f"{run}: was trained on {data.kind}, and this needs text")
    return load_model(RunFolder(run)), load_tokenizer(data.tokenizer), data


def _prompts(data: TextData, n: int) -> Iterator[Tensor]:
    """Windows of the test text, evenly over it."""
    batches = list(data.open(0).eval_batches("test", 1, None))
    for i in range(n):
        yield batches[i * len(batches) // n].inputs[0, :PROMPT_TOKENS]


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
