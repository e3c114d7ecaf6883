"""Records of many runs in one file: read like their folders, and resumed from."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pandas as pd
import pytest
from small_runs import tiny, train, write_corpus
from small_sweeps import done_by_key, quiet, study_of, write_sweep

from explore.records import pack_runs, unpack_runs
from explore.runs import PILOTS, RunFolder, find_runs, read_packed
from explore.study import TrialOptions, load_sweep, run_sweep
from explore.table import load_metrics, load_runs
from explore.train import fitting


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    corpus = write_corpus(folder)
    for seed in (0, 1):
        train(tiny(corpus, "-", seed=seed, train__tokens=256), folder / "runs")
    train(tiny(corpus, "-", name="pilot", seed=2, train__tokens=256), folder / "runs" / PILOTS)
    return folder / "runs"


def test_a_table_of_records_is_read_as_its_folder_is(runs: Path, tmp_path: Path) -> None:
    packed = tmp_path / "new" / "s.parquet"
    assert pack_runs(packed, runs) == 3
    assert len(load_runs(packed)) == 2  # pilots are no rows
    pd.testing.assert_frame_equal(load_runs(packed), load_runs(runs))
    pd.testing.assert_frame_equal(load_metrics(packed), load_metrics(runs))


def test_a_run_gives_its_experiment_packed_or_not(runs: Path, tmp_path: Path) -> None:
    pack_runs(tmp_path / "s.parquet", runs)
    corpus = runs.parent
    for found in (find_runs(runs), find_runs(tmp_path / "s.parquet")):
        experiments = [run.load_experiment() for run in found]
        assert sorted(one.seed for one in experiments) == [0, 1]
        assert tiny(corpus, "-", seed=0, train__tokens=256) in experiments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"must be a run folder, with an experiment\.json that can be read"),
        ("{", r"must be a run folder, with an experiment\.json that can be read"),
        ('{"key": "ab"}', r"experiment\.json: input should be a valid dictionary"),
        ('{"key": "ab", "experiment": {"seed": -1}}', r"experiment\.json: name: field required \(and 4 more\)"),
    ],
)
def test_a_record_without_an_experiment_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    packed = {} if text is None else {"experiment.json": text}
    if text is not None:
        (tmp_path / "experiment.json").write_text(text)
    for run in (RunFolder(tmp_path), RunFolder(tmp_path, packed)):
        with pytest.raises(ValueError, match=message) as caught:
            run.load_experiment()
        assert "\n" not in str(caught.value)


def test_unpacked_records_equal_the_runs_with_their_pilots(runs: Path, tmp_path: Path) -> None:
    pack_runs(tmp_path / "s.parquet", runs)
    assert unpack_runs(tmp_path / "s.parquet", tmp_path / "again") == 3
    for place in (".", PILOTS):
        pd.testing.assert_frame_equal(load_runs(tmp_path / "again" / place), load_runs(runs / place))
    assert unpack_runs(tmp_path / "s.parquet", tmp_path / "again") == 0


def test_packed_runs_stay_when_their_folders_are_gone(runs: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(runs, some)
    pack_runs(tmp_path / "s.parquet", some)
    shutil.rmtree(find_runs(some)[0].path)
    assert pack_runs(tmp_path / "s.parquet", some) == 3


def test_a_table_without_additions_is_not_rewritten(runs: Path, tmp_path: Path) -> None:
    packed = tmp_path / "s.parquet"
    pack_runs(packed, runs)
    table = pd.read_parquet(packed)
    table.attrs.clear()
    table.to_parquet(packed, compression=None)  # as another version would write it
    before = packed.read_bytes()
    assert pack_runs(packed, runs) == 3
    assert packed.read_bytes() == before


def test_unfinished_runs_are_not_packed_and_finished_ones_not_overwritten(runs: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(runs, some)
    pack_runs(tmp_path / "all.parquet", some)
    first, second = find_runs(some)
    (first.path / "result.json").unlink()
    assert pack_runs(tmp_path / "ended.parquet", some) == 2
    (second.path / "metrics.csv").write_text("mine\n")
    assert unpack_runs(tmp_path / "all.parquet", some) == 1
    assert RunFolder(first.path).is_finished
    assert (second.path / "metrics.csv").read_text() == "mine\n"


def test_an_invalid_table_of_records_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"records: the suffix must be \.parquet, got '.*s\.csv'"):
        pack_runs(tmp_path / "s.csv")
    (tmp_path / "text.parquet").write_text("text")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "empty.parquet").touch()
    for name in ("text.parquet", "other.parquet", "absent.parquet", "empty.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: is not a table of records \(.*\)$"):
            unpack_runs(tmp_path / name, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../../x", "x/../../y", "/tmp/x", "..", ".", "", "a\0b", 3, None, 2.5])
def test_a_table_with_a_run_path_outside_the_runs_is_refused(tmp_path: Path, name: object) -> None:
    packed, runs = tmp_path / "s.parquet", tmp_path / "some" / "runs"
    pd.DataFrame({"run": [name], "experiment.json": ['{"key": "0123456789"}']}).to_parquet(packed)
    for call in (lambda: unpack_runs(packed, runs), lambda: find_runs(packed), lambda: pack_runs(packed, runs)):
        with pytest.raises(ValueError, match=r"s\.parquet: run must be the path of a folder below .*, got ") as refusal:
            call()
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["s.parquet"]


def test_a_table_of_records_with_a_flipped_bit_is_refused_or_read_as_it_was(runs: Path, tmp_path: Path) -> None:
    packed, flipped, rng = tmp_path / "s.parquet", tmp_path / "flipped.parquet", random.Random(0)
    pack_runs(packed, runs)
    raw, whole = packed.read_bytes(), texts(packed)
    n_refused = 0
    for _ in range(300):
        bit = rng.randrange(8 * len(raw))
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            assert texts(flipped) == whole, f"bit {bit}"
        except ValueError:
            n_refused += 1
    assert n_refused > 30


def texts(packed: Path) -> dict[str, dict[str, str]]:
    return {str(run.path.relative_to(packed)): dict(run.packed or {}) for run in read_packed(packed)}


def test_a_record_that_was_edited_in_its_table_is_refused(runs: Path, tmp_path: Path) -> None:
    pack_runs(tmp_path / "s.parquet", runs)
    table = pd.read_parquet(tmp_path / "s.parquet")
    table["result.json"] = table["result.json"].str.replace("finished", "diverged")
    table.to_parquet(tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="is damaged, since sha256 does not match its records"):
        find_runs(tmp_path / "s.parquet")
    table.attrs.clear()  # as in a table that an older version wrote
    table.to_parquet(tmp_path / "s.parquet")
    assert {run.status for run in find_runs(tmp_path / "s.parquet")} == {"diverged"}
    assert pack_runs(tmp_path / "s.parquet", runs) == 3
    assert pd.read_parquet(tmp_path / "s.parquet").attrs


def test_two_writers_of_a_table_keep_all_runs(runs: Path, tmp_path: Path) -> None:
    """Each writer has its own run. Without a lock both would read the table before either writes it."""
    packed, parts = tmp_path / "s.parquet", []
    for i, run in enumerate(find_runs(runs)):
        shutil.copytree(run.path, tmp_path / f"runs{i}" / run.path.name)
        parts.append(tmp_path / f"runs{i}")
    for _ in range(5):
        packed.unlink(missing_ok=True)
        writers = [threading.Thread(target=pack_runs, args=(packed, part)) for part in parts]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert len(find_runs(packed)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs0", "runs1", "s.parquet"]


def test_a_sweep_resumes_from_its_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, packed, options = load_sweep(write_sweep(tmp_path)), tmp_path / "s.parquet", TrialOptions(notes=False)
    run_sweep(sweep, 3, tmp_path / "here", records=packed, options=options, console=quiet())
    trained = []
    train_one = fitting.train_run
    monkeypatch.setattr(fitting, "train_run", lambda run: trained.append(run.key) or train_one(run))
    run_sweep(sweep, 4, tmp_path / "there", records=packed, options=options, console=quiet())
    here, there = (done_by_key(study_of(tmp_path / place)) for place in ("here", "there"))
    assert len(here) == 3
    assert trained == list(there.keys() - here.keys())
    assert here.items() <= there.items()
    assert len(load_runs(packed)) == 4


@pytest.mark.parametrize("name", ["s.csv", "corpus.txt/s.parquet"])
def test_a_table_of_records_that_cannot_be_written_is_found_before_the_first_trial(tmp_path: Path, name: str) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    options = TrialOptions(notes=False)
    with pytest.raises((ValueError, OSError), match=r"the suffix must be|corpus"):
        run_sweep(sweep, 1, runs, records=tmp_path / name, options=options, console=quiet())
    assert not [trial for trial in study_of(runs).trials if trial.state.is_finished()]
