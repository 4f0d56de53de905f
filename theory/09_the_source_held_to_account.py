# %% [markdown]
# # 9. The source, held to account
#
# The experiments of Herberg et al. (2023) are small and chaotic: one run says little. Here each was run a hundred times, with all
# arms of a run starting from the same network, and every claim was put to the test that a referee would ask for.
#
# At the end you will be able to say
#
# * how to tell whether two programs do the same when only means and medians are known of one of them;
# * for how many steps the largest sensitivity beats the smallest and a random site, and what is left of it at the end;
# * when inserting lowers the loss against not inserting, and when the learning rate explains the difference;
# * why pairs of runs from one start say more than two groups of runs.
#
# Nothing is trained here. The files in `theory/reproduction` were written by `constrained-growth reproduce`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

plt.rcParams["figure.dpi"] = 85  # wide figures in a small file
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9AA5B1"
SPIRALS = ("Exp6", "Exp8", "Exp9", "Exp10", "Exp11", "Exp14", "Exp151", "Exp25")
IMAGES = [
    f"{d}-{n}" for d in ("digits", "mnist1d") for n in ("relu", "residual-outer", "convolution")
]

found = {
    name: json.loads(Path("reproduction", f"{name}.json").read_text(encoding="utf-8"))
    for name in (*SPIRALS, *IMAGES)
}
for name, content in found.items():
    protocol = content["protocol"]
    shape = f"{protocol['family']} {protocol['widths']}"
    epochs = f"{protocol['before']} + {protocol['after']} epochs"
    print(f"{name:22} {shape:26} {epochs:18} {content['seeds']:3} seeds: {content['command']}")


def final(name, arm):
    """Final training loss of each seed, in nats."""
    return np.array(found[name]["arms"][arm]["final_loss"])


def pair(name, first, second, after=None):
    """The first arm's loss minus the second's, seed by seed, so many epochs after the insertion."""
    (one,) = [
        p for p in found[name]["pairs"] if p["arms"] == [first, second] and p["after"] == after
    ]
    return one


assert all(found[name]["seeds"] >= 100 for name in SPIRALS)

# %% [markdown]
# ## Claim 1. Our program does what the source's does
#
# We know means, medians and numbers of runs of the source's code, rerun with fixed data handling. If its runs and ours are draws
# from one population, samples of both sizes drawn from *our* runs differ by chance as much as those two do. The share of such
# draws that differ more is the p-value; no normality is assumed. With many comparisons some p are small by chance, and Benjamini
# and Hochberg (1995) say how small the smallest must be to mean something.

# %%
cells = {
    (name, arm, what): p
    for name in SPIRALS
    for arm, values in found[name]["agreement"].items()
    for what, p in values.items()
    if p is not None
}
adjusted = stats.false_discovery_control(list(cells.values()))
small = [" ".join(cell) for cell, p in cells.items() if p < 0.05]
print(f"{len(cells)} means and medians, {len(small)} with p < 0.05: {', '.join(small)}")
print(f"smallest adjusted p: {adjusted.min():.2f}")
assert adjusted.min() > 0.05

counts = [(name, count) for name in SPIRALS for count in found[name]["counts"]]
for name, count in counts:
    first, second = count["arms"]
    after = "at the end" if count["after"] is None else f"after {count['after']} epoch(s)"
    print(
        f"{name:6} {first} lower than {second} {after:16} {count['ours']:3} of {found[name]['seeds']}, "
        f"reference {count['held']} of {count['runs']}, p = {count['p']:.2g}"
    )

# %% [markdown]
# Means and medians agree. Two of the counts do not: after *one* step of the residual networks (Exp11, Exp14) the largest
# sensitivity won in all of our runs, in the reference in 17 and 16 of 20. The reference computes in single precision, in which
# losses near 0.6 are multiples of $6\cdot10^{-8}$; half of the differences are below a few of these. With `--float32` ours are 83
# and 93 of 100, the others mostly equal: an effect of rounding. Exercise 1 asks how much rounding this takes.

