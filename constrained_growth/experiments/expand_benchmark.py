"""`bench expansion`: where to expand a GPT pretrained on English that is to learn program text.

Every set of places for k further layers is tried, so that a random choice is known exactly, and
low-rank adaptation (LoRA, by `peft`) of as many parameters beside it. Fixed before anything was
run: sizes, steps, the learning rates and what they are tuned on, the arms and the two losses.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import constrained_growth as cg
from constrained_growth._later import with_fields
from constrained_growth.errors import DataError
from constrained_growth.experiments.data import CHARACTERS, text
from constrained_growth.experiments.expand import (
    ASKED,
    Logits,
    Texts,
    first,
    pieces,
    problem_of,
    rule_of,
)
from constrained_growth.experiments.jobs import cached, digest, in_parallel
from constrained_growth.experiments.statistics import Array, paired
from constrained_growth.experiments.tables import interval, tabled
from constrained_growth.experiments.training import Training, learn, mean_loss
from constrained_growth.rules.rule import decide_about

ARMS = ("default", "interleaved", "upper", "middle", "least-important")
"""Rules that `expand` takes; beside them are all places (a random choice), LoRA, and nothing."""

LAYERS, LORA, RANDOM, NOTHING = "layers", "LoRA", "random", "nothing"

MEASURES = ("new", "old")

Places = tuple[int, ...]
"""Numbers of the layers that get another one after them; () for LoRA."""


_FIRST, _THEN = Training(steps=800, batch=16, lr=0.002), Training(steps=120, batch=16, lr=0.0)


@dataclass(frozen=True)
class Plan:
    """Networks, and how they are made and expanded.

    The learning rate of new layers, and that of LoRA, are those of `rates` with the lowest mean
    held-out loss of the new text on `tuned` other networks, with the first of the numbers of layers
    in `added`; new layers stand there as LLaMA-Pro has them, interleaved.
    """

    networks: int = 8
    tuned: int = 2
    added: Sequence[int] = (1, 2)
    depth: int = 4
    width: int = 48
    context: int = 64
    first: Training = _FIRST
    then: Training = _THEN
    rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03)
    workers: int = 2


FULL = Plan()

QUICK = Plan(
    networks=3,
    tuned=1,
    width=16,
    depth=3,
    first=Training(10, 8, 0.002),
    then=Training(4, 8, 0.0),
    rates=(0.003, 0.01),
)


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Expand every network at every set of places and by LoRA, and compare what the rules chose.

    What networks learnt is kept in the folder `cache`: an interrupted run resumes.

    Returns:
        The numbers that `--json` writes: the losses of each arm on each network; by how much the
        first arm's are lower; the mean losses of each set of places; the tuned learning rates.

    Raises:
        DataError: There are fewer than two networks.
    """
    if plan.networks < 2:
        raise DataError(f"networks={plan.networks} of plan: two at least are compared.")
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    others = range(1_000_000 + seed * plan.tuned, 1_000_000 + (seed + 1) * plan.tuned)

    def of_each(function: Any, some: Sequence[int], *arguments: Any) -> list[Any]:
        jobs = [(plan, one, cache, *arguments) for one in some]
        return in_parallel(function, jobs, plan.workers, desc="expansion", unit="network")

    tried = of_each(_tuning, others)
    mean = {kind: np.mean([one[kind] for one in tried], axis=0) for kind in tried[0]}
    rates = {kind: plan.rates[int(losses.argmin())] for kind, losses in mean.items()}
    found = of_each(_of_network, seeds, rates)
    added = {}
    for k in plan.added:
        arms = {
            arm: np.array([one[k]["arms"][arm] for one in found]) for arm in found[0][k]["arms"]
        }
        added[k] = {
            "arms": {name: _row(arms, name) for name in arms},
            "sets": {
                " ".join(map(str, places)): [one[k]["sets"][places] for one in found]
                for places in found[0][k]["sets"]
            },
            "chosen": {arm: [one[k]["chosen"][arm] for one in found] for arm in ARMS},
            "parameters": found[0][k]["parameters"],
        }
    return {
        "added": added,
        "rates": {
            kind: {"losses": mean[kind].tolist(), "chosen": rate} for kind, rate in rates.items()
        },
        "settings": asdict(plan),
    }


