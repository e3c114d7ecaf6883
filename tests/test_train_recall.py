"""Runs on recall: accuracy during the run and by number of pairs, and stopping when the task is learned."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from small_runs import result, train

from explore.checkpoints import Standing
from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.train import LitLanguageModel
from explore.train.metrics import MetricsFile
from explore.train.recall_curve import curve_scores

N_STEPS = 40
DATA = {"kind": "recall", "seq_len": 16, "n_pairs": 3, "fewer_pairs": [1], "vocab_size": 16, "n_eval": 32}


def experiment(**changes: Any) -> Experiment:
    """One pair or three. The first is easy: its value is the one of the upper half."""
    record: dict[str, Any] = {
        "name": "recall",
        "model": {"d_model": 64, "vocab_size": 16, "pattern": "M", "blocks": {}, "embedding_std": 1.0},
        "data": DATA,
        "train": {"tokens": N_STEPS * 8 * 16, "batch_size": 8, "lr": 0.01, "val_every": 4, **changes},
    }
    return Experiment.model_validate(record)


def curve(folder: RunFolder) -> dict[int, float]:
    rows = folder.metrics.dropna(subset="val_recall")
    return dict(zip(rows["step"].astype(int), rows["val_recall"], strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(experiment(), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def enough(whole: RunFolder) -> float:
    """A recall that the run first reaches halfway."""
    found = curve(whole)
    return max(value for step, value in found.items() if step <= N_STEPS // 2)


def test_recall_is_measured_at_every_validation_and_by_number_of_pairs(whole: RunFolder) -> None:
    assert list(curve(whole)) == [*range(4, N_STEPS + 1, 4)]
    found = result(whole)
    assert found["recall_by_pairs"].keys() == {"1", "3"}
    row = whole.row()
    assert row["recall_1_pairs"] == found["recall_by_pairs"]["1"]
    # 16 sequences with one query, and 16 with three.
    assert found["recall"] == pytest.approx((16 * row["recall_1_pairs"] + 48 * row["recall_3_pairs"]) / 64)
    assert row["recall_over_steps"] == found["recall_over_steps"]


def test_a_run_ends_at_the_first_validation_above_the_threshold(
    whole: RunFolder, enough: float, tmp_path: Path
) -> None:
    found = curve(whole)
    first = next(step for step, value in found.items() if value >= enough)
    assert first < N_STEPS
    stopped = train(experiment(stop_recall=enough), tmp_path)
    assert curve(stopped) == {step: value for step, value in found.items() if step <= first}
    record = result(stopped)
    assert (record["status"], record["step"]) == ("finished", first)
    assert record["tokens"] == first * 8 * 16
    assert record["recall"] is not None
    pd.testing.assert_frame_equal(
        stopped.metrics.drop(columns="tokens_per_s"),
        whole.metrics[whole.metrics["step"] <= first].drop(columns="tokens_per_s"),
    )


def test_a_stopped_run_that_has_no_result_yet_is_only_scored(
    enough: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(stop_recall=enough)
    stopped = train(one, tmp_path)
    record = result(stopped)
    (stopped.path / "result.json").unlink()
    monkeypatch.setattr(LitLanguageModel, "training_step", lambda *_: pytest.fail("trained again"))
    again = result(train(one, tmp_path))
    timed = {"finished_at", "tokens_per_s", "train_s"}
    assert {name: again[name] for name in again.keys() - timed} == {name: record[name] for name in again.keys() - timed}


def test_the_mean_of_the_curve_covers_the_whole_budget() -> None:
    one = experiment()
    # 0 until step 4, 0.5 for 8 steps, 0.95 for 4; a run that stopped there keeps 0.95 for the remaining 24.
    found = curve_scores(one, {4: 0.5, 12: 0.95, 16: 0.92})
    assert found["steps_to_90"] == 12
    assert found["recall_over_steps"] == pytest.approx((8 * 0.5 + 4 * 0.95 + 24 * 0.92) / 40)
    assert curve_scores(one, {20: 0.5, 40: 0.89}) == {"steps_to_90": None, "recall_over_steps": 20 * 0.5 / 40}
    assert curve_scores(one, {}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_recall": 0.9, "val_every": None}, "val_every: must be given with stop_recall=0.9"),
        ({"stop_recall": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_stop_that_can_never_happen_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        experiment(**changes)


def test_text_has_no_recall_threshold() -> None:
    record = experiment(stop_recall=0.9).model_dump(mode="json") | {"data": {"kind": "text"}}
    with pytest.raises(ValidationError, match=r"stop_recall: data\.kind must be recall, got 'text'"):
        Experiment.model_validate(record)


def test_new_fields_change_the_key_only_if_they_are_used() -> None:
    plain = experiment()
    assert "stop_recall" not in plain.model_dump(mode="json")["train"]
    assert len({plain.key(), experiment(stop_recall=0.5).key(), experiment(stop_recall=None).key()}) == 2
    single = Experiment.model_validate(plain.model_dump(mode="json") | {"data": {**DATA, "fewer_pairs": []}})
    assert "fewer_pairs" not in single.model_dump(mode="json")["data"]
    assert single.key() != plain.key()


def test_metrics_of_an_earlier_version_get_the_columns_of_this_one(tmp_path: Path) -> None:
    old = "step,tokens,loss\r\n10,1280,3.5\r\n20,2560,3.25\r\n"
    file = MetricsFile(tmp_path / "metrics.csv", 128, 10, Standing(20, files={"metrics.csv": old}))
    file.rows.append([{"step": 24, "tokens": 3072, "val_recall": 0.5}])
    found = pd.read_csv(io.StringIO((tmp_path / "metrics.csv").read_text()))
    assert found["loss"].tolist()[:2] == [3.5, 3.25]
    assert found["val_recall"].tolist()[2] == 0.5
    assert torch.isnan(torch.tensor(found["val_recall"].tolist()[:2])).all()
