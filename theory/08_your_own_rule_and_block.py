# %% [markdown]
# # 8. Write your own rule, write your own block
#
# Nothing in the library is closed: a rule is a function, a block is an `nn.Module` with one attribute.
#
# At the end you will be able to say
#
# * what a rule gets and what it has to return, and how to give one a guarantee;
# * what makes a module a block, and what a closed form of its multipliers adds;
# * how to check both before you trust them.

# %%
import copy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import nn

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors
from constrained_growth.testing import check_block, check_rule

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plt.style.use("style.mplstyle")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#9AA5B1"

# %% [markdown]
# ## Claim 1. A rule is a function from sensitivities to a decision
#
# It is called with a mapping, candidate $\to$ `Sensitivity`, and returns `cg.Decision(chosen, reason)`. A sensitivity carries the
# `value` $\lVert\lambda\rVert$ in the norm asked for, its `standard_error`, the `variance` $\operatorname{tr}\operatorname{Cov}(\lambda)$,
# its root as `error_bound` (in the Frobenius norm), the numbers of pinned and of new parameters, and the site. So a first rule is three lines:


# %%
def only_narrow(sensitivities):
    """The largest sensitivity among layers of at most 50 new parameters."""
    small = {name: s.value for name, s in sensitivities.items() if s.num_new_parameters <= 50}
    return cg.Decision((max(small, key=small.get),) if small else (), "largest of the narrow ones")


# %% [markdown]
# ## Claim 2. A rule can come with a guarantee: seldom insert when there is nothing to gain
#
# When is there nothing to gain? When the network is *right*: if targets are drawn from the distribution that the network itself
# predicts, the derivative of the log-likelihood by any parameter, new ones included, has mean zero (the score has mean zero; van der Vaart
# 1998, section 5.5). The multiplier of the population is then $\lambda = 0$ for every candidate. What a sample shows, $\hat\lambda$, is noise,
# and yet `TopK(1)` inserts the largest noise.
#
# With $\lambda = 0$ we have $\mathbb E\lVert\hat\lambda\rVert^2 = \operatorname{tr}\operatorname{Cov}(\hat\lambda)$ (notebook 3), and Markov's inequality
# gives, for any $z$,
#
# $$\Pr\big(\lVert\hat\lambda\rVert \ge z\sqrt{\operatorname{tr}\operatorname{Cov}(\hat\lambda)}\big) \le \frac1{z^2} .$$
#
# For $m$ candidates the union bound multiplies this by $m$. So with a *known* variance a rule that requires $z^2 = m/\alpha$ inserts
# needlessly with probability at most $\alpha$. No normality is needed.
#
# **The variance is estimated**, from the same $N$ samples, and with few of them it may come out far too small: with two samples of one
# normal number, $z^2 = 20$ is exceeded in 14 % of all cases, not in 5 % (below). No test with an estimated variance keeps its level
# for *all* distributions (Bahadur and Savage 1956). It does for symmetric ones. Let $g_n$ be the multiplier of sample $n$, as likely to be
# $-g_n$. Given the sizes, the signs are then fair coins, $\mathbb E\lVert\sum g_n\rVert^2 = \sum\lVert g_n\rVert^2$ holds exactly, and Markov's inequality
# says $\Pr(R\ge r)\le 1/r$ for $R = \lVert\sum g_n\rVert^2/\sum\lVert g_n\rVert^2$. The ratio that we have is a growing function of $R$:
#
# $$\frac{\lVert\hat\lambda\rVert^2}{\widehat{\operatorname{tr}\operatorname{Cov}}} = \frac{(N-1)\,R}{N-R}, \qquad\text{so require}\qquad
# z^2 = \frac{(N-1)\,r}{N-r},\quad r = \frac m\alpha ,$$
#
# and never insert if $N\le r$. As $N$ grows, $z^2\to m/\alpha$. Derivatives of a loss are not quite symmetric, so the level is
# proven for large $N$ and has to be measured for others; we do both.


