"""An interactive figure of the frontier of runs, in JupyterLab or as one HTML file for any browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from explore.blocks import STANDARD_LETTERS
from explore.cost import MTP_LETTER
from explore.figures import family_styles
from explore.figures.runs import named
from explore.files import replacing
from explore.foreign import check_type
from explore.formatting.html import paint
from explore.frontier.columns import check_columns
from explore.frontier.intervals import t_quantile
from explore.frontier.repeats import repeats
from explore.model.display import letter_paints
from explore.quantities import EVAL_DATA, PARENTS, Quantity, choose, columns, headlines, quantity
from explore.runs import RunFolder, find_runs, resolve_run
from explore.table import load_runs
from explore.workbench.widget import Workbench

_FOLDER = Path(__file__).parent
SCRIPTS = ("kit.js", "scales.js", "frontier.js")
LEVEL = 0.95
"""Confidence of the intervals of means over seeds."""
POINT = ("family", "pattern", *PARENTS, "corpus", EVAL_DATA, "tokens", "flops_run")
"""Columns that distinguish points, together with all settings known before training except the seed."""
KINDS = {"loss": "Quality", "score": "Quality", "cost": "Cost", "setting": "Setting", "training": "Training"}
"""Headings in the menu of quantities, by role."""
UNDECLARED = "Other"
"""Heading of numeric columns that `explore.quantities` does not declare."""


def frontier_data(runs: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb") -> dict[str, Any]:
    """Returns the data of an interactive frontier, as JSON.

    Args:
        runs: a table from `load_runs`, or any with two columns of numbers; if it has a column `status`, only finished
            runs are shown, and if it has no `run`, rows are named by their index.
        x: initial quantity of the horizontal axis.
        y: initial quantity of the vertical axis.

    Returns:
        `axes`: for each quantity that some run has, its label, unit, kind, whether lower or higher is better, whether
        its axis is logarithmic, and `half`: half the interval of a single run, from the spread between seeds of equal
        points;
        `rows`: one record per run;
        `families` and `letters`: their colours;
        `shown`: names of the main quantities; `level`: confidence of the intervals; `start`: the initial axes.

    Raises:
        TypeError: `runs` is not a table.
        ValueError: a column is missing, or no finished run has both quantities.
    """
    check_type(runs, pd.DataFrame, "runs must be a table, as explore.load_runs gives it")
    runs = _with_names(runs)
    axes = _axes(runs)
    x, y = _chosen(runs, axes, x, y)
    if not (_numbers(runs[x]).notna() & _numbers(runs[y]).notna()).any():
        raise ValueError(f"x, y: a finished run must have both {x} and {y}, got none among {len(runs)} runs")
    points = _points(runs)
    return {
        "start": {"x": x, "y": y},
        "axes": {name: _axis(each, runs, points, x) for name, each in axes.items()},
        "shown": [each.name for each in headlines(runs.columns) if each.name in axes],
        "rows": _rows(runs, list(axes), points),
        "families": {
            name: {"color": paint(style.color).color, "marker": style.marker}
            for name, style in family_styles(runs["family"].astype("str").fillna("other")).items()
        },
        "letters": {
            letter: {**style._asdict(), "name": STANDARD_LETTERS[letter].label if letter in STANDARD_LETTERS else "MTP"}
            for letter, style in letter_paints({}).items()
            if letter in STANDARD_LETTERS or letter == MTP_LETTER
        },
        "level": LEVEL,
    }


def save_frontier(runs: pd.DataFrame, path: str | Path, x: str = "flops_run", y: str = "val_bpb") -> Path:
    """Writes an interactive frontier as one file that a browser opens without a network and without Python.

    Args:
        path: path of the file; it must end in .html.

    Raises:
        ValueError: the path has another suffix, or `frontier_data` rejects the runs.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    text = frontier_page(frontier_data(runs, x, y))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def frontier_page(data: Mapping[str, Any]) -> str:
    """Returns an HTML page that shows a frontier. Its security policy forbids loading anything outside the file."""
    content = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = f"{quantity(data['start']['y']).label} of {len(data['rows'])} runs"
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_style(page=True)}</style>\n</head>\n"
        '<body class="fr-page">\n<main id="frontier"></main>\n'
        f'<script type="application/json" id="data">{content}</script>\n'
        f'<script type="module">\n{_script()}\nshowPage();\n</script>\n</body>\n</html>\n'
    )


