# %% [markdown]
# # 9. The source, held to account
#
# The experiments of Herberg et al. (2023) are small and chaotic: one run says little. Here each was run a hundred times, with all
# arms of a run starting from the same network, and every claim was put to the test that a referee would ask for.
#
# At the end you will be able to say
#
# * how to tell how much two programs may differ when only means and medians are known of one of them;
# * why pairs of runs from one start say more than two groups of runs;
# * when inserting lowers the loss against not inserting, and when the learning rate explains the difference;
# * for how many steps the largest sensitivity beats the smallest and a random site, where it loses, and what is left at the end.
#
# Nothing is trained here, and no result is typed in: every number comes from the files in `theory/reproduction`, which
# `constrained-growth reproduce` wrote. Each claim uses one statistic, named where the claim is made.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy import stats

plt.style.use("style.mplstyle")
plt.rcParams.update({"figure.dpi": 80, "font.size": 11})  # the same size, in a smaller file
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9AA5B1"
SPIRALS = ("Exp6", "Exp8", "Exp9", "Exp10", "Exp11", "Exp14", "Exp151", "Exp25")
IMAGES = [
    f"{d}-{n}" for d in ("digits", "mnist1d") for n in ("relu", "residual-outer", "convolution")
]
LEVEL = 0.05

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


for content in found.values():  # every arm of every experiment has all the seeds
    assert {len(arm["final_loss"]) for arm in content["arms"].values()} == {content["seeds"]}

# %% [markdown]
# ## Claim 1. No difference from the source's program was found, and equality is not shown
#
# *Statistic: the mean final loss of ours minus that of the reference, which is the source's code rerun with fixed data handling.*
#
# We know means, medians and numbers of runs of the reference, not the runs. If its runs and ours are draws
# from one population, samples of both sizes drawn from *our* runs differ by chance as much as those two do. The share of such
# draws that differ more is the p-value; no normality is assumed. With many comparisons some p are small by chance, and Benjamini
# and Hochberg (1995) say how small the smallest must be to mean something.
#
# A large p does not show that two programs do the same. Turn the question around: with a margin $m$, the hypothesis to
# reject is that they differ by $m$ or more. Two one-sided tests (TOST; Schuirmann 1987) reject it at $5\,\%$ if and only
# if the $90\,\%$ interval of the difference lies within $(-m, m)$. We take the interval from the same draws, that is, we let the
# reference's population be ours, shifted. The margin is a tenth of $\ln 2$, the loss of a coin: $0.069$ nats.

# %%
MARGIN = np.log(2) / 10
draw = np.random.default_rng(0)
cells = {}
for name in SPIRALS:
    for arm, theirs in found[name]["reference"].items():
        ours = final(name, arm)
        chance = draw.choice(ours, (10_000, theirs["runs"])).mean(1)
        chance -= draw.choice(ours, (10_000, len(ours))).mean(1)
        difference = ours.mean() - theirs["mean"]
        low, high = difference + np.quantile(chance, [0.05, 0.95])
        p = found[name]["agreement"][arm]["mean"]
        cells[name, arm] = difference, low, high, p
        assert abs(p - (np.abs(chance) >= abs(difference)).mean()) < 0.02  # as it was stored
ps = [p for *_, p in cells.values()]
small = [" ".join(cell) for cell, (*_, p) in cells.items() if p < LEVEL]
adjusted = stats.false_discovery_control(ps)
alike = [
    " ".join(cell) for cell, (_, low, high, _) in cells.items() if -MARGIN < low < high < MARGIN
]
reach = {" ".join(cell): max(-low, high) for cell, (_, low, high, _) in cells.items()}
print(
    f"{len(cells)} means, {len(small)} with p < {LEVEL}: {', '.join(small)}; least adjusted p {min(adjusted):.2f}"
)
print(f"equivalent within {MARGIN:.3f} nats, at {LEVEL:.0%} each: {len(alike)}: {', '.join(alike)}")
print(
    f"margin within which half of them are: {np.median(list(reach.values())):.3f}, all: {max(reach.values()):.3f}"
)
assert min(adjusted) > LEVEL  # no difference found
assert len(alike) < len(cells) / 4  # and yet equality is shown for few
assert max(reach.values()) < np.log(2) / 2  # what is excluded in each is a large one

