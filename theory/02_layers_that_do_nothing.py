# %% [markdown]
# # 2. Layers that do nothing
#
# A pin is a value of the new parameters at which the new layer does not change the function.
# Which layers have such a value?
#
# At the end you will be able to say
#
# * which activations allow an *identity layer* $\sigma(Wx + b)$, and by how much the others fail;
# * why a *residual* layer with a zero factor is the identity, bit for bit, for all of them;
# * what BatchNorm does to both, and which kind of transformer block can be inserted;
# * when copies stay copies in training, and why an identity layer does not need noise.
#
# Throughout, "fails by" means the relative change $\lVert \text{layer}(x) - x\rVert/\lVert x\rVert$ of
# the input $x$ of the layer (no unit).

# %%
from itertools import combinations

import matplotlib.pyplot as plt
import torch
from torch import nn

import constrained_growth as cg

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED = "#0072B2", "#D55E00"


def change(layer, x):
    """The relative change that a layer makes to its input."""
    return ((layer(x) - x).norm() / x.norm()).item()


# %% [markdown]
# A layer that does nothing still has a gradient, and this is what $\lambda$ is: `cg.solve` says what
# difference quotients of the loss say when the layer is really there and its parameters leave the pin.

# %%
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
inputs, targets = torch.randn(30, 3), torch.randn(30, 1)


def problem_of(block, model=net):
    return cg.GrowthProblem(
        model, nn.MSELoss(), [(inputs, targets)], [cg.Candidate(after="1", block=block)]
    )


def slope(block, parameter, direction, h=1e-5):
    """Of the loss along a direction of a parameter, the block in place, from two losses."""
    pin, losses = block.get_parameter(parameter), []
    for t in (h, -h):
        with torch.no_grad():
            pin += t * direction
            losses.append(nn.functional.mse_loss(net[2](block(net[:2](inputs))), targets).item())
            pin -= t * direction
    return (losses[0] - losses[1]) / (2 * h)


block = cg.blocks.ResidualLinear(4, torch.tanh)
lam = cg.solve(problem_of(block)).multipliers["1"]
for parameter, own in lam.items():  # weight and bias
    entries = torch.eye(own.numel()).view(-1, *own.shape)
    slopes = torch.tensor([slope(block, parameter, entry) for entry in entries])
    assert torch.allclose(own, -slopes.view(own.shape), rtol=1e-6)
assert not torch.allclose(lam["weight"], lam["weight"].T, rtol=0.1)  # rows: outputs

# %% [markdown]
# ## Claim 1. An identity layer is exact if and only if $\sigma(x + s) = x + s$ on the range of $\sigma$
#
# Take $x = \sigma(z)$, the output of a layer, and send it through one more:
#
# $$x \;\mapsto\; \sigma(Wx + b) - s, \qquad W = I,\; b = s .$$
#
# It does nothing exactly when $\sigma(x + s) = x + s$ for every $x$ in the range of $\sigma$. With
# $s = 0$ this says $\sigma\circ\sigma = \sigma$: the activation is **idempotent**. ReLU is, and
# Net2Net deepens ReLU networks in this way (Chen, Goodfellow and Shlens 2016). A shift $s > 0$ helps
# an activation that becomes the identity from some point on, such as
#
# $$\mathrm{TanhLU}_\varepsilon(x) = \begin{cases} x & x \ge \varepsilon\\
# \varepsilon\,(\tanh((x - \varepsilon)/\varepsilon) + 1) & x < \varepsilon \end{cases}$$
#
# with $s = \varepsilon$ (Herberg et al. 2023). We measure $\lVert\sigma(\sigma(z)) - \sigma(z)\rVert /
# \lVert\sigma(z)\rVert$ for a hundred thousand standard normal $z$, and ask the library which blocks
# it would build.

