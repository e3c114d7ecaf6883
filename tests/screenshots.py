"""Takes the screenshots of the documentation in a browser: `python tests/screenshots.py docs`.

They are `workbench.png` and `workbench-train.png`, the two tabs of the workbench, and `frontier.png`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import new_page, run_first_cell, running_lab, set_theme, write_notebook

RECORDS = Path(__file__).parents[1] / "sweeps" / "records"
CELLS = (
    'from explore import Frontier, Workbench\nWorkbench("nemotron-3-nano", against="qwen3-30b-a3b", seq_len=32_768)',
    f'Frontier("{RECORDS}/latent_or_not.parquet", "{RECORDS}/attention_share.parquet", x="params_active")',
)
WIDTH, HEIGHT = 1240, 1500


def main(folder: Path) -> None:
    """Writes the screenshots to a folder."""
    with tempfile.TemporaryDirectory() as place:
        write_notebook(Path(place) / "pictures.ipynb", CELLS)
        with running_lab(Path(place)) as address, new_page(WIDTH, HEIGHT) as page:
            run_first_cell(page, address.format("pictures.ipynb"), ".wb[data-n]")
            page.evaluate("jupyterapp.shell.collapseLeft()")
            set_theme(page, "Light")
            picture(page, ".wb", folder / "workbench.png")
            page.locator("[data-tab=training]").click()
            page.locator("[data-name=plan_fits]").wait_for()
            page.get_by_role("button", name="Find the best layout").click()
            page.locator("[data-name=plan_fits][data-value=true]").wait_for()
            picture(page, ".wb", folder / "workbench-train.png")
            page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            page.locator(".fr[data-points]").wait_for()
            page.locator("[data-toggle=means]").click()
            marks = page.locator(".fr-marks path[transform]")
            marks.last.click(force=True)
            picture(page, ".fr", folder / "frontier.png")


def picture(page: Any, selector: str, path: Path) -> None:
    """Takes a screenshot of one widget, with the mouse away from it."""
    page.mouse.move(2, 2)
    page.locator(selector).first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.locator(selector).first.screenshot(path=path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
