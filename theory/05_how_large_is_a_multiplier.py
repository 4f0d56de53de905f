# %% [markdown]
# # 5. How large is a multiplier?
#
# Multipliers are tensors. To compare two candidates one needs a number, and there are many norms.
#
# At the end you will be able to say
#
# * why what a first step gains is the *dual* norm of the ball in which the new layer moves, and which
#   ball belongs to which optimizer;
# * which norm does not depend on the units of features and outputs, exactly and with damping, and which one the library recommends;
# * what the empirical Fisher matrix measures that the true one does not, and the other way round;
# * which sizes decide well, as far as that has been measured, and why no single one need do so everywhere;
# * how SensLI, GradMax, TINY, SENN and the topological derivative differ, and where each lies in one plane.

# %%
import copy
import json
from pathlib import Path

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from torch import nn

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9AA5B1"

# %% [markdown]
# ## Claim 1. The best first-order decrease in a ball is the dual norm
#
# To first order $L(v) = L(0) - \langle\lambda, v\rangle$. Inside the ball $\lVert v\rVert\le\Delta$ the best is
#
# $$\max\,\{\langle\lambda, v\rangle : \lVert v\rVert\le\Delta\} = \Delta\,\lVert\lambda\rVert_* ,$$
#
# which is the definition of the dual norm (Boyd and Vandenberghe 2004, appendix A.1.6). The maximiser is
# the step that steepest descent in this norm takes. Four pairs, with singular values $s_i$ and
# $\lambda = P\,\mathrm{diag}(s)\,Q^{\mathsf T}$:
#
# | ball | best $v$, up to the radius | dual norm | in the library |
# |---|---|---|---|
# | Frobenius, $\sqrt{\sum v_{ij}^2}\le\Delta$ | $\lambda/\lVert\lambda\rVert_F$ | $\lVert\lambda\rVert_F$ | `Frobenius` |
# | maximum, $\max\lvert v_{ij}\rvert\le\Delta$ | $\mathrm{sign}(\lambda)$ | $\sum\lvert\lambda_{ij}\rvert$ | `Entrywise1` |
# | spectral, $s_{\max}(v)\le\Delta$ | $PQ^{\mathsf T}$ | $\sum s_i$ | `Nuclear` |
# | nuclear, $\sum s_i(v)\le\Delta$ | $p_1q_1^{\mathsf T}$ | $s_{\max}$ | `Spectral` |
#
# We let CVXPY maximise over each ball, without telling it the answer.

# %%
lam = torch.randn(4, 3)
balls = {
    cg.norms.Frobenius(): lambda v: cp.norm(v, "fro"),
    cg.norms.Entrywise1(): lambda v: cp.max(cp.abs(v)),
    cg.norms.Nuclear(): lambda v: cp.norm(v, 2),
    cg.norms.Spectral(): lambda v: cp.normNuc(v),
}
P, s, Qt = torch.linalg.svd(lam, full_matrices=False)
best = (lam / lam.norm(), lam.sign(), P @ Qt, torch.outer(P[:, 0], Qt[0]))
for (norm, ball), step in zip(balls.items(), best, strict=True):
    v = cp.Variable((4, 3))
    value = cp.Problem(cp.Maximize(cp.sum(cp.multiply(lam.numpy(), v))), [ball(v) <= 1]).solve(
        solver=cp.CLARABEL
    )
    size = norm({"weight": lam}).item()
    print(f"{norm!r:13} {size:.6f}   CVXPY {value:.6f}")
    assert np.isclose(size, value, rtol=1e-5)
    assert ball(step.numpy()).value < 1 + 1e-9
    assert np.isclose((lam * step).sum().item(), size)

# %%
lam2 = np.array([1.0, 0.45])
F = np.array([[2.5, -1.2], [-1.2, 1.6]])  # a Fisher matrix, for the last ball
angle = np.linspace(0, 2 * np.pi, 400)
circle = np.stack([np.cos(angle), np.sin(angle)])
root = np.linalg.cholesky(F)
shapes = {
    "Frobenius:\nSGD": circle,
    "maximum:\nAdam, sign descent": circle / np.abs(circle).max(0),
    "sum of |v|:\none entry at a time": circle / np.abs(circle).sum(0),
    "$\\langle v, Fv\\rangle$:\nnatural gradient": np.linalg.solve(root.T, circle),
}
fig, axes = plt.subplots(1, 4, figsize=(8, 3), sharex=True, sharey=True)
reach = {}
for ax, (name, edge) in zip(axes, shapes.items(), strict=True):
    values = lam2 @ edge
    reach[name] = values.max()
    step = edge[:, values.argmax()]
    ax.fill(*edge, color=BLUE, alpha=0.15)
    ax.plot(*edge, "-", color=BLUE, linewidth=1, label="the ball")
    ax.annotate("", lam2, (0, 0), arrowprops={"arrowstyle": "->", "color": "black"})
    ax.plot(*step, "o", color=RED, label="its best step")
    across = np.array([-lam2[1], lam2[0]])
    ends = step[:, None] + across[:, None] * np.array([-1.2, 1.2])
    ax.plot(*ends, "--", color=RED, linewidth=1, label="the last level line")
    ax.set_title(f"{name}\n" rf"$\Vert\lambda\Vert_* = {values.max():.2f}$")
    ax.set_xlabel("$v_1$")
    ax.set_aspect("equal")
    ax.set_xlim(-1.5, 1.5)
    ax.set_ylim(-1.5, 1.5)