def _kinds() -> tuple[str, ...]:
    return (LAYERS, LORA) if importlib.util.find_spec("peft") else (LAYERS,)


def _tuning(plan: Plan, seed: int, cache: Path | None) -> dict[str, list[float]]:
    """For each kind the held-out loss of the new text at each learning rate."""
    subject, k = pretrained(plan, seed, cache), plan.added[0]
    interleaved = tuple((i + 1) * plan.depth // k - 1 for i in range(k))
    return {
        kind: [
            outcome(
                subject,
                interleaved if kind == LAYERS else (),
                k,
                replace(plan.then, lr=lr),
                cache,
            )[0]
            for lr in plan.rates
        ]
        for kind in _kinds()
    }


def _of_network(
    plan: Plan, seed: int, cache: Path | None, rates: Mapping[str, float]
) -> dict[int, dict[str, Any]]:
    """For each number of layers: the losses of every set of places and of every arm."""
    subject = pretrained(plan, seed, cache)
    names, found = list(subject.solution.sensitivities), dict[int, dict[str, Any]]()
    for k in plan.added:
        training = {kind: replace(plan.then, lr=rates[kind]) for kind in _kinds()}
        sets = {
            places: outcome(subject, places, k, training[LAYERS], cache)
            for places in combinations(range(plan.depth), k)
        }
        chosen = {}
        for arm in ARMS:
            rule = rule_of(arm, k, subject.texts.old, plan.then.batch, seed)
            decision = decide_about(rule, subject.problem, subject.solution)
            chosen[arm] = tuple(sorted(names.index(name) for name in decision.chosen))
        arms = {arm: sets[places] for arm, places in chosen.items()}
        arms[RANDOM] = np.mean(list(sets.values()), axis=0).tolist()
        sizes = {LAYERS: k * subject.solution.sensitivities[names[0]].num_new_parameters}
        if LORA in training:
            arms[LORA] = outcome(subject, (), k, training[LORA], cache)
            adapted = with_lora(subject.network, k, seed)
            sizes[LORA] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        arms[NOTHING] = subject.losses(subject.network)
        found[k] = {"arms": arms, "sets": sets, "chosen": chosen, "parameters": sizes}
    return found


@dataclass(frozen=True)
class Subject:
    """A pretrained network, the texts, and the multipliers of a layer at each place."""

    seed: int
    network: Logits
    texts: Texts
    problem: cg.GrowthProblem
    solution: cg.Solution

    def losses(self, network: Logits) -> list[float]:
        """Held-out losses of `MEASURES`."""
        parts = self.texts.new_held_out, self.texts.old_held_out
        return [mean_loss(network, *part) for part in parts]


def pretrained(plan: Plan, seed: int, cache: Path | None) -> Subject:
    """A GPT-2 that has learnt English."""
    config = GPT2Config(
        vocab_size=CHARACTERS,
        n_positions=plan.context,
        n_embd=plan.width,
        n_layer=plan.depth,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Logits(GPT2LMHeadModel(config)).eval()
    english, program = (
        pieces(text(name), plan.context, max(ASKED, training.steps * training.batch), seed)
        for name, training in (("english", plan.first), ("program", plan.then))
    )
    key = digest(f"pretrained-{seed}", repr(plan.first), *network.parameters(), *english[0])

    def state() -> dict[str, Tensor]:
        learn(network, english[0], plan.first, seed)
        return network.model.state_dict()

    network.model.load_state_dict(cached(cache, key, state))
    texts = Texts(first(english[0], ASKED), english[1], *program)
    problem = problem_of(network, texts.new, plan.then.batch)
    return Subject(seed, network, texts, problem, cg.solve(problem, cg.Fixed()))


def outcome(
    subject: Subject, places: Places, k: int, training: Training, cache: Path | None
) -> list[float]:
    """The held-out losses after training new layers, or LoRA of the size of k layers."""

    def trained() -> list[float]:
        network = _grown(subject, places) if places else with_lora(subject.network, k, subject.seed)
        learn(network, subject.texts.new, training, subject.seed)
        return subject.losses(network)

    settings = repr((training, places, k, subject.seed))
    texts = (*subject.texts.new, *subject.texts.new_held_out, *subject.texts.old_held_out)
    return cached(
        cache, digest("expansion", settings, *subject.network.parameters(), *texts), trained
    )


def _grown(subject: Subject, places: Places) -> Logits:
    """With layers at these places, and all others frozen."""
    network, names = copy.deepcopy(subject.network), list(subject.solution.sensitivities)
    decision = cg.Decision(tuple(names[place] for place in places))
    cg.insert(network, with_fields(subject.solution, decision=decision))
    return network


def with_lora(network: Logits, k: int, seed: int) -> Logits:
    """With low-rank adapters at all linear layers, of about as many parameters as k layers."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(network.model)
    layers: Any = model.get_submodule("transformer.h")
    size = sum(p.numel() for p in layers[0].parameters())
    each = sum(sum(m.weight.shape) for m in layers.modules() if isinstance(m, Conv1D))
    rank = max(1, round(k * size / each))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # of Transformers, to peft
        return Logits(get_peft_model(model, config)).eval()


def _row(arms: Mapping[str, Array], name: str) -> dict[str, Any]:
    """Losses of an arm on each network, and how those of the first arm differ from them."""
    row: dict[str, Any] = {}
    for i, measure in enumerate(MEASURES):
        first, mine = arms[ARMS[0]][:, i], arms[name][:, i]
        row[measure] = mine.tolist()
        row[f"{measure}_difference"] = asdict(paired(first, mine))
    return row


def tables(found: Mapping[str, Any]) -> RenderableType:
    """How to read it, the arms, the places, and the learning rates."""
    plan, added = found["settings"], found["added"]
    first, then = plan["first"], plan["then"]
    tuned = [
        (kind, {f"lr {r:g}": f"{x:.4f}" for r, x in zip(plan["rates"], row["losses"], strict=True)})
        for kind, row in found["rates"].items()
    ]
    return Group(
        Text(
            f"{plan['networks']} GPT-2 of width {plan['width']} and context {plan['context']}, on "
            f"characters; {first['steps']} steps of {first['batch']} pieces of English (Python's "
            f"help), then {then['steps']} of {then['batch']} pieces of program text (Python's "
            "modules) with old weights frozen.\n"
        ),
        Text(
            "Held-out losses in nats a character, of the new text and of the old one (forgetting); "
            f"beside them by how much those of “{ARMS[0]}” are above them on the same networks: "
            "mean, 95 % bootstrap interval, p of Wilcoxon's signed-rank test, two-sided. "
            "“random” is the mean over all sets of places.\n"
        ),
        *([] if LORA in found["rates"] else [Text(_NO_LORA)]),
        *(_of_arms(k, plan["depth"], one) for k, one in added.items()),
        *(_of_places(k, one) for k, one in added.items()),
        tabled("Tuning: new held-out loss", "", tuned),
    )


_NO_LORA = "No LoRA: peft is not installed. pip install 'constrained-growth[peft]'\n"


def _of_arms(k: int | str, depth: int, one: Mapping[str, Any]) -> Table:
    rows = []
    for arm, row in one["arms"].items():
        cells = dict[str, str]()
        for measure in MEASURES:
            of = row[f"{measure}_difference"]
            cells |= {
                f"{measure} loss": f"{np.mean(row[measure]):.4f}",
                f"{ARMS[0]} − it, {measure}": interval(of["mean"], *of["interval"], form=".4f"),
                f"p, {measure}": f"{of['p']:.2g}",
            }
        sets = [" ".join(map(str, places)) for places in one["chosen"].get(arm, ())]
        often = [f"{sets.count(places)}× {places}" for places in sorted(set(sets))]
        rows.append((arm, cells | {"places": ", ".join(often)}))
    sizes = ", ".join(f"{kind} {size:,}" for kind, size in one["parameters"].items())
    return tabled(f"{k} more of {depth} layers; parameters: {sizes}", "arm", rows)


def _of_places(k: int | str, one: Mapping[str, Any]) -> Table:
    means = {places: np.mean(losses, axis=0) for places, losses in one["sets"].items()}
    rows = [
        (places, {m: f"{loss:.4f}" for m, loss in zip(MEASURES, mean, strict=True)})
        for places, mean in means.items()
    ]
    return tabled(f"{k} more: mean losses by place", "after layers", rows)
