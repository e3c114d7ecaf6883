"""Comparisons whose intervals include documents: they cover what they say, for other documents and other seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from explore.frontier import compare, document_interval

EFFECTS = {"base": 0.0, "a": 0.0, "b": 0.01, "c": -0.02}
SIZES = (64, 128)
BYTES = np.array([900, 700, 620, 540, 480, 420, 380, 300, 260, 200]) * 1000
"""Ten books of unequal length, about as those of Gutenberg's test split."""


def study(
    rng: np.random.Generator, seeds: int = 3, by_seed: float = 0.002, by_document: float = 0.006, noise: float = 0.001
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and their documents: an arm is better or worse on some documents, at every size and for every seed."""
    hard = 0.2 * rng.standard_normal(len(BYTES))
    turns = {arm: by_document * rng.standard_normal(len(BYTES)) for arm in EFFECTS}
    keys = [(arm, size, seed) for size in SIZES for arm in EFFECTS for seed in range(seeds)]
    own = np.array([EFFECTS[arm] - size / 1000 for arm, size, _ in keys]) + by_seed * rng.standard_normal(len(keys))
    turned = np.array([turns[arm] for arm, _, _ in keys])
    bits = 2 + hard + own[:, None] + turned + noise * rng.standard_normal((len(keys), len(BYTES)))
    runs = pd.DataFrame(keys, columns=["arm", "d_model", "seed"]).assign(test_bpb=bits @ BYTES / BYTES.sum())
    runs["run"] = [f"{arm}-{size}-{seed}" for arm, size, seed in keys]
    documents = pd.DataFrame(
        {
            "run": np.repeat(runs["run"], len(BYTES)).to_numpy(),
            "document": np.tile(np.arange(len(BYTES)), len(keys)),
            "nats": (bits * BYTES * math.log(2)).ravel(),
            "n_bytes": np.tile(BYTES, len(keys)),
        }
    )
    return runs, documents


def held(found: pd.DataFrame) -> float:
    true = found["arm"].map(EFFECTS)
    return float(((found["low"] <= true) & (true <= found["high"])).mean())


OPTIONS: dict[str, dict[str, Any]] = {
    "by size": {"by": ["d_model"], "strata": []},
    "over sizes": {"by": [], "strata": ["d_model"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize(
    ("by_seed", "by_document", "noise"),
    [(0.002, 0.006, 0.001), (0.006, 0.002, 0.001), (0.001, 0.001, 0.006)],
    ids=["documents", "seeds", "joint noise"],
)
def test_95_percent_of_intervals_hold_the_difference_on_other_documents_and_seeds(
    way: str, by_seed: float, by_document: float, noise: float
) -> None:
    rng, shares = np.random.default_rng(3), []
    for _ in range(120):
        runs, documents = study(rng, 3, by_seed, by_document, noise)
        shares.append(held(compare(runs, "arm", "base", documents=documents, **OPTIONS[way])))
    print(f"{way}: {np.mean(shares):.1%} of intervals hold the truth")
    assert 0.9 <= np.mean(shares) <= 0.98


@pytest.mark.parametrize("way", OPTIONS)
def test_without_documents_an_interval_claims_too_much_of_other_documents(way: str) -> None:
    rng, shares = np.random.default_rng(3), []
    for _ in range(80):
        runs, _ = study(rng)
        shares.append(held(compare(runs, "arm", "base", **OPTIONS[way])))
    print(f"{way}: {np.mean(shares):.1%} of intervals hold the truth if documents are ignored")
    assert np.mean(shares) < 0.8


def test_of_two_arms_it_is_the_interval_of_documents() -> None:
    runs, documents = study(np.random.default_rng(0), seeds=4)
    two = runs[(runs["d_model"] == 64) & runs["arm"].isin(["base", "b"])]
    (row,) = compare(two, "arm", "base", documents=documents).to_dict("records")
    expected = document_interval(documents.merge(two, on="run"), "b", "base")
    assert row["difference"] == pytest.approx(expected.estimate)
    assert (row["low"], row["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert row["n_documents"] == len(BYTES)
    alone = compare(two, "arm", "base").to_dict("records")[0]
    assert alone["n_documents"] == 0
    assert alone["high"] - alone["low"] < row["high"] - row["low"]
    assert (alone["sd"], alone["difference"]) == (pytest.approx(row["sd"]), pytest.approx(row["difference"]))


def test_the_whole_text_counts_where_a_run_was_scored_on_its_opening() -> None:
    runs, documents = study(np.random.default_rng(0))
    opening = runs.assign(test_bpb=runs["test_bpb"] + (runs["arm"] == "b") * 0.5)
    for way in OPTIONS.values():
        pd.testing.assert_frame_equal(
            compare(opening, "arm", "base", documents=documents, **way),
            compare(runs, "arm", "base", documents=documents, **way),
        )


@pytest.mark.parametrize("loss", ["a run", "a document", "another text"])
def test_scores_of_some_runs_only_are_refused(loss: str) -> None:
    runs, documents = study(np.random.default_rng(0))
    own = documents["run"] == "b-128-1"
    match loss:
        case "a run":
            less = documents[~own]
        case "a document":
            less = documents[~(own & (documents["document"] == 3))]
        case _:
            less = documents.assign(n_bytes=documents["n_bytes"] + own * 7)
    with pytest.raises(ValueError, match="must have scores of the same documents, got none or others of b-128-1; `ex"):
        compare(runs, "arm", "base", by=["d_model"], documents=less)


def test_without_scores_of_any_run_the_interval_is_that_of_seeds() -> None:
    runs, documents = study(np.random.default_rng(0))
    seeds = compare(runs, "arm", "base", by=["d_model"])
    empty = pd.DataFrame(columns=documents.columns)
    pd.testing.assert_frame_equal(compare(runs, "arm", "base", by=["d_model"], documents=empty), seeds)
    assert set(seeds["n_documents"]) == {0}


def test_a_missing_run_leaves_its_seed_out_of_the_documents() -> None:
    runs, documents = study(np.random.default_rng(0), seeds=4)
    less = runs[(runs["arm"] != "b") | (runs["seed"] != 3)].sample(frac=1, random_state=0)
    found = compare(less, "arm", "base", by=["d_model"], documents=documents).set_index(["d_model", "arm"])
    assert found["n_pairs"].to_dict() == {(size, arm): 4 - (arm == "b") for size in SIZES for arm in "abc"}
    whole = compare(runs, "arm", "base", by=["d_model"], documents=documents).set_index(["d_model", "arm"])
    pd.testing.assert_series_equal(
        found["difference"].drop("b", level="arm").sort_index(),
        whole["difference"].drop("b", level="arm").sort_index(),
        atol=1e-3,
    )


def test_documents_are_of_bits_per_byte() -> None:
    runs, documents = study(np.random.default_rng(0))
    with pytest.raises(ValueError, match="value must be bits per byte if documents are given, got 'recall'"):
        compare(runs.assign(recall=0.5), "arm", "base", value="recall", by=["d_model"], documents=documents)
    with pytest.raises(ValueError, match="got none named 'run'; its columns: "):
        compare(runs.drop(columns="run"), "arm", "base", by=["d_model"], documents=documents)
