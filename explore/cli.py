"""The command line. Commands read, call and print; heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from explore.model import ModelConfig

app = typer.Typer(
    help="Explore hybrids of Mamba-2, attention, MLP and (latent) mixture-of-experts layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Set EXPLORE_TRACEBACK=1 to see the traceback behind an error.",
)
out = Console(soft_wrap=True)
err = Console(stderr=True)


By = Literal["letter", "layer", "component"]
WandbMode = Literal["offline", "online"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, e.g. train.lr=1e-3; repeatable."),
]
Wandb = Annotated[WandbMode | None, typer.Option(help="Mirror to Weights & Biases; off when absent.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints; a twentieth of a run when absent.")
]


@app.command(epilog='Example: explore cost "MEM*E" --d-model 256 --set blocks.E.d_latent=64 --by component')
def cost(
    target: Annotated[str, typer.Argument(help="A pattern, or the path of an experiment or model in JSON.")],
    d_model: Annotated[int, typer.Option(min=1, help="Width of a pattern's model.")] = 256,
    vocab_size: Annotated[int, typer.Option(min=1, help="Vocabulary of a pattern's model.")] = 2048,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens over which FLOPs are averaged.")] = 4096,
    set_: SetOptions = None,
    by: Annotated[By, typer.Option(help="How the table is folded.")] = "letter",
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs and decoding state of a model, itemised.

    Sizes of the blocks of a pattern follow d_model as in the Nemotron models: heads of 64 (Mamba-2, d_inner
    twice d_model, d_state 128, up to 8 groups) and of up to 128 (attention, 2 KV heads), d_ff = 4 d_model with
    squared ReLU, 128 experts of 11/16 d_model with top 6 and a shared expert of twice that width. Change any of
    them with --set blocks.LETTER.FIELD=VALUE. FLOPs are per token, averaged over a sequence.
    """
    model = _model(target, d_model, vocab_size, set_ or [])
    ledger = model.ledger(seq_len)
    totals = ledger.cost().to_dict()
    if as_json:
        about = {"pattern": model.pattern, "family": model.family}
        print(json.dumps(about | totals | {"ledger": ledger.to_records()}, indent=2))
        return
    table = Table(
        title=f"{model.pattern}: {model.family}, d_model {model.d_model}, {model.n_layers} layers",
        caption="FLOPs: forward, per token. State: elements; KV per token of context, SSM and conv per sequence.",
        title_justify="left",
        caption_justify="left",
    )
    records = ledger.fold(by)
    names = [name for name in ("layer", "letter", "component") if name in records[0]]
    for name in names:
        table.add_column(name, no_wrap=name != "component")
    folded = ("layers",) if by != "layer" else ()
    for number in (*folded, "params", "active", "FLOPs", "share", "state"):
        table.add_column(number, justify="right", no_wrap=True)
    for record in records:
        counts = [record[n] for n in ("params", "params_active", "flops_fwd")]
        states = (("KV", "kv_numel"), ("SSM", "ssm_numel"), ("conv", "conv_numel"))
        state = ", ".join(f"{kind} {_count(record[field])}" for kind, field in states if record[field])
        layers = ("" if record["letter"] == "" else str(record["count"]),) if folded else ()
        label = [str(record[name]) or "model" for name in names]
        cells = [*label, *layers, *map(_count, counts), f"{record['share']:.1%}", state]
        table.add_row(*cells)
    out.print(table)
    out.print(
        f"parameters {_count(totals['params_total'])} total, {_count(totals['params_active'])} active "
        "(embeddings and router counted)\n"
        f"FLOPs per token at seq_len {seq_len}: {_count(totals['flops_fwd'])} forward, "
        f"{_count(totals['flops_train'])} training\n"
        f"decoding state: {totals['kv_bytes_per_token']:,.0f} bytes of KV per token ({totals['kv_dtype']}); "
        f"{totals['ssm_state_bytes']:,.0f} bytes of SSM and {totals['conv_state_bytes']:,.0f} of conv state "
        f"per sequence ({totals['state_dtype']})",
        highlight=False,
    )


