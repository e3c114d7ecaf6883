"""The workbench in JupyterLab, edited in a browser."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import need_chromium, new_page, run_first_cell, running_lab, set_theme, write_notebook

from explore import ModelConfig, preset
from explore.workbench import Workbench

SEQ_LEN = 8192
CELLS = (
    f'from explore.workbench import Workbench\nbench = Workbench("nemotron-3-nano", seq_len={SEQ_LEN})\nbench',
    "print(bench.config.pattern, bench.config.d_model, bench.config.cost(8192).params_total)",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and the address of its JupyterLab, without the name of a notebook."""
    need_chromium()
    folder = tmp_path_factory.mktemp("lab")
    with running_lab(folder) as address:
        yield folder, address


@pytest.fixture
def page(lab: tuple[Path, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page with a new notebook that shows a workbench; its first cell has run."""
    folder, address = lab
    name = f"{request.node.name}.ipynb"
    write_notebook(folder / name, CELLS)
    with new_page() as page:
        run_first_cell(page, address.format(name), ".wb[data-n]")
        yield page


def shown(page: Any) -> dict[str, float]:
    """The raw numbers of the tiles."""
    values = page.eval_on_selector_all(
        ".wb [data-name]", "all => all.map(one => [one.dataset.name, one.dataset.value])"
    )
    return {name: json.loads(value) for name, value in values}


def parts(page: Any) -> dict[str, float]:
    """The raw numbers of the legends of the bars."""
    values = page.eval_on_selector_all(
        ".wb [data-part]", "all => all.map(one => [one.dataset.part, one.dataset.value])"
    )
    return {name: float(value) for name, value in values}


def settle(page: Any, strip: str) -> None:
    """Waits for the answer to the last edit."""
    page.wait_for_function(
        "strip => [...document.querySelectorAll('.wb-strip .wb-chip')].map(e => e.textContent).join('') === strip",
        arg=strip,
    )
    last = -1
    while (now := int(page.get_attribute(".wb", "data-n"))) != last:
        last = now
        page.wait_for_timeout(150)


def check(page: Any, model: ModelConfig, **use: Any) -> None:
    """The browser shows the numbers of Python for the model, at the context of the notebook."""
    expected = Workbench.from_config(model, seq_len=SEQ_LEN, **use).readout
    found = shown(page)
    assert {"params_total", "flops_fwd", "kv_bytes_per_token", "cache_bytes", "decode_s", "fits"} == found.keys()
    assert found == {name: pytest.approx(expected[name]) for name in found}
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
def test_in_jupyterlab_edits_change_the_readout_and_the_config(page: Any, tmp_path: Path) -> None:
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

    # The mouse: a choice from the palette, a click on the selected letter, and a drag.
    chips.nth(3).click()
    page.locator(".wb-palette").get_by_text("latent attention").click()
    settle(page, "MM*L")
    page.locator(".wb-palette").get_by_label("remove the layer").click()
    settle(page, "MM*")
    chips.nth(2).click()  # it is selected already, so this turns it into the next kind
    settle(page, "MMW")
    chips.nth(2).drag_to(chips.nth(0))
    settle(page, "WMM")

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
    settle(page, "WMM")
    d_model = int(page.locator("label", has=width).locator("output").inner_text().replace(",", ""))
    assert d_model > nano.d_model
    changed = ModelConfig.model_validate({**fields, "pattern": "WMM", "d_model": d_model})
    check(page, changed)

    # What it gives back.
    page.get_by_role("button", name="Copy JSON").click()
    page.get_by_text("Copied").wait_for()
    assert ModelConfig.model_validate_json(page.evaluate("navigator.clipboard.readText()")) == changed
    page.locator(".jp-CodeCell .cm-content").nth(1).click()
    page.keyboard.press("Shift+Enter")
    printed = page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output pre")
    assert printed.inner_text().split() == ["WMM", str(d_model), str(changed.cost(8192).params_total)]


@pytest.mark.slow
@pytest.mark.alone
def test_in_jupyterlab_a_published_system_and_a_device_can_be_chosen(page: Any) -> None:
    page.get_by_label("Start from").select_option("qwen3-8b")
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
        set_theme(page, theme)
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
