"""The workbench: its numbers and its sliders without a browser, and all of it in JupyterLab with one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explore import ModelConfig, preset
from explore.blocks import BLOCKS, AttentionConfig, MoEConfig
from explore.cost import HARDWARE, SEQ_LEN, VOCAB_SIZE
from explore.figures.cost import group_colors, receipts_table
from explore.presets import PRESETS
from explore.roofline import Deployment, hardware
from explore.workbench import Workbench, evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LETTERS = "".join(kind.letter for kind in BLOCKS)
PATTERNS = [*LETTERS, "MEM*E", "M-L*E/*E/*E", "nemotron-3-nano", "nemotron-3-super", "llama-nemotron-super-49b"]


def state_of(bench: Workbench) -> dict[str, Any]:
    return json.loads(json.dumps(bench.view["state"]))  # as it comes from a browser


def moved(bench: Workbench, slider: dict[str, Any], value: int | None) -> dict[str, Any]:
    """The state after a slider was moved."""
    state = state_of(bench)
    *path, last = slider["path"]
    owner = state
    for part in path:
        owner = owner.setdefault(part, {})
    owner[last] = value
    return state


def edit(bench: Workbench, state: dict[str, Any], **more: Any) -> None:
    bench.edit = {"n": bench.view["n"] + 1, "state": state, **more}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_stops_of_every_slider_are_models_that_have_that_value(pattern: str) -> None:
    bench = Workbench(pattern)
    for slider in bench.view["sliders"]:
        assert slider["value"] in slider["values"]
        stops = slider["values"]
        for value in {*stops[:2], stops[len(stops) // 2], *stops[-2:]}:
            edit(bench, moved(bench, slider, value))
            assert bench.view["error"] == ""
            (now,) = [other for other in bench.view["sliders"] if other["path"] == slider["path"]]
            assert now["value"] == value
        edit(bench, moved(bench, slider, slider["value"]))


@settings(max_examples=30)
@given(st.text(LETTERS, min_size=1, max_size=8), st.data())
def test_sliders_moved_one_after_another_always_give_models(pattern: str, data: st.DataObject) -> None:
    bench = Workbench(pattern)
    for _ in range(6):
        slider = data.draw(st.sampled_from(bench.view["sliders"]))
        edit(bench, moved(bench, slider, data.draw(st.sampled_from(slider["values"]))))
        assert bench.view["error"] == ""


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_readout_is_what_the_library_says_of_the_config(pattern: str, batch_size: int) -> None:
    bench = Workbench(pattern, seq_len=3000, batch_size=batch_size, hardware="A100")
    shown, model = evaluate(state_of(bench)), bench.config
    assert shown == bench.readout
    cost = model.cost(3000).to_dict()
    assert {name: cost[name] for name in shown.keys() & cost.keys()} == {
        name: shown[name] for name in shown.keys() & cost.keys()
    }
    assert {"params_total", "params_active", "flops_fwd", "kv_bytes_per_token"} <= shown.keys() & cost.keys()
    table = receipts_table({"": model}, 3000, ("flops_fwd",))
    parts = {group: value for group, value in zip(table["group"], table["value"], strict=True) if value}
    assert shown["flops_by_group"] == pytest.approx(parts)
    assert list(shown["flops_by_group"]) == [group for group in group_colors() if group in parts]
    deployed = Deployment(model, hardware("A100"))
    assert shown["decode_s"] == deployed.decode_s(3000, batch_size)
    assert sum(shown["decode_by_bound"].values()) == pytest.approx(shown["decode_s"])
    assert shown["tokens_per_s"] == pytest.approx(batch_size / shown["decode_s"])
    assert shown["cache_bytes"] == batch_size * (cost["kv_bytes"] + cost["ssm_state_bytes"] + cost["conv_state_bytes"])


def test_a_batch_that_fits_is_one_that_the_roofline_lets_in() -> None:
    model = preset("nemotron-3-nano")
    largest = Deployment(model, hardware(HARDWARE)).largest_batch(SEQ_LEN)
    for batch_size, fits in ((largest, True), (largest + 1, False)):
        assert Workbench.from_config(model, batch_size=batch_size).readout["fits"] is fits


def test_large_batches_of_short_contexts_wait_for_products_and_long_contexts_for_keys_and_values() -> None:
    def longest(**use: int) -> str:
        parts = Workbench("*-*-", d_model=1024, **use).readout["decode_by_bound"]
        return max(parts, key=parts.__getitem__)

    assert longest(batch_size=1, seq_len=64) == "weights"
    assert longest(batch_size=1024, seq_len=64) == "flops"
    assert longest(batch_size=8, seq_len=2**20) == "kv"


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_as_it_went_in(name: str) -> None:
    model = preset(name)
    for bench in (Workbench(name), Workbench.from_config(model)):
        assert bench.config == model
        assert ModelConfig.model_validate_json(bench.view["json"]) == model
        assert eval(bench.view["code"], {"ModelConfig": ModelConfig}) == model


def test_sizes_that_are_not_given_follow_the_width_and_those_of_a_config_stay() -> None:
    follows = Workbench("M*", d_model=256)
    stays = Workbench.from_config(follows.config)
    for bench in (follows, stays):
        state = state_of(bench)
        state["model"]["d_model"] = 512
        edit(bench, state)
    assert follows.config == ModelConfig(d_model=512, vocab_size=VOCAB_SIZE, pattern="M*", blocks={})
    assert stays.config.blocks == Workbench("M*", d_model=256).config.blocks


def test_what_was_asked_for_comes_back_as_soon_as_it_can() -> None:
    bench = Workbench("E*", d_model=256, blocks={"E": {"n_experts": 16, "top_k": 8}, "*": {"n_kv_heads": 4}})
    before, state = bench.config, state_of(bench)
    state["model"]["blocks"]["E"]["n_experts"] = 4
    edit(bench, state)
    assert bench.config.blocks["E"].top_k == 4
    state["model"]["blocks"]["E"]["n_experts"] = 16
    edit(bench, state)
    assert bench.config == before


def test_a_slider_of_what_must_divide_stops_nowhere_else() -> None:
    bench = Workbench("*", d_model=96, blocks={"*": {"n_heads": 3, "n_kv_heads": 3, "d_head": 32}})
    assert AttentionConfig.default(96).n_kv_heads == 2
    (stops,) = [slider["values"] for slider in bench.view["sliders"] if slider["label"] == "n_kv_heads"]
    assert stops == [1, 3]


def test_blocks_and_multi_token_prediction_may_be_configs() -> None:
    experts = MoEConfig(n_experts=4, top_k=2, d_expert=32, n_shared=0)
    bench = Workbench("ME", blocks={"E": experts}, mtp={"pattern": "M", "n_depths": 2, "shared": False})
    assert bench.config.blocks["E"] == experts
    assert bench.view["strip"] == "ME/M/M"
    state = state_of(bench)
    state["model"]["pattern"] = "ME"
    edit(bench, state)
    assert bench.config.mtp is None
    edit(bench, {**state, "model": {**state["model"], "pattern": "ME/M"}})
    assert bench.config.mtp is not None
    assert not bench.config.mtp.shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "MEX"}, "pattern: unknown letter 'X' at position 3 of 'MEX'; known are "),
        ({"pattern": ""}, "pattern: '' has no layer"),
        ({"pattern": "M/E/-"}, "pattern: all depths after '/' must be alike, got 'E' and '-'"),
        ({"d_model": 100}, "d_model: 100 is not divisible into heads"),
        ({"d_modle": 64}, "d_modle: unknown field"),
        ({"vocab_size": 0}, "vocab_size: input should be greater than 0, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_the_last_good_readout_stays(
    change: dict[str, Any], message: str
) -> None:
    bench = Workbench("MEM*E", d_model=256)
    config, shown, state = bench.config, bench.readout, state_of(bench)
    state["model"] |= change
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        evaluate(state)
    edit(bench, state)
    assert bench.view["error"] == str(caught.value)
    assert "\n" not in bench.view["error"]
    assert bench.view["state"] == state
    assert (bench.config, bench.readout) == (config, shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "seq_len: input should be greater than 0, got 0"),
        ({"batch_size": 1.5}, "batch_size: input should be a valid integer"),
        ({"hardware": "H20"}, "hardware must be one of .*, got 'H20'; the nearest are H200"),
        ({"contxt": 3}, "contxt: unknown field"),
    ],
)
def test_a_wrong_use_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate({**state_of(Workbench("M")), **change})


def test_a_workbench_cannot_begin_with_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="unknown letter 'X' at position 2 of 'MX'"):
        Workbench("MX")
    with pytest.raises(ValueError, match=r"hardware must be one of .*, got 'abacus'"):
        Workbench("M", hardware="abacus")


def test_what_the_browser_needs_is_synchronised_and_is_json() -> None:
    bench = Workbench("nemotron-3-nano")
    assert {"edit", "view", "pinned", "offers", "_esm", "_css"} <= set(bench.keys)
    for name in ("view", "offers"):
        assert json.loads(json.dumps(getattr(bench, name))) == getattr(bench, name)
    assert bench.view["letters"][0]["letter"] == "M"
    assert {entry["letter"] for entry in bench.view["letters"]} == {*LETTERS, "/"}
    assert bench.view["readout"]["flops_by_group"].keys() <= bench.offers["groups"].keys()


def test_a_preset_can_be_chosen_and_a_config_be_set() -> None:
    bench = Workbench("MEM*E", d_model=256, batch_size=4)
    edit(bench, state_of(bench), preset="qwen3-8b")
    assert bench.config == preset("qwen3-8b")
    assert bench.view["state"]["batch_size"] == 4
    bench.config = preset("gpt-oss-20b")
    assert bench.view["strip"] == preset("gpt-oss-20b").pattern
    assert {entry["letter"] for entry in bench.view["letters"]} >= {"W", "*", "E"}


@pytest.mark.parametrize("pattern", ["MEM*E", "nemotron-3-nano", "llama-nemotron-ultra-253b"])
def test_a_change_is_answered_well_within_a_tenth_of_a_second(pattern: str) -> None:
    bench = Workbench(pattern)
    state, times = state_of(bench), []
    for i in range(1, 31):
        state["model"]["d_model"] += 64  # every block is counted anew
        state["seq_len"] += 1
        began = time.perf_counter()
        edit(bench, json.loads(json.dumps(state)))
        times.append(time.perf_counter() - began)
        assert bench.view["n"] == i
    print(f"\n{pattern}: a change takes {1e3 * statistics.median(times):.2f} ms in Python")
    assert statistics.median(times) < 0.05


# In JupyterLab, with a browser.

CELLS = (
    'from explore.workbench import Workbench\nbench = Workbench("nemotron-3-nano", seq_len=8192)\nbench',
    "print(bench.config.pattern, bench.config.d_model, bench.config.cost(8192).params_total)",
)
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
WAIT_S = 60


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and the address of a JupyterLab of its own that shows it, up to the name of a notebook."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("lab")
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
            yield folder, f"{address}/lab/tree/{{}}?token={token}&reset"
        finally:
            server.terminate()  # it ends its kernels first
            server.wait(30)


def write_notebook(path: Path) -> None:
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": cell, "outputs": [], "execution_count": None}
        for i, cell in enumerate(CELLS)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


@pytest.fixture
def page(lab: tuple[Path, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page with a notebook of its own that shows a workbench: its first cell has run."""
    from playwright.sync_api import TimeoutError, sync_playwright

    folder, address = lab
    name = f"{request.node.name}.ipynb"
    write_notebook(folder / name)
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]  # tests run as root too, and in small containers
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        context = browser.new_context(viewport={"width": 1280, "height": 1240}, device_scale_factor=1)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(address.format(name))
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        for _ in range(5):  # on a busy machine, JupyterLab may show no widget of a cell that ran while it was loading
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            with suppress(TimeoutError):
                page.wait_for_selector(".wb[data-n]", timeout=200 * WAIT_S)
                break
        page.wait_for_selector(".wb[data-n]")
        yield page
        browser.close()


