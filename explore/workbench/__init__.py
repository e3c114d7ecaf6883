"""Widgets for JupyterLab: a model editor that shows costs immediately, and an interactive frontier of runs."""

from explore.workbench.frontier import Frontier, frontier_data, save_frontier
from explore.workbench.readout import evaluate
from explore.workbench.widget import Workbench

__all__ = ["Frontier", "Workbench", "evaluate", "frontier_data", "save_frontier"]
