"""Multiply-adds, counted while the operations run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


class MultiplyAdds(FlopCounterMode):
    """Counts the multiply-adds of all matrix products, convolutions and decompositions within.

    Half of what `torch.utils.flop_counter` counts, with formulas for operations that it does not
    know: attention on CPUs, products with vectors, eigenvalues and singular values. As usual,
    elementwise operations are not counted.

    Example:
        >>> with MultiplyAdds() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.total
        24
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)

    @property
    def total(self) -> int:
        """So far."""
        return self.get_total_flops() // 2


def of_training_step(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Any, Any]
) -> int:
    """Multiply-adds of one forward and backward pass, run on a copy of the model."""
    model = copy.deepcopy(model)
    with MultiplyAdds() as counter:
        loss_fn(model(batch[0]), batch[1]).backward()
    return counter.total


def _product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """A matrix or a vector times a vector: two operations for each entry of the first."""
    return 2 * math.prod(a)


def _eigenvalues(a: Shape, *_: Any, **__: Any) -> int:
    """Symmetric, with vectors, by the QR algorithm: 9 n³ (Golub and Van Loan, 8.3)."""
    return math.prod(a[:-2]) * 9 * a[-1] ** 3


def _singular_values(a: Shape, *_: Any, **__: Any) -> int:
    """With vectors: 4 m²n + 8 mn² + 9 n³, n ≤ m (Golub and Van Loan, 8.6)."""
    m, n = max(a[-2:]), min(a[-2:])
    return math.prod(a[:-2]) * (4 * m * m * n + 8 * m * n * n + 9 * n**3)


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """As the forward pass, for each gradient asked for; PyTorch's formula does not know groups."""
    _, _, _, _, transposed, _, _, (of_input, of_weight, _) = rest
    positions = x if transposed else grad
    return 2 * math.prod(positions) * math.prod(weight[1:]) * (of_input + of_weight)


_aten = torch.ops.aten
_FORMULAS = {
    _aten.mv: _product,
    _aten.dot: _product,
    _aten.convolution_backward: _convolution_backward,
    _aten._linalg_eigh: _eigenvalues,
    _aten._linalg_svd: _singular_values,
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}