# %% [markdown]
# So with the 10 to 30 runs that there are of the reference, nearly all cells are neither different nor shown to be the same: only
# differences of half a coin's loss are excluded in each. Counts are known too: in how many runs one arm was lower than another.

# %%
counts = [(name, count) for name in SPIRALS for count in found[name]["counts"]]
corrected = stats.false_discovery_control([count["p"] for _, count in counts])
for (name, count), p in zip(counts, corrected, strict=True):
    first, second = count["arms"]
    after = "at the end" if count["after"] is None else f"after {count['after']} epoch(s)"
    ours, theirs = count["ours"] / found[name]["seeds"], count["held"] / count["runs"]
    reversed_here = "   REVERSED" if (ours - 0.5) * (theirs - 0.5) < 0 else ""
    print(
        f"{name:6} {first} lower than {second:5} {after:16} ours {ours:4.0%} of {found[name]['seeds']}, "
        f"reference {theirs:4.0%} of {count['runs']}, p = {count['p']:.2g}, adjusted {p:.2g}{reversed_here}"
    )
differing = [
    (name, c["after"]) for (name, c), p in zip(counts, corrected, strict=True) if p < LEVEL
]
assert differing == [("Exp11", 1), ("Exp14", 1)]

# %% [markdown]
# Two counts differ also after adjustment: after *one* step of the residual networks (Exp11, Exp14) the largest
# sensitivity won in all of our runs, and not in all of the reference's. It computes in single precision, in which losses near $0.6$
# are multiples of $6\cdot10^{-8}$, and half of the differences are below a few of these (below). An effect of rounding, then; Exercise 1
# asks how much of it this takes.
#
# One count is **reversed**: in Exp9 the grown network ended below the kept one in most of our runs, and in the reference in fewer than
# half. The difference is not clear after adjustment; neither is either of the two far from a half.

