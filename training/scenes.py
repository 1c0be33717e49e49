"""The pictures that the demo model is trained on: landscapes drawn by rules, each from one seed, with its caption.

A scene is a choice for each of the attributes and some numbers in 0..1 for all that has no word (where the house
stands, how the ridge runs). Both come from the seed alone, so that a picture can be drawn again anywhere. Nothing is
downloaded and nothing is stored: the pictures and their license are ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "season": ("spring", "summer", "autumn", "winter"),
    "time": ("day", "sunset", "night"),
    "weather": ("clear", "cloudy", "foggy"),
    "light": ("", "sun"),
    "land": ("hills", "mountains"),
    "water": ("", "lake"),
    "trees": ("", "trees", "pines"),
    "house": ("", "red house", "white house", "blue house"),
}
"""What can be chosen, in the words of the caption; "" is what the caption leaves out. By night the sun is the moon."""

SEASON, TIME, WEATHER, LIGHT, LAND, WATER, TREES, HOUSE = range(len(ATTRIBUTES))
SPRING, SUMMER, AUTUMN, WINTER = range(4)
DAY, SUNSET, NIGHT = range(3)
CLEAR, CLOUDY, FOGGY = range(3)
PINES = 2

HELD_OUT_OF = 8
"""One combination of attributes in this many is kept out of training."""
NUMBERS = 192
"""Numbers a scene has beside its choices."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        choices: (B, attributes) int64, an index into each of ATTRIBUTES.
        numbers: (B, NUMBERS) float32 in 0..1.
    """

    choices: Tensor
    numbers: Tensor


def is_held_out(choices: Sequence[int]) -> bool:
    """Whether this combination is kept out of training."""
    return zlib.crc32(bytes(choices)) % HELD_OUT_OF == 0


def draw(seeds: Sequence[int], held_out: bool = False) -> Scenes:
    """The scene of each seed: of the training's combinations, or of those that are held out of it."""
    choices, numbers = [], []
    for seed in seeds:
        random = numpy.random.default_rng(seed)
        while True:
            chosen = [int(random.integers(len(options))) for options in ATTRIBUTES.values()]
            if chosen[WEATHER] == FOGGY:
                chosen[LIGHT] = 0
            if is_held_out(chosen) == held_out:
                break
        choices.append(chosen)
        numbers.append(random.random(NUMBERS, dtype=numpy.float32))
    return Scenes(torch.tensor(choices), torch.from_numpy(numpy.stack(numbers)))


def draw_on(device: torch.device, seeds: Sequence[int], held_out: bool = False) -> tuple[Scenes, Tensor]:
    """Scenes and their pictures, on a device."""
    drawn = draw(seeds, held_out)
    drawn = Scenes(drawn.choices.to(device), drawn.numbers.to(device))
    return drawn, render(drawn)


def words(choices: Sequence[int]) -> dict[str, str]:
    """The caption's words for each attribute of a scene, "" for what isn't there."""
    chosen = {name: options[index] for (name, options), index in zip(ATTRIBUTES.items(), choices, strict=True)}
    if chosen["light"] and chosen["time"] == "night":
        chosen["light"] = "moon"
    return chosen


def caption(choices: Sequence[int]) -> str:
    """The full caption of a scene: "autumn sunset, clear sky, sun, mountains, lake, pines, red house"."""
    chosen = words(choices)
    first = f"{chosen['season']} {chosen['time']}, {chosen['weather']} sky"
    return ", ".join([first, *(chosen[name] for name in ("light", "land", "water", "trees", "house") if chosen[name])])


