"""Options and arguments that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from explore.cli.opening import run_option
from explore.cost import D_MODEL, DTYPES, VOCAB_SIZE, Dtype, Dtypes

if TYPE_CHECKING:
    from explore.precision import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="COUNT", help="Tokens of context (default: a sequence of the run)."),
]
DecodeBatch = Annotated[int, typer.Option(min=1, help="Sequences decoded at once, for memory and time.")]
DecodeHardware = Annotated[str, typer.Option(help="Hardware of decode_s and prefill_s.")]
DataOf = Annotated[
    Path | None,
    run_option("Run or experiment (JSON) whose data to use with an imported checkpoint."),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, e.g. train.lr=1e-3; repeatable."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar="CONDITION", help="Rows to keep, e.g. d_model>=64, corpus=austen or name~moe; repeatable."),
]
Paths = Annotated[
    list[str] | None,
    typer.Option("--path", metavar="OP=PATH", help="Force an implementation, e.g. ssd=compiled; repeatable."),
]
SplitBatch = Annotated[
    bool,
    typer.Option(
        "--split-batch", help="Train on both halves of a batch in parallel, one thread each; for small models."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="RECIPE", help="Number formats of the components: a recipe's name, or its JSON file."),
]
WEIGHTS = "Dtype of weights, and of matrix products if the device supports it"
KV, STATE = "Dtype of keys and values", "Dtype of recurrent and convolution state"
WeightDtype = Annotated[Dtype, typer.Option(help=f"{WEIGHTS}.")]
KVDtype = Annotated[Dtype, typer.Option(help=f"{KV}.")]
StateDtype = Annotated[Dtype, typer.Option(help=f"{STATE}.")]
OwnWeightDtype = Annotated[Dtype | None, typer.Option(help=f"{WEIGHTS} (default: {DTYPES.weight}).")]
OwnKVDtype = Annotated[Dtype | None, typer.Option(help=f"{KV} (default: {DTYPES.kv}).")]
OwnStateDtype = Annotated[Dtype | None, typer.Option(help=f"{STATE} (default: {DTYPES.state}).")]
"""Options of commands with --precision, whose recipe may set these dtypes instead; None is the default."""
ActivationDtype = Annotated[Dtype, typer.Option(help="Dtype of the activations sent to experts.")]
Target = Annotated[
    str | None,
    typer.Argument(
        help="A pattern, a preset (explore cost --list), a run (its folder or the first characters of its key), or a "
        "JSON file with an experiment, a model or a nemotron_h config."
    ),
]
DModel = Annotated[
    int | None, typer.Option(min=1, metavar="COUNT", help=f"Width of a pattern's model (default: {D_MODEL}).")
]
VocabSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="COUNT", help=f"Vocabulary of a pattern's model (default: {VOCAB_SIZE})."),
]
SeqLen = Annotated[
    int,
    typer.Option(min=1, metavar="COUNT", help="Tokens per sequence and of context; 128k is 128,000."),
]
WandbMode = Literal["offline", "online"]
Wandb = Annotated[WandbMode | None, typer.Option(help="Mirror to Weights & Biases (default: off).")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints (default: a twentieth of the run).")
]
StudyStorage = Annotated[
    str | None, typer.Option(metavar="URL", help="Optuna storage; STUDY is then the name of a study in it.")
]
StudyName = Annotated[
    str | None, typer.Option("--study", help="Study to use if the journal has several (default: the newest).")
]


def forced(paths: list[str] | None) -> dict[str, str]:
    """Reads `--path`, and rejects an unknown op or path before any work begins."""
    from explore.ops import PATHS, check_compiler, forced_paths

    pairs = [text.partition("=") for text in paths or []]
    for op, equals, path in pairs:
        if not equals:
            raise ValueError(f"--path must be of the form OP=PATH, such as ssd=compiled, got {op + path!r}")
    found = {op: path for op, _, path in pairs}
    with forced_paths(**found):  # raises for an unknown op or path
        if any(path.compiled for op, name in found.items() for path in PATHS[op] if path.name == name):
            check_compiler()
        return found


def recipe_of(precision: str | None) -> Recipe | None:
    """Reads `--precision`; prints published warnings against the recipe to stderr."""
    from explore.precision import read_recipe

    if precision is None:
        return None
    recipe = read_recipe(precision)
    for warning in recipe.warnings:
        print(f"warning: precision.stochastic: {warning}", file=sys.stderr)
    return recipe


def dtypes_of(
    weight: Dtype | None, kv: Dtype | None, state: Dtype | None, activation: Dtype, recipe: Recipe | None
) -> Dtypes:
    """The dtypes of a command's options and its recipe.

    Raises:
        ValueError: an option is given whose dtype the recipe sets.
    """
    given = {"weight": weight, "kv": kv, "state": state}
    chosen = Dtypes(**{name: dtype for name, dtype in given.items() if dtype is not None}, activation=activation)
    if recipe is None:
        return chosen
    for name, format in (("weight", recipe.format), ("kv", recipe.kv), ("state", recipe.state)):
        if given[name] is not None and format is not None:
            raise ValueError(f"--{name}-dtype: must not be combined with --precision, whose recipe sets it")
    return chosen.under(recipe)
