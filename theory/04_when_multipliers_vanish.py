# %% [markdown]
# # 4. When multipliers vanish
#
# A multiplier of zero may mean that nothing is to be gained. It may also mean that the question was
# asked badly. This notebook collects the ways in which that happens.
#
# At the end you will be able to say
#
# * why a layer with two zero factors has no price, and what to look at instead;
# * why every *linear* insertion, and some that do not look linear, are worth nothing once the
#   next layer is trained;
# * what a derivative at a kink means, why the mean slope of a trained ReLU network there is *half* of what
#   $\lambda$ says, and what second-order information adds.
#
# Notation: $x$ is the tensor at the site, one row per sample, $\delta = \partial L/\partial x$, and
# $\sum$ runs over the samples. The layer after the site is $y = Ux + c$.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.func import grad, jacrev

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#9AA5B1"

inputs = torch.randn(200, 2)
targets = torch.sin(2 * inputs[:, :1]) * inputs[:, 1:] + 0.1 * torch.randn(200, 1)
model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))


def tail(x):
    """The loss as a function of the tensor at the site, the output of the ReLU."""
    return nn.functional.mse_loss(model[2](x), targets)


def at_site():
    """x and delta."""
    x = model[:2](inputs).detach()
    return x, grad(tail)(x)


# %% [markdown]
# ## Claim 1. With both factors at zero every multiplier is zero, and the answer is an eigenvalue
#
# Let $v = (W_1, W_2)$ both be pinned at $0$ in $x \mapsto x + W_2\,\sigma(W_1 x)$, with
# $\sigma(0) = 0$. The change of $x$ is $\sigma'(0)\,W_2W_1x + O(\lVert v\rVert^3)$, a *product*, so
#
# $$L(v) - L(0) = \sigma'(0)\sum\delta^{\mathsf T} W_2 W_1 x + O(\lVert v\rVert^3)
#  = \sigma'(0)\,\langle M, W_2W_1\rangle + \dots, \qquad M = \sum\delta x^{\mathsf T} .$$
#
# There is no first-order term: $\lambda = 0$ for *any* network and data. The second-order term is a
# quadratic form whose eigenvalues come in pairs $\pm\sigma'(0)\,s_i(M)$ with the singular values $s_i$ of
# $M$. The pin is a saddle point, and the smallest eigenvalue, $-\sigma'(0)\,s_{\max}(M)$, is the gain of
# leaving it in the best direction, per half squared distance. Criteria for layers whose first derivative
# vanishes are therefore eigenvalue problems; the topological derivative of Krishnanunni, Bui-Thanh and
# Dawson (2025) is one.

# %%
x, delta = at_site()
M = delta.T @ x


def two_factors(v):
    first, second = v[:6], v[6:]  # W1 (one hidden unit) and W2
    return tail(x + torch.tanh(x @ first[:, None]) * second)


v0 = torch.zeros(12)
spectrum = torch.linalg.eigvalsh(jacrev(grad(two_factors))(v0).detach())
s = torch.linalg.svdvals(M)
print("gradient:", grad(two_factors)(v0).abs().max().item())
print("smallest eigenvalue:", spectrum[0].item(), "  -s_max(M):", -s[0].item())

assert grad(two_factors)(v0).abs().max() == 0
assert torch.isclose(spectrum[0], -s[0], rtol=1e-9)
assert torch.allclose(spectrum, torch.cat([-s, s.flip(0)]), atol=1e-12)

# %% [markdown]
# ## Claim 2. A linear layer has a redundant multiplier
#
# Insert $x \mapsto Wx$ with $W = I$ pinned. With $g = \partial L/\partial y$ we have
# $\delta = U^{\mathsf T} g$ and $\nabla_U L = \sum g x^{\mathsf T}$, so
#
# $$\lambda_W = -\sum\delta x^{\mathsf T} = -\,U^{\mathsf T}\,\nabla_U L .$$
#
# This holds at *every* $\theta$. As soon as the next layer is stationary, $\lambda_W = 0$: what $W$ could
# do, $U$ can do too. The same formula hides in layers that are not linear:
#
# * a residual block $x + W_2\,\mathrm{ReLU}(W_1x)$ after a ReLU with $W_1 = cI$: all entries of $x$ are
#   non-negative, the block is linear there, and $\lambda_{W_2} = -c\,U^{\mathsf T}\nabla_U L$;
# * a residual layer with one weight, $x + \sigma(Wx + b)$: at $W = 0$ it is linear in $W$ and in $x$, so
#   $\lambda_W = -\sigma'(0)\,U^{\mathsf T}\nabla_U L$;
# * the matrix $M$ of Claim 1, when a linear layer follows: $M = U^{\mathsf T}\nabla_U L$;
# * the *diagonal* of $\lambda_W$ of an identity layer $\mathrm{ReLU}(Wx + b)$ after a ReLU: where $x_i > 0$
#   the layer is linear, and where $x_i = 0$ the entry $\delta_ix_i$ is zero anyway.
#
# What helps is a free factor that is *not* a multiple of the identity (the library draws it at random).


