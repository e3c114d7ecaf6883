import numpy as np
import pandas as pd
import pytest

from explore.frontier import hypervolume, hypervolume_difference, hypervolume_interval, pareto_front, seed_bands
from explore.frontier.repeats import repeats

REFERENCE = (1e16, 2.2)
FALLING = (2.0, 1.8, 1.6, 1.4, 1.2)
LEVEL_FRONT = {"falling": FALLING, "flat": (1.5,) * 6, "twelve tied": (1.5,) * 12, "steps": (1.7,) * 3 + (1.5,) * 3}


def costs(n):
    return np.logspace(13, 15, n)


def runs(rng, means, sd=0.02, seeds=3, skewed=False):
    """Runs of points at rising costs, with noise that is normal or has a long upper tail."""
    shape = (len(means), seeds)
    noise = (rng.gamma(2.0, size=shape) - 2.0) / np.sqrt(2.0) if skewed else rng.standard_normal(shape)
    rows = [
        (f"p{i}", cost, seed, means[i] + sd * noise[i, seed])
        for i, cost in enumerate(costs(len(means)))
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["name", "flops_run", "seed", "val_bpb"])


def truth(means):
    return hypervolume(pd.DataFrame({"flops_run": costs(len(means)), "val_bpb": means}), REFERENCE)


def test_the_spread_pooled_over_points_equals_the_hand_calculation():
    table = pd.DataFrame({"name": list("aabbbc"), "flops_run": 1.0, "val_bpb": [1.0, 3.0, 4.0, 5.0, 6.0, 9.0]})
    points = repeats(table, ["name"], "flops_run", "val_bpb")
    assert points.table["n_seeds"].tolist() == [2, 3, 1]
    assert points.error.tolist() == [2.0, 5.0, 9.0]
    assert points.noise.kind == "pooled"  # at one cost, by a test that does not reject equal variances
    np.testing.assert_allclose(points.noise.sd, np.sqrt((2 + 2) / 3))
    np.testing.assert_allclose(points.noise.dof, 3)


def test_bands_are_t_intervals_of_the_pooled_spread():
    table = pd.DataFrame({"name": list("aabb"), "flops_run": [1.0, 1.0, 2.0, 2.0], "val_bpb": [1.0, 3.0, 7.0, 9.0]})
    bands = seed_bands(table, ["name"])
    half = 4.302652729911275 * np.sqrt(2.0) / np.sqrt(2.0)  # t of 2 degrees of freedom, from a table
    np.testing.assert_allclose(bands["low"], [2 - half, 8 - half])
    np.testing.assert_allclose(bands["high"], [2 + half, 8 + half])
    means, tests = ["flops_run", "val_bpb", "low", "high", "n_seeds", "sd"], ["on_front", "p_front", "p_value"]
    assert list(bands.columns) == ["name", *means, *tests, "standing"]


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
def test_95_percent_of_the_bands_hold_the_true_mean(skewed):
    rng, held, true = np.random.default_rng(1), [], np.array(FALLING)
    for _ in range(300):
        bands = seed_bands(runs(rng, FALLING, skewed=skewed), ["name"], n_bootstrap=2)
        held.append(((bands["low"] <= true) & (true <= bands["high"])).mean())
    # 1,500 intervals; the law of the noise with the cost is found from 15 runs, which a long tail costs a few percent
    assert (0.9 if skewed else 0.93) <= np.mean(held) <= 0.97


def test_distant_points_are_resolved_and_ties_are_not():
    bands = seed_bands(runs(np.random.default_rng(0), (2.0, 1.5, 1.5, 1.8)), ["name"])
    assert bands["standing"].tolist() == ["on the front", "on the front", "not resolved", "behind"]
    assert bands["on_front"].equals(pareto_front(bands))


def test_the_probability_of_the_front_equals_the_t_test_for_one_rival():
    from scipy import stats

    bands = seed_bands(runs(np.random.default_rng(4), (1.5, 1.49)), ["name"], n_bootstrap=40_000)
    table = runs(np.random.default_rng(4), (1.5, 1.49)).pivot(index="seed", columns="name", values="val_bpb")
    p = stats.ttest_ind(table["p1"], table["p0"], alternative="less").pvalue
    assert bands["p_front"].tolist() == [1.0, pytest.approx(1 - p, abs=0.01)]
    assert bands["p_value"].tolist() == [1.0, pytest.approx(1 - p, abs=0.01)]