# %%
activations = {
    "ReLU": nn.ReLU(),
    "Hardtanh": nn.Hardtanh(),
    "TanhLU(0.01)": cg.blocks.TanhLU(0.01),
    "LeakyReLU": nn.LeakyReLU(),
    "ELU": nn.ELU(),
    "GELU": nn.GELU(),
    "tanh": nn.Tanh(),
    "SiLU": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
}
z = torch.randn(100_000)


def allowed(make):
    """Whether the library builds a block."""
    try:
        make()
    except cg.BlockError:
        return False
    return True


def smallest_shift(sigma):
    """The smallest s >= 0 with sigma(x + s) = x + s on the range of sigma, on a grid; else None."""
    x = torch.linspace(-64, 64, 128_001)
    if torch.equal(sigma(sigma(x)), sigma(x)):
        return 0.0
    bent = x[~torch.isclose(sigma(x), x, rtol=1e-15, atol=0)]
    shift = bent.max() + 0.001 - sigma(x).min()  # straight beyond the last bent point
    moved = sigma(torch.cat([x, torch.tensor([-1e6])])) + shift
    return shift.item() if torch.allclose(sigma(moved), moved, rtol=1e-12, atol=0) else None


errors, shifts, identity, inner = {}, {}, {}, {}
print(f"{'activation':13} {'error':>8} {'shift':>6}  IdentityLinear  ResidualLinear  ResidualMLP")
for name, sigma in activations.items():
    errors[name] = change(sigma, sigma(z))
    shifts[name] = smallest_shift(sigma)
    identity[name] = allowed(lambda sigma=sigma: cg.blocks.IdentityLinear(4, sigma))
    inner[name] = allowed(lambda sigma=sigma: cg.blocks.ResidualLinear(4, sigma))
    outer = allowed(lambda sigma=sigma: cg.blocks.ResidualMLP(4, 4, sigma))
    shift = "none" if shifts[name] is None else f"{shifts[name]:g}"
    yes = ["yes" if b else "-" for b in (identity[name], inner[name], outer)]
    print(f"{name:13} {errors[name]:8.4f} {shift:>6}  {yes[0]:14}  {yes[1]:14}  {yes[2]}")
    assert outer

# exact without a shift <=> the error is zero; and what the library accepts is exact indeed
for name, sigma in activations.items():
    assert (shifts[name] == 0) == (errors[name] < 1e-12)
    if identity[name]:
        assert change(cg.blocks.IdentityLinear(1, sigma), sigma(z)[:, None]) < 1e-12
assert [name for name in identity if identity[name]] == ["ReLU", "Hardtanh", "TanhLU(0.01)"]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
grid = torch.linspace(-4, 4, 400)
for name in ("ReLU", "GELU", "tanh", "SiLU", "sigmoid"):
    sigma = activations[name]
    left.plot(grid, sigma(sigma(grid)) - sigma(grid), label=name)
left.set_xlabel(r"$z$")
left.set_ylabel(r"$\sigma(\sigma(z)) - \sigma(z)$")
left.legend()
for built, colour, hatch, label in (
    (True, BLUE, "", "identity layer built"),
    (False, RED, "///", "refused"),
):
    kept = [name if identity[name] == built else "" for name in errors]
    widths = [errors[name] if name else 0 for name in kept]
    right.barh(list(errors), widths, color=colour, hatch=hatch, edgecolor="white", label=label)
right.invert_yaxis()
right.legend(loc="center right")
right.set_xlabel("relative change by an unshifted layer")
for name, error in errors.items():
    note = "exact" if error == 0 else f"{error:.2g}" + (", exact if shifted" * identity[name])
    right.text(error + 0.01, name, note, va="center")
right.set_xlim(0, 0.75)
fig.tight_layout()

# %% [markdown]
# **Figure 1.** Left: what a second application of $\sigma$ changes. Right: the same as a relative
# change, for $z \sim N(0, 1)$. No unit.
#
# ELU is an intermediate case: the shift $s = 1$ would make it exact, but moves the layer so far into
# its straight part that it is a *linear* layer until its parameters have moved by about 1, and linear
# layers are of little use (notebook 4). The shifts of GELU and SiLU in the table are where these
# functions become straight up to rounding in 64-bit numbers. The library uses a large shift only if
# you ask for it.

