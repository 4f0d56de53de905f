"""The loss as a function of virtual parameters, beyond its gradient at the pins."""

from constrained_growth.virtual.directional import directional_derivative
from constrained_growth.virtual.initialisation import best_inner
from constrained_growth.virtual.loss import VirtualLoss, gauss_newton, hessian

__all__ = [
    "VirtualLoss",
    "best_inner",
    "directional_derivative",
    "gauss_newton",
    "hessian",
]
