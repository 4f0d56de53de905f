import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import constrained_growth as cg
from constrained_growth.experiments.data import digits, two_spirals


def test_spirals_are_the_points_of_the_paper():
    split = two_spirals(dtype=torch.float64)
    expected = []
    for i in range(300):
        angle, radius = 2 * math.pi * i / 300, 0.5 + i / 300
        for label, sign in ((0, 1), (1, -1)):
            expected.append(
                (sign * radius * math.cos(angle), sign * radius * math.sin(angle), label)
            )
    x = torch.cat([split.x_train, split.x_test])
    y = torch.cat([split.y_train, split.y_test])
    found = torch.cat([x, y[:, None]], dim=1)
    assert (len(split.x_train), len(split.x_test)) == (450, 150)
    np.testing.assert_allclose(
        sorted(found.tolist(), key=lambda p: (p[2], math.hypot(p[0], p[1]))),
        sorted(expected, key=lambda p: (p[2], math.hypot(p[0], p[1]))),
        atol=1e-14,
    )


def test_spirals_go_round_as_often_as_asked():
    split = two_spirals(points_per_class=8, r0=1.0, circles=2.0, dtype=torch.float64)
    radii = torch.cat([split.x_train, split.x_test]).norm(dim=1).sort().values
    expected = torch.arange(8, dtype=torch.float64).repeat_interleave(2) / 4 + 1
    torch.testing.assert_close(radii, expected)


def test_digits_are_those_of_scikit_learn_centred_and_scaled():
    split = digits(seed=3, dtype=torch.float64)
    pixels, labels = load_digits(return_X_y=True)
    assert (split.num_features, split.num_classes) == (64, 10)
    assert len(split.x_train) == round(0.75 * 1797)
    torch.testing.assert_close(
        split.x_train.mean(dim=0), torch.zeros(64, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert split.x_train.square().mean().item() == pytest.approx(1)
    counts = torch.cat([split.y_train, split.y_test]).bincount()
    np.testing.assert_array_equal(counts, np.bincount(labels))
    # distances between images, in units of one unknown scale, are those of the pixels
    x = torch.cat([split.x_train, split.x_test])
    around = np.asarray(pixels) - np.mean(pixels, axis=0)
    total = float((x - x.mean(dim=0)).square().sum()) / float(np.square(around).sum())
    farthest = x.max() - x.min(dim=0).values[x.max(dim=0).values.argmax()]
    assert farthest.item() == pytest.approx(16 * math.sqrt(total), rel=1e-9)


@pytest.mark.parametrize("make", [two_spirals, digits])
def test_same_seed_same_split(make):
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.y_train, other.y_train)


@pytest.mark.parametrize("make", [two_spirals, digits])
def test_random_state_is_left_alone(make):
    before = torch.get_rng_state()
    make(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(cg.DataError, match=r"train_fraction=1\.0 leaves 600 of 600"):
        two_spirals(train_fraction=1.0)
