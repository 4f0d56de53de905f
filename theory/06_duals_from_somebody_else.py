# %% [markdown]
# # 6. Duals from somebody else
#
# `cg.solve` finds multipliers without building the network they belong to. Two general solvers, CVXPY
# and SciPy, can be given the same constrained problem in full, with the virtual parameters as
# variables and the pins as explicit equality constraints. They know nothing about this project.
#
# At the end you will be able to say
#
# * which instances a solver can check, and to how many digits the duals agree;
# * which solver reports which sign;
# * what the primal, dual and complementarity residuals are;
# * what each certificate can find, and what it cannot.

# %%
from dataclasses import replace

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import nn

import constrained_growth as cg
from constrained_growth.verification import check_with_cvxpy, check_with_scipy, kkt_residuals

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#9AA5B1"

# %% [markdown]
# ## Claim 1. Solvers disagree about the sign
#
# Take a problem whose answer is known: one old parameter $\theta$, one pinned $v$,
#
# $$\min_{\theta, v}\; f(\theta, v) = \tfrac12(\theta - 1)^2 + \tfrac12 (v - 3)^2 + \theta v
# \quad\text{subject to}\quad v = 0 .$$
#
# At $v = 0$ the best $\theta$ is $1$, and $\partial f/\partial v = (v - 3) + \theta = -2$. With
# $\mathcal L = f + \lambda v$ the multiplier is $\lambda = -\partial f/\partial v = +2$. A solver
# that writes $\mathcal L = f - \lambda v$ says $-2$. Both are right; one has to know the convention.
# (For CVXPY we write $f = \tfrac12(\theta + v)^2 - \theta - 3v + 5$, which shows that it is convex.)

# %%
theta, v = cp.Variable(), cp.Variable()
pin = v == 0
cp.Problem(cp.Minimize(cp.square(theta + v) / 2 - theta - 3 * v + 5), [pin]).solve()


def f(z):
    return (z[0] - 1) ** 2 / 2 + (z[1] - 3) ** 2 / 2 + z[0] * z[1]


def df(z):
    return np.array([z[0] - 1 + z[1], z[1] - 3 + z[0]])


trust = minimize(
    f, [0, 0], jac=df, hess=lambda z: np.ones((2, 2)), method="trust-constr",
    constraints=[LinearConstraint([[0.0, 1.0]], 0, 0)], options={"gtol": 1e-10},
)  # fmt: skip
slsqp = minimize(
    f, [0, 0], jac=df, method="SLSQP", options={"ftol": 1e-14},
    constraints=[{"type": "eq", "fun": lambda z: z[1], "jac": lambda z: np.array([0.0, 1.0])}],
)  # fmt: skip
# linear programming: min -2 v subject to v = 0 and bounds, so that -d/dv = 2 again
linear = linprog([0.0, -2.0], A_eq=[[0.0, 1.0]], b_eq=[0.0], bounds=[(0, 1), (-1, 1)])

found = {
    "−∂f/∂v": -df([1.0, 0.0])[1],
    "CVXPY dual_value": float(pin.dual_value),
    "SciPy trust-constr v": trust.v[0].item(),
    "SciPy SLSQP multipliers": slsqp.multipliers.item(),
    "SciPy linprog eqlin.marginals": linear.eqlin.marginals.item(),
}
for name, value in found.items():
    print(f"{name:30} {value:+.6f}")

same = {name for name, value in found.items() if np.isclose(value, 2, atol=1e-5)}
opposite = {name for name, value in found.items() if np.isclose(value, -2, atol=1e-5)}
assert same == {"−∂f/∂v", "CVXPY dual_value", "SciPy trust-constr v"}
assert opposite == set(found) - same

# %% [markdown]
# ## Claim 2. CVXPY agrees on convex instances
#
# The loss is convex in $\theta$ when the output of the network is affine in it: hidden features are
# frozen, and what is left to train is a linear skip connection, or a head behind the pinned layer. The
# product of head and pinned layer is bilinear, but at $v = 0$ its derivative is that with the head
# fixed at its optimum, and with that the problem is convex in $(\theta, v)$ and has the same
# multipliers. For a convex problem with only affine constraints the first-order
# conditions are necessary *and sufficient*, so CVXPY finds the global solution and its dual (Boyd and
# Vandenberghe 2004, sections 5.2.3 and 5.5.3).


