"""Tiled VAE: tiles against the whole, on networks of Stable Diffusion's layout that are built here."""

from __future__ import annotations

import itertools

import pytest
import torch
from slipstream_pack.nodes.methods import tiled_vae
from slipstream_pack.nodes.methods.tiled_vae import (
    Convolution,
    Moments,
    Region,
    TiledVAE,
    Tiler,
    Waiting,
    attend,
    attend_in_slices,
    decoder_network,
    encoder_network,
    normalized,
    sampled,
    silu,
)
from tiling import Accounting, decibel, on_device
from torch import nn
from torch.nn import functional

CPU = torch.device("cpu")
GROUPS = 4


def convolution(inside, outside, size=3, **options):
    return nn.Conv2d(inside, outside, size, padding=options.pop("padding", size // 2), **options)


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inside), nn.GroupNorm(GROUPS, outside)
        self.conv1, self.conv2 = convolution(inside, outside), convolution(outside, outside)
        if inside != outside:
            self.nin_shortcut = convolution(inside, outside, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.q, self.k, self.v, self.proj_out = (convolution(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (one(h).flatten(2) for one in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = convolution(width, width)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = convolution(width, width, stride=2, padding=0)

    def forward(self, x):
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.block = nn.ModuleList(blocks)


class Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Decoder(nn.Module):
    """Three levels: the image is four times as large as the latent."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.mid = convolution(4, 32), Middle(32)
        self.up = nn.ModuleList([Level(Block(16, 8)), Level(Block(32, 16)), Level(Block(32, 32))])
        self.up[1].upsample, self.up[2].upsample = Upsample(16), Upsample(32)
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, 8), convolution(8, 3)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.mid = convolution(3, 8), Middle(32)
        self.down = nn.ModuleList([Level(Block(8, 8)), Level(Block(8, 16)), Level(Block(16, 32))])
        self.down[0].downsample, self.down[1].downsample = Downsample(8), Downsample(16)
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, 32), convolution(32, 8)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


def made(kind):
    """A network with random weights, its row of steps, and an input of the wanted latent size."""
    torch.manual_seed(0)
    module = kind()
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    is_decoder = kind is Decoder
    network = decoder_network(module) if is_decoder else encoder_network(module)

    def source(height, width, batch=1):
        channels, factor = (4, 1) if is_decoder else (3, 4)
        values = torch.randn(batch, channels, height * factor, width * factor)
        # Another colour in each corner: no tile has the whole's statistics.
        return values + torch.linspace(-3, 3, width * factor) + torch.linspace(-2, 4, height * factor)[:, None]

    return module, network, source


def tiler(network, side, advanced=lambda share: None):
    return Tiler(network, side, CPU, lambda norm: (norm.weight, norm.bias), advanced)


every_kind = pytest.mark.parametrize("kind", [Decoder, Encoder])


@pytest.fixture(autouse=True)
def _small_samples(monkeypatch):
    """Or all of these would be nearly all border, and small enough for float32 copies as a whole."""
    monkeypatch.setattr(tiled_vae, "BORDER", 1)
    monkeypatch.setattr(tiled_vae, "VALUES_AT_ONCE", 1000)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


# Regions


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, 16), (17, 40, 16), (5, 33, 8), (64, 64, 100)])
def test_tiles_cover_everything_once(height, width, side):
    covered = torch.zeros(height, width)
    tiles = list(Region(0, 0, height, width).tiles(side))
    for tile in tiles:
        assert tile.height <= side
        assert tile.width <= side
        tile.of(covered).add_(1)
    assert (covered == 1).all()
    # No sliver is left at an edge.
    assert max(tile.area for tile in tiles) < 2 * min(tile.area for tile in tiles)


@pytest.mark.parametrize(("module", "factor"), [(convolution(1, 1), 1), (Upsample(1), 2), (Downsample(1), 0.5)])
def test_a_convolution_needs_what_its_output_depends_on_and_no_more(module, factor):
    """Against what really changes when one pixel of the input does."""
    step = Convolution(module, (1, 1), factor=factor)
    values = torch.randn(1, 1, 12, 14, generator=torch.Generator().manual_seed(0))
    whole = step.module(values)
    target = Region(*(int(edge * factor) for edge in (4, 4, 8, 10)))
    needed = step.needs(target)
    for y, x in itertools.product(range(12), range(14)):
        changed = values.clone()
        changed[..., y, x] += 10
        is_needed = needed.top <= y < needed.bottom and needed.left <= x < needed.right
        assert torch.equal(target.of(step.module(changed)), target.of(whole)) != is_needed
    run = step.run(needed.of(values), needed, target)
    assert torch.allclose(run, target.of(whole), atol=1e-6)


# Statistics


def test_moments_of_unequal_pieces_are_those_of_the_whole():
    """Far from zero, where sums of squares would have no digits left."""
    values = torch.randn(2, 8, 21, 34, generator=torch.Generator().manual_seed(0)) + 3000
    values[:, :, :, 20:] -= 500
    moments = Moments()
    for tile in Region(0, 0, 21, 34).tiles(9):
        moments.add(tile.of(values))
    mean, variance = moments.of_groups(4)
    groups = values.double().unflatten(1, (4, 2)).flatten(2)
    assert torch.allclose(mean, groups.mean(2), rtol=1e-7)
    assert torch.allclose(variance, groups.var(2, correction=0), rtol=1e-5)


def test_a_piece_of_weight_two_counts_as_two():
    values = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    once, twice = values.split([4, 6], dim=3)
    weighted, repeated = Moments(), Moments()
    weighted.add(once)
    weighted.add(twice, 2)
    for piece in (once, twice, twice):
        repeated.add(piece)
    for own, expected in zip(weighted.of_groups(2), repeated.of_groups(2), strict=True):
        assert torch.allclose(own, expected, rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50)])
def test_a_sample_counts_as_much_as_what_it_stands_for(height, width):
    """Each pixel at an edge once along it, and each of the others for the two that it stands for."""
    sample = sampled(Waiting(torch.arange(height * width).reshape(1, 1, height, width).float()), 2)
    assert torch.equal(sample.values[0, 0, 0, :5], torch.tensor([0.0, 1, 2, 4, 6]))
    assert torch.equal(sample.values[0, 0, -2:, -1], torch.tensor([(height - 1.0) * width - 1, height * width - 1]))
    finer = sample.empty(1, 2)
    assert finer.weights.border == 4
    weights = torch.zeros(finer.whole.height, finer.whole.width)
    for tile in finer.whole.tiles(7):
        for part, weight in finer.weights.parts(tile, finer.whole):
            part.of(weights).add_(weight)
    assert weights.sum().item() == pytest.approx(4 * height * width)
    assert (weights[:4, :4] == 1).all()
    inside = (2 * height - 8) / (finer.whole.height - 8) * (2 * width - 8) / (finer.whole.width - 8)
    assert torch.allclose(weights[4:-4, 4:-4], torch.tensor(inside))


def test_attention_in_slices_is_attention(monkeypatch):
    monkeypatch.setattr(tiled_vae, "SCORES_AT_ONCE", 100)
    queries, keys, values = torch.randn(3, 2, 30, 16, generator=torch.Generator().manual_seed(0))
    expected = attend(None, queries[:, :11], keys, values)
    assert torch.allclose(attend_in_slices(None, queries[:, :11], keys, values), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_known_statistics_is_the_norm(dtype):
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    values = (torch.randn(2, 8, 11, 7) * torch.linspace(0.1, 5, 8)[:, None, None] + 2).to(dtype)
    moments = Moments()
    moments.add(values)
    mean, variance = (one.repeat_interleave(2, 1).float()[:, :, None, None] for one in moments.of_groups(4))
    scale = norm.weight[:, None, None] * (variance + norm.eps).rsqrt()
    expected = functional.silu(norm(values.float()))
    result = normalized(values, (scale, norm.bias[:, None, None] - mean * scale), silu)
    assert result.dtype == dtype
    assert decibel(result.float(), expected) > {torch.float32: 120, torch.bfloat16: 50, torch.float16: 65}[dtype]


# Networks


@every_kind
@pytest.mark.parametrize("side", [20, 32, 1000])
@pytest.mark.parametrize(("height", "width", "batch"), [(16, 16, 1), (13, 21, 1), (9, 30, 2)])
def test_exact_is_the_whole(kind, side, height, width, batch):
    module, network, source = made(kind)
    values = source(height, width, batch)
    kept = values.clone()
    assert decibel(tiler(network, side).exact(values), module(values)) > 100
    assert torch.equal(values, kept)


@every_kind
@pytest.mark.parametrize("side", [20, 32])
@pytest.mark.parametrize(("height", "width", "batch"), [(16, 16, 1), (13, 21, 1), (9, 30, 2)])
def test_estimated_with_the_statistics_of_the_whole_is_the_whole(kind, side, height, width, batch, monkeypatch):
    """So all that it estimates is statistics: the halo holds what a tile depends on."""
    monkeypatch.setattr(tiled_vae, "sampled", lambda source, border: Waiting(source.values))
    module, network, source = made(kind)
    values = source(height, width, batch)
    kept = values.clone()
    assert decibel(tiler(network, side).estimated(values), module(values)) > 100
    assert torch.equal(values, kept)


@every_kind
def test_a_norm_by_tiles_would_not_be_the_whole(kind):
    """What the others are held against: each tile for itself is far off."""
    module, _, source = made(kind)
    values = source(16, 16)
    halves = torch.cat([module(half.contiguous()) for half in values.chunk(2, dim=-1)], dim=-1)
    assert decibel(halves, module(values)) < 40


@every_kind
@pytest.mark.parametrize("statistics", ["exact", "estimated"])
def test_progress_comes_to_one(kind, statistics):
    _, network, source = made(kind)
    shares = []
    getattr(tiler(network, 24, shares.append), statistics)(source(13, 21))
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.5


@every_kind
@pytest.mark.parametrize("statistics", ["exact", "estimated"])
def test_it_stops_when_it_is_told_to(kind, statistics):
    _, network, source = made(kind)

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        getattr(tiler(network, 24, stop), statistics)(source(13, 21))


@every_kind
@pytest.mark.parametrize("statistics", ["exact", "estimated"])
@pytest.mark.parametrize("side", [64, 128])
def test_the_figure_for_the_device_is_what_tiles_take_there(kind, statistics, side):
    _, network, source = made(kind)
    values = source(64, 80)
    with on_device(tiled_vae) as accounting:
        getattr(tiler(network, side), statistics)(values)
    figure = 4 * network.on_device(Region(0, 0, 256, 320), side, statistics)
    assert 0.7 * figure < accounting.peak <= figure


@every_kind
@pytest.mark.parametrize("statistics", ["exact", "estimated"])
def test_so_it_is_without_attention_which_takes_most_in_so_small_a_network(kind, statistics):
    _, network, source = made(kind)
    values = source(64, 80) if kind is Encoder else torch.randn(1, 32, 64, 80)
    whole, run = Region.whole(values), tiler(network, 64)
    if statistics == "exact":
        with on_device(tiled_vae) as accounting:
            run._together(network.apart, Waiting(values))
        figure = network._together_on_device(network.apart, whole, 64)
    else:
        run._together(network.apart, Waiting(values))
        with on_device(tiled_vae) as accounting:
            run._alone(network.apart, Waiting(values))
        figure = network._alone_on_device(whole, 64)
    # What was cut off of a tile goes with the next step.
    assert 0.7 * 4 * figure < accounting.peak <= 1.05 * 4 * figure


@every_kind
@pytest.mark.parametrize("statistics", ["exact", "estimated"])
def test_the_figure_for_the_ram_is_what_waits(kind, statistics, monkeypatch):
    """Counted the other way round: only what waits."""
    _, network, source = made(kind)
    values = source(64, 80)
    with Accounting() as accounting:
        getattr(tiler(network, 32), statistics)(values)
    tiles = 4 * network.on_device(Region(0, 0, 256, 320), 32, statistics)
    figure = 4 * network.in_ram(Region(0, 0, 256, 320), statistics)
    assert figure * 0.8 < accounting.peak < figure + tiles


# Settings


@pytest.mark.parametrize(
    "settings", [{"tile_size": 32}, {"tile_size": 100}, {"tile_size": -64}, {"statistics": "guessed"}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match=r"VAE Decode Tiled: (tile_size|statistics) should be"):
        TiledVAE(**settings)


def test_settings_that_can():
    assert TiledVAE() == TiledVAE(0, "exact", True, "VAE Decode Tiled")
    assert TiledVAE(72).tile_size == 72