# %%
elu = nn.ELU()
assert not identity["ELU"]
assert change(cg.blocks.IdentityLinear(1, elu, shift=1.0), elu(z)[:, None]) < 1e-12

# %% [markdown]
# ## Claim 2. A residual layer with a zero factor does nothing, for every activation
#
# In $x \mapsto x + W_2\,\sigma(W_1 x + b)$ the pin $W_2 = 0$ makes the branch zero whatever $\sigma$,
# $W_1$ and $b$ are, and $x + 0 = x$ also in floating-point numbers: the output is the same *bit for
# bit*. Deep residual networks are often initialised this way: Fixup sets the last layer of each branch
# to zero (Zhang, Dauphin and Ma 2019), ReZero multiplies the branch by a number that starts at zero
# (Bachlechner et al. 2021).
#
# With one weight, $x \mapsto x + \sigma(Wx + b)$ at $W = 0, b = 0$, one needs $\sigma(0) = 0$; and
# $\sigma'(0) \ne 0$, or no multiplier would ever be different from zero (notebook 4).

# %%
x = torch.randn(1000, 4)
for name, sigma in activations.items():
    assert torch.equal(cg.blocks.ResidualMLP(4, 7, sigma)(x), x)
    zero = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(sigma(zero), zero)
    assert inner[name] == (sigma(zero).item() == 0 and slope.item() != 0)

# %% [markdown]
# Factors need not be matrices. With *both* factors at zero the layer would do nothing either, but
# its multipliers would vanish identically; the library refuses it, and notebook 4 says why.

# %%
assert not allowed(lambda: cg.blocks.ResidualMLP(4, 4, torch.tanh, inner_init=0.0))

# %% [markdown]
# ## Claim 3. BatchNorm breaks an identity layer and leaves a residual one alone
#
# In training mode BatchNorm (Ioffe and Szegedy 2015) maps a channel to
#
# $$\gamma\,\frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta,$$
#
# with the mean and variance of *this batch*. Fresh ($\gamma = 1, \beta = 0$) it is far from the
# identity. Setting $\gamma = \sqrt{\sigma_B^2 + \epsilon}$ and $\beta = \mu_B$ undoes it on one batch,
# and on no other. At the end of a residual branch, $\gamma = \beta = 0$ is a pin that holds in both
# modes and for all data; residual networks are often initialised this way (Goyal et al. 2017, section
# 5.1).

# %%
features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
with torch.no_grad():
    batch, other = features(torch.randn(64, 3, 8, 8)), features(torch.randn(64, 3, 8, 8))


def identity_conv():
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)  # the identity as a convolution
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())


def fitted_conv():
    layer = identity_conv()
    norm = layer[1]
    with torch.no_grad():
        variance = batch.var((0, 2, 3), correction=0)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(batch.mean((0, 2, 3)))
    return layer


class ResidualConv(nn.Module):
    """x + BatchNorm(conv(x)), pinned at the scale and shift of the BatchNorm."""

    pinned = ("norm.weight", "norm.bias")

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return x + self.norm(self.conv(x))


with torch.no_grad():
    cases = {
        "identity conv + fresh BN, train": change(identity_conv(), batch),
        "… fitted to a batch, that batch": change(fitted_conv(), batch),
        "… fitted to a batch, another one": change(fitted_conv(), other),
        "residual, BN scale 0, train": change(ResidualConv(8), batch),
        "residual, BN scale 0, eval": change(ResidualConv(8).eval(), other),
    }
for name, value in cases.items():
    print(f"{name:34} {value:.1e}")

fresh, same, another, train, evaluated = cases.values()
assert fresh > 0.3
assert same < 1e-12
assert 1e-3 < another < 0.3
assert train == 0
assert evaluated == 0

