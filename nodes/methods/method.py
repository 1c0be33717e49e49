"""What a method is to the engine: a frozen configuration, and one object per sampling run.

A configuration is plain data that the model carries. When sampling begins the engine asks it to
`begin`, and the object it gets back takes part at the points it overrides, counts what it did, and
is dropped when the run ends, however it ends. Nothing here knows the host: modules, tensors and
callables are handed in.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Phase = Literal["load", "weights", "compile", "evaluate"]
State = Literal["active", "inert"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Model:
    """What a method may know of the model it is put on.

    Attributes:
        name: what the user would call it, such as ``SDXL`` or ``Flux``.
        family: ``SD1``, ``SD2``, ``SDXL``, ``SDXL refiner``, or None for anything else.
        channels: ``model_channels`` of the UNet (320 for SD 1.x); None if it is not a UNet that
            Stable Diffusion's blocks make up (a diffusion transformer, a video UNet).
        depth: number of input blocks, which is that of output blocks and of skip connections.
        blocks: number of all blocks: input, middle (if it has one) and output.
        caches: other step caches on the same model, by the name of their node.
        compiler: the node that compiles this model as a whole, if one does.
        device: the torch device type that it runs on, such as ``cuda``.
    """

    name: str
    family: str | None
    channels: int | None
    depth: int
    blocks: int
    caches: tuple[str, ...] = ()
    compiler: str | None = None
    device: str = "cpu"

    @property
    def is_unet(self) -> bool:
        return self.channels is not None


SAME_LEVEL = 1e-3
"""Up to which gap two evaluations are at one noise level."""

MOST_AMPLIFIED = 2.0
"""An error is taken back in a step that has to make no more than this of it: solvers of higher order go on with what
they were given, and a step that is much smaller than the one before would have to be given far too much."""

LEAST_SIGNAL = 1e-3
"""Flow models begin with none, which would be an endless gap."""


@dataclass(frozen=True)
class Steps:
    """The steps of one run.

    A step goes from ``sigmas[i]`` to ``sigmas[i + 1]``, but samplers evaluate the model elsewhere
    too: an evaluation belongs to the step whose sigma it is at, or, between two of them, to the
    step that it lies in. So dpm_2's midpoint belongs to its own step; heun's second evaluation is
    made at the next step's sigma and belongs to that one; dpm_adaptive, which chooses its own
    sigmas, is placed on the list that it was given; a restart goes back to an earlier step.

    Attributes:
        sigmas: (steps + 1) noise levels, as the sampler got them.
        signal: how much of the picture a latent at a noise level holds: all of it in Stable Diffusion's scale, where
            noise is added; 1 - sigma on flow models, where it takes the picture's place.
    """

    sigmas: tuple[float, ...]
    signal: Callable[[float], float] = field(default=lambda sigma: 1.0, compare=False)

    # Samplers that convert sigma to log-snr and back (uni_pc) return it with float32 rounding.
    TOLERANCE: ClassVar[float] = 1e-4

    # By how much a step may be longer than the one before it, in lists that schedulers make.
    UNEVEN: ClassVar[float] = 8.0

    def __len__(self) -> int:
        return max(0, len(self.sigmas) - 1)

    def at(self, sigma: float, current: int = 0) -> int:
        """The step that an evaluation at `sigma` belongs to, 0 to len - 1.

        Args:
            sigma: noise level of the evaluation.
            current: the step of the evaluation before; used only where the list goes up (a
                flipped or restarting schedule) and sigma alone does not say which step it is.
        """
        last = len(self) - 1
        if last < 0:
            return 0
        if self._rising is not None:
            return min(max(bisect_right(self._rising, -sigma) - 1, 0), last)
        for i in chain(range(current, last + 1), range(current)):
            if abs(self.sigmas[i] - sigma) <= self.TOLERANCE * max(abs(sigma), 1e-8):
                return i
        return min(current, last)

    def following(self, step: int) -> float:
        """The noise level that a step goes to; 0 past the last."""
        return self.sigmas[step + 1] if step < len(self) else 0.0

    def begins_at(self, step: int, sigma: float) -> float:
        """Where the step of an evaluation at `sigma` begins: nodes that tell the model less noise than there is do not
        make the sampler's step shorter, nor do solvers that evaluate within it."""
        return max(sigma, self.sigmas[step]) if step < len(self.sigmas) else sigma

    def weight(self, step: int, sigma: float) -> float:
        """By how much the step of an evaluation moves x / sigma for each unit of its prediction, whatever the solver; 0
        at the end."""
        begins, following = self.begins_at(step, sigma), self.following(step)
        return 1 / following - 1 / begins if 0 < following < begins else 0.0

    def share_of(self, step: int, sigma: float) -> float:
        """By what share the step of an evaluation makes the picture in the latent the prediction."""
        return self.share(self.begins_at(step, sigma), self.following(step))

    def reach_of(self, step: int, sigma: float) -> float:
        """By what share it decides on the picture, whatever the solver: one of second order draws a line through two
        predictions, which in a step that is far longer than the way between them makes far more of both."""
        found = self.share_of(step, sigma)
        for at in (step, step + 1):
            if 0 < at < len(self):
                way, length = (self.gap(self.sigmas[i], self.sigmas[i + 1]) for i in (at - 1, at))
                if 0 < self.UNEVEN * way < length < math.inf:
                    found = max(found, self.share(self.sigmas[at], self.sigmas[at + 1]) * length / (2 * way))
        return found

    def noise(self, sigma: float) -> float:
        """Noise in proportion to the picture: what one noise level has in common in all models."""
        return sigma / max(self.signal(sigma), LEAST_SIGNAL)

    def gap(self, sigma: float, other: float) -> float:
        """How far two noise levels are apart, in the log of `noise`."""
        noises = self.noise(sigma), self.noise(other)
        return abs(math.log(noises[0] / noises[1])) if all(0 < noise < math.inf for noise in noises) else math.inf

    def share(self, sigma: float, following: float) -> float:
        """By what share a step from one noise level to another makes the picture in the latent the prediction."""
        return max(0.0, 1 - self.noise(following) / self.noise(sigma)) if sigma > 0 else 1.0

    @cached_property
    def _rising(self) -> list[float] | None:
        """Where each step begins, negated for bisection; None if the sigmas go up somewhere."""
        if any(a < b for a, b in pairwise(self.sigmas)):
            return None
        return [-sigma * (1 + self.TOLERANCE) for sigma in self.sigmas[:-1]]


