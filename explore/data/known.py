"""Named corpora: source, licence and expected content."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from explore.files import exists
from explore.foreign import echo

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class KnownCorpus:
    """A named corpus.

    Attributes:
        source: what the text is and where it comes from.
        licence: terms of use.
        files: content hash of every file, by file name without extensions.
        folder: the folder of a corpus that ships with this package; None looks under `EXPLORE_DATA`.
    """

    source: str
    licence: str
    files: Mapping[str, str]
    folder: Path | None = None


CORPORA: Mapping[str, KnownCorpus] = MappingProxyType(
    {
        "austen": KnownCorpus(
            source=(
                "six novels by Jane Austen, split by book: Emma, Mansfield Park, Pride and Prejudice and Sense "
                "and Sensibility for training, Northanger Abbey, Persuasion; from Debian's r-cran-janeaustenr"
            ),
            licence="public domain (packaged under MIT)",
            folder=ASSETS,
            files={
                "austen-train": "8f0140b7061437fe43d251035268431f96be05ebfaa558648215409d833db390",
                "austen-val": "d15a813b14ae78ed50e9c3b7980c5aa2ce8c4daba6692363a2a4646d89d5fbf4",
                "austen-test": "c5a0721482f40a8682e430cbba8edc9261a4b684c929816b003ec2c7c84f857b",
            },
        ),
        "gutenberg": KnownCorpus(
            source="552 cleaned books of Project Gutenberg in ten shards in random order, split by book; no Austen",
            licence="public domain in the US",
            files={
                "train-00": "43da97ce95204e06a52b8ed00ac94f398e7a1b57a6675669ef39c0a59065d2bc",
                "train-01": "97da70935049762803c5beae9ed82b184017345157e7f657206cf4515a78ad54",
                "train-02": "85713b145659bc9f8703e9411f8166d3b44e0ce05066619399da10148fdae8be",
                "train-03": "f2072e65efe846e4a71d833552be4e252d3af5688b9950959f7216b7a05a90a9",
                "train-04": "d6fe45a3605b280544dd1af159699412f5b22db274878b77064cd7195e1cc8b1",
                "train-05": "40df7ebfe5c2c7f9489dc7750955c9fbedfc6e24a239c805848f3450c75a1bab",
                "train-06": "5cf6d630b3d55d4052f726be93593c6435458d4fb929496944a5ec735cf39bcf",
                "train-07": "8bef6190d3cc7c62d02db96267cc1834074b5c7b6b69e580673e8f790fc93574",
                "train-08": "db0ee838eccd78a47bc347bd23661c5e1c00e6ef9a0a5d22b31411711043d91a",
                "train-09": "8e52d3fe86cd42bcbba2c2f3c731e13cd42609ef55244b48faa9e3c0828d4ff5",
                "val": "26a17c1bdcce91ae3fa00342529c494fadd74167630000c7680a0b2285a3290c",
                "test": "aab8e71ecf2d41a051e380f6bc2da10689e8f799fb3f23ad48bb91d3ac884eb3",
            },
        ),
        "sotu": KnownCorpus(
            source="State of the Union addresses, 1790 to 2021",
            licence="public domain in the US",
            files={
                "sotu": "3ec816011e8e41a414928f956c55298b03ec903cfe6c3a1cdfc60156d664f0f0",
            },
        ),
        "code": KnownCorpus(
            source="Python source of CPython, Django, pandas and SymPy, one document a file",
            licence="PSF-2.0 and BSD-3-Clause",
            files={
                "train": "050b0c1b83c4d8ee5db636276c16074f60f61404521ff8fdb5505886e11a6431",
                "val": "a7b974d80b1abd38785782b2542b4cc8e42bd8081bff49cae40e412293468ef0",
                "test": "94824f0e3c736f43d09fc532b29698b7d0f5f6a151aa6ba471b21a836122f025",
            },
        ),
    }
)


def locate(name: str) -> Path:
    """Returns the file or folder of a corpus name or path.

    Raises:
        ValueError: there is no such file or folder.
    """
    known = CORPORA.get(name)
    if known is None:
        path = Path(name).expanduser()
        if exists(path):
            return path
        near = difflib.get_close_matches(name, CORPORA, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"corpus: {echo(name)} is neither a known name ({', '.join(CORPORA)}), nor an existing file or folder, "
            f"nor hf:NAME{hint}"
        )
    if known.folder is not None:
        return known.folder
    root = os.environ.get("EXPLORE_DATA")
    if not root:
        raise ValueError(
            f"corpus: {name!r} is read from $EXPLORE_DATA/{name}, but the environment variable "
            f"EXPLORE_DATA is not set (export EXPLORE_DATA=FOLDER); "
            f"without it: 'austen', a file, a folder, or hf:NAME"
        )
    folder = Path(root).expanduser() / name
    if not folder.is_dir():
        raise ValueError(f"corpus: {name!r} needs the folder {folder}, which does not exist (EXPLORE_DATA={root})")
    return folder
