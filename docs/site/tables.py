"""Tables of pages, each made from what the code declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

import explore
from explore.blocks import BLOCKS
from explore.cost import CONVENTIONS
from explore.data import CORPORA
from explore.formatting import count, flops
from explore.number_formats import FORMATS
from explore.precision import RECIPES
from explore.presets import PRESETS, preset, published_table
from explore.quantities import QUANTITIES, Family, Quantity, objectives
from explore.roofline import GPUS
from explore.search.samplers import DEFAULT_SAMPLER, SAMPLERS
from explore.solve import BUDGETS
from explore.train.objectives import OBJECTIVES

GIB = 2**30
ROOT = Path(__file__).parents[2]


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """A Markdown table; columns named in `right` are aligned to the right."""
    rule = ["---:" if name in right else "---" for name in header]
    lines = [header, rule, *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def letters() -> str:
    rows = []
    for kind in BLOCKS:
        fields = [f"`{name}`" for name in kind.config.model_fields if name != "kind"]
        state = type(kind.example.new_state()).__name__
        keeps = {"State": "nothing"}.get(state, f"`{state}`")
        rows.append((f"`{kind.letter}`", kind.config.label, kind.config.role, keeps, ", ".join(fields)))
    return table(("letter", "block", "role", "decoding state", "fields"), rows)


def axes() -> str:
    rows = [
        (f"`{kind.letter}`", kind.config.label, ", ".join(f"`{axis.name}`" for axis in kind.example.axes()) or "none")
        for kind in BLOCKS
    ]
    return table(("letter", "block", "sizes that can be cut"), rows)


def _declared() -> Iterable[tuple[str, Quantity]]:
    for each in QUANTITIES.values():
        template = each.template if isinstance(each, Family) else each
        yield template.name.replace("{}", "NAME"), template


def quantities() -> str:
    parts = []
    words = {
        "about": "Which run it is", "setting": "Settings", "cost": "Costs, known before training",
        "loss": "Losses", "score": "Other scores", "training": "How training went",
    }  # fmt: skip
    for role, title in words.items():
        rows = [
            (f"`{name}`", each.label, each.unit, {"lower": "lower", "higher": "higher"}.get(each.better or "", ""))
            for name, each in _declared()
            if each.role == role
        ]
        parts.append(f"## {title}\n\n" + table(("name", "meaning", "unit", "better"), rows))
    return "\n".join(parts)


def budgets() -> str:
    known = dict(_declared())
    return table(
        ("budget", "meaning", "unit"), [(f"`{each}`", known[each].label, known[each].unit) for each in BUDGETS]
    )


def sweep_objectives() -> str:
    return ", ".join(f"`{name}`" for name in objectives()) + "\n"


def presets() -> str:
    rows = []
    for name, entry in PRESETS.items():
        model, cost = preset(name), preset(name).cost(4096)
        rows.append((f"`{name}`", model.family, count(cost.params_total), count(cost.params_active), entry.source))
    return table(("preset", "family", "parameters", "active", "source"), rows, right=("parameters", "active"))


def parent_to_child() -> str:
    arms = pd.read_csv(ROOT / "sweeps" / "records" / "parent_to_child.csv")
    rows = [
        (
            arm.arm, arm.layers, arm.d_model, count(arm.params_active), f"{arm.val_bpb:.4f}", f"{arm.test_bpb:.4f}",
            *("" if pd.isna(each) else flops(each) for each in (arm.flops_run, arm.flops_teacher, arm.flops_before)),
        )
        for arm in arms.itertuples()
    ]  # fmt: skip
    header = ("arm", "layers", "d_model", "active", "val bpb", "test bpb", "FLOPs", "teacher", "before")
    return table(header, rows, right=header[1:])


def published() -> str:
    rows = []
    for row in published_table():
        meaning = row["quantity"].removeprefix("params_").replace("_", " ").replace(" no ", ", no ")
        printed = f"{float(row['published']):g}" if "e" in row["published"] else row["published"]
        rows.append((row["preset"], meaning, printed, f"{row['computed']:.3f}"))
    return table(("preset", "count", "published", "computed"), rows, right=("published", "computed"))


def hardware() -> str:
    rows = []
    for name, gpu in GPUS.items():
        peaks = ", ".join(f"{dtype} {rate / 1e12:,.0f}" for dtype, rate in gpu.flops_per_s.items())
        memory = f"{(gpu.usable_bytes or gpu.memory_bytes) / GIB:.1f}"
        rows.append((f"`{name}`", peaks, memory, f"{gpu.bandwidth / 1e12:.2f}", gpu.domain_size, gpu.source))
    header = ("GPU", "peak TFLOP/s", "usable GiB", "TB/s", "domain", "source")
    return table(header, rows, right=("usable GiB", "TB/s", "domain"))


def recipes() -> str:
    rows = [
        (f"`{name}`", "training" if each.trains else "after training", each.source) for name, each in RECIPES.items()
    ]
    return table(("recipe", "for", "source"), rows)


def number_formats() -> str:
    rows = [
        (f"`{name}`", each.element, each.scaling, each.block or "", f"{each.bits_per_element:g}")
        for name, each in FORMATS.items()
    ]
    header = ("format", "element", "scale", "elements a scale", "bits a weight")
    return table(header, rows, right=("elements a scale", "bits a weight"))


def conventions() -> str:
    return table(
        ("convention", "what it counts", "source"),
        [(f"`{name}`", each.summary, each.source) for name, each in CONVENTIONS.items()],
    )


def corpora() -> str:
    rows = [
        (f"`{name}`", each.source, each.licence, "yes" if each.folder else "under `EXPLORE_DATA`")
        for name, each in CORPORA.items()
    ]
    return table(("corpus", "text", "licence", "shipped"), rows)


def samplers() -> str:
    return ", ".join(f"`{name}`" + (" (default)" if name == DEFAULT_SAMPLER else "") for name in SAMPLERS) + "\n"


def training_objectives() -> str:
    return ", ".join(f"`{name}`" for name in OBJECTIVES) + "\n"


TABLES: Mapping[str, Callable[[], str]] = {
    "letters": letters,
    "axes": axes,
    "quantities": quantities,
    "budgets": budgets,
    "sweep-objectives": sweep_objectives,
    "presets": presets,
    "published": published,
    "hardware": hardware,
    "recipes": recipes,
    "formats": number_formats,
    "conventions": conventions,
    "corpora": corpora,
    "samplers": samplers,
    "training-objectives": training_objectives,
    "parent-to-child": parent_to_child,
}


ALSO = ("train.LoadedRun", "roofline.costs_table")
"""What the page of Python has besides: what `explore.load` returns, and the table of `explore cost --patterns`."""


def python_page() -> str:
    """The page of all that `explore` exports."""
    lines = [
        "# Python",
        "",
        "`import explore` is quick: each name below is imported when it is first used.",
        "",
    ]
    lines += [f"::: explore.{name}\n" for name in explore.__all__ if name != "__version__"]
    lines += [f"::: explore.{name}\n" for name in ALSO]
    return "\n".join(lines)
