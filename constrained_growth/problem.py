"""The constrained problem: min L(θ, v) subject to v = 0 for every candidate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import data_again, function, instance
from constrained_growth._data import Weight
from constrained_growth._distributed import everywhere, several
from constrained_growth._first_batch import Places, look_at_sites
from constrained_growth._sharding import check_sharding
from constrained_growth._sites.model import check_has_values
from constrained_growth._sites.outputs import Which
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.copied import listed_form
from constrained_growth.bookkeeping import Books, open_books
from constrained_growth.candidates.candidate import Candidate, Proposals
from constrained_growth.errors import CandidateError, DataError
from constrained_growth.solution import Constraint, listed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GrowthProblem:
    """A model, a loss, data, and the layers that could be inserted, all pinned to nothing.

        min over θ, v of L(θ, v)   subject to   v_c = 0 for every candidate c

    L is the mean of the loss over all samples of the data, θ the model's parameters, v_c the
    deviation of the pinned parameters of candidate c from the values at which its block is the
    identity. Making a problem runs the model once, on the first batch, and checks everything
    there is to check; it changes nothing. What the model and the loss keep from batch to batch
    (buffers, attributes, metrics) goes on through a pass and is put back after it.

    Args:
        model: Any `nn.Module`. It is measured in the mode (train or eval) it is in: Dropout and
            BatchNorm then act as they do there, and buffers and random state are put back.
        loss_fn: `loss_fn(output, target)`, a scalar tensor that is the mean over the samples of
            a batch (a sum is taken for a mean, and gives λ times the batch size). Over what a
            loss averages inside a batch is its own affair: samples, tokens, those that a mask
            leaves. L is the mean of these means, each counted with its `weight`. It may be made
            of all of `model.parameters()` (weight decay): then it is made of those of a new layer
            too, and where that changes λ it is refused.
            For a model that returns its own loss, take it from the output:
            `lambda output, target: output.loss`.
        data: An iterable of `(input, target)` that can be iterated more than once: a DataLoader,
            a list of batches. An input may be a tensor, a tuple (spread as arguments) or a dict
            (spread as keyword arguments; where a loader yields dicts with the target in them,
            make pairs `(batch, None)` of it). Anything else, such as a named tuple, a list or a
            dataclass, is one argument, of the type that the loader made. The first dimension of
            its first tensor counts the samples (in a `PackedSequence` the sequences do), and the
            tensors at the sites are taken to have the samples in front too: that matters for the
            standard errors. Batches are moved to the model's device.
        candidates: `Candidate`s with unique names; several may share a site. A site whose module
            runs several times in one forward pass, as shared ones do, counts at each of its uses,
            as the layer would be used each time once it stands there: λ is the sum over them. A
            batch that does not pass it (an idle expert) counts with λ = 0.
            What is compiled is measured as it is written; names are understood with and without
            `torch.compile`'s "_orig_mod.".
        group: The processes that have a shard of the data each, all that `torch.distributed` was
            initialised with by default. Each of them makes the problem and calls `solve`, and
            gets the same answer, that of all the data; an error on one is an error on all. The
            model must be the same everywhere, the values of the blocks are taken from the first
            process, and a shard may be empty. The forward of a DistributedDataParallel is passed
            over, as it waits for the other processes. A model sharded by `fully_shard` (FSDP2)
            runs on all of them at once: there each needs a batch at least, and one that has
            fewer than another repeats its last one, which does not count. After `insert` call
            `rewrap` in both cases.
        weight: `weight(input, target)`, over how many items the loss of that batch is the mean:
            None (default) for its number of samples. Where the loss leaves some out, say
            `weight=lambda input, target: (target != -100).sum()` for a cross-entropy with
            `ignore_index=-100`, so that L is the mean over all tokens that count, however they
            are batched. A batch of weight 0 is passed over.

    Attributes:
        model, loss_fn, data, candidates, group, weight: As given (the candidates as a tuple).
        constraints: The pins, one `Constraint` for each pinned parameter.
        example: The input of the first batch, on the model's device; None without one here.
        method: How λ will be computed: in closed form from two tensors at each site, if that is
            right on the first batch, and else by autograd through the blocks. A later batch may
            show that it is not (its loss has derivatives of the output in it, say): then `solve`
            measures again, and this says so.
        graphs: How many nodes autograd makes of the batches looked at so far: the first, and each
            later one of another number, four in all.

    Raises:
        CandidateError: No candidates, a repeated name, an unknown site, or a site that is never
            reached, is no floating-point tensor, or does not bear on the loss; or a model that
            is sharded, waits for other processes, or is checkpointed with `use_reentrant=True`.
        BlockError: A block does not fit its site, is not the identity on the data, or has
            multipliers that vanish identically.
        DataError: The data is empty, one-shot or malformed, or the loss is not a finite scalar.

    Example:
        >>> import torch
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> problem.constraints[0]
        Constraint(candidate='1', parameter='weight', shape=(4, 4))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[Any],
        candidates: Sequence[Candidate],
        *,
        group: ProcessGroup | None = None,
        weight: Weight = None,
    ) -> None:
        everywhere(lambda: _check_arguments(model, loss_fn, data, weight, group), group)
        everywhere(lambda: _refuse_bound(model, group), group)
        self.model = model
        self.loss_fn = loss_fn
        self.data = data
        self.candidates = checked_candidates(candidates)
        self.group = group
        self.weight = weight
        places = places_of(model, self.candidates)
        with untouched(model, loss_fn, data), differentiable():
            books = open_books(model)  # of which proposals were asked already
            listed = listed_elements(books, places, known=isinstance(candidates, Proposals))
            self.sites, self.example, self.method, self.graphs = look_at_sites(
                model, loss_fn, data, places, group, weight, books, listed
            )
        _warn_of_unseen(model, self.sites)
        self.constraints = tuple(
            Constraint(candidate.name, name, tuple(parameter.shape))
            for candidate in self.candidates
            for name, parameter in pinned_parameters(candidate.block).items()
        )

    def __repr__(self) -> str:
        names = listed(candidate.name for candidate in self.candidates)
        return f"GrowthProblem({type(self.model).__name__}, candidates: {names})"