def shown(page: Any) -> dict[str, float]:
    """The raw numbers behind what stands in the tiles."""
    values = page.eval_on_selector_all(
        ".wb [data-name]", "all => all.map(one => [one.dataset.name, one.dataset.value])"
    )
    return {name: json.loads(value) for name, value in values}


def parts(page: Any) -> dict[str, float]:
    """The raw numbers behind the legends of the bars."""
    values = page.eval_on_selector_all(
        ".wb [data-part]", "all => all.map(one => [one.dataset.part, one.dataset.value])"
    )
    return {name: float(value) for name, value in values}


def settle(page: Any, strip: str) -> None:
    """Waits until what was sent is answered."""
    page.wait_for_function(
        "strip => [...document.querySelectorAll('.wb-strip .wb-chip')].map(e => e.textContent).join('') === strip",
        arg=strip,
    )
    last = -1
    while (now := int(page.get_attribute(".wb", "data-n"))) != last:
        last = now
        page.wait_for_timeout(150)


def check(page: Any, model: ModelConfig, **use: Any) -> None:
    """The browser shows what Python says of the model."""
    expected = Workbench.from_config(model, **use).readout
    told = shown(page)
    assert {"params_total", "flops_fwd", "kv_bytes_per_token", "cache_bytes", "decode_s", "fits"} == told.keys()
    assert told == {name: pytest.approx(expected[name]) for name in told}
    assert parts(page) == pytest.approx(expected["flops_by_group"] | expected["decode_by_bound"])


