"""A VAE in another precision, rescaled so that float16 holds its activations. What overflows yet is redone wider."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.latent_formats
import comfy.sd
import torch
from comfy import model_management
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder
from comfy_api.latest import io
from torch import Tensor, nn
from torch.nn import functional

from ...measuring.memory import MIB
from ...methods.fp16_fix import (
    LARGEST,
    METHODS,
    PRECISIONS,
    FP16Fix,
    Peaks,
    Scaling,
    layout,
    rescale_,
    scaling_of,
    watching,
)
from ...methods.method import State
from ..host import machine
from ..node import node_of
from ..plan.plan import Node
from ..telling import verdicts
from . import stages

__all__ = ["METHODS", "PRECISIONS", "FP16Fix", "fixed"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CODERS = ("decoder", "encoder")

_measured: dict[Hashable, dict[str, Scaling]] = {}
"""What was measured, by the weights' sums: a few numbers for each autoencoder."""


@dataclass(frozen=True)
class Made:
    """What the node made of a VAE.

    Attributes:
        vae: the new VAE.
        original: the one that came in.
        about: what was done and what that gains, for the verdict.
    """

    vae: Any
    original: Any
    about: str


def fixed(node: type[io.ComfyNode], vae: Any, settings: FP16Fix) -> Any:
    """A VAE like this one in the precision that is set. The one that came in is not touched, and comes out where
    nothing is to be changed.

    Raises:
        ValueError: it has another precision from a node like this.
        RuntimeError: it is no KL autoencoder of images, or can't be brought into float16's range.
    """
    source = node_of(node)
    try:
        stages.check_there_is_one(settings.title, vae)
        if stages.has_equal(vae, FixedStage, settings, source):
            stages.publish_twice(source, vae, FixedStage)
            return vae
        made = _make(vae, settings)
    except (ValueError, RuntimeError) as error:
        verdicts.publish_refused(source, error)
        raise
    if made.vae is vae:
        verdicts.publish(verdicts.current_prompt(), source, verdicts.Line("inert", made.about), {})
        return vae
    stages.put(made.vae, made.vae.patcher.model, *stages.of(vae), FixedStage(None, settings, source, made))
    line = verdicts.Line("inert", f"{made.about}; nothing was decoded or encoded with it in this prompt")
    verdicts.publish(verdicts.current_prompt(), source, line, {})
    return made.vae


def _make(vae: Any, settings: FP16Fix) -> Made:
    _check(settings, vae)
    dtype = _fastest(vae.device) if settings.precision == "auto" else DTYPES[settings.precision]
    scalings: dict[str, Scaling] = {}
    module = None
    if dtype == torch.float16 and settings.method == "rescale":
        module = _copied(vae)
        try:
            scalings = _scalings(vae, module)
        except RuntimeError as error:
            if machine.is_out_of_memory(error):
                raise
            raise RuntimeError(
                f"{settings.title}: this VAE can't be rescaled into float16's range: {error}. Choose precision bf16 or "
                "fp32."
            ) from error
    what = _described(dtype, settings, scalings)
    # In float16, what overflows is to be redone even where nothing has to be changed.
    if dtype == vae.vae_dtype != torch.float16:
        why = f"it is in {NAMES[dtype]} already"
        slow = settings.precision == "auto" and dtype == torch.float32
        return Made(vae, vae, f"changed nothing: {why}" + (", and this device has nothing faster" if slow else ""))
    module = _copied(vae) if module is None else module
    for name, scaling in scalings.items():
        coder = module.get_submodule(name)
        rescale_(coder, layout(coder), scaling)
    if any(scaling.has_large_products for scaling in scalings.values()):
        for block in module.modules():
            if isinstance(block, AttnBlock):
                block.optimized_attention = InFloat32(block.optimized_attention)
    made = _with_module(vae, module.to(dtype), dtype)
    if not all(bool(weight.isfinite().all()) for weight in module.parameters()):
        raise RuntimeError(
            f"{settings.title}: some weights of this VAE exceed the range of {NAMES[dtype]}. Choose precision bf16 or "
            "fp32."
        )
    return Made(made, vae, f"{what}; {_gain(vae, made)}")


def _check(settings: FP16Fix, vae: Any) -> None:
    """Raises RuntimeError if it is no autoencoder whose every weight is understood."""
    module = stages.module_of(vae)
    why = ""
    if not isinstance(module, AutoencodingEngine):
        why = f"this one is a {type(module).__name__}"
    elif type(module.decoder) is not Decoder or type(module.encoder) is not Encoder:
        why = f"this one has a {type(module.encoder).__name__} and {type(module.decoder).__name__} of another kind"
    elif stages.has_replaced_code(module):
        why = "another node replaced part of this one's code"
    else:
        try:
            for name in CODERS:
                layout(module.get_submodule(name))
        except RuntimeError as error:
            why = f"of this one {error}"
    if why:
        halves = [NAMES[dtype] for dtype in vae.working_dtypes if dtype in (torch.float16, torch.bfloat16)]
        itself = f": ComfyUI runs it in {' or '.join(halves)} by itself, where the device can" if halves else ""
        raise RuntimeError(
            f"{settings.title}: this node changes KL autoencoders of images, as SD, SDXL, SD3 and Flux have them, but "
            f"{why}. Take the node out{itself}."
        )