# %%
spacing = np.spacing(np.float32(0.6))
for name in ("Exp11", "Exp14"):
    protocol, curve = found[name]["protocol"], found[name]["arms"]["LImax"]["curve"]
    loss = curve["median"][protocol["before"] // curve["every"]]
    median = pair(name, "LImax", "LImin", 1)["median"]
    print(
        f"{name}: loss at the insertion {loss:.2f}, median difference after one step {median:.1e} nats"
    )
    assert 0.5 < loss < 1  # where numbers in single precision are this far apart
    assert -5 * spacing < median < 0

# %% [markdown]
# ## Claim 2. Pairs say what groups cannot
#
# All arms of a seed share data, start and order. The difference of two arms, seed by seed, is free of what the starts have in
# common, and its mean has a smaller standard error than that of two independent groups. With $d_i = a_i - b_i$,
#
# $$\operatorname{Var}\bar d = \tfrac1n\bigl(\operatorname{Var}a + \operatorname{Var}b - 2\operatorname{Cov}(a, b)\bigr) .$$

# %%
arms = {
    "N1": ("kept", BLUE, (0, (6, 1.5)), "s"),
    "LImax": ("grown, largest sensitivity", RED, "-", "o"),
    "N2fix": ("deeper from the start", GREEN, "--", "^"),
}
chosen = ("Exp6", "Exp9", "Exp11", "Exp14")
fig, axes = plt.subplots(2, 2, figsize=(9, 4.6), sharex=True, sharey=True)
for ax, name in zip(axes.flat, chosen, strict=True):
    protocol = found[name]["protocol"]
    for number, (arm, (label, colour, line, mark)) in enumerate(arms.items()):
        curve = found[name]["arms"][arm]["curve"]
        epochs = curve["every"] * np.arange(len(curve["median"]))
        ax.fill_between(epochs, curve["low"], curve["high"], color=colour, alpha=0.13, linewidth=0)
        marks = {"marker": mark, "markevery": (4 * number, 14)}
        ax.plot(epochs, curve["median"], color=colour, linestyle=line, label=label, **marks)
    ax.axvline(protocol["before"], color="black", linestyle=":", linewidth=1, label="the insertion")
    ax.set_title(f"{name}, {protocol['family']} {protocol['widths']}", loc="left")
for ax in axes[1]:
    ax.set_xlabel("epochs")
for ax in axes[:, 0]:
    ax.set_ylabel("training loss (nats)")
axes[0, 0].set_ylim(0, None)
fig.legend(*axes[0, 0].get_legend_handles_labels(), ncol=4, loc="upper center")
fig.tight_layout(rect=(0, 0, 1, 0.95))

# %% [markdown]
# **Figure 1.** Training loss over 100 seeds: medians, and bands from quartile to quartile. The bands
# overlap everywhere: they are wide because the starts differ. Whether *inserting* helps is a question about each start.

# %%
for name in SPIRALS:
    a, b = final(name, "LImax"), final(name, "N1")
    groups = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    pairs = (a - b).std(ddof=1) / np.sqrt(len(a))
    stored = pair(name, "LImax", "N1")
    assert np.isclose((a - b).mean(), stored["mean"], atol=1e-6)
    assert np.isclose(stats.wilcoxon(a - b).pvalue, stored["p"], rtol=0.02)
    print(
        f"{name:6} standard error of the mean difference: {groups:.3f} as groups, {pairs:.3f} as pairs"
    )
    assert pairs < groups

# %% [markdown]
# ## Claim 3. Inserting lowers the mean loss in some of these networks, not in all
#
# *Statistic: the mean over seeds of the difference of the final losses, with its $95\,\%$ bootstrap interval.*

# %%
compared = (
    ("LImax", "N1", "grown − kept"),
    ("LImax", "N1lr", "grown − kept,\nsame rates"),
    ("recommended", "N1", "recommended\nhere − kept"),
    ("LImax", "N2lr", "grown − deep,\nsame rates"),
    ("LImax", "LImin", "largest −\nsmallest"),
)
verdicts = {"lower": (BLUE, "v"), "neither": ("black", "D"), "higher": (RED, "^")}  # of means


def verdict(one):
    """Of an interval: all below 0, all above, or neither."""
    low, high = one["interval"]
    return "lower" if high < 0 else "higher" if low > 0 else "neither"


fig, axes = plt.subplots(1, 5, figsize=(9, 3.9), sharex=True, sharey=True)
for ax, (first, second, title) in zip(axes, compared, strict=True):
    for row, name in enumerate(SPIRALS):
        d, one = final(name, first) - final(name, second), pair(name, first, second)
        if one["equal"] == len(d):  # one site only
            continue
        ax.plot(np.quantile(d, [0.05, 0.95]), [row, row], color=GREY, linewidth=5, linestyle="-")
        colour, mark = verdicts[verdict(one)]
        ax.plot(one["interval"], [row, row], color=colour, linewidth=2, linestyle="-")
        ax.plot(one["mean"], row, mark, color=colour, markersize=6, markeredgecolor="white")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(title, loc="left")
    ax.set_xticks((-0.5, 0, 0.5), ("−0.5", "0", "0.5"))
axes[2].set_xlabel("difference of the final training losses (nats)")
axes[0].set_yticks(range(len(SPIRALS)), SPIRALS)
axes[0].invert_yaxis()
handles = [Line2D([], [], color=c, marker=m, label=v) for v, (c, m) in verdicts.items()]
handles += [Line2D([], [], color=GREY, linewidth=5, linestyle="-", label="nine seeds of ten")]
fig.legend(handles=handles, ncol=4, loc="upper center")
fig.tight_layout(rect=(0, 0, 1, 0.94))

# %% [markdown]
# **Figure 2.** Final training loss, one arm minus another: from the 5th to the 95th of a hundred seeds (grey), and the mean with
# its 95 % bootstrap interval (triangle down: clearly lower, up: clearly higher, diamond: neither). Where there is one site, the largest
# sensitivity is the smallest, and no row is drawn. "Same rates": the learning rate changes in both when the one gains a layer.
#
# Inserting lowers the mean loss of networks with one hidden layer (Exp6, Exp8, Exp151), of one residual network (Exp11) and of wider
# layers (Exp25). **Reversed** is Exp14: the grown network ends *above* the kept one. Its learning rate is cut to 0.7 at
# the insertion; against the kept network with the same cut it ends below, and with the rate kept it ends below the kept one too.
# In Exp25 the rate is doubled, and that is most of the difference.
#
# In ReLU [4, 4] (Exp9, Exp10) no difference is clear, and that is not yet "none": the two one-sided tests of Claim 1, now on
# pairs, exclude one of a tenth of $\ln 2$. Smaller ones, of the size that Exp11 has, are not excluded in both.

# %%
outcome = {name: verdict(pair(name, "LImax", "N1")) for name in SPIRALS}
print(outcome)
assert [n for n, v in outcome.items() if v == "lower"] == [
    "Exp6",
    "Exp8",
    "Exp11",
    "Exp151",
    "Exp25",
]
assert [n for n, v in outcome.items() if v == "higher"] == ["Exp14"]
for name in ("Exp6", "Exp8", "Exp11", "Exp14", "Exp151", "Exp25"):
    assert verdict(pair(name, "LImax", "N1lr")) == "lower"
assert verdict(pair("Exp14", "recommended", "N1")) == "lower"
by_rate = 1 - pair("Exp25", "LImax", "N1lr")["mean"] / pair("Exp25", "LImax", "N1")["mean"]
print(f"Exp25: {by_rate:.0%} of the difference by the learning rate alone")
assert found["Exp25"]["protocol"]["factor"] == 2
assert by_rate > 0.5


def smallest_margin(difference):
    """Within which two one-sided t-tests at 5 % find the paired means equivalent."""
    error = stats.sem(difference) * stats.t.ppf(1 - LEVEL, len(difference) - 1)
    return abs(difference.mean()) + error


margins = {
    name: smallest_margin(final(name, "LImax") - final(name, "N1")) for name in ("Exp9", "Exp10")
}
print("smallest margin of equivalence:", {name: round(float(m), 3) for name, m in margins.items()})
assert max(margins.values()) < MARGIN
assert max(margins.values()) > abs(pair("Exp11", "LImax", "N1")["mean"])

# %% [markdown]
# ## Claim 4. The largest sensitivity is right about the next steps, and says little about the end
#
# *Statistic: in how many runs the largest sensitivity gave the lower loss, of those in which the two arms differ, with the exact
# sign test; p-values adjusted for all cells together.*
#
# That is the first-order theorem of notebook 1 and its limit in notebook 7, here in the source's own experiments.

# %%
moments = (1, 10, 100, None)
rows = [n for n in (*SPIRALS, *IMAGES) if pair(n, "LImax", "LImin")["equal"] < found[n]["seeds"]]
tested = {}
for name in rows:
    for other in ("LImin", "random"):
        for after in moments:
            if after is None or after < found[name]["protocol"]["after"]:
                one = pair(name, "LImax", other, after)
                differ = one["runs"] - one["equal"]
                tested[name, other, after] = (
                    one["smaller"],
                    differ,
                    stats.binomtest(one["smaller"], differ).pvalue,
                )
clear = dict(
    zip(
        tested, stats.false_discovery_control([p for *_, p in tested.values()]) < LEVEL, strict=True
    )
)

SHADES = ("white", "#D0E3F1", "#9CC4E0", "#5A9BC9")  # by the share: up to 1/2, 3/4, 0.95 and above
fig, axes = plt.subplots(1, 2, figsize=(9, 0.33 * len(rows) + 1.6), sharey=True)
for ax, other in zip(axes, ("LImin", "random"), strict=True):
    for row, name in enumerate(rows):
        print(f"{name:22} against {other:6}", end="")
        for column, after in enumerate(moments):
            if (name, other, after) not in tested:
                ax.text(column, row, "–", ha="center", va="center", color="black")
                continue
            smaller, differ, _ = tested[name, other, after]
            lower, sure = 2 * smaller > differ, clear[name, other, after]
            fill = SHADES[np.searchsorted((0.5, 0.75, 0.95), smaller / differ)]
            shown = f"{smaller}" if differ > 98 else f"{smaller}/{differ}"
            hatch = "///" if sure and not lower else None
            box = (column - 0.5, row - 0.5), 1, 1
            ax.add_patch(
                Rectangle(*box, facecolor=fill, edgecolor=RED if hatch else "white", hatch=hatch)
            )
            text = ax.text(column, row, shown, ha="center", va="center")
            text.set_fontweight("bold" if sure else "normal")
            if hatch:
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
            print(f"   {smaller:3} of {differ:3}{'*' if sure else ' '}", end="")
        print()
    ax.set_xlim(-0.5, len(moments) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(moments)), ["1", "10", "100", "the end"])
    ax.set_xlabel("epochs after the insertion")
    ax.set_title(f"largest below {'smallest' if other == 'LImin' else 'a random site'}")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
