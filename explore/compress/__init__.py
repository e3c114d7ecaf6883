"""Compression of a trained parent: scores its parts, plans what a child keeps, and builds the child's weights."""

from explore.compress.cutting import Cutter, cut
from explore.compress.library import Library, LibraryRequest
from explore.compress.plan import LayerCut, Plan
from explore.compress.puzzle import puzzle
from explore.compress.ranking import METHODS
from explore.compress.scores import Scores, score, weak_halves

__all__ = [
    "METHODS",
    "Cutter",
    "LayerCut",
    "Library",
    "LibraryRequest",
    "Plan",
    "Scores",
    "cut",
    "puzzle",
    "score",
    "weak_halves",
]
