"""Every seed as a dot: the figure draws the table, also for runs without a value."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from explore.figures import RunFigure, draw_seeds

RUNS = pd.DataFrame(
    {
        "arm": ["a", "a", "a", "b", "b", "c"],
        "easy": [0.9, 0.7, 0.8, 1.0, np.nan, 0.5],
        "hard": [0.3, 0.1, 0.2, np.nan, np.nan, 0.4],
    }
)
NAMES = {"b": "second", "a": "first", "absent": "not there"}


def axes() -> Axes:
    return RunFigure(3.3, 2.0, "seeds", ()).subplots()


def dots(ax: Axes, *, hollow: bool = False) -> dict[int, list[float]]:
    """Values of the dots in each row, from top to bottom."""
    found: dict[int, list[float]] = {}
    for line in ax.lines:
        if line.get_marker() == "o" and (line.get_markerfacecolor() == "white") == hollow:
            for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True):
                found.setdefault(round(float(y)), []).append(float(x))
    return {row: sorted(values) for row, values in found.items()}


def medians(ax: Axes) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for line in ax.lines:
        if line.get_marker() == "None":
            found.setdefault(round(float(np.mean(np.asarray(line.get_ydata())))), []).append(float(line.get_xdata()[0]))
    return found


def test_every_run_is_a_dot_in_the_row_of_its_arm() -> None:
    ax = axes()
    draw_seeds(ax, RUNS, NAMES, {"easy": "4 pairs", "hard": "8 pairs"}, "Accuracy")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["second", "first"]
    assert dots(ax) == {0: [1.0], 1: [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]}
    assert dots(ax, hollow=True) == {}
    assert medians(ax) == {1: [0.8, 0.2]}  # half of the second arm's runs have no value, so its median has none
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["4 pairs", "8 pairs", "median"]


def test_runs_without_a_value_are_hollow_and_count_as_the_largest_in_the_median() -> None:
    ax = axes()
    draw_seeds(ax, RUNS.assign(easy=[300, np.nan, 500, 400, np.nan, 1]), NAMES, {"easy": "a seed"}, "Steps",
               missing=(2000.0, "never"), log=True)  # fmt: skip
    assert dots(ax) == {0: [400.0], 1: [300.0, 500.0]}
    assert dots(ax, hollow=True) == {0: [2000.0], 1: [2000.0]}
    assert medians(ax) == {1: [500.0]}
    low, high = ax.get_xlim()
    assert ax.get_xscale() == "log"
    assert low < 300  # but not as low as the arm that is not drawn
    assert low > 100
    assert high > 2000


@pytest.mark.parametrize("runs", [RUNS.iloc[:0], RUNS[RUNS["arm"] == "c"]])
def test_without_runs_the_axes_say_so(runs: pd.DataFrame) -> None:
    ax = axes()
    draw_seeds(ax, runs, NAMES, {"easy": "a seed"}, "Steps", missing=(2000.0, "never"), log=True)
    assert [text.get_text() for text in ax.texts] == ["no finished runs"]
