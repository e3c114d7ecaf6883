"""Notebook display of a model: letters in the colours of their kinds, and counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from explore.blocks import GROUPS, STANDARD_LETTERS, BlockConfig
from explore.cost import MTP_LETTER, SEQ_LEN
from explore.formatting import axis_scale, count, size
from explore.formatting.html import Color, Paint, block, curve, line, note, paint, strip, table
from explore.quantities import headlines, quantity

if TYPE_CHECKING:
    import pandas as pd

    from explore.model.config import ModelConfig

MTP_COLOR: Color = (0.36, 0.36, 0.36)
"""Colour of multi-token prediction."""

ENOUGH = 5
"""Number of validations from which the learning curve shows validation loss instead of training loss."""


def letter_color(kind: type[BlockConfig]) -> Color:
    """Returns the letter colour of a kind: that of `colored_as`, or of its first component group."""
    return GROUPS[kind.colored_as or next(iter(kind.groups))].color


def letter_kinds(blocks: Mapping[str, BlockConfig]) -> dict[str, type[BlockConfig]]:
    """Returns the block kind of every letter: the standard ones, and those of a model."""
    return {**STANDARD_LETTERS, **{letter: type(each) for letter, each in blocks.items()}}


def letter_paints(blocks: Mapping[str, BlockConfig]) -> dict[str, Paint]:
    """Returns the colours of these letters and of the multi-token prediction mark."""
    kinds = letter_kinds(blocks)
    return {**{letter: paint(letter_color(kind)) for letter, kind in kinds.items()}, MTP_LETTER: paint(MTP_COLOR)}


def strip_of(model: ModelConfig) -> str:
    """The layers of a model as coloured letters."""
    names = {letter: kind.label for letter, kind in letter_kinds(model.blocks).items()}
    depths = "" if model.mtp is None else (MTP_LETTER + model.mtp.pattern) * model.mtp.n_depths
    return strip(model.pattern + depths, letter_paints(model.blocks), {**names, MTP_LETTER: "multi-token prediction"})


def counts_of(model: ModelConfig) -> str:
    """Layers by letter, and sizes, in one line."""
    letters = ", ".join(f"{model.pattern.count(letter)} {letter}" for letter in dict.fromkeys(model.pattern))
    return f"{model.n_layers} layers: {letters}; d_model {model.d_model:,}; vocabulary {model.vocab_size:,}"


def model_html(model: ModelConfig) -> str:
    """A model as a strip of letters with its counts."""
    cost = model.cost(SEQ_LEN)
    active = "" if cost.params_active == cost.params_total else f", {count(cost.params_active)} active"
    extra = f", {count(cost.params_mtp)} more in multi-token prediction" if cost.params_mtp else ""
    state = f"state {size(cost.ssm_state_bytes + cost.conv_state_bytes)} a sequence"
    return block(
        line(f"{count(cost.params_total)} parameters{active}{extra}", model.family),
        strip_of(model),
        note(counts_of(model)),
        note(
            f"At {SEQ_LEN:,} tokens: {_flops(cost.flops_fwd)} forward, {_flops(cost.flops_decode)} decoding; "
            f"KV cache {size(cost.kv_bytes_per_token)} a token, {state}"
        ),
    )


def record_html(row: Mapping[str, Any], experiment: Any, metrics: pd.DataFrame) -> str:
    """A run with its model, its headline numbers and its learning curve.

    Args:
        row: row of the table of runs.
        experiment: its JSON; the layers are plain letters if its model cannot be read.
        metrics: rows of `metrics.csv`.
    """
    from explore.model.config import ModelConfig

    try:
        letters = strip_of(ModelConfig.model_validate(experiment["model"]))
    except (LookupError, TypeError, ValueError):  # a record of another version, or one that is damaged
        letters = strip(str(row.get("pattern") or ""), letter_paints({}))
    names = dict.fromkeys([*(each.name for each in headlines(row)), "tokens", "seed"])
    known = [quantity(name) for name in names if row.get(name) is not None]
    cells = [[each.header for each in known], [each.text(row[each.name]) for each in known]]
    lengths = {name: int(metrics[name].notna().sum()) for name in ("val_bpb", "loss") if name in metrics}
    score = next(
        (name for name, n in lengths.items() if n >= ENOUGH), max(lengths, key=lengths.__getitem__, default="")
    )
    return block(
        line(str(row.get("run")), str(row.get("status"))),
        letters,
        table(cells[0], cells[1:], left=()),
        _curve(metrics, score) if score and "tokens" in metrics else "",
    )


def _curve(metrics: pd.DataFrame, score: str) -> str:
    rows = metrics[["tokens", score]].dropna()
    if rows.empty:
        return ""
    points = [(float(x), float(y)) for x, y in rows.itertuples(index=False)]
    label = quantity(score).label
    return note(label) + curve(points, "tokens", label, (count(points[0][0]), count(points[-1][0])))


def _flops(value: float) -> str:
    scale, unit = axis_scale(value, "FLOPs/token")
    return f"{value / scale:.3g} {unit}"