class Frontier(anywidget.AnyWidget):
    """The frontier of runs in JupyterLab, with any quantity on either axis and details of every run.

    Examples:
        >>> view = Frontier("runs/demo")  # doctest: +SKIP
        >>> view.run  # the run that was clicked  # doctest: +SKIP

    Attributes:
        data: the data shown, from `frontier_data`.
        selected: names of the clicked runs, the last one first.
        ask: request of the browser to open the selected runs in a workbench.
        bench: name, in the browser, of the model of the workbench below the figure; or an error.
    """

    _esm = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS) + "\nexport default { render };"
    _css = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("frontier.css",))
    data = traitlets.Dict().tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    ask = traitlets.Dict().tag(sync=True)
    bench = traitlets.Dict().tag(sync=True)

    def __init__(
        self, runs: pd.DataFrame | str | Path, *more: str | Path, x: str = "flops_run", y: str = "val_bpb"
    ) -> None:
        """Shows runs.

        Args:
            runs: a table from `load_runs`, whose runs are opened from the folder `runs`; or a folder of runs; or the
                path of a table of records.
            more: further folders.
            x: initial quantity of the horizontal axis.
            y: initial quantity of the vertical axis.

        Raises:
            TypeError: `runs` is neither a table nor a folder.
            ValueError: a folder does not exist or has no runs, or no finished run has both quantities.
        """
        super().__init__()
        check_type(runs, (pd.DataFrame, str, Path), "runs must be a table of runs, or a folder that holds runs")
        self._roots = () if isinstance(runs, pd.DataFrame) else (runs, *more)
        self._workbench: Workbench | None = None
        self.data = frontier_data(runs if isinstance(runs, pd.DataFrame) else load_runs(*self._roots), x, y)

    @property
    def run(self) -> RunFolder | None:
        """The run that was clicked last; None if no run was clicked.

        Raises:
            ValueError: its folder does not exist.
        """
        return self._open(self.selected[0]) if self.selected else None

    def workbench(self) -> Workbench:
        """Returns a workbench with the run that was clicked last. If two are selected, it compares them.

        Raises:
            ValueError: no run was clicked, or its folder does not exist.
        """
        if not self.selected:
            raise ValueError("run: click a run first; shift-click a second one to compare them")
        opened = [self._open(name) for name in self.selected[:2]]
        return Workbench(opened[0], against=opened[1] if len(opened) > 1 else None)

    def save(self, path: str | Path) -> Path:
        """Writes the frontier as one file that a browser opens without a network and without Python.

        Raises:
            ValueError: the path does not end in .html.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"path must end in .html, got {str(path)!r}")
        with replacing(path) as temporary:
            temporary.write_text(frontier_page(self.data), encoding="utf-8")
        return path

    def _open(self, name: str) -> RunFolder:
        if not self._roots:
            return resolve_run(name)
        return next(run for run in find_runs(*self._roots) if run.path.resolve().name == name)

    @traitlets.observe("ask")
    def _asked(self, change: Mapping[str, Any]) -> None:
        try:
            self._workbench = self.workbench()
        except ValueError as error:
            self.bench = {"n": change["new"].get("n", 0), "error": str(error)}
        else:
            self.bench = {"n": change["new"].get("n", 0), "model": self._workbench.model_id}


def _script() -> str:
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)


def _style(*, page: bool) -> str:
    names = ("frontier.css", "page.css") if page else ("frontier.css",)
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def _with_names(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs, with the columns run, family and pattern."""
    missing = {"family": "other", "pattern": ""}
    shown = named(runs).rename(columns=str)
    if "run" not in runs:
        shown = shown.assign(run=shown["run"].map(str))
    return shown.reset_index(drop=True).assign(**{name: value for name, value in missing.items() if name not in runs})


def _axes(runs: pd.DataFrame) -> dict[str, Quantity]:
    """Quantities that some run has as numbers, quality first and undeclared ones last."""
    declared = columns(runs.columns)
    found = [each for each in declared if each.is_number and each.name in runs and each.role in KINDS]
    rest = runs.drop(columns=[each.name for each in declared], errors="ignore").select_dtypes("number")
    found += [quantity(name) for name in rest.columns]
    order = [*dict.fromkeys(KINDS.values()), UNDECLARED]
    some = [each for each in found if _numbers(runs[each.name]).notna().any()]
    return {each.name: each for each in sorted(some, key=lambda each: order.index(_kind(each)))}


