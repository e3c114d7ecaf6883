"""The interactive frontier: its data, its file, and both in a real browser."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import need_chromium, new_page, run_first_cell, running_lab, set_theme, write_notebook
from command_line import run
from scipy import stats

from explore import ModelConfig
from explore.files import write_json
from explore.frontier import pareto_front
from explore.frontier.repeats import repeats
from explore.workbench import Frontier, frontier_data, save_frontier

PATTERNS = {"attention + MLP": "*-*-", "Mamba hybrid": "MEM*", "hybrid LatentMoE": "ME*E"}


def table(n: int = 24, seeds: int = 2) -> pd.DataFrame:
    """Runs of three families and several seeds; each third run has the previous one as parent."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        point, seed = divmod(i, seeds)
        family = list(PATTERNS)[point % 3]
        flops = 1e12 * 1.1 ** (point % 60)
        rows.append(
            {
                "run": f"run{i:04d}-0123abcd", "key": f"{i:064x}", "family": family, "pattern": PATTERNS[family],
                "parent": f"run{i - 1:04d}-0123abcd" if i % 3 == 2 else None, "seed": seed, "status": "finished",
                "params_total": 1000 * (point + 1), "params_active": 500 * (point + 1), "flops_run": flops,
                "tokens": 1000, "val_bpb": 2 + flops**-0.2 * 300 + rng.normal(0, 0.01), "recall": rng.uniform(),
                "corpus": "austen", "eval_data": "d1", "lr": 1e-3,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_data_equals_the_table() -> None:
    runs = table()
    data = frontier_data(runs)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [row["run"] for row in data["rows"]] == runs["run"].tolist()
    for row, (_, wanted) in zip(data["rows"], runs.iterrows(), strict=True):
        assert row["values"]["val_bpb"] == wanted["val_bpb"]
        assert row["values"]["flops_run"] == wanted["flops_run"]
        assert row["parents"] == ({} if pd.isna(wanted["parent"]) else {"parent": wanted["parent"]})
    assert data["axes"]["recall"]["sign"] == -1
    assert (data["axes"]["val_bpb"]["kind"], data["axes"]["flops_run"]["kind"]) == ("Quality", "Cost")
    assert set(data["families"]) == set(PATTERNS)
    assert set("".join(PATTERNS.values())) <= data["letters"].keys()


def test_runs_that_differ_in_their_seed_alone_are_one_point() -> None:
    runs = table(12, seeds=3)
    points = [row["point"] for row in frontier_data(runs.drop(columns="parent"))["rows"]]
    assert points == [i // 3 for i in range(12)]
    runs["lr"] = [1e-3 * (i + 1) for i in range(12)]
    assert len({row["point"] for row in frontier_data(runs)["rows"]}) == 12


def test_the_interval_of_a_mean_has_the_noise_of_its_size() -> None:
    runs = table(40, seeds=4).drop(columns="parent")
    data = frontier_data(runs)
    half = data["axes"]["val_bpb"]["half"]
    found = repeats(runs.assign(point=[row["point"] for row in data["rows"]]), ["point"], "flops_run", "val_bpb")
    assert found.table["point"].tolist() == list(range(len(half)))
    expected = [stats.t.ppf(0.975, dof) * sd for dof, sd in zip(found.noise.dof, found.noise.sd, strict=True)]
    assert half == pytest.approx(expected)
    assert frontier_data(runs.drop_duplicates("flops_run"))["axes"]["val_bpb"]["half"] == []


def test_unfinished_runs_and_infinite_values_are_omitted() -> None:
    runs = table(6)
    runs.loc[0, "status"] = "diverged"
    runs.loc[1, "val_bpb"] = math.inf
    rows = frontier_data(runs)["rows"]
    assert [row["run"] for row in rows] == runs["run"].tolist()[1:]
    assert "val_bpb" not in rows[0]["values"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "flops_rnu"}, "x must be a quantity with numbers, got 'flops_rnu'; did you mean 'flops_run'"),
        ({"y": "sotu_bpb"}, "y must be a quantity with numbers, got 'sotu_bpb'"),
        (
            {"x": "energy", "y": "joules"},
            "runs must have the columns 'energy' and 'joules', got none named 'energy' and 'joules'; its columns: ",
        ),
        ({"runs": table(4).assign(status="unfinished")}, "x must be a quantity with numbers, got 'flops_run'"),
    ],
)
def test_a_frontier_without_drawable_runs_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        frontier_data(**{"runs": table(4), **change})