@dataclass(frozen=True)
class Run:
    """What a method gets when a run begins.

    Attributes:
        model: the model that is sampled, with everything that was put on it later.
        steps: the run's steps.
        percent_to_sigma: noise level at a fraction of the training timesteps, 0 the noisiest.
        is_compiled: whether something compiles the model in this run.
        plan: the settings of all methods that take part in it.
        adapts_steps: whether the sampler chooses its steps by what the model gives.
    """

    model: Model
    steps: Steps
    percent_to_sigma: Callable[[float], float]
    is_compiled: bool = False
    plan: tuple[Configuration, ...] = ()
    adapts_steps: bool = False

    def sigma_range(self, start_percent: float, end_percent: float) -> Callable[[float], bool]:
        """Whether a sigma lies between two fractions of the training timesteps, ends included."""
        high, low = self.percent_to_sigma(start_percent), self.percent_to_sigma(end_percent)
        return lambda sigma: low <= sigma <= high


NO_BF16 = "this processor has no bf16 arithmetic"


def has_bf16() -> bool:
    """Whether this processor computes in bf16, and not by way of fp32: x86 with AVX512-BF16 or AMX."""
    # Not in every torch that the host supports, and no part of its documented interface.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


@dataclass
class Evaluation:
    """One evaluation of the model by the sampler; heun and the like make two a step.

    Attributes:
        step: the step it belongs to.
        sigma: its noise level.
        predictions: conditions that have gone through the network so far in this evaluation.
        is_forecast: whether it is foretold, and not made.
        is_cached: whether a part of the model was reused in it from an earlier one.
        is_again: whether it is made once more, since a method did not accept what came of it.
        budget: what may be left in the latent, relative to it, by what is not evaluated in it; None if nothing holds
            that under a budget.
        is_reused: whether the positive alone was evaluated in it, with the guidance of earlier ones.
        error: what that leaves in the latent, relative to it.
        devices: on how many the host samples.
        working: the copies of the model, one on each device, that computed in it so far.
        is_observed: whether a method looks at what layers are given in it: nothing of it runs compiled.
    """

    step: int
    sigma: float
    predictions: int = 0
    is_forecast: bool = False
    is_cached: bool = False
    is_again: bool = False
    budget: float | None = None
    is_reused: bool = False
    error: float = 0.0
    devices: int = 1
    working: set[Hashable] = field(default_factory=set)
    is_observed: bool = False


