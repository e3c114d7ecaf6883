"""Sweeps: nothing lost, nothing trained twice, mistakes found before anything is created."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from small_sweeps import done_by_key, quiet, study_of, write_sweep

from explore import train
from explore.runs import find_runs
from explore.study import Sweep, SweepSummary, TrialOptions, load_sweep, run_sweep
from explore.study.identity import first_difference, open_study
from explore.study.storage import open_storage
from explore.table import load_runs
from explore.train import fitting


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def run(sweep: Sweep, n_trials: int, runs: Path, **options: object) -> SweepSummary:
    return run_sweep(sweep, n_trials, runs, options=TrialOptions(notes=False), console=quiet(), **options)  # type: ignore[arg-type]


def trials_of(runs: Path, name: str = "width") -> list[optuna.trial.FrozenTrial]:
    return study_of(runs, name).trials


def test_a_sweep_ends_with_the_requested_trials_and_repeating_it_does_nothing(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(sweep_file), tmp_path / "runs"
    assert run(sweep, 3, runs).complete == 3
    assert trials_of(runs)[0].params == {"d_model": 32, "n_layers": 2, "lr": 0.004}
    monkeypatch.setattr(train, "fit", None)
    assert run(sweep, 3, runs).complete == 3


def test_the_draw_of_a_trial_depends_on_its_number_and_not_on_interruptions(sweep_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file)
    run(sweep, 4, tmp_path / "whole")
    for n_trials in (1, 2, 4):
        run(sweep, n_trials, tmp_path / "pieces")
    whole, pieces = (trials_of(tmp_path / name) for name in ("whole", "pieces"))
    assert [(t.params, t.values) for t in whole] == [(t.params, t.values) for t in pieces]


def test_a_failed_trial_is_recorded_with_its_reason_and_the_sweep_continues(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs, real, calls = load_sweep(sweep_file), tmp_path / "runs", train.fit, []

    def fit(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("shapes do not fit")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "fit", fit)
    summary = run(sweep, 3, runs)
    assert (summary.complete, summary.failed) == (2, 1)
    failed = [trial for trial in trials_of(runs) if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["reason"] for trial in failed] == ["RuntimeError: shapes do not fit"]


def test_an_experiment_finished_elsewhere_is_not_trained_again(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = load_sweep(sweep_file), tmp_path / "runs"
    run(sweep, 2, runs)
    (runs / "study.journal").unlink()
    monkeypatch.setattr(fitting, "train_run", None)
    assert run(sweep, 2, runs).complete == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"""Does width help?"""', "", "docstring"),
        ('"val_bpb"', '"val_bbp"', "val_bbp"),
        ("def experiment", "def experimnt", "experiment(trial)"),
        ("n_layers > 200", "n_layer > 200", "line 16: NameError: name 'n_layer' is not defined"),
        ("batch_size=4", "batchsize=4", "batchsize: unknown field"),
        ("def experiment(trial):", "def experiment(trial:", "line 12"),
        ("n_layers > 200", "n_layers > 0", "baseline 0 is rejected: too large"),
    ],
)
def test_a_mistake_in_a_sweep_file_is_found_before_anything_is_created(
    sweep_file: Path, old: str, new: str, message: str
) -> None:
    sweep_file.write_text(sweep_file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r".+") as refusal:
        load_sweep(sweep_file)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in sweep_file.parent.iterdir() if path.suffix) == ["corpus.txt", "width.py"]


def test_an_error_names_the_line_also_for_a_relative_path(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_file.write_text(sweep_file.read_text().replace("n_layers > 200", "n_layer > 200"))
    monkeypatch.chdir(sweep_file.parent)
    with pytest.raises(ValueError, match=r"width\.py: experiment\(trial\): line 16: NameError"):
        load_sweep(Path(sweep_file.name))


def test_a_sweep_has_the_absolute_path_of_its_file(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep_file.parent)
    sweep_file.write_text(sweep_file.read_text() + "\nsampler = sampler if __file__[0] == '/' else __file__\n")
    assert load_sweep(Path(sweep_file.name)).sampler == "random"


@pytest.mark.parametrize(("sampler", "message"), [("foo", "got 'foo'"), ("grid", "needs a mapping")])
def test_an_invalid_sampler_is_refused_before_anything_is_created(
    sweep_file: Path, tmp_path: Path, sampler: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(load_sweep(sweep_file), grid=None), 1, tmp_path / "runs", sampler=sampler)
    assert not (tmp_path / "runs").exists()


def test_a_pruner_that_does_not_fit_the_objectives_is_found_when_the_file_is_read(sweep_file: Path) -> None:
    text = sweep_file.read_text().replace('"flops_run": "minimize"', '"train_s": "minimize"')
    pruner = "from explore.study import FrontPruner\n\npruner = FrontPruner()\n\n\ndef experiment"
    sweep_file.write_text(text.replace("def experiment", pruner))
    with pytest.raises(ValueError, match=r"width.py: pruner: the objectives must be .*; got val_bpb, train_s$"):
        load_sweep(sweep_file)


def test_a_learning_rate_of_ten_is_recorded_as_diverged(tmp_path: Path) -> None:
    replaced = {'"lr": 0.004': '"lr": 10.0', "1e-3, 1e-2, log=True": "1e-3, 1e2, log=True"}
    sweep, runs = load_sweep(write_sweep(tmp_path, replaced=replaced, tokens=4096)), tmp_path / "runs"
    summary = run(sweep, 1, runs)
    assert (summary.complete, summary.failed) == (0, 1)
    (trial,) = trials_of(runs)
    assert (trial.state, trial.user_attrs["outcome"]) == (TrialState.FAIL, "diverged")
    assert load_runs(runs)["status"].tolist() == ["diverged"]


def test_a_run_folder_names_its_trial(sweep_file: Path, tmp_path: Path) -> None:
    run(load_sweep(sweep_file), 2, tmp_path / "runs")
    about = [json.loads((folder.path / "trial.json").read_text()) for folder in find_runs(tmp_path / "runs")]
    by_number = {each["trial"]: each["params"] for each in about}
    assert by_number == {trial.number: trial.params for trial in trials_of(tmp_path / "runs")}


def test_a_sweep_file_that_changed_under_its_study_is_refused_with_the_difference(
    sweep_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    run(load_sweep(sweep_file), 1, runs)
    before = sweep_file.read_text()
    sweep_file.write_text(before.replace("32, 96, step=32", "32, 128, step=32"))
    with pytest.raises(ValueError, match=r"changed since.*32, 96, step=32.* is now .*32, 128, step=32.*--new-study"):
        run(load_sweep(sweep_file), 2, runs)
    assert len(trials_of(runs)) == 1
    run(load_sweep(sweep_file), 1, runs, new_study=True)
    assert [len(trials_of(runs, name)) for name in ("width", "width-2")] == [1, 1]
    sweep_file.write_text(before.replace("objectives =", "# a remark\nobjectives ="))
    with pytest.raises(ValueError, match=r"'width-2'"):  # the newest one is the one that goes on
        run(load_sweep(sweep_file), 2, runs)


def test_a_comment_in_a_sweep_file_changes_nothing(sweep_file: Path, tmp_path: Path) -> None:
    run(load_sweep(sweep_file), 1, tmp_path / "runs")
    sweep_file.write_text(sweep_file.read_text().replace("objectives =", "# a remark\n\nobjectives  ="))
    assert run(load_sweep(sweep_file), 1, tmp_path / "runs").complete == 1


@pytest.mark.parametrize(
    ("options", "message"), [({"sampler": "qmc"}, "--sampler must be"), ({"seed": 7}, "--seed must be")]
)
def test_another_sampler_or_seed_than_the_study_has_is_refused(
    sweep_file: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    run(load_sweep(sweep_file), 1, tmp_path / "runs")
    with pytest.raises(ValueError, match=message) as refusal:
        run(load_sweep(sweep_file), 2, tmp_path / "runs", **options)
    assert "--new-study" in str(refusal.value)


def test_the_first_line_that_differs_is_named() -> None:
    assert first_difference("a = 1\nb = 2", "a = 1\nb = 2") is None
    assert first_difference("a = 1\nb = 2", "a = 1\nb = 3") == "'b = 2' is now 'b = 3'"
    assert first_difference("a = 1", "a = 1\nb = 3\nc = 4") == "'nothing' is now 'b = 3', and 1 more lines"
    assert first_difference("a = 1\nb = 3", "a = 1") == "'b = 3' is now 'nothing'"


@pytest.mark.parametrize("n_writes", range(8))
def test_a_study_whose_creation_was_killed_is_completed(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_writes: int
) -> None:
    sweep, storage = load_sweep(sweep_file), open_storage(tmp_path / "runs")
    monkeypatch.setattr("explore.study.identity.CREATION_S", 0.0)
    with monkeypatch.context() as patch:
        left = iter(range(n_writes + 1))  # the first write creates the study
        real = storage._write_log  # type: ignore[attr-defined]

        def killed(*args: object) -> None:
            if next(left, None) is None:
                raise SystemExit
            real(*args)

        patch.setattr(storage, "_write_log", killed)
        with pytest.raises(SystemExit):
            open_study(sweep, storage, seed=3)
    study = open_study(sweep, storage, seed=3)
    assert study.user_attrs["code"] == sweep.code
    assert (study.user_attrs["seed"], study.user_attrs["sampler"]) == (3, "random")
    assert [trial.system_attrs["fixed_params"] for trial in study.trials] == list(sweep.baselines)
    assert study.metric_names == ["val_bpb", "flops_run"]


@pytest.mark.parametrize("n_objectives", [1, 2])
def test_a_foreign_study_is_not_changed(sweep_file: Path, tmp_path: Path, n_objectives: int) -> None:
    storage = open_storage(tmp_path / "runs")
    study = optuna.create_study(storage=storage, study_name="width", directions=["minimize"] * n_objectives)
    if n_objectives == 2:  # as a sweep has
        study.tell(study.ask(), [1.0, 2.0])
    with pytest.raises(ValueError, match="was not made by this command"):
        open_study(load_sweep(sweep_file), storage)
    assert not study.user_attrs


def test_a_value_that_is_not_a_number_fails_its_trial_and_not_the_sweep(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(sweep_file)
    row = fitting.RunFolder.row
    monkeypatch.setattr(fitting.RunFolder, "row", lambda self: row(self) | {"val_bpb": float("nan")})
    assert run(sweep, 1, tmp_path / "runs").failed == 1
    assert trials_of(tmp_path / "runs")[0].user_attrs["reason"] == "the run has no val_bpb"


def test_seeds_share_a_trial_and_its_values_are_their_means(tmp_path: Path) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path, replaced={'sampler = "random"': "seeds = 2"})), tmp_path / "runs"
    run(sweep, 1, runs)
    ((values, table),) = [(values, load_runs(runs)) for values in done_by_key(study_of(runs)).values()]
    assert sorted(table["seed"]) == [0, 1]
    assert values[0] == pytest.approx(table["val_bpb"].mean())


# Modules that a sweep file imports


@pytest.fixture
def with_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A sweep file that imports a module of a local package."""
    package = tmp_path / "own_sizes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "deep.py").write_text('"""Sizes."""\n\nLARGEST = 200  # not more\n')
    (package / "sizes.py").write_text("from .deep import LARGEST\n\nassert LARGEST\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_sizes", "own_sizes.sizes", "own_sizes.deep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    replaced = {"from explore import": "from own_sizes.sizes import LARGEST\nfrom explore import", "> 200": "> LARGEST"}
    return write_sweep(tmp_path, replaced=replaced), package / "deep.py"


def test_a_module_that_changed_under_its_study_is_refused_with_the_difference(
    with_module: tuple[Path, Path], tmp_path: Path
) -> None:
    (file, module), runs = with_module, tmp_path / "runs"
    sweep = load_sweep(file)
    assert list(sweep.modules) == ["own_sizes", "own_sizes.deep", "own_sizes.sizes"]
    run(sweep, 1, runs)
    module.write_text('"""Other words."""\n\nLARGEST = 200\n')
    assert run(sweep, 2, runs).complete == 2
    module.write_text("LARGEST = 150\n")
    message = r"module own_sizes.deep: changed since the study 'width' began: 'LARGEST = 200' is now 'LARGEST = 150'"
    with pytest.raises(ValueError, match=message):
        run(sweep, 3, runs)
    assert run(sweep, 1, runs, new_study=True).complete == 1


def test_only_the_users_modules_count(sweep_file: Path) -> None:
    text = sweep_file.read_text()
    sweep_file.write_text(text.replace("from explore import", "import json, optuna\nfrom explore import", 1))
    assert load_sweep(sweep_file).modules == {}


def test_a_byte_order_mark_in_a_sweep_file_is_ignored(sweep_file: Path, tmp_path: Path) -> None:
    sweep_file.write_bytes(b"\xef\xbb\xbf" + sweep_file.read_bytes())
    assert run(load_sweep(sweep_file), 1, tmp_path / "runs").complete == 1
    sweep_file.write_bytes(sweep_file.read_bytes()[3:])
    assert run(load_sweep(sweep_file), 2, tmp_path / "runs").complete == 2
