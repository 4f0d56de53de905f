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
# * in which sense $\lambda$ is a price, the slope of the best loss that can be reached, and under
#   which conditions;
# * what becomes of $\lambda$ when the layer is really inserted.
#
# Every claim below is asserted by a cell. If one were false, this notebook would fail.

# %%
import copy
from itertools import permutations, product

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, grad, jacrev

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9AA5B1"

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
# The second condition *is* the formula. `cg.solve` finds $\lambda$ without building the extended
# network; autograd on the extended network must give the same.

# %%
solution = cg.solve(problem)
by_autograd = -grad(L, argnums=1)(theta_0, pin)

print(solution.multipliers["1"]["outer.weight"])
assert torch.allclose(solution.multipliers["1"]["outer.weight"], by_autograd, rtol=1e-12)

# %% [markdown]
# That a minimum has multipliers needs a constraint qualification, and affine constraints are enough.
# That they are *unique* needs more: linearly independent gradients of the constraints (**LICQ**). Pins
# have it for free, whatever the network and the data: the gradients are the rows of
# $A = [\,0 \;\; I\,]$. Write each pin twice, and they are dependent: every $\mu_1 + \mu_2 = \lambda$ is
# then a pair of multipliers.

# %%
jacobians = jacrev(lambda theta, v: v.flatten(), argnums=(0, 1))(theta_0, pin)
A = np.hstack([J.reshape(9, -1) for J in jacobians])  # of the constraints v = 0, in (theta, v)
twice = np.vstack([A, A])
lam_0 = solution.multipliers["1"]["outer.weight"].flatten().numpy()
g_theta, g_v = grad(L, argnums=(0, 1))(theta_0, pin)
pairs = [np.concatenate([share * lam_0, (1 - share) * lam_0]) for share in (1, 0.5, -3)]

assert np.linalg.matrix_rank(A) == len(A)
assert np.linalg.matrix_rank(twice) < len(twice)
for pair in pairs:  # each satisfies the second condition
    assert np.allclose((twice.T @ pair)[len(theta_0) :], -g_v.detach().flatten())

# %% [markdown]
# ## Claim 2. Before training has finished, $\lambda$ is the least-squares estimate
#
# The network above is not trained. No $\lambda$ can then satisfy both conditions, and the usual way
# out is to take the $\lambda$ that violates them least (Nocedal and Wright 2006, section 18.3):
#
# $$\min_\lambda \Big\Vert \begin{pmatrix}\nabla_\theta L\\ \nabla_v L\end{pmatrix}
# + A^{\mathsf T}\lambda\Big\Vert^2
# = \lVert\nabla_\theta L\rVert^2 + \min_\lambda \lVert\nabla_v L + \lambda\rVert^2 .$$
#
# The minimiser is the same $-\nabla_v L$, and what remains is $\lVert\nabla_\theta L\rVert$, which a
# solution reports as its `stationarity`.

# %%
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
assert torch.linalg.eigvalsh(jacrev(grad(L))(theta, pin)).min() > 0  # second-order sufficiency
assert torch.allclose(lam, -grad(L, argnums=1)(theta, pin), rtol=1e-12)

# %% [markdown]
# ## Claim 3. $-\lambda$ is the slope of the value function
#
# Move the pin from $0$ to $\varepsilon$ and let *everything else adapt*. The best loss is then the
# **value function**. Take the *local* one,
#
# $$p(\varepsilon) = \min\,\{L(\theta, \varepsilon) : \theta \text{ near } \theta^*\}
# = L(\theta^*(\varepsilon), \varepsilon),$$
#
# under three conditions:
#
# 1. $\theta^*$ is stationary: $\nabla_\theta L(\theta^*, 0) = 0$;
# 2. $\nabla^2_{\theta\theta}L(\theta^*, 0)$ is positive definite (second-order sufficiency: $\theta^*$
#    is a strict local minimiser);
# 3. $L$ is twice continuously differentiable there, *in $\theta$ and $v$ together*.
#
# By 2 and 3 the implicit function theorem solves $\nabla_\theta L = 0$ for a differentiable
# $\theta^*(\varepsilon)$. By the chain rule $\nabla p(0) = (\partial\theta^*/\partial\varepsilon)^{\mathsf T}
# \,\nabla_\theta L + \nabla_v L$, and by 1 the first term vanishes. So
#
# $$\nabla p(0) = -\lambda, \qquad
# p(\varepsilon) = p(0) - \langle\lambda, \varepsilon\rangle + O(\lVert\varepsilon\rVert^2) :$$
#
# $\lambda$ is a **shadow price** (Fiacco 1983, chapter 3; Boyd and Vandenberghe 2004, section 5.6).
# We trace $p$ along the ray $\varepsilon = t\,\lambda/\lVert\lambda\rVert$ by solving the problem again
# for each of 17 values of $t$.

