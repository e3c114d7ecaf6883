"""The command that shows corpora and trains tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.options import Json


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore data ../books --tokenizer bytes; explore data ../books --train-bpe 4096 --out bpe.json",
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
