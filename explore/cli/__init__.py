"""The command line. Commands read, call and print; heavy imports wait until a command runs."""

from explore.cli import accounting, corpora, inference, proving, solving, training  # noqa: F401  (each adds its commands)
from explore.cli.app import app, main

__all__ = ["app", "main"]