# %%
fig, ax = plt.subplots(figsize=(6.6, 2.6))
floor = 1e-17
for exact, colour, hatch, label in ((True, BLUE, "", "exact"), (False, RED, "///", "not exact")):
    widths = [max(v, floor) if (v < 1e-12) == exact else floor for v in cases.values()]
    ax.barh(list(cases), widths, color=colour, hatch=hatch, edgecolor="white", label=label)
ax.set_xscale("log")
ax.set_xlim(floor, 1e3)
ax.invert_yaxis()
ax.legend(loc="lower right")
for name, value in cases.items():
    note = f"{value:.2g}" if value else "0, exactly"
    ax.text(max(value, floor) * 1.5, name, note, va="center")
ax.set_xlabel("relative change of the features (no unit)")

# %% [markdown]
# **Figure 2.** Convolution layers with BatchNorm, on 64 feature maps of 8 channels. The layer fitted
# to a batch is exact to rounding there and off by some two percent on the next one; the residual
# layer is exact in both modes.

# %% [markdown]
# ## Claim 4. A pre-norm transformer block can be inserted, a post-norm block cannot
#
# A pre-norm block (Xiong et al. 2020 compare the two kinds) is purely residual,
#
# $$x \leftarrow x + \mathrm{Attn}(\mathrm{LN}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)),$$
#
# and the last projection of each branch can be pinned at zero: LLaMA Pro expands language models by
# copied blocks with these projections set to zero (Wu et al. 2024). A post-norm block is
# $x \leftarrow \mathrm{LN}(x + \dots)$. With both branches at zero an $\mathrm{LN}$ remains, which
# leaves $x$ unchanged only if $x$ has been normalised with the same scale and shift already.


# %%
class TransformerBlock(nn.Module):
    """nn.TransformerEncoderLayer with the projections at the ends of its branches at zero."""

    pinned = ("layer.self_attn.out_proj.weight", "layer.linear2.weight")

    def __init__(self, width, norm_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, nhead=2, dim_feedforward=32, dropout=0.0, norm_first=norm_first, batch_first=True
        )
        for linear in (self.layer.self_attn.out_proj, self.layer.linear2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.layer(x)


tokens = torch.randn(20, 6, 8)  # sequences, positions, width
pre, post = TransformerBlock(8, norm_first=True), TransformerBlock(8, norm_first=False)
print(f"pre-norm changes x by {change(pre, tokens):.0e}, post-norm by {change(post, tokens):.2f}")
assert torch.equal(pre(tokens), tokens)
assert change(post, tokens) > 0.05

# %% [markdown]
# The library tries every block on the data before it measures anything. It accepts the first block and
# refuses the second. After the insertion the output of the network is the same, bit for bit.

# %%
model = nn.Sequential(nn.Linear(3, 8), TransformerBlock(8, norm_first=True), nn.Linear(8, 1))
data = [(torch.randn(20, 6, 3), torch.randn(20, 6, 1))]


def growth(block):
    return cg.GrowthProblem(model, nn.MSELoss(), data, [cg.Candidate(after="1", block=block)])


refused = False
try:
    growth(post)
except cg.BlockError as error:
    print("refused:", str(error)[:72], "…")
    refused = True
assert refused

before = model(data[0][0])
solution = cg.solve(growth(pre))
cg.insert(model, solution)
assert torch.equal(model(data[0][0]), before)
assert all(value.norm() > 0 for value in solution.multipliers["1"].values())

# %% [markdown]
# ## Claim 5. Copies stay copies, an identity layer does not need noise
#
# A function-preserving layer can be useless all the same: if two units have equal weights and equal
# gradients, every gradient method keeps them equal, and two units do the work of one. Write
# $u_j$ for the outgoing and $w_j$ for the incoming weights of hidden unit $j$, $h_j = \sigma(w_j^{\mathsf T}x
# + b_j)$, and $g$ for the derivative of the loss with respect to the output. Then
#
# $$\nabla_{u_j}L = \sum g\,h_j, \qquad \nabla_{w_j}L = \sum (u_j^{\mathsf T}g)\,\sigma'(w_j^{\mathsf T}x + b_j)\,x .$$
#
# * **A wider layer** (Net2WiderNet) copies a unit and gives the copies the shares $\alpha$ and
#   $1 - \alpha$ of its outgoing weight. Their incoming gradients are in the ratio
#   $\alpha : 1 - \alpha$, the outgoing ones are equal. With $\alpha = 1/2$ the copies never part;
#   Net2Net adds noise.
# * **A zeroed block** $x + W_2\,\sigma(W_1x + b)$ whose hidden units have equal $W_1, b$ has equal columns of
#   $\lambda_{W_2}$ and gains a single unit. The free factor has to break the symmetry; the library draws
#   it at random.
# * **A deeper layer** (Net2DeeperNet), $W = I$: unit $i$ reads $x_i$ and answers for $\delta_i$, so no two
#   rows or columns of $\lambda_W$ are alike. The identity is no symmetric point.

# %%
unit = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1))