def test_any_table_with_two_columns_of_numbers_is_shown(tmp_path: Path) -> None:
    data = frontier_data(pd.DataFrame({"energy": [1.0, 20.0, 300.0], "error": [3, 2, 1]}), "energy", "error")
    assert [row["run"] for row in data["rows"]] == ["0", "1", "2"]
    assert [row["values"]["energy"] for row in data["rows"]] == [1.0, 20.0, 300.0]
    assert [row["point"] for row in data["rows"]] == [0, 1, 2]
    assert {row["family"] for row in data["rows"]} == set(data["families"]) == {"other"}
    kinds = {name: (axis["kind"], axis["log"]) for name, axis in data["axes"].items()}
    assert kinds == {"energy": ("Other", True), "error": ("Other", False)}


def test_the_command_shows_a_table_without_names_and_a_column_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = table(4).assign(energy=[1.0, 2.0, 3.0, 4.0]).drop(columns=["run", "family"])
    own.to_csv(tmp_path / "own.csv", index=False)
    page, grid = tmp_path / "front.html", Path(__file__).parents[1] / "sweeps" / "records" / "pattern_grid.csv"
    for arguments in ((tmp_path / "own.csv", "--x", "energy"), (grid, "--x", "val_bpb_at_20")):
        assert run(capsys, monkeypatch, "plot", *arguments, "--html", page) == (0, f"wrote {page}\n", "")
        assert f'"start":{{"x":"{arguments[2]}","y":"val_bpb"}}' in page.read_text()


def test_the_page_is_self_contained_and_names_are_escaped(tmp_path: Path) -> None:
    runs = table(4)
    runs.loc[0, "run"] = "</script><script>alert(1)</script>"
    text = save_frontier(runs, tmp_path / "front.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert not re.search(r"(src|href)=\"(?!data:,)", text)
    assert "default-src 'none'" in text
    with pytest.raises(ValueError, match=re.escape("path must end in .html, got 'front.png'")):
        save_frontier(runs, "front.png")


def write_runs(place: Path) -> Path:
    """Three finished runs, the last of them cut from the first."""
    for i, (family, pattern) in enumerate(PATTERNS.items()):
        model = ModelConfig(d_model=64, vocab_size=257, pattern=pattern)
        experiment = {"name": f"run{i}", "model": model.model_dump(mode="json"), "seed": 0}
        if i == 2:
            parent = {"path": "runs/run0-00000000", "digest": "a" * 64, "model": experiment["model"]}
            experiment["start"] = {"kind": "parent", "parent": parent}
        experiment |= {"data": {"kind": "text", "corpus": "austen", "seq_len": 64}, "train": {"tokens": 1000}}
        folder = place / f"run{i}-{i:08x}"
        write_json(folder / "experiment.json", {"key": f"{i:08x}" + "0" * 56, "experiment": experiment})
        write_json(folder / "cost.json", {"family": family, **model.cost(64).to_dict()})
        result = {"status": "finished", "val_bpb": 2.5 - i / 4, "flops_run": 1e12 * (i + 1), "tokens": 1000}
        write_json(folder / "result.json", result)
    return place


def test_the_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, page = write_runs(tmp_path / "runs"), tmp_path / "front.html"
    code, out, _ = run(capsys, monkeypatch, "plot", runs, "--html", page, "--x", "params_active")
    assert (code, out) == (0, f"wrote {page}\n")
    assert '"start":{"x":"params_active","y":"val_bpb"}' in (tmp_path / "front.html").read_text()
    assert not list(tmp_path.rglob("*.png"))