def _fastest(device: torch.device) -> torch.dtype:
    if model_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if model_management.should_use_bf16(device) else torch.float32


# The copy


def _copied(vae: Any) -> nn.Module:
    """The module with weights of its own, in float32 and RAM."""
    module = stages.loaded_again(vae) if machine.is_dynamic(vae.patcher) else stages.module_of(vae)

    def own(value: Tensor) -> Tensor:
        value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        return nn.Parameter(value, requires_grad=False)

    memo: dict[int, Any] = {id(weight): own(weight) for weight in module.parameters()}
    memo |= {id(value): own(value).data for value in module.buffers()}
    # Not the module's own, and freed by whoever holds it.
    memo |= {id(vars(module)[name]): type(vars(module)[name])() for name in stages.HOSTS_BOOKS if name in vars(module)}
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _with_module(vae: Any, module: nn.Module, dtype: torch.dtype) -> Any:
    """A VAE like this one around another module, of that type."""
    other = copy.copy(vae)
    other.vae_dtype = dtype
    other.first_stage_model = module
    stages.give_patcher(other, module)
    return other


@dataclass(frozen=True)
class InFloat32:
    """The host's attention, for products that float16 can't hold."""

    attention: Any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = self.attention(q.float(), k.float(), v.float())
        return output.to(v.dtype)


# Measuring


def _scalings(vae: Any, module: nn.Module) -> dict[str, Scaling]:
    """How the decoder and encoder of a float32 module have to be rescaled: measured once for these weights."""
    key = tuple(float(weight.double().sum()) for weight in module.parameters())
    if key not in _measured:
        peaks = _peaks(vae, module)
        layouts = {name: layout(module.get_submodule(name)) for name in CODERS}
        _measured[key] = {name: scaling_of(parts, peaks, f"{name}.") for name, parts in layouts.items()}
    return _measured[key]


@torch.no_grad()
def _peaks(vae: Any, module: Any) -> Peaks:
    """The largest activations while pictures are encoded, and what came of them and noise is decoded.

    The noise is what a sampler would end with if the latents were as their model's latent format says: of unit
    variance there, white or smooth. The VAE does not say which model it is for: of those with its channels, the one
    whose latents are largest.
    """
    # On a CPU float16 is for trying only.
    size = 128 if vae.device.type == "cpu" else 256
    generator = torch.Generator().manual_seed(0)

    def noise(channels: int, side: int, of: int) -> Tensor:
        coarse = torch.randn(1, channels, of, of, generator=generator)
        smooth = functional.interpolate(coarse, (side, side), mode="bicubic")
        return torch.cat((torch.randn(1, channels, side, side, generator=generator), smooth / smooth.std()))

    pixels = noise(module.encoder.conv_in.in_channels, size, 4).clamp(-1, 1)
    side = size // vae.spacial_compression_encode()
    form = LARGEST_LATENTS.get(vae.latent_channels, comfy.latent_formats.LatentFormat)()
    latents = form.process_out(noise(vae.latent_channels, side, 2))
    needed = vae.memory_used_decode(latents.shape, torch.float32) + model_management.module_size(module)
    if vae.device.type != "cpu":
        model_management.free_memory(needed, vae.device)
    try:
        module.to(vae.device)
        with watching(module) as peaks:
            for picture, latent in zip(pixels.to(vae.device).split(1), latents.to(vae.device).split(1), strict=True):
                module.decode(module.encode(picture))
                module.decode(latent)
    finally:
        module.to("cpu")
    return peaks


LARGEST_LATENTS = {4: comfy.latent_formats.SDXL, 16: comfy.latent_formats.Flux}
"""By channels: the format whose latents are the largest before they are scaled."""


# Decoding and encoding