def widened(alpha):
    """The hidden unit twice, with shares of its outgoing weight."""
    wide = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        wide[0].weight.copy_(unit[0].weight.expand(2, 3))
        wide[0].bias.copy_(unit[0].bias.expand(2))
        wide[2].weight.copy_(unit[2].weight * torch.tensor([[alpha, 1 - alpha]]))
        wide[2].bias.copy_(unit[2].bias)
    return wide


def train(model, parameters, steps=60):
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def asymmetry(first, second):
    return ((first - second).norm() / (first.norm() + second.norm())).item()


for alpha in (0.5, 0.3):
    wide = widened(alpha)
    assert torch.allclose(wide(inputs), unit(inputs), rtol=1e-13)
    nn.functional.mse_loss(wide(inputs), targets).backward()
    incoming, outgoing = wide[0].weight.grad.clone(), wide[2].weight.grad.clone()
    assert torch.allclose(incoming[0] * (1 - alpha), incoming[1] * alpha, rtol=1e-10)
    assert torch.isclose(outgoing[0, 0], outgoing[0, 1], rtol=1e-10)
    train(wide, wide.parameters())
    apart = asymmetry(*wide[0].weight)
    print(f"share {alpha}: after training the copies differ by {apart:.1e}")
    assert (apart < 1e-8) == (alpha == 0.5)

equal, drawn = (cg.blocks.ResidualMLP(4, 4, torch.tanh) for _ in range(2))
with torch.no_grad():
    equal.inner.weight.copy_(equal.inner.weight[:1].expand(4, 4))
    equal.inner.bias.copy_(equal.inner.bias[:1].expand(4))
for name, block in (("equal", equal), ("random", drawn)):
    columns = cg.solve(problem_of(block)).multipliers["1"]["outer.weight"].T
    train(nn.Sequential(*net[:2], block, net[2]), block.parameters())
    for what, units in (("lambda", columns), ("W2 after training", block.outer.weight.T)):
        apart = [asymmetry(*pair) for pair in combinations(units, 2)]
        print(f"{name:6} hidden units: columns of {what} differ by {min(apart):.1e} or more")
        assert max(apart) < 1e-8 if name == "equal" else min(apart) > 0.01

relu_net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
layer = cg.blocks.IdentityLinear(4, nn.ReLU())
lam = cg.solve(problem_of(layer, relu_net)).multipliers["1"]["weight"]
x = relu_net[:2](inputs).detach().requires_grad_()
(delta,) = torch.autograd.grad(nn.functional.mse_loss(relu_net[2](x), targets), x)
assert torch.allclose(lam, -(delta * (x > 0)).T @ x, rtol=1e-10)
for units in (lam, lam.T):
    assert min(asymmetry(*pair) for pair in combinations(units, 2)) > 0.05