axes[0].set_yticks(range(len(rows)), rows)
ranges = "up to 1/2", "to 3/4", "to 0.95", "above"
handles = [Patch(facecolor=c, edgecolor=GREY, label=r) for c, r in zip(SHADES, ranges, strict=True)]
handles += [Patch(facecolor="white", edgecolor=RED, hatch="///", label="clearly reversed")]
fig.legend(handles=handles, ncol=5, loc="upper center")
fig.tight_layout(rect=(0, 0, 1, 0.95))

# %% [markdown]
# **Figure 3.** In how many runs the largest sensitivity gave the lower loss, of those in which the two arms differ (99 or 100 where nothing is
# said; a random site is often the same site); bold, and with a star in the list, where the sign test has an adjusted p below 0.05. The shade is the
# share; hatched is clearly fewer than half. An epoch is one step on all data in the first four rows, and several steps elsewhere.

# %%
ahead = [key for key, (smaller, differ, _) in tested.items() if clear[key] and 2 * smaller > differ]
behind = [
    key for key, (smaller, differ, _) in tested.items() if clear[key] and 2 * smaller < differ
]
for name, other, after in behind:
    smaller, differ, _ = tested[name, other, after]
    print(f"reversed: {name} against {other}, {after or 'the end'}: lower in {smaller} of {differ}")
