"""The model gains a layer, its function unchanged, the memory of its optimizers kept."""

from constrained_growth.insertion.inserting import insert
from constrained_growth.insertion.records import GrowthRecord, InsertedLayer
from constrained_growth.insertion.replaying import replay
from constrained_growth.insertion.wrapping import rewrap

__all__ = [
    "GrowthRecord",
    "InsertedLayer",
    "insert",
    "replay",
    "rewrap",
]
