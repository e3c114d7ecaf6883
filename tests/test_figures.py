import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from explore.figures import (
    COLUMN_HEIGHT,
    COLUMN_WIDTH,
    FAMILIES,
    bits_table,
    curves_table,
    draw_frontier,
    family_styles,
    frontier_table,
    plot_curves,
    plot_frontier,
    save_figure,
)
from explore.figures.labels import point_labels
from explore.frontier import seed_means
from explore.pattern import families
from explore.quantities import PARENTS

ATTENTION, MAMBA, MOE, LATENT = FAMILIES[:4]
ROWS = [
    ("r0", ATTENTION, "*-*-", 1e13, 2.6, 0.3, "finished"),
    ("r1", MAMBA, "M-M*M-", 2e12, 2.7, 0.5, "finished"),
    ("r2", LATENT, "MEM*ME", 1e13, 2.4, 0.9, "finished"),
    ("r3", MOE, "MEME*E", 1.1e13, 2.39, 0.6, "finished"),
    ("r4", MOE, "EMEM", np.nan, 2.0, 0.9, "finished"),
    ("r5", MOE, "MMMM", 1e12, np.nan, 0.9, "diverged"),
    ("r6", MAMBA, "M-", 1e11, 2.1, np.nan, "unfinished"),
]
COLUMNS = ["run", "family", "pattern", "flops_run", "val_bpb", "recall", "status"]


@pytest.fixture
def runs():
    return pd.DataFrame(ROWS, columns=COLUMNS)


@pytest.fixture
def crowd():
    """Sixteen runs of four families, several of them close to one another."""
    random = np.random.default_rng(0)
    families = np.repeat([ATTENTION, MAMBA, MOE, LATENT], 4)
    flops = 10 ** random.uniform(12.7, 13.5, 16)
    bpb = 2.1 + 0.35 * (5e12 / flops) ** 0.35 + 0.02 * np.repeat([3, 2, 1, 0], 4) + random.normal(0, 0.02, 16)
    patterns = random.choice(["MEM*ME", "M-M*M-M-", "ME*EMEME*E", "*-*-"], 16)
    return pd.DataFrame(
        {
            "run": [f"r{i}" for i in range(16)],
            "family": families,
            "pattern": patterns,
            "flops_run": flops,
            "val_bpb": bpb,
        }
    )


@pytest.fixture
def metrics():
    rows = [
        (run, family, "M", step * flops, 4 - step / 10)
        for run, family, flops in [("b", MAMBA, 1e12), ("a", MAMBA, 2e12), ("c", "new", 3e12)]
        for step in (3, 1, 2)
    ]
    return pd.DataFrame([*rows, ("c", "new", "M", 9e12, np.nan)], columns=COLUMNS[:5])


def axes(figure):
    (ax,) = figure.axes
    return ax


def drawn(ax):
    """Points and faces of each scatter, by label."""
    return {points.get_label(): (points.get_offsets().tolist(), points.get_facecolor()) for points in ax.collections}


def offsets(ax):
    """Points of all scatters."""
    return np.concatenate([points.get_offsets() for points in ax.collections])


def labels(ax):
    return [text for text in ax.texts if text.get_text()]


def test_the_table_equals_the_drawn_data(runs):
    expected = pd.DataFrame(
        [
            ("r1", MAMBA, "M-M*M-", 2e12, 2.7, True),
            ("r2", LATENT, "MEM*ME", 1e13, 2.4, True),
            ("r0", ATTENTION, "*-*-", 1e13, 2.6, False),
            ("r3", MOE, "MEME*E", 1.1e13, 2.39, True),
        ],
        columns=["run", "family", "pattern", "flops_run", "val_bpb", "on_front"],
    )
    expected.insert(5, "label", expected["pattern"])
    pd.testing.assert_frame_equal(frontier_table(runs), expected)


def test_the_order_of_the_runs_does_not_matter(runs):
    runs = pd.concat([runs, runs.assign(run="again " + runs["run"])])
    pd.testing.assert_frame_equal(frontier_table(runs), frontier_table(runs.iloc[::-1]))


def test_a_run_without_family_is_drawn_as_other(runs):
    runs["family"] = runs["family"].where(runs["run"] != "r0")
    assert set(frontier_table(runs)["family"]) == {MAMBA, LATENT, MOE, "other"}


