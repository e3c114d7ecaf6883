from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from explore import ModelConfig
from explore.cost import CONVENTIONS, Dtypes, flops_train
from explore.figures import (
    COLUMN_HEIGHT,
    COLUMN_WIDTH,
    README_WIDTH,
    RECEIPTS,
    conventions_table,
    draw_conventions,
    draw_latency,
    draw_receipts,
    draw_state,
    draw_throughput,
    group_colors,
    latency_table,
    plot_conventions,
    plot_latency,
    plot_receipts,
    plot_state,
    plot_throughput,
    receipts_table,
    save_figure,
    state_table,
)
from explore.presets import preset

SEQ_LEN = 512
CONTEXTS = (1, 100, 128, 4096, 2**20)
BATCHES = (1.0, 4.0, 16.0)


@pytest.fixture(scope="module")
def models():
    """Every kind of block, a window, multi-token prediction, tied embeddings, and a model without state."""
    latent = {"n_experts": 8, "top_k": 2, "d_expert": 24, "d_shared": 32, "d_latent": 16}
    mamba = {"n_heads": 4, "d_head": 32, "d_state": 16, "n_groups": 2}
    window = {"n_heads": 4, "n_kv_heads": 2, "d_head": 16, "window": 64}
    return {
        "attention": ModelConfig(d_model=64, vocab_size=512, pattern="*-*-", blocks={}),
        "hybrid": ModelConfig(d_model=64, vocab_size=512, pattern="M-M*", blocks={"M": mamba}),
        "latent": ModelConfig(d_model=64, vocab_size=512, pattern="MEM*E/*E", blocks={"E": latent, "M": mamba}),
        "MLA": ModelConfig(d_model=64, vocab_size=512, pattern="L-LE", blocks={}, tie_embeddings=True),
        "window": ModelConfig(d_model=64, vocab_size=512, pattern="*-", blocks={"*": window}),
        "MLP": ModelConfig(d_model=64, vocab_size=512, pattern="--", blocks={}),
    }


@pytest.fixture
def steps():
    rows = [
        (model, batch, 65536, 0.002 * slow * (1 + batch / 8), batch / (0.002 * slow * (1 + batch / 8)))
        for model, slow in (("small", 1.0), ("large", 5.0))
        for batch in reversed(BATCHES)
    ]
    return pd.DataFrame(rows, columns=["model", "batch_size", "context", "step_s", "tokens_per_s"])


def axes(figure):
    (ax,) = figure.axes
    return ax


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}


def bars(ax):
    """Left end and length of the bars of each group, by row."""
    return {
        container.get_label(): {
            round(bar.get_y() + bar.get_height() / 2): (bar.get_x(), bar.get_width()) for bar in container
        }
        for container in ax.containers
    }


# Receipts.


@pytest.mark.parametrize("quantity", RECEIPTS)
def test_the_groups_of_a_receipt_sum_to_the_total_of_the_model(models, quantity):
    dtypes = Dtypes("float8", "float8", "bfloat16")
    table = receipts_table(models, SEQ_LEN, [quantity], dtypes)
    assert list(table.columns) == ["quantity", "model", "group", "value"]
    assert table["group"].tolist() == list(group_colors()) * len(models)
    sums = table.groupby("model")["value"].sum()
    for name, model in models.items():
        cost = model.cost(SEQ_LEN, weight_dtype="float8", kv_dtype="float8", state_dtype="bfloat16")
        assert sums[name] == pytest.approx(getattr(cost, quantity), rel=1e-12), name


def test_the_groups_of_a_receipt_are_those_of_the_components(models):
    table = receipts_table(models, SEQ_LEN, ["params_active", "flops_fwd"])
    values = table.set_index(["quantity", "model", "group"])["value"]
    active, d = values["params_active"]["latent"], 64
    assert active["embedding, head"] == 2 * 512 * d + d
    assert active["router"] == 2 * 8 * d
    assert active["latent projections"] == 2 * 2 * d * 16
    assert active["experts"] == 2 * (2 * 2 * 16 * 24 + d)  # with the norm before the block
    assert active["shared experts"] == 2 * 2 * d * 32
    assert active["Mamba-2 scan, state"] == active["multi-token prediction"] == active["MLP"] == 0
    flops, ledger = values["flops_fwd"]["latent"], models["latent"].ledger(SEQ_LEN)
    assert flops["multi-token prediction"] == ledger.extra.flops_seq / SEQ_LEN > 0
    attention = models["latent"].blocks["*"]
    pairs = SEQ_LEN * (SEQ_LEN + 1) / 2
    assert flops["attention scores, KV"] == 4 * attention.n_heads * attention.d_head * pairs / SEQ_LEN
    scan = [entry.flops_seq for entry in ledger.blocks["M"].entries if entry.component.startswith("ssd ")]
    assert flops["Mamba-2 scan, state"] == 2 * sum(scan) / SEQ_LEN


