"""`expand`: a pretrained language model gains layers, and they alone learn another text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.blocks import CopiedBlock
from constrained_growth.experiments.data import parted, windows
from constrained_growth.experiments.tables import number, titled
from constrained_growth.experiments.training import Data, Training, learn, mean_loss
from constrained_growth.rules import Rule
from constrained_growth.rules.controls import Where

ASKED, HELD_OUT = 256, 128
"""Pieces of text that λ is measured on, and that losses are, at most."""

_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model")
"""Files of a model folder of which one at least is there if there is a tokenizer."""


class Logits(nn.Module):
    """A causal language model of Transformers, from token ids to logits as losses take them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """(samples, positions) to (samples, tokens, positions)."""
        return self.model(input_ids=ids, use_cache=False).logits.mT


@dataclass(frozen=True)
class Texts:
    """Pieces of the old text and of the new one, each to learn and held out."""

    old: Data
    old_held_out: Data
    new: Data
    new_held_out: Data


@dataclass(frozen=True)
class Pretrained:
    """A model read from a folder, and its tokenizer; without one, texts are read as bytes."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def read(cls, folder: Path) -> Pretrained:
        """In single precision, in eval mode.

        Raises:
            CandidateError: The folder holds no causal language model that Transformers knows.
        """
        if not (folder / "config.json").is_file():
            raise cg.CandidateError(
                f"{folder} is no folder of a model: it has no config.json, which "
                "model.save_pretrained(folder) writes."
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
            has_tokenizer = any(any(folder.glob(name)) for name in _TOKENIZERS)
            tokenizer = (
                AutoTokenizer.from_pretrained(folder, local_files_only=True)
                if has_tokenizer
                else None
            )
        except (ValueError, OSError, KeyError, ImportError) as error:
            why = " ".join(str(error).split())
            raise cg.CandidateError(
                f"{folder} cannot be read as a causal language model of Transformers: {why:.300}"
            ) from error
        return cls(folder, model, tokenizer)

    def tokens(self, file: Path) -> Tensor:
        """The text of a file as numbers of its tokens, or of its bytes.

        Raises:
            DataError: The file cannot be read, or has tokens that the model does not know.
        """
        try:
            content = file.read_bytes()
        except OSError as error:
            raise cg.DataError(f"{file} cannot be read: {error.strerror}.") from error
        embedding: Any = self.model.get_input_embeddings()
        known = len(embedding.weight)
        if self.tokenizer is None:
            if known != 256:
                raise cg.DataError(
                    f"{self.folder} has no tokenizer, so that texts would be read as bytes, and "
                    f"the model knows {known} tokens, not 256; save its tokenizer there: "
                    "tokenizer.save_pretrained(folder)."
                )
            return torch.tensor(list(content))
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise cg.DataError(f"{file} is not in UTF-8: {error.reason}.") from error
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found = torch.tensor(ids, dtype=torch.long)
        if len(found) and int(found.max()) >= known:
            raise cg.DataError(
                f"the tokenizer of {self.folder} makes token {int(found.max())} of {file}, and the "
                f"model knows {known}; it is that of another model."
            )
        return found


def pieces(text: Tensor, length: int, learnt: int, seed: int) -> tuple[Data, Data]:
    """Pieces of nine tenths of a text, and held-out ones of the rest; none overlap.

    At most `learnt` and `HELD_OUT` of them, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    found = list[Data]()
    for part, most in zip(parted(text), (learnt, HELD_OUT), strict=True):
        starts = torch.arange(0, len(part) - length, length)
        order = torch.randperm(len(starts), generator=generator)[:most]
        found.append(windows(part, starts[order], length))
    return found[0], found[1]


def rule_of(where: str, k: int, old: Data, batch: int, seed: int) -> Rule:
    """The rule of a name, or the places of a list of numbers with commas between.

    Raises:
        RuleError: It is neither, or the list has not k different numbers.
    """
    if where == "default":
        return cg.TopK(k)
    if where == "least-important":
        return cg.rules.LeastImportant(batches(old, batch), k)
    if where == "random":
        return cg.Random(k, seed)
    if where in get_args(Where):
        return cg.rules.Placed(cast(Where, where), k)
    try:
        places = dict.fromkeys(int(place) for place in where.split(","))
    except ValueError:
        names = ", ".join(["default", "least-important", "random", *get_args(Where)])
        raise cg.RuleError(
            f"where={where!r} is none of {names}, nor numbers of places such as 1,3."
        ) from None
    if len(places) != k:
        raise cg.RuleError(f"where={where!r} names {len(places)} places for {k} layers.")
    return cg.Fixed(*places)


def batches(data: Data, size: int) -> list[Data]:
    """The data in batches, the last one smaller."""
    return list(zip(*(part.split(size) for part in data), strict=True))