axes[0].set_ylabel("$v_2$")
fig.legend(*axes[0].get_legend_handles_labels(), ncol=3, loc="lower center")
fig.tight_layout(rect=(0, 0.07, 1, 1))

frobenius, maximum, total, fisher = reach.values()
assert np.isclose(frobenius, np.linalg.norm(lam2), rtol=1e-4)
assert np.isclose(maximum, np.abs(lam2).sum(), rtol=1e-2)
assert np.isclose(total, np.abs(lam2).max(), rtol=1e-2)
assert np.isclose(fisher, np.sqrt(lam2 @ np.linalg.solve(F, lam2)), rtol=1e-3)

# %% [markdown]
# **Figure 1.** Two pinned parameters, one multiplier $\lambda = (1, 0.45)$ (arrow), four unit balls. The red point is
# the best step in each, on the last level line of $\langle\lambda, v\rangle$ that touches the ball. Units: those of $v$.
#
# ## Claim 2. The ball is that of the optimizer
#
# One step of size $\eta$ changes the new parameters
#
# * by $\eta\lambda$ with SGD: the loss falls by $\eta\lVert\lambda\rVert_F^2$ to first order;
# * by $\eta\,\mathrm{sign}(\lambda)$ with sign descent, and in Adam's first step (Kingma and Ba 2015: both moments
#   are those of one gradient, and their ratio is its sign): by $\eta\sum|\lambda_{ij}|$;
# * by $\eta\,PQ^{\mathsf T}$ with Muon, up to its approximation of the factor (Jordan et al. 2024): by $\eta\sum s_i$.
#
# Bernstein and Newhouse (2024) read these optimizers as steepest descent in exactly these norms. We insert a layer at each of two
# sites, one narrow and one wide, take one small step of the new parameters alone, and compare the gain with what the norm
# predicted. `cg.norms.norm_for(optimizer)` picks the norm: that of a first step, not of where a layer helps in the end.

# %%
x = torch.rand(300, 2) * 4 - 2
y = torch.sin(2 * x[:, :1]) * torch.cos(x[:, 1:])
model = nn.Sequential(
    nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1)
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()

narrow = cg.Candidate("1", cg.blocks.ResidualMLP(4, 4, torch.tanh), name="narrow")
wide = cg.Candidate("3", cg.blocks.ResidualMLP(24, 24, torch.tanh), name="wide")
problem = cg.GrowthProblem(model, nn.MSELoss(), [(x, y)], [narrow, wide])