# %%
unit = lam / lam.norm()
ts = np.linspace(-1, 1, 17)
p = np.empty_like(ts)
for side in (range(8, 17), range(7, -1, -1)):  # outwards from 0, each start at its neighbour
    near = theta
    for i in side:
        near = minimise(near, ts[i] * unit)
        p[i] = L(near, ts[i] * unit).item()

h = 1e-4
ends = [L(minimise(theta, t * unit), t * unit).item() for t in (-h, h)]
slope = (ends[1] - ends[0]) / (2 * h)
print(f"slope of p at 0: {slope:.8f}    -|lambda|: {-lam.norm().item():.8f}")
assert abs(slope + lam.norm().item()) < 1e-5 * lam.norm().item()
fine = np.linspace(-1, 1, 129)  # every eighth is one of ts
fixed = np.array([L(theta, t * unit).item() for t in fine])
assert (p <= fixed[::8] + 1e-12).all()

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.plot(fine, fixed, ":", color="black", label=r"$L(\theta, \varepsilon)$, $\theta$ held fixed")
ax.plot(ts, p, "o-", color=BLUE, label=r"$p(\varepsilon)$, the problem solved anew")
ax.plot(ts, p[8] - ts * lam.norm().item(), "--", color=RED, label=r"slope $-\Vert\lambda\Vert$")
ax.plot(0, p[8], "D", color="black", markersize=7, label="the pin at 0")
ax.set_ylim(0.8 * p.min(), 1.1 * p.max())
ax.set_xlabel(
    r"position $t$ of the pin, $\varepsilon = t\,\lambda/\Vert\lambda\Vert$ (norm of $W_2$)"
)
ax.set_ylabel("loss (mean squared error + decay)")
ax.legend()

# %% [markdown]
# **Figure 1.** The best loss as the pin moves (circles, 17 solves), the loss when the old
# parameters do not adapt (dotted), and the line that $\lambda$ predicts (dashed). All three touch at
# the pin. Adapting can only help; both curves bend away from the line, because a price holds at the
# margin only.

# %% [markdown]
# ## Claim 4. The multiplier has a direction, and no other direction is better
#
# In a unit direction $d$ the slope is $-\langle\lambda, d\rangle \ge -\lVert\lambda\rVert$ by the
# Cauchy-Schwarz inequality, with equality for $d = \lambda/\lVert\lambda\rVert$ alone. So
# $+\lambda$ is where the new parameters want to go, and its norm is how much the first step buys.

# %%
directions = torch.randn(16, 3, 3)
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
ax.plot([-size, size], [-size, size], "-", color=GREY, linewidth=1, label="equality")
ax.plot(predicted, realised, "o", color=BLUE, label="16 random directions")
ax.plot(-size, slope, "D", color=RED, markersize=7, label=r"along $\lambda$")
ax.set_xlabel(r"$-\langle\lambda, d\rangle$ (loss per unit of $v$)")
ax.set_ylabel(r"slope of $p$ along $d$ (loss per unit of $v$)")
ax.legend()

