import json
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from written_runs import KEY, RESULT, make_run

from explore import runs as runs_module
from explore.files import safe_name, write_json
from explore.quantities import columns
from explore.records import pack_runs
from explore.runs import RunFolder, find_run, find_runs, resolve_run, run_folder
from explore.table import load_metrics, load_runs, save_table

ROOT = Path(__file__).parents[1]
NAMES = [each.name for each in columns()]


def test_a_row_has_the_values_of_the_records_in_a_stable_order(tmp_path):
    make_run(tmp_path)
    table = load_runs(tmp_path)
    assert list(table.columns) == NAMES
    row = table.iloc[0]
    assert row.dropna().to_dict() == {
        "run": "run-01234567", "key": KEY, "name": "a name", "family": "hybrid LatentMoE", "pattern": "ME|M*E/*E",
        "seed": 3, "status": "finished", "params_total": 900_000, "params_active": 400_000, "flops_fwd": 4.9e6,
        "flops_train": 1.47e7, "flops_run": 1.2e13, "flops_with_parent": 1.2e13, "tokens": 819200, "val_bpb": 2.31,
        "test_bpb": 2.29, "val_loss": 5.1, "lr": 1e-3, "tuned": True, "train_s": 21.0, "tokens_per_s": 39000.0,
        "d_model": 128, "n_layers": 5, "n_experts": 16, "top_k": 2, "d_latent": 32, "kv_bytes_per_token": 512.0,
        "ssm_state_bytes": 65536.0, "corpus": "austen", "commit": "c0ffee", "finished_at": "2026-01-02T03:04:05+00:00",
        "step": 400, "max_violation": 0.4, "device": "cpu", "precision": "bf16", "n_steps": 400, "seq_len": 128,
            "eval_data": "4f53cda1",
    }  # fmt: skip


def test_a_run_of_a_sweep_records_how_learning_rate_and_sizes_were_chosen(tmp_path):
    path = make_run(tmp_path)
    record = {"tuned": False, "lr_sensitivity": 0.01, "residuals": {"params_active": -0.004, "flops_train": 0.002}}
    (path / "trial.json").write_text(json.dumps(record))
    row = load_runs(tmp_path).iloc[0]
    assert (row["tuned"], row["lr_sensitivity"], row["residual"]) == (False, 0.01, 0.004)


def test_pilots_are_no_rows_unless_they_are_named(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path / "pilots", "pilot", "a" * 64)
    assert len(load_runs(tmp_path)) == len(load_runs(tmp_path / "pilots")) == 1


def test_expert_columns_come_from_the_first_block_in_use_that_has_them(tmp_path):
    make_run(tmp_path, "none", "a" * 64, pattern="M*M/E")
    make_run(tmp_path, "standard", "b" * 64, pattern="MAE")
    table = load_runs(tmp_path).set_index("name", drop=False)
    none, standard = load_runs(tmp_path)[["n_experts", "top_k", "d_latent"]].itertuples(index=False)
    assert all(value is pd.NA for value in none)
    assert standard[:2] == (4, 1)
    assert standard[2] is pd.NA
    assert table["n_layers"].tolist() == [3, 3]


def test_dtypes_do_not_depend_on_missing_values(tmp_path):
    make_run(tmp_path / "full")
    (tmp_path / "bare" / "x").mkdir(parents=True)
    write_json(tmp_path / "bare" / "x" / "experiment.json", {"key": KEY})
    write_json(tmp_path / "bare" / "x" / "result.json", {"status": "diverged", "val_bpb": "a text", "step": True})
    full, bare = load_runs(tmp_path / "full"), load_runs(tmp_path / "bare")
    assert bare.dtypes.to_dict() == full.dtypes.to_dict() == load_runs(tmp_path, unfinished=True).dtypes.to_dict()
    assert bare["status"].tolist() == ["diverged"]
    assert np.isnan(bare["val_bpb"][0])


def test_runs_are_found_nested_and_once_but_not_inside_other_runs(tmp_path):
    outer = make_run(tmp_path / "demo" / "deep", "b", "b" * 64)
    make_run(tmp_path, "a", "a" * 64)
    shutil.copytree(outer, outer / "checkpoints" / "copy")
    assert load_runs(tmp_path)["run"].tolist() == ["a-aaaaaaaa", "b-bbbbbbbb"]
    assert load_runs(tmp_path / "demo", tmp_path)["run"].tolist() == ["b-bbbbbbbb", "a-aaaaaaaa"]
    assert load_runs(outer)["run"].tolist() == ["b-bbbbbbbb"]