def problem_of(network: Logits, data: Data, batch: int) -> cg.GrowthProblem:
    """A further layer after any layer of a network, whose own weights are frozen by this.

    Raises:
        CandidateError: There is no place for a layer that the class of the model could load.
    """
    network.requires_grad_(False)
    asked = [part[:ASKED] for part in data]
    found = cg.find_candidates(network, asked[0][:2])
    copies = [one for one in found if isinstance(one.block, CopiedBlock)]
    if not copies:
        raise cg.CandidateError(
            f"{type(network.model).__name__} has no layers whose copies can start as the identity "
            f"and which its config counts, as pre-norm layers are:\n{found}"
        )
    return cg.GrowthProblem(
        network, nn.CrossEntropyLoss(), batches((asked[0], asked[1]), batch), copies
    )


def expand(
    folder: Path,
    old: Path,
    new: Path,
    k: int,
    out: Path,
    *,
    where: str = "default",
    training: Training,
    context: int | None = None,
    seed: int = 0,
    on_solved: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Insert k layers, train them alone on the new text, and save the grown model.

    Args:
        folder: Of the model, as `save_pretrained` writes it.
        old: A text of the kind that the model was trained on, to see what it forgets.
        new: The text to learn, its last tenth held out.
        k: How many layers.
        out: An empty folder, or one to be made.
        where: What `rule_of` takes; "default" for the largest sensitivities.
        training: Of the new layers.
        context: Tokens in a piece of text; None for 128, or as many as the model takes.
        seed: Of everything random.
        on_solved: Called with what is known when the places are chosen.

    Returns:
        Places, decision, and the held-out losses before and after, as plain numbers.

    Raises:
        GrowthError: An argument is wrong, a text is too short, there are not k places, or the
            stock class does not load the model that was saved.
    """
    rule_of(where, k, (torch.empty(0), torch.empty(0)), 1, seed)  # refused before any work
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise cg.DataError(f"{out} is there and not empty; give a new folder for the grown model.")
    pretrained = Pretrained.read(folder)
    model, device = pretrained.model, "cuda" if torch.cuda.is_available() else "cpu"
    network = Logits(model).to(device)
    texts, read = _texts(pretrained, old, new, training, context, seed, device)
    problem = problem_of(network, texts.new, training.batch)
    if k > len(problem.candidates):
        raise cg.CandidateError(
            f"{k} layers are too many: there are {len(problem.candidates)} places in this "
            f"{type(model).__name__}, for one layer each."
        )
    rule, last = rule_of(where, k, texts.old, training.batch, seed), len(problem.candidates) - 1
    if isinstance(rule, cg.Fixed) and not {*rule.candidates} <= {*range(last + 1)}:
        raise cg.RuleError(f"where={where!r}: places are numbered from 0 to {last}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cg.DataError(f"{out} cannot be made: {error.strerror}.") from error
    validation = batches(texts.new_held_out, training.batch)
    solution = cg.solve(problem, rule, validation=validation)
    found = {"read": read} | _described(model, solution)
    on_solved(found)
    if len(found["chosen"]) < k:
        raise cg.RuleError(f"{len(found['chosen'])} places for {k} layers: {found['reason']}.")
    before = _losses(network, texts, training.batch)
    record = cg.insert(network, solution)
    network.train()
    with progress_bar(desc="training", unit="step", total=training.steps) as bar:
        learn(network, texts.new, training, seed, bar.update)
    network.eval()
    after = _losses(network, texts, training.batch)
    model.save_pretrained(out)
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save_pretrained(out)
    _check_saved(model, out, texts.new_held_out[0][: training.batch])
    return found | {
        "losses": {name: [before[name], after[name]] for name in before},
        "new_parameters": sum(p.numel() for _, p in record.new_parameters(network)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": training.steps,
        "out": str(out),
    }


def _texts(
    pretrained: Pretrained,
    old: Path,
    new: Path,
    training: Training,
    context: int | None,
    seed: int,
    device: str,
) -> tuple[Texts, str]:
    """The pieces, and in words what was read."""
    limit = getattr(pretrained.model.config.get_text_config(), "max_position_embeddings", None)
    length = min(128, limit or 128) if context is None else context
    if limit is not None and length > limit:
        raise cg.DataError(f"a context of {length} is too long: the model takes {limit} tokens.")
    needed = 1 + max(10 * (2 * length + 1), (training.batch * length + 1) * 10 // 9 + 1)
    found, read = list[Data](), "Read:"
    kind = "tokens" if pretrained.tokenizer is not None else "bytes (there is no tokenizer)"
    for name, file in (("old", old), ("new", new)):
        text = pretrained.tokens(file)
        read += f" {len(text):,} {kind} of the {name} text,"
        if len(text) < needed:
            raise cg.DataError(
                f"the {name} text {file} is too short: it has {len(text):,} tokens, and "
                f"{needed:,} are needed for batches of {training.batch} pieces of {length}; give a "
                "longer one, or a smaller context."
            )
        learnt = max(ASKED, training.steps * training.batch) if name == "new" else ASKED
        found += pieces(text, length, learnt, seed)
    return Texts(*((x.to(device), y.to(device)) for x, y in found)), f"{read[:-1]}."


def first(data: Data, count: int) -> Data:
    """The first few samples."""
    return data[0][:count], data[1][:count]


def _losses(network: nn.Module, texts: Texts, size: int) -> dict[str, float]:
    parts = {"old": texts.old_held_out, "new": texts.new_held_out}
    return {name: mean_loss(network, *data, size) for name, data in parts.items()}


def _check_saved(model: PreTrainedModel, out: Path, ids: Tensor) -> None:
    """Refuse a folder that the stock class reads as another model."""
    stock = Logits(type(model).from_pretrained(out, dtype=torch.float32)).to(ids.device).eval()
    with torch.no_grad():
        difference = float((stock(ids) - Logits(model)(ids)).abs().max())
    if not difference < 1e-3:
        raise cg.RecordError(
            f"{out}: {type(model).__name__}.from_pretrained makes another model of what was "
            f"saved; its logits differ by {difference:.2g}."
        )


def _described(model: PreTrainedModel, solution: cg.Solution) -> dict[str, Any]:
    """Places, decision and how sure, as plain numbers."""
    chosen = {name: solution.sensitivities[name] for name in solution.decision.chosen}
    return {
        "model": type(model).__name__,
        "places": [
            {
                "after": one.site.removeprefix("model."),
                "sensitivity": one.value,
                "standard_error": one.standard_error,
                "effect_size": None if one.held_out is None else one.held_out.effect_size,
                "parameters": one.num_new_parameters,
                "chosen": name in chosen,
            }
            for name, one in solution.sensitivities.items()
        ],
        "chosen": [one.site.removeprefix("model.") for one in chosen.values()],
        "reason": solution.decision.reason,
        "agreement": solution.agreement,
        "helpful": len(cg.rules.Generalizes()(chosen).chosen),
    }


def question(found: dict[str, Any]) -> RenderableType:
    """The table of places, the decision, and how sure it is."""
    headings = ("after", "sensitivity", "effect on held-out text", "parameters", "")
    table = titled(f"Places in {found['model']}", "place", *headings)
    for column in table.columns:  # folded where the terminal is narrow, and never cut off
        column.no_wrap, column.overflow = False, "fold"
    for place, row in enumerate(found["places"]):
        table.add_row(
            str(place),
            row["after"],
            f"{row['sensitivity']:.4g} ± {number(row['standard_error'], '.1g', '?')}",
            number(row["effect_size"], ".2f", "?"),
            f"{row['parameters']:,}",
            "chosen" if row["chosen"] else "",
        )
    table.caption = (
        "Sensitivity: how well what a layer there can supply fits what the loss of the new text "
        "asks for, ± its standard error. Effect: by how many standard deviations of a piece its "
        "first step lowers the loss of held-out text."
    )
    chosen, agreement = found["chosen"], found["agreement"]
    sure = f"{agreement:.0%} of bootstrap samples of the new text lead to the same places; "
    return Group(
        Text(found["read"]),
        table,
        Text(
            f"Decision: {len(chosen)} more, after {', '.join(chosen)} ({found['reason']}).",
            style="bold",
        ),
        Text(
            f"How sure: {sure if agreement == agreement else ''}{found['helpful']} of "
            f"{len(chosen)} clearly lower the loss of held-out new text by their first step.\n"
        ),
    )


def answer(found: dict[str, Any]) -> RenderableType:
    """The losses before and after, and what was done."""
    table = titled("Held-out loss, nats a token", "text", "before", "after")
    for name, (before, after) in found["losses"].items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}")
    one, count = "A copy of one layer was inserted after it", len(found["chosen"])
    added = one if count == 1 else f"{count} copies of layers were inserted after their originals"
    return Group(
        table,
        Text(
            f"{added}. Output projections of new layers started at zero, so that at first the "
            "model computed what it had computed before. "
            f"Of {found['parameters']:,} parameters, the {found['new_parameters']:,} new ones were "
            f"trained on the new text for {found['steps']} step{'s' * (found['steps'] != 1)}; all "
            f"others are unchanged. {found['model']}.from_pretrained({found['out']!r}) loads the "
            "grown model (this was checked)."
        ),
    )
