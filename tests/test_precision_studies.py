"""The sweeps of precision: arms that diverged, every seed, the floor and the curves in tables and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from explore.study import Sweep, load_sweep

SWEEPS = Path(__file__).parent.parent / "sweeps"
N_STEPS, FLOOR = 3000, 2.1


@pytest.fixture(scope="module", params=["precision", "bits"])
def sweep(request: pytest.FixtureRequest) -> Sweep:
    return load_sweep(SWEEPS / f"{request.param}.py")


def records(sweep: Sweep) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Runs of all arms, their documents and their curves. NVFP4 is worse by 0.05, and its loss by 0.1 at the end."""
    assert sweep.grid is not None
    rng, rows, documents, curves = np.random.default_rng(0), [], [], []
    for arm in map(str, sweep.grid["arm"]):
        for seed in range(sweep.seeds):
            bits = 2.0 + 0.01 * seed + 0.05 * (arm == "nvfp4") + 0.001 * rng.standard_normal(6)
            name = f"{arm}-d64" if sweep.name == "bits" else arm
            run = f"{name}-{seed}"
            rows.append(
                {"run": run, "name": name, "status": "finished", "d_model": 64, "seed": seed, "test_bpb": bits.mean(),
                 "val_bpb": 2.0, "ngram_test_bpb": FLOOR, "flops_run": 1e13, "flops_fwd": 10.0, "params_active": 90,
                 "params_total": 100, "tokens": 10, "n_steps": N_STEPS, "lr": 0.01, "tuned": True,
                 "lr_sensitivity": 0.1}
            )  # fmt: skip
            scores = {"run": run, "document": range(6), "nats": bits * 100 * np.log(2), "n_bytes": 100}
            documents.append(pd.DataFrame(scores))
            steps = np.arange(1, N_STEPS + 1)
            loss = 3.0 + seed + 0.1 * (arm == "nvfp4") * (steps > 2800)
            curves.append(pd.DataFrame({"run": run, "step": steps, "loss": loss}))
    return pd.DataFrame(rows), pd.concat(documents), pd.concat(curves)


def diverging(runs: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The same runs, of which one of an arm diverged at seed 1."""
    runs = runs.copy()
    broken = runs["name"].isin([arm, f"{arm}-d64"]) & (runs["seed"] == 1)
    assert broken.sum() == 1
    runs.loc[broken, "status"] = "diverged"
    return runs


def dots(ax: Axes, row: int, *, hollow: bool = False) -> list[float]:
    """The places of the dots of seeds in a row."""
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "None" and line.get_markersize() < 4]
    near = [line for line in lines if len(line.get_ydata()) and abs(np.mean(np.asarray(line.get_ydata())) - row) < 0.4]
    return sorted(
        float(x) for line in near if (line.get_markerfacecolor() == "white") == hollow for x in line.get_xdata()
    )


def test_an_arm_of_which_a_run_diverged_is_in_no_comparison(sweep: Sweep) -> None:
    assert sweep.tables is not None
    assert sweep.grid is not None
    runs, documents, curves = records(sweep)
    runs = diverging(runs, "mxfp8")
    tables = sweep.tables(runs, pd.DataFrame(), documents=documents, curves=curves)
    assert tables["diverged"].to_dict("records") == [{"arm": "mxfp8", "n_diverged": 1}]
    others = {str(arm) for arm in sweep.grid["arm"]} - {"bf16", "mxfp8"}
    for name in ("differences", "shares", "curves"):
        assert set(tables[name]["arm"]) == others, name
    assert set(tables["arms"]["arm"]) == others | {"bf16"}
    seeds = tables["seeds"]
    assert len(seeds) == len(runs)
    assert seeds.loc[seeds["test_bpb"].isna(), ["arm", "seed"]].to_numpy().tolist() == [["mxfp8", 1]]
    corrected = tables["differences"].set_index("arm").loc["nvfp4"]
    assert corrected["verdict"] == "worse"


def test_curves_are_differences_from_bf16_with_the_same_seed(sweep: Sweep) -> None:
    assert sweep.tables is not None
    runs, documents, curves = records(sweep)
    tables = sweep.tables(runs, pd.DataFrame(), documents=documents, curves=curves)
    found = tables["curves"].set_index(["arm", "step"])
    assert (found["n_pairs"] == sweep.seeds).all()
    for (arm, step), row in found.iterrows():
        expected = 0.1 if arm == "nvfp4" and step > 2800 else 0.0
        assert row[["difference", "low", "high"]].to_numpy(float) == pytest.approx([expected] * 3)
    assert found.index.get_level_values("step").max() == N_STEPS
    if sweep.name == "bits":  # before the branch all arms are one run
        assert found.index.get_level_values("step").min() > 0.8 * N_STEPS
    assert sweep.tables(runs, pd.DataFrame(), documents=documents)["curves"].empty


def test_the_figure_draws_every_seed_the_floor_and_the_curves_if_there_are_some(sweep: Sweep) -> None:
    assert sweep.tables is not None
    assert sweep.figure is not None
    runs, documents, curves = records(sweep)
    runs = diverging(runs, "mxfp8")
    tables = sweep.tables(runs, pd.DataFrame(), documents=documents, curves=curves)
    drawn = sweep.figure(tables)
    above, middle, below = drawn.axes
    rows = [label.get_text() for label in above.get_yticklabels()]
    seeds = tables["seeds"]
    for arm, name in (("bf16", "bf16"), ("nvfp4", "NVFP4"), ("mxfp8", "MXFP8")):
        scores = seeds.loc[seeds["arm"] == arm, "test_bpb"]
        assert dots(above, rows.index(name)) == sorted(scores.dropna())
        assert len(dots(above, rows.index(name), hollow=True)) == scores.isna().sum()
    (floor,) = (line for line in above.get_lines() if line.get_label() == "trigram")
    assert list(floor.get_xdata()) == pytest.approx([FLOOR, FLOOR])
    rows = [label.get_text() for label in middle.get_yticklabels()]
    assert "MXFP8" not in rows
    (interval,) = tables["differences"].query("arm == 'nvfp4'").to_dict("records")
    scale = 100 / seeds.query("arm == 'bf16'")["test_bpb"].mean() if sweep.name == "precision" else 1
    own = scale * seeds.query("arm == 'nvfp4'")["difference"]
    assert dots(middle, rows.index("NVFP4")) == pytest.approx(sorted(own))
    assert float(own.mean()) == pytest.approx(scale * interval["difference"], rel=1e-6)
    assert "Training loss" in below.get_ylabel()
    for line in below.get_lines():
        arm = next((arm for arm, name in sweep_names(sweep).items() if name == line.get_label()), None)
        if arm is not None:
            values = tables["curves"].query("arm == @arm")["difference"]
            assert np.asarray(line.get_ydata()) == pytest.approx(values.to_numpy())
    drawn.draw_without_rendering()
    assert all(ax.get_window_extent().height > 40 for ax in drawn.axes)
    assert len(sweep.figure({**tables, "curves": tables["curves"].iloc[:0]}).axes) == 2


def sweep_names(sweep: Sweep) -> dict[str, str]:
    names: dict[str, str] = sweep.experiment.__globals__["NAMES"]
    return names
