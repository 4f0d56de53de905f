# %% [markdown]
# # 1. Pinned parameters
#
# Imagine that a layer we could insert is already present, and that constraints keep it the identity.
# The Lagrange multipliers of these constraints say what it would be worth to relax them.
#
# At the end you will be able to say
#
# * what the constrained problem is, and why its multiplier is $\lambda = -\nabla_v L$;
# * when $\lambda$ is *the* multiplier, and what it is when training has not finished;
# * in which sense $\lambda$ is a price: the slope of the best loss that can be reached.
#
# Every claim below is asserted by a cell. If one were false, this notebook would fail.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, grad, jacrev

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
BLUE, RED, GREY = "#0072B2", "#D55E00", "#9AA5B1"

# %% [markdown]
# ## The constrained problem
#
# Let $\theta$ be the parameters that a network has, and $v$ those of a layer that it does not have
# yet, written as *deviations* from values at which that layer is the identity. If $L(\theta, v)$ is
# the loss of the network with the layer in it, then the network as it is solves
#
# $$\min_{\theta,\,v}\; L(\theta, v) \quad\text{subject to}\quad v = 0 .$$
#
# Our example fits forty points on a curve with three hidden units. The candidate is a residual block
# $x \mapsto x + W_2\,\tanh(W_1 x + b)$ after the hidden units. With $W_2 = 0$ it does nothing,
# whatever $W_1$ and $b$ are: $W_2$ is pinned, so $v = W_2$. A little weight decay in the loss
# isolates the minimum.

# %%
x = torch.linspace(-2, 2, 40)[:, None]
y = torch.sin(2 * x) + 0.5 * torch.cos(x) + 0.1 * torch.randn(x.shape)

model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
block = cg.blocks.ResidualMLP(3, 3, torch.tanh, pinned="outer")


def loss_fn(output, target):
    decay = sum(p.square().sum() for p in model.parameters())
    return (output - target).square().mean() + 1e-2 * decay


problem = cg.GrowthProblem(model, loss_fn, [(x, y)], [cg.Candidate(after="1", block=block)])
print(problem.constraints)

# %% [markdown]
# For comparison we also write $L(\theta, v)$ directly, in plain PyTorch, with the block really
# inserted into the network.

# %%
extended = nn.Sequential(model[0], model[1], block, model[2])
names = ["0.weight", "0.bias", "3.weight", "3.bias"]
shapes = [extended.get_parameter(name).shape for name in names]


def L(theta, v):
    """The loss as a function of the flat vector theta (10) and the matrix v (3, 3)."""
    parts = theta.split([shape.numel() for shape in shapes])
    values = {name: p.view(s) for name, p, s in zip(names, parts, shapes, strict=True)}
    output = functional_call(extended, values | {"2.outer.weight": v}, (x,))
    return (output - y).square().mean() + 1e-2 * theta.square().sum()


theta_0 = nn.utils.parameters_to_vector(model.parameters()).detach()
pin = torch.zeros(3, 3)

# %% [markdown]
# ## Claim 1. $\lambda = -\nabla_v L$
#
# The Lagrangian, with the sign that is used everywhere in this project, is
#
# $$\mathcal L(\theta, v, \lambda) = L(\theta, v) + \langle \lambda, v\rangle .$$
#
# A solution is stationary for $\mathcal L$ in both blocks of variables (the first-order or KKT
# conditions; Nocedal and Wright 2006, theorem 12.1):
#
# $$\nabla_\theta L(\theta, 0) = 0, \qquad \nabla_v L(\theta, 0) + \lambda = 0 .$$
#
# The second condition *is* the formula. The constraint gradients are rows of the identity, hence
# always linearly independent, so the multiplier exists and is unique. `cg.solve` finds it without
# building the extended network; autograd on the extended network must give the same.

# %%
solution = cg.solve(problem)
by_autograd = -grad(L, argnums=1)(theta_0, pin)

print(solution.multipliers["1"]["outer.weight"])
assert torch.allclose(solution.multipliers["1"]["outer.weight"], by_autograd, rtol=1e-12)

# %% [markdown]
# ## Claim 2. Before training has finished, $\lambda$ is the least-squares estimate
#
# The network above is not trained. No $\lambda$ can then satisfy both conditions, and the usual way
# out is to take the $\lambda$ that violates them least (Nocedal and Wright 2006, section 18.3). With
# the constraint Jacobian $A = [\,0 \;\; I\,]$,
#
# $$\min_\lambda \Big\Vert \begin{pmatrix}\nabla_\theta L\\ \nabla_v L\end{pmatrix}
# + A^{\mathsf T}\lambda\Big\Vert^2
# = \lVert\nabla_\theta L\rVert^2 + \min_\lambda \lVert\nabla_v L + \lambda\rVert^2 .$$
#
# The minimiser is the same $-\nabla_v L$, and what remains is $\lVert\nabla_\theta L\rVert$, which a
# solution reports as its `stationarity`.