class Orthogonal(torch.optim.Optimizer):
    """The step of Muon with the exact orthogonal factor, without momentum."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                P, _, Qt = torch.linalg.svd(p.grad, full_matrices=False)
                p.data -= group["lr"] * P @ Qt


def gain(candidate, make, lr):
    """What one step of the new parameters alone takes off the loss, over lr; their gradient."""
    grown = nn.Sequential(*model)
    block = cg.blocks.ResidualMLP(*candidate.block.inner.weight.shape, torch.tanh)
    block.load_state_dict(candidate.block.state_dict())
    grown.insert(int(candidate.after) + 1, block)
    before = nn.functional.mse_loss(grown(x), y)
    optimizer = make([block.outer.weight], lr=lr)
    (block.outer.weight.grad,) = torch.autograd.grad(before, block.outer.weight)
    optimizer.step()
    after = nn.functional.mse_loss(grown(x), y)
    return (before - after).item() / lr, block.outer.weight.grad


optimizers = {
    "SGD": (torch.optim.SGD, cg.norms.Frobenius()),
    "Adam": (torch.optim.Adam, cg.norms.Entrywise1()),
    "orthogonal": (Orthogonal, cg.norms.Nuclear()),
}
assert cg.norms.norm_for(torch.optim.SGD([torch.zeros(1)])) == cg.norms.Frobenius()
assert cg.norms.norm_for(torch.optim.Adam([torch.zeros(1)])) == cg.norms.Entrywise1()
gains = {}
for name, (make, norm) in optimizers.items():
    solution = cg.solve(problem, norm=norm)
    for candidate in (narrow, wide):
        size = solution.sensitivities[candidate.name].value
        predicted = size**2 if name == "SGD" else size
        realised, gradient = gain(candidate, make, 1e-6)
        assert torch.allclose(solution.multipliers[candidate.name]["outer.weight"], -gradient)
        gains[name, candidate.name] = predicted, realised
        print(
            f"{name:10} {candidate.name:7} predicted {predicted:.5f}  realised {gains[name, candidate.name][1]:.5f}"
        )
        assert np.isclose(*gains[name, candidate.name], rtol=1e-2)

preference = {name: gains[name, "wide"][0] / gains[name, "narrow"][0] for name in optimizers}
print("wide over narrow:", {name: round(value, 2) for name, value in preference.items()})

# %% [markdown]
# The ratios between the two sites differ from optimizer to optimizer: how much better one site is than another is
# not a property of the network alone. The wide layer has 576 pinned parameters, the narrow one 16. Where width as
# such should not count, `PerParameter` divides by the root of their number.
#
# ## Claim 3. The Fisher norm does not depend on units
#
# Change the coordinates of the features at a site by an invertible $S$, and let the next layer undo it: the network computes the
# same. But $\varphi' = S\varphi$ and $\psi' = S^{-\mathsf T}\psi$, so $\lambda' = S^{-\mathsf T}\lambda S^{\mathsf T}$, and the
# Frobenius norm changes. With the second moments $A = \mathbb E[\varphi\varphi^{\mathsf T}]$,
# $G = \mathbb E[\psi\psi^{\mathsf T}]$ that K-FAC uses for the Fisher matrix, $F \approx A\otimes G$ (Martens and Grosse 2015),
# the norm
#
# $$\lVert\lambda\rVert^2_{F^{-1}} = \operatorname{tr}\,(G^{-1}\lambda A^{-1}\lambda^{\mathsf T})$$
#
# does not change, since $A' = SAS^{\mathsf T}$ and $G' = S^{-\mathsf T}GS^{-1}$. That is the invariance of the natural
# gradient (Amari 1998): a step is measured by what it does to the output, not to the parameters.

# %%
norms = {
    "Frobenius": cg.norms.Frobenius(),
    "Kronecker-Fisher, no damping": cg.norms.KroneckerFisher(damping=0.0),
    "recommended: nuclear, damping 0.3": cg.norms.recommended(),
}
assert cg.norms.recommended() == cg.norms.KroneckerFisher(0.3, ord="nuc")


def changed(S, norm):
    """The sensitivity after module 1 in coordinates S there, the next layer undoing S."""
    change, undo = nn.Linear(4, 4, bias=False), nn.Linear(4, 24)
    with torch.no_grad():
        change.weight.copy_(S)
        undo.weight.copy_(model[2].weight @ torch.linalg.inv(S))
        undo.bias.copy_(model[2].bias)
    same = nn.Sequential(model[0], model[1], change, undo, *model[3:])
    assert torch.allclose(same(x), model(x))
    layer = cg.Candidate("2", cg.blocks.ResidualLinear(4, torch.tanh))
    elsewhere = cg.GrowthProblem(same, nn.MSELoss(), [(x, y)], [layer])
    return cg.solve(elsewhere, norm=norm, stationarity=False).sensitivities["2"].value


ratios = {name: [] for name in norms}
strengths = np.linspace(0, 3, 13)
direction = torch.randn(4, 4)
for strength in strengths:
    S = torch.linalg.matrix_exp(strength * direction / direction.norm())
    for name, norm in norms.items():
        ratios[name].append(changed(S, norm))
ratios = {name: np.array(values) / values[0] for name, values in ratios.items()}
frobenius, exact, damped = (np.abs(values - 1).max() for values in ratios.values())
print(f"changes at most by {frobenius:.0%}, {exact:.0e} and {damped:.1%}")
assert exact < 1e-6
assert frobenius > 0.5
assert 1e-3 < damped < frobenius / 2  # much less, and not nothing

# %%
fig, ax = plt.subplots(figsize=(6.2, 3.4))
for (name, values), style in zip(ratios.items(), ("o-", "s--", "^-."), strict=True):
    ax.plot(strengths, values, style, label=name)
ax.set_xlabel(r"size of the change of coordinates, $\Vert\log S\Vert_F$")
ax.set_ylabel("sensitivity, relative to $S = I$")
ax.set_ylim(0, None)
ax.legend()

# %% [markdown]
# **Figure 2.** Thirteen networks that compute the same function, and the sensitivity of the same candidate in
# each. No unit.
#
# In these coordinates, too, there is more than one norm. The singular values of $G^{-1/2}\lambda A^{-1/2}$ are the **canonical
# correlations** $\rho_i$ of the features $\varphi$ and the derivatives $\psi$ (Hotelling 1936): cosines between the two spaces of
# functions on the data. `KroneckerFisher(damping=0)` is their length $\sqrt{\sum\rho_i^2}$.
# `KroneckerFisher(damping=0, ord="nuc")` is their sum, the dual of the ball in which no direction moves further than $1$.
# (Damping, $0.1$ by default, makes both slightly smaller.) The sum counts in *how many* directions a layer could help, whereas
# one strong direction suffices for a large length. Which of the two decides better is a question for measurement: notebook 7.
#
# The sum, with a damping of $0.3$, is the norm that `cg.solve(problem)` takes when it is given none (`cg.norms.recommended()`).
# Damping replaces $A$ by $A + d\,(\operatorname{tr}A/\dim A)\,I$, and $G$ likewise. **What is left of the invariance?** The identity
# keeps its form under rotations, and $\operatorname{tr}A/\dim A$ follows a common factor. So
#
# * a loss in other units (cents), all features in another unit, and rotations of features and outputs change nothing;
# * other units for each feature, and shears, do change it, less than the Frobenius norm (Figure 2), because directions that carry
#   little are damped most, and which carry little depends on the units;
# * blocks whose features *and* outputs are the units of the site (identity layers, `ResidualLinear`) are first scaled to
#   $\mathbb E\varphi_j^2 = \mathbb E\psi_j^2$. For them other units for each unit change nothing; rotations, then, do.

# %%
recommended = cg.norms.recommended()
h = model[:2](x).detach().requires_grad_()
(delta,) = torch.autograd.grad(nn.functional.mse_loss(model[2:](h), y), h)
h, delta = h.detach(), delta * len(x)


def size(norm, S):
    """Of the multiplier of a pinned map of features h' = S h on outputs in the same coordinates."""
    phi, psi = h @ S.T, delta @ torch.linalg.inv(S)
    multiplier = {"weight": -(psi.T @ phi) / len(x)}
    if isinstance(norm, cg.norms.Frobenius):
        return float(norm(multiplier))
    return float(norm(multiplier, {"weight": cg.norms.SecondMoments.of(phi, psi)}))


