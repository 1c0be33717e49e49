"""Rescaling: the same output from smaller activations, by powers of two, as little as needed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from slipstream_pack.nodes.methods.fp16_fix import (
    LARGEST,
    MARGIN,
    FP16Fix,
    Layout,
    Scaling,
    factor,
    layout,
    rescale_,
    scaling_of,
    watching,
)
from torch import nn
from torch.nn import functional

WIDTH = 32


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def norm(channels=WIDTH):
    return nn.GroupNorm(8, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = conv(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Coder(nn.Module):
    """A decoder in the layout of Stable Diffusion's, small: written from its description, not from the host."""

    def __init__(self):
        super().__init__()
        self.conv_in = conv(4, WIDTH)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = Residual(WIDTH, WIDTH), Attention(WIDTH)
        self.up = nn.ModuleList([Upsample(WIDTH)])
        self.block = Residual(WIDTH, 2 * WIDTH)
        self.norm_out, self.conv_out = norm(2 * WIDTH), conv(2 * WIDTH, 3)

    def forward(self, z):
        h = self.mid.attn_1(self.mid.block_1(self.conv_in(z)))
        h = self.block(self.up[0](h))
        return self.conv_out(functional.silu(self.norm_out(h)))


STREAM = ["conv_in", "mid.block_1", "mid.block_1.conv2", "mid.attn_1", "mid.attn_1.proj_out", "up.0.conv"]
STREAM += ["block", "block.conv2", "block.nin_shortcut"]
INNER = ["mid.block_1.conv1", "block.conv1", "mid.attn_1.v"]


@pytest.fixture
def coder():
    torch.manual_seed(0)
    return Coder().requires_grad_(False)


def latent():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def peaks_of(coder):
    with watching(coder) as peaks:
        coder(latent())
    return dict(peaks)


def decibels(value, expected):
    error = float((value - expected).square().mean())
    span = float(expected.max() - expected.min())
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def test_the_layout_is_found_by_names(coder):
    assert layout(coder) == Layout(("mid.block_1", "block"), ("mid.attn_1",), ("up.0",))


@pytest.mark.parametrize(
    "change",
    [
        lambda coder: setattr(coder, "extra", conv(4, 4)),
        lambda coder: setattr(coder.block, "temb_proj", nn.Linear(4, 4)),
        lambda coder: setattr(coder.block, "norm1", nn.BatchNorm2d(WIDTH)),
        lambda coder: setattr(coder.up[0], "conv", nn.ConvTranspose2d(WIDTH, WIDTH, 3)),
        lambda coder: delattr(coder, "norm_out"),
    ],
)
def test_what_is_not_understood_is_refused(coder, change):
    change(coder)
    with pytest.raises(RuntimeError, match="its Coder has parts of another kind"):
        layout(coder)


def test_the_output_stays_and_each_activation_shrinks_by_its_factor(coder):
    scale = Scaling(2.0**-5, 0.0, {"mid.block_1.conv1": 2.0**-3, "mid.attn_1.v": 2.0**-7})
    expected, before = coder(latent()), peaks_of(coder)
    rescale_(coder, layout(coder), scale)
    after = peaks_of(coder)
    assert decibels(coder(latent()), expected) > 120
    for name, peak in before.items():
        factor = scale.stream if name in STREAM else scale.inner.get(name, 1.0)
        assert after[name] == pytest.approx(peak * factor, rel=1e-4), name


def test_epsilons_are_scaled_too(coder):
    """Values so small that a norm's epsilon is a part of its result."""
    for part in (coder.conv_in, coder.mid.block_1.conv1, coder.mid.block_1.conv2):
        part.weight.mul_(1e-3)
        part.bias.mul_(1e-3)
    expected = coder(latent())
    rescaled = copy.deepcopy(coder)
    rescale_(rescaled, layout(coder), Scaling(2.0**-4, 0.0, {"mid.block_1.conv1": 2.0**-4}))
    assert decibels(rescaled(latent()), expected) > 120
    for name, module in rescaled.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = coder.get_submodule(name).eps
    assert decibels(rescaled(latent()), expected) < 60