STOPWATCH = """() => {
  const root = document.querySelector('.wb'), times = (window.benchTimes = []);
  let began = 0;
  root.addEventListener('input', () => { began = performance.now(); }, true);
  new MutationObserver(() => requestAnimationFrame(() => times.push(performance.now() - began)))
    .observe(root, { attributes: true, attributeFilter: ['data-n'] });
}"""


@pytest.mark.slow
@pytest.mark.alone
def test_in_jupyterlab_edits_by_hand_change_the_readout_and_the_config(page: Any, tmp_path: Path) -> None:
    nano = preset("nemotron-3-nano")
    check(page, nano)
    assert page.locator("[data-name=params_total]").inner_text() == "31.58 B"
    page.locator(".wb").screenshot(path=tmp_path / "nano.png")

    # Typed, letter by letter.
    text = page.get_by_label("Pattern")
    text.fill("")
    page.locator(".wb-error").get_by_text("pattern: '' has no layer", exact=True).wait_for()
    assert "wb-stale" in page.get_attribute(".wb", "class")
    text.press_sequentially("MEM*")
    settle(page, "MEM*")
    fields = nano.model_dump()
    check(page, ModelConfig.model_validate({**fields, "pattern": "MEM*"}))
    assert page.locator(".wb-error").inner_text() == ""

    # The keyboard on the strip, whose keys JupyterLab must not take for its own.
    chips = page.locator(".wb-strip .wb-chip")
    chips.nth(3).click()
    for key in ("Insert", "e", "Home", "ArrowRight", "Shift+ArrowRight", "ArrowLeft", "Delete", "m"):
        page.keyboard.press(key)
    settle(page, "MM*E")
    assert page.locator(".jp-CodeCell").count() == 2

    # The mouse: a choice from the palette, a click on what is selected, and a drag.
    chips.nth(3).click()
    page.locator(".wb-palette").get_by_text("latent attention").click()
    settle(page, "MM*L")
    page.locator(".wb-palette").get_by_label("remove the layer").click()
    settle(page, "MM*")
    chips.nth(2).click()  # it is selected already, so this turns it into the next kind
    settle(page, "MML")
    chips.nth(2).drag_to(chips.nth(0))
    settle(page, "LMM")

    # A slider, by its keys.
    width = page.locator("[data-path='model.d_model']")
    width.focus()
    page.evaluate(STOPWATCH)
    before = int(width.input_value())
    for i, key in enumerate(["ArrowRight"] * 12 + ["ArrowLeft"] * 9):
        page.keyboard.press(key)
        page.wait_for_function("i => window.benchTimes.length > i", arg=i)
    times = page.evaluate("window.benchTimes")
    print(f"\nfrom an input event to the drawn readout: {statistics.median(times):.1f} ms, at most {max(times):.1f} ms")
    assert statistics.median(times) < 100
    assert int(width.input_value()) == before + 3
    settle(page, "LMM")
    d_model = int(page.locator("label", has=width).locator("output").inner_text().replace(",", ""))
    assert d_model > nano.d_model
    changed = ModelConfig.model_validate({**fields, "pattern": "LMM", "d_model": d_model})
    check(page, changed)

    # What it gives back.
    page.get_by_role("button", name="Copy JSON").click()
    page.get_by_text("Copied").wait_for()
    assert ModelConfig.model_validate_json(page.evaluate("navigator.clipboard.readText()")) == changed
    page.locator(".jp-CodeCell .cm-content").nth(1).click()
    page.keyboard.press("Shift+Enter")
    printed = page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output pre")
    assert printed.inner_text().split() == ["LMM", str(d_model), str(changed.cost(8192).params_total)]


