"""Terminal tables of plans, searches and published numbers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from explore.cli.app import out
from explore.formatting import count

if TYPE_CHECKING:
    from explore.plan import Found, Held, Plan, Run

GIB = 2**30
WIDTH = 100
"""Maximum characters per line."""


def row_of(name: str, plan: Plan, tokens: float | None) -> dict[str, Any]:
    """A plan as one row of a table."""
    ceiling, estimate = plan.tflops
    row: dict[str, Any] = {"model": name} | plan.layout.model_dump(exclude={"pipeline"})
    row |= {
        "dp": plan.layout.dp(plan.cluster.n_gpus), "fits": plan.fits, "gib": plan.needed / GIB,
        "relief": relief_of(plan.run), "tflops_ceiling": ceiling, "tflops_estimate": estimate,
        "tokens_per_s_gpu": plan.tokens_per_s_gpu, "step_s": plan.step_s, "bubble": plan.batch.bubble,
        "all_to_all_s": float(plan.throughput.experts_s[0]), "binds": plan.binds, "pipeline": plan.pipeline(),
    }  # fmt: skip
    if tokens is not None:
        row |= {"days": plan.days(tokens), "gpu_hours": plan.days(tokens) * 24 * plan.cluster.n_gpus}
    return row


def relief_of(run: Run) -> str:
    """The run's memory-saving measures, as text."""
    named = {
        "memory-efficient permutation": run.memory_efficient_permutation,
        f"recompute {' '.join(run.recompute)}": run.recompute,
        "offload optimizer": run.offload_optimizer,
        f"offload {run.offload_activations:.0%} of activations": run.offload_activations,
    }
    return ", ".join(name for name, on in named.items() if on)


