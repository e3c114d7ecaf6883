import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from explore.frontier import crossover, effective_compute, fit_power_laws
from explore.frontier.curves import bounds, curves, refit

E, C_0 = 0.9, 1e16
A = {"attention": 0.5, "hybrid": 0.45, "mamba": 0.4}
ALPHA = {"attention": 0.25, "hybrid": 0.3, "mamba": 0.2}


def loss(family, compute):
    return E + A[family] * (compute / C_0) ** -ALPHA[family]


def runs(rng, sd=0.005, points=6, seeds=3, decades=2.0, families=tuple(A), bend=0.0, shared=0.0):
    rows, moves = [], shared * rng.standard_normal(seeds)
    for family in families:
        for compute in C_0 / 10 * np.logspace(0, decades, points):
            off = bend * math.sin(3 * math.log10(compute))
            rows += [
                (family, compute, seed, loss(family, compute) + off + moves[seed] + sd * rng.standard_normal())
                for seed in range(seeds)
            ]
    return pd.DataFrame(rows, columns=["family", "flops_run", "seed", "val_bpb"])


def times(compute):
    """The compute at which attention has the loss of hybrid at `compute`, divided by `compute`, solved numerically."""
    found = optimize.brentq(
        lambda log_c: loss("attention", math.exp(log_c)) - loss("hybrid", compute), math.log(1e8), math.log(1e24)
    )
    return math.exp(found) / compute


def crossing(a, b):
    return math.exp(optimize.brentq(lambda log_c: loss(a, math.exp(log_c)) - loss(b, math.exp(log_c)), 23.0, 58.0))


def test_laws_without_noise_are_recovered():
    laws = fit_power_laws(runs(np.random.default_rng(0), sd=0.0), n_bootstrap=10)
    assert laws.irreducible == pytest.approx(E, rel=1e-6)
    assert laws.compute_0 == pytest.approx(C_0)
    assert dict(laws.amplitude) == pytest.approx(A, rel=1e-5)
    assert dict(laws.exponent) == pytest.approx(ALPHA, rel=1e-5)
    predicted = laws.predict("mamba", [1e14, 1e16, 1e18])
    np.testing.assert_allclose(predicted["loss"], loss("mamba", predicted["compute"]), rtol=1e-7)
    assert predicted["extrapolated"].tolist() == [True, False, True]
    assert laws.ranges["mamba"] == (pytest.approx(1e15), pytest.approx(1e17))


def test_amplitudes_are_the_reducible_loss_at_the_mean_compute_in_any_unit():
    table = runs(np.random.default_rng(0), sd=0.001)
    one = fit_power_laws(table, n_bootstrap=10)
    other = fit_power_laws(table.assign(flops_run=table["flops_run"] * 1e6), n_bootstrap=10)
    assert dict(other.amplitude) == pytest.approx(dict(one.amplitude), rel=1e-6)
    assert other.compute_0 == pytest.approx(1e6 * one.compute_0)


def test_the_fit_of_many_data_sets_at_once_is_scipys_of_each():
    table = runs(np.random.default_rng(0), sd=0.01)
    which, log_c = pd.factorize(table["family"])[0], np.log(table["flops_run"] / C_0).to_numpy()
    start = np.log([E, *A.values(), *ALPHA.values()])
    y = curves(start[None], which, log_c) + 0.01 * np.random.default_rng(1).standard_normal((20, len(table)))
    low, high = bounds(3, y.min())
    for row, found in zip(y, refit(start, which, log_c, y), strict=True):
        fit = optimize.least_squares(
            lambda theta, row=row: curves(theta[None], which, log_c)[0] - row,
            start,
            bounds=(low, high),
            xtol=1e-12,
            ftol=1e-12,
            x_scale="jac",
        )
        ours = 0.5 * ((curves(found[None], which, log_c)[0] - row) ** 2).sum()
        assert ours <= fit.cost * (1 + 1e-5)


