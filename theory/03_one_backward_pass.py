# %% [markdown]
# # 3. All multipliers from one backward pass
#
# One could build a network with every candidate in it and differentiate. There is no need to: the
# multipliers of all candidates follow from what one ordinary backward pass computes anyway.
#
# At the end you will be able to say
#
# * which two tensors determine $\lambda$, and the closed form for each block;
# * what $\delta$ and $\lambda$ are in the language of optimal control;
# * why the operations are those of one gradient pass, and how many a larger network would take;
# * why a standard error costs next to nothing, and why the norm of a mean is not the mean of norms.
#
# Notation: $x_n$ is the tensor of sample $n$ at the site, and $\delta_n = \partial L/\partial x_n$, so
# $\delta_n$ contains the $1/N$ of a mean loss. Sums run over the samples.

# %%
import copy
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#9AA5B1"

# %% [markdown]
# ## Claim 1. $x$ and $\delta$ at the site are enough
#
# Let the block map $x$ to $y = f(x, v)$ with $f(x, 0) = x$. At $v = 0$ the rest of the network sees the
# same tensor as before, so $\partial L/\partial y = \delta$, and the chain rule gives
#
# $$\lambda = -\nabla_v L = -\sum_n \Big(\frac{\partial f}{\partial v}(x_n, 0)\Big)^{\mathsf T}\delta_n .$$
#
# Nothing in it depends on other candidates: they are all the identity. For the blocks of the library $v$ enters
# through a pinned affine map $W\varphi + b$. With $\psi_n$ the derivative of the loss with respect to the
# output of that map, $\lambda_W = -\sum\psi_n\varphi_n^{\mathsf T}$ and $\lambda_b = -\sum\psi_n$:
#
# | block | map | $\varphi$ | $\psi$ |
# |---|---|---|---|
# | `IdentityLinear` | $\sigma(Wx + b) - s$ | $x$ | $\delta\odot\sigma'(x + s)$ |
# | `ResidualLinear` | $x + \sigma(Wx + b)$ | $x$ | $\sigma'(0)\,\delta$ |
# | `ResidualMLP`, outer | $x + W_2\,\sigma(W_1x + b)$ | $\sigma(W_1x + b)$ | $\delta$ |
# | `ResidualMLP`, inner | $x + W_2\,\sigma(W_1x + b)$ | $x$ | $\sigma'(0)\,W_2^{\mathsf T}\delta$ |
#
# (Herberg et al. 2023 introduce the pinned weights and the gradient; the outer-product form is how
# backpropagation computes the gradient of any affine map, Goodfellow, Bengio and Courville 2016, section 6.5.)
# We compare three ways: these formulas written out, `cg.solve`, and autograd in a network with all four
# candidates in it.

# %%
model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
inputs, targets = torch.randn(40, 2), torch.randint(3, (40,))
loss_fn = nn.CrossEntropyLoss()

identity = cg.blocks.IdentityLinear(5, nn.ReLU())
one = cg.blocks.ResidualLinear(5, torch.tanh)
outer = cg.blocks.ResidualMLP(5, 7, torch.tanh)
inner = cg.blocks.ResidualMLP(5, 7, torch.tanh, pinned="inner")
candidates = [
    cg.Candidate("1", identity, name="identity"),
    cg.Candidate("1", one, name="one"),
    cg.Candidate("3", outer, name="outer"),
    cg.Candidate("3", inner, name="inner"),
]
problem = cg.GrowthProblem(model, loss_fn, [(inputs, targets)], candidates)
solution = cg.solve(problem, norm=cg.norms.Frobenius())

# the formulas
x1 = model[:2](inputs).detach().requires_grad_()
x3 = model[2:4](x1)
d1, d3 = torch.autograd.grad(loss_fn(model[4](x3), targets), (x1, x3))
with torch.no_grad():
    psi = d1 * (x1 > 0)  # ReLU'(x), s = 0
    hidden = torch.tanh(outer.inner(x3))
    back = d3 @ inner.outer.weight  # tanh'(0) = 1
    formulas = {
        ("identity", "weight"): -psi.T @ x1,
        ("identity", "bias"): -psi.sum(0),
        ("one", "weight"): -d1.T @ x1,
        ("one", "bias"): -d1.sum(0),
        ("outer", "outer.weight"): -d3.T @ hidden,
        ("inner", "inner.weight"): -back.T @ x3,
        ("inner", "inner.bias"): -back.sum(0),
    }