# %%
@dataclass(frozen=True)
class Significant:
    """The largest sensitivity, if noise alone would seldom give it.

    Args:
        level: At most this probability of inserting when all multipliers are zero.
        samples: From so many samples the variance is estimated; infinite if it is known.
    """

    level: float = 0.05
    samples: float = float("inf")
    norm = cg.norms.Frobenius()  # `solve` takes the norm of a rule that is meant for one

    def needed(self, candidates):
        """So many standard errors, z."""
        r, n = candidates / self.level, self.samples
        if n == float("inf"):
            return r**0.5
        return ((n - 1) * r / (n - r)) ** 0.5 if n > r else float("inf")

    def __call__(self, sensitivities):
        if not sensitivities:
            return cg.Decision((), "no candidates")
        z = self.needed(len(sensitivities))
        ratios = {name: s.value / s.error_bound for name, s in sensitivities.items()}
        best = max(ratios, key=ratios.get)
        reason = f"{ratios[best]:.1f} standard errors, {z:.1f} needed"
        return cg.Decision((best,) if ratios[best] >= z else (), reason)


# %% [markdown]
# One normal number per sample first, where the ratio is Student's $t$ and its distribution known.

# %%
print("samples   z with a known variance   false alarms   z with an estimated one   false alarms")
for n in (2, 5, 10, 30, 100):
    known, estimated = Significant().needed(1), Significant(samples=n).needed(1)
    alarms = [2 * student.sf(z, n - 1) for z in (known, estimated)]
    print(f"{n:7} {known:25.2f} {alarms[0]:14.2%} {estimated:25.2f} {alarms[1]:14.2%}")
    assert alarms[1] <= 0.05
    assert (alarms[0] > 0.05) == (n == 2)  # too often with two samples

# %% [markdown]
# We try it on samples of 500 for which the network is right, and on samples for which it is not: there the targets come from a
# network that is one layer deeper.

# %%
model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
with torch.no_grad():
    for layer in (model[0], model[2], model[4]):
        layer.weight.mul_(2)
teacher = copy.deepcopy(model)
layer = cg.blocks.ResidualMLP(6, 6, torch.tanh)
nn.init.normal_(layer.outer.weight, std=0.7)
teacher.insert(2, layer)
candidates = [cg.Candidate(site, cg.blocks.ResidualMLP(6, 6, torch.tanh)) for site in ("1", "3")]


def sample(source, size=500):
    x = torch.randn(size, 3)
    with torch.no_grad():
        return x, torch.distributions.Categorical(logits=source(x)).sample()


def tried(source, rule, repeats):
    """The largest ratio, the choice, and all squares and their estimated means, for fresh samples."""
    ratios, chosen, squares = [], [], []
    data = [sample(source)]
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    for _ in range(repeats):
        data[0] = sample(source)
        solution = cg.solve(problem, rule=rule, stationarity=False)
        found = solution.sensitivities.values()
        ratios.append(max(s.value / s.error_bound for s in found))
        squares.append([(s.value**2, s.error_bound**2) for s in found])
        chosen.append(solution.decision.chosen)
    return np.array(ratios), chosen, np.array(squares)


rule = Significant(level=0.05, samples=500)
null, inserted_null, squares = tried(model, rule, repeats=120)
real, inserted_real, _ = tried(teacher, rule, repeats=40)
false_alarms = np.mean([bool(chosen) for chosen in inserted_null])
found = np.mean([bool(chosen) for chosen in inserted_real])
print(f"network right: inserts in {false_alarms:.1%} of 120 samples")
print(f"a layer missing: inserts in {found:.1%} of 40 samples")
assert binomtest(sum(map(bool, inserted_null)), 120).proportion_ci(0.99).high < 0.05
assert found > 0.9
always = tried(model, cg.TopK(1), repeats=20)[1]
assert all(always)  # the largest noise is still the largest

# the standard errors are neither too large nor too small: where nothing is to gain, E |lambda|^2 = tr Cov
calibration = squares[..., 0].mean(0) / squares[..., 1].mean(0)
print("mean square over its estimate, of each candidate:", calibration.round(2))
assert np.allclose(calibration, 1, atol=0.15)

# %%
fig, ax = plt.subplots(figsize=(6, 3.1))
bins = np.linspace(0, max(real.max(), 8), 60)
ax.hist(null, bins, color=GREY, density=True, label="network right, nothing to gain")
ax.hist(
    real, bins, color=BLUE, density=True, hatch="///", edgecolor="white", label="a layer is missing"
)
ax.axvline(rule.needed(2), color=RED, linestyle="--", label="$z$, level 5 %")
ax.set_xlabel(r"largest $\Vert\hat\lambda\Vert$ in standard errors (no unit)")
ax.set_ylabel("density of samples")
ax.legend(ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1))

