"""Text of any length: time is linear, memory is bounded, and an interrupted pass leaves nothing."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
from pathlib import Path

import pytest

from explore.data import load_corpus

PARAGRAPH = "It was a dark and stormy night number {i}, and the wind blew\nover the hills of the county.\n\n"

PEAK = """
import json, sys
from pathlib import Path
from explore.data import load_corpus, load_tokenizer, token_streams

def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

before = peak()
streams = token_streams(load_corpus(sys.argv[1]), load_tokenizer("bytes"))
print(json.dumps([peak() - before, sum(stream.n_bytes for stream in streams.values())]))
"""

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORE_CACHE", str(tmp_path / "cache"))


def write_text(path: Path, n_bytes: int) -> Path:
    lines = "".join(PARAGRAPH.format(i=i) for i in range(2000))
    with path.open("w") as file:
        for part in range(n_bytes // len(lines) + 1):
            file.write(f"Chapter {part}\n\n{lines}")
    return path


def seconds(path: Path) -> float:
    """CPU time of opening and cutting a text, the best of three."""
    times = []
    for i in range(3):
        copy = path.with_name(f"{i}-{path.name}")
        copy.write_bytes(path.read_bytes() + bytes([65 + i]))  # so that nothing is in the cache
        start = time.process_time()
        load_corpus(str(copy))
        times.append(time.process_time() - start)
    return min(times)


def test_four_times_the_text_takes_less_than_six_times_as_long_to_split(tmp_path: Path) -> None:
    small, large = write_text(tmp_path / "small.txt", 2 * MIB), write_text(tmp_path / "large.txt", 8 * MIB)
    assert seconds(large) < 6 * seconds(small)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, suffix: str) -> None:
    peaks = {}
    for n_mib in (8, 48):
        path = write_text(tmp_path / f"{n_mib}.txt", n_mib * MIB)
        if suffix:
            path = path.rename(tmp_path / f"{n_mib}.plain")
            (tmp_path / f"{n_mib}.txt.gz").write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
            path = tmp_path / f"{n_mib}.txt.gz"
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        grown, n_bytes = (int(number) for number in done.stdout.strip("[]\n").split(","))
        assert n_bytes >= n_mib * MIB
        peaks[n_mib] = grown
    assert peaks[48] < peaks[8] + 16 * MIB


@pytest.mark.slow
def test_a_bomb_of_two_gigabytes_is_refused_without_filling_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(16 * MIB)) * 128)  # members of one file
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bomb.txt.gz: must hold at most 200 times its size on disk" in done.stderr.splitlines()[-1]


def test_a_stopped_pass_leaves_no_index(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress(write_text(tmp_path / "a.txt", 4 * MIB).read_bytes())[:-100])
    with pytest.raises(ValueError, match=r"cut.txt.gz cannot be read"):
        load_corpus(str(path))
    assert not list((tmp_path / "cache" / "documents").iterdir())