def test_more_recall_is_better(runs):
    table = frontier_table(runs, y="recall")
    assert table.loc[table["on_front"], "run"].tolist() == ["r1", "r2"]
    ax = axes(plot_frontier(runs, y="recall"))
    assert ax.get_ylabel() == "Recall accuracy"
    assert all(label.get_position()[1] >= 0 for label in labels(ax))


def test_missing_columns_and_equal_axes_are_refused(runs):
    with pytest.raises(
        ValueError, match=r"got none named 'flops' and 'test_bpb'; its columns: run, family, .*, status$"
    ):
        frontier_table(runs, "flops", "test_bpb")
    with pytest.raises(ValueError, match="y: must be another column than x, got 'val_bpb'"):
        frontier_table(runs, x="val_bpb")


def test_the_figure_of_bits_names_all_missing_columns(runs):
    with pytest.raises(
        ValueError, match="got none named 'quantized_from', 'scales' and 'bits_per_element'; its columns"
    ):
        bits_table(runs, "r0", "val_bpb")


def test_any_table_with_both_columns_is_drawn():
    table = frontier_table(pd.DataFrame({"cost": [1.0, 2.0], "loss": [3, 2]}, index=["a", "b"]), "cost", "loss")
    assert table[["run", "family", "cost", "loss", "on_front"]].values.tolist() == [
        ["a", "other", 1.0, 3.0, True], ["b", "other", 2.0, 2.0, True]
    ]  # fmt: skip
    assert sorted(map(tuple, offsets(axes(plot_frontier(table, "cost", "loss"))))) == [(1.0, 3.0), (2.0, 2.0)]


def test_runs_of_several_seeds_are_a_mean_with_its_interval(runs):
    seeds = pd.concat([runs.assign(seed=seed, val_bpb=runs["val_bpb"] + 0.01 * seed) for seed in range(3)])
    table = frontier_table(seeds)
    means = seed_means(seeds[seeds["status"] == "finished"]).dropna(subset="flops_run").set_index("pattern")
    assert table["val_bpb"].tolist() == pytest.approx(means.loc[table["pattern"], "val_bpb"].tolist())
    assert table["half_width"].tolist() == means.loc[table["pattern"], "val_bpb_half_width"].tolist()
    ax = axes(plot_frontier(seeds))
    bars = [segment for bar in ax.containers for line in bar[2] for segment in line.get_segments()]
    assert sorted(high - low for (_, low), (_, high) in bars) == pytest.approx(sorted(2 * table["half_width"]))
    assert len(frontier_table(seeds, by_seed=True)) == 3 * len(table)


def test_a_dashed_line_joins_a_child_with_its_parent(runs):
    parents = {"r1": ("r0", None, "r2"), "r2": (None, "r3", None), "r3": ("absent", None, None)}
    family = runs.assign(
        **{name: [parents.get(run, (None,) * 3)[i] for run in runs["run"]] for i, name in enumerate(PARENTS)}
    )
    table = frontier_table(family).set_index("run")
    assert table["parent"].dropna().to_dict() == {"r1": "r0", "r2": "r3"}
    ends = [line.get_xydata().tolist() for line in axes(plot_frontier(family)).lines if line.get_linestyle() == "--"]
    point = table[["flops_run", "val_bpb"]].T.to_dict("list")
    assert sorted(ends) == sorted([[point["r0"], point["r1"]], [point["r3"], point["r2"]]])
    assert "parent" not in frontier_table(runs)


def test_children_of_several_seeds_are_joined_with_the_mean_of_their_parents(runs):
    parent = ["s0 r0" if run == "r1" else None for run in runs["run"]]
    both = [runs.assign(seed=seed, run=f"s{seed} " + runs["run"], parent=parent) for seed in range(2)]
    table = frontier_table(pd.concat(both)).set_index("run")
    assert table["parent"].dropna().to_dict() == {"s0 r1": "s0 r0"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"pattern": ["ME", "M-"]}, ["ME", "M-"]),
        ({"pattern": ["ME", "ME"], "name": ["one", "other"]}, ["one", "other"]),
        ({"pattern": ["ME", "ME", "M-"], "name": ["a", "a", "a"], "d_model": [64, 96, 96]},
         ["ME, d64", "ME, d96", "M-"]),
        ({"pattern": ["ME", "ME"], "name": ["ME", "ME"], "top_k": [2, 4]}, ["ME, top 2", "ME, top 4"]),
        ({"pattern": ["ME", "ME"]}, ["ME", "ME"]),
    ],
)  # fmt: skip
def test_points_with_the_same_pattern_are_labelled_by_name_or_settings(columns, expected):
    assert point_labels(pd.DataFrame(columns)).tolist() == expected