def covered(n, **changes):
    """Coverage of every interval; `misfit` is the rejection rate of the test of fit."""
    rng, held = np.random.default_rng(1), []
    for i in range(n):
        laws = fit_power_laws(runs(rng, **changes), n_bootstrap=300, seed=i)
        found = {"misfit": laws.p_fit < 0.05}
        for row in laws.table().itertuples():
            scale = (laws.compute_0 / C_0) ** -ALPHA.get(row.family, 0.0)
            true = {"E": E, "A": A.get(row.family, 0.0) * scale, "alpha": ALPHA.get(row.family)}[row.parameter]
            found[f"{row.parameter} {row.family}"] = row.low <= true <= row.high
        for row in laws.predict("attention", [1e15, 1e16, 1e17, 1e18]).itertuples():
            found[f"law at {row.compute:.0e}"] = row.low <= loss("attention", row.compute) <= row.high
        factor = effective_compute(laws, "hybrid", "attention", compute=2e16)
        found["factor at compute"] = factor.low <= times(2e16) <= factor.high
        factor = effective_compute(laws, "hybrid", "attention", loss=loss("hybrid", 2e16))
        found["factor at loss"] = factor.low <= times(2e16) <= factor.high
        for a, b in (("attention", "hybrid"), ("hybrid", "mamba")):
            cross = crossover(laws, a, b, n_grid=201)
            found[f"crossing of {a} and {b}"] = cross.low <= crossing(a, b) <= cross.high
        held.append(found)
    return pd.DataFrame(held).mean()


def check_coverage(shares):
    misfit = shares.pop("misfit")
    assert shares.between(0.90, 0.995).all(), shares
    assert 0.93 <= shares.mean() <= 0.97, shares
    return misfit


@pytest.mark.slow
def test_95_percent_of_all_intervals_of_laws_hold_the_truth():
    assert check_coverage(covered(150)) == pytest.approx(0.05, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"seeds": 1, "points": 5, "sd": 0.01}, {"decades": 1.0, "sd": 0.003}, {"sd": 0.02}, {"shared": 0.01}],
    ids=["five points, one seed", "one decade", "much noise", "seeds that move all"],
)
def test_95_percent_of_all_intervals_of_laws_hold_the_truth_in_harder_data(changes):
    check_coverage(covered(150, **changes))


def test_laws_that_do_not_fit_are_detected():
    assert fit_power_laws(runs(np.random.default_rng(0), bend=0.02), n_bootstrap=10).p_fit < 1e-6
    assert math.isnan(fit_power_laws(runs(np.random.default_rng(0), seeds=1), n_bootstrap=10).p_fit)


def test_a_common_effect_of_a_seed_widens_the_band_of_a_law_but_not_the_multiplier():
    one, other = (
        fit_power_laws(runs(np.random.default_rng(0), shared=shared), n_bootstrap=500) for shared in (0.0, 0.1)
    )
    widths = [laws.predict("hybrid", C_0)["high"] - laws.predict("hybrid", C_0)["low"] for laws in (one, other)]
    assert widths[1].item() > 10 * widths[0].item()
    factors = [effective_compute(laws, "hybrid", "attention", compute=C_0) for laws in (one, other)]
    assert factors[0].high - factors[0].low == pytest.approx(factors[1].high - factors[1].low, rel=0.3)