# %% [markdown]
# **Figure 2.** The slope of the value function in 16 random unit directions, from solving the
# problem on both sides of the pin, against what $\lambda$ says. The steepest descent is along
# $\lambda$ itself.
#
# ## Claim 5. Each of the three conditions is needed
#
# Three functions of one pinned $v$, each of which breaks one of them:
#
# | | $L$ | at $v = 0$ |
# |---|---|---|
# | two minimisers | $\tfrac14(\theta^2 - 1)^2 + \theta v$ | $\theta = \pm1$ tie, $\lambda = \mp1$ |
# | a saddle | $\tfrac14(a^2 - 1)^2 + \tfrac12 b^2 + (a^2 - \tfrac12 + b)\,v$ | $(0, 0)$ is stationary, $\lambda = \tfrac12$; at the minimisers $(\pm1, 0)$ it is $-\tfrac12$ |
# | a kink | $\tfrac12(\theta + r(v) + \tfrac12 r(-v) - 2)^2 + \tfrac12\theta^2$, $r$ = ReLU | $\theta = 1$; autograd says $\lambda = 0$, by $r'(0) = 0$ |
#
# **Two minimisers.** Each has a smooth local value function with slope $-\lambda$, but the *global* one,
# the lower of the two, has a kink. Its slope along $d$ is the least over the set $\Theta^*$ of
# minimisers (Danskin 1967; Bonnans and Shapiro 2000, theorem 4.13):
#
# $$p'(0; d) = \min_{\theta\in\Theta^*}\,\langle\nabla_v L(\theta, 0), d\rangle .$$
#
# **A saddle.** There $-\lambda$ has even the wrong sign: it is the slope of no value function.
#
# **A kink.** The loss falls on both sides, and $\lambda = 0$ is neither slope. Inactive units of ReLU
# identity layers do this (notebook 4).
#
# The conditions are sufficient: where $\nabla^2_{\theta\theta}L$ is singular, as in most large networks,
# $p$ may be differentiable all the same, but the theorem does not say so.


# %%
def tie(theta, v):
    return (theta[0] ** 2 - 1) ** 2 / 4 + theta[0] * v


def saddle(theta, v):
    a, b = theta
    return (a**2 - 1) ** 2 / 4 + b**2 / 2 + (a**2 - 0.5 + b) * v


def kink(theta, v):
    return (theta[0] + v.relu() + (-v).relu() / 2 - 2) ** 2 / 2 + theta[0] ** 2 / 2


zero = torch.zeros(())
line = torch.linspace(-2, 2, 2001)[None]
plane = torch.cartesian_prod(*2 * (torch.linspace(-2, 2, 401),)).T


def best(f, thetas, v):
    """The least value over a grid of theta."""
    return f(thetas, torch.as_tensor(v)).min().item()


stationary = {  # the points that the table names
    (tie, "two minimisers"): (line, [[1.0], [-1.0]]),
    (saddle, "a saddle"): (plane, [[0.0, 0.0], [1.0, 0.0]]),
    (kink, "a kink"): (line, [[1.0]]),
}
slopes, prices, h = {}, {}, 2e-3
for (f, name), (thetas, points) in stationary.items():
    points = [torch.tensor(point) for point in points]
    assert all(grad(f)(point, zero).abs().max() == 0 for point in points)
    prices[name] = [-grad(f, argnums=1)(point, zero).item() + 0.0 for point in points]
    at_0 = best(f, thetas, 0.0)
    slopes[name] = [(best(f, thetas, t) - at_0) / t for t in (-h, h)]
    found = ", ".join(f"{s:+.2f}" for s in slopes[name])
    print(
        f"{name:15} slopes of p on the left and right {found}   lambda at the points {prices[name]}"
    )

