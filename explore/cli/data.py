"""The `data` command: show corpora and train tokenizers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, note, out
from explore.cli.options import Json
from explore.cli.rules import Apart, Needs


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore data ../books --tokenizer bytes; explore data ../books --train-bpe 4096 --out bpe.json; "
    "explore data austen --ngram 3",
    rules=(
        Needs("--tokenizer --shards --train-bpe --ngram --out", "CORPUS"),
        Needs("--out", "--train-bpe"),
        Apart("--train-bpe", "--tokenizer --ngram"),
    ),
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
        int | None,
        typer.Option(
            min=257, metavar="COUNT", help="Train a byte-level BPE of this many entries on the training text."
        ),
    ] = None,
    ngram: Annotated[
        int | None,
        typer.Option(min=2, max=5, help="Score val and test with a Kneser-Ney model of this order, as a baseline."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Where --train-bpe writes the tokenizer.")] = None,
    as_json: Json = False,
) -> None:
    """Show the documents, bytes and tokens of each split of a corpus; without a corpus, list the known ones."""
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
    if train_bpe is not None:
        _train_bpe(corpus, shards, train_bpe, output, as_json=as_json)
        return
    loaded = texts.load_tokenizer(tokenizer)
    opened = texts.load_corpus(corpus, shards)
    for line in opened.notes:
        note(line)
    rows: list[dict[str, Any]] = []
    streams = texts.token_streams(opened, loaded)
    for split, stream in streams.items():
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
    if ngram is not None:
        from explore.evals import ngram_scores

        scores = ngram_scores(texts.TextSource(streams, loaded, seq_len=1, seed=0), ngram)
        for row in rows:
            row[f"{ngram}gram_bits_per_byte"] = scores[row["split"]].bits_per_byte if row["split"] in scores else None
    if as_json:
        print(
            json.dumps(
                {"corpus": corpus, "tokenizer": tokenizer, "vocab_size": loaded.vocab_size, "splits": rows}, indent=2
            )
        )
        return
    title = f"{corpus}, tokenizer {tokenizer} ({loaded.vocab_size} entries)"
    view = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    scored = [] if ngram is None else [f"{ngram}-gram bpb"]
    for name in ("split", "documents", "bytes", "tokens", "bytes/token", *scored, "content hash"):
        view.add_column(name, justify="left" if name in ("split", "content hash") else "right", no_wrap=True)
    for row in rows:
        cells = [f"{row[name]:,}" for name in ("n_documents", "n_bytes", "n_tokens")]
        cells.append(f"{row['bytes_per_token']:.2f}")
        if ngram is not None:
            bits = row[f"{ngram}gram_bits_per_byte"]
            cells.append("" if bits is None else f"{bits:.4f}")
        view.add_row(row["split"], *cells, row["content_hash"][:16])
    out.print(view)


def _train_bpe(corpus: str, shards: int | None, vocab_size: int, output: Path | None, *, as_json: bool) -> None:
    """Trains a BPE tokenizer on the training text and writes it; the output path is checked before training."""
    from explore import data as texts
    from explore.files import replacing

    if output is None:
        raise ValueError("--out: a path is required with --train-bpe")
    texts.check_vocab_size(vocab_size)
    if output.is_dir():
        raise ValueError(f"--out: must be a file, got the folder {output}")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--out: must be in a folder that exists and can be written, got {output}")
    opened = texts.load_corpus(corpus, shards)
    for line in opened.notes:
        note(line)
    pieces = (piece for _, chunks in opened.read(["train"]) for piece in texts.cut_at_blanks(chunks, 1 << 16))
    trained = texts.train_bpe(pieces, vocab_size)
    with replacing(output) as temporary:
        trained.save(str(temporary))
    if as_json:
        print(
            json.dumps({"corpus": corpus, "tokenizer": str(output), "vocab_size": trained.get_vocab_size()}, indent=2)
        )
        return
    out.print(f"wrote {output}", highlight=False)