# the network with all four in it
stages = [*model[:2], identity, one, *model[2:4], outer, inner, model[4]]
everything = nn.Sequential(*map(copy.deepcopy, stages))
loss_fn(everything(inputs), targets).backward()
place = {"identity": "2", "one": "3", "outer": "6", "inner": "7"}
for (name, parameter), formula in formulas.items():
    built = -everything.get_parameter(f"{place[name]}.{parameter}").grad
    assert torch.allclose(formula, built, atol=1e-14)
    assert torch.allclose(solution.multipliers[name][parameter], formula, atol=1e-14)

# %% [markdown]
# ## Claim 2. $\delta$ is a costate, and $\lambda$ a derivative of the Hamiltonian
#
# Read depth as time: layer $k$ takes the state $x_k$ to $x_{k+1} = f_k(x_k, u_k)$, the parameters $u_k$ are
# the controls, and the loss is a cost $\ell(x_K)$ of the final state. In optimal control the multipliers of
# the *dynamics* are the **costates** $p_k$. With the Hamiltonian $H_k(x, p, u) = \langle p, f_k(x, u)\rangle$,
#
# $$p_K = \nabla\ell(x_K), \qquad p_k = \nabla_x H_k(x_k, p_{k+1}, u_k), \qquad
# \nabla_{u_k}L = \sum_n\nabla_u H_k(x_k, p_{k+1}, u_k) .$$
#
# This is backpropagation (LeCun 1988), and $p_k = \delta$ at site $k$. A candidate is one more step in time,
# whose control $v$ is held at $0$, where $f(x, 0) = x$ and $\nabla_x H = p$: it leaves state and costate
# alone. Its multiplier is
#
# $$\lambda = -\sum_n\nabla_v H(x_n, \delta_n, 0), \qquad H(x, p, v) = \langle p, f(x, v)\rangle :$$
#
# a control that minimises the Hamiltonian would leave $0$ in the direction of $\lambda$ (for Pontryagin's
# principle in networks see Li et al. 2018). We run the costates backwards by hand, and differentiate $H$ by
# difference quotients.

# %%
state, states = inputs, []
for layer in model:
    states.append(state)
    state = layer(state)
costate = (state.softmax(1) - nn.functional.one_hot(targets, 3)) / 40  # the gradient of the cost
costates = [costate]
for layer, before in zip(reversed(model), reversed(states), strict=True):
    linear = isinstance(layer, nn.Linear)
    costate = costate @ layer.weight if linear else costate * (before > 0)
    costates.insert(0, costate)
assert torch.allclose(costates[2], d1, rtol=1e-10)  # after module "1" the state is number 2
assert torch.allclose(costates[4], d3, rtol=1e-10)


def hamiltonian(block, x, p):
    return (p * block(x)).sum().item()


for name, block, x, p in (("one", one, x1, costates[2]), ("inner", inner, x3, costates[4])):
    for parameter, found in solution.multipliers[name].items():
        control, h = block.get_parameter(parameter), 1e-5
        slopes = torch.empty(control.numel())
        with torch.no_grad():
            for k, entry in enumerate(torch.eye(control.numel()).view(-1, *control.shape)):
                ends = []
                for t in (h, -h):
                    control.copy_(t * entry)
                    ends.append(hamiltonian(block, x, p))
                slopes[k] = (ends[0] - ends[1]) / (2 * h)
            control.zero_()
        assert torch.allclose(found, -slopes.view(found.shape), atol=1e-8)

# %% [markdown]
# ## Claim 3. The operations are those of one gradient pass
#
# Take $D$ hidden layers of width $w$ with a ReLU after each, and an identity layer as a candidate at
# every one of the $D$ sites. Products of $(n, a)$ by $(a, b)$ matrices cost $2nab$ operations and dominate.
# With $d$ inputs and $m$ outputs:
#
# | | forward | $\delta$ backwards | outer products |
# |---|---|---|---|
# | gradient pass | $2n(dw + (D-1)w^2 + wm)$ | $2n((D-1)w^2 + wm)$ | $2n(dw + (D-1)w^2 + wm)$ |
# | multipliers | the same | the same | $2nDw^2$ |
#
# The backward pass of an affine map has two products, one for $\delta$ and one for $\nabla_WL$. For the
# multipliers the second kind is taken at the candidates *instead of* at the layers, so the difference is
#
# $$2n\,(w^2 - dw - wm),$$
#
# one site more than hidden matrices, less the first and the last layer. With all candidates built in, each of
# them adds three products: the pass costs twice as much. Without a stationarity residual nothing else is
# needed; with it ($\lVert\nabla_\theta L\rVert$, the default), the products of the gradient are added. We count
# the operations that PyTorch executes.

