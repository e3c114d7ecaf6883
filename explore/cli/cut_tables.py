"""Terminal tables of a child as a cut of another model, and of published searches."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from explore.cli.app import out
from explore.formatting import count, flops, ranges

if TYPE_CHECKING:
    from explore.blocks import BlockConfig
    from explore.compress import Plan
    from explore.compress.alignment import Alignment
    from explore.compress.plan import LibraryBlock
    from explore.compress.published import BlockSearch, BudgetSearch

WIDTH = 100
"""Maximum characters per line of prose."""


def show_published_cut(parent: str, like: str | None, published: bool, figure: Path | None, as_json: bool) -> None:
    """Prints a preset as a cut of another (`like`), or the published search that found such a child.

    Raises:
        ValueError: neither `like` nor `published` is given.
    """
    from explore.cli.models import load_model
    from explore.compress.alignment import align
    from explore.compress.published import BlockSearch
    from explore.compress.published import published as search_of
    from explore.presets import preset

    if like is not None:
        _show_alignment(align(preset(parent), load_model(like)), parent, Path(like).name, figure, as_json)
        return
    if not published:
        raise ValueError(
            f"{parent}: has no weights to cut; add --like MODEL to show a cut, or --published to show the search"
        )
    search = search_of(parent)
    if isinstance(search, BlockSearch):
        _show_blocks(search, as_json)
    else:
        _show_budget(search, as_json)


def _show_alignment(alignment: Alignment, parent: str, child: str, figure: Path | None, as_json: bool) -> None:
    if figure is not None:
        from explore.figures import plot_cut, save_figure

        save_figure(plot_cut(alignment, parent, child), figure)
    params = {
        name: model.cost(1).params_total for name, model in ((parent, alignment.parent), (child, alignment.child))
    }
    if as_json:
        layers = [
            {
                "layer": part.layer,
                "kind": part.block.kind,
                "treatment": part.treatment,
                "sizes": {name: new for name, (_, new) in part.changes.items()},
                "share": part.share,
                "kept_in": part.kept_in,
            }
            for part in alignment.parts
        ]
        fused = [block.model_dump(mode="json") for block in alignment.fused]
        d_model = {parent: alignment.parent.d_model, child: alignment.child.d_model}
        record = {"d_model": d_model, "params_total": params, "ways": alignment.ways, "layers": layers, "fused": fused}
        print(json.dumps(record, indent=2))
        return
    width = (alignment.parent.d_model, alignment.child.d_model)
    changed = "d_model is kept" if width[0] == width[1] else f"d_model {width[0]} -> {width[1]}"
    _say(f"{child} as a cut of {parent}: {' -> '.join(count(n) for n in params.values())} parameters, {changed}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("kind", "treatment", "layers", "parameters kept", "index among its kind, from 0"):
        table.add_column(name, justify="right" if name in ("layers", "parameters kept") else "left")
    treatments: dict[tuple[str, str, float], list[int]] = {}
    for part in alignment.parts:
        treatments.setdefault((part.block.kind, part.treatment, part.share), []).append(part.nth)
    kinds = list(dict.fromkeys(kind for kind, _, _ in treatments))
    for kind, treatment, share in sorted(treatments, key=lambda each: (kinds.index(each[0]), -each[2])):
        nth = treatments[kind, treatment, share]
        table.add_row(kind, treatment, str(len(nth)), f"{share:.1%}", ranges(nth))
    out.print(table, highlight=False)
    if alignment.fused:
        widths = ", ".join(f"{value:,}" for block in alignment.fused for value in _sizes(block))
        _say(f"The fused layers became {len(alignment.fused)} wider ones: {widths}.")
    if alignment.ways is not None and alignment.ways > 1:
        n_open = sum(part.is_open for part in alignment.parts)
        _say(
            f"{alignment.ways:,} choices of layers give this pattern; the earliest is shown. Whether {n_open} of the "
            "layers were kept cannot be decided without the weights."
        )


def _show_budget(search: BudgetSearch, as_json: bool) -> None:
    standing = search.position()
    dtypes = {
        name: {each: search.memory_gib(each, setting) for each in (search.child, search.parent)}
        for name, setting in search.settings.items()
    }
    stages = {} if not search.depths else {"depth": search.depths_table(), "width": search.widths_table()}
    if as_json:
        tables = {name: table.to_dict("records") for name, table in stages.items()}
        about = {"parent": search.parent, "child": search.child, "source": search.source, "printed": search.printed}
        print(
            json.dumps({**about, "budget_gib": search.budget_gib, **standing, "memory_gib": dtypes, **tables}, indent=2)
        )
        return
    setting = search.setting
    _say(f"{search.parent} to {search.child}, {search.source}")
    _say(
        f"Budget: {search.budget_gib:g} GiB for weights and the state of one sequence of {setting.context:,} tokens. "
        f"{search.printed}"
    )
    table = Table("dtypes", "child", "parent", "within", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, each in dtypes.items():
        inside = [who for who, gib in zip(("child", "parent"), each.values(), strict=True) if gib <= search.budget_gib]
        table.add_row(name, *(f"{gib:.2f} GiB" for gib in each.values()), ", ".join(inside) or "neither")
    out.print(table, highlight=False)
    _say(
        f"Of {standing['n']:,} children, {standing['n_within']:,} need at most {search.budget_gib:g} GiB "
        f"({next(iter(search.settings))}). {search.child} is "
        f"{'one of them' if standing['child_within'] else 'not one of them'}, and {search.parent} "
        f"{'fits too' if standing['parent_within'] else 'does not fit'}. {standing['n_less']:,} use less memory than "
        f"{search.child}, {standing['n_more']:,} more; {standing['n_larger']:,} of the latter are no smaller in any "
        "size."
    )
    if not stages:
        return
    depth, width = stages["depth"], stages["width"]
    _say(f"FLOPs and roofline time on one {setting.device} are for decoding one token at this context.")
    table = _measures("Stage 1: depth, at the parent's widths and the child's attention layers", "layers", "splits")
    for layers, rows in depth.groupby("layers"):
        table.add_row(str(layers), str(len(rows)), *_spans(rows), "yes" if rows["within"].any() else "no")
    out.print(table, highlight=False)
    names = [name.rpartition(".")[2] for name in search.widths]
    layers = int(width["layers"].iloc[0])
    title = f"Stage 2: width, at {layers} layers; the largest {names[-1]} within the budget"
    table = _measures(title, *names)
    for _, rows in width.groupby(width.index):
        released = ", released" if rows["released"].any() else ""
        table.add_row(*(str(int(rows[name].iloc[0])) for name in names), *_spans(rows), f"yes{released}")
    out.print(table, highlight=False)


def _measures(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (*names, "parameters", "GiB", "FLOPs", "step, ms", "within"):
        table.add_column(name, justify="left" if name == "within" else "right")
    return table


def _spans(rows: Any) -> list[str]:
    """The smallest and largest value of each measure, as text."""
    texts: dict[str, Callable[[float], str]] = {
        "params_total": count,
        "memory_gib": "{:.2f}".format,
        "flops_decode": flops,
        "decode_s": lambda value: f"{1e3 * value:.1f}",
    }
    ends = {
        name: dict.fromkeys([text(float(rows[name].min())), text(float(rows[name].max()))])
        for name, text in texts.items()
    }
    return [" to ".join(each) for each in ends.values()]


def _show_blocks(search: BlockSearch, as_json: bool) -> None:
    blocks = search.blocks()
    size = {"choices": search.n_choices, "blocks": search.n_blocks, "log10_size": search.log10_size}
    if as_json:
        about = {"parent": search.parent, "child": search.child, "source": search.source}
        print(json.dumps({**about, **size, "released": blocks.to_dict("records")}, indent=2))
        return
    widths = ", ".join(f"{width:.0%}" for width in search.widths)
    _say(f"{search.parent} to {search.child}, {search.source}")
    _say(
        f"Choices for a block: {len(search.attention)} for attention ({', '.join(search.attention)}) times "
        f"{len(search.widths) + len(search.others)} for the feed-forward layer "
        f"({widths}, {', '.join(search.others)}) = {search.n_choices}. For {search.n_blocks} blocks that is "
        f"{search.n_choices}^{search.n_blocks}, about 10^{search.log10_size:.0f} models."
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("attention", "d_ff", "of the parent's", "printed choice", "blocks", "which, from 0"):
        table.add_column(name, justify="right" if name in ("d_ff", "of the parent's", "blocks") else "left")
    for (attention, d_ff, share, printed), rows in blocks.groupby(["attention", "d_ff", "share", "is_printed"]):
        width = ("fused", "") if d_ff == 0 else (f"{d_ff:,}", f"{share:.1%}")
        kept, choice = ("kept" if bool(attention) else "none"), ("yes" if bool(printed) else "no")
        table.add_row(kept, *width, choice, str(len(rows)), ranges(rows["block"].tolist()))
    out.print(table, highlight=False)
    n = blocks.groupby(["attention", "d_ff"]).ngroups
    _say(f"{search.child} uses {n} of these pairs. explore cut {search.parent} --like {search.child} shows the layers.")


def _sizes(block: Any) -> list[int]:
    from explore.compress.cutting import fields

    return [int(getattr(block, name)) for name in fields(block.axes())]


def _say(text: str) -> None:
    out.print(textwrap.fill(text, WIDTH, break_on_hyphens=False), highlight=False, markup=False)


def show_plan(plan: Plan) -> None:
    """Prints the indices cut from each layer, as ranges, and the library blocks that replace layers."""
    from explore.compress.surgery import complete

    whole = plan.parent_model
    if plan.d_model is not None:
        gone = [i for i in range(whole.d_model) if i not in set(plan.d_model)]
        out.print(f"d_model {whole.d_model} -> {len(plan.d_model)}, cut: {ranges(gone)}", highlight=False, markup=False)
    for i, (letter, block, layer) in enumerate(zip(whole.pattern, whole.layers, plan.layers, strict=True)):
        if layer.drop or layer.block is not None:
            what = "left out" if layer.block is None else _replacement(block, layer.block)
            out.print(f"layer {i} {letter}: {what}", highlight=False, markup=False)
            continue
        kept, parts = complete(block.axes(), layer.keep), []
        for axis in block.axes():
            if len(kept[axis.name]) < axis.size:
                gone = sorted(set(range(axis.size)) - set(kept[axis.name]))
                how = "rotated" if axis.name in layer.rotate else f"cut: {ranges(gone)}"
                parts.append(f"{axis.name} {axis.size} -> {len(kept[axis.name])}, {how}")
        out.print(f"layer {i} {letter}: {'; '.join(parts) or 'kept'}", highlight=False, markup=False)
    if plan.drop_mtp and whole.mtp is not None:
        out.print("multi-token prediction: left out", highlight=False)
    child = plan.model()
    out.print(f"child: {child.pattern}, {child.cost(1).params_total:,} parameters", highlight=False, markup=False)


def show_own_plan(path: Path) -> bool:
    """Prints the plan in a file, or the plan by which a run was cut from its parent; returns whether there is one."""
    from explore.compress import Plan
    from explore.experiment import ParentWeights
    from explore.runs import RunFolder
    from explore.train.start import plan_of

    if path.suffix == ".json":
        show_plan(Plan.load(path))
        return True
    start = RunFolder(path).load_experiment().start if RunFolder(path).key else None
    if not isinstance(start, ParentWeights) or (plan := plan_of(start)) is None:
        return False
    out.print(f"{path}: cut from {start.parent.path}", highlight=False, markup=False)
    show_plan(plan)
    return True


def _replacement(block: BlockConfig, by: LibraryBlock) -> str:
    """The sizes in which a library block differs from the layer that it replaces, or its kind if that is another."""
    before, after = (each.model_dump(mode="json") for each in (block, by.config))
    sizes = [f"{name} {before[name]} -> {n}" for name, n in after.items() if name in before and n != before[name]]
    what = ", ".join(sizes) if by.config.kind == block.kind else by.config.kind
    return f"replaced by {what}, trained in the library (block {by.digest[:8]})"
