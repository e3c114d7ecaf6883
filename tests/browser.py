"""Starts JupyterLab and Chromium for tests; the tests skip if there is no browser."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "/usr/bin/chromium"))), None)
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")
"""Tests run as root too, and in small containers."""
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
WAIT_S = 60


def need_chromium() -> None:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")


@contextmanager
def running_lab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab of a folder, without the name of a notebook."""
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(QUIET))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = {**os.environ, "JUPYTER_TOKEN": token, **{name: str(folder / place) for name, place in own.items()}}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            address, began = f"http://127.0.0.1:{port}", time.monotonic()
            while not answers(f"{address}/api/status?token={token}"):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() - began < WAIT_S, (folder / "log").read_text()
                time.sleep(0.2)
            yield f"{address}/lab/tree/{{}}?token={token}&reset"
        finally:
            server.terminate()  # it ends its kernels first
            server.wait(30)


@contextmanager
def new_page(width: int = 1280, height: int = 1240, **options: Any) -> Iterator[Any]:
    """A page of a separate browser with access to the clipboard."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(1000 * WAIT_S)
        yield page
        browser.close()


def run_first_cell(page: Any, address: str, selector: str) -> None:
    """Opens a notebook, runs its first cell and waits for an element."""
    from playwright.sync_api import TimeoutError

    page.goto(address)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    for _ in range(5):  # on a busy machine, JupyterLab may show no widget of a cell that ran while it was loading
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        with suppress(TimeoutError):
            page.wait_for_selector(selector, timeout=200 * WAIT_S)
            return
    page.wait_for_selector(selector)


def set_theme(page: Any, theme: str) -> None:
    """Shows JupyterLab in its `Light` or its `Dark` theme."""
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{ theme: 'JupyterLab {theme}' }})")
    page.wait_for_selector(f"body[data-jp-theme-name='JupyterLab {theme}']", state="attached")
    page.wait_for_timeout(500)


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    written = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": cell, "outputs": [], "execution_count": None}
        for i, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": written, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False
