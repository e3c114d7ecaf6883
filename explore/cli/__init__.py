"""The command line. Commands read, call and print; heavy imports wait until a command runs."""
# ruff: noqa: F401, I001

# Each of these modules adds its commands, in the order in which --help shows them.
from explore.cli import (
    accounting,
    inference,
    solving,
    corpora,
    training,
    sweeping,
    dashboards,
    figures,
    using,
    merging,
    doors,
    proving,
    benching,
    replaying,
    prune_replaying,
)
from explore.cli.app import app, main

__all__ = ["app", "main"]