# %% [markdown]
# **Figure 1.** The statistic of the rule, for 120 samples for which the network is right and 40 for which it is not. The bound is far
# from tight, because Markov's inequality serves every distribution; what it promises holds.
#
# ## Claim 3. A block is a module that names its pins
#
# Take a bottleneck as in adapters for transformers (Houlsby et al. 2019), preceded by a normalisation:
#
# $$x\mapsto x + W_2\,\mathrm{GELU}(W_1\,\mathrm{LN}(x)), \qquad W_2 = 0 \text{ pinned} .$$
#
# Any module that is the identity and declares `pinned = (...)` will do: its multipliers are found by differentiating the block alone. If
# it also has `factors(x, delta)`, the outer-product form of notebook 3,
#
# $$\lambda_{W_2} = -\sum\psi\varphi^{\mathsf T}, \qquad \psi = \delta, \quad \varphi = \mathrm{GELU}(W_1\,\mathrm{LN}(x)),$$
#
# the library evaluates this product alone, and knows the multipliers of single samples also where the pinned layer is of a kind it does not
# know: hence a standard error from a single batch.


# %%
class Bottleneck(nn.Module):
    """x + W2 GELU(W1 LN(x)), pinned at W2 = 0."""

    pinned = ("up.weight",)

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + self.up(self.features(x))

    def features(self, x):
        return F.gelu(self.down(self.norm(x)))


class WithFactors(Bottleneck):
    def factors(self, x, delta):
        return (AffineFactors("up.weight", None, delta, self.features(x)),)


x, labels = sample(teacher)
plain, closed = Bottleneck(6, 3), WithFactors(6, 3)
closed.load_state_dict(plain.state_dict())
both = [cg.Candidate("1", plain, name="plain"), cg.Candidate("1", closed, name="closed")]
problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), [(x, labels)], both)
solution = cg.solve(problem, norm=cg.norms.Frobenius())
for name in ("plain", "closed"):
    s = solution.sensitivities[name]
    print(f"{name:7} {s.value:.6f} +- {s.standard_error:.6f}")
by_block, by_factors = (solution.multipliers[name]["up.weight"] for name in ("plain", "closed"))
assert torch.allclose(by_block, by_factors, atol=1e-14)

# independently: the block in the network, and autograd
grown = nn.Sequential(*copy.deepcopy(model))
grown.insert(2, copy.deepcopy(plain))
loss = F.cross_entropy(grown(x), labels)
(gradient,) = torch.autograd.grad(loss, grown[2].up.weight)
assert torch.allclose(by_factors, -gradient, atol=1e-14)


def loss_of_one(weight, x, label):
    logits = torch.func.functional_call(grown, {"2.up.weight": weight}, (x[None],))
    return F.cross_entropy(logits, label[None])


weight = grown[2].up.weight.detach()
single = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(weight, x, labels).flatten(1)
variance = single.var(0).sum().item() / len(x)  # tr Cov of the mean
along = (single @ by_factors.flatten() / by_factors.norm()).std().item() / len(x) ** 0.5
for name in ("plain", "closed"):
    assert np.isclose(solution.sensitivities[name].variance, variance)
    assert np.isclose(solution.sensitivities[name].error_bound, variance**0.5)
    assert np.isclose(solution.sensitivities[name].standard_error, along, rtol=0.25)  # bootstrap

# %% [markdown]
# ## Claim 4. What can go wrong is checked
#
# `check_block(block, x)` tests everything that the library relies on: identity at the pins in both modes, no dead pins, factors that are
# the gradient of every single sample, copying, saving, other precisions, and a complete solve, insert and replay. A block that passes can
# be used; otherwise the error says why not. We break ours in three ways. `check_rule(rule)` does the same for a rule: it must decide about
# the candidates it is shown, also when there are none or all their sensitivities are zero; decide the same when asked twice; and change
# nothing it is given.