# %%
class Linear(nn.Module):
    """x W^T with W = I pinned."""

    pinned = ("weight",)

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x):
        return x @ self.weight.T


blocks = {
    "linear layer": Linear(6),
    "residual ReLU, $W_1 = 0.8\\,I$": cg.blocks.ResidualMLP(6, 6, torch.relu, inner_init=0.8),
    "residual tanh, one weight": cg.blocks.ResidualLinear(6, torch.tanh),
    "residual ReLU, $W_1$ random": cg.blocks.ResidualMLP(6, 6, torch.relu),
    "identity layer, ReLU": cg.blocks.IdentityLinear(6, nn.ReLU()),
}
candidates = [cg.Candidate("1", block, name=name) for name, block in blocks.items()]


def measure():
    problem = cg.GrowthProblem(model, nn.MSELoss(), [(inputs, targets)], candidates)
    return cg.solve(problem, norm=cg.norms.Frobenius())


solution = measure()
U = model[2].weight
(grad_U,) = torch.autograd.grad(nn.functional.mse_loss(model(inputs), targets), U)
redundant = -(U.T @ grad_U).detach()
linear, scaled, one_weight, _, identity = (m for m in solution.multipliers.values())
assert torch.allclose(linear["weight"], redundant)
assert torch.allclose(scaled["outer.weight"], 0.8 * redundant)
assert torch.allclose(one_weight["weight"], redundant)
assert torch.allclose(identity["weight"].diag(), redundant.diag())
assert torch.allclose(M, -redundant)  # Claim 1 too, where the next layer is linear

# %% [markdown]
# We train the last layer alone: the features stay fixed, and each of 12 steps solves the least-squares
# problem for $U, c$ a little further. The redundant multipliers vanish with $\nabla_U L$, the others do
# not.

# %%
features = torch.cat([x, torch.ones(200, 1)], dim=1)
best = torch.linalg.lstsq(features, targets).solution
start = torch.cat([model[2].weight.detach().T, model[2].bias.detach()[None]])
history = {name: [] for name in blocks}
for k in range(13):
    with torch.no_grad():
        now = best + 10.0 ** (-k / 2) * (start - best)
        model[2].weight.copy_(now[:-1].T)
        model[2].bias.copy_(now[-1])
    sensitivities = measure().sensitivities
    for name in history:
        history[name].append(sensitivities[name].value)

fig, ax = plt.subplots(figsize=(6.2, 3.8))
for (name, values), marker in zip(history.items(), "osx^D", strict=True):
    ax.semilogy(values, marker=marker, label=name)
ax.set_xlabel(r"step (the error of $U, c$ falls by $\sqrt{10}$ in each)")
ax.set_ylabel(r"$\Vert\lambda\Vert_F$ (loss per unit of the pins)")
ax.legend()

for name in list(history)[:3]:
    assert history[name][-1] < 1e-4 * history[name][0]
for name in list(history)[3:]:
    assert history[name][-1] > 1e-2
assert max(history, key=lambda name: history[name][0]) == "residual tanh, one weight"