@pytest.mark.parametrize("broken", ["experiment.json", "cost.json", "environment.json", "result.json"])
@pytest.mark.parametrize("content", ["", '{"key": "01', "[1, 2]", "\udcff"])
def test_a_half_written_folder_is_never_finished_and_never_breaks_the_table(tmp_path, broken, content):
    whole = make_run(tmp_path, "whole", "f" * 64)
    path = make_run(tmp_path)
    (path / broken).write_bytes(content.encode(errors="surrogateescape"))
    assert not RunFolder(path).is_finished
    assert load_runs(tmp_path)["run"].tolist() == [whole.name]
    table = load_runs(tmp_path, unfinished=True).set_index("run")
    assert table.loc[path.name, "status"] == "unfinished"


def test_a_run_without_result_is_unfinished_and_other_statuses_are_kept_out(tmp_path):
    make_run(tmp_path, "a", "a" * 64, result=None)
    make_run(tmp_path, "b", "b" * 64, result={"status": "stopped"})
    make_run(tmp_path, "c", "c" * 64, result={"status": "diverged", "val_bpb": None})
    assert load_runs(tmp_path)["status"].tolist() == ["diverged"]
    assert load_runs(tmp_path, unfinished=True)["status"].tolist() == ["unfinished", "stopped", "diverged"]


def test_a_folder_of_unfinished_runs_gives_an_empty_table_with_all_columns(tmp_path):
    make_run(tmp_path, result=None)
    table = load_runs(tmp_path)
    assert table.empty
    assert list(table.columns) == NAMES


