"""The noise of one run at each size, and its use in intervals, laws and tests of equivalence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from explore.frontier import (
    bartlett,
    compare,
    effective_compute,
    fit_noise,
    fit_power_laws,
    reducible_ratio,
    seed_bands,
)

WIDTHS = (24, 32, 48, 64, 96)
SDS = {24: 0.028, 32: 0.011, 48: 0.0075, 64: 0.0042, 96: 0.003}
"""Noise that falls with the width about as it did in the first studies."""


def falling(width: int) -> float:
    return 0.02 * (width / 24) ** -1.5


def runs(
    rng: np.random.Generator,
    effects: dict[str, float],
    sizes: tuple[int, ...] = WIDTHS,
    seeds: int = 3,
    sd: Any = falling,
) -> pd.DataFrame:
    rows = [
        (arm, size, seed, 2.0 + effect - size / 1000 + sd(size) * rng.standard_normal())
        for size in sizes
        for arm, effect in effects.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["arm", "d_model", "seed", "test_bpb"])


def test_bartletts_p_equals_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    samples = [scale * rng.standard_normal(n) for scale, n in ((1, 5), (2, 4), (0.5, 7))]
    squares = np.array([((each - each.mean()) ** 2).sum() for each in samples])
    dof = np.array([len(each) - 1.0 for each in samples])
    assert bartlett(squares, dof) == pytest.approx(stats.bartlett(*samples).pvalue)
    assert math.isnan(bartlett(squares[:1], dof[:1]))
    assert bartlett(squares * [1, 0, 1], dof) == 0.0


def test_a_power_law_of_the_noise_is_recovered_and_two_sizes_are_fitted_separately() -> None:
    sizes, dof = np.array(WIDTHS, dtype=float), np.full(5, 8.0)
    exact = np.array([falling(width) ** 2 for width in WIDTHS]) * dof
    noise = fit_noise(exact, dof, sizes)
    assert noise.kind == "power"
    assert noise.exponent == pytest.approx(-1.5)
    np.testing.assert_allclose(noise.sd**2 * dof, exact)
    assert (noise.dof > 8).all()  # each size borrows from the others
    assert noise.dof.max() < 40  # and one pool would have the dof of all
    two = fit_noise(exact[:2], dof[:2], sizes[:2], "power")
    np.testing.assert_allclose(two.dof, [8, 8])
    np.testing.assert_allclose(two.sd, fit_noise(exact[:2], dof[:2], kind="own").sd)


def test_the_power_is_the_maximum_of_the_likelihood() -> None:
    rng, sizes = np.random.default_rng(3), np.array(WIDTHS, dtype=float)
    dof = np.array([4.0, 8.0, 2.0, 6.0, 4.0])
    squares = np.array([falling(width) ** 2 for width in WIDTHS]) * rng.chisquare(dof)

    def minus_log_likelihood(theta: Any) -> float:
        log_variance = theta[0] + theta[1] * np.log(sizes / 40)
        return float((dof * log_variance + squares / np.exp(log_variance)).sum())

    from scipy import optimize

    found = optimize.minimize(
        minus_log_likelihood, [-8.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    )
    noise = fit_noise(squares, dof, sizes, "power")
    assert noise.exponent == pytest.approx(found.x[1] / 2, rel=1e-4)


def test_noise_that_violates_the_power_law_is_estimated_per_size() -> None:
    sizes, dof = np.array(WIDTHS, dtype=float), np.full(5, 20.0)
    squares = dof * np.array([1.0, 0.01, 1.0, 0.01, 1.0])
    noise = fit_noise(squares, dof, sizes)
    assert noise.kind == "own"
    np.testing.assert_allclose(noise.dof, dof)


def test_one_pool_needs_a_test_of_equal_variances() -> None:
    table = runs(np.random.default_rng(0), {"base": 0.0, "a": 0.0, "b": 0.0}, seeds=5)
    with pytest.raises(ValueError, match=r"noise: must not be 'pooled', as Bartlett's test rejects .*\(p = "):
        compare(table, "arm", "base", by=["d_model"], noise="pooled")
    found = compare(table, "arm", "base", by=["d_model"])
    assert found["noise"].unique().tolist() == ["power"]
    assert (found["bartlett_p"] < 0.05).all()
    sd = found.groupby("d_model")["sd"].first()
    assert sd.is_monotonic_decreasing
    even = runs(np.random.default_rng(0), {"base": 0.0, "a": 0.0}, seeds=5, sd=lambda size: 0.01)
    assert compare(even, "arm", "base", by=["d_model"], noise="pooled")["noise"].unique().tolist() == ["pooled"]


def test_an_average_over_sizes_has_the_error_of_its_parts() -> None:
    table = runs(np.random.default_rng(0), {"base": 0.0, "a": 0.0, "b": 0.0})
    apart = compare(table, "arm", "base", by=["d_model"], noise="own").set_index(["arm", "d_model"])
    over = compare(table, "arm", "base", strata=["d_model"], noise="own").set_index("arm")
    for arm in ("a", "b"):
        errors = apart.loc[arm, "sd"].to_numpy() * math.sqrt(2 / 3)
        error = math.sqrt((errors**2).sum()) / len(errors)
        dof = (errors**2).sum() ** 2 / (errors**4 / apart.loc[arm, "dof"].to_numpy()).sum()
        half = stats.t.ppf(0.975, dof) * error
        assert over.loc[arm, "high"] - over.loc[arm, "difference"] == pytest.approx(half)
        assert over.loc[arm, "resolvable"] == pytest.approx(half + stats.t.ppf(0.8, dof) * error)


def test_two_one_sided_tests_equal_scipy_and_give_the_verdict_equivalent() -> None:
    table = runs(np.random.default_rng(0), {"base": 0.0, "same": 0.0}, sizes=(64,), seeds=6, sd=lambda size: 0.001)
    (row,) = compare(table, "arm", "base", margin=0.005).to_dict("records")
    one, other = (table.loc[table["arm"] == arm, "test_bpb"].to_numpy() for arm in ("same", "base"))
    gap = one - other
    p = max(
        stats.ttest_1samp(gap, -0.005, alternative="greater").pvalue,
        stats.ttest_1samp(gap, 0.005, alternative="less").pvalue,
    )
    assert row["p_equivalent"] == pytest.approx(p)
    assert row["verdict"] == "equivalent"
    assert compare(table, "arm", "base", margin=1e-6)["verdict"].tolist() == ["not resolved"]
    assert compare(table, "arm", "base")["p_equivalent"].isna().all()
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        compare(table, "arm", "base", margin=0)


@pytest.mark.slow
def test_arms_at_the_margin_are_called_equivalent_once_in_twenty() -> None:
    rng = np.random.default_rng(2)
    called = [
        compare(runs(rng, {"base": 0.0, "a": 0.01}), "arm", "base", strata=["d_model"], margin=0.01)["p_equivalent"][0]
        <= 0.05
        for _ in range(400)
    ]
    assert np.mean(called) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "own", "power"])
def test_95_percent_of_intervals_hold_the_truth_at_every_size(kind: Any) -> None:
    rng, held = np.random.default_rng(1), []
    effects = {"base": 0.0, "a": 0.0, "b": 0.01}
    for _ in range(300):
        found = compare(runs(rng, effects), "arm", "base", by=["d_model"], noise=kind)
        true = found["arm"].map(effects)
        held.append(((found["low"] <= true) & (true <= found["high"])).groupby(found["d_model"]).mean())
    share = pd.concat(held, axis=1).mean(axis=1)
    assert share.between(0.92, 0.98).all(), share
    assert 0.93 <= share.mean() <= 0.97


@pytest.mark.slow
def test_bands_of_falling_noise_cover_the_truth_and_one_pool_does_not() -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(200):
        table = runs(rng, {"base": 0.0, "a": 0.1})
        table["flops_run"] = table["d_model"] ** 4.0 * (1 + (table["arm"] == "a"))
        bands = seed_bands(table, ["arm", "d_model"], error="test_bpb", n_bootstrap=2)
        true = 2.0 + 0.1 * (bands["arm"] == "a") - bands["d_model"] / 1000
        held.append(((bands["low"] <= true) & (true <= bands["high"])).groupby(bands["d_model"]).mean())
    share = pd.concat(held, axis=1).mean(axis=1)
    assert share.between(0.9, 0.98).all(), share


def law_runs(rng: np.random.Generator, seeds: int = 3, ratio: float = 0.9, trunk_sd: float = 0.0) -> pd.DataFrame:
    """Runs of two families with one exponent. Noise falls with compute, and each seed of a family is one trunk."""
    rows = []
    for family, amplitude in (("base", 0.5), ("new", 0.5 * ratio)):
        for seed in range(seeds):
            trunk = trunk_sd * rng.standard_normal()
            for compute in np.logspace(-1, 1, 6):
                sd = 0.008 * compute**-0.4
                off = trunk + (0.2 if trunk_sd else 1.0) * sd * rng.standard_normal()
                rows.append((family, compute * 1e15, seed, 0.9 + amplitude * compute**-0.25 + off))
    return pd.DataFrame(rows, columns=["family", "flops_run", "seed", "val_bpb"])


def test_the_offset_of_laws_with_a_shared_exponent_is_recovered() -> None:
    table = law_runs(np.random.default_rng(0)).assign(
        val_bpb=lambda each: 0.9 + np.where(each["family"] == "new", 0.45, 0.5) * (each["flops_run"] / 1e15) ** -0.25
    )
    laws = fit_power_laws(table, n_bootstrap=10, shared_exponent=True)
    assert reducible_ratio(laws, "new", "base").estimate == pytest.approx(0.9, rel=1e-5)
    assert dict(laws.exponent) == pytest.approx({"base": 0.25, "new": 0.25}, rel=1e-4)
    factors = [effective_compute(laws, "new", "base", compute=each).factor for each in (2e14, 5e15)]
    assert factors == pytest.approx([0.9**-4, 0.9**-4], rel=1e-3)
    with pytest.raises(ValueError, match="laws must have a shared exponent"):
        reducible_ratio(fit_power_laws(law_runs(np.random.default_rng(0)), n_bootstrap=10), "new", "base")


def test_laws_estimate_how_noise_falls_with_compute() -> None:
    laws = fit_power_laws(law_runs(np.random.default_rng(0), seeds=20), n_bootstrap=10)
    assert laws.sd_exponent == pytest.approx(-0.4, abs=0.08)
    assert laws.sd == pytest.approx(0.008, rel=0.15)
    with pytest.raises(ValueError, match="Bartlett's test rejects equal variances"):
        fit_power_laws(law_runs(np.random.default_rng(0), seeds=20), n_bootstrap=10, noise="pooled")


def offsets_held(n: int, seeds: int, trunk_sd: float, trunk: str | None) -> float:
    rng, held = np.random.default_rng(4), []
    for i in range(n):
        laws = fit_power_laws(
            law_runs(rng, seeds, trunk_sd=trunk_sd),
            pair=None,
            n_bootstrap=200,
            seed=i,
            shared_exponent=True,
            trunk=trunk,
        )
        interval = reducible_ratio(laws, "new", "base")
        held.append(interval.low <= 0.9 <= interval.high)
    return float(np.mean(held))


@pytest.mark.slow
def test_95_percent_of_offsets_hold_the_truth() -> None:
    share = offsets_held(200, seeds=3, trunk_sd=0.0, trunk=None)
    print(f"offset of a shared-exponent law: {share:.1%} of 200 intervals hold the truth")
    assert 0.9 <= share <= 0.98


@pytest.mark.slow
def test_points_of_one_trunk_are_resampled_together_or_the_interval_is_too_narrow() -> None:
    together = offsets_held(150, seeds=4, trunk_sd=0.01, trunk="seed")
    alone = offsets_held(150, seeds=4, trunk_sd=0.01, trunk=None)
    print(f"offset over rungs of a trunk: {together:.1%} by trunk, {alone:.1%} by point")
    assert 0.9 <= together <= 0.98
    assert alone < 0.85


def test_a_family_of_one_trunk_is_refused() -> None:
    table = law_runs(np.random.default_rng(0), seeds=1)
    with pytest.raises(ValueError, match="seed: 'base' must have at least two trunks, got one"):
        fit_power_laws(table, pair=None, n_bootstrap=10, trunk="seed")