def _kind(each: Quantity) -> str:
    """The heading of a quantity in the menu."""
    return UNDECLARED if each == Quantity(each.name, each.name, log=None) else KINDS[each.role]


def _chosen(runs: pd.DataFrame, axes: Mapping[str, Quantity], x: str, y: str) -> tuple[str, str]:
    """The names of both axes; if neither is a column, one error names both."""
    words = [sorted(name.split("_")) for name in (x, y)]
    if not any(sorted(str(each).split("_")) in words for each in runs.columns):
        check_columns(runs, (x, y), "runs")
    return choose(x, axes, "x"), choose(y, axes, "y")


def _axis(each: Quantity, runs: pd.DataFrame, points: pd.Series[int], x: str) -> dict[str, Any]:
    return {
        "label": each.label,
        "unit": each.unit,
        "kind": _kind(each),
        "sign": each.sign,
        "better": each.better or "",
        "log": each.name == x if each.log is None else each.log,
        "own": each.is_on_own_data,
        "half": _half_widths(runs, each.name, points),
    }


def _half_widths(runs: pd.DataFrame, name: str, points: pd.Series[int]) -> list[float | None]:
    """Half the interval of one run at each point, from the spread between seeds as a function of the training FLOPs.

    The list is empty if no point was repeated; the width is None if it cannot be estimated.
    """
    flops = _numbers(runs["flops_run"]) if "flops_run" in runs else pd.Series(1.0, index=runs.index)
    table = pd.DataFrame({"point": points, "cost": flops, "error": _numbers(runs[name])})
    if not table.notna().all(axis=1).any():
        return []
    found = repeats(table, ["point"], "cost", "error")
    if found.spread is None:
        return []
    sd, dof = found.spread.sd, found.spread.dof
    widths: list[float | None] = [None] * (int(points.max()) + 1)
    for i, point in enumerate(found.table["point"]):
        if sd[i] > 0 and math.isfinite(dof[i]):
            widths[int(point)] = t_quantile(float(dof[i]), LEVEL) * float(sd[i])
    return widths


def _points(runs: pd.DataFrame) -> pd.Series[int]:
    """Index of the point of every run. Runs of one point differ only in their seed; without seeds each is a point."""
    settings = [each.name for each in columns(runs.columns) if each.is_known and each.name != "seed"]
    by = [name for name in dict.fromkeys([*POINT, *settings]) if name in runs]
    if "seed" not in runs:
        return pd.Series(range(len(runs)), index=runs.index)
    groups = runs[by].astype("str").fillna("").groupby(by, sort=False, dropna=False)
    return groups.ngroup()


def _rows(runs: pd.DataFrame, axes: Iterable[str], points: pd.Series[int]) -> list[dict[str, Any]]:
    names = list(axes)
    values = np.column_stack([_numbers(runs[name]).to_numpy(np.float64) for name in names])
    texts = {name: _texts(runs, name) for name in ("run", "key", "family", "pattern", "corpus", EVAL_DATA, *PARENTS)}
    seeds = _numbers(runs["seed"]) if "seed" in runs else pd.Series(math.nan, index=runs.index)
    present = set(texts["run"])
    rows = []
    for i, row in enumerate(values):
        parents = {name: texts[name][i] for name in PARENTS if texts[name][i] in present and texts[name][i]}
        rows.append(
            {
                "run": texts["run"][i],
                "key": texts["key"][i][:8],
                "family": texts["family"][i] or "other",
                "pattern": texts["pattern"][i],
                "data": texts["corpus"][i] or texts[EVAL_DATA][i] or "",
                "seed": None if math.isnan(seeds.iloc[i]) else int(seeds.iloc[i]),
                "point": int(points.iloc[i]),
                "parents": parents,
                "values": {name: float(value) for name, value in zip(names, row, strict=True) if math.isfinite(value)},
            }
        )
    return rows


def _texts(runs: pd.DataFrame, name: str) -> list[str]:
    if name not in runs:
        return [""] * len(runs)
    return [value if isinstance(value, str) else "" for value in runs[name].tolist()]


def _numbers(column: pd.Series[Any]) -> pd.Series[float]:
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    return values.where(np.isfinite(values))
