"""The command line. Commands read, call and print; heavy imports wait until a command runs."""

# Each of these modules adds its commands, in the order in which --help shows them.
from explore.cli import accounting, inference, solving, corpora, training, using, merging, doors, proving, benching  # noqa: F401, I001
from explore.cli.app import app, main

__all__ = ["app", "main"]