def listed_elements(books: Books, places: Places, *, known: bool) -> dict[str, bool]:
    """The candidates that could be next elements of their lists, and whether the books count them.

    Those that the books cannot keep are refused, unless they are `known` to be kept.
    """
    found = dict[str, bool]()
    for site, every in places:
        counted = bool(books.counts(site.after))
        for each in every:
            if not books.can_list(site.after, each.block, each.output, wrapped=each.wrapped):
                continue
            found[each.name] = counted
            ask = counted and not known
            refusal = books.refusal(site.after, listed_form(each.block)[0]) if ask else None
            if refusal is not None:
                raise CandidateError(f'"{each.name}" cannot follow "{site.after}": {refusal}')
    return found


def _warn_of_unseen(model: nn.Module, sites: Iterable[Site]) -> None:
    """Warn of modules that normalise by statistics of nothing: mean 0 and variance 1."""
    blocks = [(name, block) for site in sites for name, block in site.blocks.items()]
    unseen = {
        "candidates": [name for name, block in blocks if any(map(_is_unseen, block.modules()))],
        "model": [name for name, module in model.named_modules() if _is_unseen(module)],
    }
    for owner, names in unseen.items():
        if names:
            warnings.warn(
                f"{owner}, {names}: in eval mode, and the running statistics of their BatchNorm "
                "have seen no data, so that λ is that of a network which does not normalise. "
                "For λ of one that does, call model.train() before making the problem.",
                stacklevel=3,
            )


def _is_unseen(module: nn.Module) -> bool:
    mean, variance = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
    if module.training or not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


