"""The ops that a run compiles: only those that save more time than they take, by a table of this machine first."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line import run
from small_runs import STEPS, result, tiny, train, write_corpus
from torch._dynamo.exc import BackendCompilerFailed

from explore.files import write_json
from explore.model import ModelConfig
from explore.ops import CompilerError, compilation, forced_paths, paths_in_use
from explore.precision import TRAINED
from explore.runs import RunFolder
from explore.table import read_table, save_table
from explore.train import COMPILED, QUANTIZE, compiled_ops, own_table, regions

MAMBA: dict[str, Any] = {"kind": "mamba2", "n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 1, "chunk_size": 16}
N_ELEMENTS = {"conv": 48, "gated_norm": 32, "ssd": 64, "norm": 32, "loss": 64}
"""Elements per token of a model with one Mamba layer, by op."""
ENOUGH = round(2 * 10 / (1e-6 * sum(N_ELEMENTS.values())))
"""Tokens on which the ops of such a model together gain twice of what their compilation takes."""


def model(pattern: str) -> ModelConfig:
    blocks = {
        "M": MAMBA,
        "N": {**MAMBA, "n_heads": 2, "d_head": 16, "chunk_size": 32},
        "*": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "d_head": 8},
        "-": {"kind": "mlp", "d_ff": 8},
        "E": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8},
    }
    used = {letter: block for letter, block in blocks.items() if letter in pattern}
    return ModelConfig.model_validate({"d_model": 32, "vocab_size": 64, "pattern": pattern, "blocks": used})


def chosen(pattern: str, n_tokens: int, precision: str = "fp32", seq_len: int = 32) -> dict[str, dict[str, float]]:
    return compiled_ops(model(pattern), seq_len, n_tokens, precision)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of this machine in which every op saves a microsecond per element and takes ten seconds to compile."""
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(regions, "has_compiler", lambda: True)
    row = {"precision": "fp32", "default_ns": 3000.0, "compiled_ns": 2000.0, "compile_s": 10.0}
    rows = [{"op": op, **row, "threads": torch.get_num_threads()} for op in COMPILED]
    save_table(pd.DataFrame(rows), own_table())
    return own_table()


def test_the_shipped_table_is_measured_and_every_op_gains() -> None:
    table = read_table(regions.SHIPPED)
    assert set(table["op"]) == {*COMPILED, QUANTIZE}
    assert (table["default_ns"] > table["compiled_ns"]).all()
    assert table["device"].notna().all()


def test_a_run_compiles_once_it_is_long_enough(own: Path) -> None:
    assert chosen("M", ENOUGH - 1) == {}
    found = chosen("M", ENOUGH + 1)
    assert found == {op: {"saves_s": round(1e-6 * n * ENOUGH, 1), "costs_s": 2.0} for op, n in N_ELEMENTS.items()}
    two = {"saves_s": pytest.approx(2 * found["ssd"]["saves_s"], abs=0.1), "costs_s": 2.0}
    assert chosen("M-M", ENOUGH)["ssd"] == chosen("MN", ENOUGH)["ssd"] == two  # one compilation for all shapes


def test_an_op_that_gains_nothing_is_not_compiled(own: Path) -> None:
    table = read_table(own)
    save_table(table.assign(compiled_ns=table["compiled_ns"].where(table["op"] != "conv", 4000.0)), own)
    found = chosen("M", 10 * ENOUGH)
    assert found.keys() == N_ELEMENTS.keys() - {"conv"}
    assert {each["costs_s"] for each in found.values()} == {2.5}


def test_quantisers_are_compiled_if_a_run_in_low_precision_is_long_enough(own: Path) -> None:
    """An MLP of 32 -> 16 -> 32 quantises 4 * (32 + 16) elements a token: two widths, for each of which activations and
    gradients are quantised along two axes, and two sizes of weights."""
    mlp = ModelConfig.model_validate(
        {"d_model": 32, "vocab_size": 64, "pattern": "-", "blocks": {"-": {"kind": "mlp", "d_ff": 16}}}
    )
    row = {"op": QUANTIZE, "precision": "nvfp4", "default_ns": 3000.0, "compiled_ns": 2000.0, "compile_s": 1.0}
    save_table(pd.concat([read_table(own), pd.DataFrame([row | {"threads": torch.get_num_threads()}])]), own)
    enough = round(2 * 10 / (1e-6 * 4 * (32 + 16)))
    for n_tokens, found in ((enough - 1, {}), (enough + 1, {QUANTIZE: {"saves_s": 20.0, "costs_s": 10.0}})):
        with forced_paths(norm="by_hand", loss="sliced"):
            assert compiled_ops(mlp, 32, n_tokens, "bf16", recipe=TRAINED["nvfp4"]) == found
    assert QUANTIZE not in compiled_ops(mlp, 32, 10**9, "bf16")
    with forced_paths(quantize="plain"):
        assert QUANTIZE not in compiled_ops(mlp, 32, 10**9, "bf16", recipe=TRAINED["nvfp4"])