def test_bars_are_stacked_in_the_order_of_the_groups_and_end_at_the_total(models):
    figure = plot_receipts(models, SEQ_LEN, ["params_active", "flops_fwd"])
    table = receipts_table(models, SEQ_LEN, ["params_active", "flops_fwd"])
    for ax, (quantity, scale) in zip(figure.axes, [("params_active", 1e3), ("flops_fwd", 1e3)], strict=True):
        here = table[(table["quantity"] == quantity) & (table["value"] > 0)]
        drawn = bars(ax)
        assert list(drawn) == [group for group in group_colors() if group in set(here["group"])]
        for i, name in enumerate(models):
            left = 0.0
            for group, value in here[here["model"] == name][["group", "value"]].itertuples(index=False):
                assert drawn[group][i] == pytest.approx((left, value / scale))
                left += value / scale
            assert ax.texts[i].xy == (pytest.approx(left), i)
            assert float(ax.texts[i].get_text()) == pytest.approx(left, rel=5e-3)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(models)
    assert [ax.get_xlabel() for ax in figure.axes] == ["Active parameters\n(thousands)", "Forward pass\n(kFLOPs/token)"]
    assert legend_of(figure) == [group for group in group_colors() if group in set(table["group"][table["value"] > 0])]


def test_shares_are_percent_and_totals_keep_their_unit(models):
    ax = axes(plot_receipts(models, SEQ_LEN, ["decode_bytes"], share=True))
    ends = dict.fromkeys(range(len(models)), 0.0)
    for group in bars(ax).values():
        for i, (_, width) in group.items():
            ends[i] += width
    assert list(ends.values()) == pytest.approx([100.0] * len(models))
    assert ax.get_xlabel() == "Decoding step moves (%)"
    assert ax.get_xlim() == (0, 100)
    for text, model in zip(ax.texts, models.values(), strict=True):
        number, unit = text.get_text().split(" ")
        assert unit == "KiB"
        assert float(number) == pytest.approx(model.cost(SEQ_LEN).decode_bytes / 1024, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "quantity", "label"),
    [
        ("llama-3.1-8b", "params_active", "Active parameters (billions)"),
        ("llama-3.1-8b", "flops_train", "Training (GFLOPs/token)"),
        ("llama-3.1-8b", "flops_prefill", "Prefill (TFLOPs)"),
        ("kimi-k2", "params_total", "Parameters (trillions)"),
        ("llama-3.1-8b", "weight_bytes", "Weights (GiB)"),
    ],
)
def test_an_axis_names_the_unit_of_its_quantity(name, quantity, label):
    assert axes(plot_receipts({name: preset(name)}, 4096, [quantity])).get_xlabel() == label