rotation = torch.linalg.qr(torch.randn(4, 4)).Q
units, shear = torch.diag(torch.tensor([0.1, 1.0, 3.0, 10.0])), torch.eye(4)
shear[0, 1] = 3.0
print("change of           " + "".join(f"{name:>36}" for name in norms))
for what, S in {
    "the unit of all": 7 * torch.eye(4),
    "rotation": rotation,
    "the unit of each": units,
    "shear": shear,
}.items():
    change = [size(norm, S) / size(norm, torch.eye(4)) - 1 for norm in norms.values()]
    print(f"{what:20}" + "".join(f"{value:36.2%}" for value in change))
    assert abs(change[1]) < 1e-6
    assert (abs(change[2]) < 1e-9) == (what in ("the unit of all", "rotation"))

# the same in networks, for a block whose outputs are in the units of its features
base = changed(torch.eye(4), recommended)
assert np.isclose(changed(7 * torch.eye(4), recommended), base, rtol=1e-6)
assert np.isclose(changed(units, recommended), base, rtol=1e-6)
assert not np.isclose(changed(rotation, recommended), base, rtol=1e-3)

relu = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
rescaled = copy.deepcopy(relu)
scale = torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])
with torch.no_grad():
    rescaled[0].weight.mul_(scale[:, None]), rescaled[0].bias.mul_(scale)
    rescaled[2].weight.div_(scale)
assert torch.allclose(relu(x), rescaled(x))
found = []
for net in (relu, rescaled):
    identity = cg.Candidate("1", cg.blocks.IdentityLinear(5, nn.ReLU()))
    for norm in (recommended, cg.norms.Frobenius()):
        asked = cg.GrowthProblem(net, nn.MSELoss(), [(x, y)], [identity])
        found.append(cg.solve(asked, norm=norm).sensitivities["1"].value)
assert np.isclose(found[0], found[2], rtol=1e-6)  # the recommended norm
assert not np.isclose(found[1], found[3], rtol=0.1)  # the Frobenius norm

# %% [markdown]
# And the canonical correlations, found without second moments:

# %%
layer = cg.Candidate("1", cg.blocks.ResidualLinear(4, torch.tanh))
here = cg.GrowthProblem(model, nn.MSELoss(), [(x, y)], [layer])
h = model[:2](x).detach().requires_grad_()
(delta,) = torch.autograd.grad(nn.functional.mse_loss(model[2:](h), y), h)
features = torch.cat([h.detach(), torch.ones(len(x), 1)], dim=1)  # the last one for the bias
spaces = torch.linalg.qr(features).Q, torch.linalg.qr(delta).Q  # no second moments here
rho = torch.linalg.svdvals(spaces[0].T @ spaces[1])
for order, expected in (("fro", rho.norm()), ("nuc", rho.sum())):
    norm = cg.norms.KroneckerFisher(damping=0.0, ord=order)
    found = cg.solve(here, norm=norm).sensitivities["1"].value
    print(f"{order}: {found:.6f}, by the correlations {rho.numpy().round(3)}: {expected:.6f}")
    assert np.isclose(found, expected.item(), rtol=1e-6)

