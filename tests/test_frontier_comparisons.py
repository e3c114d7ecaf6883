import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from explore.frontier import (
    cluster_interval,
    compare,
    holm,
    n_for_half_width,
    paired_curves,
    seeds_table,
    success_difference,
    success_fraction,
)

EFFECTS = {"base": 1.0, "a": 1.0, "b": 1.0, "c": 1.0, "d": 0.97}


def runs(rng, effects, sd=0.01, seeds=3, sizes=(64, 128), shared=0.05):
    """Runs in which a seed shifts all arms of a size equally, by far more than their own noise."""
    rows = []
    for size in sizes:
        moves = shared * rng.standard_normal(seeds)
        rows += [
            (arm, size, seed, effect - size / 1000 + moves[seed] + sd * rng.standard_normal())
            for arm, effect in effects.items()
            for seed in range(seeds)
        ]
    return pd.DataFrame(rows, columns=["arm", "d_model", "seed", "test_bpb"])


def test_holm_equals_a_worked_example():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]


def test_two_arms_at_one_size_are_the_paired_t_test():
    table = runs(np.random.default_rng(0), {"base": 1.0, "a": 0.98}, seeds=5, sizes=(64,))
    (row,) = compare(table, "arm", "base").to_dict("records")
    a, base = (table.loc[table["arm"] == arm, "test_bpb"].to_numpy() for arm in ("a", "base"))
    test = stats.ttest_rel(a, base)
    ends = test.confidence_interval(0.95)
    assert row["difference"] == pytest.approx(np.mean(a - base))
    assert (row["low"], row["high"]) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert row["p"] == row["p_holm"] == pytest.approx(test.pvalue)
    assert (row["n_pairs"], row["dof"]) == (5, 4)


def test_more_arms_and_sizes_pool_the_noise_of_randomised_blocks():
    table = runs(np.random.default_rng(0), EFFECTS)
    found = compare(table, "arm", "base", by=["d_model"], noise="pooled")
    centred = table["test_bpb"] - table.groupby(["d_model", "arm"])["test_bpb"].transform("mean")
    centred -= centred.groupby([table["d_model"], table["seed"]]).transform("mean")
    dof = 2 * (5 - 1) * (3 - 1)
    assert found["dof"].unique().tolist() == [dof]
    np.testing.assert_allclose(found["sd"], np.sqrt((centred**2).sum() / dof))
    np.testing.assert_allclose(found["high"] - found["difference"], 2.1199 * found["sd"] * np.sqrt(2 / 3), rtol=1e-4)
    means = table.pivot_table(index="d_model", columns="arm", values="test_bpb")
    expected = [means.loc[row.d_model, row.arm] - means.loc[row.d_model, "base"] for row in found.itertuples()]
    np.testing.assert_allclose(found["difference"], expected)