def test_a_layer_that_reads_fewer_positions_saves_less(own: Path) -> None:
    found = chosen("M/M", 10 * ENOUGH)  # multi-token prediction sees one position less
    saved = 1e-6 * N_ELEMENTS["ssd"] * 10 * ENOUGH * (1 + 31 / 32)
    assert found["ssd"] == {"saves_s": pytest.approx(saved, abs=0.1), "costs_s": 2.0}


def test_forced_ops_other_devices_and_missing_compilers_prevent_compilation(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens = 10**9
    assert set(chosen("M*E", n_tokens, "bf16")) == set(COMPILED)  # by the measurements in fp32
    with forced_paths(ssd="chunked"):
        assert set(chosen("M*E", n_tokens)) == set(COMPILED) - {"ssd"}
    assert compiled_ops(model("M"), 32, n_tokens, "fp32", "cuda") == {}
    assert chosen("-", n_tokens).keys() == {"norm", "loss"}
    monkeypatch.setattr(regions, "has_compiler", lambda: False)
    assert chosen("M", n_tokens) == {}


def test_more_threads_than_measured_gain_less(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4 * int(read_table(own)["threads"].iloc[0]))
    assert chosen("M", ENOUGH + 1) == {}
    assert "ssd" in chosen("M", 4 * ENOUGH + 4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table.drop(columns="compile_s"),
        lambda table: table.assign(default_ns="fast"),
        lambda table: table.assign(threads=0),
    ],
)
def test_an_invalid_table_of_gains_is_refused_by_name(own: Path, spoil: Any) -> None:
    save_table(spoil(read_table(own)), own)
    with pytest.raises(ValueError, match=rf"{own}: .*; `explore bench --what regions --save` makes a new one"):
        chosen("M", ENOUGH)


def test_ops_that_an_older_table_lacks_are_read_from_the_shipped_one(own: Path) -> None:
    both = chosen("M*", 10**9)
    save_table(read_table(own).query("op != 'attention'"), own)
    older = chosen("M*", 10**9)
    assert older.keys() == both.keys()
    assert older["attention"] != both["attention"]
    assert older["ssd"]["saves_s"] == both["ssd"]["saves_s"]


def test_a_short_run_compiles_nothing_and_records_it(tmp_path: Path) -> None:
    folder = train(tiny(write_corpus(tmp_path), "M-"), tmp_path / "runs")
    assert folder.environment["compiled"] == {}
    assert folder.environment["ops"]["ssd"] == "chunked"


def test_a_resumed_run_compiles_the_same_ops(own: Path, tmp_path: Path) -> None:
    one = tiny(write_corpus(tmp_path), "M-")
    folder = train(one, tmp_path / "runs")
    (folder.path / "result.json").unlink()
    save_table(read_table(own).assign(default_ns=1e12), own)
    assert train(one, tmp_path / "runs").environment["compiled"] == {}
    write_json(folder.path / "environment.json", {})  # of an earlier version, which had no such choice
    (folder.path / "result.json").unlink()
    assert train(one, tmp_path / "runs").environment["compiled"] == {}


