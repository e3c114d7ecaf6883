import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore.frontier import hypervolume, pareto_front

value = st.one_of(st.integers(1, 6).map(float), st.floats(0.5, 1e13), st.just(float("nan")))
points = st.lists(st.tuples(value, value), max_size=30)


def table(rows):
    return pd.DataFrame(rows, columns=["flops_run", "val_bpb"], dtype=float)


def beaten(i, rows):
    """Whether another row is at least as good in both values and better in one: the definition."""
    (x, y), others = rows[i], [row for j, row in enumerate(rows) if j != i]
    return any(a <= x and b <= y and (a < x or b < y) for a, b in others)


@given(points)
def test_the_front_has_the_points_that_no_other_dominates(rows):
    expected = [bool(np.isfinite(row).all()) and not beaten(i, rows) for i, row in enumerate(rows)]
    assert pareto_front(table(rows)).tolist() == expected


def test_equal_points_are_both_on_the_front_and_ties_in_one_value_are_not():
    rows = [(1.0, 3.0), (1.0, 3.0), (1.0, 4.0), (2.0, 3.0), (2.0, 2.0)]
    assert pareto_front(table(rows)).tolist() == [True, True, False, False, True]


def test_missing_and_infinite_values_are_never_on_the_front_and_beat_nothing():
    rows = [(np.nan, 0.0), (0.0, np.nan), (-np.inf, 0.0), (1.0, np.inf), (5.0, 5.0)]
    assert pareto_front(table(rows)).tolist() == [False, False, False, False, True]


def test_the_front_keeps_the_index_of_its_table_and_takes_any_columns():
    runs = pd.DataFrame({"params": pd.array([2, None, 1], "Int64"), "loss": [1.0, 0.0, 2.0]}, index=["a", "b", "b"])
    front = pareto_front(runs, "params", "loss")
    assert front.name == "on_front"
    assert front.dtype == bool
    assert list(front.items()) == [("a", True), ("b", False), ("b", True)]


def test_an_empty_table_has_an_empty_front_and_no_hypervolume():
    assert pareto_front(table([])).tolist() == []
    assert hypervolume(table([]), (10.0, 3.0)) == 0.0


def test_all_missing_columns_are_named():
    message = "table must have the columns 'cost' and 'test_bpb', got none named 'cost' and 'test_bpb'; its columns: "
    for function in (pareto_front, lambda *args: hypervolume(args[0], (10.0, 3.0), *args[1:])):
        with pytest.raises(ValueError, match=f"^{message}flops_run, val_bpb$"):
            function(table([]), "cost", "test_bpb")


def test_hypervolume_of_a_staircase_equals_the_hand_count():
    rows = [(1e12, 3.0), (1e13, 2.0), (1e13, 2.5)]
    assert hypervolume(table(rows), (1e15, 4.0)) == pytest.approx(1 * 1.0 + 2 * 2.0)


grid_point = st.tuples(st.integers(0, 8).map(lambda decade: 10.0**decade), st.integers(0, 8).map(float))


@given(st.lists(grid_point, max_size=12), st.integers(1, 8), st.integers(1, 8))
def test_hypervolume_is_the_number_of_unit_cells_that_some_point_reaches(rows, decades, error):
    cells = sum(
        any(np.log10(x) <= i and y <= j for x, y in rows) for i in range(decades) for j in range(error)
    )  # cell (i, j) spans to (i + 1, j + 1)
    assert hypervolume(table(rows), (10.0**decades, float(error))) == pytest.approx(cells)


@given(st.lists(st.tuples(st.floats(1.0, 1e6), st.floats(0.1, 5.0)), min_size=1, max_size=15))
def test_a_tenth_of_the_cost_everywhere_gains_a_decade_of_the_height(rows):
    runs, reference = table(rows), (1e9, 6.0)
    cheaper = runs.assign(flops_run=runs["flops_run"] / 10)
    gain = hypervolume(cheaper, reference) - hypervolume(runs, reference)
    assert gain == pytest.approx(6.0 - runs["val_bpb"].min())


def test_a_cost_without_a_logarithm_is_refused():
    with pytest.raises(ValueError, match="flops_run: must be positive on a log axis, got 0"):
        hypervolume(table([(0.0, 1.0)]), (10.0, 3.0))
    with pytest.raises(ValueError, match="reference: must be finite with a positive flops_run"):
        hypervolume(table([(1.0, 1.0)]), (0.0, 3.0))


def test_each_data_set_has_its_own_front() -> None:
    runs = table([(1, 3), (2, 2), (1, 9), (2, 10), (3, 1)]).assign(eval_data=["a", "a", "b", "b", None])
    assert pareto_front(runs).tolist() == [True, True, True, False, True]
    assert pareto_front(runs.drop(columns="eval_data")).tolist() == [True, True, False, False, True]
    named = runs.rename(columns={"val_bpb": "sotu_bpb"})
    assert pareto_front(named, error="sotu_bpb").tolist() == [True, True, False, False, True]
