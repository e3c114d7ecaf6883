"""A workbench in JupyterLab: edit a pattern as coloured letters, move its sizes, and see its cost at once."""

from explore.workbench.readout import evaluate
from explore.workbench.widget import Workbench

__all__ = ["Workbench", "evaluate"]
