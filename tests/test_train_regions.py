"""What a run compiles: only what gives back more time than it takes, and what was measured here before all else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_runs import result, tiny, train, write_corpus

from explore.blocks import Mamba2Config, MLPConfig
from explore.ops import forced_paths
from explore.runs import RunFolder, read_table, save_table
from explore.train import ELEMENTS, compiled_ops, own_table, regions

PLAIN = {"conv": "shift", "norm": "by_hand", "ssd": "chunked"}
MAMBA = Mamba2Config(n_heads=4, d_head=8, d_state=8, n_groups=1, chunk_size=16)
OTHER = Mamba2Config(n_heads=2, d_head=8, d_state=8, n_groups=1, chunk_size=16)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of this machine, on which every op gains a microsecond an element for ten seconds."""
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("explore.train.regions.shutil.which", lambda name: f"/usr/bin/{name}")
    rows = [
        {"op": op, "precision": "fp32", "default_ns": 3000.0, "compiled_ns": 2000.0, "compile_s": 10.0}
        for op in ELEMENTS
    ]
    save_table(pd.DataFrame(rows), own_table())
    return own_table()


def test_what_ships_is_measured_and_every_op_gains() -> None:
    table = read_table(regions.SHIPPED)
    assert set(table["op"]) == set(ELEMENTS)
    assert (table["default_ns"] > table["compiled_ns"]).all()
    assert table["device"].notna().all()


def test_a_run_compiles_once_it_is_long_enough(own: Path) -> None:
    elements = MAMBA.n_heads * MAMBA.chunk_size
    enough = round(2 * 10 / (1e-6 * elements))
    short, long = (compiled_ops([MAMBA], n, "fp32", "cpu") for n in (enough - 1, enough + 1))
    assert "ssd" not in short
    assert long["ssd"] == {"saves_s": 20.0, "costs_s": 10.0}
    twice = compiled_ops([MAMBA, MLPConfig(d_ff=8), MAMBA], enough, "fp32", "cpu")["ssd"]
    assert twice == {"saves_s": 40.0, "costs_s": 10.0}  # one shape, in two layers
    assert "ssd" not in compiled_ops([MAMBA, OTHER], enough, "fp32", "cpu")  # two shapes


def test_what_is_forced_or_not_on_a_cpu_or_without_a_compiler_is_left_alone(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens = 10**9
    assert set(compiled_ops([MAMBA], n_tokens, "bf16", "cpu")) == set(ELEMENTS)  # by what was measured in fp32
    with forced_paths(ssd="chunked"):
        assert set(compiled_ops([MAMBA], n_tokens, "fp32", "cpu")) == set(ELEMENTS) - {"ssd"}
    assert compiled_ops([MAMBA], n_tokens, "fp32", "cuda") == {}
    assert compiled_ops([MLPConfig(d_ff=8)], n_tokens, "fp32", "cpu") == {}
    monkeypatch.setattr("explore.train.regions.shutil.which", lambda name: None)
    assert compiled_ops([MAMBA], n_tokens, "fp32", "cpu") == {}


def test_a_short_run_compiles_nothing_and_its_record_says_so(tmp_path: Path) -> None:
    folder = train(tiny(write_corpus(tmp_path), "M-"), tmp_path / "runs")
    assert folder.environment["compiled"] == {}
    assert folder.environment["ops"]["ssd"] == "chunked"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_run_that_compiles_ends_where_the_other_does_and_its_record_says_so(own: Path, tmp_path: Path) -> None:
    rows = read_table(own)
    save_table(rows.assign(default_ns=1e12), own)
    one = tiny(write_corpus(tmp_path), "M-")
    path = tmp_path / "one.json"
    path.write_text(one.model_dump_json(), encoding="utf-8")
    found = {}
    for name, forced in {"compiled": [], "plain": [f"--path={op}={name}" for op, name in PLAIN.items()]}.items():
        arguments = ["explore", "train", str(path), "--runs", str(tmp_path / name), *forced]
        code = f"import sys; sys.argv = {arguments}; from explore.cli import main; main()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
        (folder,) = (tmp_path / name).iterdir()
        found[name] = RunFolder(folder)
    assert set(found["compiled"].environment["compiled"]) == set(ELEMENTS)
    assert {found["compiled"].environment["ops"][op] for op in ELEMENTS} == {"compiled"}
    assert found["plain"].environment["compiled"] == {}
    losses = [result(folder)["val_loss"] for folder in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]
