"""The steps after an insertion: how new layers move, whatever the optimizer."""

from constrained_growth.training.steps.line_search import LineSearch
from constrained_growth.training.steps.new_layers import NewLayers
from constrained_growth.training.steps.together import Together

__all__ = ["LineSearch", "NewLayers", "Together"]
