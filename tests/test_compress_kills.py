"""Commands of compression that are killed in the middle: the same command then gives the numbers of one go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import tiny, train, write_corpus

from explore.compress import LayerCut, Plan, score
from explore.runs import RunFolder

PROGRAM = """
import os, re, signal, sys
import torch; torch.set_num_threads(1)
place, left = re.compile(sys.argv[1]), [int(sys.argv[2])]

def hook(event, args):  # files are renamed to their place once they are whole
    if event == "os.rename" and place.search(str(args[1])):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

if left[0] >= 0:
    sys.addaudithook(hook)
from explore.cli import main
sys.argv = ["explore", *sys.argv[3:], "--json"]
main()
"""
SIZES = ("--shares", "0.5", "--vary", "d_ff", "--vary", "n_experts", "--tokens", "512", "--val-tokens", "256")
COMMANDS = {
    "cut, one by one": ("cut", "PARENT", "--drop-layers", "3", "--one-by-one"),
    "cut, candidates": (
        *("cut", "PARENT", "--target", "params_active=12k", "--tolerance", "0.1", "--best", "3"),
        *("--free", "d_model=16:32:2", "--free", "depth", "--distil-tokens", "1280"),
    ),
    "puzzle, rounds": (
        *("puzzle", "PARENT", "--max", "params_active=70%", "--rounds", "2", "--round-tokens", "1280", *SIZES),
    ),
    "distil": ("distil", "PLAN", "--tokens", "1280", "--parent", "PARENT", "--runs", "RUNS"),
}
TIMES = ("train_s", "tokens_per_s", "finished_at")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    blocks = {
        "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
        "-": {"d_ff": 24},
        "E": {"n_experts": 6, "top_k": 2, "d_expert": 6, "d_shared": 16},
    }
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    model = {"model__d_model": 32, "model__blocks": blocks, "train__tokens": 3 * 128, "train__eval_tokens": 320}
    run = train(tiny(corpus, "M-E-", **model), tmp_path_factory.mktemp("runs"))
    score(run)
    return run


def explore_(words: tuple[str, ...], folder: Path, place: str = "", n: int = -1) -> tuple[int, str]:
    """Runs a command in a process of its own, which is killed before the file after the `n`-th is renamed to `place`.

    Returns:
        The exit code, and the output as if the folder of runs were RUNS.
    """
    places = {"PARENT": next(folder.glob("tiny-????????")), "PLAN": folder / "plan.json", "RUNS": folder}
    command = [sys.executable, "-c", PROGRAM, place, str(n), *(str(places.get(word, word)) for word in words)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stdout.replace(str(folder), "RUNS")


def numbers(folder: Path) -> dict[str, Any]:
    """All records below a folder by path, without times."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        text = path.read_text().replace(str(folder), "RUNS")
        if path.name not in ("environment.json", "checkpoints.json"):
            content = json.loads(text)
            found[str(path.relative_to(folder))] = {k: v for k, v in content.items() if k not in TIMES}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "n", "left"),
    [
        ("cut, one by one", r"depth-\w+\.json$", 1, ["tiny-*/depth-*.json"]),
        (
            "cut, candidates",
            r"candidates/.*/last\.ckpt$",
            13,
            ["tiny-*/candidates/*/result.json", "tiny-*/plans/*.json"],
        ),
        ("puzzle, rounds", r"tiny-round-1.*/last\.ckpt$", 4, ["tiny-*/library-*.json", "tiny-*/plans/*.json"]),
        ("puzzle, rounds", r"tiny-round-1.*/library-\w+\.json$", 0, ["tiny-round-1-*/result.json"]),
        ("distil", r"tiny-child.*/last\.ckpt$", 4, ["tiny-child-*/checkpoints/last.ckpt"]),
    ],
    ids=["one by one", "candidates", "round", "library of a round", "distil"],
)
def test_a_killed_command_ends_with_the_numbers_of_one_go(
    parent: RunFolder, tmp_path: Path, command: str, place: str, n: int, left: list[str]
) -> None:
    for folder in (tmp_path / "killed", tmp_path / "through"):
        shutil.copytree(parent.path.parent, folder)
        layers = (LayerCut(), LayerCut(keep={"d_ff": tuple(range(0, 24, 2))}), LayerCut(), LayerCut(drop=True))
        Plan.keep_all(parent).model_copy(update={"d_model": tuple(range(8, 32)), "layers": layers}).save(
            folder / "plan.json"
        )
    words = COMMANDS[command]
    assert explore_(words, tmp_path / "killed", place, n)[0] == -signal.SIGKILL
    assert all(list((tmp_path / "killed").glob(each)) for each in left)  # what was done before the kill
    again, through = explore_(words, tmp_path / "killed"), explore_(words, tmp_path / "through")
    assert (again[0], through[0]) == (0, 0)
    ours, theirs = (
        {name: value for name, value in json.loads(printed).items() if name not in TIMES}
        for printed in (again[1], through[1])
    )
    assert ours == theirs
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "through")
