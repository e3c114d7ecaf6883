"""Speed on this machine, beside what a user would otherwise run."""

from explore.bench.families import SHAPES, Shape, families
from explore.bench.training import compare

__all__ = ["SHAPES", "Shape", "compare", "families"]
