"""Growing while training: a loop, two calls for your own loop, and policies for the steps after."""

from constrained_growth.training.grower import Grower
from constrained_growth.training.history import History, Round, count_layers
from constrained_growth.training.loop import evaluate, grow
from constrained_growth.training.steps import LineSearch, NewLayers

__all__ = [
    "Grower",
    "History",
    "LineSearch",
    "NewLayers",
    "Round",
    "count_layers",
    "evaluate",
    "grow",
]
