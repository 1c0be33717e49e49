"""How far one picture is from another, where that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from slipstream_pack.nodes.measuring.fidelity import amplified_difference, compare

LATENT = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)


def flat(value, height=16, width=24):
    return torch.full((2, height, width, 3), value)


def test_flat_pictures():
    fidelity = compare(LATENT, LATENT * 1.1, flat(0.5), flat(0.6))
    assert fidelity.latent_error == pytest.approx(0.1, rel=1e-5)
    assert fidelity.psnr_db == pytest.approx(20.0, rel=1e-4)
    # Without variance the formula is (2ab + C1) / (a^2 + b^2 + C1).
    c1 = 0.01**2
    assert fidelity.ssim == pytest.approx((2 * 0.5 * 0.6 + c1) / (0.25 + 0.36 + c1), rel=1e-4)
    assert not fidelity.is_identical


def test_equal_ones():
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    fidelity = compare(LATENT, LATENT.clone(), picture, picture.clone())
    assert (fidelity.latent_error, fidelity.is_identical, fidelity.psnr_db) == (0.0, True, None)
    assert fidelity.ssim == pytest.approx(1.0, abs=1e-6)


def test_noise_of_known_strength():
    generator = torch.Generator().manual_seed(0)
    picture = 0.3 + 0.4 * torch.rand(1, 256, 256, 3, generator=generator)
    noisy = picture + 0.05 * torch.randn(picture.shape, generator=generator)
    fidelity = compare(LATENT, LATENT, picture, noisy)
    assert fidelity.psnr_db == pytest.approx(-20 * math.log10(0.05), abs=0.1)
    assert fidelity.ssim < 0.99


def test_pictures_smaller_than_the_window_and_none_at_all():
    assert compare(LATENT, LATENT, flat(0.5, 8, 8), flat(0.6, 8, 8)).ssim == pytest.approx(0.984, abs=1e-3)
    fidelity = compare(LATENT, -LATENT)
    assert fidelity.latent_error == pytest.approx(2.0)
    assert (fidelity.ssim, fidelity.psnr_db) == (None, None)


def test_the_difference_is_amplified_and_stays_a_picture():
    difference = amplified_difference(flat(0.5), flat(0.45), 8.0)
    assert difference.unique().tolist() == pytest.approx([0.4])
    assert amplified_difference(flat(0.0), flat(1.0)).max() == 1.0
