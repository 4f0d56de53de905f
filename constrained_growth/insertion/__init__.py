"""Insert layers into a model: its function and the state of its optimizers are kept."""

from constrained_growth.insertion.distributed import rewrap
from constrained_growth.insertion.insert import insert
from constrained_growth.insertion.record import GrowthRecord, InsertedLayer, replay

__all__ = [
    "GrowthRecord",
    "InsertedLayer",
    "insert",
    "replay",
    "rewrap",
]