def test_a_missing_root_or_one_without_runs_is_named_in_one_line(tmp_path):
    for roots, message in [
        ((tmp_path / "none",), "must be a folder of runs or a table of records"),
        ((tmp_path,), "holds no run"),
        ((), "no folder given"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_runs(*roots)
        assert "\n" not in str(error.value)
        assert all(repr(str(root)) in str(error.value) for root in roots)


def test_keys_with_eight_equal_characters_are_distinguished(tmp_path):
    one, two = "deadbeef" + "0" * 56, "deadbeef" + "1" * 56
    first = make_run(tmp_path, "same", one)
    assert find_run(tmp_path, two) is None
    second = run_folder(tmp_path, "same", two)
    assert second.path != first
    assert second.path.name.endswith("-deadbeef")
    shutil.copytree(make_run(tmp_path / "elsewhere", "same", two), second.path)
    shutil.rmtree(tmp_path / "elsewhere")
    assert find_run(tmp_path, one) == RunFolder(first)
    assert find_run(tmp_path, two) == second == run_folder(tmp_path, "same", two)


def test_an_existing_run_is_found_under_any_name_and_depth_the_finished_one_first(tmp_path):
    make_run(tmp_path / "a", "unfinished", result=None)
    finished = make_run(tmp_path / "b" / "c", "finished")
    assert run_folder(tmp_path, "another name", KEY).path == finished
    assert find_run(tmp_path / "nowhere", KEY) is None


def test_a_new_folder_is_named_in_safe_characters_and_not_made(tmp_path):
    new = run_folder(tmp_path, "../MEM*E lr=1e-3/é", KEY)
    assert new.path == tmp_path / "_MEMaE-lr-1e-3_--01234567"
    assert run_folder(tmp_path, "-M*-", KEY).path.name == "_Ma--01234567"
    assert run_folder(tmp_path, "!!", KEY).path.name == "run-01234567"
    assert not new.path.exists()


def test_folders_of_different_patterns_have_different_names():
    patterns = ["".join(letters) for n in range(1, 6) for letters in product("M*-E", repeat=n)]
    names = [safe_name(f"{pattern}-d128") for pattern in patterns] + [safe_name("ME/M*"), safe_name("MEM*")]
    assert len(set(names)) == len(names)
    assert safe_name("*-*-*-") == "a-a-a-"
    assert safe_name("ME*EME") == "MEaEME"


def test_a_run_is_found_by_its_folder_its_name_and_the_first_characters_of_its_key(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs" / "study")
    other = make_run(tmp_path / "runs" / "study", "other", "0123ffff" + KEY[8:])
    monkeypatch.chdir(tmp_path)
    for name in (run, "run-01234567", "run-0", "012345", KEY, "runs/study/01234", "runs/0123456"):
        assert resolve_run(name).path.resolve() == run
    assert resolve_run("0123f", tmp_path / "runs").path == other


def test_runs_are_found_in_a_table_of_records(tmp_path):
    make_run(tmp_path / "runs")
    pack_runs(tmp_path / "records.parquet", tmp_path / "runs")
    assert resolve_run("01234567", tmp_path / "records.parquet").row()["pattern"] == "ME|M*E/*E"


def test_a_prefix_of_no_run_or_of_several_is_refused_in_one_line(tmp_path, monkeypatch):
    make_run(tmp_path / "runs")
    make_run(tmp_path / "runs", "other", "0123ffff" + KEY[8:])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run '0123' matches 2 runs: runs/other-0123ffff, runs/run-01234567; give"):
        resolve_run("0123")
    for missing in ("012", "fedc", "nowhere/0123"):
        with pytest.raises(ValueError, match=f"run must be a run folder, the start of its name.*got '{missing}'; "):
            resolve_run(missing)


def test_a_folder_without_a_key_is_reused(tmp_path):
    path = tmp_path / "run-01234567"
    path.mkdir()
    (path / "experiment.json").write_text('{"key": "01')
    assert run_folder(tmp_path, "run", KEY).path == path
    write_json(path / "result.json", RESULT)
    assert run_folder(tmp_path, "run", KEY).path == tmp_path / "run-2-01234567"


def test_a_short_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="key: must be the full key of an experiment, got 'abc'"):
        find_run(tmp_path, "abc")


def test_json_is_read_back_unchanged_and_ends_in_a_newline(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(tmp_path / "new" / "x.json", content)
    text = (tmp_path / "new" / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("\n}\n")
    assert '\n  "a"' in text


def test_a_number_that_is_not_finite_is_refused_by_its_path_and_the_old_file_is_kept(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match=r"x\.json: value\.a\[1\]\.b = nan must be finite"):
        write_json(path, {"a": [0.0, {"b": float("nan")}]})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_write_that_dies_in_the_middle_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_module.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_before_the_swap_leaves_the_old_content(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    program = (
        "import os, signal, sys; from explore.files import write_json;"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL);"
        "write_json(sys.argv[1], {'new': 2})"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_saved_table_is_read_back_unchanged(tmp_path, suffix):
    make_run(tmp_path / "runs")
    make_run(tmp_path / "runs", "other", "b" * 64, pattern="M*")
    table = load_runs(tmp_path / "runs")
    path = tmp_path / "out" / f"table{suffix}"
    save_table(table, path)
    dtypes = {each.name: each.dtype for each in columns()}
    back = pd.read_csv(path).astype(dtypes) if suffix == ".csv" else pd.read_parquet(path)
    pd.testing.assert_frame_equal(back, table)
    assert list(path.parent.iterdir()) == [path]


def test_a_table_of_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table must be a \.csv or \.parquet file"):
        save_table(pd.DataFrame(), tmp_path / "table.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_metrics_lose_a_last_line_that_was_cut_off(tmp_path):
    path = make_run(tmp_path)
    with (path / "metrics.csv").open("a") as file:
        file.write("300,3000,2.")
    assert RunFolder(path).metrics["val_bpb"].tolist() == [3.0, 2.5]
    (path / "metrics.csv").write_text("step,tok")
    assert RunFolder(path).metrics.empty
    (path / "metrics.csv").unlink()
    assert RunFolder(path).metrics.empty


def test_learning_curves_of_all_runs_stand_in_one_table_with_training_flops(tmp_path):
    make_run(tmp_path, "a", "a" * 64, result=None)
    logged = make_run(tmp_path, "b", "b" * 64)
    (logged / "metrics.csv").write_text("step,tokens,flops_run,val_bpb\n100,5,7.0,3.5\n")
    (make_run(tmp_path, "c", "c" * 64) / "metrics.csv").unlink()
    table = load_metrics(tmp_path)
    assert table["run"].tolist() == ["a-aaaaaaaa", "a-aaaaaaaa", "b-bbbbbbbb"]
    assert table["flops_run"].tolist() == [1000 * 1.47e7, 2000 * 1.47e7, 7.0]
    assert table["val_bpb"].tolist() == [3.0, 2.5, 3.5]
    assert set(table["family"]) == {"hybrid LatentMoE"}


def test_run_folders_are_listed_in_order_of_their_paths(tmp_path):
    paths = [make_run(tmp_path / name, key=letter * 64) for name, letter in [("b", "b"), ("a", "a"), ("c", "c")]]
    assert [run.path for run in find_runs(tmp_path)] == sorted(paths)