# %%
g_theta, g_v = grad(L, argnums=(0, 1))(theta_0, pin)
A = np.hstack([np.zeros((9, len(theta_0))), np.eye(9)])
g = torch.cat([g_theta, g_v.flatten()]).detach().numpy()
estimate, *_ = np.linalg.lstsq(A.T, -g, rcond=None)
residual = np.linalg.norm(g + A.T @ estimate)

print(solution.status.name, " stationarity:", round(solution.stationarity, 4))
assert solution.status is cg.Status.LEAST_SQUARES_ESTIMATES
assert np.allclose(estimate, solution.multipliers["1"]["outer.weight"].flatten())
assert np.isclose(residual, solution.stationarity)

# %% [markdown]
# Now we train, to a stationary point: a trust-region method with exact Hessians makes
# $\lVert\nabla_\theta L\rVert$ vanish to rounding. The status changes.


# %%
def minimise(theta, v):
    """The minimiser of L(., v) near theta."""
    flat = torch.from_numpy
    result = minimize(
        lambda t: L(flat(t), v).item(),
        theta.numpy(),
        jac=lambda t: grad(L)(flat(t), v).detach().numpy(),
        hess=lambda t: jacrev(grad(L))(flat(t), v).detach().numpy(),
        method="trust-exact",
        options={"gtol": 1e-10, "maxiter": 500},
    )
    return flat(result.x)


theta = minimise(theta_0, pin)
nn.utils.vector_to_parameters(theta, model.parameters())
solution = cg.solve(problem)
lam = solution.multipliers["1"]["outer.weight"]

print(solution.status.name, f" stationarity: {solution.stationarity:.1e}")
assert solution.status is cg.Status.KKT_MULTIPLIERS
assert torch.linalg.eigvalsh(jacrev(grad(L))(theta, pin)).min() > 0  # an isolated minimum
assert torch.allclose(lam, -grad(L, argnums=1)(theta, pin), rtol=1e-12)

# %% [markdown]
# ## Claim 3. $-\lambda$ is the slope of the value function
#
# Move the pin from $0$ to $\varepsilon$ and let *everything else adapt*. The best loss is then the
# value function
#
# $$p(\varepsilon) = \min_\theta L(\theta, \varepsilon) = L(\theta^*(\varepsilon), \varepsilon).$$
#
# By the chain rule $\nabla p(0) = (\partial\theta^*/\partial\varepsilon)^{\mathsf T}\,
# \nabla_\theta L + \nabla_v L$, and the first term vanishes at a stationary $\theta$. So
#
# $$\nabla p(0) = -\lambda, \qquad
# p(\varepsilon) = p(0) - \langle\lambda, \varepsilon\rangle + O(\lVert\varepsilon\rVert^2) :$$
#
# $\lambda$ is a **shadow price** (Boyd and Vandenberghe 2004, section 5.6; the argument is the
# envelope theorem). We trace $p$ along the ray $\varepsilon = t\,\lambda/\lVert\lambda\rVert$ by
# solving the problem again for each of 33 values of $t$.

# %%
unit = lam / lam.norm()
ts = np.linspace(-1, 1, 33)
p = np.empty_like(ts)
for side in (range(16, 33), range(15, -1, -1)):  # outwards from 0, each start at its neighbour
    near = theta
    for i in side:
        near = minimise(near, ts[i] * unit)
        p[i] = L(near, ts[i] * unit).item()

h = 1e-4
ends = [L(minimise(theta, t * unit), t * unit).item() for t in (-h, h)]
slope = (ends[1] - ends[0]) / (2 * h)
print(f"slope of p at 0: {slope:.8f}    -|lambda|: {-lam.norm().item():.8f}")
assert abs(slope + lam.norm().item()) < 1e-5 * lam.norm().item()
fine = np.linspace(-1, 1, 257)  # every eighth is one of ts
fixed = np.array([L(theta, t * unit).item() for t in fine])
assert (p <= fixed[::8] + 1e-12).all()

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.plot(fine, fixed, color=GREY, label=r"$L(\theta, \varepsilon)$, $\theta$ held fixed")
ax.plot(ts, p, color=BLUE, marker=".", label=r"$p(\varepsilon)$, the problem solved anew")
ax.plot(ts, p[16] - ts * lam.norm().item(), "--", color=RED, label=r"slope $-\Vert\lambda\Vert$")
ax.plot(0, p[16], "o", color="black")
ax.set_ylim(0.8 * p.min(), 1.1 * p.max())
ax.set_xlabel(r"position $t$ of the pin, $\varepsilon = t\,\lambda/\Vert\lambda\Vert$")
ax.set_ylabel("loss (mean squared error + decay)")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# **Figure 1.** The best loss as the pin moves (blue, 33 solves), the loss when the old
# parameters do not adapt (grey), and the line that $\lambda$ predicts (red). All three touch at the
# pin. Blue lies below grey, because adapting can only help; both bend away from the line,
# because a price holds at the margin only. Units: loss over Frobenius norm of $W_2$.