sizes = []
for unit in (1, 100):
    cents = cg.GrowthProblem(model, lambda a, b, u=unit: u * nn.MSELoss()(a, b), [(x, y)], [layer])
    sizes.append(cg.solve(cents).sensitivities["1"].value)  # in the recommended norm
assert cg.norms.recommended().ord == "nuc"
assert np.isclose(sizes[0], sizes[1], rtol=1e-6)
assert sizes[0] <= rho.sum().item()

one_strong, all_alike = torch.diag(torch.tensor([0.8, 0, 0, 0])), 0.4 * torch.eye(4)
plain = {"weight": cg.norms.SecondMoments(torch.eye(4), torch.eye(4))}
for order in ("fro", "nuc"):
    norm = cg.norms.KroneckerFisher(damping=0.0, ord=order)
    sizes = [float(norm({"weight": lam}, plain)) for lam in (one_strong, all_alike)]
    print(f"{order}: one direction of 0.8 counts {sizes[0]:.2f}, four of 0.4 count {sizes[1]:.2f}")
    assert np.allclose(sizes, (0.8, 0.8) if order == "fro" else (0.8, 1.6))

# %% [markdown]
# ## Claim 4. The empirical Fisher matrix measures correlation, the true one a price
#
# $G = \mathbb E[\psi\psi^{\mathsf T}]$ with the targets of the data is the *empirical* Fisher matrix. The *true* one takes the expectation over
# targets that the network itself predicts. For half the squared error, $\psi = J^{\mathsf T}r$ with the residual $r$ and the
# Jacobian $J$ of the outputs; under the network's own unit-variance noise $\mathbb E\,rr^{\mathsf T} = I$, so
# $G_{\text{true}} = \mathbb E[J^{\mathsf T}J]$, which does not know the residuals. Shrink all of them by $c$:
#
# * $\lambda$ shrinks by $c$, and so do $\lVert\lambda\rVert_F$ and the norm with $G_{\text{true}}$: there is less to gain;
# * $G$ shrinks by $c^2$, and the norm with $G$ stays where it is, for any damping: it is made of correlations.
#
# So the recommended norm says *where*. It cannot say that nothing is left to gain (Kunstner, Hennig and Balles 2019 on why the
# empirical matrix is no approximation of the true one): for *whether* ask held-out data, `cg.solve(problem, validation=data)` (notebook 7).


# %%
def half_square(outputs, targets):
    return (outputs - targets).square().sum(1).mean() / 2


def three_sizes(shrunk):
    """Frobenius; Kronecker-Fisher with the empirical matrix, damped; the same with the true one."""
    targets = model(x).detach() + (y - model(x).detach()) / shrunk
    layer = cg.Candidate("1", cg.blocks.ResidualMLP(4, 4, torch.tanh))
    layer.block.load_state_dict(narrow.block.state_dict())
    asked = cg.GrowthProblem(model, half_square, [(x, targets)], [layer])
    solutions = [cg.solve(asked, norm=n) for n in (cg.norms.Frobenius(), recommended)]
    multiplier = {"outer.weight": solutions[0].multipliers["1"]["outer.weight"]}
    h = model[:2](x).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(model[2:]))(h)[:, 0].detach()  # one output
    features = torch.tanh(layer.block.inner(h)).detach()
    true = cg.norms.SecondMoments(features.T @ features / len(x), jacobian.T @ jacobian / len(x))
    values = [one.sensitivities["1"].value for one in solutions]
    return np.array([*values, float(recommended(multiplier, {"outer.weight": true}))])


large, small = three_sizes(1), three_sizes(1000)
print(
    "Frobenius, empirical, true:", large.round(4), "with residuals of a thousandth:", small.round(7)
)
assert np.allclose(large / small, (1000, 1, 1000), rtol=1e-6)