# %%
class Skip(nn.Module):
    """head(features(x)) + skip(x), of which only the skip connection is trained."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.skip = nn.Linear(2, 1)
        with torch.no_grad():
            self.features[0].weight.mul_(2)
            self.head.weight.mul_(2)
        self.features.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x):
        return self.head(self.features(x)) + self.skip(x)


x = torch.randn(120, 2)
noisy = torch.rand(120) < 0.2
classes = ((x[:, :1] * x[:, 1:] > 0) ^ noisy[:, None]).double()  # noise, so that nothing fits all
candidates = [
    cg.Candidate("features", cg.blocks.ResidualMLP(4, 4, torch.relu), name="ReLU"),
    cg.Candidate("features", cg.blocks.ResidualMLP(4, 3, torch.tanh), name="tanh"),
]
problem = cg.GrowthProblem(Skip(), nn.BCEWithLogitsLoss(), [(x, classes)], candidates)
convex = check_with_cvxpy(problem)
print(convex)
assert convex.status == "optimal"
assert convex.passed
assert convex.dual_error < 1e-6
assert convex.solution.status is cg.Status.KKT_MULTIPLIERS

# %% [markdown]
# ## Claim 3. SciPy agrees on nonconvex ones
#
# Training a whole network is not convex. `check_with_scipy` goes to a local minimum nearby. There
# SciPy's `trust-constr` and `SLSQP` solve the constrained problem, from a start off the pins and with
# gradients from difference quotients of the loss, so that their multipliers know nothing of anybody's
# backward pass. What decides is the local value function $p(\varepsilon)$: the problem is solved anew
# at several $\varepsilon$, and the slope of $p$ along $\lambda$ must be $-\lVert\lambda\rVert$.

# %%
t = torch.linspace(-2, 2, 30)[:, None]


class Decayed(nn.Sequential):
    """A network with a loss that reads its weights: decay, which makes the minimum strict."""

    def loss(self, output, target):
        decay = sum(self[k].weight.square().sum() + self[k].bias.square().sum() for k in (0, 2))
        return (output - target).square().mean() + 0.01 * decay


net = Decayed(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
wave = torch.sin(3 * t) + 0.1 * torch.randn(30, 1)
places = [
    cg.Candidate("1", cg.blocks.ResidualMLP(2, 2, torch.tanh), name="tanh"),
    cg.Candidate("1", cg.blocks.ResidualMLP(2, 3, torch.relu), name="ReLU"),
]
nonconvex = check_with_scipy(cg.GrowthProblem(net, net.loss, [(t, wave)], places))
print(nonconvex)
assert nonconvex.passed
assert nonconvex.proximal == 0  # theta is a strict minimum
assert nonconvex.primal < 1e-12
assert nonconvex.dual_error < 1e-4

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.4))
for ax, report, title in (
    (axes[0], convex, "CVXPY, convex"),
    (axes[1], nonconvex, "SciPy, nonconvex"),
):
    for (pin, dual), colour, marker in zip(report.duals.items(), (BLUE, RED), "ox", strict=True):
        ours = report.solution.dual_value(pin)
        label = f"{pin.candidate}, {pin.parameter}"
        ax.plot(dual.flatten(), ours.flatten(), marker, color=colour, label=label)
    ends = np.array(ax.get_xlim())
    ax.plot(ends, ends, "-", color=GREY, linewidth=1, zorder=0, label="equality")
    ax.set_title(title)
    ax.set_xlabel("dual variable of the solver (loss per unit)")
    ax.legend()
axes[0].set_ylabel(r"entry of $\lambda$ from cg.solve")
fig.tight_layout()

# %% [markdown]
# **Figure 1.** Every entry of every multiplier, from a solver and from `cg.solve`.
#
# ## Claim 4. Three residuals, each of which catches a different fault
#
# For $\min L$ subject to $v = 0$ the first-order conditions (Nocedal and Wright 2006, theorem 12.1)
# leave three residuals:
#
# $$\underbrace{\lVert \text{block}(x) - x\rVert_\infty}_{\text{primal}}, \qquad
# \underbrace{\lVert\nabla_v L + \lambda\rVert}_{\text{dual}}, \qquad
# \underbrace{\lVert\nabla_\theta L\rVert}_{\text{stationarity}} .$$
#
# The first is nonzero if a layer is not the identity at its pin, the second if $\lambda$ is wrong,
# the third if $\theta$ is not trained. We break each in turn.

# %%


def falsified(solution, change):
    """The solution with the pins of its first candidate changed."""
    first, *others = solution.multipliers
    own = {parameter: change(t) for parameter, t in solution.multipliers[first].items()}
    rest = {name: solution.multipliers[name] for name in others}
    return replace(solution, multipliers={first: own} | rest)


good = kkt_residuals(convex.problem, convex.solution)
spoilt = kkt_residuals(convex.problem, falsified(convex.solution, lambda t: 1.01 * t))
untrained = kkt_residuals(problem, cg.solve(problem))

print(good, spoilt, untrained, sep="\n")
assert max(good.primal, good.dual, good.stationarity) < 1e-6
assert spoilt.dual > 100 * max(good.dual, 1e-8)
assert spoilt.primal < 1e-12
assert untrained.stationarity > 1e-3
assert untrained.dual < 1e-12

# %% [markdown]
# The primal residual cannot be broken through the library: a block that is not the identity at its
# pins is refused when the problem is made.


# %%
class Shifted(nn.Module):
    """x + v + 0.1: not the identity at v = 0."""

    pinned = ("v",)

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.v + 0.1


refused = ""
try:
    candidate = cg.Candidate("features", Shifted())
    cg.GrowthProblem(Skip(), nn.BCEWithLogitsLoss(), [(x, classes)], [candidate])
except cg.BlockError as error:
    refused = str(error)
print(refused)
assert "not the identity at its pins" in refused

# %% [markdown]
# ## Claim 5. What each certificate can find, and what it cannot
#
# | certificate | what it trusts | finds | cannot find |
# |---|---|---|---|
# | in every `cg.solve`, on the first batch | autograd through the blocks | a loss for which $x$ and $\delta$ are not enough | a block with a wrong backward |
# | `kkt_residuals` | the same, on all data | a wrong $\lambda$, an untrained $\theta$ | a block with a wrong backward |
# | `check_with_cvxpy` | that the loss is convex, which it tests | a wrong $\lambda$ and a wrong backward, by the duals of a *global* solution | anything about nonconvex training |
# | `check_with_scipy` | values of the loss | a wrong $\lambda$ and a wrong backward, in small networks of any kind | whether the minimum nearby is a global one |
#
# None of them says that a layer *helps*: they certify a derivative, on these data, at this $\theta$. We
# falsify $\lambda$ in three ways, and then a block: its backward claims 1 % too much.


# %%
class Gain(torch.autograd.Function):
    """x times a gain per feature; the derivative in the gain is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, gain, factor):
        ctx.save_for_backward(x, gain)
        ctx.factor = factor
        return x * gain

    @staticmethod
    def backward(ctx, delta):
        x, gain = ctx.saved_tensors
        return delta * gain, ctx.factor * (delta * x).sum(0), None


