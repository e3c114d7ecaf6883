"""Compression of a trained parent: scores of its parts, plans of what a child keeps, and the child's weights."""

from explore.compress.cutting import Cutter, cut
from explore.compress.plan import LayerCut, Plan
from explore.compress.ranking import METHODS
from explore.compress.scores import Scores, score, weak_halves

__all__ = ["METHODS", "Cutter", "LayerCut", "Plan", "Scores", "cut", "score", "weak_halves"]
