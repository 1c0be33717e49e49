"""Winograd: 3x3 convolutions with fewer multiplications, for processors.

F(m x m, 3x3) computes m x m outputs from a tile of (m + 2) x (m + 2) inputs with one multiplication for each of these,
where the direct way needs 9 for each output: 2.25 times fewer for m = 2, 4 times fewer for m = 4. Tiles and filters
are transformed by constant matrices; in between, each place of the tile is one matrix product over the channels, so
that 16 or 36 plain products do all the work. Filters are transformed once.

The larger m, the larger the rounding errors. `ERROR` says how large.

Source: "Fast Algorithms for Convolutional Neural Networks" (Lavin, Gray, 2015, arXiv:1509.09308), after S. Winograd,
"Arithmetic Complexity of Computations" (1980). Applied to Stable Diffusion: "Open-Source Acceleration of
Stable-Diffusion.cpp Deployable on All Devices" (Lv, Ng et al., 2024, arXiv:2412.05781).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from math import ceil, prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..compiling.tally import count
from .method import (
    NO_BF16,
    Configuration,
    Convolution,
    MethodRun,
    Model,
    Run,
    State,
    check_choice,
    check_number,
    check_unet,
    has_bf16,
)

POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}
"""Where the polynomials are evaluated, beside infinity, for each m. With 1 and 2, the usual choice in the place of 3/4
and 3/2, F(4x4) rounds twice as much."""

ERROR: dict[tuple[int, torch.dtype], float] = {
    (2, torch.float32): 4e-6,
    (4, torch.float32): 2e-5,
    (2, torch.bfloat16): 0.3,
}
"""How far an output may be from the exact one, whatever the input, for each m and dtype of the products: relative to
the greatest output that inputs of this size could give, which is the sum over channels of the greatest |x| times the
sum of the filter's |w|, and |bias|."""

TYPICAL: dict[tuple[int, torch.dtype], float] = {
    (2, torch.float32): 8e-7,
    (4, torch.float32): 3e-6,
    (2, torch.bfloat16): 7e-3,
}
"""The norm of the error relative to the output's, at most, for features as they are in a UNet."""

BLOCK_BYTES = 16 << 20
"""Transformed inputs at a time: so many that reading the filters for each block is the smaller part, and no more than
a processor's cache may hold until the products have read them."""

GAIN = 0.95
"""At most this share of the host's time, or its own convolution stays."""
SPARING = 1.15
"""How many times as long as Winograd's forms torch's convolution in bfloat16 may take, which takes an eighth of their
memory."""
DEEP, DEEPER = 1024, 4
"""Inputs with so many channels, and so many times as many as places, are convolved by one product of their own in
bfloat16: the filters are then more than what they are applied to, where torch's convolution takes up to six times as
long as it need."""
ROUNDS = 3
BEHIND = 1.3
"""What takes this many times as long as the fastest is not measured again."""

MIB = 2**20
MOST_MIB = 2**20
"""What a bound on the filters' memory may be."""


@dataclass(frozen=True)
class Form:
    """A variant.

    Attributes:
        size: m, the outputs of a tile in each direction: 2 or 4.
        products: dtype of the transformed tiles and filters.
    """

    size: int
    products: torch.dtype = torch.float32

    @property
    def tile(self) -> int:
        """The inputs of a tile in each direction."""
        return self.size + 2

    def __str__(self) -> str:
        name = f"F({self.size}x{self.size})"
        return name if self.products == torch.float32 else f"{name} in {_short(self.products)}"

    def filter_bytes(self, weight: Tensor) -> int:
        """The size of the transformed filters of a weight (Cout, C, 3, 3)."""
        return weight.shape[0] * weight.shape[1] * self.tile**2 * self.products.itemsize

    memory_costs: ClassVar[float] = SPARING

    def transform(self, weight: Tensor) -> Filters:
        """See `transform_filters`."""
        return transform_filters(weight, self)

    def stand_in(self, weight: Tensor) -> Filters:
        """Filters that take as long to multiply with. Transforming them would take longer than measuring."""
        return _laid_out(weight.new_ones(self.tile**2, *weight.shape[:2], dtype=self.products))

    def convolve(self, x: Tensor, filters: Any, bias: Tensor | None, memory_format: torch.memory_format) -> Tensor:
        """See `convolve`."""
        return convolve(x, filters, bias, self, memory_format)


