"""Memory and disk that a run needs, compared with those of the machine."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from small_runs import result, tiny, train, write_corpus

from explore import machine
from explore.experiment import Experiment
from explore.machine import ensure_descriptors, is_passing, memory_bytes
from explore.model import config as model_config
from explore.train import build_optimizer, capacity, check_capacity

GIB = 1 << 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def have(patch: pytest.MonkeyPatch, free: float, total: float | None = None) -> None:
    patch.setattr(capacity, "memory_bytes", lambda: (free if total is None else total, free))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_of_states_covers_the_model_and_at_most_its_optimizer(corpus: Path, optimizer: str) -> None:
    one = tiny(corpus, "ME/*", train__optimizer=optimizer)
    model, needed = one.model.build(), capacity.needs(one)
    built = build_optimizer(model, one.train)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    built.step()
    members = getattr(built, "members", {"all": built}).values()
    kept = [value for each in members for state in each.state.values() for value in state.values() if value.ndim]
    weights = sum(weight.nbytes for weight in model.parameters())
    assert needed.gradients == weights
    held = weights + sum(value.nbytes for value in kept)
    assert held == needed.states if optimizer == "adamw" else weights < needed.states <= held
    assert capacity.needs(one, copies=2).states == 2 * needed.states


def test_a_batch_needs_the_memory_that_its_sequences_keep(corpus: Path) -> None:
    one = tiny(corpus, "M*")
    needed = [capacity.needs(tiny(corpus, "M*", train__batch_size=n)) for n in (1000, 2000)]
    assert needed[1].total - needed[0].total == 1000 * needed[0].sequence
    assert capacity.needs(tiny(corpus, "M*", train__precision="bf16")).sequence == needed[0].sequence / 2
    assert capacity.needs(one, recompute=True).sequence == 4 * 64 * 32 * 2 < needed[0].sequence


@pytest.mark.parametrize(
    ("changes", "options", "free", "fits"),
    [
        ({"model__d_model": 4096}, {}, 1.0, r"at most \S+ of \S+ parameters would fit"),
        ({"train__batch_size": 100_000}, {}, 0.5, r"train\.batch_size=\d+ would fit"),
        ({"data__seq_len": 2_000_000}, {}, 0.5, r"a shorter data\.seq_len, or perhaps --recompute, would fit"),
        ({"data__seq_len": 2_000_000}, {"recompute": True}, 0.5, r"a shorter data\.seq_len would fit"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: dict[str, Any],
    free: float,
    fits: str,
) -> None:
    have(monkeypatch, free * GIB)
    one = tiny(corpus, "*-", **changes)
    with pytest.raises(ValueError, match=rf"^memory: training needs at least .*; {fits}$") as caught:
        train(one, tmp_path / "runs", **options)
    assert len(str(caught.value)) < 300
    assert not is_passing(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_suggested_batch_fits(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 10 * 2**20)
    with pytest.raises(ValueError, match="would fit") as caught:
        check_capacity(tiny(corpus, "*-", train__batch_size=10_000))
    n = int(str(caught.value).rpartition("=")[2].split()[0])
    check_capacity(tiny(corpus, "*-", train__batch_size=n))
    with pytest.raises(ValueError, match="would fit"):
        check_capacity(tiny(corpus, "*-", train__batch_size=n + 1))
    assert result(train(tiny(corpus, "*-"), tmp_path))["status"] == "finished"


def test_memory_used_by_other_processes_is_a_temporary_fault(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 2**20, total=64 * GIB)
    with pytest.raises(ValueError, match="memory: ") as caught:
        check_capacity(tiny(corpus, "*-", model__d_model=512))
    assert is_passing(caught.value)


def test_two_processes_need_two_copies_unless_they_share_them(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one: Experiment = tiny(corpus, "*-", model__d_model=512)
    have(monkeypatch, 1.5 * capacity.needs(one).total)
    check_capacity(one, devices=2, strategy="fsdp")
    with pytest.raises(ValueError, match="memory: "):
        check_capacity(one, devices=2)


def test_a_model_that_does_not_fit_is_refused_where_it_is_built(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tiny(corpus, "*-"), tmp_path).path
    monkeypatch.setattr(model_config, "memory_bytes", lambda: (64.0 * 1024, 64.0 * 1024))
    for command in (
        ["generate", folder, "--prompt", "x"],
        ["eval", folder, "--corpus", corpus],
        ["export", folder, "--to", "hf", tmp_path / "out"],
        ["score", folder],
    ):
        code, _, err = run(capsys, monkeypatch, *command)
        assert code == 2
        assert "memory: the weights of the model need " in err
    assert not (tmp_path / "out").exists()


# The machine


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_the_memory_of_the_machine_is_that_of_the_system_or_less() -> None:
    total, free = memory_bytes()
    assert 0 < free <= total
    assert total <= 1024 * sum(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(("MemTotal", "SwapTotal"))
    )


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    controllers, names = {
        1: ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        2: ("", ("memory.max", "memory.current")),
    }[version]
    for name, text in zip(names, ("3000000", "2000000"), strict=True):
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text("cache 7\ninactive_file 500000\n")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / names[0]).write_text("max\n")
    (tmp_path / "job" / names[1]).write_text("5\n")
    monkeypatch.setattr(machine, "_control_groups", lambda: ((each, names) for each in (tmp_path / "job", tmp_path)))
    assert controllers in machine.CONTROL_GROUPS
    assert memory_bytes() == (3_000_000, 1_500_000)


def test_the_limit_of_the_process_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from explore.machine import memory_bytes; print(*memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, free = map(float, done.stdout.split())
    assert total == 1 << 30
    assert 0 < free < total


def test_a_low_limit_of_open_files_is_raised_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, given = [256, 1024], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: given.append(pair))
    ensure_descriptors(100)
    assert given == [(1024, 1024)]
    limits[:] = [20, 20]
    with pytest.raises(ValueError, match=r"open files: at least \d+ must be allowed, got a limit of 20; .*ulimit") as e:
        ensure_descriptors(100)
    assert is_passing(e.value)
    assert isinstance(e.value.__cause__, OSError)
    assert e.value.__cause__.errno == errno.EMFILE