def test_a_model_without_the_quantity_keeps_its_row(models):
    ax = axes(plot_receipts(models, SEQ_LEN, ["kv_bytes"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(models)
    assert float(ax.texts[list(models).index("MLP")].get_text()) == 0


# Machado, Oliveira and Fernandes 2009, at full severity, on linear RGB.
SIGHT = {
    "trichromacy": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def seen(color, sight):
    """The colour in CIELAB, for a given colour vision."""
    rgb = np.array(color)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(np.array(sight) @ linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT.values(), ids=SIGHT)
def test_colours_of_groups_differ_for_every_colour_vision(sight):
    colors = group_colors()
    for one, other in combinations(colors, 2):
        distance = np.linalg.norm(seen(colors[one], sight) - seen(colors[other], sight))
        assert distance > 12, (one, other)


def test_an_unknown_quantity_is_refused(models):
    with pytest.raises(ValueError, match=r"quantities must be of params_total, params_active.* got 'params'"):
        receipts_table(models, SEQ_LEN, ["params"])


# Conventions.


def test_conventions_are_compared_with_exact(models):
    table = conventions_table(models, [SEQ_LEN, 4096])
    assert list(table.columns) == ["model", "seq_len", "convention", "flops_train", "relative"]
    assert len(table) == 2 * len(models) * len(CONVENTIONS)
    for model, seq_len, convention, flops, relative in table.itertuples(index=False):
        assert flops == flops_train(models[model].ledger(seq_len), convention)
        assert relative == pytest.approx(flops / models[model].cost(seq_len).flops_train, rel=1e-12)


def test_conventions_on_the_axes_are_those_of_the_table(models):
    figure, table = plot_conventions(models, [SEQ_LEN, 4096]), conventions_table(models, [SEQ_LEN, 4096])
    assert [ax.get_title() for ax in figure.axes] == ["512 tokens", "4k tokens"]
    for ax, seq_len in zip(figure.axes, (SEQ_LEN, 4096), strict=True):
        drawn = lines(ax)
        assert list(drawn) == list(CONVENTIONS)
        assert drawn.pop("exact")[:, 0].tolist() == [1, 1]
        for convention, points in drawn.items():
            rows = table[(table["seq_len"] == seq_len) & (table["convention"] == convention)]
            assert points[:, 0].tolist() == rows["relative"].tolist()
            assert points[:, 1].round().tolist() == list(range(len(models)))
        assert ax.get_xscale() == "log"
        low, high = ax.get_xlim()
        assert low < table["relative"].min() < table["relative"].max() < high
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert legend_of(figure) == list(CONVENTIONS)
    assert [ax.get_xlabel() for ax in figure.axes] == ["Training FLOPs, relative to exact", ""]


def test_panels_in_a_column_lie_above_each_other_and_share_one_label(models):
    figure = plot_conventions(models, [SEQ_LEN, 4096], width=COLUMN_WIDTH)
    figure.draw_without_rendering()
    above, below = figure.axes
    assert above.get_position().y0 > below.get_position().y1
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "Training FLOPs, relative to exact")


# State.


def test_the_state_table_is_the_sum_of_the_states_of_blocks(models):
    table = state_table(models, CONTEXTS)
    parts = ["kv_bytes", "ssm_state_bytes", "conv_state_bytes"]
    assert list(table.columns) == ["model", "context", *parts, "state_bytes"]
    for name, model in models.items():
        rows = table[table["model"] == name].set_index("context")
        assert rows.index.tolist() == list(CONTEXTS)
        kv = ssm = conv = 0.0
        for block in model.layers:
            if block.kind == "attention":
                visible = np.minimum(CONTEXTS, block.window or max(CONTEXTS))
                kv = kv + 2 * 2 * block.n_kv_heads * block.d_head * visible
            elif block.kind == "mla":
                kv = kv + 2 * (block.kv_rank + block.d_rope) * np.array(CONTEXTS)
            elif block.kind == "mamba2":
                ssm += 4 * block.n_heads * block.d_head * block.d_state
                conv += 4 * (block.n_heads * block.d_head + 2 * block.n_groups * block.d_state) * (block.d_conv - 1)
        for part, expected in zip(parts, (kv, ssm, conv), strict=True):
            np.testing.assert_array_equal(rows[part], np.broadcast_to(expected, len(CONTEXTS)), err_msg=name)
        np.testing.assert_array_equal(rows["state_bytes"], np.broadcast_to(kv + ssm + conv, len(CONTEXTS)))


def test_state_is_one_line_per_model_on_log_axes_and_none_without_state(models):
    ax, table = axes(plot_state(models, CONTEXTS)), state_table(models, CONTEXTS)
    drawn = lines(ax)
    assert list(drawn) == [name for name in models if name != "MLP"]
    for name, points in drawn.items():
        rows = table.loc[table["model"] == name, ["context", "state_bytes"]]
        np.testing.assert_array_equal(points, rows.to_numpy())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Context (tokens)", "Decoding state of a sequence")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn)


def test_ticks_of_state_are_in_binary_units():
    figure = plot_state({name: preset(name) for name in ("llama-3.1-8b", "nemotron-h-8b")})
    figure.draw_without_rendering()
    ax = axes(figure)
    sizes = {"MiB": 2**20, "GiB": 2**30}
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        number, unit = label.get_text().split(" ")
        assert float(number) * sizes[unit] == tick
    assert {"1k", "64k", "1M"} <= {label.get_text() for label in ax.get_xticklabels()}


# Decoding speed.


def test_the_latency_table_is_the_readable_rows_by_batch(steps):
    broken = pd.DataFrame(
        [("bad", 1, 65536, np.nan, 1.0), ("bad", 2, 65536, np.inf, 1.0), ("bad", 4, 65536, 0.0, 1.0)],
        columns=steps.columns,
    )
    table = latency_table(pd.concat([steps.assign(note="other"), broken]))
    assert list(table.columns) == [*steps.columns, "fits", "series"]
    assert table["fits"].all()
    assert table["series"].tolist() == ["small"] * 3 + ["large"] * 3
    assert table["batch_size"].tolist() == [*BATCHES, *BATCHES]
    expected = steps.iloc[[2, 1, 0, 5, 4, 3]].reset_index(drop=True)
    pd.testing.assert_frame_equal(table[steps.columns], expected, check_dtype=False)


def test_several_contexts_are_several_series(steps):
    table = latency_table(pd.concat([steps, steps.assign(context=4096)]))
    assert list(dict.fromkeys(table["series"])) == ["small, 64k", "large, 64k", "small, 4k", "large, 4k"]


def test_all_missing_columns_are_named(steps):
    with pytest.raises(ValueError, match="got none named 'context' and 'step_s'; its columns: model, batch_size"):
        latency_table(steps.drop(columns=["context", "step_s"]))


@pytest.mark.parametrize(
    ("plot", "x", "y", "x_label", "y_label"),
    [
        (plot_latency, "batch_size", "step_s", "Batch (sequences)", "Decoding step (ms)"),
        (plot_throughput, "step_s", "tokens_per_s", "Decoding step (ms)", "Throughput (tokens/s per device)"),
    ],
)
def test_speed_is_one_line_per_model_on_log_axes(steps, plot, x, y, x_label, y_label):
    figure, table = plot(steps), latency_table(steps)
    figure.draw_without_rendering()
    ax = axes(figure)
    drawn = lines(ax)
    assert list(drawn) == ["small", "large"]
    for name, points in drawn.items():
        np.testing.assert_array_equal(points, table.loc[table["series"] == name, [x, y]].to_numpy())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x_label, y_label)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_label_text().endswith("(ms)"):
            for tick in axis.get_major_ticks():
                assert float(tick.label1.get_text().replace(",", "")) == pytest.approx(1e3 * tick.get_loc())


def test_points_of_a_batch_lie_on_its_diagonal(steps):
    ax = axes(plot_throughput(steps))
    diagonals = [line for line in ax.lines if line.get_label() == "_batch"]
    for batch, line in zip(BATCHES, diagonals, strict=True):
        np.testing.assert_allclose(line.get_xydata().prod(axis=1), batch)
    assert [text.get_text() for text in ax.texts] == ["batch 1", "4", "16"]


def test_batches_of_two_devices_lie_on_diagonals_of_half_as_many_tokens(steps):
    ax = axes(plot_throughput(steps.assign(tokens_per_s=steps["tokens_per_s"] / 2)))
    products = [line.get_xydata().prod(axis=1) for line in ax.lines if line.get_label() == "_batch"]
    np.testing.assert_allclose(products, [[batch / 2] * 2 for batch in BATCHES])
    uneven = steps.assign(
        tokens_per_s=steps["tokens_per_s"].where(steps["model"] == "small", steps["tokens_per_s"] / 2)
    )
    assert not axes(plot_throughput(uneven)).texts


@pytest.mark.parametrize("plot", [plot_latency, plot_throughput])
def test_batches_that_do_not_fit_are_hollow(steps, plot):
    ax = axes(plot(steps.assign(fits=(steps["model"] == "small") | (steps["batch_size"] < 4))))
    drawn = {line.get_label(): line for line in ax.lines}
    assert drawn["small"].get_markevery() == [0, 1, 2]
    assert drawn["large"].get_markevery() == [0]
    assert drawn["_large"].get_xydata().tolist() == drawn["large"].get_xydata()[1:].tolist()
    assert drawn["_large"].get_markerfacecolor() == "white"
    assert drawn["_large"].get_linestyle() == "None"
    assert "_small" not in drawn
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["small", "large", "does not fit"]


# All of them.


def every_figure(models, steps, **size):
    return {
        "receipts": plot_receipts(models, SEQ_LEN, **size),
        "shares": plot_receipts(models, SEQ_LEN, share=True, **size),
        "conventions": plot_conventions(models, [64, SEQ_LEN, 4096], **size),
        "state": plot_state(models, CONTEXTS, **size),
        "latency": plot_latency(steps, **size),
        "throughput": plot_throughput(steps, **size),
    }


def test_figures_without_models_say_so_and_keep_their_labels(steps, tmp_path):
    for name, figure in every_figure({}, steps.iloc[:0]).items():
        for ax in figure.axes:
            assert [text.get_text() for text in ax.texts] == ["nothing to show"], name
        assert any(ax.get_xlabel() for ax in figure.axes)
        assert not figure.legends
        save_figure(figure, tmp_path / name)


def test_a_single_row_is_drawn(models, steps, tmp_path):
    one = {"hybrid": models["hybrid"]}
    for name, figure in every_figure(one, steps.iloc[:1]).items():
        save_figure(figure, tmp_path / name)
    ax = axes(plot_state(one, [1024]))
    ((context, size),) = lines(ax)["hybrid"]
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left < context / 1.3 < context * 1.3 < right
    assert bottom < size / 1.3 < size * 1.3 < top


DRAWINGS = {
    "receipts": (draw_receipts, "value", ("flops_fwd",)),
    "conventions": (draw_conventions, "relative", (SEQ_LEN,)),
    "state": (draw_state, "state_bytes", ()),
    "latency": (draw_latency, "step_s", ()),
    "throughput": (draw_throughput, "tokens_per_s", ()),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_rows_of_nan_are_left_out(models, steps, name):
    tables = {
        "receipts": receipts_table(models, SEQ_LEN),
        "conventions": conventions_table(models, [SEQ_LEN]),
        "state": state_table(models, CONTEXTS),
    }
    table = tables.get(name, latency_table(steps))
    draw, column, about = DRAWINGS[name]
    whole, part, nothing = Figure(), Figure(), Figure()
    draw(table, whole.subplots(), *about)
    drawn = len(axes(whole).lines) + len(axes(whole).patches)
    holes = table.assign(**{column: table[column].where(table["model"] == table["model"].iloc[0])})
    draw(holes, part.subplots(), *about)
    assert 0 < len(axes(part).lines) + len(axes(part).patches) < drawn or name == "conventions"
    draw(table.assign(**{column: np.nan}), nothing.subplots(), *about)
    assert [text.get_text() for text in axes(nothing).texts] == ["nothing to show"]
    for figure in (part, nothing):
        figure.draw_without_rendering()


@pytest.mark.slow
@pytest.mark.parametrize("width", [COLUMN_WIDTH, README_WIDTH])
@pytest.mark.parametrize("title", [None, "A title"])
def test_no_text_overlaps_another_and_all_of_it_is_inside(steps, width, title):
    names = ("llama-3.1-8b", "nemotron-h-8b", "gpt-oss-20b", "nemotron-3-super", "latentmoe-hybrid-73b-base")
    models = {name: preset(name) for name in names}
    for name, figure in every_figure(models, steps, width=width, title=title).items():
        figure.draw_without_rendering()
        texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
        for ax in figure.axes:
            legend = ax.get_legend()
            texts += [] if legend is None else legend.get_texts()
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [
                    t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()
                ]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        texts += [text for text in figure.texts if text.get_text()]
        boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
        for (one, a), (other, b) in combinations(boxes.items(), 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), (name, one.get_text(), other.get_text())
        for text, box in boxes.items():
            assert min(box.x0, box.y0) >= 0, (name, text.get_text())
            assert box.x1 <= figure.bbox.x1 + 1, (name, text.get_text())
            assert box.y1 <= figure.bbox.y1 + 1, (name, text.get_text())


@pytest.mark.slow
def test_text_is_seven_to_nine_points_at_both_widths(models, steps):
    for width, size in [(COLUMN_WIDTH, 7.0), (README_WIDTH, 8.5)]:
        for figure in every_figure(models, steps, width=width).values():
            for ax in figure.axes:
                assert ax.xaxis.label.get_fontsize() == size
                assert {label.get_fontsize() for label in ax.get_xticklabels()} == {size - 0.5}


def test_the_file_of_a_figure_of_models_has_their_names(models, tmp_path):
    figure = plot_state(models, width=COLUMN_WIDTH, height=COLUMN_HEIGHT)
    png, *_ = save_figure(figure, tmp_path / "state")
    with Image.open(png) as image:
        assert image.info["Title"] == "Decoding state against context"
        assert image.info["Description"] == "6 models: attention, hybrid, latent, MLA, window, MLP"


@pytest.mark.slow
def test_the_same_models_give_the_same_bytes(models, tmp_path):
    one = save_figure(plot_receipts(models, SEQ_LEN), tmp_path / "one")
    two = save_figure(plot_receipts(models, SEQ_LEN), tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()