def test_costs_that_hardly_differ_fill_their_axis(runs):
    runs["flops_run"] = 1e12 * (1 + 0.01 * np.arange(len(runs)))
    ax = axes(plot_frontier(runs))
    points = offsets(ax)[:, 0]
    low, high = ax.get_xlim()
    assert points.max() - points.min() > 0.5 * (high - low)
    assert len({tick.get_text() for tick in ax.get_xticklabels()}) >= 3


def test_points_line_and_labels_on_the_axes_are_those_of_the_table(runs):
    ax, styles = axes(plot_frontier(runs)), family_styles(FAMILIES)
    points = drawn(ax)
    assert {label: where for label, (where, _) in points.items() if where} == {
        MAMBA: [[2e12, 2.7]],
        LATENT: [[1e13, 2.4]],
        MOE: [[1.1e13, 2.39]],
        f"{ATTENTION}, off the front": [[1e13, 2.6]],
    }
    np.testing.assert_allclose(points[LATENT][1][0, :3], styles[LATENT].color)
    np.testing.assert_allclose(points[f"{ATTENTION}, off the front"][1][0, :3], styles[ATTENTION].light)
    (line,) = ax.lines
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xydata().tolist() == [[2e12, 2.7], [1e13, 2.4], [1.1e13, 2.39]]
    assert [(label.get_text(), label.xy) for label in labels(ax)] == [
        ("M-M*M-", (2e12, 2.7)), ("MEM*ME", (1e13, 2.4)), ("MEME*E", (1.1e13, 2.39)),
    ]  # fmt: skip


def test_scales_and_axis_labels(runs):
    ax = axes(plot_frontier(runs))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Training FLOPs", "Validation bits per byte")
    assert ax.get_title() == ""
    runs["own"] = runs["flops_run"] * 2
    assert axes(plot_frontier(runs, x="own")).get_xlabel() == "own"


def test_a_cost_of_zero_stays_visible(runs):
    runs["kv_bytes_per_token"] = [0.0, 512.0, 128.0, 0.0, 0.0, 0.0, 0.0]
    ax = axes(plot_frontier(runs, x="kv_bytes_per_token"))
    assert ax.get_xscale() == "linear"
    assert ax.get_xlim()[0] < 0


def test_the_legend_names_each_family_once_outside_the_data(runs):
    figure = plot_frontier(runs)
    figure.draw_without_rendering()
    ax = axes(figure)
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [ATTENTION, MAMBA, MOE, LATENT, "Pareto front"]
    assert legend.get_window_extent().y0 >= ax.get_window_extent().y1


