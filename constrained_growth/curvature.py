"""L(θ, v) and its derivatives with one candidate standing at its site, nothing inserted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from constrained_growth._arguments import data_again, flag, instance, positive_int
from constrained_growth._data import counted
from constrained_growth._distributed import add_up, everywhere
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.collector import See, collecting
from constrained_growth._sites.context import Context, arguments
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth._structure import mapped, tensors_in
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.protocol import called_with
from constrained_growth.errors import CandidateError, DataError, RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Planned

__all__ = ["Curvature", "VirtualLoss", "gauss_newton", "hessian", "smallest_eigenvalue"]

FORWARD_PASSES = 1 / 3
"""What a forward pass costs, in gradient passes: backward is two products for each one forward."""

PRODUCT_PASSES = 1.5
"""What a product with a Hessian or Gauss–Newton matrix in v costs at most, in gradient passes."""

JOINT_PRODUCT_PASSES = 3.0
"""The same in (θ, v)."""


def acting(block: nn.Module, layer: Callable[..., Tensor]) -> See:
    """What a layer makes of the tensor at a site, called as a block there would be."""

    def see(x: Tensor, context: Context) -> Tensor:
        args, kwargs = arguments(block, x, context)
        return layer(*args, **kwargs).clone()  # as the model may change it in place

    return see


def stand(
    model: nn.Module, planned: Planned, layer: Callable[..., Tensor]
) -> AbstractContextManager[None]:
    """Let a layer act on the tensor at the site of a candidate."""
    module = model.get_submodule(planned.after)
    see = acting(planned.block, layer)
    return collecting([(planned.after, module, planned.output, see)])


class VirtualLoss:
    """L(θ, v) as a function of the pins of one candidate, the model untouched.

    The block acts on its site by a forward hook, with v added to its pinned parameters for the
    time of a pass; all passes see the same random numbers and batches in the same order. Vectors
    are flat and in float64: v, the pinned parameters one after the other, and with `joint` the
    trainable parameters of the model before them, (θ, v).

    Args:
        problem: The problem.
        planned: The candidate, from `solution.candidates`.
        joint: Differentiate by θ too.
        data: Batches that the means are over; the problem's by default.

    Attributes:
        size: How many entries v has.
        num_old: How many entries of θ come before them; 0 unless `joint`.
        passes: What was spent so far, in gradient passes over these data: a third for a loss, one
            for a gradient, one and a half for a product and three for a joint one.
    """

    def __init__(
        self,
        problem: GrowthProblem,
        planned: Planned,
        *,
        joint: bool = False,
        data: Iterable[Any] | None = None,
    ) -> None:
        instance("problem", problem, GrowthProblem, CandidateError, "a cg.GrowthProblem")
        instance("planned", planned, Planned, CandidateError, "one of solution.candidates")
        flag("joint", joint, CandidateError)
        if data is not None:
            data_again("data", data)
        self._problem = problem
        self._data = problem.data if data is None else data
        self._planned = planned
        self._pins = pinned_parameters(planned.block)
        self._old = [p for p in problem.model.parameters() if p.requires_grad and joint]
        self.size = sum(pin.numel() for pin in self._pins.values())
        self.num_old = sum(p.numel() for p in self._old)
        self.passes = 0.0

    def zero(self) -> Tensor:
        """The vector (θ −) θ₀, v = 0."""
        device = next(iter(self._pins.values())).device
        return torch.zeros(self.num_old + self.size, dtype=torch.float64, device=device)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """The parts of v by pinned parameter, in its shape and dtype."""
        _check_vector("v", v, self.size)
        pieces = v.split([pin.numel() for pin in self._pins.values()])
        return {
            name: piece.view_as(pin).to(pin.dtype)
            for (name, pin), piece in zip(self._pins.items(), pieces, strict=True)
        }

    def __call__(self, v: Tensor) -> float:
        """L(θ, v), the mean over all samples; v of `size` entries."""
        _check_vector("v", v, self.size)

        def one(input: object, target: object) -> Tensor:
            with self._standing(v):  # with gradients on, as a model may take derivatives
                return self._loss(self._output(input), target)

        self.passes += FORWARD_PASSES
        return float(mean_over(self._data, self._problem, one))

    def rounding(self, loss: float) -> float:
        """Differences of losses about as large as this one say nothing below this."""
        return 10 * max(torch.finfo(p.dtype).eps for p in self._pins.values()) * abs(loss)

    def gradient(self) -> Tensor:
        """∇L at v = 0."""

        def one(input: object, target: object, variables: list[Tensor]) -> Tensor:
            loss = self._loss(self._output(input), target)
            return _flat(torch.autograd.grad(loss, variables, materialize_grads=True))

        return self._mean(one, 1.0)

    def hessian_product(self, vector: Tensor) -> Tensor:
        """∇²L at v = 0 times a vector, by differentiating ⟨∇L, vector⟩."""
        pieces = self._split(vector)

        def one(input: object, target: object, variables: list[Tensor]) -> Tensor:
            return _bent(self._loss(self._output(input), target), variables, pieces)

        return self._mean(one, JOINT_PRODUCT_PASSES if self._old else PRODUCT_PASSES)

    def gauss_newton_product(self, vector: Tensor) -> Tensor:
        """Jᵀ (∇² of the loss by the outputs) J times a vector, at v = 0; J = ∂outputs/∂(θ, v).

        Raises:
            RuleError: The loss is linear in the outputs of the model, as where the model returns
                its own loss: then the matrix is zero.
        """
        pieces = self._split(vector)

        def one(input: object, target: object, variables: list[Tensor]) -> Tensor:
            output = self._output(input)
            outputs = [y for y in tensors_in(output) if y.requires_grad]
            if not outputs:
                raise RuleError(
                    f"curvature=gauss_newton: the model's output, a {type(output).__name__}, holds "
                    "no tensor that was found; return a tensor, or a tuple, dict or dataclass of "
                    "tensors, or take curvature=cg.curvature.hessian."
                )
            probes = [torch.zeros_like(y, requires_grad=True) for y in outputs]
            # the derivative of ⟨probes, J vector⟩ by the probes is J vector
            grads = torch.autograd.grad(
                outputs, variables, probes, create_graph=True, materialize_grads=True
            )
            pushed = torch.autograd.grad(
                grads, probes, pieces, retain_graph=True, materialize_grads=True
            )
            cut = {id(y): y.detach().requires_grad_() for y in outputs}
            points = list(cut.values())
            try:
                loss = self._loss(mapped(output, lambda y: cut.get(id(y), y)), target)
            except RuntimeError as error:
                raise RuleError(
                    "curvature=gauss_newton: the loss is no function of the model's outputs alone "
                    f"({error}); take curvature=cg.curvature.hessian."
                ) from error
            slopes = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
            bent = _slopes_of(slopes, points, pushed)
            if bent is None:
                raise RuleError(
                    "curvature=gauss_newton: the loss is linear in the outputs of the model, so "
                    "the matrix is zero; take curvature=cg.curvature.hessian, or let the model "
                    "return its predictions."
                )
            return _flat(torch.autograd.grad(outputs, variables, bent, materialize_grads=True))

        return self._mean(one, JOINT_PRODUCT_PASSES if self._old else PRODUCT_PASSES)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """A vector in the shapes of the variables."""
        _check_vector("vector", vector, self.num_old + self.size)
        *old, v = vector.split([*(p.numel() for p in self._old), self.size])
        return [*(t.view_as(p).to(p.dtype) for t, p in zip(old, self._old, strict=True)), v]

    @contextmanager
    def _standing(self, v: Tensor) -> Iterator[None]:
        """The block at its site, moved by v, also for what backward runs again (checkpointing)."""
        block = self._planned.block
        values = {n: self._pins[n].detach() + d for n, d in self.unflatten(v).items()}

        def moved(*args: Any, **kwargs: Any) -> Tensor:
            return called_with(block, values, args, kwargs)

        # attention is differentiated twice only in its plain form
        with stand(self._problem.model, self._planned, moved), sdpa_kernel(SDPBackend.MATH):
            yield

    def _output(self, input: object) -> Any:
        return call(self._problem.model, input)

    def _loss(self, output: object, target: object) -> Tensor:
        return checked_loss(self._problem.loss_fn(output, target))

    def _mean(self, one: Callable[[Any, Any, list[Tensor]], Tensor], passes: float) -> Tensor:
        """The mean of `one(input, target, variables)` at v = 0, at a cost of so many passes."""

        def at_pins(input: object, target: object) -> Tensor:
            v = torch.zeros_like(self.zero()[self.num_old :], requires_grad=True)
            with self._standing(v):
                return one(input, target, [*self._old, v])

        self.passes += passes
        return mean_over(self._data, self._problem, at_pins, self.zero())


def mean_over(
    data: Iterable[Any],
    problem: GrowthProblem,
    one: Callable[[Any, Any], Tensor],
    like: Tensor | None = None,
) -> Tensor:
    """The mean over all samples of `one(input, target)` of a batch; `like` this, or a number.

    Raises:
        DataError: There are no samples.
    """
    device = device_of(problem.model)
    total = torch.zeros((), device=device) if like is None else torch.zeros_like(like)
    total = total.double()
    count = total.new_zeros(())

    def read() -> None:
        with untouched(problem.model, problem.loss_fn, data), differentiable():
            for input, target, weight in counted(data, device, problem.weight):
                total.add_(one(input, target).detach().to(total), alpha=weight)
                count.add_(weight)

    everywhere(read, problem.group)
    add_up([total, count], problem.group)
    if not count:
        raise DataError(f"data={type(data).__name__} yields no batches; give some (input, target).")
    return total / count


Curvature = Callable[[VirtualLoss, Tensor], Tensor]
"""The product of a symmetric matrix that stands for ∇²L, at v = 0, with a vector."""


def hessian(loss: VirtualLoss, vector: Tensor) -> Tensor:
    """The Hessian itself, indefinite in general, as a `curvature`."""
    return _checked(loss).hessian_product(vector)


def gauss_newton(loss: VirtualLoss, vector: Tensor) -> Tensor:
    """The Gauss–Newton matrix, positive semidefinite for convex losses, as a `curvature`.

    It is Jᵀ (∇² of the loss by the outputs) J: for the cross-entropy the Fisher matrix, for the
    mean squared error 2 JᵀJ / N.
    """
    return _checked(loss).gauss_newton_product(vector)


def smallest_eigenvalue(problem: GrowthProblem, *, max_products: int = 300) -> float:
    """The smallest eigenvalue of ∇²_θθ L(θ, 0), θ the trainable parameters, by Lanczos' method.

    It tells what no status does. At a stationary θ with a positive one θ is a strict local
    minimiser, and −λ is the slope of its value function; with a negative one θ is a saddle, from
    which training goes on downhill, and λ is the price of nothing. About zero, as where units can
    be rescaled or are dead, neither follows.

    Args:
        problem: The problem, left as it is.
        max_products: The most products with the Hessian, each some three gradient passes over the
            data. 300 are enough for most small networks.

    Returns:
        The eigenvalue, in units of the loss over those of θ², to three digits or better.

    Raises:
        RuleError: Nothing is trainable, the model is sharded, or there were not enough products.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, theorem 12.6 (second-order
        sufficiency); Lanczos' method as ARPACK has it, by `scipy.sparse.linalg.eigsh`.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity()).double()
        >>> x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        >>> block = cg.blocks.ResidualMLP(1, 1, torch.tanh)
        >>> problem = cg.GrowthProblem(net, nn.MSELoss(), [(x, x)], [cg.Candidate("0", block)])
        >>> round(smallest_eigenvalue(problem), 3)  # twice the mean of x²
        10.0
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # slow to import

    instance("problem", problem, GrowthProblem, RuleError, "a cg.GrowthProblem")
    positive_int("max_products", max_products, RuleError)
    model, trained = problem.model, [p for p in problem.model.parameters() if p.requires_grad]
    size = sum(parameter.numel() for parameter in trained)
    if is_sharded(model) or not trained:
        fault = "is sharded" if trained else "has no trainable parameters"
        raise RuleError(f"problem: its model {fault}, and so no Hessian that can be asked.")

    def product(vector: Any) -> Any:
        flat = torch.as_tensor(vector, dtype=torch.float64).reshape(-1)
        pieces = flat.split([parameter.numel() for parameter in trained])
        parts = [t.view_as(p).to(p) for t, p in zip(pieces, trained, strict=True)]

        def one(input: object, target: object) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # attention is differentiated twice in no other form
                return _bent(
                    checked_loss(problem.loss_fn(call(model, input), target)), trained, parts
                )

        like = torch.zeros(size, dtype=torch.float64, device=trained[0].device)
        return mean_over(problem.data, problem, one, like).cpu().numpy()

    if size == 1:
        return float(product([1.0])[0])
    make: Any = LinearOperator  # whose stub has not what it takes
    operator = make((size, size), matvec=product, dtype="float64")
    kept = min(size, 20, max(2, max_products))  # vectors between restarts, a product for each
    options: dict[str, Any] = {"ncv": kept, "maxiter": max(1, max_products // kept), "tol": 1e-3}
    options["v0"] = np.random.default_rng(0).standard_normal(size)
    try:
        values = eigsh(operator, k=1, which="SA", return_eigenvectors=False, **options)
    except ArpackNoConvergence as error:
        raise RuleError(
            f"max_products={max_products} were not enough to tell the smallest eigenvalue; give "
            "more, or a smaller network."
        ) from error
    return float(values[0])


def _checked(loss: VirtualLoss) -> VirtualLoss:
    return instance("loss", loss, VirtualLoss, RuleError, "a cg.curvature.VirtualLoss")


def _check_vector(name: str, vector: Tensor, size: int) -> None:
    if not isinstance(vector, Tensor) or vector.shape != (size,):
        got = tuple(vector.shape) if isinstance(vector, Tensor) else f"{vector!r:.80}"
        raise RuleError(f"{name}={got} is no vector of {size} entries; loss.zero() is one.")


def _bent(loss: Tensor, variables: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """The Hessian of a loss times a vector, given in pieces."""
    grads = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
    bent = _slopes_of(grads, variables, pieces)
    return _flat([torch.zeros_like(x) for x in variables] if bent is None else bent)


def _slopes_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """The gradient of ⟨outputs, weights⟩; None where all outputs are constant."""
    pairs = zip(outputs, weights, strict=True)
    if not (live := [(y, w) for y, w in pairs if y.requires_grad]):
        return None
    ys, ws = zip(*live, strict=True)
    return torch.autograd.grad(ys, inputs, ws, materialize_grads=True)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    # an embedding with sparse=True has sparse gradients
    dense = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors)
    return torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in dense])
