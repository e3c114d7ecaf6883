"""Speed of turning a text into cached tokens, compared with the tokenizer alone."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from explore.data import load_corpus, load_tokenizer, token_streams

TOKENIZER = "austen-bpe-2048"

FORMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "one .txt": ("text.txt", bytes),
    "one .txt.gz": ("text.txt.gz", lambda raw: gzip.compress(raw, compresslevel=1)),
    "one .txt.xz": ("text.txt.xz", lambda raw: lzma.compress(raw, preset=0)),
    ".jsonl of paragraphs": ("text.jsonl", bytes),
    ".jsonl.gz of paragraphs": ("text.jsonl.gz", lambda raw: gzip.compress(raw, compresslevel=1)),
}
"""Forms of a user's text: the file name, and a function that packs it."""

CHILD = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Runs this file without its package, whose other modules need far more memory than the text."""


def time_text(n_bytes: int, forms: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Splits, tokenizes and caches the embedded novels, repeated with changed names, in each form.

    Every measurement has its own process and cache.

    Yields:
        Records of form, n_bytes, seconds (total), split_s (to assign the text to splits), tokenizer_s (in the
        tokenizer), ratio (total / tokenizer), peak_bytes (memory of the process) and start_bytes (memory at its start).
    """
    novel = next(load_corpus("austen").documents("train"))
    copies = -(-n_bytes // len(novel))
    text = "".join(novel.replace("Emma", f"Emma{i}").replace("Elinor", f"Elinor{i}") for i in range(copies))[:n_bytes]
    lines = "".join(json.dumps({"text": each}) + "\n" for each in text.split("\n\n") if each.strip())
    for form in forms or FORMS:
        name, pack = FORMS[form]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(pack((lines if ".jsonl" in name else text).encode()))
            done = subprocess.run(
                [sys.executable, "-c", CHILD, __file__, str(path)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "EXPLORE_CACHE": folder},
            )
        if done.returncode:
            raise ValueError(f"bench: {form}: {done.stderr.strip().splitlines()[-1]}")
        yield {"form": form, **json.loads(done.stdout)}


def _peak_bytes() -> int:
    """Largest resident memory so far; not `ru_maxrss`, which includes the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _measure(path: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(TOKENIZER)
    encode, tokenizer_s = tokenizer.encode_batch, 0.0

    def timed(texts: Sequence[str]) -> list[list[int]]:
        nonlocal tokenizer_s
        start = time.perf_counter()
        ids = encode(texts)
        tokenizer_s += time.perf_counter() - start
        return ids

    tokenizer.encode_batch = timed  # type: ignore[method-assign]
    start_bytes, start = _peak_bytes(), time.perf_counter()
    corpus = load_corpus(path)
    split_s = time.perf_counter() - start
    streams = token_streams(corpus, tokenizer)
    seconds = time.perf_counter() - start
    return {
        "n_bytes": sum(stream.n_bytes for stream in streams.values()),
        "seconds": seconds,
        "split_s": split_s,
        "tokenizer_s": tokenizer_s,
        "ratio": seconds / tokenizer_s,
        "peak_bytes": _peak_bytes(),
        "start_bytes": start_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[-1])))
