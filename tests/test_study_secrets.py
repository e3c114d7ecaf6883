"""Passwords in storage URLs are never shown and never stored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_sweeps import quiet, write_sweep

from explore.cli import main
from explore.foreign import hide_passwords
from explore.study import TrialOptions, load_sweep, run_sweep, serve_storage
from explore.study.secrets import hide_in_arguments, hide_secrets, without_password
from explore.study.watching import find_study

SHOWN = {
    "postgresql+psycopg://me:s3cret@host:1/db": "postgresql+psycopg://me@host:1/db",
    "postgresql+psycopg://me:s3@cret@host:1/db": "postgresql+psycopg://me@host:1/db",
    "postgresql+psycopg://me:s3/cret@host:1/db": "postgresql+psycopg://me@host:1/db",
    "postgresql+psycopg://me:s3?cret@host:1/db": "postgresql+psycopg://***",
    "postgresql+psycopg://host/db?user=me&password=s3cret": "postgresql+psycopg://host/db",
    "postgresql+psycopg://host/db?password=s3@cret": "postgresql+psycopg://***",
    "postgresql+psycopg://[::1]:5/db?sslpassword=s3cret": "postgresql+psycopg://[::1]:5/db",
    "postgresql+psycopg://me:s3cret/db": "postgresql+psycopg://me",
    "postgresql+psycopg:/me:s3cret@host/db": "postgresql+psycopg:/me@host/db",
    "postgresql+psycopg:me:s3cret@host/db": "postgresql+psycopg@host/db",
    "me:s3cret@host/db": "me@host/db",
    "grpc://me:s3cret@host:1": "grpc://me@host:1",
    "grpc://host:1": "grpc://host:1",
    "sqlite:////tmp/a:b.db": "sqlite:////tmp/a:b.db",
    "runs/a:b": "runs/a:b",
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert without_password(shown) == shown


@pytest.mark.parametrize("url", [url for url in SHOWN if "s3" in url])
def test_an_error_that_repeats_a_url_is_shown_without_its_password(url: str) -> None:
    text = hide_secrets(f"could not open {url}: no such host", url)
    assert "s3" not in text
    assert "cret" not in text
    assert text.startswith("could not open ")


def test_an_escaped_password_is_hidden_in_both_forms() -> None:
    assert hide_secrets("p%40ss and p@ss", "postgresql://me:p%40ss@host/db") == "*** and ***"


def test_an_invalid_storage_url_is_refused_without_its_password() -> None:
    url = "postgresql:/me:s3cret@host/db"
    for call in (lambda: find_study(url), lambda: serve_storage(url, "127.0.0.1", 1)):
        with pytest.raises(ValueError, match="postgresql:/me@host/db") as refusal:
            call()
        assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3:c@ret@host:1/db: no such sweep file", "postgresql://me@host:1/db: no such sweep file"),
        ("'postgresql+psycopg:/me:1234@host/db' does not exist", "'postgresql+psycopg:/me@host/db' does not exist"),
        ("mysql://me:s3cret/db: cannot be read", "mysql://me cannot be read"),
        ("mysql://host/db?user=me&password=s3cret: no", "mysql://host/db?user=me&password no"),
        ("cockroachdb:/me:s3cret@h/db: no such sweep file", "cockroachdb:/me@h/db: no such sweep file"),
        ("snowflake://me:s3 cret@h/db: no", "snowflake://me@h/db: no"),
        ("postgresql://h/db?sslkey=s3cret", "postgresql://h/db?sslkey"),
        ("named as grpc://host:port, without", "named as grpc://host:port, without"),
        ("see https://x.org/a: write to me@x.org", "see https://x.org/a: write to me@x.org"),
        (
            "grpc://host:1 and grpc://host:1/x and 'grpc://[::1]:5'",
            "grpc://host:1 and grpc://host:1/x and 'grpc://[::1]:5'",
        ),
        ("runs/a:b: C:/x: hf:me/data:config@v1", "runs/a:b: C:/x: hf:me/data:config@v1"),
    ],
)
def test_an_error_shows_an_address_without_its_password(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


@pytest.mark.parametrize("command", ["sweep", "table", "watch", "train", "proxy"])
def test_a_url_in_the_wrong_place_is_refused_without_its_password(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["explore", command, "postgresql:/me:s3cret@host/db"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "postgresql:/me@host/db" in err
    assert "s3cret" not in err


@pytest.mark.parametrize("form", ["--storage {}", "--storage={}"])
def test_arguments_lose_the_password(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    url = "postgresql://me:s3cret@host/db"
    monkeypatch.setattr(sys, "argv", ["explore", "sweep", *form.format(url).split(), "--trials", "3"])
    hide_in_arguments(None)
    assert url in " ".join(sys.argv)
    hide_in_arguments(url)
    assert " ".join(sys.argv) == f"explore sweep {form.format('postgresql://me@host/db')} --trials 3"


@pytest.mark.slow
def test_no_file_of_a_sweep_in_weights_and_biases_holds_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}?timeout=3133731337"
    monkeypatch.setattr(sys, "argv", ["explore", "sweep", "--storage", url, "--wandb", "offline"])
    options = TrialOptions(notes=False, wandb="offline")
    run_sweep(load_sweep(write_sweep(tmp_path)), 1, tmp_path / "runs", storage=url, options=options, console=quiet())
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any("sqlite:///" in path.read_bytes().decode(errors="replace") for path in files), "nothing was recorded"
    assert not [path for path in files if b"3133731337" in path.read_bytes()]


@pytest.mark.slow
def test_pickles_of_submitit_are_readable_only_by_the_user(tmp_path: Path) -> None:
    sweep, runs = load_sweep(write_sweep(tmp_path)), tmp_path / "runs"
    (runs / "cluster").mkdir(mode=0o755, parents=True)
    options = TrialOptions(notes=False)
    assert run_sweep(sweep, 1, runs, cluster="local", options=options, console=quiet()).complete == 1
    assert list((runs / "cluster").glob("*_submitted.pkl"))
    assert (runs / "cluster").stat().st_mode & 0o077 == 0
