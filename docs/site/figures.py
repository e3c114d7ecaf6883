"""The gallery: every figure is drawn at the build by the code that the page shows below it."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

GALLERY = Path(__file__).resolve().parents[1] / "gallery"
"""One file a figure: a docstring of a title and what to see, then code that ends with `figure`."""


def gallery_page() -> dict[str, str | bytes]:
    """The page and its pictures, by their place in the site."""
    lines = [
        "# Gallery",
        "",
        "Each picture is drawn by the code below it when these pages are built. All of them start from presets or from",
        "the records in `sweeps/records/`, so the code runs in a checkout. A figure is a matplotlib figure:",
        '`explore.figures.save_figure(figure, "name.png")` writes it as PNG and SVG.',
    ]
    pages: dict[str, str | bytes] = {}
    for source in sorted(GALLERY.glob("*.py")):
        title, about, code = parts(source)
        name = f"gallery/{source.stem[3:]}.png"
        pages[name] = picture(draw(code, source))
        lines += ["", f"## {title}", "", about, "", f"![{title}]({name})", "", "```python", code, "```"]
    return {"gallery.md": "\n".join(lines) + "\n", **pages}


def parts(source: Path) -> tuple[str, str, str]:
    """Title, description and code of a figure."""
    _, docstring, code = source.read_text(encoding="utf-8").split('"""', 2)
    title, _, about = docstring.partition("\n\n")
    return title.strip(), " ".join(about.split()), code.strip()


def draw(code: str, source: Path) -> Figure:
    """The figure that the code of a file ends with."""
    names: dict[str, object] = {"__name__": source.stem}
    exec(compile(code, str(source), "exec"), names)
    figure = names.get("figure")
    if not isinstance(figure, Figure):
        raise TypeError(f"{source}: must end with a matplotlib figure called `figure`, got {type(figure).__name__}")
    return figure


def picture(figure: Figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()