# %% [markdown]
# **Figure 1.** Sensitivities while the next layer is trained to its optimum. The three redundant layers
# lose theirs at the rate of the gradient of $U$. At step 0 a layer that is useless in the long run ranks
# first.
#
# ## Claim 3. At a kink there are two slopes, and autograd returns neither
#
# The identity layer $\mathrm{ReLU}(Wx + b)$ after a ReLU sits on kinks: every inactive unit has $x_i = 0$,
# exactly where the new ReLU bends. In a direction $d = (V, a)$ with $u = Vx + a$ the derivative
# from the right is
#
# $$L'(0; d) = \sum\Big(\sum_{x_i > 0}\delta_iu_i + \sum_{x_i = 0}\delta_i\max(u_i, 0)\Big),$$
#
# while automatic differentiation takes $\mathrm{ReLU}'(0) = 0$ and drops the second part: inactive units
# that a step would wake count for nothing. From the left $\min(u_i, 0)$ takes the place of
# $\max(u_i, 0)$. Since $\max(u_i, 0) + \min(u_i, 0) = u_i$, the two slopes add up to
#
# $$\underbrace{2\sum_{x_i > 0}\delta_iu_i + \sum_{x_i = 0}\delta_iu_i}_{\text{right} + \text{left}}
# = \underbrace{\sum_{x_i > 0}\delta_iu_i}_{-\langle\lambda, d\rangle} + \underbrace{\sum\delta^{\mathsf T}u}_{-\langle\lambda_{\text{linear}}, d\rangle} .$$
#
# The last term is the slope of the *linear* layer, which is redundant (Claim 2). So where the next layer is
# stationary
#
# $$L'_{\text{right}} + L'_{\text{left}} = -\langle\lambda, d\rangle \quad\text{for every } d,$$
#
# and a smooth function would have $-2\langle\lambda, d\rangle$: the mean slope is half of what $\lambda$ says.
# Two-sided finite differences converge to this mean, so they cannot certify $\lambda$ here;
# `cg.directional_derivative` is one-sided. A solution says which share of the units is at a kink,
# `Sensitivity.kink`. A zero-outer residual block is smooth in its pin, and all agree.

# %%
with torch.no_grad():  # the next layer at its optimum
    model[2].weight.copy_(best[:-1].T)
    model[2].bias.copy_(best[-1])
x, delta = at_site()
solution = measure()
lam = solution.multipliers
identity = lam["identity layer, ReLU"]
problem = cg.GrowthProblem(model, nn.MSELoss(), [(inputs, targets)], candidates)
directions = [(torch.randn(6, 6), torch.randn(6)) for _ in range(30)]
directions.append((identity["weight"], identity["bias"]))  # along lambda
table = []
for V, a in directions:

    def line(t, V=V, a=a):
        return tail(torch.relu(x + t * (x @ V.T + a))).item()

    u = x @ V.T + a
    by_autograd = -(identity["weight"] * V).sum() - identity["bias"] @ a
    one_sided = (delta * torch.where(x > 0, u, u.clamp(min=0))).sum()
    h = 1e-7
    forward, backward = (line(h) - line(0)) / h, (line(0) - line(-h)) / h
    table.append((by_autograd.item(), one_sided.item(), forward, backward))
by_autograd, one_sided, forward, backward = np.array(table).T

share = (x == 0).double().mean().item()
print(f"{share:.0%} of the units are at the kink")
off = np.abs(by_autograd - forward).mean() / np.abs(forward).mean()
print(f"autograd differs from the slope by {off:.0%} on average")
print(
    f"along lambda: right {forward[-1]:.5f}, left {backward[-1]:.5f}, autograd {by_autograd[-1]:.5f}"
)
assert np.isclose(solution.sensitivities["identity layer, ReLU"].kink, share)
assert solution.sensitivities["residual ReLU, $W_1$ random"].kink == 0
scale = np.abs(forward).max()
for i in (0, 1, 2, -1):
    step = dict(zip(("weight", "bias"), directions[i], strict=True))
    ours = cg.directional_derivative(problem, "identity layer, ReLU", step)
    assert np.isclose(ours, one_sided[i], rtol=1e-10)
assert np.abs(one_sided - forward).max() < 1e-4 * scale
assert np.abs(forward + backward - by_autograd).max() < 1e-4 * scale  # the identity
assert np.abs(forward - backward).max() > 0.05 * scale
assert off > 0.05
assert by_autograd[-1] / 100 < forward[-1] < 0  # along lambda almost nothing is left

smooth = blocks["residual ReLU, $W_1$ random"]
with torch.no_grad():
    hidden = torch.relu(smooth.inner(x))
for V, _ in directions[:-1]:
    h = 1e-4
    central = (tail(x + h * hidden @ V.T) - tail(x - h * hidden @ V.T)).item() / (2 * h)
    expected = -(lam["residual ReLU, $W_1$ random"]["outer.weight"] * V).sum().item()
    assert abs(central - expected) < 1e-8

# %%
i = int(np.argmax(np.abs(forward - backward)))
V, a = directions[i]
ts = np.linspace(-0.004, 0.004, 101)
losses = [tail(torch.relu(x + t * (x @ V.T + a))).item() for t in ts]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
left.plot(ts, np.array(losses) - losses[50], "-", color=BLUE, label="loss")
left.plot(ts, by_autograd[i] * ts, "--", color=RED, label="slope of autograd")
left.plot(ts[50:], one_sided[i] * ts[50:], ":", color="black", label="one-sided slope")
left.set_xlabel(r"step $t$ along $d$ (Frobenius units of the pins)")
left.set_ylabel(r"$L(t\,d) - L(0)$ (mean squared error)")
left.legend()
right.plot(by_autograd, forward, "o", color=BLUE, label="to the right")
right.plot(by_autograd, (forward + backward) / 2, "x", color=RED, label="mean of both sides")
ends = np.array([by_autograd.min(), by_autograd.max()])
right.plot(ends, ends, "-", color=GREY, label=r"$-\langle\lambda, d\rangle$")
right.plot(ends, ends / 2, ":", color="black", label="half of it")
right.set_xlabel(r"slope of autograd, $-\langle\lambda, d\rangle$")
right.set_ylabel("slope measured")
right.legend()
fig.tight_layout()

