"""Plans of large training runs: memory of every rank, traffic, throughput, and the best layouts."""

from explore.plan.cluster import Cluster
from explore.plan.largest import Largest, largest
from explore.plan.layout import DEGREES, Layout
from explore.plan.memory import Memory
from explore.plan.plans import BINDS, GIB, Plan
from explore.plan.published import Held, published
from explore.plan.relief import RELIEFS, cheapest_relief
from explore.plan.run import MODULES, PRECISIONS, PrecisionName, Run
from explore.plan.search import Found, Wall, search
from explore.plan.stages import Stages, balanced, read

__all__ = [
    "BINDS",
    "DEGREES",
    "GIB",
    "MODULES",
    "PRECISIONS",
    "RELIEFS",
    "Cluster",
    "Found",
    "Held",
    "Largest",
    "Layout",
    "Memory",
    "Plan",
    "PrecisionName",
    "Run",
    "Stages",
    "Wall",
    "balanced",
    "cheapest_relief",
    "largest",
    "published",
    "read",
    "search",
]