# Danskin: to the right the least of the slopes -lambda, to the left the greatest
each = [-price for price in prices["two minimisers"]]
assert np.allclose(slopes["two minimisers"], [max(each), min(each)], atol=1e-2)
assert slopes["two minimisers"][0] > 0 > slopes["two minimisers"][1]
at_saddle, at_minimum = prices["a saddle"]
assert np.allclose(slopes["a saddle"], -at_minimum, atol=1e-2)
assert at_saddle == -at_minimum != 0
assert prices["a kink"] == [0]
assert np.allclose(slopes["a kink"], [0.5, -1], atol=1e-2)

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.4))
v = torch.linspace(-0.5, 0.5, 41)
for ax, ((f, name), (thetas, points)) in zip(axes, stationary.items(), strict=True):
    ax.plot(v, [best(f, thetas, t) for t in v], color=BLUE, label=r"global $p(\varepsilon)$")
    for point, price, style, colour in zip(
        points, prices[name], ("--", "-."), (RED, GREEN), strict=False
    ):
        at = ", ".join(f"{c:g}" for c in point)
        where = f(torch.tensor(point), zero).item()
        ax.plot(
            v, where - price * v, style, color=colour, label=rf"$-\lambda$ at $\theta = ({at})$"
        )
    ax.set_title(name)
    ax.set_xlabel(r"position $\varepsilon$ of the pin")
    ax.set_ylim(None, ax.get_ylim()[1] + 0.45 * np.ptp(ax.get_ylim()))  # room for the legend
    ax.legend(loc="upper center")
axes[0].set_ylabel("loss (no unit)")
fig.tight_layout()

# %% [markdown]
# **Figure 3.** The global value function and what $\lambda$ says at the stationary points of the table.
#
# **In networks minimisers always tie.** Permuting the three hidden units of our network, or changing the
# signs around a tanh, gives 48 minimisers of equal loss. The candidate's $W_1$ stays as it is, so the 48
# have different $\lambda$; each prices its own neighbourhood, the one in which training goes on. And the
# *status* of a solution says that $\theta$ is first-order stationary and no more: it says so at the
# saddle where all weights are zero, too.

# %%
w, c, u, bias = theta.split((3, 3, 3, 1))
alike = torch.stack([
    torch.cat([signs * w[order], signs * c[order], signs * u[order], bias])
    for order in map(list, permutations(range(3)))
    for signs in map(torch.tensor, product((1.0, -1.0), repeat=3))
])  # fmt: skip
theirs = torch.stack([-grad(L, argnums=1)(point, pin) for point in alike])
along = (theirs * unit).sum((1, 2))
h, one_sided = 1e-4, []
for sign in (1, -1):  # of the value function near all 48: solve anew near the one that offers most
    near = minimise(alike[(sign * along).argmax()], sign * h * unit)
    one_sided.append((L(near, sign * h * unit) - L(theta, pin)).item() / h)

assert all(torch.isclose(L(point, pin), L(theta, pin), rtol=1e-12) for point in alike)
assert np.allclose(one_sided, [-along.max().item(), along.min().item()], rtol=1e-2)
assert max(one_sided) < 0  # better on both sides, a kink

at_zero = torch.cat([torch.zeros(9), y.mean()[None] / 1.01])
nn.utils.vector_to_parameters(at_zero, model.parameters())
assert cg.solve(problem).status is cg.Status.KKT_MULTIPLIERS
assert torch.linalg.eigvalsh(jacrev(grad(L))(at_zero, pin)).min() < 0  # a saddle
nn.utils.vector_to_parameters(theta, model.parameters())

# %% [markdown]
# ## Claim 6. The price is what the inserted layer finds
#
# The whole path on our instance: the conditions hold, $\lambda$ predicts a slope, the layer is really
# inserted, and its gradient and the slopes of the loss are looked at in the network that results.
#
# * The function has not moved, so the loss is $p(0)$, and $\nabla_\theta L$ is still zero.
# * The gradient of $W_2$ is $-\lambda$. Those of $W_1$ and $b$ are zero, being multiplied by $W_2 = 0$.
# * A gradient step of length $\eta$ lowers the loss by $\eta\lVert\lambda\rVert^2 + O(\eta^2)$.
# * After a step to $\varepsilon$ to which $\theta$ has adapted, the slope of the loss is
#   $-\langle\lambda(\varepsilon), \lambda\rangle/\lVert\lambda\rVert$ with
#   $\lambda(\varepsilon) = -\nabla_v L(\theta^*(\varepsilon), \varepsilon)$, again the gradient of the
#   layer. It is less steep: what was cheap has been bought.