for name in (
    "Exp9",
    "Exp10",
    "Exp11",
    "Exp14",
    "Exp25",
):  # the source's data: right about the next steps
    assert {(name, "LImin", 1), (name, "LImin", 10)} <= set(ahead)
assert not {name for name, _, after in behind if name in SPIRALS}
ends = {name for name, other, after in ahead if (other, after) == ("LImin", None)}
assert ends == {n for n in rows if "residual" in found[n]["protocol"]["family"]}
assert {name for name, other, after in behind if (other, after) == ("LImin", None)} == {
    "digits-convolution",
    "mnist1d-relu",
    "mnist1d-convolution",
}

# %% [markdown]
# * **The next steps.** After 1 and 10 epochs the largest sensitivity is ahead of the smallest in all of the source's experiments with
#   several sites. By the count, that is. The *mean* says the opposite for the first step of Exp9: in a few runs the step is too long and
#   the loss jumps. A first-order theorem is about the small step, and so about the many.
# * **The end.** It is still ahead in all four residual networks, and in no other. It is **clearly behind** in the convolutional networks of both image data sets and in the ReLU networks of MNIST-1D: there the layer of the
#   *smallest* sensitivity ends lower. In the others nothing is clear.
# * In ReLU networks of the digits it is behind after 10 epochs, and at the end the site makes little difference at the end: less than a tenth of what inserting gains, by two one-sided
#   tests on pairs.

# %%
first_step = pair("Exp9", "LImax", "LImin", 1)
d = first_step["interval"]
print(
    f"Exp9, one step: lower in {first_step['smaller']} of {first_step['runs'] - first_step['equal']}, "
    f"mean difference {first_step['mean']:+.3f} [{d[0]:+.3f}, {d[1]:+.3f}], median {first_step['median']:+.5f} nats"
)
assert first_step["median_interval"][1] < 0 < d[0]
site = smallest_margin(final("digits-relu", "LImax") - final("digits-relu", "LImin"))
worth = (final("digits-relu", "N1") - final("digits-relu", "LImax")).mean()
print(f"digits-relu: the sites are equivalent within {site:.4f} nats; inserting gains {worth:.4f}")
assert site < worth / 10

# %% [markdown]
# ## Claim 5. Growing saves a little work, and more often than not ends higher
#
# *Statistic: the mean difference of the final losses, as in Claim 3.*
#
# A training step costs three forward passes; small networks are cheap before they grow. Against the grown network from the start,
# for the same number of epochs and with the choice of the site left out, the share saved is
#
# $$\frac{e_{\text{before}}}{e_{\text{before}} + e_{\text{after}}}\cdot\Bigl(1 - \frac{c_{\text{small}}}{c_{\text{grown}}}\Bigr) .$$
#
# The costs $c$ of an epoch are what an arm spent over the epochs it trained. Its worth depends on the final losses of
# the two, and either may be lower.