# Red, green, blue by day, at sunset and by night, or from spring to winter.
_ZENITH = ((0.24, 0.52, 0.88), (0.30, 0.27, 0.52), (0.03, 0.05, 0.16))
_HORIZON = ((0.72, 0.87, 0.97), (0.99, 0.60, 0.32), (0.13, 0.18, 0.38))
_OVERCAST = ((0.66, 0.70, 0.75), (0.66, 0.47, 0.44), (0.11, 0.13, 0.19))
_FOG = ((0.84, 0.87, 0.89), (0.88, 0.70, 0.60), (0.33, 0.36, 0.44))
_CLOUD = ((0.97, 0.98, 1.00), (0.98, 0.72, 0.60), (0.26, 0.29, 0.38))
_CLOUD_SHADE = ((0.70, 0.75, 0.81), (0.62, 0.40, 0.46), (0.13, 0.15, 0.23))
_LUMINARY = ((1.00, 0.96, 0.70), (1.00, 0.80, 0.40), (0.95, 0.95, 0.88))
_GLOW = ((1.00, 0.98, 0.85), (1.00, 0.62, 0.28), (0.60, 0.66, 0.82))
_LIGHTING = ((1.0, 1.0, 1.0), (1.00, 0.76, 0.66), (0.42, 0.48, 0.68))
_GROUND = ((0.58, 0.78, 0.28), (0.22, 0.55, 0.20), (0.72, 0.50, 0.18), (0.92, 0.95, 0.98))
_GROUND_FAR = ((0.46, 0.66, 0.34), (0.20, 0.46, 0.26), (0.60, 0.42, 0.22), (0.80, 0.86, 0.93))
_CANOPY = ((0.96, 0.70, 0.80), (0.13, 0.44, 0.14), (0.90, 0.38, 0.08), (0.84, 0.89, 0.95))
_PINE = ((0.12, 0.40, 0.22), (0.08, 0.34, 0.18), (0.12, 0.34, 0.20), (0.30, 0.46, 0.44))
_WALL = ((0.0, 0.0, 0.0), (0.80, 0.17, 0.13), (0.97, 0.95, 0.90), (0.16, 0.36, 0.78))
_ROOF = ((0.42, 0.24, 0.18), (0.42, 0.24, 0.18), (0.40, 0.22, 0.17), (0.93, 0.95, 0.99))
_PETALS = ((1.00, 0.93, 0.55), (0.0, 0.0, 0.0), (0.85, 0.30, 0.08), (0.0, 0.0, 0.0))

_WHITE = (1.0, 1.0, 1.0)
_CRATER = (0.78, 0.79, 0.76)
_ROCK = (0.50, 0.54, 0.64)
_SNOW = (0.94, 0.96, 1.00)
_DEEP = (0.10, 0.30, 0.50)
_SAND = (0.70, 0.62, 0.45)
_BARK = (0.33, 0.22, 0.15)
_BRICK = (0.45, 0.28, 0.22)
_WOOD = (0.30, 0.18, 0.12)
_PANE = (0.45, 0.60, 0.72)
_LAMP = (1.00, 0.83, 0.40)