# %%
class WrongFactors(Bottleneck):
    def factors(self, x, delta):
        return (
            AffineFactors("up.weight", None, delta, self.down(self.norm(x))),
        )  # the GELU forgotten


class NotIdentity(Bottleneck):
    def forward(self, x):
        return 1.01 * x + self.up(self.features(x))


def dead():
    block = Bottleneck(6, 3)
    nn.init.zeros_(block.down.weight)  # both factors zero: notebook 4
    return block


example = torch.randn(7, 6)
check_block(closed, example)
check_block(plain, example)
for broken in (WrongFactors(6, 3), NotIdentity(6, 3), dead()):
    message = ""
    try:
        check_block(broken, example)
    except cg.BlockError as error:
        message = str(error)
    assert message
    print(message.splitlines()[1][:110], "…")


def forgets_the_names(sensitivities):
    return cg.Decision(("3",), "it was 3 the last time")


check_rule(Significant())
try:
    check_rule(forgets_the_names)
    message = ""
except cg.RuleError as error:
    message = str(error)
assert message
print(message.splitlines()[1].split(">")[-1][:110], "…")

# %% [markdown]
# ## Claim 5. Your own rule and block can do everything that the library's can
#
# Solve, decide, insert without changing the function, save the record, rebuild the architecture, continue training.
#
# Rebuilding happens in *another process*, which knows nothing of our class. Two ways lead there.
#
# * Build the block yourself, and pass it: `cg.replay(model, record, blocks={name: block})`.
# * Give the class a method `config()`, the arguments that build it, and decorate it with `@cg.blocks.register`. Its name and these
#   arguments are then in the record. Registering holds for one process: the class must be in a module that the other process
#   **imports** before it reads the record. Code is never loaded from a record.
#
# So we write a module, use it here, and let a new Python process rebuild the network with it and without it.

# %%
MODULE = '''
import torch.nn.functional as F
from torch import nn
import constrained_growth as cg


@cg.blocks.register
class Adapter(nn.Module):
    """x + W2 GELU(W1 LN(x)), pinned at W2 = 0."""

    pinned = ("up.weight",)

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def config(self):
        return {"width": self.down.in_features, "hidden": self.down.out_features}

    def forward(self, x):
        return x + self.up(self.features(x))

    def features(self, x):
        return F.gelu(self.down(self.norm(x)))

    def factors(self, x, delta):
        return (cg.blocks.AffineFactors("up.weight", None, delta, self.features(x)),)
'''
OTHER_PROCESS = """
from pathlib import Path
import torch
from torch import nn
import constrained_growth as cg

torch.set_default_dtype(torch.float64)
record = cg.GrowthRecord.from_json(Path("record.json").read_text())


def small():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


try:
    cg.replay(small(), record)
except cg.GrowthError as error:
    print("not imported:", type(error).__name__)
import adapters

model = small()
cg.replay(model, record)
weights, x, y = torch.load("saved.pt")
model.load_state_dict(weights)
print("imported:", "the same" if torch.equal(model(x), y) else "another function")
"""
folder = tempfile.TemporaryDirectory()
Path(folder.name, "adapters.py").write_text(MODULE)
sys.path.insert(0, folder.name)
from adapters import Adapter

mixed = [cg.Candidate(site, Adapter(6, 3), name=f"adapter after {site}") for site in ("1", "3")]
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
x, labels = sample(teacher, size=2000)
growing = cg.GrowthProblem(model, nn.CrossEntropyLoss(), [(x, labels)], mixed)
solution = cg.solve(growing, rule=Significant(samples=2000))
print(solution.decision)
before, kept = model(x), copy.deepcopy(model)
record = cg.insert(model, solution, optimizer=optimizer)
assert solution.decision.chosen
assert torch.equal(model(x), before)

with (
    torch.no_grad()
):  # weights as after some training, in which the block is no longer the identity
    state = {name: p + 0.1 * torch.randn(p.shape) for name, p in model.state_dict().items()}
    moved = torch.func.functional_call(model, state, (x,))
Path(folder.name, "record.json").write_text(record.to_json())
torch.save((state, x, moved), Path(folder.name, "saved.pt"))
command = [sys.executable, "-c", OTHER_PROCESS]
answer = subprocess.run(command, cwd=folder.name, capture_output=True, text=True, check=True)
print(answer.stdout)
assert answer.stdout.splitlines() == ["not imported: RecordError", "imported: the same"]
sys.path.remove(folder.name)
folder.cleanup()