# %%
differences = pair("Exp14", "LImax", "LImin", 1)
print(f"Exp14, median difference after one epoch: {differences['median']:.1e} nats")
assert abs(differences["median"]) < 10 * np.spacing(np.float32(0.6))

# %% [markdown]
# ## Claim 2. Inserting lowers the loss in some of these networks, not in all

# %%
arms = {
    "N1": ("kept", BLUE, "-"),
    "LImax": ("grown, largest sensitivity", RED, "-"),
    "N2fix": ("deeper from the start", GREEN, "--"),
}
chosen = ("Exp6", "Exp9", "Exp11", "Exp14")
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), sharey=True)
for ax, name in zip(axes, chosen, strict=True):
    protocol = found[name]["protocol"]
    for arm, (label, colour, line) in arms.items():
        curve = found[name]["arms"][arm]["curve"]
        epochs = curve["every"] * np.arange(len(curve["median"]))
        ax.fill_between(epochs, curve["low"], curve["high"], color=colour, alpha=0.13, linewidth=0)
        ax.plot(epochs, curve["median"], color=colour, linestyle=line, label=label)
    ax.axvline(protocol["before"], color="black", linestyle=":", linewidth=1)
    ax.set_title(f"{name}, {protocol['family']} {protocol['widths']}", fontsize=7.5, loc="left")
    ax.set_xlabel("epochs")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("training loss (nats)")
axes[0].set_ylim(0, None)
axes[2].legend(frameon=False, fontsize=7, loc="lower left")
fig.tight_layout()

# %% [markdown]
# **Figure 1.** Training loss over 100 seeds: medians, and bands from quartile to quartile; dotted, the insertion. The bands
# overlap everywhere: they are wide because the starts differ. Whether *inserting* helps is a question about each start.
#
# ## Claim 3. Pairs say what groups cannot
#
# All arms of a seed share data, start and order. The difference of two arms, seed by seed, is free of what the starts have in
# common, and its mean has a smaller standard error than that of two independent groups. With $d_i = a_i - b_i$,
#
# $$\operatorname{Var}\bar d = \tfrac1n\bigl(\operatorname{Var}a + \operatorname{Var}b - 2\operatorname{Cov}(a, b)\bigr) .$$

# %%
for name in chosen:
    a, b = final(name, "LImax"), final(name, "N1")
    groups = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    pairs = (a - b).std(ddof=1) / np.sqrt(len(a))
    stored = pair(name, "LImax", "N1")
    assert np.isclose((a - b).mean(), stored["mean"], atol=1e-6)
    assert np.isclose(stats.wilcoxon(a - b).pvalue, stored["p"], rtol=0.02)
    print(
        f"{name:6} standard error of the difference: {groups:.3f} as groups, {pairs:.3f} as pairs"
    )
assert pairs < groups