@app.command(epilog="Example: explore train experiment.json --set train.lr=1e-3 --runs runs")
def train(
    experiment: Annotated[Path, typer.Argument(help="An experiment in JSON, or the experiment.json of a run.")],
    set_: SetOptions = None,
    runs: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs"),
    checkpoint_every: CheckpointEvery = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Train one experiment, or go on with it where it was stopped; a finished one is shown, not trained again."""
    from explore.experiment import Experiment
    from explore.train import fit

    loaded = Experiment.load(experiment, set_ or [])
    folder = fit(loaded, runs, checkpoint_every=checkpoint_every, wandb=wandb)
    result = folder.result or {}
    if as_json:
        print(json.dumps({"run": str(folder.path), **result}, indent=2))
    else:
        out.print(f"{folder.path}: {_outcome(result)}", highlight=False)
    if result.get("status") != "finished":
        raise typer.Exit(1)


@app.command(epilog="Example: explore sweep sweeps/first_frontier.py --trials 40")
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file: docstring, experiment(trial), objectives.")],
    trials: Annotated[
        int, typer.Option(min=1, help="Trials that the study shall have, those already there included.")
    ] = 20,
    runs: Annotated[Path | None, typer.Option(help="Folder of runs and journal; runs/NAME when absent.")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; a journal file when absent.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    checkpoint_every: CheckpointEvery = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Search with Optuna, or go on with a search: nothing that is finished is trained again."""
    from explore.study import load_sweep, run_sweep

    loaded = load_sweep(file)
    folder = runs or Path("runs") / loaded.name
    summary = run_sweep(
        loaded,
        trials,
        folder,
        seed=seed,
        storage=storage,
        checkpoint_every=checkpoint_every,
        wandb=wandb,
        console=err,
    )
    numbers = {"complete": summary.complete, "failed": summary.failed, "rejected": summary.rejected}
    if as_json:
        print(json.dumps({"runs": str(folder), **numbers}))
    else:
        out.print(f"{folder}: " + ", ".join(f"{count} {name}" for name, count in numbers.items()), highlight=False)


@app.command(epilog="Example: explore table runs/ --out runs.csv")
def table(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[Path | None, typer.Option("--out", help="Write the whole table, .csv or .parquet.")] = None,
    sort: Annotated[str, typer.Option(help="Column to sort by.")] = "val_bpb",
    unfinished: Annotated[bool, typer.Option(help="Runs that have not ended, too.")] = False,
    as_json: Json = False,
) -> None:
    """One row a run, the Pareto front marked."""
    from explore.frontier import pareto_front
    from explore.runs import COLUMNS, load_runs, save_table

    if sort not in COLUMNS:
        raise ValueError(f"--sort: {sort!r} is not a column; allowed are {', '.join(COLUMNS)}")
    runs = load_runs(*roots, unfinished=unfinished).sort_values(sort, ignore_index=True)
    if output is not None:
        save_table(runs, output)
    if as_json:
        print(runs.to_json(orient="records", indent=2))
        return
    view = Table(box=None, padding=(0, 1, 0, 0), caption="● on the front of val bpb against training FLOPs")
    view.caption_justify = "left"
    for name in ("", "family", "pattern"):
        view.add_column(name, no_wrap=name == "pattern")
    for name in ("d_model", "params", "active", "FLOPs", "val bpb", "test bpb"):
        view.add_column(name, justify="right", no_wrap=True)
    for (_, run), front in zip(runs.iterrows(), pareto_front(runs), strict=True):
        numbers = [_count(run[name]) for name in ("params_total", "params_active", "flops_run")]
        bits = [_number(run[name], ".3f") for name in ("val_bpb", "test_bpb")]
        if run["status"] != "finished":
            bits = [str(run["status"]), ""]
        names = [str(run[name]) for name in ("family", "pattern", "d_model")]
        view.add_row("●" if front else "", *names, *numbers, *bits)
    out.print(view)
    if output is not None:
        out.print(f"wrote {output}", highlight=False)


@app.command(epilog="Example: explore plot runs/ --out frontier.png --x flops_run --y val_bpb")
def plot(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Picture, written as PNG and SVG; frontier.png in the first folder when absent."),
    ] = None,
    x: Annotated[str, typer.Option(help="Column of the cost, on a logarithmic axis.")] = "flops_run",
    y: Annotated[str, typer.Option(help="Column of the error.")] = "val_bpb",
) -> None:
    """Draw the accuracy-per-FLOP frontier, families by colour."""
    from explore.figures import plot_frontier, save_figure
    from explore.runs import COLUMNS, load_runs

    numeric = [name for name, dtype in COLUMNS.items() if dtype in ("float64", "Int64")]
    for option, column in (("--x", x), ("--y", y)):
        if column not in numeric:
            raise ValueError(
                f"{option}: {column!r} is not a number in the table of runs; allowed are {', '.join(numeric)}"
            )
    runs = load_runs(*roots)
    for path in save_figure(plot_frontier(runs, x, y), output or roots[0] / "frontier.png"):
        out.print(f"wrote {path}", highlight=False)