class _Numbers:
    """Hands out a batch's numbers, each as (B, 1, 1, 1), in the order in which they are asked for."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._next = 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        number = self._numbers[:, self._next].view(-1, 1, 1, 1)
        self._next += 1
        return low + (high - low) * number


class _Canvas:
    """A batch of pictures, or a window of it, in the coordinates of the whole: 0..1 from left to right and downwards.

    Attributes:
        image: (B, 3, H, W), painted in place.
        x, y: (1, 1, 1, W) and (1, 1, H, 1), the pixels' centres.
    """

    def __init__(self, image: Tensor, x: Tensor, y: Tensor, size: int) -> None:
        self.image, self.x, self.y, self._size = image, x, y, size

    @classmethod
    def blank(cls, count: int, size: int, device: torch.device) -> _Canvas:
        line = (torch.arange(size, device=device) + 0.5) / size
        return cls(
            torch.zeros(count, 3, size, size, device=device), line.view(1, 1, 1, -1), line.view(1, 1, -1, 1), size
        )

    def window(self, top: float, bottom: float, left: float = 0.0, right: float = 1.0) -> _Canvas:
        """The part of it in which something small will be painted: most of the time of drawing is saved by this."""
        rows = slice(int(top * self._size), int(bottom * self._size) + 1)
        columns = slice(int(left * self._size), int(right * self._size) + 1)
        return _Canvas(self.image[:, :, rows, columns], self.x[..., columns], self.y[:, :, rows], self._size)

    def inside(self, distance: Tensor, softness: float = 1.0) -> Tensor:
        """How much of a pixel a shape covers, from its signed distance, negative inside; softness in pixels."""
        return (0.5 - distance * self._size / softness).clamp(0, 1)

    def disc(self, x: Tensor, y: Tensor, radius: Tensor | float, softness: float = 1.0) -> Tensor:
        return self.inside(((self.x - x) ** 2 + (self.y - y) ** 2).sqrt() - radius, softness)

    def paint(self, colour: Tensor, alpha: Tensor) -> None:
        """Lay a colour over the pictures where alpha is 1."""
        self.image += (colour - self.image) * alpha


class _Mood:
    """What a batch's choices mean for every part of the picture: each (B, 1, 1, 1), colours (B, 3, 1, 1)."""

    def __init__(self, scenes: Scenes) -> None:
        self._choices = scenes.choices
        self.number = _Numbers(scenes.numbers)
        self.cloudy, self.foggy, self.clear = (self.when(WEATHER, weather) for weather in (CLOUDY, FOGGY, CLEAR))
        self.sunset, self.night = self.when(TIME, SUNSET), self.when(TIME, NIGHT)
        self.winter = self.when(SEASON, WINTER)
        self.horizon = self.number(0.52, 0.58)
        self.light = self.when(LIGHT, 1)
        self.light_x = self.number(0.16, 0.84)
        self.light_y = torch.lerp(self.number(0.11, 0.24), self.number(0.28, 0.36), self.sunset)
        # Sun and moon light what they shine on; under clouds the day is dimmer.
        self.lighting = self.by(TIME, _LIGHTING) * (1 - 0.14 * self.cloudy * (1 - self.night))
        haze = torch.lerp(self.by(TIME, _HORIZON), self.by(TIME, _OVERCAST), 0.7 * self.cloudy)
        self.haze = torch.lerp(haze, self.by(TIME, _FOG), self.foggy)

    def when(self, column: int, *values: int) -> Tensor:
        """1 where an attribute has one of these values, else 0."""
        wanted = torch.tensor(values, device=self._choices.device)
        return torch.isin(self._choices[:, column], wanted).float().view(-1, 1, 1, 1)

    def by(self, column: int, colours: Sequence[Sequence[float]]) -> Tensor:
        """Each scene's row of a table of colours."""
        return torch.tensor(colours, device=self._choices.device)[self._choices[:, column]].view(-1, 3, 1, 1)

    def of(self, colour: Sequence[float]) -> Tensor:
        return torch.tensor(colour, device=self._choices.device).view(1, 3, 1, 1)

    def lit(self, colour: Sequence[float]) -> Tensor:
        """A thing's own colour in this light."""
        return self.of(colour) * self.lighting


def _ridge(x: Tensor, number: _Numbers, frequencies: Sequence[float], sharp: bool) -> Tensor:
    """A ridge's height along x, in 0..1. Sharp ones are made of triangles, others of sines."""
    height, total = torch.zeros_like(x), 0.0
    for octave, frequency in enumerate(frequencies):
        weight = 0.5**octave
        phase = x * frequency * number(0.85, 1.15) + number()
        wave = 1 - (2 * (phase % 1) - 1).abs() if sharp else 0.5 + 0.5 * torch.sin(2 * torch.pi * phase)
        height, total = height + weight * wave, total + weight
    return height / total


def _sky(canvas: _Canvas, mood: _Mood) -> None:
    slope = (canvas.y / mood.horizon).clamp(0, 1) ** 1.2
    canvas.paint(torch.lerp(mood.by(TIME, _ZENITH), mood.by(TIME, _HORIZON), slope), torch.ones_like(mood.light))
    canvas.paint(mood.by(TIME, _OVERCAST) * (0.9 + 0.15 * slope), 0.75 * mood.cloudy)
    canvas.paint(mood.by(TIME, _FOG) * (0.86 + 0.14 * slope), 0.85 * mood.foggy)
    stars = canvas.window(0.0, 0.42)
    covered = torch.zeros_like(mood.light)
    for _ in range(14):
        covered = torch.maximum(covered, stars.disc(mood.number(), mood.number(0.02, 0.40), 0.006, 2.0))
    stars.paint(mood.of(_WHITE), 0.8 * covered * mood.night * mood.clear)


def _sun_or_moon(canvas: _Canvas, mood: _Mood) -> None:
    canvas = canvas.window(0.0, 0.75)
    x, y = mood.light_x, mood.light_y
    away = ((canvas.x - x) ** 2 + (canvas.y - y) ** 2).sqrt()
    canvas.paint(mood.by(TIME, _GLOW), mood.light * 0.75 * torch.exp(-((away / 0.15) ** 2)))
    disc = mood.light * canvas.inside(away - mood.number(0.055, 0.070))
    canvas.paint(mood.by(TIME, _LUMINARY), disc)
    craters = torch.maximum(
        canvas.disc(x + 0.018, y - 0.012, 0.018, 3.0),
        canvas.disc(x - 0.020, y + 0.016, 0.012, 3.0),
    )
    canvas.paint(mood.of(_CRATER), 0.8 * disc * mood.night * craters)


