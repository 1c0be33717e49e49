"""Tiled VAE: the decoder or encoder of a KL autoencoder in one pass over tiles, as if it had run as a whole.

What makes tiles show is that a group norm takes the statistics of what it is given: those of a tile are not those of
the image. Two ways to have them right:

- *exact*: all tiles advance together, operation by operation. A 3x3 convolution reads its tile and a pixel around it,
  each norm has the statistics of the whole image, attention sees all of it. The feature map waits in RAM.
- *estimated*: what runs at the latent's resolution, attention with it, is exact, since it is small. The rest of the way
  each tile goes alone, within a halo that holds all that its pixels depend on, its norms with statistics that were
  measured once on a sample: every second pixel, down and across, and all near the edges.

Layout: R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022. Combined statistics:
T. Chan, G. Golub, R. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STATISTICS = ("exact", "estimated")
SMALLEST = 64
"""Pixels of a tile's side: below, the halo would be most of it."""
VALUES_AT_ONCE = 2**20
"""How many values an operation that needs float32 copies takes at once."""
SCORES_AT_ONCE = 2**26
"""How many products of queries and keys attention in slices takes at once."""
STRIDE = 2
"""Between the pixels of a sample. Averages instead of single pixels would have less variance than what they stand for.
With 4, a structure of a few pixels can fall through: 20 dB instead of 40 on a picture of 1024x1024."""
BORDER = 4
"""Pixels of the latent, of which a sample has every one. Convolutions see zeros beyond the edge, so what is near to it
differs from the rest; were it missed, or counted double, nothing else would be right: 20 to 44 dB, and not 45 to 56."""
LEAST = 16
"""Pixels of the latent's side, below which there is too little to take a sample of."""

Affine = tuple[Tensor, Tensor]
"""Scale and shift, each (B, C, 1, 1) float32: a norm whose statistics are known."""


@dataclass(frozen=True)
class TiledVAE:
    """What the nodes are set to.

    Attributes:
        tile_size: pixels of a tile's side in the image; 0 for what fits the free memory.
        statistics: one of `STATISTICS`.
        batch_slicing: whether the images of a batch go through one at a time.
        title: of the node, for messages.
    """

    tile_size: int = 0
    statistics: str = "exact"
    batch_slicing: bool = True
    title: str = "VAE Decode Tiled"

    stem = "tiled_vae"

    def __post_init__(self) -> None:
        if self.tile_size and (self.tile_size < SMALLEST or self.tile_size % 8):
            raise ValueError(
                f"{self.title}: tile_size should be 0, or a multiple of 8 from {SMALLEST} up, but is {self.tile_size}."
            )
        if self.statistics not in STATISTICS:
            raise ValueError(
                f"{self.title}: statistics should be {' or '.join(STATISTICS)}, but is {self.statistics!r}."
            )


