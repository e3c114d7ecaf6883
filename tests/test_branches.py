"""Branches: runs that share a trunk in bf16 and differ in precision after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_runs import STEPS, result, tiny, train, write_corpus

from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.train import read_weights

SINCE = 0.5
"""Share of the 20 steps after which a branch begins; the last four steps are the decay."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def experiment(corpus: Path, precision: Any, **changes: Any) -> Experiment:
    latent = {"n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 32}
    return tiny(corpus, "ME-*", train__precision=precision, model__blocks={"E": latent}, **changes)


def losses(run: RunFolder) -> pd.Series[float]:
    return run.metrics.dropna(subset="loss").set_index("step")["loss"]


def test_up_to_the_branch_a_recipe_has_the_key_of_bf16_and_after_it_its_own(corpus: Path) -> None:
    trunk = experiment(corpus, "bf16")
    branches = [experiment(corpus, {"base": base, "since": SINCE}) for base in ("nvfp4", "fp8")]
    for step in (1, 9, 10):
        assert {each.rung_key(step) for each in branches} == {trunk.rung_key(step)}
    for step in (11, 16):
        assert len({each.rung_key(step) for each in (trunk, *branches)}) == 3
    wide, narrow = experiment(corpus, "fp32"), experiment(corpus, {"format": "fp32", "since": SINCE})
    assert narrow.rung_key(10) == wide.rung_key(10)
    assert len({each.key() for each in (trunk, *branches, experiment(corpus, "nvfp4"))}) == 4
    longer = experiment(corpus, {"base": "nvfp4", "since": SINCE}, train__tokens=40 * 128, train__warmup=0)
    assert longer.rung_key(11) != experiment(corpus, {"base": "nvfp4", "since": SINCE}, train__warmup=0).rung_key(11)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nvfp4", "fp8"])
def test_a_branch_ends_as_a_run_that_trained_its_trunk_itself(corpus: Path, tmp_path: Path, base: str) -> None:
    recipe = {"base": base, "since": SINCE, "rules": [{"format": "fp32", "components": ["router", "head"]}]}
    trunk = train(experiment(corpus, "bf16"), tmp_path / "runs", rungs=(SINCE,))
    branch, alone = (train(experiment(corpus, recipe), tmp_path / name) for name in ("runs", "alone"))
    assert result(branch)["branched_from"] == {"key": experiment(corpus, "bf16").rung_key(10), "step": 10}
    assert result(alone)["branched_from"] is None
    assert losses(alone)[:10].equals(losses(trunk)[:10])  # nothing is quantised before
    assert losses(alone)[10:].equals(losses(branch))
    assert not losses(alone)[10:].equals(losses(trunk)[10:])
    one, other = (read_weights(run.path / "checkpoints" / "last.ckpt") for run in (branch, alone))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result(branch)["test_bpb"] == result(alone)["test_bpb"]
    assert set(branch.lost["step"]) == set(range(11, STEPS + 1))