# %%


def per_epoch(name, arm):
    """Multiply-adds of one epoch of a network that does not grow."""
    content = found[name]
    return content["effort"][arm]["multiply_adds"] / np.mean(content["arms"][arm]["trained"])


saved, ends = {}, {}
for name in SPIRALS:
    content, protocol = found[name], found[name]["protocol"]
    small, grown = per_epoch(name, "N1"), per_epoch(name, "N2fix")
    before, epochs = protocol["before"], protocol["before"] + protocol["after"]
    saved[name] = before / epochs * (1 - small / grown)
    one = pair(name, "LImax", "N2fix")
    ends[name] = verdict(one)
    low, high = one["interval"]
    print(
        f"{name:6} {saved[name]:5.1%} saved; grown − deep {one['mean']:+.3f} [{low:+.3f}, {high:+.3f}]: {ends[name]}"
    )
    # what the grown network really spent: the two rates, early stops, and the choice of the site
    trained = np.array(content["arms"]["LImax"]["trained"])
    two_rates = np.mean(
        small * np.minimum(trained, before) + grown * np.maximum(trained - before, 0)
    )
    choice = content["effort"]["LImax"]["multiply_adds"] - two_rates
    assert 0 < choice < 3 * grown  # the choice costs less than three epochs
print({v: [n for n in SPIRALS if ends[n] == v] for v in verdicts})
assert max(saved.values()) < 0.2
assert sum(v == "higher" for v in ends.values()) > len(SPIRALS) / 2
assert {n for n in SPIRALS if ends[n] == "lower"} == {"Exp9", "Exp10", "Exp25"}

# %% [markdown]
# ## Exercises
#
# 1. Two drops of the loss differ by the median of Exp14 above. Each has an error of its own, normal with standard deviation
#    $\sigma$. For which $\sigma$ is their order right in 80 % of the cases, as in the reference's 16 of 20? How many spacings of
#    single-precision numbers at 0.6 is that?
# 2. Before any run is made: how many pairs does the sign test need at least, to reach p < 0.05 at all (two-sided)?
# 3. Growing saves the share $s$ of the multiply-adds. For the work that the deep network needs for all its epochs, how many times
#    as many epochs may the grown one have, before and after the insertion?

# %%
(count,) = [c for c in found["Exp14"]["counts"] if c["after"] == 1]
DROP, HELD = -pair("Exp14", "LImax", "LImin", 1)["median"], count["held"] / count["runs"]


def check_1(sigma):
    draw = np.random.default_rng(0)
    noise = draw.normal(0, sigma, (200_000, 2))
    right = (DROP + noise[:, 0] - noise[:, 1] > 0).mean()
    assert abs(right - HELD) < 0.005
    print(f"1: right, {sigma / spacing:.1f} spacings")


def check_2(n):
    assert stats.binomtest(n, n).pvalue < 0.05 <= stats.binomtest(n - 1, n - 1).pvalue
    print("2: right")


def check_3(share):
    """A function of s: epochs of the grown network over those of the deep one, same work."""
    for name in SPIRALS:
        small, grown = per_epoch(name, "N1"), per_epoch(name, "N2fix")
        e = found[name]["protocol"]["before"]
        epochs = e + found[name]["protocol"]["after"]
        longer = share(saved[name])
        assert np.isclose(longer * (e * small + (epochs - e) * grown), epochs * grown)
    print("3: right")


# %%
check_1(sigma=DROP / np.sqrt(2) / stats.norm.ppf(0.8))
check_2(6)
check_3(lambda s: 1 / (1 - s))

# %% [markdown]
# ## References
#
# * E. Herberg et al., *Sensitivity-Based Layer Insertion for Residual and Feedforward Neural Networks*, arXiv 2311.15995, 2023.
# * Y. Benjamini and Y. Hochberg, *Controlling the False Discovery Rate*, Journal of the Royal Statistical Society B 57, 1995.
# * D. J. Schuirmann, *A comparison of the two one-sided tests procedure and the power approach for assessing the equivalence of
#   average bioavailability*, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.
# * B. Efron and R. J. Tibshirani, *An Introduction to the Bootstrap*, Chapman & Hall, 1993, chapter 14.
