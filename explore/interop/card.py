"""Writes the model card of an exported model from its run record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explore.data import CORPORA, Tokenizer
from explore.formatting.markdown import inline
from explore.model import LanguageModel
from explore.quantities import Quantity, headlines, quantity


def model_card(model: LanguageModel, tokenizer: Tokenizer | None, record: Mapping[str, Any]) -> str:
    """Returns the README.md of a checkpoint for transformers.

    Args:
        record: one row of the table of runs; missing values are left out.
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
    facts += [
        (_lower(each.axis_label), _exact(each, value))
        for each in _rows(record)
        if (value := record.get(each.name)) not in (None, "")
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
        f"# {inline(str(record.get('name') or config.family))}",
        "",
        "M is a Mamba-2 layer, `*` attention, `-` an MLP, E a mixture of experts. FLOPs count every matrix product.",
        "Exported by hybrid-frontier.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {inline(label)} | {text if label == 'pattern' else inline(text)} |" for label, text in facts),
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


def _rows(record: Mapping[str, Any]) -> list[Quantity]:
    """Returns the run's facts for the card."""
    scores = [each for each in headlines(record) if each.is_quality]
    before = ("run", "key", "corpus", "seed", "tokens", "flops_fwd", "flops_run", "lr")
    after = ("status", "commit", "device", "finished_at")
    return [*map(quantity, before), *scores, *map(quantity, after)]


def _lower(label: str) -> str:
    return label[0].lower() + label[1:]


def _exact(each: Quantity, value: Any) -> str:
    """Formats a value; counts keep all digits."""
    if isinstance(value, str):
        return value
    return format(value, each.spec or (",.0f" if value == round(value) and value < 1e12 else ".4g"))


def _notes(model: LanguageModel, tokenizer: Tokenizer | None) -> list[str]:
    """Returns notes on what the files alone do not show."""
    config = model.config
    notes = []
    if any(block.kind == "mamba2" for block in config.layers):
        notes.append(
            "- `time_step_min` is tiny on purpose: transformers clamps the step size dt there, and this "
            "model was trained without a clamp. Do not use it to initialise a new model."
        )
    if not any(block.kind == "attention" for block in config.layers):
        notes.append(
            "- `use_cache` is off because the cache of transformers fails for a model without attention layers: "
            "generation recomputes the whole context for every token."
        )
    if config.tie_embeddings:
        notes.append(
            "- Head and embedding are tied. transformers does not tie them for nemotron_h, so the file "
            "stores the matrix twice, and further training there lets the copies diverge."
        )
    if config.mtp is not None:
        times = f"applied {config.mtp.n_depths} times" if config.mtp.shared else f"{config.mtp.n_depths} depths"
        notes.append(
            f"- Multi-token prediction (`{config.mtp.pattern}`, {times}) is stored under `mtp.*`. transformers ignores "
            "these weights."
        )
    if tokenizer is not None:
        notes.append(
            "- The tokenizer neither parses special tokens in text nor adds any; in training an end-of-text token "
            "preceded each document."
        )
    notes.append(
        "- `explore_model` in config.json is the complete configuration; transformers keeps it but ignores it."
    )
    return ["## Notes", "", *notes]