class FixedStage(stages.Stage):
    """Sees to it that what comes out is finite.

    Args:
        made: the VAE that it stands in, and the one that came in.
        change: what becomes of the VAE that redoes what overflows.
    """

    title = FP16Fix.title
    stem = FP16Fix.stem
    does = "change the precision of"
    rank = 1

    def __init__(
        self,
        stage: Any,
        settings: FP16Fix,
        node: Node,
        made: Made,
        change: Callable[[Any], Any] = stages.unchanged,
    ):
        super().__init__(stage, settings, node)
        self._made = made
        self._change = change
        self._begin()

    def over(self, stage: Any, change: Callable[[Any], Any] = stages.unchanged) -> FixedStage:
        return FixedStage(stage, self.settings, self.node, self._made, change)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The original's: rescaled weights without their epsilons, which no file keeps, are another autoencoder."""
        weights: dict[str, Any] = stages.module_of(self._made.original).state_dict(*args, **kwargs)
        return weights

    def decode(self, samples: Tensor, **kwargs: Any) -> Tensor:
        return self._run("decode", samples, kwargs)

    def encode(self, pixels: Tensor, **kwargs: Any) -> Tensor:
        return self._run("encode", pixels, kwargs)

    def _run(self, name: str, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        with self._telling(), self._explaining(name, values):
            self._check(name, values)
            output: Tensor = getattr(self._stage, name)(values, **kwargs)
            broken = stages.not_finite(output)
            if broken:
                output = output.float()
            for index in broken:
                output[index] = self._redone(name, values[index : index + 1], kwargs)[0]
            self._calls.add(name, len(output), len(broken))
            return output

    def _redone(self, name: str, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """One image, by the VAE that came in, in a type of float32's range."""
        if self._made.vae.vae_dtype == torch.float16:
            wide = self._change(self._wide)
            memory = getattr(wide, f"memory_used_{name}")(values.shape, wide.vae_dtype)
            # Ours too, or it might have to go for the other.
            model_management.load_models_gpu([self._made.vae.patcher, wide.patcher], memory_required=memory)
            output: Tensor = getattr(stages.module_of(wide), name)(values.to(wide.vae_dtype), **kwargs)
            if bool(output.isfinite().all()):
                return output
        raise RuntimeError(
            f"{self.title} (node {self.node.id}): the VAE itself gives NaN or infinity where it should {name} an "
            "image, also in a type with float32's range. Its file may be damaged: load another VAE."
        )

    @cached_property
    def _wide(self) -> Any:
        original = self._made.original
        if original.vae_dtype != torch.float16:
            return original
        return _with_module(original, _copied(original), torch.float32)

    def _begin(self) -> None:
        self._calls = stages.Calls()

    def _verdict(self) -> tuple[State, str]:
        was = self._made.original.vae_dtype
        wide = NAMES[torch.float32 if was == torch.float16 else was]
        return "active", "; ".join([self._made.about, *self._calls.told(f"in {wide} since fp16 overflowed")])


# Words


def _described(dtype: torch.dtype, settings: FP16Fix, scalings: dict[str, Scaling]) -> str:
    if dtype != torch.float16:
        return f"{NAMES[dtype]}, whose range needs no rescaling"
    if settings.method == "as is":
        return "fp16, weights as they are"
    largest = max(scaling.peak for scaling in scalings.values())
    if all(scaling.is_identity for scaling in scalings.values()):
        text = f"fp16, weights as they are: no activation is larger than {largest:.0f}, and fp16 holds {LARGEST:.0f}"
    else:
        text = "fp16, rescaled exactly: " + ", ".join(
            f"{name} by {_fraction(scaling.smallest)} (largest activation {scaling.peak:.0f})"
            for name, scaling in scalings.items()
        )
    in_float32 = any(scaling.has_large_products for scaling in scalings.values())
    return text + ("; attention in fp32, as fp16 does not hold its products" if in_float32 else "")


def _fraction(scale: float) -> str:
    return "1" if scale == 1 else f"1/{1 / scale:.0f}"


def _gain(old: Any, new: Any) -> str:
    """What another precision gains on this device, and what it does not."""
    device, was, now = new.device, old.vae_dtype, new.vae_dtype
    slow = {
        torch.float16: not model_management.should_use_fp16(device),
        torch.bfloat16: not model_management.should_use_bf16(device),
    }
    if was.itemsize == now.itemsize:
        if was == now:
            return "the same speed and memory"
        parts = [f"the same memory as {NAMES[was]}"]
        if slow.get(now):
            parts.append(f"slower than {NAMES[was]}, since this device does not compute {NAMES[now]} fast")
        elif slow.get(was):
            parts.append(f"faster than {NAMES[was]}, which this device does not compute fast")
        elif now == torch.float16:
            parts.append(f"no gain in speed, this device computes {NAMES[was]} as fast: a gain in precision only")
        else:
            parts.append("no gain in speed, less precision")
    else:
        parts = [
            f"weights {new.size / MIB:.0f} MiB instead of {old.model_size() / MIB:.0f}",
            f"1024x1024 decoded in about {_decoding(new):.1f} GiB instead of {_decoding(old):.1f}",
        ]
        if slow.get(now):
            parts.append(f"this device does not compute {NAMES[now]} fast")
    weights = next(iter(stages.module_of(old).parameters())).dtype
    if weights == torch.bfloat16 and now != weights:
        parts.append("its weights stay rounded to bf16, as they were loaded")
    return "; ".join(parts)


def _decoding(vae: Any) -> float:
    """GiB that the host reserves to decode an image of 1024x1024."""
    side = 1024 // vae.spacial_compression_decode()
    memory = vae.memory_used_decode((1, vae.latent_channels, side, side), vae.vae_dtype)
    return float(memory) / (1024 * MIB)
