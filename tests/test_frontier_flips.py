import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_runs import tiny, write_corpus

from explore.cost import flops_train
from explore.files import write_json
from explore.frontier import add_axes, experiments_of, front_changes, rank_correlation


def runs(rng, effects, sd=0.01, seeds=3, shared=0.05):
    """Runs of arms at several sizes; a seed shifts all arms of a size equally."""
    rows = []
    for size, values in effects.items():
        moves = shared * rng.standard_normal(seeds)
        rows += [
            (f"arm{i}", size, seed, value + moves[seed] + sd * rng.standard_normal())
            for i, value in enumerate(values)
            for seed in range(seeds)
        ]
    return pd.DataFrame(rows, columns=["arm", "d_model", "seed", "val_bpb"])


def test_clearly_different_rankings_have_an_exact_tau():
    one, other = [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 2.0, 3.0]
    table = runs(np.random.default_rng(0), {64: one, 128: other, 256: one[::-1]})
    found = rank_correlation(table, "arm", "d_model")
    assert list(zip(found["size_a"], found["size_b"], strict=True)) == [(64, 128), (64, 256), (128, 256)]
    assert found["tau"].tolist() == pytest.approx([4 / 6, -1.0, -4 / 6])
    np.testing.assert_allclose(found["low"], found["tau"])
    np.testing.assert_allclose(found["high"], found["tau"])
    np.testing.assert_allclose(found["flips"], [1 / 6, 1.0, 5 / 6])
    np.testing.assert_allclose(found["flipped"], found["flips"])
    np.testing.assert_allclose(found["holds"], 1 - found["flips"])


@pytest.mark.parametrize("apart", [0.002, 0.01, 0.03], ids=["closer than noise", "as noise", "wider than noise"])
def test_the_interval_of_tau_covers_the_truth_even_for_close_arms(apart):
    rng, held, width = np.random.default_rng(1), [], []
    for _ in range(60):
        one = np.arange(5) * apart
        other = rng.permutation(one) if rng.random() < 0.5 else one
        (row,) = rank_correlation(runs(rng, {64: one, 128: other}), "arm", "d_model").to_dict("records")
        true = stats.kendalltau(one, other).statistic
        held.append(row["low"] - 1e-9 <= true <= row["high"] + 1e-9)
        width.append(row["high"] - row["low"])
    assert np.mean(held) >= 0.95
    assert np.mean(width) < 0.45 or apart < 0.03  # two sizes have separate noise


@pytest.mark.slow
def test_an_order_is_wrongly_resolved_for_any_pair_one_time_in_twenty_at_most():
    rng, wrong = np.random.default_rng(2), []
    for _ in range(200):  # far apart at one size and level at the other, where the errors are most
        found = rank_correlation(runs(rng, {64: np.arange(4.0), 128: np.zeros(4)}), "arm", "d_model")
        wrong.append((found["flips"] + found["holds"] > 0).any())
    assert np.mean(wrong) <= 0.097  # 5% and three standard errors
    assert np.mean(wrong) >= 0.005


def test_sizes_without_arms_in_common_are_refused():
    table = runs(np.random.default_rng(0), {64: [0.0, 1.0, 2.0], 128: [0.0, 1.0]})
    with pytest.raises(ValueError, match="d_model: 64 and 128 have 2 arms in common; at least 3"):
        rank_correlation(table, "arm", "d_model")
    with pytest.raises(ValueError, match="d_model: must have at least two values, got only 64"):
        rank_correlation(table[table["d_model"] == 64], "arm", "d_model")


def points(seeds=3, sd=0.001):
    """Points in which b beats a only in FLOPs, c only in parameters, and d equals b up to noise."""
    rng = np.random.default_rng(0)
    rows = [
        (name, seed, flops, params, error + sd * rng.standard_normal())
        for name, flops, params, error in [("a", 1e15, 4e6, 2.0), ("b", 2e15, 6e6, 1.5), ("c", 3e15, 3e6, 1.8)]
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["name", "seed", "flops_run", "params_total", "val_bpb"])


def test_points_that_join_or_leave_the_front_on_another_axis_are_named():
    found = front_changes(points(), ["flops_run", "params_total"], ["name"])
    found = found.set_index(["axis", "name"])
    assert found.loc["flops_run", "change"].to_dict() == {"a": "stays", "b": "stays", "c": "off"}
    assert found.loc["params_total", "change"].to_dict() == {"a": "leaves", "b": "stays", "c": "enters"}
    assert found["resolved"].all()
    assert found.loc[("params_total", "c"), "cost"] == 3e6
    assert found.loc[("params_total", "c"), "error"] == pytest.approx(1.8, abs=0.01)


def test_a_change_within_the_noise_is_not_resolved():
    noisy = front_changes(points(sd=1.0), ["flops_run", "params_total"], ["name"])
    assert not noisy["resolved"].all()
    alone = front_changes(points(seeds=1), ["flops_run", "params_total"], ["name"])
    assert set(alone["standing"]) == {"not resolved"}
    assert not alone["resolved"].any()
    assert alone["change"].tolist() == ["stays", "stays", "off", "leaves", "stays", "enters"]


def test_a_point_that_an_axis_lacks_is_refused():
    table = points()
    table.loc[table["name"] == "c", "params_total"] = np.nan
    with pytest.raises(ValueError, match="params_total: must have the same points as flops_run"):
        front_changes(table, ["flops_run", "params_total"], ["name"])
    with pytest.raises(ValueError, match="axes must name at least one column of cost, got none"):
        front_changes(table, [], ["name"])


def test_the_axes_are_those_of_each_experiments_own_cost(tmp_path):
    corpus = write_corpus(tmp_path)
    ones = {pattern: tiny(corpus, pattern) for pattern in ("M*E", "*-")}
    for pattern, one in ones.items():
        record = {"key": one.key(), "experiment": one.model_dump(mode="json")}
        folder = tmp_path / "runs" / pattern.replace("*", "A")
        folder.mkdir(parents=True)
        write_json(folder / "experiment.json", record)
    experiments = experiments_of(tmp_path / "runs")
    assert experiments == {one.key(): one for one in ones.values()}
    table = pd.DataFrame({"pattern": list(ones), "key": [one.key() for one in ones.values()], "tokens": [1000, 2000]})
    found = add_axes(table, experiments, contexts=(64, 1024)).set_index("pattern")
    for pattern, tokens in (("M*E", 1000), ("*-", 2000)):
        model = ones[pattern].model
        for convention in ("megatron", "palm", "6nd"):
            expected = tokens * flops_train(model.ledger(32), convention)
            assert found.loc[pattern, f"flops_run_{convention}"] == pytest.approx(expected)
        cost = model.cost(1024)
        assert found.loc[pattern, "params_active"] == cost.params_active
        assert found.loc[pattern, "params_total"] == cost.params_total
        assert found.loc[pattern, "decode_bytes_1024"] == cost.decode_bytes
        assert found.loc[pattern, "decode_bytes_64"] < cost.decode_bytes
    assert found.loc["M*E", "params_active"] < found.loc["M*E", "params_total"]


def test_a_row_without_its_experiment_is_named():
    with pytest.raises(ValueError, match="key: no experiment for abc; 1 rows have none"):
        add_axes(pd.DataFrame({"key": ["abc"], "tokens": [1]}), {})