class Gate(nn.Module):
    """Features times a gain, pinned at 1."""

    pinned = ("gain",)

    def __init__(self, factor):
        super().__init__()
        self.gain, self.factor = nn.Parameter(torch.ones(4)), factor

    def forward(self, x):
        return Gain.apply(x, self.gain, self.factor)


def verdicts(kkt, by_cvxpy, by_scipy):
    """Whether each certificate is content."""
    return kkt.dual < 1e-6, by_cvxpy.passed, by_scipy.passed


found = {}
for fault, change in {
    "none": lambda t: t,
    "λ times 1.01": lambda t: 1.01 * t,
    "other sign": lambda t: -t,
    "transposed": lambda t: t.T,
}.items():
    reports = [
        replace(report, solution=falsified(report.solution, change))
        for report in (convex, nonconvex)
    ]
    residuals = kkt_residuals(reports[0].problem, reports[0].solution)
    found[fault] = verdicts(residuals, *reports)
for factor in (1.0, 1.01):
    gates = [cg.Candidate("features", Gate(factor))]
    with_gate = cg.GrowthProblem(Skip(), nn.BCEWithLogitsLoss(), [(x, classes)], gates)
    reports = check_with_cvxpy(with_gate), check_with_scipy(with_gate)
    residuals = kkt_residuals(with_gate, cg.solve(with_gate))
    found[f"backward times {factor}"] = verdicts(residuals, *reports)