# %% [markdown]
# **Figure 2.** Left: the loss along one direction of the identity layer has a kink at the pin. Right: in 30
# random directions and along $\lambda$, the slope to the right has little to do with autograd, and the
# mean of both sides is half of it. Along $\lambda$ itself the loss falls at a hundredth of the rate that
# $\lambda$ says, or less: before you believe the price of a layer at a kink, ask for the one-sided slope.
# Units: mean squared error per unit of the pins.
#
# ## Claim 4. The second derivative of the value function is a Schur complement
#
# The value function $p(\varepsilon) = \min_\theta L(\theta, \varepsilon)$ has $\nabla p(0) = -\lambda$
# (notebook 1). Differentiating $\nabla_\theta L(\theta^*(\varepsilon), \varepsilon) = 0$ gives
# $\partial\theta^*/\partial\varepsilon = -H_{\theta\theta}^{-1}H_{\theta v}$, and with it
#
# $$\nabla^2 p(0) = H_{vv} - H_{v\theta}\,H_{\theta\theta}^{-1}\,H_{\theta v} .$$
#
# $H_{vv}$ is the curvature with the old parameters fixed; the correction accounts for their response (Boyd
# and Vandenberghe 2004, appendix A.5.5, has the linear algebra). We let the last layer be $\theta$, so that
# the inner minimum is a linear least-squares problem, solved exactly.
#
# The Schur complement sees redundancy to second order: for the linear layer $x\mapsto (I + V)x$ the old $U$
# responds with $U(I + V)^{-1}$, the value function is *constant*, and $\nabla^2p(0) = 0$ although
# $H_{vv} \ne 0$.


# %%
def with_layer(kind):
    """The tensor after a layer whose pin is at v, a flat vector of 36."""
    if kind == "linear":
        return lambda v: x + x @ v.view(6, 6).T
    return lambda v: x + hidden @ v.view(6, 6).T  # the residual block with random inner factor


def value_function(layer, v):
    """Minimum over the last layer of the loss, by the normal equations."""
    A = torch.cat([layer(v), torch.ones(200, 1)], dim=1)
    theta = torch.linalg.solve(A.T @ A, A.T @ targets)
    return (A @ theta - targets).square().mean()


def schur(layer):
    def L(theta, v):
        A = torch.cat([layer(v), torch.ones(200, 1)], dim=1)
        return (A @ theta[:, None] - targets).square().mean()

    theta, v = best.squeeze(1), torch.zeros(36)
    (H_tt, H_tv), (H_vt, H_vv) = jacrev(jacrev(L, argnums=(0, 1)), argnums=(0, 1))(theta, v)
    return H_vv, H_vv - H_vt @ torch.linalg.solve(H_tt, H_tv)


steepest = measure().multipliers["residual ReLU, $W_1$ random"]["outer.weight"].flatten()
along = {"linear": torch.randn(36), "residual": steepest}
along = {kind: d / d.norm() for kind, d in along.items()}
results = {}
for kind, d in along.items():
    layer = with_layer(kind)
    H_vv, complement = schur(layer)
    h = 1e-3
    p = [value_function(layer, t * d).item() for t in (-h, 0.0, h)]
    measured = (p[0] - 2 * p[1] + p[2]) / h**2
    results[kind] = measured, (d @ complement @ d).item(), (d @ H_vv @ d).item()
    print(
        f"{kind:9} p'' measured {measured:+.6f}, Schur {results[kind][1]:+.6f}, H_vv {results[kind][2]:+.6f}"
    )
assert abs(results["linear"][1]) < 1e-9
assert abs(results["linear"][0]) < 1e-6
assert results["linear"][2] > 1e-3
assert abs(results["residual"][0] - results["residual"][1]) < 1e-4 * abs(results["residual"][2])