@dataclass(frozen=True)
class Direct:
    """No variant of Winograd's: as many products as there are, in another dtype and channels last, by torch's own
    convolution, or as a matrix product where that is faster.

    Attributes:
        dtype: what it computes in.
    """

    dtype: torch.dtype = torch.bfloat16
    memory_costs: ClassVar[float] = 1.0

    def __str__(self) -> str:
        return f"direct in {_short(self.dtype)}"

    def filter_bytes(self, weight: Tensor) -> int:
        """The size of a weight in this dtype."""
        return weight.numel() * self.dtype.itemsize

    def transform(self, weight: Tensor) -> Tensor:
        """The weight, (Cout, C, 3, 3), in this dtype."""
        return weight.detach().to(self.dtype, memory_format=torch.channels_last)

    stand_in = transform

    def convolve(self, x: Tensor, filters: Any, bias: Tensor | None, memory_format: torch.memory_format) -> Tensor:
        """As `convolve`."""
        low = None if bias is None else bias.to(self.dtype)
        # Not by the batch, which the host makes smaller as memory goes: bits would follow.
        if x.shape[1] >= max(DEEP, DEEPER * x.shape[2] * x.shape[3]):
            return _product(x, filters, low, memory_format)
        y = functional.conv2d(x.to(self.dtype, memory_format=torch.channels_last), filters, low, padding=1)
        return y.to(x.dtype, memory_format=memory_format)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    """A convolution as one matrix product, in the dtype of a weight that is channels last. It lays out nine times the
    input, so it is for small ones."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros((batch, height + 2, width + 2, channels), dtype=weight.dtype)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    taken = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)
    y = functional.linear(taken, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.view(batch, height, width, -1).permute(0, 3, 1, 2).to(x.dtype, memory_format=memory_format)


FORMS = ("auto", "F(2x2)", "F(4x4)")
"""``auto`` measures them all, for each shape; the others are taken everywhere."""


def forms(name: str, dtype: torch.dtype, may_be_bf16: bool = False) -> tuple[Form | Direct, ...]:
    """What a setting stands for, for inputs of a dtype. Inputs in float32 may be convolved in bfloat16 if that is
    allowed.

    Products in bfloat16 only with m = 2: with m = 4 their errors are five times those of the host's bfloat16.
    """
    if name != "auto":
        return (Form(2 if name == "F(2x2)" else 4),)
    in_bfloat16: tuple[Form | Direct, ...] = ()
    if dtype == torch.bfloat16:
        in_bfloat16 = (Form(2, torch.bfloat16),)
    elif dtype == torch.float32 and may_be_bf16:
        in_bfloat16 = (Direct(torch.bfloat16),)
    return (Form(2), Form(4), *in_bfloat16)


# The transforms


@cache
def transforms(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of F(size x size, 3x3) by Cook and Toom, on flattened tiles, float64.

    With n = size + 2: of inputs (n*n, n*n), of filters (n*n, 9) and of outputs (size*size, n*n).
    """
    points = POINTS[size]
    inputs, filters = [], []
    for i, point in enumerate(points):
        others = [other for k, other in enumerate(points) if k != i]
        inputs.append([*_expanded(others), Fraction(0)])
        scale = prod((point - other for other in others), start=Fraction(1))
        filters.append([point**k / scale for k in range(3)])
    inputs.append(_expanded(list(points)))
    filters.append([Fraction(k == 2) for k in range(3)])
    outputs = [[*(point**k for point in points), Fraction(k == size - 1)] for k in range(size)]
    return _both_ways(inputs), _both_ways(filters), _both_ways(outputs)


def _expanded(roots: list[Fraction]) -> list[Fraction]:
    """The coefficients, lowest first, of the polynomial with these roots."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*(-root * value for value in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def _both_ways(rows: list[list[Fraction]]) -> Tensor:
    """A transform of rows and columns at once, as a matrix on flattened tiles."""
    matrix = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    return torch.kron(matrix, matrix)


@cache
def _matrix(which: int, form: Form) -> Tensor:
    return transforms(form.size)[which].to(form.products)


@dataclass(frozen=True)
class Filters:
    """Transformed filters, as the products take them.

    Attributes:
        outputs: Cout.
        places: (Cout, C) for each place of a tile: one tensor (n*n, Cout, C), or oneDNN's own layout of each.
    """

    outputs: int
    places: Tensor | tuple[Tensor, ...]

    def multiply(self, inputs: Tensor, out: Tensor) -> None:
        """The products of inputs (n*n, tiles, C) with the filters, to `out` (n*n, tiles, Cout)."""
        if isinstance(self.places, Tensor):
            torch.bmm(inputs, self.places.transpose(1, 2), out=out)
            return
        for some, filters, products in zip(inputs, self.places, out, strict=True):
            products.copy_(torch.ops.mkldnn._linear_pointwise(some, filters, None, "none", [], ""))


def has_onednn() -> bool:
    """Whether torch has oneDNN's products with weights in a layout of its own, as inductor calls them. They take half
    the time of MKL's on processors that are not Intel's, and no more on others."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_built and all(hasattr(torch.ops.mkldnn, name) for name in names)