@pytest.mark.slow
@pytest.mark.alone
def test_in_jupyterlab_a_published_system_and_another_device_are_a_choice_away(page: Any) -> None:
    page.get_by_label("Begin with").select_option("qwen3-8b")
    settle(page, preset("qwen3-8b").pattern)
    check(page, preset("qwen3-8b"))
    page.get_by_label("Hardware").select_option("B200")
    settle(page, preset("qwen3-8b").pattern)
    check(page, preset("qwen3-8b"), hardware="B200")


@pytest.mark.slow
@pytest.mark.alone
def test_in_jupyterlab_it_fits_its_cell_in_both_themes(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator(".wb-strip .wb-chip").nth(5).click()
    page.keyboard.press("e")
    page.locator("[data-path='batch_size']").focus()
    page.keyboard.press("End")
    page.wait_for_selector(".wb-ratio")
    colors = []
    for theme in ("Light", "Dark"):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{ theme: 'JupyterLab {theme}' }})")
        page.wait_for_selector(f"body[data-jp-theme-name='JupyterLab {theme}']", state="attached")
        page.wait_for_timeout(500)
        picture = tmp_path / f"{theme.lower()}.png"
        page.locator(".wb").screenshot(path=picture)
        assert picture.stat().st_size > 20_000
        colors.append(page.eval_on_selector(".wb", "e => getComputedStyle(e).backgroundColor"))
        wider = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > "
        wider += "e.closest('.jp-OutputArea-output').getBoundingClientRect().right + 1).length"
        for width in (1280, 700):
            page.set_viewport_size({"width": width, "height": 1240})
            page.wait_for_timeout(200)
            assert page.eval_on_selector_all(".wb, .wb-body, .wb-bar, .wb-palette, .wb-tiles", wider) == 0
        page.locator(".wb").screenshot(path=tmp_path / f"{theme.lower()}-narrow.png")
        page.set_viewport_size({"width": 1280, "height": 1240})
    assert colors[0] != colors[1]
