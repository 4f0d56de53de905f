"""Norms of multipliers: against CVXPY, NumPy, real optimizers and the axioms."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.norms import (
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    Norm,
    Nuclear,
    PerParameter,
    SecondMoments,
    Spectral,
    needs_moments,
    norm_for,
)

OUT, IN, SAMPLES = 3, 4, 40
Array = NDArray[np.floating]


def samples(seed: int, n: int = SAMPLES, out: int = OUT, width: int = IN) -> tuple[Tensor, Tensor]:
    """Correlated features with a mean, and cotangents that depend on them."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    features = normal(n, width) @ normal(width, width) + normal(width)
    return features, torch.tanh(features) @ normal(width, out) + normal(n, out)


def multiplier_of(features: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """λ_W = −mean ψφᵀ, λ_b = −mean ψ."""
    return {
        "weight": -cotangents.T @ features / len(features),
        "bias": -cotangents.mean(0),
    }


Order = Literal["fro", "nuc"]


def kronecker_fisher(
    features: Tensor, cotangents: Tensor, damping: float = 0.0, order: Order = "fro"
) -> float:
    """The norm of the multiplier of these samples, moments collected from the same ones."""
    moments = {"weight": SecondMoments.of(features, cotangents, "bias")}
    norm = KroneckerFisher(damping, ord=order)
    return float(norm(multiplier_of(features, cotangents), moments))


def random_multiplier(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    return {"weight": normal(OUT, IN), "bias": normal(OUT)}


MOMENTS = {"weight": SecondMoments.of(*samples(7), "bias")}
FISHER: Norm = partial(KroneckerFisher(), moments=MOMENTS)
NORMS: dict[str, Norm] = {
    "frobenius": Frobenius(),
    "per-parameter": PerParameter(),
    "entrywise-1": Entrywise1(),
    "spectral": Spectral(),
    "nuclear": Nuclear(),
    "kronecker-fisher": FISHER,
    "kronecker-fisher-nuclear": partial(KroneckerFisher(ord="nuc"), moments=MOMENTS),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


# --- the dual relation: max ⟨λ, s⟩ over the primal ball, by CVXPY ---------------------------


def entries(w: cp.Variable, b: cp.Variable) -> cp.Expression:
    return cp.hstack([cp.vec(w, order="F"), b])


def fisher(damping: float) -> Array:
    """A ⊗ G assembled entry by entry."""
    return np.kron(*damped_moments(damping))


def with_one(moments: SecondMoments) -> Tensor:
    """E[φ̃ φ̃ᵀ] of φ̃ = (φ, 1)."""
    assert moments.mean is not None
    mean = moments.mean[:, None]
    return torch.cat(
        [torch.cat([moments.features, mean.T]), torch.cat([mean, mean.new_ones(1, 1)])], 1
    )


def damped_moments(damping: float) -> list[Array]:
    """A of (φ, 1) and G, damped as the docstring says."""
    moments = with_one(MOMENTS["weight"]).numpy(), MOMENTS["weight"].cotangents.numpy()
    pairs = zip(moments, sizes_of(MOMENTS["weight"]), strict=True)
    return [moment + damping * np.diag(sizes) for moment, sizes in pairs]


def sizes_of(moments: SecondMoments) -> tuple[Array, Array]:
    """The mean squares in whose proportion features, with a 1 behind, and outputs are damped."""
    features, outputs = (
        m.double().numpy().diagonal() for m in (moments.features, moments.cotangents)
    )
    return np.append(np.full_like(features, features.mean()), 1.0), np.full_like(
        outputs, outputs.mean()
    )


def fisher_length(w: cp.Variable, b: cp.Variable) -> cp.Expression:
    return cp.norm(np.linalg.cholesky(fisher(KroneckerFisher().damping)).T @ entries(w, b))


def largest_whitened(w: cp.Variable, b: cp.Variable) -> cp.Expression:
    """The largest singular value of Cᵀ[w, b]D with G = CCᵀ and A = DDᵀ."""
    a, g = (np.linalg.cholesky(m) for m in damped_moments(KroneckerFisher().damping))
    return cp.sigma_max(g.T @ cp.hstack([w, cp.reshape(b, (OUT, 1), order="F")]) @ a)


PRIMAL: dict[str, Callable[[cp.Variable, cp.Variable], cp.Expression]] = {
    "frobenius": lambda w, b: cp.norm(entries(w, b)),
    "per-parameter": lambda w, b: (OUT * IN + OUT) ** 0.5 * cp.norm(entries(w, b)),
    "entrywise-1": lambda w, b: cp.norm_inf(entries(w, b)),
    "spectral": lambda w, b: cp.normNuc(w) + cp.norm(b),
    "nuclear": lambda w, b: cp.maximum(cp.sigma_max(w), cp.norm(b)),
    "kronecker-fisher": fisher_length,
    "kronecker-fisher-nuclear": largest_whitened,
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NORMS)
def test_dual_relation(name: str, seed: int) -> None:
    multiplier = random_multiplier(seed)
    w, b = cp.Variable((OUT, IN)), cp.Variable(OUT)
    gain = cp.vdot(multiplier["weight"].numpy(), w) + cp.vdot(multiplier["bias"].numpy(), b)
    problem = cp.Problem(cp.Maximize(gain), [PRIMAL[name](w, b) <= 1])
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == cp.OPTIMAL
    assert float(NORMS[name](multiplier)) == pytest.approx(problem.value, rel=1e-6)


@every_norm
def test_dual_relation_bounds_every_step(norm: Norm, request: pytest.FixtureRequest) -> None:
    """Hölder: ⟨λ, s⟩ ≤ ‖λ‖_* ‖s‖ for any step, the primal norm again from CVXPY's atoms."""
    primal = PRIMAL[request.node.callspec.id]
    for seed in range(20):
        multiplier, step = random_multiplier(seed), random_multiplier(1000 + seed)
        w, b = cp.Variable((OUT, IN)), cp.Variable(OUT)
        w.value, b.value = step["weight"].numpy(), step["bias"].numpy()
        gain = sum(float((multiplier[name] * step[name]).sum()) for name in step)
        length = np.asarray(primal(w, b).value).item()
        assert abs(gain) <= float(norm(multiplier)) * length + 1e-12


# --- norm axioms ----------------------------------------------------------------------------

entry = st.floats(-100, 100).map(lambda value: round(value, 3))
tensors = st.builds(
    lambda w, b: {"weight": torch.from_numpy(w), "bias": torch.from_numpy(b)},
    arrays(np.float64, (OUT, IN), elements=entry),
    arrays(np.float64, (OUT,), elements=entry),
)
axiom = settings(max_examples=20, deadline=None, derandomize=True)


@every_norm
@axiom
@given(multiplier=tensors, factor=st.floats(-10, 10))
def test_homogeneous(norm: Norm, multiplier: dict[str, Tensor], factor: float) -> None:
    scaled = {name: factor * tensor for name, tensor in multiplier.items()}
    expected = abs(factor) * float(norm(multiplier))
    assert float(norm(scaled)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@every_norm
@axiom
@given(first=tensors, second=tensors)
def test_triangle_inequality(
    norm: Norm, first: dict[str, Tensor], second: dict[str, Tensor]
) -> None:
    both = {name: first[name] + second[name] for name in first}
    bound = float(norm(first)) + float(norm(second))
    assert float(norm(both)) <= bound * (1 + 1e-12) + 1e-12


@every_norm
@axiom
@given(multiplier=tensors)
def test_zero_only_at_zero(norm: Norm, multiplier: dict[str, Tensor]) -> None:
    zero = {name: torch.zeros_like(tensor) for name, tensor in multiplier.items()}
    assert float(norm(zero)) == 0
    if any(bool(tensor.any()) for tensor in multiplier.values()):
        assert float(norm(multiplier)) > 0


# --- shapes and precisions ------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "order"), [(Spectral(), 2), (Nuclear(), "nuc")])
def test_several_tensors_are_one_block_diagonal_matrix(
    norm: Norm, order: Literal[2, "nuc"]
) -> None:
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 2, 2, generator=draw, dtype=torch.float64)
    bias, scale = kernel[0, 0, 0].clone(), torch.tensor(-0.5, dtype=torch.float64)
    joint = torch.block_diag(kernel.flatten(1), bias[:, None], scale[None, None])
    expected = float(np.linalg.norm(joint.numpy(), order))
    found = float(norm({"kernel": kernel, "bias": bias, "scale": scale}))
    assert found == pytest.approx(expected, rel=1e-12)


@every_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_a_value_and_not_an_exception(norm: Norm, value: float) -> None:
    multiplier = random_multiplier(0)
    multiplier["weight"][0, 0] = value
    assert not np.isfinite(float(norm(multiplier)))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(norm: Norm, dtype: torch.dtype) -> None:
    multiplier = random_multiplier(1)
    low = {name: tensor.to(dtype) for name, tensor in multiplier.items()}
    assert float(norm(low)) == pytest.approx(float(norm(multiplier)), rel=2e-2)


# --- Kronecker-Fisher -----------------------------------------------------------------------


def test_second_moments_sample_by_sample() -> None:
    features, cotangents = (tensor.numpy() for tensor in samples(3))
    expected_a = np.mean([np.outer(phi, phi) for phi in features], axis=0)
    expected_g = np.mean([np.outer(psi, psi) for psi in cotangents], axis=0)
    found = SecondMoments.of(*samples(3), "bias")
    assert found.mean is not None
    np.testing.assert_allclose(found.features.numpy(), expected_a, rtol=1e-12)
    np.testing.assert_allclose(found.cotangents.numpy(), expected_g, rtol=1e-12)
    np.testing.assert_allclose(found.mean.numpy(), features.mean(0), rtol=1e-12)
    assert found.bias == "bias"


def test_second_moments_are_a_mean_over_positions_and_a_sum() -> None:
    """A and E[φ] are means over positions, G sums over those of a sample."""
    flat, cotangents = samples(3)
    pairs = flat.view(-1, 2, IN), cotangents.view(-1, 2, OUT)
    found, alone = SecondMoments.of(*pairs), SecondMoments.of(flat, cotangents)
    assert found.mean is not None
    torch.testing.assert_close(found.features, alone.features)
    torch.testing.assert_close(found.mean, alone.mean)
    torch.testing.assert_close(found.cotangents, 2 * alone.cotangents)


def test_second_moments_of_independent_positions() -> None:
    """E[λ_n λ_nᵀ] = A ⊗ G for λ_n = Σ_t ψ_t φ_tᵀ, if the ψ_t are independent of all else."""
    draw = torch.Generator().manual_seed(0)
    n, positions = 200_000, 3
    features = 1 + torch.randn(n, positions, 2, generator=draw, dtype=torch.float64)
    cotangents = torch.randn(n, positions, 2, generator=draw, dtype=torch.float64)
    single = torch.einsum("nto,nti->nio", cotangents, features).flatten(1)
    moments = SecondMoments.of(features, cotangents)
    product = torch.kron(moments.features, moments.cotangents)
    torch.testing.assert_close(single.T @ single / n, product, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_kronecker_fisher_by_brute_force(damping: float) -> None:
    multiplier = random_multiplier(5)
    joint = torch.cat([multiplier["weight"], multiplier["bias"][:, None]], dim=1).numpy()
    flat = joint.flatten(order="F")
    expected = np.sqrt(flat @ np.linalg.solve(fisher(damping), flat))
    found = float(KroneckerFisher(damping)(multiplier, MOMENTS))
    assert found == pytest.approx(expected, rel=1e-10)


def test_kronecker_fisher_of_several_maps() -> None:
    """The root of the summed squares, or the sum."""
    first, second = samples(0), samples(1)
    multiplier, moments, squares, total = {}, {}, 0.0, 0.0
    for name, (features, cotangents) in {"q": first, "k": second}.items():
        own = multiplier_of(features, cotangents)
        multiplier |= {f"{name}.{key}": value for key, value in own.items()}
        moments[f"{name}.weight"] = SecondMoments.of(features, cotangents, f"{name}.bias")
        squares += kronecker_fisher(features, cotangents) ** 2
        total += kronecker_fisher(features, cotangents, order="nuc")
    found = float(KroneckerFisher(0.0)(multiplier, moments))
    assert found == pytest.approx(squares**0.5, rel=1e-12)
    assert float(KroneckerFisher(0.0, ord="nuc")(multiplier, moments)) == pytest.approx(
        total, rel=1e-9
    )


def canonical_correlations(features: Tensor, cotangents: Tensor) -> Array:
    """Cosines between the two column spaces, from orthonormal bases (no second moments)."""
    extended = np.column_stack([features.numpy(), np.ones(len(features))])
    bases = []
    for matrix in (extended, cotangents.numpy()):
        left, values, _ = np.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, values > 1e-10 * values.max()])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def with_dead_unit_and_softmax() -> tuple[Tensor, Tensor]:
    """Singular moments: a unit that is always 0, cotangents that sum to 0."""
    features, cotangents = samples(11)
    features[:, 1] = 0
    return features, cotangents - cotangents.mean(1, keepdim=True)


@pytest.mark.parametrize("data", [samples(2), with_dead_unit_and_softmax()])
def test_kronecker_fisher_is_the_length_or_the_sum_of_the_canonical_correlations(
    data: tuple[Tensor, Tensor],
) -> None:
    correlations = canonical_correlations(*data)
    found = kronecker_fisher(*data)
    assert found == pytest.approx(np.linalg.norm(correlations), rel=1e-8)
    assert found <= len(correlations) ** 0.5
    total = kronecker_fisher(*data, order="nuc")
    assert total == pytest.approx(correlations.sum(), rel=1e-8)
    assert total <= len(correlations)


def test_kronecker_fisher_without_any_relation_and_with_too_few_samples() -> None:
    normal = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n, squares = 500, []
    for _ in range(200):
        squares.append(kronecker_fisher(normal(n, IN), normal(n, OUT)) ** 2)
    assert np.mean(squares) == pytest.approx((IN + 1) * OUT / n, rel=0.1)
    few = normal(2, IN), normal(2, OUT)
    assert kronecker_fisher(*few) == pytest.approx(2**0.5, rel=1e-8)
    assert kronecker_fisher(*few, order="nuc") == pytest.approx(2, rel=1e-8)


def loss_of_samples(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def cotangents_by_autograd(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    return torch.autograd.grad(loss(outputs), outputs)[0]


@pytest.mark.parametrize("order", ["fro", "nuc"])
@pytest.mark.parametrize("dead", [False, True])
def test_kronecker_fisher_is_invariant_under_affine_changes(dead: bool, order: Order) -> None:
    """The samples themselves are transformed; autograd gives the new cotangents."""
    draw = torch.Generator().manual_seed(4)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    features, _ = samples(4)
    if dead:
        features[:, 2] = 0
    targets = torch.randint(OUT, (SAMPLES,), generator=draw)
    outputs = features @ normal(IN, OUT) + normal(OUT)
    loss = partial(loss_of_samples, targets=targets)
    cotangents = cotangents_by_autograd(loss, outputs)  # sum to 0: G is singular
    length = partial(kronecker_fisher, order=order)
    value = length(features, cotangents)

    change, offset = normal(IN, IN), 10 * normal(IN)
    new_features = features @ change.T + offset
    assert length(new_features, cotangents) == pytest.approx(value, rel=1e-8)

    mixing, shift = normal(OUT, OUT), normal(OUT)
    undo = torch.linalg.inv(mixing)
    new_outputs = outputs @ mixing.T + shift
    new_cotangents = cotangents_by_autograd(lambda z: loss((z - shift) @ undo.T), new_outputs)
    assert length(features, new_cotangents) == pytest.approx(value, rel=1e-8)
    assert length(new_features, new_cotangents) == pytest.approx(value, rel=1e-8)

    for norm in (Frobenius(), Entrywise1(), Spectral(), Nuclear()):
        before = float(norm(multiplier_of(features, cotangents)))
        after = float(norm(multiplier_of(new_features, new_cotangents)))
        assert after != pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("order", ["fro", "nuc"])
def test_damped_kronecker_fisher_keeps_scale_and_rotation(order: Order) -> None:
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(IN, IN, generator=draw, dtype=torch.float64)).Q

    def value(features: Tensor, cotangents: Tensor, bias: str | None = None) -> float:
        names = ["weight"] if bias is None else ["weight", bias]
        multiplier = {name: multiplier_of(features, cotangents)[name] for name in names}
        moments = {"weight": SecondMoments.of(features, cotangents, bias)}
        return float(KroneckerFisher(0.1, ord=order)(multiplier, moments))

    features, cotangents = samples(6)
    expected = value(features, cotangents)
    assert value(1e-6 * features, 1e6 * cotangents) == pytest.approx(expected, rel=1e-10)
    assert value(features @ rotation, cotangents) == pytest.approx(expected, rel=1e-10)
    with_bias = value(features, cotangents, "bias")
    assert with_bias != pytest.approx(expected, rel=1e-3)
    for scale in (1e3, 1e-3):
        found = value(scale * features, cotangents / scale, "bias")
        assert found == pytest.approx(with_bias, rel=1e-10)
    assert value(features @ rotation, cotangents, "bias") == pytest.approx(with_bias, rel=1e-10)
    stretched = features * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert value(stretched, cotangents) != pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-9, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("order", ["fro", "nuc"])
def test_damped_kronecker_fisher_by_symmetric_roots(
    order: Order, damping: float, dtype: torch.dtype
) -> None:
    """G^(-1/2) λ̃ A^(-1/2) with the symmetric roots, from eigenvectors in NumPy."""

    def inverse_root(moment: Tensor, sizes: Array) -> Array:
        units = np.sqrt(sizes)
        values, vectors = np.linalg.eigh(moment.double().numpy() / np.outer(units, units))
        return (vectors / np.sqrt(values.clip(min=0) + damping)) @ vectors.T / units[:, None]

    for data in (samples(3), with_dead_unit_and_softmax(), samples(5, n=3, width=8)):
        features, cotangents = (tensor.to(dtype) for tensor in data)
        multiplier = multiplier_of(features, cotangents)
        moments = SecondMoments.of(features, cotangents, "bias")
        matrix = torch.cat([multiplier["weight"], multiplier["bias"][:, None]], dim=1).double()
        a, g = map(inverse_root, (with_one(moments), moments.cotangents), sizes_of(moments))
        whitened = g.T @ matrix.numpy() @ a
        found = float(KroneckerFisher(damping, ord=order)(multiplier, {"weight": moments}))
        assert found == pytest.approx(
            np.linalg.norm(whitened, order), rel=1e-5 if dtype == torch.float32 else 1e-9
        )


def test_damping_tends_to_the_pseudo_inverse() -> None:
    data = with_dead_unit_and_softmax()
    exact = kronecker_fisher(*data)
    errors = [exact - kronecker_fisher(*data, damping=d) for d in (1e-2, 1e-3, 1e-6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-4 * exact)
    assert min(errors) > 0


def test_moments_that_are_all_zero_give_zero() -> None:
    """Every unit dead, or every sample fitted exactly: λ = 0."""
    features, cotangents = samples(0)
    for damping in (0.0, 1e-3):
        assert kronecker_fisher(features, 0 * cotangents, damping) == 0
        assert kronecker_fisher(features, 0 * cotangents, damping, "nuc") == 0


def test_float32_moments_find_the_same_rank() -> None:
    """Most of 30 units and outputs follow from others; rounding gives both a spurious rank."""
    mixing = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    narrow = samples(11, n=1000)
    features, cotangents = (tensor @ mixing(tensor.shape[1], 30) for tensor in narrow)
    assert kronecker_fisher(*narrow) == pytest.approx(kronecker_fisher(features, cotangents))
    exact = kronecker_fisher(features, cotangents)
    assert kronecker_fisher(features.float(), cotangents.float()) == pytest.approx(exact, rel=1e-3)


def test_moments_that_are_not_finite() -> None:
    features, cotangents = samples(0)
    features[0, 0] = float("nan")
    moments = {"weight": SecondMoments.of(features, cotangents, "bias")}
    for order in ("fro", "nuc"):
        assert np.isnan(float(KroneckerFisher(ord=order)(random_multiplier(0), moments)))


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf"), None, "nuc"])
def test_damping_is_checked(damping: Any) -> None:
    with pytest.raises(cg.RuleError, match=r"damping=.* is not a number in \[0, inf\)"):
        KroneckerFisher(damping)


@pytest.mark.parametrize("order", [2, None, "max", np.array(["nuc", "fro"])])
def test_ord_is_checked(order: Any) -> None:
    with pytest.raises(cg.RuleError, match=r'ord=.* give "fro" or "nuc"'):
        KroneckerFisher(ord=order)


@pytest.mark.parametrize(
    ("moments", "match"),
    [
        ({}, r"\['weight', 'bias'\]"),
        ({"weight": SecondMoments.of(*samples(0))}, "bias"),
        ({"weight": SecondMoments.of(*samples(0, width=IN + 1), "bias")}, r"\(5, 5\)"),
        ({"weight": SecondMoments.of(*samples(0, out=OUT + 1), "bias")}, r"\(3, 3\)"),
    ],
)
def test_moments_are_checked(moments: dict[str, SecondMoments], match: str) -> None:
    with pytest.raises(cg.RuleError, match=match):
        KroneckerFisher()(random_multiplier(0), moments)


def test_needs_moments() -> None:
    plain = (Frobenius(), PerParameter(), Entrywise1(), Spectral(), Nuclear(), lambda _: 1.0)
    assert not any(needs_moments(norm) for norm in plain)
    assert needs_moments(KroneckerFisher())


# --- the norm of an optimizer ---------------------------------------------------------------

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class MyAdam(torch.optim.Adam):
    pass


OPTIMIZERS: dict[str, tuple[Make, Norm]] = {
    "SGD": (partial(torch.optim.SGD, lr=0.1), Frobenius()),
    "momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), Frobenius()),
    "ASGD": (partial(torch.optim.ASGD, lambd=0.0), Frobenius()),
    "Adam": (torch.optim.Adam, Entrywise1()),
    "MyAdam": (MyAdam, Entrywise1()),
    "AdamW": (partial(torch.optim.AdamW, weight_decay=0.0), Entrywise1()),
    "Adamax": (torch.optim.Adamax, Entrywise1()),
    "NAdam": (torch.optim.NAdam, Entrywise1()),
    "RAdam": (torch.optim.RAdam, Entrywise1()),
    "RMSprop": (torch.optim.RMSprop, Entrywise1()),
    "Adagrad": (torch.optim.Adagrad, Entrywise1()),
    "Adadelta": (torch.optim.Adadelta, Entrywise1()),
    "Rprop": (torch.optim.Rprop, Entrywise1()),
}
OTHERS: dict[str, tuple[Make, Norm]] = {
    "Adafactor": (torch.optim.Adafactor, Entrywise1()),
    "SparseAdam": (torch.optim.SparseAdam, Entrywise1()),
}
MUON: Callable[..., torch.optim.Optimizer] | None = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(MUON is None, reason="this torch has no Muon")


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_norm_for(name: str) -> None:
    make, expected = (OPTIMIZERS | OTHERS)[name]
    assert norm_for(make([nn.Parameter(torch.zeros(2, 2))])) == expected


def seventh_step(make: Make, multiplier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How an optimizer moves fresh parameters of gradient −λ (RAdam warms up for five steps)."""
    parameters = {name: nn.Parameter(torch.zeros_like(t)) for name, t in multiplier.items()}
    optimizer = make(list(parameters.values()))
    before: dict[str, Tensor] = {}
    for _ in range(7):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = -multiplier[name]
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in parameters.items()}


def test_optimizers_attain_the_dual_norm() -> None:
    """⟨λ, step⟩ = ‖λ‖_* ‖step‖: no step of the same primal length gains more."""
    multiplier = random_multiplier(8)
    primal = {Frobenius(): 2.0, Entrywise1(): float("inf")}
    for name, (make, norm) in OPTIMIZERS.items():
        step = seventh_step(make, multiplier)
        gain = sum(float((multiplier[key] * step[key]).sum()) for key in step)
        flat = torch.cat([tensor.flatten() for tensor in step.values()])
        length = float(torch.linalg.vector_norm(flat, ord=primal[norm]))
        assert gain == pytest.approx(float(norm(multiplier)) * length, rel=1e-3), name


@needs_muon
def test_muon_attains_the_nuclear_norm_but_for_its_approximate_factor() -> None:
    assert MUON is not None
    multiplier = {"weight": random_multiplier(8)["weight"]}
    make = partial(MUON, lr=0.1, weight_decay=0.0)
    assert norm_for(make([nn.Parameter(torch.zeros(2, 2))])) == Nuclear()
    step = seventh_step(make, multiplier)["weight"]
    gain = float((multiplier["weight"] * step).sum())
    length = float(torch.linalg.matrix_norm(step, ord=2))
    assert 0.7 <= gain / (float(Nuclear()(multiplier)) * length) <= 1


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]), "optimizer=LBFGS"),
        (torch.optim.Adam, "optimizer=Adam is not an instance"),
        ("adam", "optimizer=str"),
    ],
)
def test_norm_for_refuses_what_it_does_not_know(
    optimizer: torch.optim.Optimizer, match: str
) -> None:
    with pytest.raises(cg.RuleError, match=f"{match}.*norm="):
        norm_for(optimizer)


# --- through solve --------------------------------------------------------------------------


def small_problem(second_batch: float = 1.0) -> cg.GrowthProblem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    data = [
        (scale * torch.randn(8, 2, dtype=torch.float64), torch.randint(3, (8,)))
        for scale in (1.0, second_batch)
    ]
    candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
    return cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])


def test_a_users_own_norm() -> None:
    def largest_entry(multiplier: Mapping[str, Tensor]) -> float:
        return max(float(tensor.abs().max()) for tensor in multiplier.values())

    solution = cg.solve(small_problem(), norm=largest_entry)
    sensitivity = solution.sensitivities["1"]
    assert sensitivity.norm is largest_entry
    assert sensitivity.value == largest_entry(solution.multipliers["1"]) > 0
    assert solution.decision.chosen == ("1",)


@pytest.mark.parametrize("value", [torch.ones(2), None, -1.0], ids=["vector", "None", "negative"])
def test_a_norm_that_returns_no_size_is_named(value: Any) -> None:
    def mine(multiplier: Mapping[str, Tensor]) -> Any:
        return value

    with pytest.raises(cg.RuleError, match=r"norm=<function .*mine.* returned .*one number"):
        cg.solve(small_problem(), norm=mine)


@pytest.mark.parametrize(
    "norm", [Frobenius(), PerParameter(), Entrywise1(), Spectral(), Nuclear()], ids=repr
)
def test_norms_through_solve(norm: Norm) -> None:
    solution = cg.solve(small_problem(), norm=norm)
    expected = float(norm(solution.multipliers["1"]))
    assert solution.sensitivities["1"].value == expected > 0
    lost = cg.solve(small_problem(float("nan")), norm=norm, throw=False)
    assert lost.status is cg.Status.NOT_FINITE
