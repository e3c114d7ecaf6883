"""The command line. Commands parse arguments, call the library and print; heavy imports wait until a command runs."""
# ruff: noqa: F401, I001

# Each of these modules adds its commands, in the order in which --help shows them.
from explore.cli import (
    cost,
    compare,
    roofline,
    plan,
    solve,
    data,
    train,
    distil,
    table,
    plot,
    runs,
    sweep,
    proxy,
    watch,
    wandb_dashboard,
    figures,
    eval,
    generate,
    merge,
    score,
    cut,
    puzzle,
    quantize,
    export,
    import_,
    parity,
    prove,
    bench,
    replay_samplers,
    replay_pruning,
)
from explore.cli.app import app, main

__all__ = ["app", "main"]