# %% [markdown]
# ## Exercises
#
# 1. Which of these functions allow an identity layer *without a shift*: $|x|$, $x^2$, $\max(x, -1)$,
#    $\mathrm{sign}(x)$? For which of them would its multipliers be of no use?
# 2. A ReZero layer is $x \mapsto x + \alpha f(x)$ with the number $\alpha$ pinned at $0$. Write its
#    multiplier in terms of $x$, $f$ and $\delta = \partial L/\partial x$ (sums over samples).
# 3. Can `ResidualMLP(..., pinned="inner")` be built with GELU? With the sigmoid? Why?


# %%
def check_1(exact, useless):
    """Two sets of names out of abs, square, max, sign."""
    functions = {
        "abs": torch.abs,
        "square": torch.square,
        "max": lambda x: x.clamp(min=-1),
        "sign": torch.sign,
    }
    truth, flat = set(), set()
    for name, f in functions.items():
        if change(f, f(z)) == 0:
            truth.add(name)
            leaf = f(z).clone().requires_grad_()
            (slope,) = torch.autograd.grad(f(leaf).sum(), leaf)
            if not slope.any():
                flat.add(name)
    assert set(exact) == truth
    assert set(useless) == flat
    print("1: right")


class ReZero(nn.Module):
    pinned = ("alpha",)

    def __init__(self, f):
        super().__init__()
        self.alpha, self.f = nn.Parameter(torch.zeros(1)), f

    def forward(self, x):
        return x + self.alpha * self.f(x)


def check_2(multiplier):
    """A function (x, f, delta) -> number."""
    found = cg.solve(problem_of(ReZero(torch.sin)))
    x = net[:2](inputs).detach().requires_grad_()
    (delta,) = torch.autograd.grad(nn.functional.mse_loss(net[2](x), targets), x)
    assert torch.allclose(multiplier(x, torch.sin, delta), found.multipliers["1"]["alpha"])
    print("2: right")


def check_3(gelu, sigmoid):
    for sigma, answer in ((nn.GELU(), gelu), (nn.Sigmoid(), sigmoid)):
        block = allowed(lambda s=sigma: cg.blocks.ResidualMLP(4, 4, s, pinned="inner"))
        assert answer == block
    print("3: right")


# %%
check_1(exact={"abs", "max", "sign"}, useless={"sign"})
check_2(lambda x, f, delta: -(delta * f(x)).sum())
check_3(gelu=True, sigmoid=False)  # GELU(0) = 0 with slope 1/2; the sigmoid is 1/2 at 0

# %% [markdown]
# ## References
#
# * T. Chen, I. Goodfellow and J. Shlens, *Net2Net: Accelerating Learning via Knowledge Transfer*,
#   ICLR 2016, arXiv 1511.05641: wider layers by copies, deeper ones by identity layers, and which
#   activations allow them.
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural
#   Networks*, arXiv 2311.15995, 2023: pinned identity and residual layers.
# * H. Zhang, Y. N. Dauphin and T. Ma, *Fixup Initialization: Residual Learning Without
#   Normalization*, ICLR 2019, arXiv 1901.09321: the last layer of each residual branch at zero.
# * T. Bachlechner et al., *ReZero is All You Need: Fast Convergence at Large Depth*, UAI 2021,
#   arXiv 2003.04887: one number per branch that starts at zero.
# * S. Ioffe and C. Szegedy, *Batch Normalization*, ICML 2015, arXiv 1502.03167.
# * P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, arXiv 1706.02677,
#   2017, section 5.1: $\gamma = 0$ in the last BatchNorm of each residual block.
# * R. Xiong et al., *On Layer Normalization in the Transformer Architecture*, ICML 2020,
#   arXiv 2002.04745: pre-norm and post-norm.
# * C. Wu et al., *LLaMA Pro: Progressive LLaMA with Block Expansion*, ACL 2024, arXiv 2401.02415.