def _refuse_bound(model: nn.Module, group: ProcessGroup | None) -> None:
    """Refuse a model whose forward waits for other processes in an unsupported way."""
    check_sharding(model, group)
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and several(group):
            raise CandidateError(
                f'model: "{name}" is a SyncBatchNorm in train mode, whose forward waits for other '
                "processes, which may have fewer batches. Measure in eval mode: model.eval(), or "
                "give all the data to a problem with a group of one process."
            )


def _check_arguments(
    model: nn.Module, loss_fn: object, data: object, weight: object, group: object
) -> None:
    instance("model", model, nn.Module, CandidateError, "an nn.Module")
    check_has_values(model)
    function("loss_fn", loss_fn, DataError, "nn.CrossEntropyLoss()")
    if weight is not None:
        function("weight", weight, DataError, "lambda input, target: len(target), or None")
    data_again("data", data)
    if group is not None and not callable(getattr(group, "rank", None)):
        raise DataError(f"group={group!r:.80} is no ProcessGroup; use torch.distributed.new_group.")


def checked_candidates(candidates: object) -> tuple[Candidate, ...]:
    """The candidates, if they are some, each of a name of its own."""
    if isinstance(candidates, Candidate):
        raise CandidateError("candidates is a single Candidate; give a list: [candidate].")
    if not isinstance(candidates, Iterable) or isinstance(candidates, str | Mapping):
        raise CandidateError(f"candidates={candidates!r} is not a sequence of cg.Candidate.")
    found = tuple(candidates)
    if not found:
        raise CandidateError("candidates is empty; give some, or cg.find_candidates(model, input).")
    names = set[str]()
    for candidate in found:
        instance("candidates", candidate, Candidate, CandidateError, "cg.Candidate each")
        if candidate.name in names:
            raise CandidateError(
                f'candidates: the name "{candidate.name}" occurs twice; give candidates that '
                "share a site names of their own: cg.Candidate(after=..., block=..., name=...)."
            )
        names.add(candidate.name)
    return found


def places_of(model: nn.Module, candidates: Sequence[Candidate]) -> Places:
    """The candidates by their sites; a module of several names has the first of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [n for n, m in modules.items() if isinstance(m, nn.TransformerEncoderLayer)]
    found: dict[tuple[str, Which], tuple[Site, list[Candidate]]] = {}
    for candidate in candidates:
        name = _name_in(modules, candidate.after)
        if not name:
            known = ", ".join(list(modules)[1:13]) + ", …" * (len(modules) > 13)
            raise CandidateError(
                f'after="{candidate.after}" of candidate "{candidate.name}" is no submodule of '
                f"{type(model).__name__}; its submodules are {known}."
            )
        if any(name.startswith(f"{layer}.") for layer in inside):
            raise CandidateError(
                f'after="{candidate.after}" lies inside an nn.TransformerEncoderLayer, which in '
                "eval mode passes its submodules by; choose the encoder layer itself."
            )
        # a shared module has several names and is one site, where λ is the sum over its uses
        module = modules[name]
        if isinstance(module, torch.jit.ScriptModule):
            raise CandidateError(
                f'after="{name}" is compiled by torch.jit.script, and nothing can be put in there; '
                "grow the model as it is written, and script it afterwards."
            )
        first = next(key for key, same in modules.items() if same is module)
        # taken to change the tensor in place and to need the context, until more is known
        site = Site(first, module, candidate.output, {}, (), torch.device("cpu"), True, True)
        found.setdefault((first, candidate.output), (site, []))[1].append(candidate)
    return list(found.values())


def _name_in(modules: Mapping[str, nn.Module], after: str) -> str:
    """The name in a model of what is meant, with or without `torch.compile`'s "_orig_mod.".

    Of a compiled module it is that of the compiled one, after whose output a layer is reached.
    """

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part != "_orig_mod")

    return next((name for name in modules if plain(name) == plain(after)), "")