# %% [markdown]
# ## Claim 5. Two sizes, two questions; which decides well was measured, and is not settled
#
# Three numbers make up a size. $c = \lVert\lambda A^{-1/2}\rVert_F$ is the slope of the loss per unit of root-mean-square motion of
# the block's output: dual to $\sqrt{\mathbb E\lVert V\varphi\rVert^2}$. By regression of $-\delta$ on $\varphi$,
# $c^2 = R^2\,\mathbb E\lVert\delta\rVert^2$ with the multiple correlation $R^2$: **how much of what the loss asks for here the layer
# can supply**. And $\operatorname{rms}(\delta)\operatorname{rms}(x)$ is an elasticity: **how much hangs on this site at all**. Their product
#
# $$R^2\cdot\operatorname{rms}(\delta)\operatorname{rms}(x) = c^2\,\frac{\operatorname{rms}(x)}{\operatorname{rms}(\delta)}$$
#
# keeps its value when all features of the site change their unit, and is a price: it falls with the residuals. It looks like the natural
# thing to decide by, and in early studies of networks whose old weights were frozen it did well.
#
# **It was not confirmed.** In networks whose weights were all trained on, the product was no better than chance in a trial
# with wide intervals, where the correlations were. And where old weights were frozen, a size that combines correlations and elasticity,
# the best of many on the networks on which it was found, was much worse than the correlations alone on new ones
# ([Decisions](results/decisions.md#where-the-old-weights-are-frozen)). What was found there:
#
# * In both families of networks the Kronecker-Fisher norms decide better than chance and better than the Frobenius norm, whose choice is no
#   better than a random site. `ord="nuc"` with damping $0.3$ is the recommended one for this reason only. Its damping was chosen
#   on the family with frozen weights, whose figures it flatters.
# * Why correlations, near a minimum? There the old weights have taken what they can of the large common part; the size of what is left differs
#   between sites for reasons of scale, and says little about what a new layer could do with it. That is an explanation after the fact.
# * The product and the correlations have each been the best on some family and not on another. A family is one sample.

# %%
deltas = {}
for site, k in (("1", 2), ("3", 4)):
    h = model[:k](x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(half_square(model[k:](h), y), h)
    h, delta = h.detach(), delta * len(x)  # of the loss of a sample
    block = {"1": narrow, "3": wide}[site].block
    features = torch.tanh(block.inner(h)).detach()
    for unit in (1.0, 100.0):  # of the residuals
        for rescale in (1.0, 10.0):  # of the features of the site
            d, z = delta / unit / rescale, h * rescale
            lam_ = -(d.T @ features) / len(x)
            A = features.T @ features / len(x)
            c2 = (
                torch.linalg.solve_triangular(torch.linalg.cholesky(A), lam_.T, upper=False)
                .square()
                .sum()
            )
            fit = features @ torch.linalg.lstsq(features, d).solution
            R2 = fit.square().sum() / d.square().sum()
            rms = [t.square().sum(1).mean().sqrt() for t in (d, z)]
            assert torch.isclose(c2, R2 * rms[0] ** 2)  # the regression
            deltas[site, unit, rescale] = (R2 * rms[0] * rms[1]).item(), R2.item()
    product = {key[1:]: value[0] for key, value in deltas.items() if key[0] == site}
    print(f"after {site}: R2 {R2:.4f}, product {product[1.0, 1.0]:.5f}")
    assert np.isclose(product[1.0, 10.0], product[1.0, 1.0])  # units of the site
    assert np.isclose(product[100.0, 1.0], product[1.0, 1.0] / 100)  # a price
    assert np.isclose(deltas[site, 100.0, 1.0][1], deltas[site, 1.0, 1.0][1])  # a correlation

bench = json.loads(Path("decisions.json").read_text(encoding="utf-8"))["means"]["place matters"]
for name in ("Frobenius", "Kronecker-Fisher nuclear 0.3"):
    low, high = bench[name]["interval"]
    print(
        f"regret, all weights trained on: {name:28} {bench[name]['regret']:.2f} [{low:.2f}, {high:.2f}]"
    )
assert bench["Kronecker-Fisher nuclear 0.3"]["interval"][1] < 1 < bench["Frobenius"]["interval"][0]

# %% [markdown]
# ## Claim 6. Five published criteria are points in one plane
#
# Ask two questions of a criterion. *In what is a step measured?* In parameters (Frobenius), in what the step adds to the
# features (whitened by $A$), or in what it does to the output ($A\otimes G$). *What happens to the free factor of
# $x + W_2\,\sigma(W_1x)$?* It is given, it is chosen to make the multiplier large, or both factors are zero and the
# second derivative decides. With $M = \sum\delta x^{\mathsf T}$ and $\sigma'(0) = 1$, for one hidden unit where one is asked for:
#
# * **SensLI** (Herberg et al. 2023): $\lVert\lambda_{W_2}\rVert_F^2$ at a given $W_1 = 0.8\,I$.
# * **GradMax** (Evci et al. 2022): inner weight pinned at zero, $\lambda_{W_1} = -W_2^{\mathsf T}M$; the unit vector $W_2$ that
#   makes it longest is the first left singular vector of $M$, and $\lVert\lambda_{W_1}\rVert^2 = s_{\max}(M)^2$.
# * **TINY** (Verbockhaven et al. 2024): the features are whitened, and what the existing parameters can do is projected out
#   first. For this block: the part of $\delta$ that no linear map of $x$ explains, against the whitened part of $\sigma(W_1x)$
#   that no linear map of $x$ explains. (TINY also chooses a new $W_1$; here it is given, so that the criteria can be compared.)
# * **SENN** (Mitchell et al. 2023): $\eta = g^{\mathsf T}F^{-1}g$, which with a Kronecker-factored $F$ is the norm of Claim 3, squared.
# * **Topological derivative** (Krishnanunni, Bui-Thanh and Dawson 2025): an eigenvalue problem for the second derivative. For this block
#   its extreme eigenvalue is $s_{\max}(M)$ (notebook 4).
#
# The last and the second are the same number up to a square: $s_{\max}(M)$ is both the longest first derivative over unit $W_2$,
# and the strongest curvature at $W_1 = W_2 = 0$.
#
# These are the *ideas* of those works on one block; each of them does more (TINY and GradMax add neurons to layers, for example).

# %%
torch.manual_seed(1)
deep = nn.Sequential(
    nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)
)  # fmt: skip
optimizer = torch.optim.SGD(deep.parameters(), lr=0.1)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.mse_loss(deep(x), y).backward()
    optimizer.step()

