"""Pictures of solutions, insertions and training runs."""

from constrained_growth.plotting.runs import (
    plot_architecture,
    plot_predictions,
    plot_run,
    plot_sensitivity_map,
    plot_training,
)
from constrained_growth.plotting.solutions import plot_growth, plot_losses, plot_sensitivities

__all__ = [
    "plot_architecture",
    "plot_growth",
    "plot_losses",
    "plot_predictions",
    "plot_run",
    "plot_sensitivities",
    "plot_sensitivity_map",
    "plot_training",
]