@pytest.mark.parametrize("decades", [0.0, 0.3, 0.8, 1.5, 4.0])
@pytest.mark.parametrize("first", [1.0e13, 4.1e12])
def test_every_cost_axis_has_several_labelled_ticks_that_do_not_touch(runs, decades, first):
    runs["flops_run"] = first * 10 ** (decades * np.array([0, 0.2, 0.5, 1, 1, 1, 1]))
    figure = plot_frontier(runs, width=COLUMN_WIDTH, height=COLUMN_HEIGHT)
    figure.draw_without_rendering()
    low, high = axes(figure).get_xlim()
    ticks = [tick for tick in axes(figure).xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
    assert len(boxes) >= 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for tick in ticks:
        factor, exponent = re.fullmatch(r"\$(?:([\d.]+)\\times)?10\^\{(\d+)\}\$", tick.label1.get_text()).groups()
        assert float(factor or 1) * 10 ** int(exponent) == pytest.approx(tick.get_loc())


def test_a_family_keeps_its_colour_and_marker_in_every_figure():
    assert set(FAMILIES) <= set(families())
    alone = {family: family_styles([family])[family] for family in families()}
    assert len(set(alone.values())) == len(alone)
    assert family_styles([*reversed(families()), "zebra", "ant"]) == alone | family_styles(["zebra", "ant"])
    assert list(family_styles(families()))[: len(FAMILIES)] == list(FAMILIES)
    assert list(family_styles(["zebra", LATENT, "ant", ATTENTION])) == [ATTENTION, LATENT, "ant", "zebra"]
    many = family_styles([*FAMILIES, *(f"other {i}" for i in range(60))])
    assert len(set(many.values())) == len(many)


def relative_luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_runs_off_the_front_are_lighter_than_those_on_it():
    for style in family_styles(FAMILIES).values():
        assert relative_luminance(style.light) > relative_luminance(style.color) + 0.15


@pytest.mark.parametrize(("width", "height"), [(COLUMN_WIDTH, COLUMN_HEIGHT), (6.5, 4.0)])
@pytest.mark.parametrize("dense", [False, True])
def test_labels_hide_neither_each_other_nor_a_point_and_stay_inside(crowd, width, height, dense):
    if dense:  # all on the front, and too near one another for a label each
        crowd["pattern"], crowd["val_bpb"] = "MEM*ME" * 3, 1e12 / crowd["flops_run"]
    figure = plot_frontier(crowd, width=width, height=height)
    figure.draw_without_rendering()
    ax = axes(figure)
    boxes = [label.get_window_extent() for label in labels(ax)]
    members = int(frontier_table(crowd)["on_front"].sum())
    assert len(boxes) < members if dense else len(boxes) == members
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)
    inner = [box.padded(-0.08 * box.height) for box in boxes]  # the space that letters leave in their box
    assert not any(one.overlaps(other) for one, other in combinations(inner, 2))
    points = ax.transData.transform(crowd[["flops_run", "val_bpb"]])
    assert not any(box.contains(*point) for box in boxes for point in points)


@pytest.mark.parametrize("line", ["parent", "floor"])
def test_no_label_lies_on_a_dashed_or_a_dotted_line(line):
    rows = [("child", 1e12, 3.0), ("middle", 3.3e12, 2.52), ("parent", 1e13, 2.0)]
    runs = pd.DataFrame(rows, columns=["run", "flops_run", "val_bpb"]).assign(pattern=["M*M-", "MEM*E", "M-M*M-"])
    more = {"parent": ["parent", None, None]} if line == "parent" else {"ngram_val_bpb": [2.95, 2.45, 1.95]}
    figure = plot_frontier(runs.assign(**more))
    figure.draw_without_rendering()
    ax = axes(figure)
    (thin,) = (each for each in ax.lines if each.get_linestyle() in ("--", ":"))
    pixels = thin.get_transform().transform_path(thin.get_path())
    crossed = {text.get_text(): pixels.intersects_bbox(text.get_window_extent(), filled=False) for text in labels(ax)}
    assert crossed == dict.fromkeys(runs["pattern"], False)


@pytest.mark.slow
def test_text_is_seven_to_nine_points_at_both_widths(crowd):
    for width, size in [(COLUMN_WIDTH, 7.0), (6.5, 8.5)]:
        figure = plot_frontier(crowd, width=width)
        figure.draw_without_rendering()
        ax = axes(figure)
        assert ax.xaxis.label.get_fontsize() == size
        assert {tick.get_fontsize() for tick in ax.get_xticklabels()} == {size - 0.5}


EMPTY = {
    "no rows": lambda table: table.iloc[:0],
    "no values": lambda table: table.assign(val_bpb=np.nan),
    "no costs": lambda table: table.assign(flops_run=pd.array([None] * len(table), "Int64")),
    "none finished": lambda table: table.assign(status="unfinished"),
}


@pytest.mark.parametrize("change", EMPTY.values(), ids=EMPTY)
def test_figures_without_a_run_say_so_and_keep_their_axis_labels(runs, metrics, change, tmp_path):
    for figure in (plot_frontier(change(runs)), plot_curves(change(metrics))):
        ax = axes(figure)
        assert [text.get_text() for text in ax.texts] == ["no finished runs"]
        assert ax.get_xlabel() == "Training FLOPs"
        assert ax.get_legend() is None
        save_figure(figure, tmp_path / "empty")


