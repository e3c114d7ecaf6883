"""The model card of an exported model, from the record of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.data import CORPORA, Tokenizer
from explore.model import LanguageModel

ROWS: tuple[tuple[str, str, str], ...] = (
    ("run", "run", "s"),
    ("key", "key of the experiment", "s"),
    ("corpus", "corpus", "s"),
    ("seed", "seed", "d"),
    ("tokens", "training tokens", ",d"),
    ("flops_run", "training FLOPs, exact convention", ".4g"),
    ("lr", "peak learning rate", "g"),
    ("val_bpb", "validation bits per byte", ".4f"),
    ("test_bpb", "test bits per byte", ".4f"),
    ("status", "status", "s"),
    ("commit", "commit of the code", "s"),
    ("device", "device", "s"),
    ("finished_at", "finished", "s"),
)
"""Columns of the table of runs that the card shows, what they are called there, and how they are written."""


def model_card(model: LanguageModel, tokenizer: Tokenizer | None, record: Mapping[str, Any]) -> str:
    """README.md of a checkpoint for transformers.

    Args:
        record: one row of the table of runs; what is missing is left out.
    """
    config = model.config
    seq_len = int(record.get("seq_len") or 1)
    cost = config.cost(seq_len)
    facts = [
        ("architecture", f"{config.family}, {config.n_layers} layers"),
        ("pattern", f"`{config.pattern}`"),
        ("d_model", f"{config.d_model:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("tokenizer", "none" if tokenizer is None else tokenizer.name),
        ("parameters", f"{cost.params_total:,}"),
        ("active parameters", f"{cost.params_active:,}"),
    ]
    if record.get("flops_fwd") is not None:
        facts.append(("forward FLOPs a token", f"{record['flops_fwd']:,.0f}"))
    facts += [
        (label, format(record[column], spec)) for column, label, spec in ROWS if record.get(column) not in (None, "")
    ]
    known = CORPORA.get(str(record.get("corpus")))
    if known is not None:
        facts += [("corpus is", known.source), ("licence of the corpus", known.licence)]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [nemotron_h]",
        "---",
        "",
        f"# {record.get('name') or config.family}",
        "",
        "M is a Mamba-2 layer, `*` attention, `-` an MLP, E a mixture of experts. Exported by hybrid-frontier.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in facts),
        "",
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        *([] if tokenizer is None else ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']),
        "```",
        "",
        *_notes(model, tokenizer),
    ]
    return "\n".join(lines) + "\n"


def _notes(model: LanguageModel, tokenizer: Tokenizer | None) -> list[str]:
    """What a reader must know that the files do not say."""
    config = model.config
    notes = []
    if any(block.kind == "mamba2" for block in config.layers):
        notes.append(
            "- `time_step_min` is next to nothing on purpose: transformers clamps the step size dt there, and this "
            "model was trained without a clamp. It is no bound for the initialisation of a new model."
        )
    if not any(block.kind == "attention" for block in config.layers):
        notes.append(
            "- `use_cache` is off because the cache of transformers fails for a model without attention layers: "
            "generation computes the whole context anew for every token."
        )
    if config.tie_embeddings:
        notes.append(
            "- The head is the embedding's matrix. transformers does not tie the two for nemotron_h, so the matrix is "
            "in the file twice, and further training there parts them."
        )
    if config.mtp is not None:
        times = f"applied {config.mtp.n_depths} times" if config.mtp.shared else f"{config.mtp.n_depths} depths"
        notes.append(
            f"- Multi-token prediction (`{config.mtp.pattern}`, {times}) is stored under `mtp.*`. transformers ignores "
            "these weights."
        )
    if tokenizer is not None:
        notes.append(
            "- The tokenizer reads no special token out of text and adds none; in training the end of text stood "
            "before each document."
        )
    notes.append("- `explore_model` in config.json is the whole configuration; transformers carries it and ignores it.")
    return ["## Notes", "", *notes]
