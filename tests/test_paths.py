"""Paths: the implementation of an op that runs, and the declarations of all."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from explore.ops import PATHS, OpPath, forced_paths, path_of, paths_in_use, paths_that
from explore.ops.paths import declare


def test_a_path_is_forced_only_inside_its_block() -> None:
    usual = paths_in_use()
    with forced_paths(ssd="recurrent"), forced_paths(conv="conv1d"):
        assert paths_in_use() == usual | {"ssd": "recurrent", "conv": "conv1d"}
    assert paths_in_use() == usual


def test_on_cuda_the_first_kernel_that_imports_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.paths._imports", lambda module: module == "triton")
    assert path_of("ssd", "cuda") == path_of("experts", "cuda") == path_of("loss", "cuda") == "triton"
    monkeypatch.setattr("explore.ops.paths._imports", lambda module: True)
    assert path_of("ssd", "cuda") == "mamba_ssm"
    monkeypatch.setattr("explore.ops.paths._imports", lambda module: False)
    assert (path_of("ssd", "cuda"), path_of("experts", "cuda"), path_of("loss", "cuda")) == (
        "chunked",
        "padded",
        "sliced",
    )


@pytest.mark.parametrize("op", PATHS)
def test_an_op_has_a_reference_a_path_that_can_be_counted_and_different_names(op: str) -> None:
    paths = PATHS[op]
    assert len({path.name for path in paths}) == len(paths)
    assert sum(path.reference for path in paths) == 1
    assert any(path.countable for path in paths)
    assert {path.default_on for path in paths if path.needs} <= {"cuda", ""}
    assert not any(path.needs or path.compiled for path in paths if path.reference or path.countable)


def test_an_op_that_a_file_declares_can_be_forced_and_is_in_every_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.ops.paths._declared", declared := dict(PATHS))
    monkeypatch.setattr("explore.ops.paths.PATHS", declared)
    with pytest.raises(ValueError, match="new: one path must have default_on='any' and need no package, got "):
        declare("new", OpPath("fast", default_on="cpu"), OpPath("kernel", default_on="any", needs="triton"))
    declare("new", OpPath("fast", default_on="cpu"), OpPath("slow", default_on="any", reference=True))
    assert (path_of("new"), path_of("new", "meta"), path_of("new", "mps")) == ("fast", "fast", "slow")
    assert paths_that(lambda path: path.reference)["new"] == "slow"
    assert "new" not in paths_that(lambda path: path.countable)
    with forced_paths(new="slow"):
        assert path_of("new") == paths_in_use()["new"] == "slow"


def test_the_paths_that_any_file_of_ops_declares_are_known() -> None:
    folder = Path(importlib.import_module("explore.ops").__file__ or "").parent
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    assert sorted(PATHS) == sorted(
        op for text in texts for op in re.findall(r'^declare\(\s*"(\w+)"', text, re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [({"ssd": "fast"}, "ssd must be one of chunked"), ({"sdd": "chunked"}, "must be one of attention")],
)
def test_a_path_that_does_not_exist_is_refused(paths: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message), forced_paths(**paths):
        pass