@dataclass(frozen=True)
class Region:
    """A rectangle of a feature map, in its pixels."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def whole(cls, values: Tensor) -> Region:
        """All of a (B, C, H, W) tensor."""
        return cls(0, 0, *values.shape[-2:])

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def has(self, y: int, x: int) -> bool:
        return self.top <= y < self.bottom and self.left <= x < self.right

    def of(self, values: Tensor) -> Tensor:
        """This part of a tensor, as a view."""
        return values[..., self.top : self.bottom, self.left : self.right]

    def grown(self, by: int) -> Region:
        return Region(self.top - by, self.left - by, self.bottom + by, self.right + by)

    def scaled(self, factor: float) -> Region:
        """At another resolution. Rounded down."""
        return Region(*(math.floor(edge * factor) for edge in (self.top, self.left, self.bottom, self.right)))

    def clipped(self, to: Region) -> Region:
        return Region(
            max(self.top, to.top), max(self.left, to.left), min(self.bottom, to.bottom), min(self.right, to.right)
        )

    def within(self, other: Region) -> Region:
        """In the coordinates of another one."""
        return Region(self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left)

    def tiles(self, side: int) -> Iterator[Region]:
        """Parts of about equal size, none wider or higher than `side`, row by row."""

        def cuts(begin: int, end: int) -> list[tuple[int, int]]:
            count = math.ceil((end - begin) / side)
            return list(pairwise(begin + (end - begin) * index // count for index in range(count + 1)))

        for top, bottom in cuts(self.top, self.bottom):
            for left, right in cuts(self.left, self.right):
                yield Region(top, left, bottom, right)


# Statistics


def _parts(values: Tensor) -> Sequence[Tensor]:
    """(B, C, H, W) in pieces of some channels, small enough for float32 copies of them not to count."""
    return torch.split(values, max(1, VALUES_AT_ONCE * values.shape[1] // values.numel()), dim=1)


class Moments:
    """Mean and variance of each channel, (B, C) float64, over pieces that come one by one."""

    def __init__(self) -> None:
        self._count = 0.0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, piece: Tensor, weight: float = 1.0) -> None:
        """Take in one more piece, (B, C, H, W) of any type and size, each value as often as its weight says."""
        variances, means = zip(
            *(torch.var_mean(part.float(), dim=(2, 3), correction=0) for part in _parts(piece)), strict=True
        )
        mean = torch.cat(means, 1).cpu().double()
        count = weight * piece.shape[-2] * piece.shape[-1]
        total = self._count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + torch.cat(variances, 1).cpu().double() * count
        self._squares = self._squares + delta.square() * (self._count / total * count)
        self._count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of channels, (B, groups) float64."""
        means, variances = (one.view(len(one), groups, -1) for one in (self._mean, self._squares / self._count))
        return means.mean(2), variances.mean(2) + means.var(2, correction=0)


