"""The `cut` command: cut a trained run into a smaller model."""

from __future__ import annotations

import json
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, note, out
from explore.cli.cut_tables import show_own_plan, show_plan, show_published_cut
from explore.cli.opening import OR_KEY, run_path
from explore.cli.options import (
    Context,
    DataOf,
    DecodeBatch,
    DecodeHardware,
    Json,
    KVDtype,
    StateDtype,
    WeightDtype,
)
from explore.cli.rules import Apart, Needs, Only, refuse_others
from explore.cost import HARDWARE
from explore.formatting import read_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from explore.compress import Cutter, Plan
    from explore.compress.candidates import Candidate
    from explore.compress.zero_shot import Ranked, Validation
    from explore.train.shortlist import Distilled

SEARCH = "--tolerance --score-at-most --best --context --batch-size --hardware --weight-dtype --kv-dtype --state-dtype"
"""Options of a search for children."""
SHOWN = ("params_total", "params_active", "flops_train", "state_bytes")


@app.command(
    rich_help_panel="Compress trained models",
    epilog="Example: explore cut runs/my-run-0123abcd --target params_active=50% --free d_model --free depth",
    rules=(
        Only("--published", takes="RUN --json"),
        Apart("--show", "--json --out --distil-tokens"),
        Apart("--drop-layers", "--drop-layer"),
        Apart("--like", "--keep --drop-layers --drop-layer"),
        Apart("--target", "--keep --drop-layers --drop-layer --like"),
        Needs(f"--free --distil-tokens {SEARCH}", "--target"),
        Needs("--one-by-one", "--drop-layers"),
        Needs("--figure", "--like"),
        Needs("--by", "--keep --drop-layers --like --target"),
        Needs("--principal", "--keep --like --target"),
        Needs("--effect", "--drop-layers --free=depth"),
        Needs("--seed", "--by=random --one-by-one"),
    ),
)
def cut(
    ctx: typer.Context,
    parent: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help=f"A finished {OR_KEY[2:]}; an imported folder with --data; a preset with --like or --published;"
            " a plan with --show.",
        ),
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE=N", help="d_model=96, d_ff=256, M.n_heads=4 or 3.d_ff=64 (layer 3); repeatable."),
    ] = None,
    drop_layers: Annotated[int, typer.Option(min=0, help="Leave out this many layers, least important first.")] = 0,
    one_by_one: Annotated[
        bool,
        typer.Option("--one-by-one", help="Rescore the remaining layers after each layer that --drop-layers removes."),
    ] = False,
    drop_layer: Annotated[
        list[int] | None, typer.Option(min=0, metavar="INDEX", help="Leave out this layer, counted from 0; repeatable.")
    ] = None,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave out multi-token prediction.")] = False,
    like: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Cut to the sizes of this model: a preset, a run, or a model in JSON."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Print the published search that made this preset; write nothing.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET=VALUE",
            help="Search for children that cost this, e.g. params_active=1.5M, or 50% of the parent; repeatable.",
        ),
    ] = None,
    free: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE[=RANGE]", help="What the search may change, e.g. d_model, depth or M.n_heads=2:8:2."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed relative distance from a target (0.01 = 1%).")] = 0.01,
    score_at_most: Annotated[int, typer.Option(min=1, help="Candidates to score on the validation split.")] = 16,
    best: Annotated[int, typer.Option(min=1, help="Candidates to list and to save.")] = 5,
    distil_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Distil the listed candidates on this many tokens and rank them by the resulting loss.",
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="What ranks indices: activation, frequency, magnitude, random or reverse.")
    ] = "activation",
    effect: Annotated[str, typer.Option(help="What ranks layers: mse, kl, loss or influence.")] = "mse",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random ranking.")] = 0,
    norm_scales: Annotated[
        bool, typer.Option("--norm-scales/--no-norm-scales", help="Rescale norms to correct for removed channels.")
    ] = True,
    principal: Annotated[
        bool, typer.Option("--principal", help="Keep principal axes of a latent, not channels.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(help="Scores to use (default: those of explore score).")] = None,
    data: DataOf = None,
    context: Context = None,
    batch_size: DecodeBatch = 1,
    hardware: DecodeHardware = HARDWARE,
    weight_dtype: WeightDtype = "bfloat16",
    kv_dtype: KVDtype = "bfloat16",
    state_dtype: StateDtype = "float32",
    val_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="COUNT", help="Validation tokens to score on (default: as in training)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Where to write the plan (default: in the run's folder).")
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Print the cut of each layer; write no plan. Without sizes, that of a plan or of a child."
        ),
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the share of each layer that --like keeps, as PNG and SVG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Cut a trained run into a smaller model: write the plan, and score the child before any training.

    Give the child's sizes (--keep, --drop-layers, --drop-layer), another model's sizes (--like), or budgets and the
    sizes that may change (--target, --free).
    A search lists every child within the tolerance, scores some of them, and saves the best; --distil-tokens ranks
    these after a short distillation, which is kept in the run's folder.
    """
    from explore.compress import Cutter, Scores
    from explore.compress.measures import Setting, measure, read_budget
    from explore.compress.zero_shot import Validation, spread
    from explore.cost import Dtypes
    from explore.presets import PRESETS

    if not published and parent in PRESETS and not Path(parent).exists():
        refuse_others(ctx, "a preset", "RUN --like --show --figure --json")
    if published or (parent in PRESETS and not Path(parent).exists()):
        show_published_cut(parent, like, published, figure, as_json)
        return
    run = run_path(parent)
    if show and not (keep or drop_layers or drop_layer or drop_mtp or target or like):
        refuse_others(ctx, "--show without sizes", "RUN --show --data")
        if show_own_plan(run):
            return
    sizes = dict(_size(text) for text in keep or [])
    given = None if scores is None else Scores.load(scores)
    how: dict[str, Any] = {"by": by, "effect": effect, "seed": seed, "norm_scales": norm_scales, "principal": principal}
    drop: int | list[int] = drop_layer or drop_layers
    validation = Validation(run, val_tokens, data)
    # Scores take time and are written, so mistakes are looked for first, with an arbitrary ranking.
    unscored = Cutter.of(run, by="random", norm_scales=False, data=data)
    search: Callable[[Cutter], list[Candidate]] | None = None
    found: list[Candidate] = []
    if target or free:
        from explore.compress.candidates import DEPTH, candidates, check_search, free_size

        setting = Setting(
            context or validation.experiment.data.seq_len,
            batch_size,
            Dtypes(weight_dtype, kv_dtype, state_dtype),
            hardware,
        )
        parent_has = partial(measure, model=unscored.model, setting=setting)
        wanted = dict(read_budget("--target", text, parent_has) for text in target or [])
        sizes_free = [free_size(unscored.model, text) for text in free or []]
        search = partial(candidates, targets=wanted, free=sizes_free, setting=setting, tolerance=tolerance)
        check_search(unscored.model, wanted, sizes_free, setting, tolerance)
        if all(size.name != DEPTH for size in sizes_free):  # otherwise the ranking says which layers go
            found = search(unscored)
    elif like is not None:
        _like(unscored, like, drop_mtp=drop_mtp)
    else:
        unscored.plan(sizes, drop, drop_mtp=drop_mtp)
    cutter = Cutter.of(run, **how, scores=given, data=data)
    ranked: list[Ranked] = []
    n_candidates = 0
    if search is not None:
        found = found or search(cutter)
        n_candidates = len(found)
        ranked = validation.rank(cutter, spread(found, score_at_most), drop_mtp=drop_mtp)[:best]
        plan = ranked[0].plan
    elif like is not None:
        plan = _like(cutter, like, drop_mtp=drop_mtp, figure=figure)
    elif one_by_one:
        plan = cutter.one_by_one(run, sizes, drop_layers, effect=effect, seed=seed, data=data, drop_mtp=drop_mtp)
    else:
        plan = cutter.plan(sizes, drop, drop_mtp=drop_mtp)
    if show:
        show_plan(plan)
        return
    paths = [_save(each.plan, run, None) for each in ranked]
    distilled: list[Distilled] = []
    if distil_tokens is not None:
        from explore.train.shortlist import counted, distil_shortlist, order_of

        distilled = distil_shortlist(paths, distil_tokens, run, data)
        order = order_of(distilled)
        ranked = [ranked[i]._replace(plan=counted(ranked[i].plan, distilled)) for i in order]
        distilled = [distilled[i] for i in order]
        plan = ranked[0].plan
        paths = [_save(each.plan, run, None) for each in ranked]
    if output is not None or not paths:
        paths[:1] = [_save(plan, run, output)]
    record = _record(cutter, plan, validation, ranked, paths, n_candidates, distilled)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    _print(record)


def _like(cutter: Cutter, like: str, *, drop_mtp: bool, figure: Path | None = None) -> Plan:
    """The plan that cuts a parent to the sizes of another model; also draws the cut if `figure` is given."""
    from explore.cli.models import load_model
    from explore.compress.alignment import align

    alignment = align(cutter.model, load_model(like))
    plan = cutter.plan(alignment.sizes(), alignment.dropped, drop_mtp=drop_mtp)
    if figure is not None:
        from explore.figures import plot_cut, save_figure

        save_figure(plot_cut(alignment, str(cutter.whole.origin["run"]), Path(like).name), figure)
    return plan


def _save(plan: Plan, run: Path, output: Path | None) -> Path:
    path = output or run / "plans" / f"{plan.key()[:8]}.json"
    plan.save(path)
    return path


def _record(
    cutter: Cutter,
    plan: Plan,
    validation: Validation,
    ranked: list[Ranked],
    paths: list[Path],
    n_candidates: int,
    distilled: list[Distilled],
) -> dict[str, Any]:
    from explore.compress.notes import notes
    from explore.train.shortlist import rankings_agree

    child, seq_len = plan.model(), validation.experiment.data.seq_len
    quality = ranked[0].quality if ranked else validation.zero_shot(cutter.child(plan))
    parent = validation.zero_shot(cutter.child(cutter.whole))
    whole = cutter.model.cost(seq_len)
    cost = child.cost(seq_len)
    return {
        "plan": str(paths[0]),
        "key": plan.key(),
        "parent": plan.parent,
        "config": child.model_dump(mode="json"),
        "cost": {**cost.to_dict(), "state_bytes": cost.state_bytes},
        "parent_cost": {**whole.to_dict(), "state_bytes": whole.state_bytes},
        "n_candidates": n_candidates,
        "candidates": [
            {
                "plan": str(path),
                "sizes": dict(each.candidate.sizes),
                "pattern": each.plan.model().pattern,
                "costs": dict(each.candidate.values),
                **each.quality._asdict(),
                **({} if after is None else {"distilled": {**after._asdict(), "run": str(after.run)}}),
            }
            for path, each, after in zip_longest(paths[: len(ranked)], ranked, distilled)
        ],
        "kendall_tau": rankings_agree([each.quality.val_loss for each in ranked], [d.val_loss for d in distilled])
        if distilled
        else None,
        "flops": plan.flops,
        "notes": notes(plan, is_recall=validation.experiment.data.kind == "recall"),
        "zero_shot": {**quality._asdict(), "parent_val_loss": parent.val_loss, "parent_val_bpb": parent.val_bpb},
    }


def _print(record: dict[str, Any]) -> None:
    from explore.quantities import quantity

    if record["candidates"]:
        first = record["candidates"][0]
        after = ["rank", "distilled", "rank"] if "distilled" in first else []
        names = (*first["sizes"], *first["costs"], "val loss", *after)
        view = Table(*names, box=None, padding=(0, 2, 0, 0), header_style="dim")
        losses = sorted(each["val_loss"] for each in record["candidates"])
        for i, each in enumerate(record["candidates"]):
            costs = (quantity(name).text(value) for name, value in each["costs"].items())
            texts = [f"{each['val_loss']:.4f}"]
            if after:
                loss = each["distilled"]["val_loss"]
                shown = "diverged" if loss is None else f"{loss:.4f}"
                texts += [str(losses.index(each["val_loss"]) + 1), shown, str(i + 1)]
            view.add_row(*map(str, each["sizes"].values()), *costs, *texts)
        out.print(f"{record['n_candidates']} children meet the targets; best of those scored:")
        out.print(view, highlight=False)
        if record["kendall_tau"] is not None:
            out.print(
                f"Kendall's tau between the rankings before and after the distillation: {record['kendall_tau']:.2f}",
                highlight=False,
            )
    table = Table("", "parent", "child", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in SHOWN:
        text = quantity(name).text
        table.add_row(name, text(record["parent_cost"][name]), text(record["cost"][name]))
    quality = record["zero_shot"]
    for name in ("val_loss", "val_bpb"):
        if quality[name] is not None:
            table.add_row(f"{name}, not trained further", f"{quality[f'parent_{name}']:.4f}", f"{quality[name]:.4f}")
    out.print(table, highlight=False)
    for text in record["notes"]:
        note(text)
    out.print(f"{record['config']['pattern']}, plan: {record['plan']}", highlight=False, markup=False)


def _size(text: str) -> tuple[str, int]:
    """Reads `d_model=96`."""
    name, _, value = text.partition("=")
    try:
        number = read_count(value)
    except ValueError:
        number = -1
    if not name or number < 0 or number != int(number):
        raise ValueError(f"--keep must be of the form SIZE=N, such as d_model=96, got {text!r}")
    return name, int(number)
