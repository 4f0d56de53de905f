"""The same problem solved by CVXPY and by SciPy, and the KKT residuals of a solution.

Independent of how `solve` finds λ: the network is built with every candidate in it, the virtual
parameters v are variables like θ, the pins are explicit constraints v = 0, and the solver finds
the multipliers. Everything runs on copies, in float64, on the CPU, and is meant for small
instances.

    min over θ, v of L(θ, v)   subject to   v_c = 0 for every candidate c

The sign is the same everywhere: with 𝓛 = L + Σ_c ⟨λ_c, v_c⟩, CVXPY's `dual_value`, the `v` of
SciPy's trust-constr, and λ = −∇_v L(θ, 0) agree.
"""

from constrained_growth.verification.reports import (
    Check,
    KKTResiduals,
    VerificationReport,
    kkt_residuals,
)
from constrained_growth.verification.with_cvxpy import CvxpyLoss, check_with_cvxpy
from constrained_growth.verification.with_scipy import check_with_scipy

__all__ = [
    "Check",
    "CvxpyLoss",
    "KKTResiduals",
    "VerificationReport",
    "check_with_cvxpy",
    "check_with_scipy",
    "kkt_residuals",
]
