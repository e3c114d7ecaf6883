"""The `eval` command: evaluate trained runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.opening import open_run, run_argument
from explore.cli.options import Json
from explore.cli.rules import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from explore.data import TextData

PROMPT_TOKENS = 64


@app.command(
    "eval",
    rich_help_panel="Use trained models",
    epilog="Example: explore eval runs/my-run-0123abcd --pairs blimp.jsonl.gz --corpus sotu",
    rules=(Needs("--limit", "--pairs"), Needs("--tokens", "--corpus")),
)
def evaluate(
    runs: Annotated[
        list[Path],
        run_argument(
            "runs (folders, or the first characters of their keys), folders written by explore import, or records "
            "(.parquet)"
        ),
    ],
    pairs: Annotated[
        list[Path] | None, typer.Option(help="File or folder of minimal pairs, such as BLiMP or Zorro; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many pairs of each paradigm.")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Score bits per byte on the test text of another corpus; repeatable.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="COUNT", help="Read only this many tokens of --corpus, e.g. 200k."),
    ] = None,
    acceptance: Annotated[
        int | None,
        typer.Option(min=1, help="Measure the acceptance length of drafts on this many prompts of the test text."),
    ] = None,
    ngram: Annotated[
        int | None,
        typer.Option(min=2, max=5, help="Score a Kneser-Ney model of this order on the run's tokens, as a baseline."),
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Score all of val and test, document by document.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Add the results to each run's evals.json; tables and records include them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate runs: minimal pairs, other corpora, whole splits, draft acceptance, or an n-gram baseline."""
    from explore.evals import read_minimal_pairs
    from explore.files import write_json
    from explore.frontier.floors import add_floors, ngram_floor
    from explore.runs import PACKED, RunFolder

    if not (pairs or corpus or acceptance or ngram or whole):
        raise ValueError("--pairs, --corpus, --acceptance, --ngram, --whole: at least one of them is required")
    suites: dict[str, Path] = {}
    for path in pairs or []:
        suite = path.resolve().name.partition(".")[0]
        if suite in suites:
            raise ValueError(f"--pairs: suites must have different names, got {suites[suite]} and {path}")
        suites[suite] = path
    read = {suite: read_minimal_pairs(path, limit) for suite, path in suites.items()}
    found, added = {}, dict[str, dict[str, int]]()
    for run in runs:
        if run.suffix == PACKED:
            if ngram is None or not save or pairs or corpus or acceptance or whole:
                raise ValueError(f"{run}: records have no weights; only --ngram with --save accepts them")
            added[str(run)] = {"ngram_added": add_floors(run, ngram)}
            continue
        found[str(run)] = results = _results(run, read, corpus or [], tokens, acceptance)
        if whole:
            results["documents"] = _documents(run)
        if ngram is not None:
            results["ngram"] = ngram_floor(RunFolder(run), ngram)
        if save:
            kept = RunFolder(run).evals
            write_json(
                run / "evals.json",
                {name: kept.get(name, {}) | each for name, each in results.items()}
                | {name: each for name, each in kept.items() if name not in results},
            )
    if as_json:
        every = found | added
        print(json.dumps(every if len(runs) > 1 else every[str(runs[0])], indent=2))
        return
    for name, counts in added.items():
        n = counts["ngram_added"]
        out.print(f"{name}: added the score of a {ngram}-gram model on the same tokens to {n} runs", highlight=False)
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
        for split in ("val", "test") if "ngram" in results else ():
            label = f"{split} by a {ngram}-gram model of the same tokens, bits per byte"
            view.add_row(label, f"{results['ngram'][f'{split}_bpb']:.4f}")
        for split, scores in results.get("documents", {}).items():
            bits = sum(scores["nats"]) / math.log(2) / sum(scores["n_bytes"])
            view.add_row(f"whole {split}, {len(scores['nats'])} documents, bits per byte", f"{bits:.4f}")
        for sampling, length in results.get("acceptance_length", {}).items():
            view.add_row(f"acceptance length over {acceptance} prompts, {sampling}", f"{length:.3f}")
        out.print(view)


def _results(
    run: Path, pairs: dict[str, Any], corpora: list[str], tokens: int | None, acceptance: int | None
) -> dict[str, Any]:
    """The requested results of one run, by kind: minimal-pair accuracy, bits per byte, acceptance lengths."""
    from explore.evals import acceptance_length, bits_per_byte, minimal_pair_accuracy
    from explore.model import GREEDY, Sampling
    from explore.runs import RunFolder
    from explore.train.models import autocast_of

    model, tokenizer, data = open_run(run)
    autocast = nullcontext() if data is None else autocast_of(RunFolder(run), model)
    results: dict[str, Any] = {}
    if pairs:
        with autocast:
            results["pairs"] = {name: minimal_pair_accuracy(model, tokenizer, some) for name, some in pairs.items()}
    if (corpora or acceptance) and data is None:
        option = "--corpus" if corpora else "--acceptance"
        raise ValueError(f"{option} must have a run, whose data it reads; {run} is not one")
    if corpora:
        assert data is not None
        other = {name: data.model_copy(update={"corpus": name, "n_shards": None}).open(0) for name in corpora}
        with autocast:
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


def _documents(run: Path) -> dict[str, Any]:
    """Scores of the documents of both splits, for `evals.json`."""
    from explore.runs import RunFolder
    from explore.train import document_scores
    from explore.train.models import load_trained

    experiment = RunFolder(run).load_experiment()
    source = experiment.data.open(experiment.seed)
    scores = document_scores(experiment, source, load_trained(RunFolder(run)))
    if scores is None:
        raise ValueError(f"--whole: {run} must be trained on text, got {experiment.data.kind}")
    return scores


def _prompts(data: TextData, n: int) -> Iterator[Tensor]:
    """Windows of the test text, evenly spaced."""
    batches = list(data.open(0).eval_batches("test", 1, None))
    for i in range(n):
        yield batches[i * len(batches) // n].inputs[0, :PROMPT_TOKENS]