# %%
d, m, n = 4, 3, 128


def network(depth, width):
    layers = [nn.Linear(d, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, m))


def product(total, left, right, out_shape=None, **options):
    """Operations of total += left @ right, from the shapes."""
    return 2 * np.prod(total).item() * left[-1]


aten = torch.ops.aten
IN_PLACE = {aten.addmm_: product, aten.baddbmm_: product}  # PyTorch's counter leaves these out


def count(run):
    """Operations of all matrix products in a call."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run()
    return counter.get_total_flops()


def passes(depth, width, num_batches=1):
    """Three ways through the same data: gradient, multipliers, gradient with all built in."""
    net = network(depth, width)
    batches = [(torch.randn(n, d), torch.randint(m, (n,))) for _ in range(num_batches)]
    sites = [str(2 * k + 1) for k in range(depth)]
    blocks = [cg.blocks.IdentityLinear(width, nn.ReLU()) for _ in sites]
    full = copy.deepcopy(net)
    for site, block in zip(sites, blocks, strict=True):
        full[int(site)] = nn.Sequential(nn.ReLU(), copy.deepcopy(block))
    candidates = [cg.Candidate(s, b) for s, b in zip(sites, blocks, strict=True)]
    problem = cg.GrowthProblem(net, loss_fn, batches, candidates)

    def gradient(of):
        for batch, classes in batches:
            of.zero_grad()
            loss_fn(of(batch), classes).backward()

    return (
        lambda: gradient(net),
        lambda: cg.solve(problem, norm=cg.norms.Frobenius(), stationarity=False),
        lambda: gradient(full),
    )


depths = (2, 4, 8, 16)
operations = {}
for depth in depths:
    for width in (16, 128):
        counted = [count(run) for run in passes(depth, width)]
        operations[depth, width] = counted
        gradient, ours, built = counted
        w, D = width, depth
        affine = d * w + (D - 1) * w**2 + w * m
        assert gradient == 2 * n * (3 * affine - d * w)  # no product for the inputs
        assert ours == gradient + 2 * n * (w**2 - d * w - w * m)
        assert built == gradient + 2 * n * 3 * D * w**2
print("ratios at depth 16, width 128:", [c / operations[16, 128][0] for c in operations[16, 128]])

# %% [markdown]
# Operation counts are exact and the same everywhere; times are neither. The right half of the picture shows
# times on this machine, the fastest of five runs each. No claim about time is asserted.


# %%
def seconds(runs, repeats=5):
    """Least time of each of some runs, taken in turn: other work on the machine only adds to it."""
    for run in runs:
        run()  # to warm up
    taken = np.empty((repeats, len(runs)))
    for row in taken:
        for k, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            row[k] = time.perf_counter() - begin
    return taken.min(axis=0)


timed = {depth: seconds(passes(depth, 128, num_batches=6)) for depth in depths}

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.3), sharey=True)
styles = (
    (1, "multipliers of all candidates", BLUE, "o-"),
    (2, "gradient, all built in", RED, "s--"),
)
for k, label, colour, style in styles:
    left.plot(
        depths,
        [operations[D, 128][k] / operations[D, 128][0] for D in depths],
        style,
        color=colour,
        label=label,
    )
    right.plot(depths, [timed[D][k] / timed[D][0] for D in depths], style, color=colour)
for ax, title in ((left, "operations"), (right, "measured time")):
    ax.axhline(1, color=GREY, linestyle=":", label="one gradient pass")
    ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [str(D) for D in depths])
    ax.set_xlabel("depth $D$ (hidden layers)")
    ax.set_title(title)
left.set_ylim(0, None)
left.set_ylabel("in units of one gradient pass")
left.legend()
fig.tight_layout()

# %% [markdown]
# **Figure 1.** Operations (counted) and time (on the machine that ran this notebook) of all multipliers, and of
# a gradient in the network with every candidate built in, over those of one gradient pass. Width 128, six
# batches of 128, 64-bit numbers. Time exceeds operations: memory traffic, the fixed costs of a small network,
# and `solve` sends the first batch, here a sixth of the data, through the candidates too, to compare the two ways
# of computing $\lambda$. Over more data the ratio is smaller ([cost](results/cost.md)).
#
# ## Claim 4. How far $\lambda$ may be off is nearly free to know
#
# Each sample has a multiplier of its own, $\lambda_n = -N\psi_n\varphi_n^{\mathsf T}$, and $\lambda$ is their
# mean. To know how far it may be from the mean of the population, one needs $\sum\lVert\lambda_n\rVert^2$, and
#
# $$\lVert\psi_n\varphi_n^{\mathsf T}\rVert_F^2 = \lVert\psi_n\rVert^2\,\lVert\varphi_n\rVert^2 :$$
#
# two norms of vectors, no matrix per sample (the observation behind per-example gradient norms, Goodfellow
# 2015). The variance of $\lambda$ as an estimate is
#
# $$\operatorname{tr}\operatorname{Cov}(\lambda) = \frac{\sum_n\lVert\lambda_n\rVert_F^2 -
# N\lVert\lambda\rVert_F^2}{(N - 1)\,N} .$$
#
# Its root, `error_bound`, bounds the standard error of $\lVert\lambda\rVert_F$ from above, since
# $|\lVert\hat\lambda\rVert - \lVert\lambda\rVert|\le\lVert\hat\lambda - \lambda\rVert$. `standard_error` itself is
# that of a bootstrap over groups of samples (Efron and Tibshirani 1993), in any norm.

# %%
with torch.no_grad():
    singles = -40 * torch.einsum("ni,nj->nij", psi, x1)  # one matrix per sample, for once
    with_bias = torch.cat([singles, -40 * psi[:, :, None]], dim=2)
mean = with_bias.mean(0)
variance = (with_bias.square().sum() - 40 * mean.square().sum()) / (39 * 40)
bias_column = (x1.square().sum(1) + 1) * psi.square().sum(1) * 40**2
assert torch.allclose(bias_column, with_bias.square().sum((1, 2)))
found = solution.sensitivities["identity"]
assert np.isclose(found.variance, variance.item())
assert np.isclose(found.error_bound, variance.sqrt().item())
assert found.standard_error < found.error_bound
print(f"{found.value:.4f} +- {found.standard_error:.4f}, at most {found.error_bound:.4f}")

# %% [markdown]
# ## Claim 5. The norm of the mean is not the mean of the norms
#
# For the mean $\lambda_B$ over a random batch,
#
# $$\mathbb E\,\lVert\lambda_B\rVert^2 = \lVert\lambda\rVert^2 + \operatorname{tr}\operatorname{Cov}(\lambda_B) .$$
#
# (Write $\lambda_B = \lambda + e$ with $\mathbb E e = 0$ and expand the square.) Averaging norms over batches
# measures noise as soon as $\lambda$ is small, which is when decisions are hard. Averaging the *tensors* does
# not, and subtracting an estimate of the second term, `debiased_square`, leaves no bias. We draw 200 batches of
# 32 from a population of 20,000 samples.

# %%
population = torch.randn(20_000, 2)
labels = (population[:, 0] * population[:, 1] > 0).long() + (population[:, 0] > 1).long()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(60):  # train a little, so that the multipliers become small
    optimizer.zero_grad()
    loss_fn(model(population[:2000]), labels[:2000]).backward()
    optimizer.step()


def identity_layer(batches):
    candidate = cg.Candidate("1", cg.blocks.IdentityLinear(5, nn.ReLU()))
    problem = cg.GrowthProblem(model, loss_fn, batches, [candidate])
    norm = cg.norms.Frobenius()
    return cg.solve(problem, norm=norm, stationarity=False).sensitivities["1"]


truth = identity_layer([(population, labels)])
batches = [torch.randint(len(population), (32,)) for _ in range(200)]
drawn = [identity_layer([(population[rows], labels[rows])]) for rows in batches]
squares = np.array([s.value**2 for s in drawn])
debiased = np.array([s.debiased_square for s in drawn])
expected = truth.value**2 + truth.variance * len(population) / 32

print(f"square of the truth        {truth.value**2:.5f}")
print(f"mean of squares            {squares.mean():.5f}   expected {expected:.5f}")
print(f"mean of debiased squares   {debiased.mean():.5f}")
spread = squares.std() / np.sqrt(len(squares))
assert abs(squares.mean() - expected) < 4 * spread
assert abs(debiased.mean() - truth.value**2) < 4 * debiased.std() / np.sqrt(len(debiased))
assert squares.mean() > 2 * truth.value**2

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
bins = np.linspace(min(debiased.min(), 0), np.quantile(squares, 0.99), 40)
ax.hist(
    squares, bins, color=RED, alpha=0.6, hatch="///", edgecolor="white", label="of batches of 32"
)
ax.hist(debiased, bins, color=BLUE, histtype="step", linewidth=1.8, label="debiased")
ax.axvline(truth.value**2, color="black", label=r"$\Vert\lambda\Vert^2$ of all 20,000")
ax.axvline(
    expected,
    color=RED,
    linestyle="--",
    label=r"$\Vert\lambda\Vert^2 + \mathrm{tr\,Cov}(\lambda_B)$",
)
ax.set_xlabel("squared sensitivity (squared loss per squared unit of the pins)")
ax.set_ylabel("number of batches")
ax.legend()

# %% [markdown]
# **Figure 2.** Squared sensitivities of 200 random batches. The mean of the hatched histogram is the dashed line
# and has little to do with the truth; the debiased one is spread around the truth, and may be negative.
#
# ## Exercises
#
# 1. How many more operations than one gradient pass do the multipliers take for $D = 10$, $w = 100$, $d = 20$,
#    $m = 10$, $n = 50$? In percent?
# 2. Batches of 32 have the bias of Claim 5. How large must a batch be for the bias to be a tenth of
#    $\lVert\lambda\rVert^2$? (`truth.variance` is that of a mean over 20,000.)
# 3. `ResidualMLP` with the outer factor pinned has to compute $\varphi = \sigma(W_1x + b)$ at the site. With
#    hidden width $w$, how many operations does such a candidate take in all, in units of $2nw^2$?


# %%
def check_1(operations, percent):
    w, D, d, m, n = 100, 10, 20, 10, 50
    gradient = 2 * n * (3 * (d * w + (D - 1) * w**2 + w * m) - d * w)
    assert operations == 2 * n * (w**2 - d * w - w * m)
    assert abs(percent - 100 * operations / gradient) < 0.1
    print("1: right")


def check_2(size):
    assert np.isclose(truth.variance * len(population) / size, truth.value**2 / 10, rtol=0.01)
    print("2: right")


def check_3(units):
    net, w = network(3, 64), 64
    batch = [(torch.randn(n, d), torch.randint(m, (n,)))]

    def counted(sites):
        found = [cg.Candidate(s, cg.blocks.ResidualMLP(w, w, nn.ReLU())) for s in sites]
        problem = cg.GrowthProblem(net, loss_fn, batch, found)
        return count(lambda: cg.solve(problem, norm=cg.norms.Frobenius(), stationarity=False))

    assert (counted(["1", "3"]) - counted(["1"])) == units * 2 * n * w**2
    print("3: right")


# %%
check_1(operations=700_000, percent=100 * 7000 / (3 * 93_000 - 2000))
check_2(size=10 * truth.variance * len(population) / truth.value**2)
check_3(units=2)  # one product for W1 x, one for the outer product

# %% [markdown]
# ## References
#
# * Y. LeCun, *A Theoretical Framework for Back-Propagation*, Proceedings of the 1988 Connectionist Models
#   Summer School, 21-28: costates as multipliers of the dynamics.
# * Q. Li, L. Chen, C. Tai and W. E, *Maximum Principle Based Algorithms for Deep Learning*, Journal of Machine
#   Learning Research 18(165), 2018.
# * I. Goodfellow, Y. Bengio and A. Courville, *Deep Learning*, MIT Press, 2016, section 6.5: back-propagation.
# * B. Efron and R. Tibshirani, *An Introduction to the Bootstrap*, Chapman and Hall, 1993, chapter 6.
# * I. Goodfellow, *Efficient Per-Example Gradient Computations*, arXiv 1510.01799, 2015: norms of
#   per-example gradients from two vectors.
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural Networks*,
#   arXiv 2311.15995, 2023.