# %%
ts = np.linspace(-0.6, 0.6, 61)
fig, axes = plt.subplots(1, 2, figsize=(7.8, 3.2))
for ax, (kind, d) in zip(axes, along.items(), strict=True):
    layer = with_layer(kind)
    p = np.array([value_function(layer, t * d).item() for t in ts])
    slope = (value_function(layer, 1e-5 * d) - value_function(layer, -1e-5 * d)).item() / 2e-5
    model_of = [p[30] + slope * ts + 0.5 * curvature * ts**2 for curvature in results[kind][1:]]
    ax.plot(ts, p, "-", color=BLUE, label=r"$p(t\,d)$")
    ax.plot(ts, model_of[0], ":", color="black", label="with the Schur complement")
    ax.plot(ts, model_of[1], "--", color=RED, label=r"with $H_{vv}$")
    ax.set_title(f"{kind} layer")
    ax.set_ylim(p[30] - 0.06, p[30] + 0.09)
    ax.set_xlabel(r"position $t$ of the pin along $d$")
axes[0].set_ylabel("best loss (mean squared error)")
axes[0].legend()
fig.tight_layout()

# %% [markdown]
# **Figure 3.** The value function (solid) and its two second-order models, along a random direction for the
# linear layer and along $\lambda$ for the residual one. For the linear layer it is flat: price and curvature
# are both zero, and only $H_{vv}$ on its own would suggest otherwise.
#
# Whether a $\lambda$ that is *not* zero differs from zero by more than chance is another question. Rao's score
# test, which Silvey called the Lagrange multiplier test, has the Schur complement of the Fisher
# information in the place of $H$: notebook 7.
#
# ## Exercises
#
# 1. Insert $z \mapsto z + Wz$ with $W = 0$ between *two linear layers*, $z = W_0a + c_0$ and $y = Uz + c$.
#    For how many of these two layers does stationarity of that layer alone make $\lambda_W = 0$?
# 2. With both factors of Claim 1 pinned at zero, by how much does the loss fall, to second order, if $v$ moves
#    by $0.1$ in the best direction? Answer in terms of `s`, the singular values.
# 3. In Claim 3, for which sign of $\delta_i$ does waking an inactive unit ($u_i > 0$) lower the loss?

# %%
with torch.no_grad():  # the untrained last layer of Claim 1 again
    model[2].weight.copy_(start[:-1].T)
    model[2].bias.copy_(start[-1])
x, delta = at_site()
s = torch.linalg.svdvals(delta.T @ x)


# %%
def check_1(how_many):
    net = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1))  # previous W0, c0 and next U, c
    z = net[0](inputs)
    loss = nn.functional.mse_loss(net[1](z), targets)
    g_z, g_W0, g_c0, g_U = torch.autograd.grad(loss, (z, net[0].weight, net[0].bias, net[1].weight))
    lam_W = -(g_z.T @ z)
    by_next = -(net[1].weight.T @ g_U)
    by_previous = -(g_W0 @ net[0].weight.T + torch.outer(g_c0, net[0].bias))
    assert how_many == sum(torch.allclose(lam_W, other) for other in (by_next, by_previous))
    print("1: right")


def check_2(decrease):
    vectors = torch.linalg.eigh(jacrev(grad(two_factors))(v0).detach()).eigenvectors
    step = 0.01 * vectors[:, 0]
    realised = (two_factors(v0) - two_factors(step)).item() * 100  # second order: (0.1 / 0.01)^2
    assert abs(decrease - realised) < 1e-2 * realised
    print("2: right")


def check_3(sign):
    i = int((x == 0).any(0).nonzero()[0])  # a unit with inactive samples
    rows = ((x[:, i] == 0) & (delta[:, i].abs() > 1e-8)).nonzero().flatten().tolist()
    assert len(rows) > 10
    for row in rows:
        woken = x.clone()
        woken[row, i] = 1e-6
        lowers = bool(tail(woken) < tail(x))
        assert lowers == (torch.sign(delta[row, i]).item() == sign)
    print("3: right")


# %%
check_1(how_many=2)
check_2(decrease=0.5 * 0.1**2 * s[0].item())
check_3(sign=-1)

# %% [markdown]
# ## References
#
# * C. G. Krishnanunni, T. Bui-Thanh and C. Dawson, *Topological derivative approach for deep neural network
#   architecture adaptation*, arXiv 2502.06885, 2025: the optimality condition leads to an eigenvalue problem.
# * S. Boyd and L. Vandenberghe, *Convex Optimization*, Cambridge University Press, 2004: appendix A.5.5
#   (Schur complements and partial minimisation), section 5.6 (sensitivity).
# * J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd ed., Springer, 2006: chapter 12.
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural Networks*,
#   arXiv 2311.15995, 2023: the layers of Claim 2.
