"""The W&B pages of a sweep, a workspace and a report, as wandb-workspaces objects and as a script.

`build_workspace` and `build_report` are copied into the script word for word, so they use no names of this module.
Frontiers never group runs: W&B would show one point, the mean, for every group.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from explore.quantities import METRICS, quantity

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

NEEDS = "the package wandb-workspaces is missing: pip install 'hybrid-frontier[wandb]'"


@dataclass(frozen=True)
class Pages:
    """Content of the W&B pages of a sweep.

    Attributes:
        name: title of both pages.
        group: study whose runs are shown; None: all runs of the project.
        question: question of the sweep, in Markdown.
        quality: run summary on the vertical axis of the frontier.
        costs: run summaries on the horizontal axes; the report uses the first.
        table: runs on the front, in Markdown.
        notes: lines below the table.
        colors: hexadecimal colour by run id.
        entity: account or team; empty: the user's account.
    """

    name: str
    project: str
    group: str | None = None
    question: str = ""
    quality: str = "val_bpb"
    costs: Sequence[str] = ("flops_run", "params_active")
    table: str = ""
    notes: Sequence[str] = ()
    colors: Mapping[str, str] = field(default_factory=dict)
    entity: str = ""

    @property
    def _arguments(self) -> dict[str, Any]:
        """Arguments of both builders: the attributes, and labels and directions of the quantities."""
        plain = {"costs": list(self.costs), "notes": list(self.notes), "colors": dict(self.colors)}
        declared = {
            "labels": {name: quantity(name).axis_label for name in (self.quality, *self.costs, *METRICS)},
            "higher_is_better": quantity(self.quality).better == "higher",
        }
        return {**self.__dict__, **plain, **declared}

    def specs(self) -> dict[str, Any]:
        """The specifications that would be sent to the server, under `workspace` and `report`.

        Raises:
            ValueError: wandb-workspaces is missing.
        """
        _check_installed()
        built = {"workspace": build_workspace(**self._arguments), "report": build_report(**self._arguments)}
        return {
            name: page._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
            for name, page in built.items()
        }

    def script(self) -> str:
        """A Python script that builds and saves both pages; it needs only wandb-workspaces."""
        sources = [inspect.getsource(inspect.unwrap(build)) for build in (build_workspace, build_report)]
        page = "\n".join(f"    {name!r}: {value!r}," for name, value in self._arguments.items())
        title = json.dumps(self.name)  # on one line, and without quotes that would end the docstring
        return SCRIPT.format(title=title, page=page, sources="\n\n".join(sources))

    def save(self) -> tuple[str, str]:
        """Saves both pages on the server, as new pages.

        Returns:
            Their URLs.

        Raises:
            ValueError: wandb-workspaces or a login is missing.
        """
        _check_installed()
        import wandb

        try:
            entity = self.entity or str(wandb.Api().default_entity)
        except wandb.errors.UsageError:
            raise ValueError("not logged in to Weights & Biases; `wandb login` or WANDB_API_KEY is needed") from None
        arguments = {**self._arguments, "entity": entity}
        return str(build_workspace(**arguments).save().url), str(build_report(**arguments).save().url)


def build_workspace(
    name: str,
    project: str,
    entity: str,
    group: str | None,
    quality: str,
    higher_is_better: bool,
    costs: list[str],
    labels: dict[str, str],
    colors: dict[str, str],
    **of_report: Any,
) -> ws.Workspace:
    """The workspace: frontiers, learning curves, throughput and the balance of experts."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    step, by_family = "trainer/global_step", wr.Config("family")

    def curve(metric: str) -> wr.LinePlot:
        return wr.LinePlot(title=labels[metric], x=step, y=[metric], max_runs_to_show=100)

    def frontier(cost: str) -> wr.ScatterPlot:
        x, y = wr.SummaryMetric(cost), wr.SummaryMetric(quality)
        return wr.ScatterPlot(title=f"{labels[quality]} against {labels[cost]}", x=x, y=y, log_x=True)

    best = wr.BarPlot(
        title=f"{labels[quality]}, best of a family",
        metrics=[wr.SummaryMetric(quality)],
        groupby=by_family,
        groupby_aggfunc="max" if higher_is_better else "min",
    )
    speed = wr.BarPlot(
        title=f"{labels['tokens_per_s']}, median of a family",
        metrics=[wr.SummaryMetric("tokens_per_s")],
        groupby=by_family,
        groupby_aggfunc="median",
        groupby_rangefunc="minmax",
    )
    published = wr.MediaBrowser(title="the frontier as a figure", media_keys=["frontier"])
    sections = {
        "Frontier": [*map(frontier, costs), best, published],
        "Learning curves": [
            curve("val_bpb"),
            curve("loss"),
            curve("lr"),
            curve("grad_norm"),
        ],
        "Throughput": [speed, curve("tokens_per_s")],
        "Balance of experts": [curve("max_violation"), curve("aux_loss")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if group is None else f"Metric('Group') == {group!r}",
            order=[ws.Ordering(ws.Summary(quality), ascending=not higher_is_better)],
            pinned_columns=["run:displayName", "config:family", *(f"summary:{column}" for column in (quality, *costs))],
            run_settings={run: ws.RunSettings(color=color) for run, color in colors.items()},
        ),
    )