class Guidance(Protocol):
    """One evaluation as the guider makes it, and without guidance."""

    @property
    def is_guided(self) -> bool:
        """Whether anything besides the positive would be evaluated."""

    @property
    def left_out(self) -> Collection[str]:
        """Names of the nodes that `positive_alone` left out, as they need what was not evaluated."""

    @property
    def conditions(self) -> int:
        """How many conditions of all the guider's prompts are in force at this noise level."""

    @property
    def needing_negative(self) -> Collection[str]:
        """Names of the nodes inside the model that work on the negative as it is evaluated, or remember it."""

    def guided(self) -> Tensor:
        """What the guider makes of it: the denoised latent, (B, C, H, W)."""

    def positive_alone(self) -> Tensor:
        """The positive prediction, (B, C, H, W), with nothing else evaluated."""


class ConditionsCall(Protocol):
    """The host's evaluation of the conditions that a guider asks for at once: the positive and the negative, or others;
    all of them, or one."""

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What identifies each of them from one evaluation to the next: the prompts, the model, the window."""

    @property
    def states(self) -> tuple[Hashable, ...]:
        """What of each is in force at this noise level: with another one, its prediction may jump."""

    @property
    def x(self) -> Tensor:
        """The latent, (B, C, ...)."""

    @property
    def sigma(self) -> float:
        """Its noise level."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of each prediction in what the sampler gets; None where that is not their sum."""

    @property
    def are_positive(self) -> tuple[bool, ...]:
        """Which of them are the guider's positive prompt."""

    @property
    def window(self) -> tuple[int, ...]:
        """The frames that it is of; empty for all."""

    def only(self, places: Sequence[int]) -> ConditionsCall:
        """The same for some of the conditions."""

    def evaluate(self) -> Sequence[Tensor]:
        """The model's denoised latent for each, (B, C, ...)."""