# %% [markdown]
# ## Claim 4. The multiplier has a direction, and no other direction is better
#
# In a unit direction $d$ the slope is $-\langle\lambda, d\rangle \ge -\lVert\lambda\rVert$ by the
# Cauchy-Schwarz inequality, with equality for $d = \lambda/\lVert\lambda\rVert$ alone. So
# $+\lambda$ is where the new parameters want to go, and its norm is how much the first step buys.

# %%
directions = torch.randn(40, 3, 3)
directions /= directions.flatten(1).norm(dim=1)[:, None, None]
predicted = -(directions * lam).sum((1, 2)).numpy()
h, realised = 1e-3, []
for d in directions:
    up, down = (L(minimise(theta, t * d), t * d).item() for t in (h, -h))
    realised.append((up - down) / (2 * h))
realised = np.array(realised)

assert np.abs(realised - predicted).max() < 1e-3 * lam.norm()
assert (realised > -lam.norm().item()).all()

# %%
size = lam.norm().item()
fig, ax = plt.subplots(figsize=(4.2, 3.6))
ax.plot([-size, size], [-size, size], color=GREY, linewidth=1)
ax.plot(predicted, realised, "o", color=BLUE, markersize=4, label="40 random directions")
ax.plot(-size, slope, "D", color=RED, label=r"along $\lambda$")
ax.set_xlabel(r"$-\langle\lambda, d\rangle$ (loss per unit of $v$)")
ax.set_ylabel(r"slope of $p$ along $d$ (loss per unit of $v$)")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# **Figure 2.** The slope of the value function in 40 random unit directions, from solving the
# problem on both sides of the pin, against what $\lambda$ says (grey: equality). The steepest
# descent is along $\lambda$ itself.

# %% [markdown]
# ## Exercises
#
# 1. Write the pin as $2v = 0$ instead of $v = 0$. What becomes of the multiplier, as a multiple of
#    $\lambda$? (Start from $\mathcal L = L + \langle\mu, 2v\rangle$.)
# 2. The pin is moved to $\varepsilon = 0.05\,\lambda/\lVert\lambda\rVert$. Predict the best loss to
#    first order. Is the truth above or below? Why can Figure 1 say so?
# 3. The free parameters $W_1, b$ of the block were drawn at random. Draw another block at the same
#    $\theta$: does $\lambda$ change? Does the status?
#
# The functions below check your answers; the cell after them holds ours.


# %%
def check_1(multiple):
    mu = multiple * lam
    assert torch.allclose(grad(L, argnums=1)(theta, pin) + 2 * mu, torch.zeros(3, 3), atol=1e-9)
    print("1: right")


def check_2(prediction, truth_is_above):
    truth = L(minimise(theta, 0.05 * unit), 0.05 * unit).item()
    assert abs(prediction - (p[16] - 0.05 * size)) < 1e-6
    assert truth_is_above == (truth > prediction)
    print(f"2: right, the truth is {truth:.5f} and the prediction {prediction:.5f}")


def check_3(multiplier_changes, status_changes):
    other = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(3, 3, torch.tanh))
    again = cg.solve(cg.GrowthProblem(model, loss_fn, [(x, y)], [other]))
    same = torch.allclose(again.multipliers["1"]["outer.weight"], lam)
    assert multiplier_changes == (not same)
    assert status_changes == (again.status is not solution.status)
    print("3: right")


# %%
check_1(multiple=0.5)
check_2(prediction=p[16] - 0.05 * size, truth_is_above=True)
check_3(multiplier_changes=True, status_changes=False)

# %% [markdown]
# ## References
#
# * J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd ed., Springer, 2006: theorem 12.1
#   (first-order conditions), section 18.3 (least-squares multiplier estimates).
# * S. Boyd and L. Vandenberghe, *Convex Optimization*, Cambridge University Press, 2004, section 5.6
#   (perturbation and sensitivity analysis, shadow prices).
# * E. Herberg, R. Herzog, F. Köhne, L. Kreis and A. Schiela, *Sensitivity-Based Layer Insertion for
#   Residual and Feedforward Neural Networks*, arXiv 2311.15995, 2023: layers held by constraints, and
#   their multipliers as the signal for where to insert.