sites = ("1", "3", "5")
given = [
    cg.Candidate(site, cg.blocks.ResidualMLP(6, 6, torch.tanh, inner_init=0.8)) for site in sites
]
growth = cg.GrowthProblem(deep, nn.MSELoss(), [(x, y)], given)
sensli = {
    k: s.value**2 for k, s in cg.solve(growth, norm=cg.norms.Frobenius()).sensitivities.items()
}
senn = {
    k: s.value**2
    for k, s in cg.solve(growth, norm=cg.norms.KroneckerFisher(damping=1e-6)).sensitivities.items()
}

gradmax, tiny, topological = {}, {}, {}
for site, candidate in zip(sites, given, strict=True):
    k = int(site) + 1
    h = deep[:k](x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(nn.functional.mse_loss(deep[k:](h), y), h)
    h = h.detach()
    M = delta.T @ h
    left = torch.linalg.svd(M)[0][:, 0]

    # GradMax by the library: the inner factor pinned, the outer one the singular vector
    unit = cg.blocks.ResidualMLP(6, 1, torch.tanh, pinned="inner", inner_init=left[:, None])
    found = cg.solve(cg.GrowthProblem(deep, nn.MSELoss(), [(x, y)], [cg.Candidate(site, unit)]))
    gradmax[site] = found.multipliers[site]["inner.weight"].square().sum().item()
    assert np.isclose(gradmax[site], torch.linalg.svdvals(M)[0] ** 2)
    for _ in range(20):  # no other unit vector does better
        w = torch.randn(6)
        assert (w @ M / w.norm()).square().sum() <= gradmax[site]

    # the second derivative at W1 = W2 = 0
    def two(v, k=k, h=h):
        return nn.functional.mse_loss(deep[k:](h + torch.tanh(h @ v[:6, None]) * v[6:]), y)

    curvature = torch.func.jacrev(torch.func.grad(two))(torch.zeros(12)).detach()
    topological[site] = -torch.linalg.eigvalsh(curvature)[0].item()
    assert np.isclose(topological[site] ** 2, gradmax[site])

    # TINY's two ideas: project out linear maps of h, whiten the rest
    with torch.no_grad():
        phi = torch.tanh(candidate.block.inner(h))
        linear = torch.cat([h, torch.ones(len(h), 1)], dim=1)
        phi = phi - linear @ torch.linalg.lstsq(linear, phi).solution
        rest = delta - linear @ torch.linalg.lstsq(linear, delta).solution
        A = phi.T @ phi / len(phi)
        tiny[site] = (rest.T @ phi @ torch.linalg.pinv(A) @ phi.T @ rest).trace().item()

criteria = {
    "SensLI": (0, 0, sensli),
    "GradMax": (0, 1, gradmax),
    "TINY": (1, 0, tiny),
    "SENN": (2, 0, senn),
    "topological\nderivative": (0, 2, topological),
}
for name, (_, _, values) in criteria.items():
    shown = "  ".join(f"{site}: {value:.3e}" for site, value in values.items())
    print(f"{name.split()[0]:12} {shown}   chooses {max(values, key=values.get)}")

# %%
fig, ax = plt.subplots(figsize=(7.4, 4.4))
for name, (column, row, values) in criteria.items():
    top = max(values.values())
    chosen = max(values, key=values.get)
    for i, (site, value) in enumerate(values.items()):
        style = (
            {"color": RED, "hatch": "///", "edgecolor": "white"}
            if site == chosen
            else {"color": GREY}
        )
        ax.bar(column + 0.18 * (i - 1), 0.6 * value / top, 0.15, bottom=row - 0.32, **style)
        ax.text(column + 0.18 * (i - 1), row - 0.37, site, ha="center", va="top")
    ax.text(column + 0.3, row, name, va="center")
ax.set_xticks(
    [0, 1, 2],
    ["parameters\n(Frobenius)", "features\n(whitened by $A$)", "outputs\n($A\\otimes G$)"],
)
ax.set_yticks([0, 1, 2], ["given", "the best one", "both factors zero,\nsecond order"])
ax.set_xlim(-0.45, 2.75)
ax.set_ylim(-0.6, 2.5)
ax.set_xlabel("in what a step is measured")
ax.set_ylabel("the free factor")
ax.tick_params(length=0)
chosen_bar = Patch(facecolor=RED, hatch="///", edgecolor="white", label="largest")
ax.legend(handles=[chosen_bar, Patch(color=GREY, label="other sites")], loc="upper right")

# %% [markdown]
# **Figure 3.** Five criteria on the same network, for insertion after modules 1, 3 and 5: bars relative to the largest of each
# criterion (hatched: its choice). The empty cells are possible criteria too.

# %%
choices = {name: max(values, key=values.get) for name, (_, _, values) in criteria.items()}
print(choices)
assert choices["GradMax"] == choices["topological\nderivative"]  # one is the square of the other
assert len(set(choices.values())) > 1  # and yet the five do not agree

# %% [markdown]
# ## Exercises
#
# 1. In which norm is the largest entry $\max|\lambda_{ij}|$ the best first-order decrease? Give the ball as a function of $v$.
# 2. Two candidates have $\lVert\lambda\rVert_F = 3$ with 100 pinned parameters and $2$ with 16. Which one wins under
#    `Frobenius`, which one under `PerParameter`?
# 3. Divide all weights of the layer before a site by 10 and multiply those of the next one by 10 (take the identity in place of
#    tanh, so that the function stays the same). What happens to $\lVert\lambda\rVert_F$ of a *linear* layer $W$ pinned at $I$
#    between the two?


# %%
def check_1(ball):
    v = cp.Variable((4, 3))
    value = cp.Problem(cp.Maximize(cp.sum(cp.multiply(lam.numpy(), v))), [ball(v) <= 1]).solve(
        solver=cp.CLARABEL
    )
    assert np.isclose(value, lam.abs().max().item(), rtol=1e-5)
    print("1: right")


def check_2(frobenius, per_parameter):
    first = {"weight": torch.full((10, 10), 3 / 10)}
    second = {"weight": torch.full((4, 4), 2 / 4)}
    for norm, answer in (
        (cg.norms.Frobenius(), frobenius),
        (cg.norms.PerParameter(), per_parameter),
    ):
        assert answer == ("first" if norm(first) > norm(second) else "second")
    print("2: right")


def check_3(factor):
    a, b = torch.randn(4, 2), torch.randn(1, 4)

    def size(scale):
        W = torch.eye(4, requires_grad=True)
        loss = nn.functional.mse_loss(x @ (a / scale).T @ W.T @ (b * scale).T, y)
        return torch.autograd.grad(loss, W)[0].norm()

    assert torch.isclose(size(10.0) / size(1.0), torch.tensor(float(factor)))
    print("3: right")


# %%
check_1(lambda v: cp.sum(cp.abs(v)))
check_2(frobenius="first", per_parameter="second")
check_3(factor=1)  # x / 10 and 10 delta: a scalar change cancels, a matrix does not

# %% [markdown]
# ## References
#
# * S. Boyd and L. Vandenberghe, *Convex Optimization*, Cambridge University Press, 2004, appendix A.1.6 (dual norms).
# * D. P. Kingma and J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015, arXiv 1412.6980.
# * K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024, kellerjordan.github.io/posts/muon.
# * J. Bernstein and L. Newhouse, *Old Optimizer, New Norm: An Anthology*, arXiv 2409.20325, 2024.
# * S. Amari, *Natural gradient works efficiently in learning*, Neural Computation 10(2), 1998, 251-276.
# * H. Hotelling, *Relations between two sets of variates*, Biometrika 28(3/4), 1936, 321-377.
# * J. Martens and R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML 2015,
#   arXiv 1503.05671.
# * F. Kunstner, P. Hennig and L. Balles, *Limitations of the empirical Fisher approximation for natural gradient descent*,
#   NeurIPS 2019, arXiv 1905.12558.
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural Networks*, arXiv 2311.15995, 2023.
# * U. Evci et al., *GradMax: Growing Neural Networks using Gradient Information*, ICLR 2022, arXiv 2201.05125.
# * M. Verbockhaven, T. Rudkiewicz, S. Chevallier and G. Charpiat, *Growing Tiny Networks: Spotting Expressivity Bottlenecks and
#   Fixing Them Optimally*, TMLR 2024, arXiv 2405.19816.
# * R. Mitchell, R. Menzenbach, K. Kersting and M. Mundt, *Self-Expanding Neural Networks*, arXiv 2307.04526, 2023.
# * C. G. Krishnanunni, T. Bui-Thanh and C. Dawson, *Topological derivative approach for deep neural network architecture
#   adaptation*, arXiv 2502.06885, 2025.