def test_activations_are_measured_where_they_are(coder):
    peaks = peaks_of(coder)
    h = coder.conv_in(latent())
    assert peaks["conv_in"] == float(h.abs().max())
    h = coder.mid.block_1(h)
    attention = coder.mid.attn_1
    assert peaks["mid.block_1"] == float(h.abs().max())
    h = attention.norm(h)
    q, k = attention.q(h).flatten(2), attention.k(h).flatten(2)
    assert peaks["mid.attn_1.q k"] == pytest.approx(float((q.transpose(1, 2) @ k).abs().max()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in coder.modules())


def test_the_hooks_are_gone_after_an_error(coder):
    with pytest.raises(RuntimeError), watching(coder):
        coder(torch.zeros(1, 3, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in coder.modules())


def test_an_overflow_is_mended_with_the_least_scaling(coder):
    """In float32 what exceeds float16's range; after rescaling nothing does, and half of a factor would not do."""
    coder.conv_in.weight.mul_(1e6)
    coder.mid.block_1.conv1.weight.mul_(1e6)
    coder.mid.attn_1.v.weight.mul_(1e6)
    expected, parts, peaks = coder(latent()), layout(coder), peaks_of(coder)
    scale = scaling_of(parts, peaks)
    assert set(scale.inner) == {"mid.block_1.conv1", "mid.attn_1.v"}
    assert scale.peak == max(peaks[name] for name in peaks if not name.endswith("q k"))
    rescale_(coder, parts, scale)
    after = peaks_of(coder)
    limit = LARGEST / MARGIN
    assert limit / 2 < max(after[name] for name in STREAM) <= limit
    for name in scale.inner:
        assert limit / 2 < after[name] <= limit * 1.0001
    assert decibels(coder(latent()), expected) > 100


def test_ordinary_activations_need_nothing(coder):
    scale = scaling_of(layout(coder), peaks_of(coder))
    assert scale.is_identity
    assert scale.smallest == 1
    assert not scale.has_large_products


def test_names_may_have_a_prefix(coder):
    peaks = {f"decoder.{name}": peak for name, peak in peaks_of(coder).items()} | {"encoder.conv_in": 1e9}
    assert scaling_of(layout(coder), peaks, "decoder.").is_identity


@pytest.mark.parametrize(
    ("peak", "expected"),
    [(0.0, 1.0), (LARGEST / MARGIN, 1.0), (LARGEST / MARGIN * 1.001, 0.5), (1e6, 2.0**-6), (65536.0, 2.0**-3)],
)
def test_factors_are_the_largest_powers_of_two(peak, expected):
    assert factor(peak) == expected


def test_products_of_queries_and_keys_are_told_apart(coder):
    """They can't be scaled: softmax needs them as they are."""
    for part in (coder.mid.attn_1.q, coder.mid.attn_1.k):
        part.weight.mul_(300)
    scale = scaling_of(layout(coder), peaks_of(coder))
    assert scale.is_identity
    assert scale.has_large_products


@pytest.mark.parametrize("name", ["conv_out", "norm_out", "mid.attn_1.q", "block.norm1"])
def test_values_that_no_scale_reaches_are_refused(coder, name):
    coder.get_submodule(name).weight.mul_(1e6)
    with pytest.raises(RuntimeError, match=rf"^{name} reaches \d+, which no scale"):
        scaling_of(layout(coder), peaks_of(coder))


def test_a_damaged_file_is_told(coder):
    coder.conv_in.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="conv_in gives inf in float32 already"):
        scaling_of(layout(coder), peaks_of(coder))


def test_group_norms_of_large_float16_values_are_right():
    """Their squares are beyond its range: torch sums them in float32."""
    values = (torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 6e4
    result = functional.group_norm(values.half(), 4, eps=1e-6 * 2.0**-20)
    assert float((result.float() - functional.group_norm(values.half().float(), 4)).abs().max()) < 2e-3


def test_settings_are_checked():
    with pytest.raises(ValueError, match="FP16-Fix VAE: precision should be one of auto, fp16"):
        FP16Fix(precision="fp8")
    with pytest.raises(ValueError, match="FP16-Fix VAE: method should be one of rescale, as is, but is 'exact'"):
        FP16Fix(method="exact")