print(f"{'fault':20} kkt_residuals  check_with_cvxpy  check_with_scipy")
for fault, (kkt, by_cvxpy, by_scipy) in found.items():
    kkt, by_cvxpy, by_scipy = ("passed" if ok else "FOUND" for ok in (kkt, by_cvxpy, by_scipy))
    print(f"{fault:20} {kkt:13}  {by_cvxpy:16}  {by_scipy}")
for fault in ("none", "backward times 1.0"):
    assert found[fault] == (True, True, True)
for fault in ("λ times 1.01", "other sign", "transposed"):
    assert found[fault] == (False, False, False)
assert found["backward times 1.01"] == (True, False, False)

# %% [markdown]
# ## Claim 6. Complementarity: what the radius of a trust region costs
#
# Equalities have no complementarity condition: their multipliers may have any sign, and a pin is
# always active. It appears as soon as the pin is *relaxed to a ball*,
#
# $$P(\Delta) = \min_{\theta, v} L(\theta, v) \quad\text{subject to}\quad \lVert v\rVert_F \le \Delta,
# \qquad \mu \ge 0, \quad \mu\,(\lVert v\rVert_F - \Delta) = 0 .$$
#
# Either the step reaches the boundary of the ball, or its price $\mu$ is zero. By sensitivity
# analysis $P'(\Delta) = -\mu(\Delta)$, and for a small ball the best one can do is
# $\Delta\lVert\lambda\rVert_F$, so
#
# $$\mu(\Delta) \to \lVert\lambda\rVert_F \quad\text{as}\quad \Delta\to 0:$$
#
# the *norm* of a multiplier is itself a multiplier, that of the radius. Notebook 5 does the same for
# other norms, notebook 7 turns it into decisions. Here we solve the convex instance for 14 radii,
# with the tanh candidate alone.

# %%
net = convex.problem.model
block = convex.problem.candidates[1].block
with torch.no_grad():
    hidden = net.features(x)
    inner = torch.tanh(block.inner(hidden))
    X, H, F, W, b = (a.numpy() for a in (x, hidden, inner, net.head.weight, net.head.bias))
S, s, V, radius = cp.Variable((1, 2)), cp.Variable(), cp.Variable((4, 3)), cp.Parameter()
output = (H + F @ V.T) @ W.T + b + X @ S.T + s
loss = cp.sum(cp.logistic(output) - cp.multiply(classes.numpy(), output)) / 120
ball = cp.norm(V, "fro") <= radius
regional = cp.Problem(cp.Minimize(loss), [ball])

radii = np.geomspace(1e-3, 300, 14)
prices, losses, slack = [], [], []
for radius.value in radii:
    # with its default, longer steps Clarabel stalls at 4 of 100 radii
    regional.solve(solver=cp.CLARABEL, canon_backend=cp.SCIPY_CANON_BACKEND, max_step_fraction=0.8)
    prices.append(float(ball.dual_value))
    losses.append(regional.value)
    slack.append(radius.value - np.linalg.norm(V.value))
prices, losses, slack = map(np.array, (prices, losses, slack))

size = cg.norms.Frobenius()(convex.solution.multipliers["tanh"]).item()
print(f"price of a ball of radius 0.001: {prices[0]:.6f},  |lambda|: {size:.6f}")
assert abs(prices[0] - size) < 1e-3 * size
assert (prices > -1e-6).all()
assert np.abs(prices * slack).max() < 1e-4  # complementarity
assert (np.diff(prices) < 1e-6).all()  # P is convex
assert slack[-1] > 1
assert prices[-1] < 1e-4

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
left.semilogx(radii, losses, "o-", color=BLUE, label=r"best loss $P(\Delta)$")
left.axhline(convex.solution.loss, color="black", linestyle="--", label="pinned")
left.legend()
left.set_ylabel(r"best loss $P(\Delta)$ (nats)")
right.semilogx(radii, prices, "o-", color=RED, label=r"price $\mu(\Delta)$")
right.axhline(size, color="black", linestyle="--", label=r"$\Vert\lambda\Vert_F$")
right.set_ylabel("price (nats per unit of radius)")
right.legend()
for ax in (left, right):
    ax.set_xlabel(r"radius $\Delta$ (Frobenius norm of $W_2$)")