def _clouds(canvas: _Canvas, mood: _Mood) -> None:
    """Heaps of ellipses with a flat base."""
    canvas = canvas.window(0.0, 0.42)
    puffs, shade = torch.zeros_like(mood.light), torch.zeros_like(mood.light)
    for _ in range(5):
        x, y, width = mood.number(), mood.number(0.07, 0.34), mood.number(0.10, 0.17)
        # Clouds leave the sun and the moon free: the caption says whether one is seen, not chance.
        near = mood.light * (1 - ((y - mood.light_y).abs() * 9 - 0.4).clamp(0, 1))
        x = x + torch.where(x >= mood.light_x, 1.0, -1.0) * near * (0.28 - (x - mood.light_x).abs()).clamp(min=0)
        for offset, scale in ((-0.75, 0.30), (-0.25, 0.50), (0.30, 0.44), (0.80, 0.26)):
            across, along = (canvas.x - x) / width - offset, 1.25 * (canvas.y - y) / width
            heap = ((across**2 + along**2).sqrt() - scale * 1.1) * width
            puffs = torch.maximum(puffs, canvas.inside(torch.maximum(heap, canvas.y - y - 0.012), 3.0))
        base = torch.exp(-(((canvas.y - y - 0.012) / 0.05) ** 2))
        shade = torch.maximum(shade, base * ((canvas.x - x).abs() < 1.3 * width))
    colour = torch.lerp(mood.by(TIME, _CLOUD), mood.by(TIME, _CLOUD_SHADE), 0.8 * shade)
    canvas.paint(colour, mood.cloudy * puffs * 0.95)


def _mountains_and_hills(canvas: _Canvas, mood: _Mood) -> None:
    canvas = canvas.window(0.0, 0.62)
    mountains = mood.when(LAND, 1)
    for low, high, distance, snow_line in ((0.20, 0.30, 0.50, 0.23), (0.15, 0.22, 0.22, 0.19)):
        ridge = _ridge(canvas.x, mood.number, (2.3 if low == 0.20 else 3.3, 5.1, 11.0), sharp=True)
        top = mood.horizon + 0.02 - mood.number(low, high) * (0.25 + 1.1 * ridge)
        rough = _ridge(canvas.x + 0.35 * canvas.y, mood.number, (17.0, 41.0), sharp=True)
        line = mood.horizon - snow_line + (snow_line - 0.05) * mood.winter
        snow = canvas.inside(canvas.y - line - 0.05 * (rough - 0.5), 6.0)
        face = torch.lerp(mood.of(_ROCK) * (0.72 + 0.40 * rough), mood.of(_SNOW) * (0.82 + 0.18 * rough), snow)
        canvas.paint(torch.lerp(face * mood.lighting, mood.haze, distance), mountains * canvas.inside(top - canvas.y))
    for low, high, distance in ((0.05, 0.10, 0.45), (0.00, 0.04, 0.20)):
        rise = mood.number(low, high) * _ridge(canvas.x, mood.number, (1.3, 2.9), sharp=False)
        top = mood.horizon + 0.015 - rise - low * 0.3
        colour = torch.lerp(mood.by(SEASON, _GROUND_FAR) * mood.lighting, mood.haze, distance)
        canvas.paint(colour, canvas.inside(top - canvas.y))
    # Fog is thickest where the land begins.
    canvas.paint(mood.haze, mood.foggy * (0.55 + 0.40 * torch.exp(-(((canvas.y - mood.horizon) / 0.22) ** 2))))


def _ground(canvas: _Canvas, mood: _Mood) -> None:
    canvas = canvas.window(0.50, 1.0)
    near = ((canvas.y - mood.horizon) / (1 - mood.horizon)).clamp(0, 1)
    bands = _ridge(canvas.y**2 * 2 + 0.10 * canvas.x, mood.number, (3.0, 7.0), sharp=False)
    colour = torch.lerp(mood.by(SEASON, _GROUND_FAR), mood.by(SEASON, _GROUND), near) * (0.92 + 0.10 * bands)
    colour = torch.lerp(colour * mood.lighting, mood.haze, mood.foggy * (0.62 - 0.55 * near).clamp(min=0))
    top = mood.horizon + 0.032 - 0.03 * _ridge(canvas.x, mood.number, (1.1, 2.3), sharp=False)
    canvas.paint(colour, canvas.inside(top - canvas.y))