def test_a_bootstrap_is_reproducible_by_its_seed():
    table = runs(np.random.default_rng(0))
    one, same, other = (fit_power_laws(table, n_bootstrap=20, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.draws, same.draws)
    assert not np.array_equal(one.draws, other.draws)
    pd.testing.assert_frame_equal(
        fit_power_laws(table.sample(frac=1, random_state=0), n_bootstrap=20).table()[["family", "estimate"]],
        one.table()[["family", "estimate"]],
    )


def test_too_few_points_of_compute_are_refused_by_family_and_number():
    table = runs(np.random.default_rng(0))
    least = table["flops_run"].min()
    few = (table["family"] == "mamba") & (table["flops_run"].rank(method="dense") <= 2)
    with pytest.raises(ValueError, match="family: 'mamba' has 4 points of compute; at least 5 are needed"):
        fit_power_laws(table[~few])
    with pytest.raises(ValueError, match="has 1 points of compute"):  # five within 2% are one
        fit_power_laws(table.assign(flops_run=least * (1 + 0.0001 * np.arange(len(table)))))
    with pytest.raises(ValueError, match="flops_run: must be positive"):
        fit_power_laws(table.assign(flops_run=-1.0))


def test_a_variant_compared_with_itself_has_multiplier_one():
    laws = fit_power_laws(runs(np.random.default_rng(0)), n_bootstrap=50)
    same = effective_compute(laws, "hybrid", "hybrid", compute=C_0)
    assert (same.factor, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    assert not same.extrapolated
    for end in laws.ranges["hybrid"]:
        assert not effective_compute(laws, "hybrid", "hybrid", compute=end).extrapolated


def test_multipliers_at_a_compute_and_at_its_loss_agree_and_extrapolation_is_marked():
    laws = fit_power_laws(runs(np.random.default_rng(0), sd=0.0), n_bootstrap=10)
    one = effective_compute(laws, "hybrid", "attention", compute=2e16)
    other = effective_compute(laws, "hybrid", "attention", loss=one.loss)
    assert one.factor == pytest.approx(other.factor) == pytest.approx(times(2e16), rel=1e-4)
    assert one.baseline_compute == pytest.approx(one.factor * 2e16)
    assert (one.variant, one.baseline, one.extrapolated) == ("hybrid", "attention", False)
    assert effective_compute(laws, "hybrid", "attention", compute=9e16).extrapolated  # the baseline's lies beyond
    assert effective_compute(laws, "hybrid", "attention", compute=1e18).extrapolated


def test_an_undefined_multiplier_is_refused():
    laws = fit_power_laws(runs(np.random.default_rng(0)), n_bootstrap=10)
    with pytest.raises(ValueError, match=r"loss: 0\.1 is never reached; the irreducible loss is 0\.[89]"):
        effective_compute(laws, "hybrid", "attention", loss=0.1)
    with pytest.raises(ValueError, match="compute, loss: exactly one must be given"):
        effective_compute(laws, "hybrid", "attention")
    with pytest.raises(ValueError, match="family: 'moe' has no law; there are attention, hybrid, mamba"):
        effective_compute(laws, "moe", "attention", compute=1e16)
    with pytest.raises(ValueError, match="a, b: must be two different families, got 'mamba' twice"):
        crossover(laws, "mamba", "mamba")


def test_a_loss_that_some_draws_never_reach_has_an_infinite_interval():
    laws = fit_power_laws(runs(np.random.default_rng(0), sd=0.02), n_bootstrap=300)
    found = effective_compute(laws, "hybrid", "attention", loss=laws.irreducible + 1e-6)
    assert found.high == math.inf
    assert found.extrapolated


def test_a_crossing_within_the_data_names_the_better_family_on_each_side():
    laws = fit_power_laws(runs(np.random.default_rng(0), sd=0.001), n_bootstrap=200)
    found = crossover(laws, "hybrid", "mamba")
    assert found.compute == pytest.approx(crossing("hybrid", "mamba"), rel=0.1)
    assert found.low < found.compute < found.high < 1.5 * found.low
    assert (found.better_below, found.better_above) == ("mamba", "hybrid")
    assert found.p_in_range == pytest.approx(1.0)
    assert not found.extrapolated


def test_a_crossing_outside_the_data_is_labelled_and_may_be_absent():
    laws = fit_power_laws(runs(np.random.default_rng(0), sd=0.0005, decades=1.0), n_bootstrap=200)
    beyond = crossover(laws, "hybrid", "mamba")  # at 3e16, and the data end at 1e16
    assert beyond.extrapolated
    assert beyond.compute == pytest.approx(crossing("hybrid", "mamba"), rel=0.5)
    assert beyond.p_in_range < 0.05 < 0.9 < beyond.p_in_tenfold
    table = runs(np.random.default_rng(0), sd=0.0005, families=("attention",))
    better = table.assign(family="better", val_bpb=E + 0.8 * (table["val_bpb"] - E))
    none = crossover(fit_power_laws(pd.concat([table, better]), n_bootstrap=200), "attention", "better")
    assert math.isnan(none.compute)
    assert math.isnan(none.low)
    assert math.isnan(none.high)
    assert none.p_in_tenfold == 0.0
    assert none.better_below == none.better_above == "better"


def test_families_that_may_be_the_same_have_an_open_interval_for_their_crossing():
    rng, open_ended = np.random.default_rng(3), []
    for i in range(15):
        one, other = (runs(rng, sd=0.01, families=("attention",)) for _ in range(2))
        laws = fit_power_laws(pd.concat([one, other.assign(family="twin")]), n_bootstrap=200, seed=i)
        found = crossover(laws, "attention", "twin", n_grid=101)
        open_ended.append((found.low == 0.0, found.high == math.inf))
    assert np.min(np.mean(open_ended, axis=0)) >= 0.6  # at either end, and nearly always at one
    assert np.mean(np.any(open_ended, axis=1)) >= 0.8
