"""The public names of the package, `explore.load`, and errors for wrong types."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import result, tiny, train, write_corpus
from small_sweeps import write_sweep

import explore
from explore.interop import save_model_folder
from explore.terminal import NotebookOutput, plain_console


def test_everything_that_the_readme_uses_is_in_explore() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", root / "docs" / "start.md", *sorted((root / "docs" / "how-to").glob("*.md"))]
    readme = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    imported = re.findall(r"^from explore import (.+)$", readme, re.MULTILINE)
    used = {name.strip() for line in imported for name in line.split(",")}
    used |= set(re.findall(r"(?<![\w/.])explore\.(\w+)(?=[.(])", readme))
    assert {"Experiment", "fit", "load"} <= used
    assert used <= set(dir(explore))
    assert all(getattr(explore, name) is not None for name in dir(explore))


WRONG = {
    "explore.load(3)": "run must be a folder, or the beginning of a key or name (explore.fit gives a run), got 3",
    "explore.fit(model)": "experiment must be an explore.Experiment, got a ModelConfig",
    "explore.plot_frontier('runs')": "runs must be a table, as explore.load_runs gives it, got 'runs'",
    "explore.pareto_front([1])": "table must be a table of runs, as explore.load_runs gives it, got a list",
    "explore.load_runs({})": "runs must be a folder that holds runs, got a dict",
    "explore.preset(model)": "preset must be the name of a published system, got a ModelConfig",
    "explore.LanguageModel(None)": "config must be an explore.ModelConfig, got None",
    "explore.to_hf(model)": "model must be an explore.LanguageModel, got a ModelConfig",
    "explore.from_hf(model)": "source must be a folder, or a model of transformers, got a ModelConfig",
    "explore.latent_eff(model, 64, 16)": "standard must be an explore.MoEConfig, got a ModelConfig",
    "explore.Workbench(3)": "pattern must be a pattern, a model, or a run, got 3",
    "explore.load_sweep(3)": "path must be the path of a sweep file, got 3",
    "explore.run_sweep('x.py', 4, 'runs')": "sweep must be a sweep, as explore.load_sweep gives it, got 'x.py'",
    "explore.Experiment.load(3)": "path must be the path of an experiment in JSON, got 3",
    "explore.generate(model, 'It was', 5)": "model must be an explore.LanguageModel, got a ModelConfig",
    "explore.generate(small, 'It was', 5)": (
        "tokens must be a tensor of token ids; explore.load(run).generate takes text, got 'It was'"
    ),
    "explore.quantize([1.0], 'nvfp4')": "x must be a tensor, got a list",
    "explore.load_metrics({})": "runs must be a folder that holds runs, got a dict",
    "explore.latent_acc(model, 64, 16)": "standard must be an explore.MoEConfig, got a ModelConfig",
    "explore.latent_acc(model.blocks['E'], '64', 16)": "d_model must be a whole number, got '64'",
}


def test_a_wrong_type_gives_a_one_sentence_error() -> None:
    """Runs in a process without the shape checks of the tests, which would refuse the types first."""
    program = "import explore\nmodel = explore.preset('nemotron-3-nano')\n"
    program += "small = explore.LanguageModel(explore.ModelConfig(d_model=64, vocab_size=257, pattern='-'))\n"
    program += "for call in " + repr(list(WRONG)) + ":\n"
    program += "    try: eval(call)\n    except TypeError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(WRONG.values())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one short run in the folder `runs`."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").mkdir()
    train(tiny(write_corpus(place / "text"), "M*", name="first"), place / "runs")
    return place


def test_a_run_is_opened_by_its_name_its_key_or_its_folder(place: Path) -> None:
    (folder,) = (each for each in (place / "runs").iterdir() if (each / "result.json").exists())
    run = explore.load("first", place / "runs")
    for other in (folder, explore.load(folder).folder, run.folder.key):
        assert explore.load(other, place / "runs").path == folder
    assert run.experiment == run.folder.load_experiment()
    assert run.config == run.model.config
    assert run.result == result(run.folder)
    assert len(run.metrics) == 20
    assert repr(run) == f"LoadedRun({folder}, finished, val_bpb {run.result['val_bpb']:.4f})"
    assert "<polyline" in run._repr_html_()


def test_an_opened_run_reproduces_its_recorded_score_and_scores_other_texts(place: Path) -> None:
    run = explore.load("first", place / "runs")
    scores = run.evaluate(str(place / "text"))
    recorded = {name: run.result[name] for name in ("val_loss", "val_bpb", "test_loss", "test_bpb")}
    assert {name: scores[name] for name in recorded} == pytest.approx(recorded, rel=1e-5)
    assert scores["text_bpb"] == pytest.approx(scores["test_bpb"])  # its own text by another name


def test_an_opened_run_generates_text(place: Path) -> None:
    run = explore.load("first", place / "runs")
    text = run.generate("train 1 ", 12, temperature=0)
    assert text.startswith("train 1 ")
    assert text == run.generate("train 1 ", 12, temperature=0)
    assert run.generate("train 1 ", 12, seed=1) != run.generate("train 1 ", 12, seed=2)
    with pytest.raises(ValueError, match="temperature must be 0 or more, got -1"):
        run.generate("train", temperature=-1)


def test_an_imported_model_can_be_opened_but_not_evaluated(place: Path) -> None:
    run = explore.load("first", place / "runs")
    folder = place / "imported"
    save_model_folder(run.model, folder)
    imported = explore.load(folder)
    assert imported.config == run.config
    assert repr(imported) == f"LoadedRun({folder}, imported)"
    with pytest.raises(ValueError, match="must be a run for this, got an imported model"):
        imported.evaluate()
    with pytest.raises(ValueError, match="must be a run folder"):
        explore.load(place)


@pytest.mark.parametrize("group", [None, "study"])
def test_in_a_notebook_training_shows_its_progress(
    place: Path, group: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a study removes its progress line when it ends; the table of the study stays."""
    shown: list[str] = []
    monkeypatch.setattr(NotebookOutput, "show", lambda self, html: shown.append(html))
    one = tiny(place / "text", "M", name="<shown>", seed=0 if group is None else 1)
    train(one, place / "shown", console=plain_console(force_jupyter=True), group=group)
    assert "0 of 20 steps" in shown[0]
    assert "width:50.0%" in shown[10]
    assert "10 of 20 steps · loss " in shown[10]
    assert "&lt;shown&gt;" in shown[10]
    assert ("20 of 20 steps" in shown[-1]) is (group is None)


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    sweep = explore.load_sweep(str(write_sweep(tmp_path)))
    assert sweep.path == tmp_path / "width.py"
    assert repr(sweep) == f"Sweep({tmp_path}/width.py, val_bpb minimized, flops_run minimized)"
    assert explore.run_sweep(sweep, 1, str(tmp_path / "runs"), console=plain_console(quiet=True)).complete == 1
    assert len(explore.load_runs(str(tmp_path / "runs"))) == 1
    (tmp_path / "one.json").write_text(sweep.examples[0].model_dump_json())
    assert explore.Experiment.load(str(tmp_path / "one.json")) == sweep.examples[0]