compared = (
    ("LImax", "N1", "grown − kept"),
    ("LImax", "N1lr", "grown − kept, same rates"),
    ("recommended", "N1", "recommended here − kept"),
    ("LImax", "N2lr", "grown − deep, same rates"),
    ("LImax", "LImin", "largest − smallest"),
)
fig, axes = plt.subplots(1, 5, figsize=(9, 3.1), sharey=True)
for ax, (first, second, title) in zip(axes, compared, strict=True):
    for row, name in enumerate(SPIRALS):
        d, one = final(name, first) - final(name, second), pair(name, first, second)
        if one["equal"] == len(d):  # one site only
            continue
        jitter = row + 0.5 * (stats.rankdata(d) * 0.618 % 1 - 0.5)
        ax.plot(d, jitter, ".", color=GREY, markersize=2.5)
        clear = one["interval"][0] * one["interval"][1] > 0
        colour = "black" if not clear else BLUE if one["mean"] < 0 else RED
        ax.plot(one["interval"], [row, row], color=colour, linewidth=2)
        ax.plot(one["mean"], row, "D", color=colour, markersize=4)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(title, fontsize=7.5, loc="left")
    ax.set_xlim(-0.45, 0.45)
    ax.set_xticks((-0.4, 0, 0.4))
    ax.set_xlabel("difference (nats)", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_yticks(range(len(SPIRALS)), SPIRALS)
axes[0].invert_yaxis()
fig.tight_layout()

# %% [markdown]
# **Figure 2.** Final training loss, one arm minus another: every seed (grey; those beyond 0.45 nats are cut off), the mean with
# its 95 % bootstrap interval (blue: clearly lower, red: clearly higher, black: neither). Where there is one site, the largest
# sensitivity is the smallest, and no row is drawn. "Same rates": the learning rate changes in both when the one gains a layer.
#
# Inserting helps one hidden layer (Exp6, Exp8, Exp151), one residual block (Exp11) and wider layers (Exp25). In ReLU [4, 4] it does
# nothing at this horizon (Exp9, Exp10). In Exp14 the grown network ends *above* the kept one: its learning rate is cut to 0.7 at
# the insertion. Against the kept network with the same cut it ends below, and with the rate kept it ends below the kept one too.
# In Exp25 the rate is doubled, and that alone is most of the difference.

# %%
for name in ("Exp6", "Exp8", "Exp11", "Exp151", "Exp25"):
    assert pair(name, "LImax", "N1lr")["interval"][1] < 0
assert pair("Exp25", "LImax", "N1lr")["mean"] > pair("Exp25", "LImax", "N1")["mean"] / 2
assert pair("Exp9", "LImax", "N1")["interval"][0] < 0 < pair("Exp9", "LImax", "N1")["interval"][1]
assert pair("Exp14", "LImax", "N1")["interval"][0] > 0  # higher,
assert pair("Exp14", "LImax", "N1lr")["interval"][1] < 0  # but for the learning rate lower
assert pair("Exp14", "recommended", "N1")["interval"][1] < 0

# %% [markdown]
# ## Claim 4. The largest sensitivity is right about the next steps, and says little about the end
#
# That is the first-order theorem of notebook 1 and its limit in notebook 7, here in the source's own experiments.

# %%
moments = (1, 10, 100, None)
rows = [n for n in (*SPIRALS, *IMAGES) if pair(n, "LImax", "LImin")["equal"] < found[n]["seeds"]]
fig, axes = plt.subplots(1, 2, figsize=(7.8, 0.27 * len(rows) + 1), sharey=True)
for ax, other in zip(axes, ("LImin", "random"), strict=True):
    for row, name in enumerate(rows):
        print(f"{name:22} against {other:6}", end="")
        for column, after in enumerate(moments):
            if after is not None and after >= found[name]["protocol"]["after"]:
                ax.text(column, row, "–", ha="center", va="center", color=GREY)
                continue
            one = pair(name, "LImax", other, after)
            differ = one["runs"] - one["equal"]
            share, clear = one["smaller"] / differ, one["p"] < 0.05
            colour = plt.get_cmap("RdBu")(0.5 + 0.55 * (share - 0.5))
            ax.add_patch(
                plt.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white")
            )
            ax.text(
                column,
                row,
                f"{one['smaller']} of {differ}",
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if clear else "normal",
            )
            print(f"   {one['smaller']:3} of {differ:3}{'*' if clear else ' '}", end="")
        print()
    ax.set_xlim(-0.5, len(moments) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(moments)), ["1", "10", "100", "the end"])
    ax.set_xlabel("epochs after the insertion")
    ax.set_title(f"largest below {'smallest' if other == 'LImin' else 'a random site'}", fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
fig.tight_layout()

# %% [markdown]
# **Figure 3.** In how many runs the largest sensitivity gave the lower loss, of those in which the two arms differ (a random site is
# often the same site); bold, and with a star in the list, where Wilcoxon's signed-rank test has p < 0.05. Blue is more than half,
# red is less. An epoch is one step on all data in the first four rows, and several steps elsewhere.
#
# On the digits all outcomes occur: in residual networks the largest sensitivity stays ahead to the end, in ReLU networks the site
# makes no difference, in convolutional ones the smallest ends lower.

# %%
for name in ("Exp9", "Exp10", "Exp11", "Exp14"):  # all data at once
    assert pair(name, "LImax", "LImin", 1)["median_interval"][1] < 0
    assert pair(name, "LImax", "LImin", 10)["median_interval"][1] < 0
for name in ("Exp9", "Exp10", "digits-relu"):
    low, high = pair(name, "LImax", "LImin")["interval"]
    assert low < 0 < high
assert pair("digits-residual-outer", "LImax", "LImin")["interval"][1] < 0
assert pair("digits-convolution", "LImax", "LImin")["interval"][0] > 0

# %% [markdown]
# ## Claim 5. It saves a little
#
# A training step costs three forward passes; small networks are cheap before they grow. Against the grown network from the start,
# for the same number of epochs and with the choice of the site left out, the share saved is
#
# $$\frac{e_{\text{before}}}{e_{\text{before}} + e_{\text{after}}}\cdot\Bigl(1 - \frac{c_{\text{small}}}{c_{\text{grown}}}\Bigr) .$$
#
# Its worth depends on the final losses of the two, and either may be lower.

# %%
products = {"Exp6": (20, 45), "Exp9": (32, 48)}  # multiply-adds of one forward pass of one sample
for name, (small, grown) in products.items():
    protocol = found[name]["protocol"]
    share = protocol["before"] / (protocol["before"] + protocol["after"]) * (1 - small / grown)
    mean, (low, high) = (pair(name, "LImax", "N2fix")[key] for key in ("mean", "interval"))
    print(
        f"{name}: {share:.1%} saved; grown ends {mean:+.3f} [{low:+.3f}, {high:+.3f}] nats above the deep one"
    )
    assert abs(share - {"Exp6": 0.135, "Exp9": 0.081}[name]) < 5e-4
assert (
    pair("Exp6", "LImax", "N2fix")["interval"][0]
    > 0
    > pair("Exp9", "LImax", "N2fix")["interval"][1]
)

# %% [markdown]
# ## Exercises
#
# 1. Two drops of the loss near 0.6 nats differ by $3\cdot10^{-7}$. Each has an error of its own, normal with standard deviation
#    $\sigma$. For which $\sigma$ is their order right in 80 % of the cases, as in the reference's 16 of 20? How many spacings of
#    single-precision numbers at 0.6 is that?
# 2. Before any run is made: how many pairs does the sign test need at least, to reach p < 0.05 at all (two-sided)?
# 3. Growing saves the share $s$ of the multiply-adds. For the work that the deep network needs for all its epochs, how many times
#    as many epochs may the grown one have, before and after the insertion?


# %%
def check_1(sigma):
    draw = np.random.default_rng(0)
    noise = draw.normal(0, sigma, (200_000, 2))
    right = (3e-7 + noise[:, 0] - noise[:, 1] > 0).mean()
    assert abs(right - 0.8) < 0.005
    print(f"1: right, {sigma / np.spacing(np.float32(0.6)):.1f} spacings")


def check_2(n):
    assert stats.binomtest(n, n).pvalue < 0.05 <= stats.binomtest(n - 1, n - 1).pvalue
    print("2: right")


def check_3(share):
    """A function of s: epochs of the grown network over those of the deep one, same work."""
    for small, grown, e, epochs in ((20, 45, 450, 1850), (32, 48, 450, 1850)):
        s = e * (grown - small) / (epochs * grown)
        assert np.isclose(share(s) * (e * small + (epochs - e) * grown), epochs * grown)
    print("3: right")


# %%
check_1(sigma=3e-7 / np.sqrt(2) / stats.norm.ppf(0.8))
check_2(6)
check_3(lambda s: 1 / (1 - s))

# %% [markdown]
# ## References
#
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural Networks*, arXiv 2311.15995, 2023.
# * Y. Benjamini and Y. Hochberg, *Controlling the False Discovery Rate*, Journal of the Royal Statistical Society B 57, 1995.
# * F. Wilcoxon, *Individual Comparisons by Ranking Methods*, Biometrics Bulletin 1, 1945.
# * B. Efron and R. J. Tibshirani, *An Introduction to the Bootstrap*, Chapman & Hall, 1993, chapter 14.
