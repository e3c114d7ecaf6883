"""The preview of a sweep: the number of experiments, their costs, and the differences that they resolve."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from command_line import run as run_command
from rich.console import Console
from scipy import stats
from small_sweeps import write_gated

from explore import train
from explore.cli import main
from explore.experiment import Experiment
from explore.runs import RunFolder, walk_runs
from explore.study import load_sweep, preview, run_sweep
from explore.study.preview import seed_noise

RECORDS = Path(__file__).parents[1] / "sweeps" / "records" / "latent_or_not.parquet"
SWEEP = '''"""How large is this space?"""

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.search import PatternSpace
from explore.study import RejectedError

objectives = {"val_bpb": "minimize", "flops_run": "minimize"}
patterns = PatternSpace(letters="*-", min_layers=2, max_layers=4)
seeds = SEEDS


def experiment(trial):
    pattern = patterns.suggest(trial)
    d_model = trial.suggest_int("d_model", 32, 128, step=32)
    if "-" in pattern:
        d_ff = trial.suggest_categorical("d_ff", [32, 64, 96])
    else:
        d_ff = 32
    LR
    if d_model == 128 and pattern == "--":
        raise RejectedError("too large")
    blocks = {"-": {"d_ff": d_ff}, "*": {"d_head": 16, "n_heads": 2, "n_kv_heads": 1}}
    model = ModelConfig(d_model=d_model, vocab_size=257, pattern=pattern, blocks=blocks)
    data = TextData(corpus=CORPUS, tokenizer="bytes", seq_len=32)
    train = TrainConfig(tokens=512, batch_size=4, lr=lr, eval_tokens=128)
    return Experiment(name="s", model=model, data=data, train=train)
'''


def written(folder: Path, seeds: int = 1, lr: str = "lr = 1e-3") -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    path = folder / "space.py"
    path.write_text(SWEEP.replace("SEEDS", str(seeds)).replace("LR", lr).replace("CORPUS", repr(str(corpus))))
    return path


@pytest.mark.slow
def test_the_number_of_feasible_experiments_is_estimated_without_bias(tmp_path: Path) -> None:
    seen = preview(load_sweep(written(tmp_path)), 10, tmp_path / "runs", measure=False)
    patterns = ["".join(letters) for n in (2, 3, 4) for letters in itertools.product("*-", repeat=n)]
    truth = sum(4 * (3 if "-" in pattern else 1) for pattern in patterns) - 3
    assert abs(seen.n_feasible - truth) < 3 * seen.n_feasible_error < 0.2 * truth
    assert seen.n_feasible_error > 0
    assert seen.why == (("too large", round(seen.rejected * 400)),)


@pytest.mark.slow
def test_a_continuous_parameter_is_named_and_nothing_is_counted(tmp_path: Path) -> None:
    path = written(tmp_path, lr='lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)')
    seen = preview(load_sweep(path), 10, tmp_path / "runs", measure=False)
    assert seen.continuous == ("lr",)
    assert math.isinf(seen.n_feasible)


@pytest.mark.slow
def test_flops_are_those_of_all_trials_and_seeds(tmp_path: Path) -> None:
    one, three = (
        preview(load_sweep(written(tmp_path, seeds)), 10, tmp_path / "runs", measure=False) for seeds in (1, 3)
    )
    assert three.flops == pytest.approx(3 * one.flops)
    costs = [each.flops_run for each in one.examples]
    assert costs == sorted(costs)
    assert costs[0] < one.flops / 10 < costs[-1]


@pytest.mark.slow
def test_the_resolvable_difference_follows_from_the_spread_between_seeds(tmp_path: Path) -> None:
    sweep, runs = load_sweep(written(tmp_path, seeds=3)), tmp_path / "runs"
    assert preview(sweep, 2, runs, measure=False).differences is None
    assert seed_noise(tmp_path, (1.0, 2.0)) is None
    run_sweep(sweep, 2, runs, console=Console(quiet=True))
    seen = preview(sweep, 2, runs, measure=False)
    assert seen.noise is not None
    assert (seen.noise.n, seen.noise.dof) == (2, pytest.approx((4, 4)))
    groups: dict[str, list[float]] = {}
    for folder in train_rows(runs):
        groups.setdefault(folder["pattern"] + str(folder["d_model"]), []).append(folder["val_bpb"])
    pooled = math.sqrt(statistics.fmean(statistics.variance(values) for values in groups.values()))
    assert seen.noise.sd == pytest.approx((pooled, pooled))
    t = stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)
    assert seen.differences == pytest.approx((t * pooled * math.sqrt(2 / 3),) * 2)


def test_the_spread_between_seeds_follows_the_cost() -> None:
    noise = seed_noise(RECORDS, (1e11, 2.6e12))
    assert noise is not None
    assert noise.kind == "power"
    assert noise.sd[0] > 2 * noise.sd[1]
    assert noise.bartlett_p < 0.05
    cheap, dear = noise.resolvable(seeds=3)
    assert cheap == pytest.approx(
        sum(stats.t.ppf(q, noise.dof[0]) for q in (0.975, 0.8)) * noise.sd[0] * (2 / 3) ** 0.5
    )
    assert dear < cheap / 2


def train_rows(runs: Path) -> list[dict[str, object]]:
    from explore.runs import find_runs

    return [folder.row() for folder in find_runs(runs)]


def test_runs_that_stop_at_a_recall_are_timed_without_validations(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text().replace("TextData(", "RecallData(n_pairs=2, vocab_size=64, n_eval=8, fewer_pairs=(1,))  # ")
    text = text.replace("import Experiment, ", "import RecallData, Experiment, ").replace("seq_len=32", "")
    text = text.replace("eval_tokens=128", "val_every=2, stop_recall=0.9")
    path.write_text(text)
    timed = preview(load_sweep(path), 2, tmp_path / "runs")
    assert timed.wall_s is not None
    assert 0 < timed.wall_s < 600


@pytest.mark.parametrize("exists", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_examples_are_timed_beside_the_runs_and_appear_in_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """On the disk that the sweep will use; the checkpoints of a dry run that was killed are removed."""
    sweep, runs, places = load_sweep(written(tmp_path)), tmp_path / "disk" / "sweeps" / "runs", list[Path]()
    expected = runs.parent if exists else tmp_path / "disk"
    (runs if exists else expected).mkdir(parents=True)
    left = expected / ".0123abcd.tmp"
    (left / "pilots" / "s-0123abcd").mkdir(parents=True)
    real = train.fit

    def watched(experiment: Experiment, folder: Path, **options: object) -> RunFolder:
        run = real(experiment, folder, **options)  # type: ignore[arg-type]
        places.append(run.path)
        assert list(walk_runs(tmp_path)) == []
        return run

    monkeypatch.setattr(train, "fit", watched)
    before = {path for path in tmp_path.rglob("*") if left not in (path, *path.parents)}
    timed = preview(sweep, 2, runs)
    assert timed.wall_s is not None
    assert timed.wall_s > 0
    assert [place.parents[2] for place in places] == [expected] * 4
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_prints_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = written(tmp_path), {"corpus.txt", "space.py"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "argv", ["explore", "sweep", str(path), "--trials", "8", "--workers", "2", "--dry-run"])
    timed = []
    real = train.fit
    monkeypatch.setattr(train, "fit", lambda *args, **more: (timed.append(args), real(*args, **more))[1])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    output = capsys.readouterr().out
    for part in ("feasible experiments", "8 trials", "with 2 workers", "from 4 timed examples", "too large"):
        assert part in output
    assert len(timed) == 4
    assert {each.name for each in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_dry_run_prints_the_question_the_design_and_the_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_gated(tmp_path / "sweep")
    path.write_text(path.read_text().replace('"""Does width help?"""', '"""Does width help?\n\nPrimary: width."""'))
    args = ("sweep", str(path), "--trials", "20", "--runs", str(tmp_path / "runs"), "--workers", "1", "--dry-run")
    code, out, _ = run_command(capsys, monkeypatch, *args)
    assert code == 0
    parts = ("Primary: width.", "design: 4 trials of 3 seeds", "gate of width", "2 beats the floor", "for 4 trials")
    for part in parts:
        assert part in out
    record = json.loads(run_command(capsys, monkeypatch, *args, "--json")[1])
    assert [each["n_steps"] for each in record["design"]] == [2] * 4
    assert {"condition": "2 beats the floor", "needed": "below 0.100"} in record["gate"]
    assert not (tmp_path / "runs").exists()