def _lake(canvas: _Canvas, mood: _Mood) -> None:
    """A lake, mirroring what stands behind it."""
    behind, size = canvas.image.clone(), canvas.image.shape[-1]
    canvas = canvas.window(0.54, 0.94)
    lake = mood.when(WATER, 1)
    x, y = mood.number(0.35, 0.65), mood.horizon + mood.number(0.155, 0.185)
    across, along = mood.number(0.40, 0.52), mood.number(0.085, 0.105)
    shore = 0.035 * (_ridge(canvas.x, mood.number, (2.0, 5.0), sharp=False) - 0.5)
    away = (((canvas.x - x) / across) ** 2 + ((canvas.y - y - shore) / along) ** 2).sqrt()
    sand = torch.lerp(mood.of(_SAND), mood.by(SEASON, _GROUND), mood.winter) * mood.lighting
    canvas.paint(sand, 0.55 * lake * canvas.inside((away - 1.12) * 0.1, 3.0))

    row = ((mood.horizon - (canvas.y - y + along)).clamp(0, 1) * size).long().clamp(0, size - 1)
    reflected = torch.gather(behind, 2, row.expand(-1, 3, -1, size))
    ripple = torch.sin(2 * torch.pi * (canvas.y * 34 + 0.7 * torch.sin(9 * canvas.x + 6 * mood.number())))
    surface = torch.lerp(reflected, mood.lit(_DEEP), 0.38) * (1 + 0.05 * ripple)
    glitter = mood.light * torch.exp(-(((canvas.x - mood.light_x) / 0.05) ** 2)) * (0.35 + 0.25 * ripple)
    surface = torch.lerp(torch.lerp(surface, mood.by(TIME, _LUMINARY), glitter), mood.haze, 0.45 * mood.foggy)
    canvas.paint(surface, lake * canvas.inside((away - 1) * 0.1, 1.5))


def _tree(canvas: _Canvas, mood: _Mood, x: Tensor, foot: Tensor, tall: Tensor, mist: float) -> None:
    """A round tree or a pine, as the scene has it, whose trunk stands at (x, foot)."""
    up, side = (foot - canvas.y) / tall, (canvas.x - x) / tall
    shading = 1.0 + 0.25 * (side * torch.where(mood.light_x > x, 4.0, -4.0)).clamp(-1, 1)
    haze = mist * (0.35 + 0.9 * mood.foggy)
    trees = mood.when(TREES, 1, PINES)
    trunk = torch.maximum(side.abs() - 0.045, torch.maximum(up - 0.45, -up))
    canvas.paint(torch.lerp(mood.lit(_BARK), mood.haze, haze), trees * canvas.inside(trunk * tall))

    crown = torch.ones_like(side + up)
    for blob_x, blob_y, radius in ((0.0, 0.66, 0.30), (-0.19, 0.52, 0.20), (0.19, 0.52, 0.20), (0.0, 0.84, 0.19)):
        crown = torch.minimum(crown, ((side - blob_x) ** 2 + (up - blob_y) ** 2).sqrt() - radius)
    leaves = mood.by(SEASON, _CANOPY) * mood.lighting * shading * (0.80 + 0.28 * up.clamp(0, 1))
    canvas.paint(torch.lerp(leaves, mood.haze, haze), mood.when(TREES, 1) * canvas.inside(crown * tall, 1.5))

    tier = (up - 0.14) / 0.86
    step = (tier * 4) % 1
    width = 0.27 * (1 - tier) * (1.18 - 0.36 * step) + 0.008
    needles = torch.maximum(side.abs() - width, torch.maximum(-tier, tier - 1) * 0.5)
    colour = mood.by(SEASON, _PINE) * mood.lighting * shading * (0.85 + 0.25 * tier.clamp(0, 1))
    colour = torch.lerp(colour, mood.lit(_SNOW), 0.85 * mood.winter * (step < 0.42))
    canvas.paint(torch.lerp(colour, mood.haze, haze), mood.when(TREES, PINES) * canvas.inside(needles * tall, 1.5))