def print_plan(name: str, plan: Plan, found: Found | None, tokens: float | None) -> None:
    """Prints a plan in full, and the search that found it."""
    from explore.plan import cheapest_relief

    ceiling, estimate = plan.tflops
    over = (plan.needed - plan.capacity) / GIB
    _say(
        Text.assemble(
            (name, "bold"),
            f" on {plan.cluster.name}: {plan.layout}, DP{plan.layout.dp(plan.cluster.n_gpus)}; ",
            f"{plan.run.precision}, {plan.run.seq_len:,} tokens, batch {plan.run.global_batch:,}",
        )
    )
    if relief := relief_of(plan.run):
        _say(f"to save memory: {relief}")
    if plan.batch.pp > 1:
        _say(f"pipeline: {plan.pipeline()}")
    table = _table("GiB of rank", "weights", "grads", "optimizer", "activations", "total", left=0)
    for i, rank in enumerate(plan.ranks()):
        table.add_row(str(i), *(f"{value:,.1f}" for value in rank.values()))
    out.print(table)
    _say(
        f"{'fits' if plan.fits else f'does not fit, {over:,.1f} GiB over'}: {plan.needed / GIB:,.1f} of "
        f"{plan.capacity / GIB:,.1f} GiB"
    )
    if not plan.fits:
        relief_found = cheapest_relief(plan)
        _say("no recomputation or offload makes it fit" if relief_found is None else f"fits with {relief_found[1]}")
    _say(
        f"{estimate:,.0f} TFLOP/s per GPU, at most {ceiling:,.0f}; {plan.tokens_per_s_gpu:,.0f} tokens/s per "
        f"GPU; step {plan.step_s:.3g} s; bottleneck: {plan.binds}"
    )
    _print_traffic(plan)
    parts = {part: seconds / plan.step_s for part, seconds in plan.parts.items()}
    _say("share of a step: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items() if share > 0.005))
    if tokens is not None:
        days = plan.days(tokens)
        _say(f"{count(tokens)} tokens: {days:,.1f} days, {days * 24 * plan.cluster.n_gpus:,.0f} GPU-hours")
    _print_assumptions(plan)
    if found is not None:
        _print_search(found)


def _print_traffic(plan: Plan) -> None:
    """Prints the traffic of the busiest rank in a step."""
    if not (rows := plan.traffic()):
        return
    table = _table("traffic of a step", "link", "GB", "seconds", "assumed hidden", left=(0, 1))
    for row in rows:
        table.add_row(row["kind"], row["link"], f"{row['gb']:,.4g}", f"{row['seconds']:,.3g}", f"{row['hidden']:.0%}")
    out.print(table)


def _print_assumptions(plan: Plan) -> None:
    given = plan.assumptions()
    fitted = "fitted to published runs" if given["product_efficiency_fitted"] else "the mean of other GPUs"
    rates = ", ".join(f"{link} {part:.0%}" for link, part in given["link_efficiency"].items())
    _say(Text(f"assumed: products at {given['product_efficiency']:.0%} of the peak ({fitted});", "dim"))
    _say(Text(f"links at {rates} of their rate;", "dim"))
    _say(Text(f"workspace: {given['workspace_gib']:.2f} GiB of memory; {given['reserve']:.0%} is left free", "dim"))


def _print_search(found: Found) -> None:
    _say(f"\n{found.n_fitting:,} of {found.n_legal:,} legal layouts fit. The best (the least divided first among")
    _say("those within 1%, a difference below the accuracy of the estimate):")
    table = _table("layout", "tokens/s", "TFLOP/s", "GiB", "to save memory", left=(0, 4))
    for plan in found.plans:
        numbers = (f"{plan.tokens_per_s_gpu:,.0f}", f"{plan.tflops[1]:,.0f}", f"{plan.needed / GIB:,.0f}")
        table.add_row(str(plan.layout), *numbers, relief_of(plan.run))
    out.print(table, width=min(WIDTH, out.width))
    _say("\nbest layout for each value of one degree, relative to the best overall, and its limit")
    table = _table("degree", "values", "of the best", "limit", left=(0, 1, 3))
    for row in merged_walls(found):
        table.add_row(*row)
    out.print(table, width=min(WIDTH, out.width))


def merged_walls(found: Found) -> list[tuple[str, str, str, str]]:
    """Rows of degree, values, share of the best tokens/s, and limit; neighbouring values with one limit share a row."""
    groups: list[list[Any]] = []
    for wall in found.walls:
        last = groups[-1][-1] if groups else None
        if last is not None and (last.degree, last.wall, last.relative > 0) == (
            wall.degree, wall.wall, wall.relative > 0,
        ):  # fmt: skip
            groups[-1].append(wall)
        else:
            groups.append([wall])
    rows = []
    for group in groups:
        values = str(group[0].value) + (f" to {group[-1].value}" if len(group) > 1 else "")
        shares = sorted({round(100 * wall.relative) for wall in group})
        share = "" if not shares[-1] else "–".join(f"{each}" for each in dict.fromkeys((shares[0], shares[-1]))) + "%"
        words = group[0].wall + (f": {group[0].detail}" if group[0].detail else "")
        rows.append((group[0].degree, values, share, words))
    return rows


def print_side_by_side(plans: dict[str, Plan], tokens: float | None) -> None:
    """Prints several models, one per column."""
    rows = [row_of(name, plan, tokens) for name, plan in plans.items()]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for name in plans:
        table.add_column(name, justify="right", overflow="fold")
    for column in (column for column in rows[0] if column not in ("model", "pipeline")):
        table.add_row(column.replace("_", " "), *(_cell(row[column]) for row in rows))
    _say("\nside by side")
    out.print(table, width=min(WIDTH, out.width))


def print_published(rows: list[Held]) -> None:
    """Prints every published number beside the computed one, and the errors of the estimates."""
    for section in dict.fromkeys(row.section for row in rows):
        table = _table(section, "published", "computed", "difference", "", left=0)
        for row in (row for row in rows if row.section == section):
            mark = "" if row.ok is None else "✓" if row.ok else "✗"
            if section == "throughput":
                mark += " " + row.note.partition(";")[0]
            table.add_row(row.name, _plain(row.published), _plain(row.computed), f"{row.difference:+.1%}", mark)
        out.print(table, width=min(WIDTH, out.width))
        for row in (row for row in rows if row.section == section and section == "layouts" and not row.ok):
            _say(textwrap.fill(f"✗ {row.name}: {row.note}", WIDTH, subsequent_indent="  "))
    for half in ("fitted", "predicted"):
        errors = sorted(
            abs(row.difference) for row in rows if row.section == "throughput" and row.note.startswith(half)
        )
        _say(
            f"throughput, {len(errors)} runs {half}: mean error {sum(errors) / len(errors):.1%}, median "
            f"{errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}"
        )
    held = [row for row in rows if row.ok is not None]
    _say(
        f"{sum(bool(row.ok) for row in held)} of {len(held)} rows are within their bounds: memory and FLOPs 1.5%,\n"
        "golden steady 3% and peak 15%, all-to-all 15%, layouts legal and fitting, no run above its ceiling"
    )


def _table(*columns: str, left: int | tuple[int, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        words = i in ((left,) if isinstance(left, int) else left)
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _cell(value: Any) -> str:
    return _plain(value) if isinstance(value, float) else str(value)


def _plain(value: float) -> str:
    """A number as text with four digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _say(text: str | Text) -> None:
    out.print(text, highlight=False)
