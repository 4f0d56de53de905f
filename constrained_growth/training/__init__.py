"""Growing while training: a loop, calls for a loop of your own, and the steps after."""

from constrained_growth.training.evaluation import evaluate
from constrained_growth.training.grower import Grower
from constrained_growth.training.history import History
from constrained_growth.training.loop import grow
from constrained_growth.training.steps import LineSearch, NewLayers, Together

__all__ = [
    "Grower",
    "History",
    "LineSearch",
    "NewLayers",
    "Together",
    "evaluate",
    "grow",
]
