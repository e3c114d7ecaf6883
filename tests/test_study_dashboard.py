"""A study in the standard optuna-dashboard, served on loopback and read by an HTTP client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState
from rich.console import Console

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.files import write_json
from explore.formatting import count, flops
from explore.formatting.markdown import code
from explore.runs import RunFolder
from explore.study import dashboard
from explore.study.dashboard import annotate, describe_study, trial_note
from explore.study.journal import WholeJournal
from explore.train import fit

QUESTION = """Do experts pay?

    With `d_expert` | `top_k` fixed, at equal FLOPs.
"""
PNG = b"\x89PNG\r\n\x1a\n"


def experiment(folder: Path, pattern: str = "-E", **train: Any) -> Experiment:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    blocks = {"-": {"d_ff": 64}, "E": {"n_experts": 4, "top_k": 2, "d_expert": 16}}
    return Experiment(
        name="two|part",
        model=ModelConfig(d_model=32, vocab_size=257, pattern=pattern, blocks=blocks),
        data=TextData(corpus=str(corpus), tokenizer="bytes", seq_len=32),
        train=TrainConfig(
            **{"tokens": 1024, "batch_size": 4, "lr": 0.004, "eval_tokens": 128, "val_every": 2, **train}
        ),
    )


def new_study(runs: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    study = optuna.create_study(study_name="experts", storage=storage, directions=["minimize", "minimize"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["val_bpb", "flops_run"])
    return study


def run_trial(study: optuna.Study, runs: Path, one: Experiment) -> tuple[optuna.Trial, RunFolder]:
    trial = study.ask()
    trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    return trial, fit(one, runs, console=Console(quiet=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("experts")
    study = new_study(runs)
    describe_study(study, QUESTION)
    for pattern in ("-E", "E-E"):
        trial, folder = run_trial(study, runs, experiment(runs, pattern))
        trial.set_user_attr("tuned", pattern == "E-E")
        annotate(study, trial._cached_frozen_trial, folder, runs / "artifacts", say=pytest.fail)
        row = folder.row()
        study.tell(trial, [row["val_bpb"], row["flops_run"]])
    return runs


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    options = ["--artifact-dir", str(runs / "artifacts"), "--port", str(port), "--quiet"]
    server = subprocess.Popen([program, str(runs / "study.journal"), *options], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                get(f"{url}/api/meta")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def test_the_dashboard_shows_the_study_by_its_names(url: str) -> None:
    (summary,) = json.loads(get(f"{url}/api/studies"))["study_summaries"]
    detail = json.loads(get(f"{url}/api/studies/{summary['study_id']}"))
    assert summary["study_name"] == detail["name"] == "experts"
    assert detail["objective_names"] == ["val_bpb", "flops_run"]
    assert detail["note"]["body"].startswith("Do experts pay?\n\nWith `d_expert` | `top_k` fixed")
    assert "`flops_run`: Training FLOPs (lower is better)" in detail["note"]["body"]
    assert [parameter["name"] for parameter in detail["trials"][0]["params"]] == ["lr"]


def test_the_dashboard_shows_a_note_of_every_trial(url: str, runs: Path) -> None:
    for trial in json.loads(get(f"{url}/api/studies/0"))["trials"]:
        note = trial["note"]["body"]
        assert f"val_bpb {trial['values'][0]:.4f}" in note
        assert "| pattern | `" + ("E-E" if trial["number"] else "-E") + "` |" in note
        assert "| name | `two\\|part` |" in note
        assert "0.004, tuned" in note if trial["number"] else "0.004, not tuned" in note
        assert "| experts |" in note
        assert f"explore generate {runs}/twopart-" in note


def test_the_dashboard_serves_the_figures_of_every_trial(url: str) -> None:
    for trial in json.loads(get(f"{url}/api/studies/0"))["trials"]:
        artifacts = {each["filename"]: each for each in trial["artifacts"]}
        assert set(artifacts) == {"learning_curve.png", "cost.png"}
        assert {each["mimetype"] for each in artifacts.values()} == {"image/png"}
        for each in artifacts.values():
            picture = get(f"{url}/artifacts/0/{trial['trial_id']}/{each['artifact_id']}")
            assert picture.startswith(PNG)
            assert len(picture) > 5000


def test_the_components_of_a_note_add_up_to_the_cost_of_the_model(tmp_path: Path) -> None:
    one = experiment(tmp_path, "E-E")
    cost = one.model.cost(32)
    (total,) = [line for line in dashboard._components(one).splitlines() if "total" in line]
    assert total == f"| **total** | {count(cost.params_total)} | {flops(cost.flops_fwd)} | |"


@pytest.mark.parametrize("lengths", [(10,), (2045,), (2046, 3), (5000, 4091)])
def test_notes_of_any_length_are_read_by_the_package_of_the_dashboard(tmp_path: Path, lengths: tuple[int]) -> None:
    study = new_study(tmp_path)
    trial = study.ask()
    for length in lengths:
        body = "".join(chr(97 + i % 26) for i in range(length))
        for written, read in ((None, study), (trial._cached_frozen_trial, trial)):
            dashboard._save_note(study, written, body)
            assert optuna_dashboard.get_note(read) == body
    optuna_dashboard.save_note(study, "edited")
    describe_study(study, QUESTION)
    assert optuna_dashboard.get_note(study) == "edited"


def test_the_note_of_a_rejected_trial_does_not_call_it_pruned(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    trial = study.ask()
    dashboard.note_rejection(study, trial._cached_frozen_trial, "params_total is 3% above its budget")
    assert optuna_dashboard.get_note(trial) == (
        "**rejected before training**, not pruned: params_total is 3% above its budget\n"
    )


NAME = "a|b\n# c <script>alert(1)</script> [x](javascript:y) `code`"
ESCAPED = r"a\|b # c &lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:y) \`code\`"


def test_names_and_reasons_in_notes_are_escaped(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    trial = study.ask()
    trial.set_user_attr("reason", NAME)
    folder = tmp_path / "run"
    write_json(folder / "experiment.json", {"key": "0" * 64, "experiment": {"name": NAME, "seed": 1}})
    write_json(folder / "result.json", {"status": "failed"})
    note = trial_note(trial._cached_frozen_trial, RunFolder(folder), None)
    assert note.startswith(f"**failed**: {ESCAPED}\n")
    assert f"| name | {ESCAPED} |\n" in note
    dashboard.note_rejection(study, trial._cached_frozen_trial, NAME)
    assert optuna_dashboard.get_note(trial) == f"**rejected before training**, not pruned: {ESCAPED}\n"


def test_a_name_without_markup_is_code() -> None:
    assert code("M-|*E") == r"`M-\|*E`"
    assert code("a\nb") == "`a b`"
    assert code(NAME) == ESCAPED


def test_files_that_cannot_be_written_are_warnings_of_one_line(tmp_path: Path) -> None:
    study, messages = new_study(tmp_path), list[str]()
    trial, folder = run_trial(study, tmp_path, experiment(tmp_path))
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    annotate(study, trial._cached_frozen_trial, folder, tmp_path / "artifacts", say=messages.append)
    assert [line.partition(" for ")[0] for line in messages] == ["trial 0: no learning curve", "trial 0: no cost"]
    assert not any("\n" in line for line in messages)
    assert "val_bpb" in optuna_dashboard.get_note(trial)


def test_a_damaged_run_still_has_a_note(tmp_path: Path) -> None:
    study, messages = new_study(tmp_path), list[str]()
    trial, folder = run_trial(study, tmp_path, experiment(tmp_path))
    (folder.path / "experiment.json").write_text("{")
    (folder.path / "metrics.csv").unlink()
    annotate(study, trial._cached_frozen_trial, folder, tmp_path / "artifacts", say=messages.append)
    assert [line.partition(" for ")[0] for line in messages] == ["trial 0: no learning curve"]
    assert "unfinished" in optuna_dashboard.get_note(trial)


def test_a_trial_reaped_meanwhile_is_not_changed(tmp_path: Path) -> None:
    study, messages = new_study(tmp_path), list[str]()
    trial, folder = run_trial(study, tmp_path, experiment(tmp_path))
    study.tell(trial, state=TrialState.FAIL)
    annotate(study, trial._cached_frozen_trial, folder, tmp_path / "artifacts", say=messages.append)
    assert messages == []


def test_a_run_without_validations_shows_its_training_loss(tmp_path: Path) -> None:
    _, folder = run_trial(new_study(tmp_path), tmp_path, experiment(tmp_path, val_every=None))
    (ax,) = dashboard._curve(folder).axes
    assert ax.get_ylabel() == "Training loss (nats per token)"
    assert list(ax.lines[0].get_ydata()) == pytest.approx(list(folder.metrics["loss"]))


def test_a_note_has_the_search_of_the_learning_rate(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    trial, folder = run_trial(study, tmp_path, experiment(tmp_path))
    found = {"tuned": True, "lr_sensitivity": 0.01, "lr_pilots": {"0.002": 2.5, "0.004": float("inf")}}
    for name, value in found.items():
        trial.set_user_attr(name, value)
    note = trial_note(trial._cached_frozen_trial, folder, None)
    assert "0.004, tuned, half or twice of it costs 0.0100; val_bpb of pilots: 0.002 → 2.5000, 0.004 → inf" in note


def test_edits_in_the_dashboard_during_a_sweep_are_kept(tmp_path: Path) -> None:
    """The dashboard opens the journal with Optuna's own class and writes to it when a note is edited."""
    study = new_study(tmp_path)
    path = tmp_path / "study.journal"
    script = f"""
from optuna.storages.journal import JournalFileBackend, JournalStorage
backend = JournalFileBackend({str(path)!r})
for i in range(50):
    backend.append_logs([{{"edited": i}}])
"""
    ours, n = WholeJournal(path), 0
    before = len(list(JournalFileBackend(str(path)).read_logs(0)))
    other, deadline = subprocess.Popen([sys.executable, "-c", script]), time.monotonic() + 60
    while other.poll() is None and time.monotonic() < deadline:
        ours.append_logs([{"written": n}])
        n += 1
        time.sleep(0.005)
    other.kill()
    assert other.wait() == 0
    logs = list(JournalFileBackend(str(path)).read_logs(0))
    assert [log["edited"] for log in logs[before:] if "edited" in log] == list(range(50))
    assert [log["written"] for log in logs[before:] if "written" in log] == list(range(n))
    assert study.study_name == "experts"
