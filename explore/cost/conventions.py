"""FLOP conventions of other tools, as functions of the ledger, and the components on which two conventions differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from explore.cost.ledger import MTP_LETTER, ConventionName, Entry, Ledger, Part


class Convention(NamedTuple):
    """How a tool counts training FLOPs: three times its forward FLOPs.

    Attributes:
        rule: forward FLOPs of an entry over a sequence of a length. A `Part` of the ledger may override it
            with the tool's numbers for its kind of block.
        summary: what it counts and what it leaves out.
        source: paper or code that defines it.
        mtp: whether it counts multi-token prediction.
    """

    rule: Callable[[Entry, int], int]
    summary: str
    source: str
    mtp: bool = True


def _products(entry: Entry, seq_len: int) -> int:
    return entry.flops_seq


def _parameters(entry: Entry, seq_len: int) -> int:
    return 2 * entry.params_active * seq_len


CONVENTIONS: Mapping[ConventionName, Convention] = {
    "exact": Convention(
        _products, "every matrix product that the maths needs, causal attention halved", "this project"
    ),
    "megatron": Convention(
        _products,
        "causal attention halved, windows ignored; recurrent layers by their own formulas: Mamba-2 has an inner width "
        "of 2 d_model, a scan of 7 d_inner d_state and no convolution; router and MTP input projection left out",
        "Megatron-LM, num_floating_point_operations in megatron/training/training.py",
    ),
    "palm": Convention(
        _parameters,
        "6 active parameters, input embedding left out, and 12 n_heads d_head seq_len an attention layer, not halved",
        "PaLM, arXiv 2204.02311, appendix B; nanoGPT, estimate_mfu",
        mtp=False,
    ),
    "6nd": Convention(
        _parameters, "6 active parameters, embeddings and head left out", "arXiv 2001.08361, section 2.1", mtp=False
    ),
}


def flops_train(ledger: Ledger, convention: str) -> float:
    """Training FLOPs per token under a convention; divide by three for a forward pass."""
    name = _known(convention)
    parts = [*ledger.counted(), *((1, part) for part in ledger.mtp)]
    return sum(n * _flops_train(ledger, name, part, entry) for n, part in parts for entry in part.entries)


def diff(ledger: Ledger, one: str, other: str) -> list[dict[str, Any]]:
    """Returns the components on which two conventions differ, largest difference first.

    Returns:
        Records of letter, component, number of layers, training FLOPs per token under each convention (by its name),
        and `difference`, the second minus the first. Components that a block declares as one line are merged.
    """
    names = (_known(one), _known(other))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in ledger:
        component = row.part.line_of(row.entry.component)
        line = lines.setdefault(
            (row.letter, component),
            {"letter": row.letter, "component": component, "layers": set(), one: 0.0, other: 0.0},
        )
        line["layers"].add(row.layer)
        for name in names:
            line[name] += _flops_train(ledger, name, row.part, row.entry)
    records = [
        line | {"layers": len(line["layers"] - {None}), "difference": line[other] - line[one]}
        for line in lines.values()
        if line[one] != line[other]
    ]
    return sorted(records, key=lambda record: -abs(record["difference"]))


def _flops_train(ledger: Ledger, name: ConventionName, part: Part, entry: Entry) -> float:
    convention = CONVENTIONS[name]
    if part.letter == MTP_LETTER and not convention.mtp:
        return 0.0
    flops_seq = part.conventions.get(name, {}).get(entry.component)
    return 3 * (convention.rule(entry, ledger.seq_len) if flops_seq is None else flops_seq) / ledger.seq_len


def _known(name: str) -> ConventionName:
    for convention in CONVENTIONS:
        if convention == name:
            return convention
    raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {name!r}")
