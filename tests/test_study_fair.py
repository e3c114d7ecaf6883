"""Fair comparisons: the same budgets for every trial, and a tuned learning rate for each architecture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from optuna.trial import FixedTrial
from rich.console import Console
from small_sweeps import study_of, write_sweep

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.runs import PILOTS, find_runs
from explore.study import Budgets, LearningRates, RejectedError, Sweep, load_sweep, run_sweep
from explore.table import load_runs
from explore.train import score_merge


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["params_active", "params_total", "flops_train", "state_bytes"])
@pytest.mark.parametrize("pattern", ["*-*-", "M-M-", "ME*E"])
def test_every_pattern_meets_a_tied_budget_within_a_hundredth(budget: str, pattern: str) -> None:
    reference = ModelConfig(d_model=128, pattern="M-*-", vocab_size=512)
    target = getattr(reference.cost(256), budget)
    budgets = Budgets(
        {budget: target}, ["d_model=32:512:32", "d_ff", "d_expert", "d_state=8:512:8", "*.d_head=8:128:4"], seq_len=256
    )
    content = {"vocab_size": 512, "pattern": pattern, "blocks": {}}
    trial = FixedTrial({})
    if budget == "state_bytes" and pattern.startswith("M"):
        with pytest.raises(RejectedError, match=r"state_bytes: \d+,\d+ is the nearest in reach, target 211,968"):
            budgets.model(trial, content)
        return
    model = budgets.model(trial, content)
    assert getattr(model.cost(256), budget) == pytest.approx(target, rel=0.01)
    assert abs(trial.user_attrs["residuals"][budget]) <= 0.01


@pytest.mark.slow
def test_residuals_of_compared_budgets_are_recorded_and_infeasible_ones_rejected() -> None:
    trial = FixedTrial({})
    budgets = Budgets({"params_total": 600_000}, ["d_model=64:256:32", "d_ff"], 128, compare={"flops_train": 1e6})
    model = budgets.model(trial, {"vocab_size": 512, "pattern": "*-*-"})
    kept = trial.user_attrs["residuals"]
    assert set(kept) == {"params_total", "flops_train"}
    assert kept["flops_train"] == pytest.approx(model.cost(128).flops_train / 1e6 - 1)
    impossible = Budgets({"params_total": 10}, ["d_model=64:256:32"], 128)
    with pytest.raises(RejectedError, match="does not meet the budgets"):
        impossible.model(trial, {"vocab_size": 512, "pattern": "*-"})
    with pytest.raises(ValueError, match=r"budgets must be among params_total.*, got 'params'"):
        Budgets({"params": 10}, ["d_model"], 128)


TIED = '''"""Which pattern is best at its budget?"""

from explore import Experiment, TextData, TrainConfig
from explore.study import Budgets

objectives = {"val_bpb": "minimize", "OBJECTIVE": "minimize"}
budgets = Budgets({"BUDGET": 40_000}, ["d_model=16:64:16", "d_ff=16:1024:8"], seq_len=32)


def experiment(trial):
    pattern = trial.suggest_categorical("pattern", ["--", "---"])
    model = budgets.model(trial, {"vocab_size": 257, "pattern": pattern})
    data = TextData(corpus=CORPUS, tokenizer="bytes", seq_len=32)
    return Experiment(name="tied", model=model, data=data, train=TrainConfig(TRAIN, batch_size=4, eval_tokens=128))
'''


def sweep_file(folder: Path, objective: str, budget: str = "params_active", train: str = "tokens=512") -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    text = TIED.replace("OBJECTIVE", objective).replace("BUDGET", budget).replace("TRAIN", train)
    path = folder / "tied.py"
    path.write_text(text.replace("CORPUS", repr(str(corpus))))
    return path


@pytest.mark.parametrize(
    ("objective", "budget", "train", "why"),
    [
        ("params_active", "params_active", "tokens=512", "budgets.params_active"),
        ("flops_run", "flops_train", "tokens=512", "budgets.flops_train"),
        ("flops_run", "params_total", "flops=1e9", "train.flops"),
    ],
)
def test_a_tied_budget_is_no_objective(tmp_path: Path, objective: str, budget: str, train: str, why: str) -> None:
    path = sweep_file(tmp_path, objective, budget, train)
    with pytest.raises(ValueError, match=rf"tied.py: objectives: '{objective}' is tied by {why}"):
        load_sweep(path)


@pytest.mark.slow
def test_the_residuals_of_a_sweep_are_in_the_table_of_its_runs(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, "flops_run"))
    assert run_sweep(sweep, 2, tmp_path / "runs", console=Console(quiet=True)).complete == 2
    table = load_runs(tmp_path / "runs")
    assert (table["residual"] <= 0.01).all()
    assert table["params_active"].tolist() == pytest.approx([40_000] * 2, rel=0.01)


def parabola(best: float, curvature: float = 0.1) -> object:
    return lambda lr: 2 + curvature * (math.log2(lr) - math.log2(best)) ** 2


@pytest.mark.parametrize("best", [6e-4, 3e-3, 4.1e-3, 1.2e-2])
def test_the_search_finds_the_vertex_wherever_it_starts(best: float) -> None:
    tuned = LearningRates().search(parabola(best))  # type: ignore[arg-type]
    assert tuned.interior
    assert tuned.lr == pytest.approx(best, rel=0.01)
    assert tuned.sensitivity == pytest.approx(0.1)
    assert len(tuned.pilots) <= len(LearningRates().grid)


def test_a_best_rate_at_the_edge_of_the_grid_is_not_called_tuned() -> None:
    for best, edge in ((1e-6, 2.5e-4), (1.0, 3.2e-2)):
        tuned = LearningRates().search(parabola(best))  # type: ignore[arg-type]
        assert (tuned.lr, tuned.interior, tuned.sensitivity) == (edge, False, None)


def test_the_search_moves_away_from_rates_that_diverge() -> None:
    tuned = LearningRates().search(lambda lr: math.inf if lr > 3e-3 else 2 - lr)
    assert tuned.lr == 2e-3
    assert tuned.interior
    assert math.isinf(tuned.pilots[4e-3])


def test_a_pilot_is_the_same_for_every_seed_and_shorter() -> None:
    model = ModelConfig(d_model=32, vocab_size=257, pattern="-")
    train = TrainConfig(tokens=64_000, batch_size=4, val_every=10)
    first, second = (
        Experiment(name="x", model=model, data=TextData(tokenizer="bytes", seq_len=100), train=train, seed=seed)
        for seed in (0, 1)
    )
    rates = LearningRates(share=0.25)
    assert rates.pilot(first, 1e-3).key() == rates.pilot(second, 1e-3).key() != rates.pilot(first, 2e-3).key()
    assert rates.pilot(first, 1e-3).n_steps == first.n_steps // 4
    scored = first.model_copy(update={"train": first.train.model_copy(update={"evaluation": "whole"})})
    assert rates.pilot(scored, 1e-3).train.evaluation == "sampled"  # splits are not read in full


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 1.0}, "low must be above 0"),
        ({"factor": 1.0}, "factor must be above 1"),
        ({"share": 0.0}, "share must be above 0"),
    ],
)
def test_an_invalid_search_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRates(**wrong)


@pytest.mark.slow
def test_a_sweep_tunes_each_architecture_once_for_all_seeds(tmp_path: Path) -> None:
    text = sweep_file(tmp_path, "flops_run").read_text()
    rates = "learning_rates = LearningRates(low=1e-3, high=4e-3, start=2e-3, share=0.5)\nseeds = 2\nbudgets ="
    text = text.replace("import Budgets", "import Budgets, LearningRates").replace("budgets =", rates)
    (tmp_path / "tied.py").write_text(text)
    run_sweep(load_sweep(tmp_path / "tied.py"), 2, tmp_path / "runs", console=Console(quiet=True))
    table, pilots = load_runs(tmp_path / "runs"), load_runs(tmp_path / "runs" / "pilots")
    assert sorted(table["seed"]) == [0, 0, 1, 1]
    assert pilots["seed"].tolist() == [0] * 6
    assert pilots.groupby("pattern")["lr"].agg(list).map(sorted).tolist() == [[1e-3, 2e-3, 4e-3]] * 2
    for pattern, runs in table.groupby("pattern"):
        scores = pilots[pilots["pattern"] == pattern].set_index("lr")["val_bpb"]
        at_edge = scores.idxmin() in (1e-3, 4e-3)
        assert runs["lr"].nunique() == 1
        assert (runs["tuned"] == (not at_edge)).all()


@pytest.mark.slow
def test_rates_are_searched_by_nats_if_tokens_have_no_bytes(tmp_path: Path) -> None:
    text = sweep_file(tmp_path, "flops_run").read_text()
    text = re.sub(r"TextData\(.*\)", "RecallData(seq_len=32, n_pairs=4, vocab_size=64)", text)
    for old, new in {
        "import Budgets": "import Budgets, LearningRates",
        "TextData": "RecallData",
        "budgets =": "learning_rates = LearningRates(low=1e-3, high=4e-3, start=2e-3)\nbudgets =",
        "val_bpb": "val_loss",
    }.items():
        text = text.replace(old, new)
    (tmp_path / "tied.py").write_text(text)
    assert run_sweep(load_sweep(tmp_path / "tied.py"), 1, tmp_path / "runs", console=Console(quiet=True)).complete == 1
    (trial,) = study_of(tmp_path / "runs", "tied").trials
    pilots = load_runs(tmp_path / "runs" / PILOTS).set_index("lr")["val_loss"]
    assert pilots.to_dict() == {float(lr): score for lr, score in trial.user_attrs["lr_pilots"].items()}


@pytest.mark.slow
def test_rates_are_searched_by_the_quantity_that_the_sweep_names(tmp_path: Path) -> None:
    text = sweep_file(tmp_path, "flops_run", train="tokens=12_800, val_every=10").read_text()
    text = re.sub(r"TextData\(.*\)", "RecallData(seq_len=32, n_pairs=2, vocab_size=6)", text)
    rates = 'LearningRates(low=1e-3, high=4e-3, start=2e-3, share=1.0, by="recall_over_steps")'
    for old, new in {
        "import Budgets": "import Budgets, LearningRates",
        "TextData": "RecallData",
        "budgets =": f"learning_rates = {rates}\nbudgets =",
        "val_bpb": "val_loss",
        ", eval_tokens=128": "",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "tied.py").write_text(text)
    assert run_sweep(load_sweep(tmp_path / "tied.py"), 1, tmp_path / "runs", console=Console(quiet=True)).complete == 1
    (trial,) = study_of(tmp_path / "runs", "tied").trials
    pilots = load_runs(tmp_path / "runs" / PILOTS).set_index("lr")["recall_over_steps"]
    assert pilots.to_dict() == {float(lr): score for lr, score in trial.user_attrs["lr_pilots"].items()}
    assert pilots.nunique() > 1
    assert trial.user_attrs["lr_by"] == "recall_over_steps"
    best = pilots.idxmax()
    assert best / 2 <= trial.user_attrs["lr"] <= best * 2


def test_a_quantity_that_no_run_has_is_refused_for_a_search() -> None:
    with pytest.raises(ValueError, match=r"learning_rates\.by must be a quantity with numbers, got 'recal'; .*recall"):
        LearningRates(by="recal")


def merging_sweep(folder: Path, merging: str = "Merging(share=0.5, last=3)") -> Path:
    return write_sweep(
        folder,
        replaced={
            "import RejectedError": "import LearningRates, Merging, RejectedError",
            'sampler = "random"': f'sampler = "grid"\nmerging = {merging}\nlearning_rates = LearningRates(share=1.0)',
            "lr=lr, eval": "lr=lr, decay=0.0 if n_layers == 1 else 0.2, eval",
            '"d_model": [32, 64]': '"d_model": [32]',
            '"lr": [0.002, 0.004]': '"lr": [0.004]',
            "baselines = (": "tried = (",
        },
        tokens=12 * 4 * 32,
    )


@pytest.fixture(scope="module")
def merged_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """A sweep of one model without a decay and one with it, and its runs."""
    folder = tmp_path_factory.mktemp("merging")
    sweep = load_sweep(merging_sweep(folder))
    assert run_sweep(sweep, 2, folder / "runs", console=Console(quiet=True)).complete == 2
    return sweep, folder / "runs"


@pytest.mark.slow
def test_runs_without_a_decay_are_merged_and_their_rate_is_searched_for_the_average(
    merged_sweep: tuple[Sweep, Path],
) -> None:
    _, runs = merged_sweep
    for folder in [*find_runs(runs), *find_runs(runs / PILOTS)]:
        decays = len(folder.row()["pattern"]) == 2
        assert [*folder.merged] == ([] if decays else ["minus_sqrt", "flat"])
        if not decays:
            assert folder.merged["flat"]["steps"] == [8, 10, 12]
    for trial in study_of(runs).trials:
        pilots = load_runs(runs / PILOTS).set_index("lr")
        pilots = pilots[pilots["pattern"] == trial.user_attrs["pattern"]]
        column = "val_bpb_minus_sqrt" if trial.user_attrs["pattern"] == "-" else "val_bpb"
        assert pilots[column].to_dict() == {float(lr): score for lr, score in trial.user_attrs["lr_pilots"].items()}


def test_a_run_stopped_before_scoring_its_averages_is_not_trained_again(
    merged_sweep: tuple[Sweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = merged_sweep
    (merged,) = (run for run in find_runs(runs) if run.merged)
    before = merged.merged
    (merged.path / "merged.json").unlink()
    monkeypatch.setattr("explore.train.fitting.train_run", lambda *_: pytest.fail("it is trained again"))
    assert run_sweep(sweep, 2, runs, new_study=True, console=Console(quiet=True)).complete == 2
    assert merged.merged == before


def test_averages_of_other_checkpoints_are_scored_again(merged_sweep: tuple[Sweep, Path]) -> None:
    sweep, runs = merged_sweep
    assert sweep.merging is not None
    (merged,) = (run for run in find_runs(runs) if run.merged)
    before = merged.merged
    score_merge(merged, 2, "flat")
    assert merged.merged["flat"]["steps"] == [10, 12]
    sweep.merging.merge(merged)
    assert merged.merged == before


@pytest.mark.parametrize(
    ("merging", "message"),
    [
        ("Merging(share=0.0)", r"merging\.share must be above 0 and at most 1, got 0\.0"),
        ("Merging(last=0)", "last must be at least 1 checkpoint, got 0"),
        ("Merging(shapes=())", r"merging\.shapes must name at least one shape, got \(\)"),
        ("0.2", r"merging must be explore\.study\.Merging, got 0\.2"),
    ],
)
def test_invalid_averages_are_refused(tmp_path: Path, merging: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_sweep(merging_sweep(tmp_path, merging))