def test_a_difference_over_strata_is_the_mean_of_theirs():
    table = runs(np.random.default_rng(0), EFFECTS)
    apart = compare(table, "arm", "base", by=["d_model"]).groupby("arm")["difference"].mean()
    over = compare(table, "arm", "base", strata=["d_model"]).set_index("arm")
    pd.testing.assert_series_equal(over["difference"].sort_index(), apart)
    assert over["n_pairs"].tolist() == [6, 6, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("by", [["d_model"], []], ids=["by size", "over sizes"])
def test_95_percent_of_intervals_hold_the_difference_and_holm_errs_one_time_in_twenty(by):
    rng, held, wrong, alone = np.random.default_rng(1), [], [], []
    strata = [] if by else ["d_model"]
    for _ in range(250):
        found = compare(runs(rng, EFFECTS), "arm", "base", by=by, strata=strata)
        true = found["arm"].map(EFFECTS) - 1.0
        held.append(((found["low"] <= true) & (true <= found["high"])).mean())
        wrong.append((found.loc[true == 0, "verdict"] != "not resolved").any())
        alone.append((found.loc[true == 0, "p"] <= 0.05).any())
    assert 0.93 <= np.mean(held) <= 0.97  # 1,000 intervals or more, four to a baseline
    assert np.mean(wrong) <= 0.09  # 5% and three standard errors
    assert np.mean(alone) > 0.09  # as it would be without the correction
    assert found.loc[found["arm"] == "d", "difference"].mean() == pytest.approx(-0.03, abs=0.02)


def test_verdicts_need_a_declared_better_direction():
    table = runs(np.random.default_rng(0), {"base": 1.0, "good": 0.5, "bad": 1.5, "same": 1.0})
    found = compare(table, "arm", "base", strata=["d_model"]).set_index("arm")["verdict"]
    assert found.to_dict() == {"good": "better", "bad": "worse", "same": "not resolved"}
    found = compare(table, "arm", "base", strata=["d_model"], better="higher").set_index("arm")["verdict"]
    assert found.to_dict() == {"good": "worse", "bad": "better", "same": "not resolved"}


def test_only_primary_comparisons_are_adjusted_and_have_a_verdict():
    table = runs(np.random.default_rng(0), EFFECTS)
    found = compare(table, "arm", "base", by=["d_model"], primary=["a", (128, "d")])
    named = found["primary"].to_numpy()
    assert [(row.d_model, row.arm) for row in found[named].itertuples()] == [(64, "a"), (128, "a"), (128, "d")]
    np.testing.assert_allclose(found.loc[named, "p_holm"], holm(found.loc[named, "p"].to_numpy()))
    assert found.loc[~named, "p_holm"].isna().all()
    assert set(found.loc[~named, "verdict"]) == {"exploratory"}


def test_a_missing_run_keeps_its_seed_for_the_other_arms():
    table = runs(np.random.default_rng(0), EFFECTS, seeds=4, sizes=(64,))
    less = table[~((table["arm"] == "a") & (table["seed"] == 3))]
    found = compare(less, "arm", "base").set_index("arm")
    assert found["n_pairs"].to_dict() == {"a": 3, "b": 4, "c": 4, "d": 4}
    assert abs(found.loc["a", "difference"]) < 0.02  # the seeds differ by more


def test_invalid_comparisons_are_refused_by_name():
    table = runs(np.random.default_rng(0), EFFECTS, sizes=(64,))
    with pytest.raises(ValueError, match="arm: the baseline 'gone' has no run"):
        compare(table, "arm", "gone")
    with pytest.raises(ValueError, match="seed: 'a' shares 2 with the baseline; at least 3"):
        compare(table[table["seed"] < 2], "arm", "base")
    with pytest.raises(ValueError, match="two rows have the same arm, seed"):
        compare(pd.concat([table, table]), "arm", "base")
    with pytest.raises(ValueError, match="primary: 'e' is not a comparison"):
        compare(table, "arm", "base", primary=["e"])
    with pytest.raises(ValueError, match="arm: must have an arm other than the baseline"):
        compare(table.assign(d_model=(table["arm"] == "base")), "arm", "base", by=["d_model"])
    with pytest.raises(ValueError, match="got none named 'size' and 'recall'; its columns: "):
        compare(table, "arm", "base", by=["size"], value="recall")


def test_the_number_of_pairs_is_the_least_whose_interval_is_narrow_enough():
    for half_width in (0.5, 1.0, 2.0):
        n = n_for_half_width(1.0, half_width)
        widths = [stats.t.ppf(0.975, k - 1) * math.sqrt(2 / k) for k in (n - 1, n)]
        assert widths[1] <= half_width < widths[0]
    assert n_for_half_width(1.0, 100.0) == 3
    with pytest.raises(ValueError, match="sd: must be positive, got 0"):
        n_for_half_width(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("n_clusters", "a", "b"), [(67, 4, 2), (23, 4, 2), (12, 8, 1)])
def test_95_percent_of_cluster_intervals_hold_the_mean_over_paradigms(n_clusters, a, b):
    rng, held, narrow = np.random.default_rng(1), [], []
    for i in range(300):
        accuracy = rng.binomial(200, rng.beta(a, b, size=n_clusters)) / 200
        scores = pd.DataFrame({"uid": np.arange(n_clusters), "accuracy": accuracy})
        interval = cluster_interval(scores, n_bootstrap=500, seed=i)
        held.append(interval.low <= a / (a + b) <= interval.high)
        sentences = success_fraction(round(200 * accuracy.sum()), 200 * n_clusters)
        narrow.append(sentences.low <= a / (a + b) <= sentences.high)
    assert 0.91 <= np.mean(held) <= 0.99
    assert np.mean(narrow) < 0.6  # the value if sentences were independent


@pytest.mark.slow
def test_a_paired_difference_by_paradigm_holds_the_truth_and_is_narrower():
    rng, held = np.random.default_rng(2), []
    for i in range(300):
        p = rng.uniform(0.5, 0.9, size=23)
        one, other = (
            pd.DataFrame({"uid": np.arange(23), "accuracy": rng.binomial(500, p + gain) / 500}) for gain in (0.03, 0.0)
        )
        interval = cluster_interval(one, baseline=other.iloc[::-1], n_bootstrap=500, seed=i)
        held.append(interval.low <= 0.03 <= interval.high)
    assert 0.91 <= np.mean(held) <= 0.99
    assert interval.half_width < 0.5 * cluster_interval(one).half_width


def test_rows_of_a_cluster_are_averaged_first():
    scores = pd.DataFrame({"uid": list("abcdef"), "accuracy": [0.5, 0.6, 0.7, 0.8, 0.9, 0.65]})
    twice = pd.concat([scores, scores.iloc[:2].assign(accuracy=[0.5, 0.6])])
    assert cluster_interval(scores) == cluster_interval(twice)
    with pytest.raises(ValueError, match="uid: both models must have the same; only one has f"):
        cluster_interval(scores, baseline=scores.iloc[:5])
    with pytest.raises(ValueError, match="uid: must have at least 5 clusters, got 4"):
        cluster_interval(scores.iloc[:4])


def test_wilson_and_newcombe_equal_published_values():
    interval = success_fraction(81, 263)  # Newcombe 1998a, table I
    assert (interval.low, interval.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    interval = success_difference(56, 70, 48, 80)  # Newcombe 1998b, table II, method 10
    assert (interval.low, interval.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


@pytest.mark.parametrize(("n", "p", "q"), [(10, 0.5, 0.5), (6, 0.9, 0.5), (12, 0.97, 0.7)])
def test_intervals_of_few_successes_hold_the_truth_19_times_in_20(n, p, q):
    chance, other = (stats.binom.pmf(np.arange(n + 1), n, share) for share in (p, q))
    alone = [success_fraction(k, n) for k in range(n + 1)]
    assert sum(c for c, i in zip(chance, alone, strict=True) if i.low <= p <= i.high) >= 0.93
    held = 0.0
    for k in range(n + 1):
        for j in range(n + 1):
            interval = success_difference(k, n, j, n)
            held += chance[k] * other[j] * (interval.low <= p - q <= interval.high)
    assert 0.93 <= held <= 0.99


def test_more_successes_than_runs_are_refused():
    with pytest.raises(ValueError, match="successes: must lie between 0 and n, and n above 0, got 4 of 3"):
        success_fraction(4, 3)


def test_seeds_and_curves_are_paired_with_the_run_of_the_same_seed_and_size():
    keys = [(width, arm, seed) for width in (32, 48) for arm in ("a", "b") for seed in (0, 1)]
    runs = pd.DataFrame(keys, columns=["d_model", "arm", "seed"]).assign(run=lambda table: table.index)
    runs["test_bpb"] = [3.0, 3.1, 2.5, 2.7, 2.0, 2.1, 1.9, 2.3]
    found = seeds_table(runs, "arm", "a", by=["d_model"]).set_index(["d_model", "arm", "seed"])["difference"]
    assert found.loc[(slice(None), "b")].tolist() == pytest.approx([-0.5, -0.4, -0.1, 0.2])
    assert (found.loc[(slice(None), "a")] == 0).all()
    lone = seeds_table(runs.drop(index=0), "arm", "a", by=["d_model"]).set_index(["d_model", "arm", "seed"])
    assert np.isnan(lone.loc[(32, "b", 0), "difference"])
    steps = np.arange(1, 6)
    curves = pd.concat(
        pd.DataFrame({"run": row.run, "step": steps[: 5 if row.d_model == 48 else 3], "flops_run": 10.0 * row.d_model})
        for row in runs.itertuples()
    ).merge(runs)
    curves["flops_run"] *= curves["step"]
    curves["loss"] = curves["test_bpb"] * curves["step"]
    along = paired_curves(runs, curves[["run", "step", "flops_run", "loss"]], "arm", "a", 2, by=["d_model"])
    assert along[["d_model", "step"]].to_numpy().tolist() == [[32, 2], [32, 3], [48, 2], [48, 4], [48, 5]]
    assert along["flops_run"].tolist() == pytest.approx([640, 960, 960, 1920, 2400])  # at the end of the window
    middle = np.array([1.5, 3, 1.5, 3.5, 5])  # mean step of each window
    assert along["difference"].tolist() == pytest.approx(middle * [-0.45, -0.45, 0.05, 0.05, 0.05])
    assert along["low"].tolist() == pytest.approx(middle * [-0.5, -0.5, -0.1, -0.1, -0.1])
    assert along["high"].tolist() == pytest.approx(middle * [-0.4, -0.4, 0.2, 0.2, 0.2])