def test_a_single_run_is_drawn_in_the_middle_of_a_readable_axis(runs, tmp_path):
    figure = plot_frontier(runs.iloc[:1])
    ax = axes(figure)
    assert drawn(ax)[ATTENTION][0] == [[1e13, 2.6]]
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert low < 1e13 / 1.3 < 1e13 * 1.3 < high
    assert bottom < 2.6 < top
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [ATTENTION]
    save_figure(figure, tmp_path / "one")


def test_the_title_is_drawn_only_when_asked_for(runs):
    assert plot_frontier(runs).get_suptitle() == ""
    assert plot_frontier(runs, title="A title").get_suptitle() == "A title"


def test_drawing_accepts_existing_axes(runs):
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_frontier(frontier_table(runs), left, "flops_run", "val_bpb")
    draw_frontier(frontier_table(runs, y="recall"), right, "flops_run", "recall", font_pt=6.0)
    assert (left.get_ylabel(), right.get_ylabel()) == ("Validation bits per byte", "Recall accuracy")


def test_each_run_is_one_curve_in_the_colour_of_its_family(metrics):
    table = curves_table(metrics)
    assert list(table.columns) == ["run", "family", "pattern", "flops_run", "val_bpb"]
    assert table["run"].tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert table["flops_run"].tolist() == [2e12, 4e12, 6e12, 1e12, 2e12, 3e12, 3e12, 6e12, 9e12]
    ax, styles = axes(plot_curves(metrics)), family_styles([MAMBA, "new"])
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["a", "b", "c"]
    assert lines["b"].get_xydata().tolist() == [[1e12, 3.9], [2e12, 3.8], [3e12, 3.7]]
    assert lines["a"].get_color() == lines["b"].get_color() == styles[MAMBA].color
    assert {tuple(line.get_markevery()) for line in ax.lines} == {(-1,)}
    assert lines["c"].get_color() == styles["new"].color
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "Training FLOPs")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [MAMBA, "new"]


def test_a_figure_is_saved_as_png_and_svg_with_its_metadata(runs, tmp_path):
    png, svg = save_figure(plot_frontier(runs), tmp_path / "new" / "frontier.svg")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["frontier.png", "frontier.svg"]
    with Image.open(png) as image:
        assert image.size == (1950, 1200)
        assert image.info["Title"] == "Validation bits per byte against Training FLOPs"
        assert image.info["Description"] == "4 runs: r1, r2, r0, r3"
        assert image.info["Software"].startswith("hybrid-frontier, Matplotlib")
    texts = [element.text for element in ElementTree.parse(svg).iter() if element.tag.startswith("{http://purl.org/dc")]
    assert "Validation bits per byte against Training FLOPs" in texts
    assert "4 runs: r1, r2, r0, r3" in texts


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    one = save_figure(plot_frontier(runs), tmp_path / "one.png")
    two = save_figure(plot_frontier(runs), tmp_path / "two.png")
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in one[1].read_bytes()


def test_an_unknown_suffix_is_refused_and_a_plain_figure_can_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"the suffix must be \.png or \.svg"):
        save_figure(Figure(), tmp_path / "figure.jpg")
    assert [path.name for path in save_figure(Figure(), tmp_path / "plain")] == ["plain.png", "plain.svg"]


def test_figures_stay_out_of_pyplots_global_list_and_show_in_jupyter(runs):
    figure = plot_frontier(runs)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_runs_on_different_data_are_drawn_only_on_comparable_axes(runs):
    runs = runs.assign(eval_data=["a", "b", "b", "b", "a", "a", "a"], corpus=["austen", *["sotu"] * 3, *["austen"] * 3])
    with pytest.raises(ValueError, match=r"val_bpb cannot be compared .* there are 1 on 'austen', 3 on 'sotu'"):
        plot_frontier(runs)
    plot_frontier(runs[runs["corpus"] == "sotu"])
    plot_frontier(runs.rename(columns={"val_bpb": "sotu_bpb"}), y="sotu_bpb")
    plot_frontier(runs.drop(columns="corpus").iloc[1:])
