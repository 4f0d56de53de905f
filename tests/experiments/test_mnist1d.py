"""MNIST-1D, which is generated."""

import random

import numpy as np
import pytest
import torch
from helpers import assert_same

from constrained_growth.experiments.data import mnist1d


def test_mnist1d_is_generated_and_leaves_the_random_state_alone():
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    split = mnist1d(3, num_samples=100, dtype=torch.float64)
    assert_same(random.getstate(), states[0])
    assert_same(np.random.get_state()[1].tolist(), states[1][1].tolist())  # type: ignore[index]  # noqa: NPY002
    assert (split.x_train.shape, split.x_test.shape) == ((80, 40), (20, 40))
    assert split.num_classes == 10
    assert split.x_train.dtype == torch.float64
    assert torch.equal(split.x_train, mnist1d(3, num_samples=100, dtype=torch.float64).x_train)
    assert not torch.equal(split.x_train, mnist1d(4, num_samples=100).x_train.double())
    both = torch.cat([split.x_train, split.x_test])
    assert both.mean().item() == pytest.approx(0, abs=1e-12)
    assert both.std(correction=0).item() == pytest.approx(1)