@dataclass
class Made:
    """What a run made of a model's weights; the weights themselves stay as they are.

    Attributes:
        modules: how many modules it serves.
        extra_bytes: memory that it takes beside the weights.
        left: how many more modules could have it but go on as they are, by the reason.
        others: how many parts other nodes put into the model, which go on as they are.
    """

    modules: int = 0
    extra_bytes: int = 0
    left: Counter[str] = field(default_factory=Counter)
    others: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Attention:
    """One call of attention inside the model.

    Attributes:
        q: (B, tokens, heads * width); or, if `is_split`, (B, heads, tokens, width).
        k: likewise, over the tokens attended to; its heads may be fewer.
        v: likewise.
        heads: of q.
        mask: True or 0 where attention is paid, False or a negative number where not; of shape
            (..., tokens of q, tokens of k); None for everywhere.
        is_split: whether the heads have a dimension of their own.
        keeps_split: whether they are to have one in the output too.
        scale: factor of the products; None for the usual one.
        has_fewer_kv_heads: whether k and v may have fewer heads than q.
        host_name: what the host calls its own attention, such as ``sub_quad`` or ``pytorch``.
        host: the host's own attention on all of this.
        needs_precision: whether the model asks for no less than its own dtype.
        is_counted: whether it is part of the run, and not only timed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    is_split: bool
    keeps_split: bool
    scale: float | None
    has_fewer_kv_heads: bool
    host_name: str
    host: Callable[[], Tensor]
    needs_precision: bool = False
    is_counted: bool = True


@dataclass
class Quantized(Made):
    """Linear layers with quantized weights.

    Attributes:
        original_bytes: memory that the weights of these layers take as they are.
        offloaded_bytes: how much of that left the device meanwhile.
        hooked: how many of the layers are quantized anew as hooks change them.
        elapsed_s: what quantizing took; 0 if it was done in an earlier run.
        left_bytes: memory of the layers that go on as they are, by the reason.
    """

    original_bytes: int = 0
    offloaded_bytes: int = 0
    hooked: int = 0
    elapsed_s: float = 0.0
    left_bytes: Counter[str] = field(default_factory=Counter, kw_only=True)


class Quantizer(Protocol):
    """How weights are quantized. Hashable and equal if the same comes of it."""

    def leaves_out(self, path: str, layer: torch.nn.Linear, is_in_block: bool) -> str | None:
        """Why a layer stays as it is, in words that follow a number of layers; None if it is quantized.

        Args:
            path: its path in the model.
            is_in_block: whether it is inside one of the blocks with attention that the model is a list of.
        """

    def quantize(self, weight: Tensor) -> torch.nn.Parameter:
        """The weight (out, in) of a layer that computes in the weight's dtype. It takes that weight's place."""

    def should_offload(self, is_partially_loaded: bool) -> bool:
        """Whether the weights that were quantized leave the device, where the host loaded all or part of the model."""


@dataclass
class Pruned(Quantized):
    """Linear layers with 2:4 sparse weights.

    Attributes:
        errors: of each layer's outputs in the first evaluation, relative to them, by the layers that are pruned.
        work: their share of all linear layers' multiplications.
        why_dense: why their products are computed as any others, in words that follow ``since``; empty if by kernels
            for sparse weights.
    """

    errors: dict[str, float] = field(default_factory=dict, kw_only=True)
    work: float = field(default=0.0, kw_only=True)
    why_dense: str = field(default="", kw_only=True)


class Pruner(Protocol):
    """Which layers get 2:4 sparse weights. Hashable and equal if the same comes of it."""

    @property
    def sparse_error(self) -> float:
        """The most that a layer's outputs may lose in the first evaluation, relative to them."""

    @property
    def sparse_share(self) -> float:
        """The most of the multiplications of these layers, those first that save most for what they lose."""

    def leaves_out(self, path: str, layer: torch.nn.Linear, is_in_block: bool) -> str | None:
        """As `Quantizer.leaves_out`."""

    def should_offload(self, is_partially_loaded: bool) -> bool:
        """As `Quantizer.should_offload`."""


class ModelCall(Protocol):
    """One call of the model: one batch of conditions. Its weights are loaded, its inputs not yet cast."""

    @property
    def device(self) -> str:
        """The torch device type that it runs on."""

    @property
    def dtype(self) -> torch.dtype:
        """What the host computes in."""

    @property
    def is_one_of_several(self) -> bool:
        """Whether the host samples with copies of this model on other devices at the same time."""

    @property
    def attention_before(self) -> str | None:
        """The attention that another node has put on this model, by its name; None if none did."""

    @property
    def own_attentions(self) -> int:
        """Layers for which the checkpoint names an attention, which the host uses unless another takes its place."""

    @property
    def has_self_attention_patches(self) -> bool:
        """Whether other nodes change or replace what self-attention is given."""

    def computing_in(
        self, dtype: torch.dtype, layout: torch.memory_format | None, only_transformers: bool
    ) -> AbstractContextManager[Made]:
        """Computes the call, or a UNet's transformers alone, in another dtype; convolutions in this memory format."""

    def attending(self, attend: Callable[[Attention], Tensor]) -> AbstractContextManager[None]:
        """Puts `attend` in the place of the host's attention."""

    def fusing_qkv(self) -> AbstractContextManager[Made]:
        """Gives each self-attention one projection for q, k and v, in place of three."""

    def quantizing(self, quantizer: Quantizer) -> AbstractContextManager[Quantized]:
        """Computes the call with quantized weights in the linear layers."""

    def observing(self, pruner: Pruner, attempt: int) -> AbstractContextManager[None]:
        """Looks at what linear layers are given in this call of an evaluation that is observed, and forgets what an
        earlier attempt at it gave them."""

    def pruning(self, pruner: Pruner) -> AbstractContextManager[Pruned]:
        """Computes the call with 2:4 sparse weights in the linear layers, corrected by what was observed."""