@app.command(
    epilog="Example: explore data ../books --tokenizer bytes; explore data ../books --train-bpe 4096 --out bpe.json"
)
def data(
    corpus: Annotated[
        str | None, typer.Argument(help="A known corpus, a file or folder of .txt or .jsonl, or hf:NAME.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, austen-bpe-2048, or a JSON file of `tokenizers`.")
    ] = "austen-bpe-2048",
    shards: Annotated[int | None, typer.Option(min=1, help="Use only the first training files.")] = None,
    train_bpe: Annotated[
        int | None, typer.Option(min=257, help="Train a byte-level BPE of this many entries on the training text.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Where --train-bpe writes the tokenizer.")] = None,
    as_json: Json = False,
) -> None:
    """What a corpus holds, split by split; without a corpus, which ones are known."""
    from explore import data as texts

    if corpus is None:
        if as_json:
            known = {name: {"source": known.source, "licence": known.licence} for name, known in texts.CORPORA.items()}
            print(json.dumps({"corpora": known, "tokenizers": texts.TOKENIZERS}, indent=2))
            return
        view = Table("corpus", "source", "licence")
        for name, entry in texts.CORPORA.items():
            view.add_row(name, entry.source, entry.licence)
        out.print(view)
        out.print(f"tokenizers: {', '.join(texts.TOKENIZERS)}", highlight=False)
        return
    opened = texts.load_corpus(corpus, shards)
    if train_bpe is not None:
        if output is None:
            raise ValueError("--out: a path is required with --train-bpe")
        texts.train_bpe(opened.documents("train"), train_bpe).save(str(output))
        out.print(f"wrote {output}", highlight=False)
        return
    loaded = texts.load_tokenizer(tokenizer)
    rows = []
    for split in texts.SPLITS:
        stream = texts.token_stream(opened, split, loaded)
        rows.append(
            {
                "split": split,
                "n_documents": stream.n_documents,
                "n_bytes": stream.n_bytes,
                "n_tokens": stream.n_tokens,
                "bytes_per_token": stream.n_bytes / stream.n_tokens,
                "content_hash": opened.content_hash(split),
            }
        )
    if as_json:
        print(
            json.dumps(
                {"corpus": corpus, "tokenizer": tokenizer, "vocab_size": loaded.vocab_size, "splits": rows}, indent=2
            )
        )
        return
    view = Table(title=f"{corpus}, tokenizer {tokenizer} ({loaded.vocab_size} entries)", title_justify="left")
    for name in ("split", "documents", "bytes", "tokens", "bytes/token", "content hash"):
        view.add_column(name, justify="left" if name in ("split", "content hash") else "right")
    for row in rows:
        sizes = [f"{row[name]:,}" for name in ("n_documents", "n_bytes", "n_tokens")]
        view.add_row(str(row["split"]), *sizes, f"{row['bytes_per_token']:.2f}", str(row["content_hash"])[:16])
    out.print(view)


@app.command("eval", epilog="Example: explore eval runs/my-run-0123abcd --pairs blimp.jsonl.gz")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    pairs: Annotated[list[Path], typer.Option(help="BLiMP or Zorro file of minimal pairs; repeatable.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pairs of each paradigm.")] = None,
    as_json: Json = False,
) -> None:
    """Minimal-pair accuracy of a trained run."""
    from explore.data import TextData, load_tokenizer
    from explore.evals import minimal_pair_accuracy, read_minimal_pairs
    from explore.experiment import Experiment
    from explore.runs import RunFolder
    from explore.train import load_model

    experiment = Experiment.load(run / "experiment.json")
    if not isinstance(experiment.data, TextData):
        raise ValueError(f"{run}: was trained on {experiment.data.kind}, and minimal pairs need text")
    read = {path: read_minimal_pairs(path, limit) for path in pairs}
    model, tokenizer = load_model(RunFolder(run)), load_tokenizer(experiment.data.tokenizer)
    results = {str(path): minimal_pair_accuracy(model, tokenizer, some) for path, some in read.items()}
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for path, accuracy in results.items():
        view = Table("paradigm", "accuracy", title=path, title_justify="left")
        for uid, share in sorted(accuracy.items()):
            view.add_row(uid, f"{share:.3f}")
        view.add_section()
        view.add_row("mean of paradigms", f"{sum(accuracy.values()) / len(accuracy):.3f}")
        out.print(view)


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("EXPLORE_TRACEBACK"):
            raise
        _refuse(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _refuse(error: Exception) -> NoReturn:
    from pydantic import ValidationError

    from explore.config import explain

    message = explain(error) if isinstance(error, ValidationError) else str(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _model(target: str, d_model: int, vocab_size: int, overrides: list[str]) -> ModelConfig:
    from explore.experiment import read_json, set_field
    from explore.model import ModelConfig

    content: dict[str, Any] = {"d_model": d_model, "vocab_size": vocab_size, "pattern": target}
    if target.endswith(".json") or Path(target).is_file():
        content = read_json(Path(target))
        content = content.get("experiment", content)
        content = content.get("model", content)
    for override in overrides:
        set_field(content, override.removeprefix("model."))
    return ModelConfig.model_validate(content)


def _outcome(result: dict[str, Any]) -> str:
    if result.get("status") != "finished":
        return f"{result.get('status', 'unfinished')}: {result.get('reason')}"
    parts = [
        f"{name} {result[name]:.4f}"
        for name in ("val_bpb", "test_bpb", "val_loss", "recall")
        if result.get(name) is not None
    ]
    return f"finished: {', '.join(parts)}, {_number(result.get('tokens_per_s'), ',.0f')} tokens/s"


def _count(value: Any) -> str:
    if value != value:
        return ""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def _number(value: Any, spec: str) -> str:
    return "" if value is None or value != value else format(value, spec)