def _trees(canvas: _Canvas, mood: _Mood) -> None:
    """A row of small trees far away, and tall ones that frame the picture."""
    number = mood.number
    for place in range(6):
        left = place / 6
        window = canvas.window(0.42, 0.68, max(0.0, left - 0.06), min(1.0, left + 0.23))
        foot, tall = mood.horizon + number(0.055, 0.075), number(0.09, 0.13)
        _tree(window, mood, left + number(0.1, 0.9) / 6, foot, tall, mist=0.45)
    for place in range(4):
        on_left = place % 2 == 0
        window = canvas.window(0.38, 1.0, 0.0 if on_left else 0.66, 0.34 if on_left else 1.0)
        x = number(0.02, 0.13) if on_left else number(0.87, 0.98)
        _tree(window, mood, x, mood.horizon + number(0.30, 0.38), number(0.32, 0.42), mist=0.0)


def _house(canvas: _Canvas, mood: _Mood) -> None:
    canvas = canvas.window(0.34, 0.76, 0.05, 0.95)
    house = 1 - mood.when(HOUSE, 0)
    x = torch.where(mood.number() < 0.5, mood.number(0.26, 0.34), mood.number(0.66, 0.74))
    width, foot = mood.number(0.105, 0.125), mood.horizon + mood.number(0.115, 0.145)
    # In units of half the house's width, from the middle of its foot.
    side, up = (canvas.x - x) / width, (foot - canvas.y) / width

    def block(left_right: Tensor, half_width: float, bottom: float, top: float) -> Tensor:
        outside = torch.maximum(left_right.abs() - half_width, torch.maximum(up - top, bottom - up))
        return house * canvas.inside(outside * width)

    boards = 0.95 + 0.05 * torch.sign(torch.sin(up * 40))
    shaded = torch.where(side * torch.sign(mood.light_x - x) > 0, 1.0, 0.90)
    wall = mood.by(HOUSE, _WALL) * boards * shaded * mood.lighting
    walls = block(side, 1.0, 0.0, 1.15)
    canvas.paint(wall, walls)
    canvas.paint(mood.lit(_BRICK), block(side - 0.55, 0.13, 1.3, 2.05))
    slope = torch.maximum(side.abs() - 1.22 * (1 - (up - 1.10) / 0.95), 1.10 - up)
    roof = house * canvas.inside(slope * width * 0.7)
    canvas.paint(mood.by(SEASON, _ROOF) * mood.lighting, roof)
    # Eaves, so that a white house stands out from its snowy roof.
    canvas.paint(mood.lit(_WOOD), block(side, 1.20, 1.06, 1.15))
    canvas.paint(mood.lit(_WOOD), block(side, 0.19, 0.0, 0.70))
    windows = side.abs() - 0.60
    panes = canvas.inside(torch.maximum(windows.abs() - 0.22, (up - 0.62).abs() - 0.22) * width)
    glass = torch.lerp(mood.lit(_PANE), mood.of(_LAMP), torch.maximum(mood.sunset, mood.night))
    canvas.paint(glass, house * panes)
    bars = torch.minimum(windows.abs(), (up - 0.62).abs()) < 0.035
    canvas.paint(wall, house * panes * bars)
    canvas.paint(mood.haze, 0.22 * mood.foggy * torch.maximum(walls, roof))


def _flowers_and_leaves(canvas: _Canvas, mood: _Mood) -> None:
    """Flowers in spring, fallen leaves in autumn, close to the viewer."""
    canvas = canvas.window(0.84, 1.0)
    spots = torch.zeros_like(mood.light)
    for _ in range(9):
        spots = torch.maximum(spots, canvas.disc(mood.number(), mood.number(0.86, 0.985), 0.010, 2.0))
    canvas.paint(mood.by(SEASON, _PETALS) * mood.lighting, 0.85 * spots * mood.when(SEASON, SPRING, AUTUMN))


def render(scenes: Scenes, size: int = 256) -> Tensor:
    """Draw the scenes.

    Args:
        scenes: B scenes, on the device that shall draw them.
        size: Side of the square pictures in pixels.

    Returns:
        (B, 3, size, size) float32 in 0..1.
    """
    canvas = _Canvas.blank(len(scenes.choices), size, scenes.choices.device)
    mood = _Mood(scenes)
    for part in (
        _sky,
        _sun_or_moon,
        _clouds,
        _mountains_and_hills,
        _ground,
        _lake,
        _trees,
        _house,
        _flowers_and_leaves,
    ):
        part(canvas, mood)
    return canvas.image.clamp_(0, 1)
