"""Compression of a trained parent: which parts of it a child keeps, and the child's weights."""

from explore.compress.plan import LayerCut, Plan

__all__ = ["LayerCut", "Plan"]
