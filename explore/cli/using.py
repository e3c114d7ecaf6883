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
    epilog="Example: explore eval runs/my-run-0123abcd --pairs blimp.jsonl.gz --corpus sotu",
)
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that import wrote.")],
    pairs: Annotated[list[Path] | None, typer.Option(help="BLiMP or Zorro file of minimal pairs; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pairs of each paradigm.")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Bits per byte of the test text of another corpus; repeatable.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Only so many tokens of a corpus.")] = None,
    acceptance: Annotated[
        int | None, typer.Option(min=1, help="Acceptance length of drafts, over so many prompts of the test text.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Add the results to evals.json of each run, which tables and records hold.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Minimal pairs, other corpora, or the acceptance length of multi-token prediction, of trained runs."""
    from explore.evals import read_minimal_pairs
    from explore.runs import RunFolder, write_json

    if not (pairs or corpus or acceptance):
        raise ValueError("--pairs, --corpus, --acceptance: at least one of them is required")
    read = {path.name.partition(".")[0]: read_minimal_pairs(path, limit) for path in pairs or []}
    found = {}
    for run in runs:
        found[str(run)] = results = _results(run, read, corpus or [], tokens, acceptance)
        if save:
            kept = RunFolder(run).evals
            write_json(
                run / "evals.json",
                {name: kept.get(name, {}) | each for name, each in results.items()}
                | {name: each for name, each in kept.items() if name not in results},
            )
    if as_json:
        print(json.dumps(found if len(runs) > 1 else found[str(runs[0])], indent=2))
        return
    for name, results in found.items():
        view = Table("", "", title=name, title_justify="left", show_header=False)
        for suite, shares in results.get("pairs", {}).items():
            if len(runs) == 1:
                for uid, share in sorted(shares.items()):
                    view.add_row(uid, f"{share:.3f}")
                view.add_section()
            view.add_row(f"{suite}, mean of {len(shares)} paradigms", f"{sum(shares.values()) / len(shares):.3f}")
        for other, bits in results.get("bpb", {}).items():
            view.add_row(f"{other}, bits per byte", f"{bits:.4f}")
        for sampling, length in results.get("acceptance_length", {}).items():
            view.add_row(f"acceptance length over {acceptance} prompts, {sampling}", f"{length:.3f}")
        out.print(view)


def _results(
    run: Path, pairs: dict[str, Any], corpora: list[str], tokens: int | None, acceptance: int | None
) -> dict[str, Any]:
    """What was asked for of one run, by kind: shares of minimal pairs, bits per byte, acceptance lengths."""
    from explore.evals import acceptance_length, bits_per_byte, minimal_pair_accuracy
    from explore.model import GREEDY, Sampling

    model, tokenizer, data = _opened(run)
    results: dict[str, Any] = {}
    if pairs:
        results["pairs"] = {name: minimal_pair_accuracy(model, tokenizer, some) for name, some in pairs.items()}
    if (corpora or acceptance) and data is None:
        option = "--corpus" if corpora else "--acceptance"
        raise ValueError(f"{option}: {run} is no run, and windows are those of a run's data")
    if corpora:
        assert data is not None
        other = {name: data.model_copy(update={"corpus": name, "n_shards": None}).open(0) for name in corpora}
        scores = {name: bits_per_byte(model, each.eval_batches("test", 16, tokens)) for name, each in other.items()}
        results["bpb"] = {name: score.bits_per_byte for name, score in scores.items()}
    if acceptance is not None:
        assert data is not None
        prompts = list(_prompts(data, acceptance))
        results["acceptance_length"] = {
            name: acceptance_length(model, prompts, PROMPT_TOKENS, sampling)
            for name, sampling in (("greedy", GREEDY), ("temperature 1", Sampling()))
        }
    return results


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
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the step of a token first, up to a minute; for long texts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let a trained run write: prompts of equal length are decoded as one batch, with their state kept."""
    from explore.model import Sampling

    if compiled and speculate:
        raise ValueError("--compile: not with --speculate; only steps of one token are compiled")
    if compiled:
        from explore.train import keep_compiled

        keep_compiled()
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, tokenizer, _ = _opened(run)
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
        out.print(f"[bold]{_plain(text)}[/bold]{_plain(new)}", highlight=False)
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
        new = generate(model, torch.tensor([prompts[i] for i in rows]), n, sampling, eot_id, compiled)
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