def trained(net, optimizer, steps=200):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


with_layer = trained(model, optimizer)
without = trained(kept, torch.optim.Adam(kept.parameters(), lr=0.01))
assert with_layer[0] == without[0]

# %%
fig, ax = plt.subplots(figsize=(5.6, 3.1))
ax.plot(without, "--", color="black", label="twin without the layer")
ax.plot(with_layer, "-", color=BLUE, label="with the adapter")
ax.set_xlabel("Adam steps after the insertion")
ax.set_ylabel("cross-entropy on the sample (nats)")
ax.legend()

# %% [markdown]
# **Figure 2.** One network with the layer and its twin without. Both start at the same loss, because the insertion does not change the
# function. One run of each: an illustration, not evidence that insertion pays in general.
#
# ## Exercises
#
# 1. Write a rule `per_parameter` that chooses the candidate with the largest $\lVert\lambda\rVert^2$ per *new* parameter.
# 2. Write a block `Gate` that multiplies each of `width` features by a number, pinned at 1, with its closed form left out. What is
#    its multiplier, in terms of $x$ and $\delta$?
# 3. In Claim 2, which $z$ does the rule need for 10 candidates at a level of 1 % if the variance is known, and how many samples must
#    there be at least if it is not?


# %%
def check_1(rule):
    make = cg.Sensitivity
    few = {"a": make(1.0, num_new_parameters=10), "b": make(2.0, num_new_parameters=60)}
    assert rule(few).chosen == ("a",)
    assert rule({"b": few["b"]}).chosen == ("b",)
    assert cg.TopK(1)(few).chosen == ("b",)
    print("1: right")


def check_2(block, multiplier):
    """A block for 6 features, and a function (x, delta) -> vector of 6."""
    check_block(block, example)
    (name,) = block.pinned
    site = kept[:2](x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(F.cross_entropy(kept[2:](site), labels), site)
    candidate = cg.Candidate("1", block)
    solved = cg.solve(cg.GrowthProblem(kept, nn.CrossEntropyLoss(), [(x, labels)], [candidate]))
    assert torch.allclose(solved.multipliers["1"][name], multiplier(site, delta), atol=1e-14)
    print("2: right")


def check_3(z, samples):
    ten = {str(i): cg.Sensitivity(z * (1 + 1e-9), error_bound=1.0) for i in range(10)}
    below = {str(i): cg.Sensitivity(z * (1 - 1e-9), error_bound=1.0) for i in range(10)}
    assert Significant(0.01)(ten).chosen
    assert not Significant(0.01)(below).chosen
    enormous = {str(i): cg.Sensitivity(1e9, error_bound=1.0) for i in range(10)}
    assert Significant(0.01, samples)(enormous).chosen
    assert not Significant(0.01, samples - 1)(enormous).chosen
    print("3: right")


# %%
def per_parameter(sensitivities):
    best = max(
        sensitivities.items(), key=lambda item: item[1].value ** 2 / item[1].num_new_parameters
    )
    return cg.Decision((best[0],), "most per parameter")


class Gate(nn.Module):
    pinned = ("gate",)

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gate * x


check_1(per_parameter)
check_2(Gate(6), lambda x, delta: -(delta * x).sum(0))
check_3(z=1000**0.5, samples=1001)

# %% [markdown]
# ## References
#
# * A. W. van der Vaart, *Asymptotic Statistics*, Cambridge University Press, 1998, section 5.5: the score has mean zero.
# * R. R. Bahadur and L. J. Savage, *The nonexistence of certain statistical procedures in nonparametric problems*, Annals of
#   Mathematical Statistics 27, 1956.
# * S. Boucheron, G. Lugosi and P. Massart, *Concentration Inequalities*, Oxford University Press, 2013, section 2.1: Markov's inequality.
# * N. Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019, arXiv 1902.00751: bottleneck adapters with a skip
#   connection, started close to the identity.
# * J. L. Ba, J. R. Kiros and G. E. Hinton, *Layer Normalization*, arXiv 1607.06450, 2016.