fig.tight_layout()

# %% [markdown]
# **Figure 2.** The best logistic loss of the network when $W_2$ may move within a ball (left), and
# the dual variable of the ball (right). At radius zero the price is the norm of $\lambda$; when the
# ball is larger than needed the price is zero, and between the two it falls.
#
# ## Exercises
#
# 1. What would SLSQP and `trust-constr` say, in this order, if the pin of Claim 1 were $v = 1$ instead?
#    (Find the new $\theta$ first.)
# 2. Write the pin $v = 0$ as two inequalities $v \le 0$ and $-v \le 0$ with multipliers
#    $\mu_+, \mu_- \ge 0$. Give some $\mu_+, \mu_-$ that satisfy the first-order conditions of the
#    problem of Claim 1, with $\mu_+\mu_- = 0$. Are they unique without the last condition?
# 3. What is the slope of $P$ with respect to $\Delta^2$ as $\Delta \to 0$: zero, finite or infinite?


# %%
def check_1(slsqp_says, trust_says):
    trust = minimize(
        f, [0, 0], jac=df, hess=lambda z: np.ones((2, 2)), method="trust-constr",
        constraints=[LinearConstraint([[0.0, 1.0]], 1, 1)], options={"gtol": 1e-10},
    )  # fmt: skip
    slsqp = minimize(
        f, [0, 0], jac=df, method="SLSQP", options={"ftol": 1e-14},
        constraints=[{"type": "eq", "fun": lambda z: z[1] - 1, "jac": lambda z: [0.0, 1.0]}],
    )  # fmt: skip
    assert np.isclose(trust_says, trust.v[0].item(), atol=1e-6)
    assert np.isclose(slsqp_says, slsqp.multipliers.item(), atol=1e-6)
    print("1: right")


def check_2(mu_plus, mu_minus, unique):
    z, w = cp.Variable(), cp.Variable()
    pins = [w <= 0, -w <= 0]
    cp.Problem(cp.Minimize(cp.square(z + w) / 2 - z - 3 * w + 5), pins).solve()
    difference = float(pins[0].dual_value - pins[1].dual_value)
    assert np.isclose(mu_plus - mu_minus, difference, atol=1e-4)
    assert min(mu_plus, mu_minus) == 0

    def satisfied(plus, minus):
        """The conditions at the solution of the solver, with other multipliers."""
        gradient = df([z.value, w.value]) + np.array([0, plus - minus])
        return min(plus, minus) >= 0 and np.abs(gradient).max() < 1e-3

    assert satisfied(mu_plus, mu_minus)
    assert unique == (not satisfied(mu_plus + 1, mu_minus + 1))
    print("2: right")


def check_3(slope):
    """One of "zero", "finite", "infinite"."""
    # dP/d(Delta^2) = P'(Delta) / (2 Delta)
    slopes = prices[:3] / (2 * radii[:3])
    grows = slopes[0] / slopes[1]
    assert slope == ("infinite" if grows > 1.5 else "zero" if grows < 1 / 1.5 else "finite")
    print("3: right")


# %%
check_1(slsqp_says=-2.0, trust_says=2.0)  # theta = 0 now, and df/dv = (1 - 3) + 0 is -2 again
check_2(mu_plus=2.0, mu_minus=0.0, unique=False)
check_3("infinite")

# %% [markdown]
# ## References
#
# * S. Boyd and L. Vandenberghe, *Convex Optimization*, Cambridge University Press, 2004: sections
#   5.2.3 (Slater's condition), 5.5.2 and 5.5.3 (complementary slackness, KKT), 5.6 (sensitivity).
# * J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd ed., Springer, 2006: theorem 12.1.
# * M. Lalee, J. Nocedal and T. Plantenga, *On the implementation of an algorithm for large-scale
#   equality constrained optimization*, SIAM Journal on Optimization 8, 1998, 682-706: the method
#   behind `trust-constr` for equality constraints.
# * S. Diamond and S. Boyd, *CVXPY: A Python-Embedded Modeling Language for Convex Optimization*,
#   Journal of Machine Learning Research 17(83), 2016.
# * P. Virtanen et al., *SciPy 1.0: fundamental algorithms for scientific computing in Python*, Nature
#   Methods 17, 2020, 261-272.