# %%
grown = copy.deepcopy(model)
old = list(grown.parameters())
cg.insert(grown, solution)
new = {
    name.split(".", 2)[-1]: p
    for name, p in grown.named_parameters()
    if all(p is not q for q in old)
}


def loss_of_grown():
    return (grown(x) - y).square().mean() + 1e-2 * sum(p.square().sum() for p in old)


def gradient(parameters):
    return torch.autograd.grad(loss_of_grown(), parameters)


def move(theta, v):
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, old)
        W2.copy_(v)


W2 = next(p for name, p in new.items() if name.endswith("outer.weight"))
free = [p for p in new.values() if p is not W2]
(at_insertion,) = gradient([W2])
before = loss_of_grown().item()
assert np.isclose(before, solution.loss, rtol=1e-14)
assert torch.allclose(at_insertion, -lam, rtol=1e-10)
assert max(g.abs().max() for g in gradient(free)) == 0
assert max(g.abs().max() for g in gradient(old)) < 1e-8

eta = 1e-4
move(theta, eta * lam)
gained = before - loss_of_grown().item()
t, h = 0.25, 1e-4
nearby = {}
for s in (t - h, t, t + h):
    move(minimise(theta, s * unit), s * unit)
    nearby[s] = loss_of_grown().item(), -(gradient([W2])[0] * unit).sum().item()
new_slope = (nearby[t + h][0] - nearby[t - h][0]) / (2 * h)

print("                                      predicted     found")
print(f"stationarity                           0            {solution.stationarity:.1e}")
print(f"slope along lambda at the insertion   {-size:.6f}    {(at_insertion * unit).sum():.6f}")
print(f"gain of a step, over its length        {size**2:.6f}     {gained / eta:.6f}")
print(f"slope at the new pin, {t:.2f} further    {-nearby[t][1]:.6f}    {new_slope:.6f}")
assert np.isclose(gained / eta, size**2, rtol=1e-2)
assert np.isclose(new_slope, -nearby[t][1], rtol=1e-4)
assert -size < new_slope < 0

# %% [markdown]
# ## Exercises
#
# 1. Write the pin as $2v = 0$ instead of $v = 0$. What becomes of the multiplier, as a multiple of
#    $\lambda$? (Start from $\mathcal L = L + \langle\mu, 2v\rangle$.)
# 2. The pin is moved to $\varepsilon = 0.05\,\lambda/\lVert\lambda\rVert$. Predict the best loss to
#    first order. Is the truth above or below? Can Figure 1 say so?
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
    assert abs(prediction - (p[8] - 0.05 * size)) < 1e-6
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
check_2(prediction=p[8] - 0.05 * size, truth_is_above=True)
check_3(multiplier_changes=True, status_changes=False)

# %% [markdown]
# ## References
#
# * J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd ed., Springer, 2006: theorem 12.1
#   (first-order conditions), section 18.3 (least-squares multiplier estimates).
# * A. V. Fiacco, *Introduction to Sensitivity and Stability Analysis in Nonlinear Programming*,
#   Academic Press, 1983, chapter 3: the sensitivity theorem.
# * J. M. Danskin, *The Theory of Max-Min and its Application to Weapons Allocation Problems*,
#   Springer, 1967; J. F. Bonnans and A. Shapiro, *Perturbation Analysis of Optimization Problems*,
#   Springer, 2000, theorem 4.13: value functions with several minimisers.
# * S. Boyd and L. Vandenberghe, *Convex Optimization*, Cambridge University Press, 2004, section 5.6
#   (perturbation and sensitivity analysis, shadow prices).
# * E. Herberg, R. Herzog, F. Köhne, L. Kreis and A. Schiela, *Sensitivity-Based Layer Insertion for
#   Residual and Feedforward Neural Networks*, arXiv 2311.15995, 2023: layers held by constraints, and
#   their multipliers as the signal for where to insert.