def test_a_click_selects_the_run_and_opens_its_workbench(tmp_path: Path) -> None:
    view = Frontier(write_runs(tmp_path / "runs"))
    assert view.run is None
    with pytest.raises(ValueError, match="click a run first"):
        view.workbench()
    view.selected = ["run2-00000002", "run0-00000000"]
    assert view.run is not None
    assert view.run.path.name == "run2-00000002"
    bench = view.workbench()
    assert (bench.config.pattern, bench.pinned["label"]) == ("ME*E", "run0-00000000")
    view.ask = {"n": 1}
    assert view.bench.keys() == {"n", "model"}
    view.selected = ["gone"]
    assert view.save(tmp_path / "front.html").is_file()


# In a browser.


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A page of 24 runs, opened from a file without a network."""
    need_chromium()
    path = save_frontier(table(), tmp_path / "front.html")
    with new_page(1200, 760, offline=True) as page:
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        page.wait_for_selector(".fr[data-points]")
        yield page
        assert faults == []


def count(page: Any, what: str) -> int:
    return int(page.get_attribute(".fr", f"data-{what}"))


def centre(page: Any, at: int) -> tuple[float, float]:
    box = page.locator(".fr-marks path[transform]").nth(at).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.slow
def test_in_a_browser_axes_families_and_seeds_change_the_drawn_points(page: Any) -> None:
    runs = table()
    assert (count(page, "points"), count(page, "front")) == (24, int(pareto_front(runs).sum()))
    page.locator("[data-axis=y]").select_option("recall")  # higher is better
    page.locator("[data-axis=x]").select_option("params_active")
    assert count(page, "front") == int(pareto_front(runs, "params_active", "recall").sum())
    page.locator("[data-toggle='Mamba hybrid']").click()
    on = runs[runs["family"] != "Mamba hybrid"]
    assert (count(page, "points"), count(page, "front")) == (
        len(on), int(pareto_front(on, "params_active", "recall").sum()),
    )  # fmt: skip
    page.locator("[data-toggle='seed 1']").click()
    assert count(page, "points") == int((on["seed"] == 0).sum())
    page.locator("[data-toggle='seed 1']").click()
    page.locator("[data-toggle='hybrid LatentMoE']").click(modifiers=["Shift"])
    assert count(page, "points") == int((runs["family"] == "hybrid LatentMoE").sum())


@pytest.mark.slow
def test_in_a_browser_means_over_seeds_have_intervals(page: Any) -> None:
    assert page.locator(".fr-interval").count() == 0
    page.locator("[data-toggle=means]").click()
    drawn = page.locator(".fr-interval").get_attribute("d")
    n_points = count(page, "points")
    assert n_points == len({row["point"] for row in frontier_data(table())["rows"]}) < 24
    assert len(re.findall("M", drawn)) == n_points


@pytest.mark.slow
def test_in_a_browser_a_point_shows_its_letters_and_a_click_its_run(page: Any) -> None:
    page.mouse.move(*centre(page, 0))
    tip = page.locator(".fr-tip")
    tip.wait_for()
    letters = "".join(tip.locator(".fr-strip span").all_inner_texts())
    assert letters in PATTERNS.values()
    page.mouse.click(*centre(page, 0))
    card = page.locator(".fr-card")
    name = card.get_attribute("data-run")
    (row,) = table()[table()["run"] == name].to_dict("records")
    assert (letters, card.locator("[data-value-of=val_bpb]").inner_text()) == (row["pattern"], f"{row['val_bpb']:.5g}")
    # Arrow keys move among the points, Enter selects, Escape clears.
    page.locator(".fr-plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Enter")
    assert page.locator(".fr-card").count() in (1, 2)
    page.keyboard.press("Escape")
    assert page.locator(".fr-card").count() == 0


@pytest.mark.slow
def test_in_a_browser_parents_and_children_are_linked(page: Any) -> None:
    assert page.locator(".fr-link").count() == 8
    child = next(row for row in frontier_data(table())["rows"] if row["parents"])
    order = page.evaluate("[...document.querySelectorAll('.fr-marks path[transform]')].length")
    for at in range(order):
        page.mouse.click(*centre(page, at))
        if page.locator(".fr-card").get_attribute("data-run") == child["run"]:
            break
    assert page.locator(".fr-tie").count() >= 1
    page.locator(".fr-card .fr-other", has_text=child["parents"]["parent"]).first.click()
    assert page.locator(".fr-card").get_attribute("data-run") == child["parents"]["parent"]
    page.locator("[data-toggle=links]").click()
    assert page.locator(".fr-link").count() == 0


@pytest.mark.slow
def test_in_a_browser_a_drag_zooms_and_a_button_resets_the_zoom(page: Any) -> None:
    box = page.locator(".fr-plot").bounding_box()
    inside = "() => [...document.querySelectorAll('.fr-grid')].map(e => e.getAttribute('d')).join()"
    before = page.evaluate(inside)
    page.mouse.move(box["x"] + 150, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 350, box["y"] + 260, steps=4)
    page.mouse.up()
    assert page.evaluate(inside) != before
    page.locator("[data-reset]").click()
    assert page.evaluate(inside) == before


MOVES = """() => {
  const plot = document.querySelector('.fr-plot'), { x, y } = plot.getBoundingClientRect(), times = [];
  for (let i = 0; i < 200; i++) {
    const began = performance.now();
    const at = { clientX: x + 80 + (5 * i) % 800, clientY: y + 20 + (7 * i) % 380 };
    plot.dispatchEvent(new PointerEvent('pointermove', at));
    times.push(performance.now() - began);
  }
  return times;
}"""


@pytest.mark.slow
@pytest.mark.alone
def test_in_a_browser_a_thousand_points_are_redrawn_quickly(tmp_path: Path) -> None:
    need_chromium()
    path = save_frontier(table(1000), tmp_path / "front.html")
    with new_page(1200, 760, offline=True) as page:
        page.goto(path.as_uri())
        page.wait_for_selector(".fr[data-points='1000']")
        times = []
        for name in ("params_active", "recall", "flops_run", "params_total") * 4:
            page.locator("[data-axis=x]").select_option(name)
            times.append(float(page.get_attribute(".fr", "data-ms")))
        hovers = page.evaluate(MOVES)
    redraw, hover = statistics.median(times), statistics.fmean(hovers)
    print(f"\n1,000 points: a redraw takes {redraw:.1f} ms, a move of the pointer {hover:.2f} ms")
    assert redraw < 100
    assert hover < 16


@pytest.mark.slow
@pytest.mark.alone
def test_in_jupyterlab_a_click_reaches_python_and_opens_the_workbench(tmp_path: Path) -> None:
    need_chromium()
    write_runs(tmp_path / "runs")
    write_notebook(
        tmp_path / "view.ipynb",
        ('from explore import Frontier\nview = Frontier("runs")\nview', "print(view.run.path.name)"),
    )
    with running_lab(tmp_path) as address, new_page() as page:
        run_first_cell(page, address.format("view.ipynb"), ".fr[data-points]")
        for theme in ("Light", "Dark"):
            set_theme(page, theme)
            page.locator(".fr").screenshot(path=tmp_path / f"{theme}.png")
        page.locator(".fr-plot").scroll_into_view_if_needed()
        page.mouse.click(*centre(page, 0))
        name = page.locator(".fr-card").get_attribute("data-run")
        page.locator("[data-bench]").click()
        page.wait_for_selector(".fr-bench .wb[data-n]")
        page.locator(".fr").screenshot(path=tmp_path / "bench.png")
        page.locator(".jp-CodeCell .cm-content").nth(1).click()
        page.keyboard.press("Shift+Enter")
        printed = page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output pre")
        assert printed.inner_text().strip() == name
