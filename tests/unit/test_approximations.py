"""The Frechet distance of the study of approximations, against sets whose distance is known."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from loading import ROOT

spec = importlib.util.spec_from_file_location("approximations", ROOT / "benchmarks" / "approximations.py")
approximations = importlib.util.module_from_spec(spec)
before = list(sys.path)
spec.loader.exec_module(approximations)
sys.path[:] = before


def features(seed=0, count=4000):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_have_none():
    assert approximations.frechet_distance(features(), features()) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_squared():
    shift = torch.tensor([1.0, 0, 0, 2.0, 0], dtype=torch.float64)
    assert approximations.frechet_distance(features(), features() + shift) == pytest.approx(5)


def test_a_wider_set_is_as_far_as_its_width():
    """Normal distributions of deviations 1 and 3: (3 - 1) ** 2 in each of five dimensions."""
    assert approximations.frechet_distance(features(), 3 * features()) == pytest.approx(20, rel=0.05)


def test_it_is_that_of_a_general_root():
    linalg = pytest.importorskip("scipy.linalg")
    first, second = features() @ torch.rand(5, 5, dtype=torch.float64), features(1)
    one, other = first.T.cov().numpy(), second.T.cov().numpy()
    expected = float((first.mean(0) - second.mean(0)).square().sum())
    expected += one.trace() + other.trace() - 2 * linalg.sqrtm(one @ other).real.trace()
    assert approximations.frechet_distance(first, second) == pytest.approx(expected)


def test_a_feature_that_is_always_zero_does_not_matter():
    first, second = features(), features(1) + 1
    expected = approximations.frechet_distance(first, second)
    zeros = torch.zeros(len(first), 1, dtype=torch.float64)
    with_zeros = (torch.cat((one, zeros), 1) for one in (first, second))
    assert approximations.frechet_distance(*with_zeros) == pytest.approx(expected)