class UNetCall(Protocol):
    """One call of the UNet: one batch of conditions."""

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What identifies each part of the batch from one evaluation to the next, in equal parts along
        the batch; empty if nothing does."""

    def full(self, branch: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The host's own forward.

        Returns:
            the output (B, C, H, W), and the features (B, C', H', W') that enter the output block
            which skip connection `branch` joins: a copy, before any patch touches them.
        """

    def partial(self, branch: int, deep: Tensor) -> Tensor:
        """The input blocks 0 to `branch` and the output blocks that their skips join, on given deep
        features (B, C', H', W'), which may be written to. Returns the output (B, C, H, W)."""


class Convolution(Protocol):
    """One call of one of the UNet's 3x3 convolutions: stride 1, zeros around, one group."""

    @property
    def x(self) -> Tensor:
        """(B, C, H, W)."""

    @property
    def weight(self) -> Tensor:
        """(Cout, C, 3, 3)."""

    @property
    def bias(self) -> Tensor | None:
        """(Cout,)."""

    @property
    def memory_format(self) -> torch.memory_format:
        """What the output is to have: channels last where the host's own convolution gives it so."""

    @property
    def is_patched(self) -> bool:
        """Whether the weight is this call's alone: cast or patched as it is used, or changed within the run."""

    @property
    def is_counted(self) -> bool:
        """Whether it is part of the run, and not only timed."""

    def host(self) -> Tensor:
        """The host's own convolution: (B, Cout, H, W)."""

    @property
    def room(self) -> int:
        """Bytes that all that is derived in a run may take; the same throughout the process."""

    def derived(self, key: Hashable, size: int, make: Callable[[], Found]) -> Found | None:
        """What was made of the weight as it is now, for this run and later ones; None where it does not fit `room`
        along with what this run derived before."""

    def once(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """What was found out under a key, once in this process."""


class Compilation(Protocol):
    """What compiling did in a run so far."""

    @property
    def is_active(self) -> bool:
        """Whether anything ran compiled."""

    def sentence(self) -> str:
        """All of it, for a user."""


@dataclass(frozen=True)
class Loaded:
    """How the host has a model's weights, at one moment.

    Attributes:
        size_mib: all of them.
        resident_mib: those on the device that the model is used on.
        layers: how many layers have weights.
        resident_layers: those whose weights are on that device.
        device: its name, such as ``cuda:0``.
        is_kept_there: whether that is also where weights wait that are not in use.
        is_dynamic: whether the host brings weights to it as they are used, by itself.
        spread: how another node spreads the weights over devices, which the host's loading then goes by; empty if none.
        streams: how many weights can be on their way while the device computes; 0 if it waits for each.
        peak_mib: the most in use on the device since the run began; None if it does not tell.
    """

    size_mib: float
    resident_mib: float
    layers: int
    resident_layers: int
    device: str
    is_kept_there: bool = False
    is_dynamic: bool = False
    spread: str = ""
    streams: int = 0
    peak_mib: float | None = None


class MethodRun:
    """A method during one run. Override the points it takes part in; the engine installs no others."""

    def predict_noise(self, evaluation: Evaluation, guidance: Guidance) -> Tensor:
        """Around one evaluation. Returns the denoised latent."""
        raise NotImplementedError

    def conditions(self, evaluation: Evaluation, call: ConditionsCall) -> Sequence[Tensor]:
        """Around the model's part in an evaluation, of all conditions at once. Returns what `call.evaluate` does."""
        raise NotImplementedError

    def observes(self, evaluation: Evaluation) -> bool:
        """Before one evaluation: whether this method looks at what layers are given in it."""
        raise NotImplementedError

    def accepts(self, evaluation: Evaluation, denoised: Tensor) -> bool:
        """After one evaluation: whether its denoised latent may be used. If not, it is made once more: refuse once in a
        run at most, and do otherwise from then on."""
        raise NotImplementedError

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        """Around one call of the model, of any architecture. Returns what `run` does: the denoised latent."""
        raise NotImplementedError

    def unet(self, evaluation: Evaluation, call: UNetCall) -> Tensor:
        """Around one call of the UNet. Returns its output."""
        raise NotImplementedError

    def output_block(self, evaluation: Evaluation, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Before an output block joins the features `h` (B, C, H, W) and the skip (B, C', H, W)."""
        raise NotImplementedError

    def load(self, look: Callable[[], Loaded]) -> None:
        """Once, when the run begins, before the model is loaded. `look` tells how it is loaded by then."""
        raise NotImplementedError

    def convolution(self, call: Convolution) -> Tensor:
        """In the place of one of the UNet's 3x3 convolutions. Returns (B, Cout, H, W)."""
        raise NotImplementedError

    def compile(self, compilation: Compilation) -> None:
        """Once, when the run begins. Overriding it has the UNet compiled by this method's settings."""
        raise NotImplementedError

    def verdict(self) -> tuple[State, str]:
        """What it did so far, as a sentence a user can act on, and whether it did anything."""
        raise NotImplementedError


@dataclass(frozen=True)
class Configuration:
    """The settings of one method: validated, plain values, equal when they mean the same.

    Class attributes:
        stem: the method's name in files, registry and plan.
        title: the method's name to a user.
        phase: when it takes part; the engine runs the phases in their order.
        is_exact: whether the image stays the same up to rounding; settings may make it otherwise.
    """

    stem: ClassVar[str]
    title: ClassVar[str]
    phase: ClassVar[Phase]
    is_exact: ClassVar[bool]

    def off(self) -> str | None:
        """Why these settings do nothing at all, or None if they do something."""
        raise NotImplementedError

    def check(self, model: Model) -> None:
        """Raise if this model cannot be served: ValueError for a setting, RuntimeError for the model."""
        raise NotImplementedError

    def in_vain(self, device: str) -> str | None:
        """Why these settings give nothing on this machine that others don't, or None if they do: a search leaves them
        out.

        Args:
            device: the torch device type that the model runs on.
        """
        return None

    def begin(self, run: Run) -> MethodRun:
        """The object that takes part in one run."""
        raise NotImplementedError


def check_number(title: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        raise ValueError(f"{title}: {name} must be from {low} to {high}, but is {value}. Set it within that range.")


def check_choice(title: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{title}: {name} must be one of {', '.join(choices)}, but is {value!r}. Choose one of these.")


def check_range(title: str, start_percent: float, end_percent: float) -> None:
    """Raise ValueError unless 0 <= start_percent <= end_percent <= 1."""
    check_number(title, "start_percent", start_percent, 0.0, 1.0)
    check_number(title, "end_percent", end_percent, 0.0, 1.0)
    if start_percent > end_percent:
        raise ValueError(
            f"{title}: start_percent must not be above end_percent, but {start_percent} is above {end_percent}. "
            "Swap them, or set 0 and 1 for the whole run."
        )


def check_only_cache(title: str, model: Model) -> None:
    """Raise RuntimeError if there is another step cache on the model."""
    if model.caches:
        raise RuntimeError(
            f"{title}: this model already has {' and '.join(model.caches)} on it, and two caches would each skip what "
            "the other needs. Remove or bypass one of them."
        )


def check_unet(title: str, model: Model, instead: str) -> None:
    """Raise RuntimeError unless the model is a Stable Diffusion UNet."""
    if not model.is_unet:
        raise RuntimeError(
            f"{title}: this node works on Stable Diffusion UNets (SD 1.x, SD 2.x, SDXL, SSD-1B, the SDXL refiner), "
            f"but the model is {model.name}, which is none. {instead}"
        )
