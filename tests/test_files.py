"""Files that are complete or absent, leftovers of a kill, and untrusted files."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explore.files import (
    check_regular,
    exists,
    held,
    open_plain,
    read_json,
    remove_abandoned,
    replacing,
    temporary_beside,
)
from explore.foreign import ECHO_CHARS, echo, parse_json

WRITER = """
import sys, time
from pathlib import Path
from explore.files import temporary_beside
with temporary_beside(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as temporary:
    inside = temporary / "part" if temporary.is_dir() else temporary
    inside.write_text("half")
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_temporaries_of_a_killed_writer_are_removed_only_after_its_death(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "result.json"), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        temporary = Path(writer.stdout.readline().strip())
        try:
            with replacing(tmp_path / "other.json") as other:
                other.write_text("{}")
            assert temporary.exists()
        finally:
            writer.send_signal(signal.SIGKILL)
    assert temporary.exists()
    with replacing(tmp_path / "other.json") as other:
        other.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_two_writers_in_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as a, replacing(tmp_path / "b") as b, temporary_beside(tmp_path / "c", folder=True):
        a.write_text("a")
        b.write_text("b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b"}


def test_only_our_own_temporaries_are_removed(tmp_path: Path) -> None:
    names = [".tmp", "0123abcd.tmp", ".0123abcd.tmpx", ".0123abcz.tmp", ".notes.tmp", "result.json"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".0123abcd.tmp.json").touch()
    (tmp_path / ".89abcdef.tmp").symlink_to(tmp_path / "result.json")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".89abcdef.tmp"}


def test_the_first_process_holds_a_file(tmp_path: Path) -> None:
    path = tmp_path / "made"
    waited = []

    def waiting() -> None:
        waited.append(1)
        if len(waited) == 2:
            path.rename(tmp_path / "done")
            first.close()

    with held(path, waiting) as first:
        first.write(b"mine")
        with held(path, waiting) as second:
            assert second.read() == b""
    assert (len(waited), (tmp_path / "done").read_bytes()) == (2, b"mine")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"not valid JSON \(Expecting property name enclosed in double quotes, line 1, column 2\)"),
        (b'{"a": ' + b"[" * 100_000, "JSON must not be nested this deeply"),
        (b'{"a": ' + b"7" * 5000 + b"}", "an integer in JSON must have at most 4,300 digits"),
        (b'{"a": "\xe9"}', "must be UTF-8, byte 7 is not"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_error_for_invalid_json_gives_the_reason_in_one_line(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path}/a.json: ")
    assert len(str(caught.value)) < len(str(tmp_path)) + 150


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_json_is_read_with_and_without_a_byte_order_mark(content: dict[str, object]) -> None:
    text = json.dumps(content, ensure_ascii=True)
    assert parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == parse_json("\ufeff" + text) == content


def test_json_larger_than_any_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.files.JSON_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps({"a": "b" * 200}))
    with pytest.raises(ValueError, match=r"a.json: must have at most 100 bytes of JSON, got more"):
        read_json(tmp_path / "a.json")


@given(st.text() | st.binary() | st.lists(st.text()) | st.floats())
def test_an_echo_shows_the_value_or_its_two_ends(value: object) -> None:
    shown = echo(value)
    assert len(shown) <= ECHO_CHARS
    cuts = [i for i in range(len(shown)) if shown.startswith("...", i)]
    ends = any(repr(value).startswith(shown[:i]) and repr(value).endswith(shown[i + 3 :]) for i in cuts)
    assert shown == repr(value) or ends


def test_a_path_that_is_not_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    for read in (read_json, open_plain, check_regular):
        with pytest.raises(ValueError, match=r"a.json: must be a file, got a FIFO"):
            read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="must be a file, got a device"):
        read_json(Path("/dev/zero"))
    assert not exists(tmp_path / ("x" * 300))


def test_a_packed_file_may_hold_200_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explore.files.EXPANSION_FREE_BYTES", 1 << 20)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    with open_plain(path) as file:
        assert len(file.read()) == 1 << 20
    path.write_bytes(gzip.compress(bytes((1 << 20) + 1)))
    with open_plain(path) as file, pytest.raises(ValueError, match=r"at most 200 times its size on disk \(1,048,576"):
        file.read()
