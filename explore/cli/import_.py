"""The `import` command: convert a transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app, out
from explore.cli.opening import describe_size


@app.command(
    "import",
    rich_help_panel="Use trained models",
    epilog="Example: explore import exported imported && explore cost imported/model.json",
)
def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a nemotron_h checkpoint.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="New or empty folder (default: DIR-imported in this folder).")
    ] = None,
) -> None:
    """Convert a nemotron_h checkpoint to model.json and model.safetensors, which other commands accept."""
    from explore.files import read_json
    from explore.interop import from_hf, read_tokenizer_json, save_model_folder
    from explore.presets import with_new_names

    model, tokenizer = from_hf(source), read_tokenizer_json(source)
    folder = folder or Path(f"{source.resolve().name}-imported")
    save_model_folder(model, folder, tokenizer)
    out.print(f"{folder}: {describe_size(model.config)}", highlight=False)
    clamp = with_new_names(read_json(source / "config.json")).get("time_step_min", 0.001)
    if clamp > 1e-20 and any(hasattr(block, "dt_min") for block in model.config.layers):
        out.print(
            f"dt is not clamped here; transformers clamps it at {clamp:g} (time_step_min) and may give other logits",
            highlight=False,
        )