def normalized(values: Tensor, affine: Affine, activation: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(B, C, H, W) with its norm's scale and shift and then, if there is one, an activation: computed in float32."""
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    begin = 0
    for part in _parts(values):
        channels = slice(begin, begin := begin + part.shape[1])
        scale, shift = (one[:, channels] for one in affine)
        part = torch.addcmul(shift, part, scale)
        result[:, channels] = part if activation is None else activation(part)
    return result


# The network as a row of steps


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution, after a norm and SiLU if it has one.

    Attributes:
        module: (B, C, H, W) to (B, C', factor H, factor W), padding with zeros what lies outside of what it is given.
        channels: C and C'.
        norm: the norm before it.
        factor: 2 if it doubles the resolution before it convolves; 0.5 if it strides by two, where it pads only at the
            bottom and on the right.
    """

    module: nn.Module
    channels: tuple[int, int]
    norm: nn.GroupNorm | None = None
    factor: float = 1

    def needs(self, region: Region) -> Region:
        """What of its input a part of its output depends on, beyond the edges too."""
        if self.factor == 2:
            return Region(
                *(edge // 2 for edge in (region.top - 1, region.left - 1, region.bottom + 2, region.right + 2))
            )
        if self.factor == 0.5:
            return Region(2 * region.top, 2 * region.left, 2 * region.bottom + 1, 2 * region.right + 1)
        return region.grown(1)

    def run(self, values: Tensor, given: Region, wanted: Region) -> Tensor:
        """The wanted region of its output, from the given one of its input, after the norm."""
        return wanted.within(given.scaled(self.factor)).of(self.module(values))

    @property
    def values(self) -> float:
        """Values that are held on the device at once, for each pixel of its output."""
        inside, outside = self.channels
        # Resampling convolutions make a copy: padded, or enlarged.
        copies = (1 if self.norm is None and self.factor != 0.5 else 2) / self.factor**2
        return copies * inside + (inside if self.factor == 2 else 0) + outside

    @property
    def waiting(self) -> float:
        """Values that wait in RAM meanwhile, for each pixel of its output."""
        return self.channels[0] / self.factor**2 + self.channels[1]

    @property
    def work(self) -> int:
        """Multiplications for each pixel of its output."""
        return 9 * self.channels[0] * self.channels[1]


def silu(values: Tensor) -> Tensor:
    return functional.silu(values, inplace=True)


@dataclass(frozen=True)
class Residual:
    """Two convolutions, and a way around them.

    Attributes:
        shortcut: a 1x1 convolution on that way; None if there is nothing on it.
    """

    first: Convolution
    second: Convolution
    shortcut: nn.Module | None = None
    factor: float = field(default=1, init=False)

    def needs(self, region: Region) -> Region:
        return region.grown(2)

    @property
    def channels(self) -> tuple[int, int]:
        return self.first.channels[0], self.second.channels[1]

    def around(self, values: Tensor) -> Tensor:
        return values if self.shortcut is None else self.shortcut(values)

    @property
    def values(self) -> float:
        inside, outside = self.first.channels
        return max(2 * inside + outside, inside + 2 * outside, 3 * outside)

    @property
    def waiting(self) -> float:
        inside, outside = self.first.channels
        return max(inside, outside) + outside + (inside if inside < outside else 0)

    @property
    def work(self) -> int:
        return self.first.work + self.second.work


@dataclass(frozen=True)
class Attention:
    """Every pixel looks at every pixel.

    Attributes:
        block: has `norm`, and the 1x1 convolutions `q`, `k`, `v` and `proj_out`.
        channels: their width.
    """

    block: Any
    channels: int
    factor: float = field(default=1, init=False)

    @property
    def values(self) -> float:
        return 5 * self.channels

    @property
    def waiting(self) -> float:
        return self.channels

    @property
    def work(self) -> int:
        return 4 * self.channels**2


Local = Convolution | Residual
Step = Local | Attention


@dataclass(frozen=True)
class Network:
    """A decoder or encoder as a row of steps.

    Attributes:
        before: a decoder's steps at the latent's resolution.
        apart: those at higher ones.
        after: an encoder's steps at the latent's resolution.
    """

    before: tuple[Step, ...]
    apart: tuple[Local, ...]
    after: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.before + self.apart + self.after

    @property
    def is_decoder(self) -> bool:
        return not self.after

    @property
    def ratio(self) -> int:
        """Pixels of the image's side for each of the latent's."""
        return 1 << sum(step.factor != 1 for step in self.apart)

    @property
    def finest(self) -> tuple[Local, ...]:
        """The steps at the image's resolution."""
        resampling = [index for index, step in enumerate(self.apart) if step.factor != 1]
        return self.apart[resampling[-1] :] if self.is_decoder else self.apart[: resampling[0]]

    @property
    def halo(self) -> int:
        """How far around a tile lies what its pixels depend on, in pixels of the image, attention apart."""
        first = _chain(self.apart, Region(0, 0, self.ratio, self.ratio))[0]
        return -first.top * (self.ratio if self.is_decoder else 1)

    @property
    def border(self) -> int:
        """Pixels near an edge, where tiles begin to go alone."""
        return BORDER if self.is_decoder else BORDER * self.ratio

    def sample(self, whole: Region) -> Region:
        """The size of the sample of a feature map."""
        return Region(0, 0, *(len(_indices(length, self.border)) for length in (whole.height, whole.width)))

    def can_estimate(self, image: Region) -> bool:
        """Whether a picture is large enough to take a sample of."""
        return min(image.height, image.width) >= LEAST * self.ratio

    def apart_side(self, side: int) -> int:
        """The side of tiles that go alone, in pixels of where they come out."""
        return side if self.is_decoder else side // self.ratio

    def side_at(self, step: Step, side: int) -> int:
        """The side of tiles at a step, in its own pixels, that take no more memory than those of the image take."""
        values = side**2 * max(step.values for step in self.finest)
        return min(side, math.isqrt(int(values / step.values)))

    def on_device(self, image: Region, side: int, statistics: str) -> float:
        """Values that are on the device at once for one picture, at most, beside what kernels take for themselves.

        Args:
            image: of the picture's size.
            side: of tiles, in pixels of the image.
            statistics: one of `STATISTICS`.
        """
        first = self._first(image)
        if statistics == "exact":
            return self._together_on_device(self.steps, first, side)
        return max(
            self._together_on_device(self.before, first, side),
            self._together_on_device(self.apart, self.sample(first), side),
            self._alone_on_device(first, side),
            self._together_on_device(self.after, _maps(self.apart, first)[-1], side),
        )

    def _alone_on_device(self, source: Region, side: int) -> float:
        wholes = _maps(self.apart, source)
        middle = wholes[-1].height // 2, wholes[-1].width // 2
        tile = next(tile for tile in wholes[-1].tiles(self.apart_side(side)) if tile.has(*middle))
        regions = _chain(self.apart, tile, wholes)[:-1]
        # A kernel works on all that it is given, and what is wanted is cut from it.
        return max(
            step.values * given.scaled(step.factor).area for step, given in zip(self.apart, regions, strict=True)
        )

    def _first(self, image: Region) -> Region:
        """What goes in for a picture."""
        return image.scaled(1 / self.ratio) if self.is_decoder else image

    def _together_on_device(self, steps: Sequence[Step], source: Region, side: int) -> float:
        most = 0.0
        for step, whole in zip(steps, _maps(steps, source)[1:], strict=True):
            tile = next(iter(whole.tiles(self.side_at(step, side)))).grown(2).clipped(whole)
            kept = 2 * step.channels * whole.area if isinstance(step, Attention) else 0
            most = max(most, step.values * tile.area + kept)
        return most

    def in_ram(self, image: Region, statistics: str) -> float:
        """Values that wait in RAM at once for one picture, at most. Arguments as of `on_device`."""
        first = self._first(image)
        if statistics == "exact":
            return _waiting(self.steps, first)
        wholes = _maps(self.apart, first)
        inside, outside = self.apart[0].channels[0] * wholes[0].area, self.apart[-1].channels[1] * wholes[-1].area
        return max(
            _waiting(self.before, first),
            inside + _waiting(self.apart, self.sample(first)),
            inside + outside,
            _waiting(self.after, wholes[-1]),
        )


def _maps(steps: Sequence[Step], source: Region) -> list[Region]:
    """The feature maps of steps, from what goes into the first one."""
    wholes = [source]
    for step in steps:
        wholes.append(wholes[-1].scaled(step.factor))
    return wholes


def _waiting(steps: Sequence[Step], source: Region) -> float:
    wholes = _maps(steps, source)[1:]
    return max((step.waiting * whole.area for step, whole in zip(steps, wholes, strict=True)), default=0)


def _chain(steps: Sequence[Local], tile: Region, wholes: Sequence[Region] | None = None) -> list[Region]:
    """What each step needs for a tile of the last one's output, from the first one's input to that tile.

    Args:
        wholes: the feature maps, which they end with; None for no end.
    """
    regions = [tile]
    for index in reversed(range(len(steps))):
        needed = steps[index].needs(regions[0])
        regions.insert(0, needed if wholes is None else needed.clipped(wholes[index]))
    return regions


def _work(steps: Sequence[Step], whole: Region) -> float:
    """Multiplications of steps on a whole feature map."""
    return sum(step.work * target.area for step, target in zip(steps, _maps(steps, whole)[1:], strict=True))


def decoder_network(decoder: Any) -> Network:
    """What a decoder does, from the latent to the picture."""
    before = [_convolution(decoder.conv_in), *_middle(decoder.mid)]
    apart: list[Local] = []
    for level in reversed(decoder.up):
        (apart or before).extend(_residual(block) for block in level.block)
        if hasattr(level, "upsample"):
            apart.append(_resampling(level.upsample, 2))
    return Network(tuple(before), (*apart, _convolution(decoder.conv_out, decoder.norm_out)), ())


def encoder_network(encoder: Any) -> Network:
    """What an encoder does, from the picture to the moments of the latent."""
    steps: list[Step] = [_convolution(encoder.conv_in)]
    after = len(steps)
    for level in encoder.down:
        steps += [_residual(block) for block in level.block]
        if hasattr(level, "downsample"):
            steps.append(_resampling(level.downsample, 0.5))
            after = len(steps)
    steps += [*_middle(encoder.mid), _convolution(encoder.conv_out, encoder.norm_out)]
    # What is left of the middle is at the latent's resolution.
    apart = tuple(step for step in steps[:after] if not isinstance(step, Attention))
    return Network((), apart, tuple(steps[after:]))


def _convolution(module: Any, norm: nn.GroupNorm | None = None) -> Convolution:
    return Convolution(module, (module.in_channels, module.out_channels), norm)


def _resampling(module: Any, factor: float) -> Convolution:
    return Convolution(module, (module.conv.in_channels, module.conv.out_channels), factor=factor)


def _residual(block: Any) -> Residual:
    first, second = _convolution(block.conv1, block.norm1), _convolution(block.conv2, block.norm2)
    return Residual(first, second, getattr(block, "nin_shortcut", None))


def _middle(middle: Any) -> list[Step]:
    attention = Attention(middle.attn_1, middle.attn_1.q.in_channels)
    return [_residual(middle.block_1), attention, _residual(middle.block_2)]


# Running it


@dataclass(frozen=True)
class Weights:
    """How often the pixels of a sample count.

    Attributes:
        border: how many at each edge are near to it, and count once.
        inside: how often the others count: down, and across.
    """

    border: int
    inside: tuple[float, float]

    def scaled(self, factor: float) -> Weights:
        """At another resolution."""
        return Weights(int(self.border * factor), self.inside)

    def parts(self, region: Region, whole: Region) -> Iterator[tuple[Region, float]]:
        """A region of the sample in parts of one weight each."""

        def cuts(begin: int, end: int, length: int, inside: float) -> Iterator[tuple[int, int, float]]:
            edges = (0, self.border, length - self.border, length)
            for (low, high), weight in zip(pairwise(edges), (1.0, inside, 1.0), strict=True):
                if max(begin, low) < min(end, high):
                    yield max(begin, low), min(end, high), weight

        for top, bottom, down in cuts(region.top, region.bottom, whole.height, self.inside[0]):
            for left, right, across in cuts(region.left, region.right, whole.width, self.inside[1]):
                yield Region(top, left, bottom, right), down * across


class Waiting:
    """A feature map that waits in RAM, and the moments of what was put into it.

    Args:
        values: (B, C, H, W).
        weights: if it is a sample.
    """

    def __init__(self, values: Tensor, weights: Weights | None = None) -> None:
        self.values = values
        self.weights = weights
        self.moments = Moments()

    @property
    def whole(self) -> Region:
        return Region(0, 0, *self.values.shape[-2:])

    def put(self, region: Region, tile: Tensor) -> None:
        """Fill a region, once."""
        region.of(self.values).copy_(tile)
        parts = [(region, 1.0)] if self.weights is None else self.weights.parts(region, self.whole)
        for part, weight in parts:
            self.moments.add(part.within(region).of(tile), weight)

    def empty(self, channels: int, factor: float = 1) -> Waiting:
        """Another one, to be filled."""
        whole = self.whole.scaled(factor)
        weights = None if self.weights is None else self.weights.scaled(factor)
        return Waiting(self.values.new_empty(len(self.values), channels, whole.height, whole.width), weights)

    def in_place(self, channels: int) -> Waiting:
        """One to be filled tile by tile from the same tile of this one, where this one lies if it fits in there."""
        fits = channels <= self.values.shape[1]
        return Waiting(self.values[:, :channels], self.weights) if fits else self.empty(channels)


def _indices(length: int, border: int) -> list[int]:
    """Which pixels of an axis are in a sample: all near its ends, and every second one in between."""
    return [*range(border), *range(border, length - border, STRIDE), *range(length - border, length)]


def sampled(source: Waiting, border: int) -> Waiting:
    """A sample of a feature map.

    Args:
        border: how many pixels at each edge are near to it.
    """
    rows, columns = (_indices(length, border) for length in source.values.shape[-2:])
    down, across = (
        (length - 2 * border) / (len(kept) - 2 * border)
        for length, kept in zip(source.values.shape[-2:], (rows, columns), strict=True)
    )
    return Waiting(source.values[..., rows, :][..., columns], Weights(border, (down, across)))


def attend(block: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What a block's queries (B, M, C) find among keys and values (B, N, C): by the kernel that torch takes."""
    return functional.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[:, 0]


def attend_in_slices(block: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same, written out, for as many queries at once as there is room for: where torch's kernels are not to be
    used."""
    found = torch.empty_like(queries)
    rows = max(1, SCORES_AT_ONCE // (len(keys) * keys.shape[1]))
    for queried, result in zip(torch.split(queries, rows, dim=1), torch.split(found, rows, dim=1), strict=True):
        scores = (queried * keys.shape[-1] ** -0.5) @ keys.transpose(1, 2)
        result.copy_(scores.softmax(-1, torch.float32).to(values.dtype) @ values)
    return found


class Tiler:
    """Runs a decoder or encoder tile by tile.

    Args:
        network: what it does.
        side: of a tile, in pixels of the image. At lower resolutions as large as takes no more memory.
        device: what computes.
        weights_of: gives a norm's weight and bias, (C).
        advanced: called after each tile with the share of all work that it was. What it raises ends the run.
        attend: computes attention, as `attend` does.
    """

    def __init__(
        self,
        network: Network,
        side: int,
        device: torch.device,
        weights_of: Callable[[nn.GroupNorm], tuple[Tensor, Tensor]],
        advanced: Callable[[float], None],
        attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = attend,
    ) -> None:
        self._network = network
        self._side = side
        self._device = device
        self._weights_of = weights_of
        self._advanced = advanced
        self._attend_by = attend
        self._affines: dict[nn.Module, Affine] = {}
        self._work = 1.0

    def exact(self, values: Tensor) -> Tensor:
        """What the steps make of (B, C, H, W) in RAM, up to rounding."""
        source = Waiting(values)
        self._work = _work(self._network.steps, source.whole)
        return self._together(self._network.steps, source).values

    def estimated(self, values: Tensor) -> Tensor:
        """About what the steps make of (B, C, H, W) in RAM."""
        source, network = Waiting(values), self._network
        begin = _maps(network.before, source.whole)[-1]
        self._work = _work(network.steps, source.whole) + _work(network.apart, network.sample(begin))
        source = self._together(network.before, source)
        self._together(network.apart, sampled(source, network.border))
        return self._together(network.after, self._alone(network.apart, source)).values

    def _together(self, steps: Sequence[Step], source: Waiting) -> Waiting:
        """All tiles take each step before any takes the next one."""
        for step in steps:
            if isinstance(step, Convolution):
                source = self._convolve(step, source, source.empty(step.channels[1], step.factor))
            elif isinstance(step, Residual):
                source = self._add(step, source)
            else:
                source = self._attend(step, source)
        return source

    def _convolve(
        self, step: Convolution, source: Waiting, target: Waiting, around: Callable[[Region], Tensor] | None = None
    ) -> Waiting:
        self._measured(step.norm, source)

        def made(tile: Region) -> Tensor:
            given = step.needs(tile).clipped(source.whole)
            value = step.run(self._normalized(step.norm, self._load(source, given)), given, tile)
            if around is not None:
                value += around(tile)
            return value

        return self._fill(target, step, made)

    def _add(self, step: Residual, source: Waiting) -> Waiting:
        hidden = self._convolve(step.first, source, source.empty(step.first.channels[1]))
        target = source.in_place(step.second.channels[1])
        return self._convolve(step.second, hidden, target, lambda tile: step.around(self._load(source, tile)))

    def _attend(self, step: Attention, source: Waiting) -> Waiting:
        """The queries of one tile at a time, the keys and values of all: attention does not ask for their order."""
        block, norm = step.block, step.block.norm
        self._measured(norm, source)

        def tokens(values: Tensor) -> Tensor:
            """(B, C, H, W) to (B, H W, C)."""
            return values.flatten(2).transpose(1, 2)

        shape = len(source.values), source.whole.area, step.channels
        keys, values = (torch.empty(shape, dtype=source.values.dtype, device=self._device) for _ in range(2))
        end = 0
        for tile in source.whole.tiles(self._network.side_at(step, self._side)):
            seen = self._normalized(norm, self._load(source, tile), None)
            begin, end = end, end + tile.area
            keys[:, begin:end] = tokens(block.k(seen))
            values[:, begin:end] = tokens(block.v(seen))

        def made(tile: Region) -> Tensor:
            queries = tokens(block.q(self._normalized(norm, self._load(source, tile), None))).contiguous()
            found = self._attend_by(block, queries, keys, values)
            found = found.transpose(1, 2).reshape(len(found), -1, tile.height, tile.width)
            value: Tensor = block.proj_out(found)
            value += self._load(source, tile)
            return value

        return self._fill(source.in_place(step.channels), step, made)

    def _alone(self, steps: Sequence[Local], source: Waiting) -> Waiting:
        """Each tile takes all steps by itself, with the norms as they were measured."""
        wholes = _maps(steps, source.whole)
        target = source.empty(steps[-1].channels[1], wholes[-1].height / source.whole.height)
        share = _work(steps, source.whole) / target.whole.area / self._work
        for tile in target.whole.tiles(self._network.apart_side(self._side)):
            target.put(tile, self._one(steps, source, _chain(steps, tile, wholes)))
            self._advanced(share * tile.area)
        return target

    def _one(self, steps: Sequence[Local], source: Waiting, regions: Sequence[Region]) -> Tensor:
        """One tile through all steps, of each of which the regions tell what it is given, and at last the tile."""
        values = self._load(source, regions[0])
        for step, (given, wanted) in zip(steps, pairwise(regions), strict=True):
            values = self._run(step, values, given, wanted)
        return values

    def _run(self, step: Local, values: Tensor, given: Region, wanted: Region) -> Tensor:
        if isinstance(step, Convolution):
            return step.run(self._normalized(step.norm, values), given, wanted)
        middle = wanted.grown(1).clipped(given)
        hidden = step.first.run(self._normalized(step.first.norm, values), given, middle)
        # Let go of before it is convolved.
        hidden = self._normalized(step.second.norm, hidden)
        result = step.second.run(hidden, middle, wanted)
        result += step.around(wanted.within(given).of(values))
        return result

    def _fill(self, target: Waiting, step: Step, made: Callable[[Region], Tensor]) -> Waiting:
        """Make a feature map tile by tile. Nothing of a tile lives while the next one is made."""
        for tile in target.whole.tiles(self._network.side_at(step, self._side)):
            target.put(tile, made(tile))
            self._advanced(step.work * tile.area / self._work)
        return target

    def _load(self, source: Waiting, region: Region) -> Tensor:
        """A region on the device. Where that is the RAM, a view."""
        return region.of(source.values).to(self._device)

    def _measured(self, norm: nn.GroupNorm | None, source: Waiting) -> None:
        """Make a norm one of known statistics: those of what waits."""
        if norm is None:
            return
        weight, bias = (one.cpu().double() for one in self._weights_of(norm))
        repeated = norm.num_channels // norm.num_groups
        mean, variance = (one.repeat_interleave(repeated, 1) for one in source.moments.of_groups(norm.num_groups))
        scale = weight * (variance + norm.eps).rsqrt()
        affine = scale, bias - mean * scale
        scale, shift = (one.to(self._device, torch.float32)[:, :, None, None] for one in affine)
        self._affines[norm] = scale, shift

    def _normalized(
        self, norm: nn.GroupNorm | None, values: Tensor, activation: Callable[[Tensor], Tensor] | None = silu
    ) -> Tensor:
        return values if norm is None else normalized(values, self._affines[norm], activation)