def lays_out(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays weights of a dtype out here: some processors refuse it for bfloat16."""
    return has_onednn() and (dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def transform_filters(weight: Tensor, form: Form) -> Filters:
    """The filters of a weight (Cout, C, 3, 3), in the form's dtype; made in float64, so that they are rounded once."""
    return _laid_out(_transformed(weight, form))


def _laid_out(filters: Tensor) -> Filters:
    """(n*n, Cout, C), as the products take them."""
    if not lays_out(filters.dtype):
        return Filters(filters.shape[1], filters)
    return Filters(filters.shape[1], tuple(map(torch.ops.mkldnn._reorder_linear_weight, filters)))


def _transformed(weight: Tensor, form: Form) -> Tensor:
    """(n*n, Cout, C)."""
    outputs, channels = weight.shape[:2]
    matrix = transforms(form.size)[1]
    filters = weight.new_empty((form.tile**2, outputs, channels), dtype=form.products)
    # In parts: float64 would take many times the filters' own memory.
    part = max(1, BLOCK_BYTES // (8 * form.tile**2 * channels))
    for first in range(0, outputs, part):
        some = weight[first : first + part].permute(2, 3, 0, 1).reshape(9, -1).double()
        filters[:, first : first + part] = (matrix @ some).view(form.tile**2, -1, channels)
    return filters


def convolve(
    x: Tensor,
    filters: Filters,
    bias: Tensor | None,
    form: Form,
    memory_format: torch.memory_format = torch.contiguous_format,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """A 3x3 convolution of stride 1 with zeros around.

    Args:
        x: (B, C, H, W), of any size, dtype and memory format.
        filters: from `transform_filters`.
        bias: (Cout,), or None.
        form: the variant.
        memory_format: the output's: contiguous or channels last.
        block_bytes: transformed inputs at a time.

    Returns:
        (B, Cout, H, W), of x's dtype. A value that is not finite makes all outputs of its tile so.
    """
    batch, channels, height, width = x.shape
    outputs, size, places = filters.outputs, form.size, form.tile**2
    rows, columns = ceil(height / size), ceil(width / size)
    inputs_of, outputs_of = _matrix(0, form), _matrix(2, form)

    padded = x.new_zeros((batch, rows * size + 2, columns * size + 2, channels), dtype=form.products)
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    y = torch.empty((batch, outputs, rows * size, columns * size), dtype=x.dtype, memory_format=memory_format)
    tiles, results = (
        _tiles(padded, form.tile, size, rows, columns),
        _tiles(y.permute(0, 2, 3, 1), size, size, rows, columns),
    )

    most = max(1, block_bytes // (places * channels * form.products.itemsize))
    blocks = list(_blocks(batch, rows, columns, most))
    largest = max((_length(images) * _length(lines) for images, lines in blocks), default=0) * columns
    # Made once: fresh memory for each block would have to be mapped anew.
    memory = [
        x.new_empty(size_of * largest, dtype=form.products)
        for size_of in (places * channels, places * channels, places * outputs, size * size * outputs)
    ]
    for images, lines in blocks:
        within = (_length(images), _length(lines), columns)
        number = prod(within)
        taken, turned = (buffer[: places * number * channels].view(places, -1) for buffer in memory[:2])
        product = memory[2][: places * number * outputs].view(places, number, outputs)
        result = memory[3][: size * size * number * outputs].view(size * size, -1)
        taken.view(form.tile, form.tile, *within, channels).copy_(tiles[:, :, images, lines])
        torch.mm(inputs_of, taken, out=turned)
        filters.multiply(turned.view(places, number, channels), product)
        torch.mm(outputs_of, product.view(places, -1), out=result)
        if bias is not None:
            result.view(-1, outputs).add_(bias)
        results[:, :, images, lines] = result.view(size, size, *within, outputs)
    if y.shape[2:] == x.shape[2:]:
        return y
    return y[:, :, :height, :width].contiguous(memory_format=memory_format)


def _tiles(image: Tensor, tile: int, step: int, rows: int, columns: int) -> Tensor:
    """A view (tile, tile, B, rows, columns, C) of an image (B, H, W, C): tiles that begin every `step` pixels."""
    b, h, w, c = image.stride()
    shape = (tile, tile, image.shape[0], rows, columns, image.shape[3])
    return image.as_strided(shape, (h, w, b, step * h, step * w, c), image.storage_offset())


def _blocks(batch: int, rows: int, columns: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of tiles that are worked on at a time: about equal blocks of at most `most` tiles, or a row."""
    if rows * columns <= most:
        images = ceil(batch / ceil(batch * rows * columns / most)) if batch else 1
        for first in range(0, batch, images):
            yield slice(first, min(first + images, batch)), slice(0, rows)
        return
    lines = ceil(rows / ceil(rows * columns / max(most, columns)))
    for image in range(batch):
        for first in range(0, rows, lines):
            yield slice(image, image + 1), slice(first, min(first + lines, rows))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


# The method


@dataclass(frozen=True)
class Winograd(Configuration):
    """Attributes:
    form: one of `FORMS`. ``auto`` takes what is fastest for each shape here, or leaves the host's own convolution.
    bf16: whether ``auto`` may take torch's convolution in bfloat16 for features in float32.
    filters_mib: the most memory for transformed filters, in MiB; 0 for half of what was to spare.
    """

    form: str = "auto"
    bf16: bool = False
    filters_mib: int = 0

    stem = "winograd"
    title = "Winograd"
    phase = "weights"
    is_exact = False

    def __post_init__(self) -> None:
        check_choice(self.title, "form", self.form, FORMS)
        check_number(self.title, "filters_mib", self.filters_mib, 0, MOST_MIB)
        if self.form != "auto":
            # It means nothing then, and settings that mean the same are equal.
            object.__setattr__(self, "bf16", False)

    def off(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        check_unet(self.title, model, "It has no 3x3 convolutions to speed up; switch winograd off.")
        if model.device != "cpu":
            raise RuntimeError(
                f"{self.title}: it speeds up convolutions on a processor, but this model runs on {model.device}, whose "
                "own ones are faster. Switch winograd off."
            )

    def in_vain(self, device: str) -> str | None:
        return f"bf16 changes nothing: {NO_BF16}" if self.bf16 and not has_bf16() else None

    def begin(self, run: Run) -> WinogradRun:
        # Who set a model to fp32 means its convolutions too.
        is_fp32 = any(getattr(config, "compute_dtype", None) == "fp32" for config in run.plan)
        # Without bf16 arithmetic a convolution in it takes many times as long, and so does measuring it.
        return WinogradRun(self, self.bf16 and has_bf16() and not is_fp32)


@dataclass(frozen=True)
class Choice:
    """What is used for one shape.

    Attributes:
        faster: what is faster than the host's own convolution, the best first: the first is used whose filters fit.
        seconds: what each took, by name, the host's as ``host``; empty if nothing was measured.
    """

    faster: tuple[Form | Direct, ...]
    seconds: Mapping[str, float]

    def saved_s(self, form: Form | Direct) -> float:
        """Seconds that a call by this variant is shorter than the host's."""
        return self.seconds[HOST] - self.seconds[str(form)] if self.seconds else 0.0


HOST = "host"

HOST_IS_FASTER, PATCHED, NO_ROOM = "faster", "patched", "no room"
REASONS = {
    HOST_IS_FASTER: "it is faster",
    PATCHED: "weights are cast or patched as they are used",
    NO_ROOM: "filters would take more than they may",
}
"""Why the host's own convolution runs. The last one stands last."""


def measure(
    runs: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds that each of some functions takes: medians of a few rounds in turn, after one to warm up."""
    taken: dict[str, list[float]] = defaultdict(list)
    running = dict(runs)
    for number in range(1 + ROUNDS):
        for name, run in running.items():
            began = clock()
            run()
            taken[name].append(clock() - began)
        if not number:
            taken.clear()
            continue
        fastest = min(min(taken[name]) for name in running)
        running = {name: run for name, run in running.items() if name == HOST or min(taken[name]) < BEHIND * fastest}
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def choose(call: Convolution, candidates: tuple[Form | Direct, ...]) -> Choice:
    """Measure the host's convolution and some forms of ours on a call, and take the fastest."""
    runs: dict[str, Callable[[], object]] = {HOST: call.host}
    for form in candidates:
        filters = form.stand_in(call.weight)
        runs[str(form)] = partial(form.convolve, call.x, filters, call.bias, call.memory_format)
    seconds = measure(runs)
    ranked = sorted(candidates, key=lambda form: seconds[str(form)] * form.memory_costs)
    return Choice(tuple(form for form in ranked if seconds[str(form)] <= GAIN * seconds[HOST]), seconds)


class WinogradRun(MethodRun):
    """Takes each convolution's call, and counts what ran how."""

    def __init__(self, config: Winograd, may_be_bf16: bool = False):
        self.config = config
        self.may_be_bf16 = may_be_bf16
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        self.choices: dict[Hashable, Choice] = {}
        self.kept: dict[tuple[int, Form | Direct], int] = {}
        self.saved_s = 0.0
        self.room = 0
        self.measured = 0
        self.measured_s = 0.0
        self.lock = threading.Lock()

    def convolution(self, call: Convolution) -> Tensor:
        if call.is_patched:
            return self._by_host(call, PATCHED)
        # What its speed may depend on; not the batch, which the host makes smaller as memory goes: bits would follow.
        shape = (call.x.shape[1:], call.weight.shape, call.x.dtype, call.memory_format)
        key = (self.config.form, self.may_be_bf16, *shape, torch.get_num_threads())
        if key not in self.choices:
            self.choices[key] = self._choice(call, key)
        choice = self.choices[key]
        for form in choice.faster:
            size = form.filter_bytes(call.weight)
            owner = call.weight.data_ptr(), form
            if not self._may_keep(owner, size):
                continue
            filters = call.derived(form, size, partial(form.transform, call.weight))
            if filters is None:
                with self.lock:
                    self.kept[owner] = 0
                continue
            with self.lock:
                self._count(call, str(form))
                self.saved_s += choice.saved_s(form) if call.is_counted else 0
            return form.convolve(call.x, filters, call.bias, call.memory_format)
        return self._by_host(call, HOST_IS_FASTER if choice.seconds and not choice.faster else NO_ROOM)

    def _may_keep(self, owner: tuple[int, Form | Direct], size: int) -> bool:
        """Whether filters are within the bound that the user set, and counted: those that are used first come first."""
        with self.lock:
            if owner not in self.kept:
                if self.config.filters_mib and sum(self.kept.values()) + size > self.config.filters_mib * MIB:
                    return False
                self.kept[owner] = size
            return self.kept[owner] == size

    def _choice(self, call: Convolution, key: Hashable) -> Choice:
        """What to use for a shape: as set, or as measured in this process."""
        candidates = forms(self.config.form, call.x.dtype, self.may_be_bf16)
        if len(candidates) == 1:
            return Choice(candidates, {})

        def make() -> Choice:
            fitting = tuple(form for form in candidates if form.filter_bytes(call.weight) <= call.room)
            if not fitting:
                return Choice((), {})
            began = time.perf_counter()
            choice = choose(call, fitting)
            with self.lock:
                self.measured += 1
                self.measured_s += time.perf_counter() - began
            return choice

        return call.once(key, make)

    def _by_host(self, call: Convolution, why: str) -> Tensor:
        self.room = call.room
        with self.lock:
            self._count(call, why)
        return call.host()

    def _count(self, call: Convolution, how: str) -> None:
        if not call.is_counted:
            return
        self.calls[how] += 1
        self.shapes[how].add((*call.weight.shape[:2], *call.x.shape[2:]))

    def verdict(self) -> tuple[State, str]:
        if not self.calls:
            return "inert", "changed nothing: the UNet was not called"
        ours = [how for how in self.calls if how not in REASONS]
        parts = [f"{how} for {self._counted(how)}" for how in ours]
        parts += [f"ComfyUI's own for {self._counted(how)}: {why}" for how, why in REASONS.items() if how in self.calls]
        if NO_ROOM in self.calls:
            bound = self.config.filters_mib
            parts[-1] += f" ({bound} MiB)" if bound else f" ({self.room / MIB:.0f} MiB, half of what was to spare)"
        if not ours:
            return "inert", "; ".join(["no 3x3 convolution was replaced", *parts])
        number, total = sum(self.calls[how] for how in ours), sum(self.calls.values())
        saved = f", about {self.saved_s:.1f} s less" if self.saved_s else ""
        parts.insert(0, f"{number} of {count(total, 'call')} of 3x3 convolutions{saved}")
        parts.append(f"{sum(self.kept.values()) / MIB:.0f} MiB of filters kept")
        if self.measured:
            parts.append(f"measured {count(self.measured, 'shape')} in {self.measured_s:.1f} s, once")
        return "active", "; ".join(parts)

    def _counted(self, how: str) -> str:
        return f"{count(len(self.shapes[how]), 'shape')} ({count(self.calls[how], 'call')})"


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))