COMPILES = """
import json, sys
from explore.experiment import Experiment
from explore.kernels.cpp import library
from explore.train import fit
fit(Experiment.load(__import__("pathlib").Path(sys.argv[1])), sys.argv[2], accelerator="cpu", recompute=True)
print(json.dumps(library.cache_info().currsize))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_gives_the_same_result_and_records_its_ops(own: Path, tmp_path: Path) -> None:
    save_table(read_table(own).assign(default_ns=1e12), own)
    one = tiny(write_corpus(tmp_path), "M*E-")
    (path := tmp_path / "one.json").write_text(one.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-c", COMPILES, str(path), str(tmp_path / "compiled")]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == 1  # the library of all kernels
    (compiled,) = map(RunFolder, (tmp_path / "compiled").iterdir())
    assert set(compiled.environment["compiled"]) == set(COMPILED)
    assert {compiled.environment["ops"][op] for op in COMPILED} == {"compiled"}
    with forced_paths(**paths_in_use()):
        plain = train(one, tmp_path / "plain")
    assert plain.environment["compiled"] == {}
    assert result(compiled)["step"] == STEPS
    assert result(compiled)["val_loss"] == pytest.approx(result(plain)["val_loss"], rel=1e-4)


# A compiler that fails


BROKEN_CXX = """#!/bin/sh
case "$*" in --version) exec g++ --version;; *-print-*|*-dumpversion*) exec g++ "$@";; esac
echo "fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_continues_uncompiled_if_the_compiler_fails(own: Path, tmp_path: Path) -> None:
    save_table(read_table(own).assign(default_ns=1e12), own)
    one = tiny(write_corpus(tmp_path), "M*E-")
    (path := tmp_path / "one.json").write_text(one.model_dump_json(), encoding="utf-8")
    (cxx := tmp_path / "cxx").write_text(BROKEN_CXX)
    cxx.chmod(0o755)
    command = [sys.executable, "-c", COMPILES, str(path), str(tmp_path / "plain")]
    environment = {**os.environ, "CXX": str(cxx)}
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=environment)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    reason = "fatal error: Python.h: No such file or directory"
    assert notes == [f"note: the compiler failed, so the run continues uncompiled: {reason}"]
    assert "Traceback" not in done.stderr
    (plain,) = map(RunFolder, (tmp_path / "plain").iterdir())
    assert plain.environment["compiled"] == {}
    assert plain.environment["ops"] == paths_in_use()
    assert result(plain)["val_loss"] == pytest.approx(result(train(one, tmp_path / "alone"))["val_loss"], rel=1e-6)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A compiler that fails, and the list of its calls."""
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        raise BackendCompilerFailed(lambda: None, RuntimeError("cxx: fatal error: killed\nno more"), None)

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    monkeypatch.setattr(compilation, "_failures", [])
    return calls


def test_a_function_runs_uncompiled_if_fallback_is_allowed(failing: list[int], own: Path) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    function, x = compilation.compiled(double), torch.arange(3.0)
    with pytest.raises(CompilerError, match=r"^the compiler failed: RuntimeError: cxx: fatal error: killed; without"):
        function(x)  # by name
    assert compilation.compiler_failure() is None
    assert "ssd" in chosen("M", ENOUGH + 1)
    with compilation.falling_back():
        assert torch.equal(function(x), 2 * x)
        assert torch.equal(function(x), 2 * x)
    assert len(failing) == 2
    assert compilation.compiler_failure() == "RuntimeError: cxx: fatal error: killed"
    assert chosen("M", ENOUGH + 1) == {}


def test_a_decoding_step_that_cannot_be_compiled_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("cxx: fatal error: killed\nno more"), None)

    monkeypatch.setattr(torch, "compile", lambda function, options: fail)
    step = compilation.compiled_step(lambda x: 2 * x, varying="length")
    with pytest.raises(CompilerError) as raised:
        step(torch.arange(3.0))
    assert str(raised.value) == (
        "the compiler failed: RuntimeError: cxx: fatal error: killed; "
        "without --compile and --path OP=compiled no compiler is needed"
    )


def test_a_missing_compiler_is_reported_before_work_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compilation, "has_compiler", lambda: False)
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "one.json").write_text(tiny(write_corpus(tmp_path), "M-").model_dump_json(), encoding="utf-8")
    (tmp_path / "runs" / "none").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for args in (("train", path, "--path", "ssd=compiled"), ("generate", "runs/none", "--prompt", "a", "--compile")):
        code, out, err = run(capsys, monkeypatch, *args)
        assert (code, out) == (2, "")
        assert err == (
            "error: no C++ compiler was found (g++, or the one named by CXX); "
            "without --compile and --path OP=compiled no compiler is needed\n"
        )
    assert sorted(tmp_path.rglob("*")) == before
    assert run(capsys, monkeypatch, "generate", "runs/none", "--prompt", "a")[2] != err


def test_a_run_that_would_gain_from_a_missing_compiler_prints_a_note(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_table(read_table(own).assign(default_ns=1e9), own)
    monkeypatch.setattr(regions, "has_compiler", lambda: False)
    train(tiny(write_corpus(tmp_path), "M-"), tmp_path / "runs")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "compiler" in line)
    assert re.fullmatch(
        r"note: no C\+\+ compiler was found \(g\+\+, or the one named by CXX\), so nothing is compiled; "
        r"with one this run would take about \d+ s less",
        line,
    )


def test_errors_of_a_function_itself_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with compilation.falling_back(), pytest.raises(RuntimeError, match="out of luck"):
        compilation.compiled(broken)(torch.ones(1))