def build_report(
    name: str,
    project: str,
    entity: str,
    group: str | None,
    question: str,
    quality: str,
    costs: list[str],
    labels: dict[str, str],
    table: str,
    notes: list[str],
    colors: dict[str, str],
    **of_workspace: Any,
) -> wr.Report:
    """The report: the question, the frontier, families beside each other, the runs on the front, and notes."""
    import wandb_workspaces.reports.v2 as wr

    def runs(title: str, kind: str, **more: Any) -> wr.Runset:
        of_group = "" if group is None else f"Metric('Group') == {group!r} and "
        return wr.Runset(name=title, filters=f"{of_group}Metric('JobType') == {kind!r}", **more)

    frontier = wr.ScatterPlot(
        title=f"{labels[quality]} against {labels[costs[0]]}",
        x=wr.SummaryMetric(costs[0]),
        y=wr.SummaryMetric(quality),
        log_x=True,
        layout=wr.Layout(w=24, h=12),
    )
    coloured = {run: wr.RunSettings(color=color) for run, color in colors.items()}
    published = [
        wr.MediaBrowser(title="the frontier as a figure", media_keys=["frontier"], layout=wr.Layout(w=24, h=12)),
        wr.WeavePanelSummaryTable(table_name="runs", layout=wr.Layout(w=24, h=12)),
    ]
    curves = wr.LinePlot(
        title=f"{labels['val_bpb']}, mean and range of a family",
        x="trainer/global_step",
        y=["val_bpb"],
        layout=wr.Layout(w=24, h=10),
    )
    return wr.Report(
        project=project,
        entity=entity,
        title=name[:128],
        description=question.strip().split("\n")[0],
        width="fluid",
        blocks=[
            wr.H1("Question"),
            wr.MarkdownBlock(question.strip()) if question.strip() else wr.P(name),
            wr.H1("Frontier"),
            wr.PanelGrid(runsets=[runs("trials", "trial", run_settings=coloured)], panels=[frontier]),
            wr.H1("Runs on the front"),
            wr.MarkdownBlock(table or "There are none yet."),
            wr.PanelGrid(runsets=[runs("sweep", "sweep")], panels=published),
            wr.H1("Learning curves of the families"),
            wr.PanelGrid(runsets=[runs("families", "trial", groupby=["config.family"])], panels=[curves]),
            wr.H1("Notes"),
            wr.MarkdownBlock("\n".join(f"- {note}" for note in notes)),
        ],
    )


SCRIPT = '''"""The workspace and the report of {title} in Weights & Biases, as code.

Needs wandb-workspaces and a login. Change it and run it: it saves both pages as new ones.
"""

from __future__ import annotations

from typing import Any

PAGE = {{
{page}
}}


{sources}

if __name__ == "__main__":
    import wandb

    page = {{**PAGE, "entity": PAGE["entity"] or wandb.Api().default_entity}}
    print(build_workspace(**page).save().url)
    print(build_report(**page).save().url)
'''


def _check_installed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, by its import
        try:
            import wandb_workspaces.workspaces  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError(NEEDS) from None
