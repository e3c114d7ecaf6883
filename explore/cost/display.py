"""Notebook display of ledgers and costs: tables of formatted numbers."""

from __future__ import annotations

from explore.cost.ledger import DTYPES, Ledger
from explore.cost.totals import Cost
from explore.formatting import count, flops, size
from explore.formatting.html import block, line, note, table
from explore.quantities import quantity

TOTALS = (
    "params_total", "params_active", "params_mtp", "flops_fwd", "flops_train", "flops_prefill", "flops_decode",
    "weight_bytes", "kv_bytes_per_token", "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes",
    "all_to_all_bytes",
)  # fmt: skip
"""Totals shown in a notebook; zero totals are omitted."""


def cost_html(cost: Cost) -> str:
    """Renders the totals of a cost with their units."""
    rows = []
    for name in TOTALS:
        if value := getattr(cost, name):
            about = quantity(name)
            unit = "" if about.unit in ("parameters", "bytes") else about.unit.removeprefix("bytes ")
            rows.append((about.label, about.text(value), unit, name))
    dtypes = f"weights {cost.weight_dtype}, keys and values {cost.kv_dtype}, state {cost.state_dtype}"
    return block(
        line(f"Cost at {cost.seq_len:,} tokens"),
        table(("", "", "", "field"), rows, left=(0, 2, 3)),
        note(dtypes),
    )


def ledger_html(ledger: Ledger) -> str:
    """Renders a ledger summed by component."""
    rows = []
    for record in ledger.fold("component"):
        state = record["kv_bytes"] + record["ssm_state_bytes"] + record["conv_state_bytes"]
        rows.append(
            (
                record["letter"],
                record["component"],
                str(record["layers"] or ""),
                count(record["params"] or None),
                count(record["params_active"] or None),
                flops(record["flops_fwd"] or None),
                f"{record['share']:.1%}" if record["share"] else "",
                flops(record["flops_decode"] or None),
                size(state) if state else "",
                size(record["decode_bytes"]) if record["decode_bytes"] else "",
            )
        )
    main, extra = ledger.main, ledger.extra
    params, active = count(main.params + extra.params), count(main.params_active + extra.params_active)
    forward = flops((main.flops_seq + extra.flops_seq) / ledger.seq_len)
    step, moved = flops(main.flops_step), size(ledger.decode_bytes(DTYPES))
    rows.append(("", "total", str(len(ledger.pattern)), params, active, forward, "", step, "", moved))
    header = ("", "component", "layers", "params", "active", "FLOPs/token", "share", "decoding", "state", "moved")
    return block(line(f"Ledger of {ledger.pattern}", f"at {ledger.seq_len:,} tokens"), table(header, rows, left=(0, 1)))
