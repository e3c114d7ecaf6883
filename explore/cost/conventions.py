"""FLOP conventions in use elsewhere, as functions over the ledger, and the lines on which two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from explore.cost.ledger import MTP_LETTER, Ledger, Row

ConventionName = Literal["exact", "megatron", "palm", "6nd"]


SCAN = ("ssd C B^T", "ssd (L * C B^T) X", "ssd state update", "ssd state output")
"""The four products of the chunked state-space algorithm, one line in a comparison."""


class Convention(NamedTuple):
    """How some tool counts the FLOPs of training.

    Attributes:
        flops_train: training FLOPs per token of one row.
        says: what it counts and leaves out.
        source: where it is written.
    """

    flops_train: Callable[[Ledger, Row], float]
    says: str
    source: str


def _exact(ledger: Ledger, row: Row) -> float:
    return 3 * row.entry.flops_seq / ledger.seq_len


def _megatron(ledger: Ledger, row: Row) -> float:
    component, sizes = row.entry.component, row.part.sizes
    kind = sizes.get("kind")
    if component in ("router", "conv1d", "eh_proj"):
        return 0.0
    if kind == "attention" and component == "attention":
        d_q: int = sizes["n_heads"] * sizes["d_head"]
        return 3.0 * 2 * ledger.seq_len * d_q  # half of a square, whatever the window
    if kind == "mamba2":
        d_inner = 2 * ledger.d_model  # fixed, also where n_heads * d_head is another number
        if component == "in_proj":
            width: int = 2 * d_inner + 2 * sizes["n_groups"] * sizes["d_state"] + sizes["n_heads"]
            return 3.0 * 2 * ledger.d_model * width
        if component == "out_proj":
            return 3.0 * 2 * d_inner * ledger.d_model
        d_state: int = sizes["d_state"]
        return 3.0 * 7 * d_inner * d_state if component == SCAN[0] else 0.0
    return _exact(ledger, row)


def _palm(ledger: Ledger, row: Row) -> float:
    if row.letter == MTP_LETTER or row.entry.component == "embedding":
        return 0.0
    sizes = row.part.sizes
    attention = 0.0
    if row.entry.component == "attention":
        widths = sizes["n_heads"] * (sizes.get("d_head") or (sizes["d_nope"] + sizes["d_rope"] + sizes["d_v"]) / 2)
        attention = 12 * widths * ledger.seq_len
    return 6 * row.entry.params_active + attention


def _six_n(ledger: Ledger, row: Row) -> float:
    if row.letter == MTP_LETTER or row.entry.component in ("embedding", "head"):
        return 0.0
    return 6 * row.entry.params_active


CONVENTIONS: Mapping[ConventionName, Convention] = {
    "exact": Convention(_exact, "every matrix product that the maths needs, causal attention halved", "this project"),
    "megatron": Convention(
        _megatron,
        "causal attention halved, windows ignored; Mamba with an inner width of 2 d_model and a scan of 7 d_inner "
        "d_state; router, short convolution and the MTP input projection left out",
        "Megatron-LM, num_floating_point_operations in megatron/training/training.py",
    ),
    "palm": Convention(
        _palm,
        "6 active parameters, input embedding left out, and 12 n_heads d_head seq_len an attention layer, not halved",
        "PaLM, arXiv 2204.02311, appendix B; nanoGPT, estimate_mfu",
    ),
    "6nd": Convention(_six_n, "6 active parameters, embeddings and head left out", "arXiv 2001.08361, section 2.1"),
}


def flops_train(ledger: Ledger, convention: str) -> float:
    """Training FLOPs per token as a convention counts them; a forward pass is a third of it."""
    count = _named(convention).flops_train
    parts = [*ledger.counted(), *((1, part) for part in ledger.mtp)]
    return sum(n * count(ledger, Row(None, part, entry)) for n, part in parts for entry in part.entries)


def diff(ledger: Ledger, one: str, other: str) -> list[dict[str, Any]]:
    """The lines on which two conventions differ, the largest difference first.

    Returns:
        Records of letter, component, number of layers, training FLOPs per token under each convention (by its name),
        and `difference`, the second less the first. The products of a state-space scan are one line.
    """
    counts = (_named(one).flops_train, _named(other).flops_train)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in ledger:
        component = "ssd" if row.entry.component in SCAN else row.entry.component
        line = lines.setdefault(
            (row.letter, component),
            {"letter": row.letter, "component": component, "layers": set(), one: 0.0, other: 0.0},
        )
        line["layers"].add(row.layer)
        for name, count in zip((one, other), counts, strict=True):
            line[name] += count(ledger, row)
    records = [
        line | {"layers": len(line["layers"] - {None}), "difference": line[other] - line[one]}
        for line in lines.values()
        if line[one] != line[other]
    ]
    return sorted(records, key=lambda record: -abs(record["difference"]))


def _named(name: str) -> Convention:
    for convention, found in CONVENTIONS.items():
        if convention == name:
            return found
    raise ValueError(f"convention: {name!r} is unknown; allowed are {', '.join(CONVENTIONS)}")