@pytest.mark.slow
@pytest.mark.parametrize("n_tied", [2, 10])
def test_tied_points_are_resolved_at_most_once_in_twenty(n_tied):
    rng, called = np.random.default_rng(2), []
    for i in range(300):
        last = seed_bands(runs(rng, (1.5,) * n_tied), ["name"], n_bootstrap=300, seed=i).iloc[-1]
        called.append((last["standing"] == "behind", last["standing"] == "on the front"))
    behind, front = np.mean(called, axis=0)
    assert behind <= 0.09  # 5% and three standard errors
    assert front <= 0.09
    assert behind >= 0.02  # the test of the largest t statistic is exact, not timid
    assert n_tied > 2 or front >= 0.02


def test_the_better_of_two_points_with_equal_cost_is_on_the_front():
    table = runs(np.random.default_rng(0), (2.0, 1.5)).assign(flops_run=1e13)
    assert seed_bands(table, ["name"])["standing"].tolist() == ["behind", "on the front"]


def test_runs_without_noise_are_resolved():
    bands = seed_bands(runs(np.random.default_rng(0), (2.0, 1.5, 1.6), sd=0.0), ["name"])
    assert bands["standing"].tolist() == ["on the front", "on the front", "behind"]


@pytest.mark.slow
@pytest.mark.parametrize("means", LEVEL_FRONT.values(), ids=LEVEL_FRONT)
def test_each_end_of_the_hypervolume_interval_misses_once_in_forty(means):
    rng, found = np.random.default_rng(3), []
    for i in range(300):
        interval = hypervolume_interval(runs(rng, means), ["name"], REFERENCE, n_bootstrap=300, seed=i)
        found.append((truth(means) < interval.low, truth(means) > interval.high))
    below, above = np.mean(found, axis=0)
    assert max(below, above) <= 0.052  # 2.5% and three standard errors
    assert max(below, above) >= 0.004  # of one end at least; the other may be timid where points are tied


@pytest.mark.slow
def test_the_hypervolume_of_means_is_biased_for_tied_points_and_the_estimate_is_less_biased():
    rng, means, found = np.random.default_rng(5), (1.5,) * 6, []
    for i in range(100):
        table = runs(rng, means)
        naive = hypervolume(table.groupby("name")[["flops_run", "val_bpb"]].mean(), REFERENCE)
        estimate = hypervolume_interval(table, ["name"], REFERENCE, n_bootstrap=300, seed=i).estimate
        found.append((naive - truth(means), estimate - truth(means)))
    naive, corrected = np.mean(found, axis=0)
    assert naive > 0.02
    assert abs(corrected) < 0.65 * naive


@pytest.mark.slow
@pytest.mark.parametrize("means", [FALLING, (1.5,) * 6], ids=["falling", "flat"])
def test_the_interval_of_a_difference_of_hypervolumes_covers_it(means):
    rng, found = np.random.default_rng(6), []
    better = np.array(means) - 0.05
    expected = truth(better) - truth(means)
    for i in range(120):
        table = pd.concat([runs(rng, better).assign(family="a"), runs(rng, means).assign(family="b")])
        interval = hypervolume_difference(table, "family", ("a", "b"), ["name"], REFERENCE, n_bootstrap=300, seed=i)
        found.append(interval.low <= expected <= interval.high)
    assert np.mean(found) >= 0.89  # 95% less three standard errors
    assert interval.low > 0


def test_without_noise_the_interval_is_the_hypervolume():
    table = runs(np.random.default_rng(0), (2.0, 1.5, 1.7, 2.5), sd=0.0)
    interval = hypervolume_interval(table, ["name"], REFERENCE)
    for number in (interval.estimate, interval.low, interval.high):
        assert number == pytest.approx(hypervolume(table, REFERENCE))


def test_single_runs_have_no_spread_and_are_refused():
    table = runs(np.random.default_rng(0), FALLING, seeds=1)
    for function in (lambda: seed_bands(table, ["name"]), lambda: hypervolume_interval(table, ["name"], REFERENCE)):
        with pytest.raises(ValueError, match="no point has two runs"):
            function()


def test_a_wrong_column_level_or_cost_is_named():
    table = runs(np.random.default_rng(0), FALLING)
    with pytest.raises(ValueError, match="got none named 'test_bpb'; its columns: "):
        seed_bands(table, ["name"], error="test_bpb")
    with pytest.raises(ValueError, match="got none named 'size'; its columns: "):
        seed_bands(table, ["size"])
    with pytest.raises(ValueError, match=r"level: must lie between 0 and 1, got 95"):
        seed_bands(table, ["name"], level=95)
    with pytest.raises(ValueError, match="flops_run: must be positive on a log axis, got 0"):
        hypervolume_interval(table.assign(flops_run=0.0), ["name"], REFERENCE)
