"""What comes into a node: what it cannot be, told before anything is done; and why the host could not work with it.

What a model or a VAE takes is for the host to say: other nodes adapt it, and a check beforehand would refuse what
works. So only what can never work is refused at once. All else runs, and where it ends in an error that what came in
explains, that is what is told, with torch's words behind it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from comfy_api.latest import io

from .host import machine
from .node import node_of
from .plan import models
from .plan.plan import KEY
from .plan.record import outcome
from .telling import verdicts

Why = Callable[[str], str | None]
"""What of the inputs explains an error with this text; None if nothing does."""

PRODUCT = re.compile(r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)")
NORM = re.compile(r"normalized_shape=\[(\d+)\].* got input of size\s*\[(?:\d+, )*(\d+)\]")


class InputError(ValueError):
    """What came in explains an error of the host's."""


KINDS: dict[str, Callable[[Any], bool]] = {
    "MODEL": lambda value: hasattr(value, "model"),
    "VAE": lambda value: hasattr(value, "first_stage_model"),
    "CONDITIONING": lambda value: isinstance(value, (list, tuple)),
    "LATENT": lambda value: isinstance(value, Mapping) and all(hasattr(one, "shape") for one in _tensors(value)),
    "IMAGE": lambda value: isinstance(value, torch.Tensor),
}
"""What the values of the host's types are at least."""


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node class that refuses what none of its inputs can be: nothing, as a switch gives it whose chosen input is
    empty; a value of another type, as an input for any type lets through; a latent or a picture without pixels."""
    execute = node.execute.__func__
    if hasattr(execute, "__wrapped__"):
        return node
    schema = node.define_schema()
    title = str(schema.display_name).removesuffix(" (Slipstream)")
    wanted = {one.id: (one.get_io_type(), bool(getattr(one, "optional", False))) for one in schema.inputs}

    @functools.wraps(execute)
    def check_and_execute(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> Any:
        with refusing(cls):
            for name, value in inputs.items():
                kind, is_optional = wanted.get(name, ("", True))
                if kind in KINDS and not (is_optional and value is None):
                    _check_kind(title, name, kind, value)
        return execute(cls, *args, **inputs)

    node.execute = classmethod(check_and_execute)
    return node


@contextlib.contextmanager
def refusing(node: type[io.ComfyNode]) -> Iterator[None]:
    """Says on the node what is refused: else the success of an earlier run would stay there."""
    try:
        yield
    except ValueError as error:
        verdicts.publish_refused(node_of(node), error)
        raise


def _check_kind(title: str, name: str, kind: str, value: Any) -> None:
    if value is None:
        raise ValueError(
            f"{title}: expected {_a(kind)} at {name}, but nothing came (None). The node that is wired there gave none, "
            "as a switch does whose chosen input is empty: choose another one there, or wire it directly."
        )
    if not KINDS[kind](value):
        raise ValueError(
            f"{title}: expected {_a(kind)} at {name}, but {_described(value)} came. Look at the node that is wired "
            "there."
        )
    tensors = _tensors(value) if kind == "LATENT" else [value] if kind == "IMAGE" else []
    for tensor in tensors:
        if 0 in tensor.shape:
            raise ValueError(
                f"{title}: expected {_a(kind)} with pixels at {name}, but {_shape(tensor)} has none. Look at the size "
                "and the batch where it is made, cropped or chosen from."
            )


def check_prompt(title: str, name: str, conditioning: Any, cfg: float | None = None) -> None:
    """Refuses a prompt without anything in it, of which the host makes a prediction of zeros.

    Args:
        cfg: of a negative prompt, which is not evaluated at 1.

    Raises:
        ValueError: it is empty.
    """
    if not conditioning and not (cfg is not None and math.isclose(cfg, 1.0)):
        raise ValueError(
            f"{title}: expected a prompt at {name}, but the conditioning that came is empty. Wire a CLIP Text Encode "
            "there; an empty text is a prompt too."
        )


def check_width(title: str, name: str, conditioning: Any, patcher: Any) -> None:
    """Refuses a prompt that a UNet's cross attention can't read, where nothing on the model may adapt it.

    Raises:
        ValueError: its width is another one.
    """
    unet: Any = getattr(patcher.model, "diffusion_model", None)
    if not models.is_image_unet(unet) or _is_adapted(patcher):
        return
    layers = (layer for path, layer in unet.named_modules() if path.endswith("attn2.to_k"))
    wanted = {getattr(layer, "in_features", None) for layer in layers}
    for tensor, values in conditioning:
        if tensor is None or "hooks" in values or len(wanted) != 1 or None in wanted or tensor.shape[-1] in wanted:
            continue
        raise ValueError(f"{title}: {_of_another_model(name, tensor.shape[-1], wanted.pop(), patcher)}")


def _is_adapted(patcher: Any) -> bool:
    """Whether other nodes put something on a model by which it may read other prompts."""
    options = patcher.model_options.get("transformer_options", {})
    wrappers = [*patcher.wrappers.values(), *options.get("wrappers", {}).values()]
    return bool(
        "model_function_wrapper" in patcher.model_options
        or patcher.object_patches
        or options.get("patches", {}).get("attn2_patch")
        or options.get("patches_replace", {}).get("attn2")
        or any(functions for kinds in wrappers for key, functions in kinds.items() if key != KEY)
    )


@contextlib.contextmanager
def explaining(title: str, why: Why) -> Iterator[None]:
    """Around the host's work: an error that the inputs explain is told in their words, torch's beside them.

    Raises:
        InputError: such an error. Any other one, an interrupt, and memory that ran out, as they come.
    """
    try:
        yield
    except Exception as error:
        status, reason = outcome(error)
        explained = None
        is_ours = isinstance(error, InputError) or str(error).startswith(title)
        if status == "failed" and not is_ours and not machine.is_out_of_memory(error):
            explained = why(str(error))
        if explained is None:
            raise
        raise InputError(f"{title}: {explained} ({reason})") from error


def unsampled(model: Any, latent: tuple[str, Any], prompts: Mapping[str, Any]) -> Why:
    """Why a model can't be sampled.

    Args:
        model: ModelPatcher.
        latent: the name of that input, and the latent.
        prompts: CONDITIONINGs, by the names of their inputs.
    """

    def why(text: str) -> str | None:
        name, samples = latent
        form = model.get_model_object("latent_format")
        tensor, *others = _tensors({"samples": samples})
        wrong = None
        if not others:
            # The host makes a video of a picture, and gives an empty latent the channels that the model has.
            as_video = tensor.unsqueeze(2) if form.latent_dimensions == 3 and tensor.ndim == 4 else tensor
            has_channels = bool(torch.count_nonzero(tensor))
            wrong = _wrong_latent(as_video, form.latent_channels, form.latent_dimensions, has_channels)
        if wrong is not None:
            return (
                f"expected a latent for {_name(model)} at {name}, {wrong}. Make it with an Empty Latent node of this "
                "kind of model, or encode it with its VAE."
            )
        return _wrong_prompt(model, prompts, text)

    return why


def _wrong_prompt(model: Any, prompts: Mapping[str, Any], text: str) -> str | None:
    found = PRODUCT.search(text)
    came, wanted = (int(number) for number in found.groups()) if found else (0, 0)
    found = NORM.search(text)
    if found:
        wanted, came = (int(number) for number in found.groups())
    for name, conditioning in prompts.items():
        for tensor, values in conditioning:
            if tensor is not None and tensor.shape[-1] == came:
                return _of_another_model(name, came, wanted, model)
            if tensor is None and ("NoneType" in text or came):
                return (
                    f"expected a prompt of {_name(model)} at {name}, but the conditioning that came has no text in it. "
                    "Wire a CLIP Text Encode there."
                )
            if "pooled_output" in text and values.get("pooled_output") is None:
                return (
                    f"expected a prompt of {_name(model)} at {name}, with a pooled output, but the one that came has "
                    "none. Make it with the CLIP that belongs to this model."
                )
    if wanted and wanted == getattr(model.model, "adm_channels", None):
        kept = [values.get("pooled_output") for one in prompts.values() for _, values in one]
        widths = " and ".join(sorted({str(pooled.shape[-1]) for pooled in kept if pooled is not None})) or "no"
        return (
            f"expected prompts of {_name(model)} at {' and '.join(prompts)}, but a pooled output of {widths} values "
            "came, as another model's text encoder makes it. Make both with the CLIP that belongs to this model."
        )
    return None


def _of_another_model(name: str, came: int, wanted: Any, model: Any) -> str:
    return (
        f"expected a prompt of {_name(model)} at {name}, {wanted} values wide, but one of {came} came, as another "
        "model's text encoder makes it. Make it with the CLIP that belongs to this model."
    )


def undecoded(vae: Any, latent: Any) -> Why:
    """Why a VAE can't decode a latent."""

    def why(text: str) -> str | None:
        wrong = _wrong_latent(latent, vae.latent_channels, vae.latent_dim)
        return wrong and (
            f"expected a latent of this VAE's, {wrong}. Load the VAE that belongs to the model which the latent was "
            "sampled with."
        )

    return why


def unencoded(vae: Any, pixels: Any) -> Why:
    """Why a VAE can't encode pictures."""

    def why(text: str) -> str | None:
        dimensions = (4, 5) if vae.latent_dim == 3 else (4,)
        if pixels.ndim not in dimensions:
            shapes = " or ".join({4: "(batch, height, width, 3)", 5: "(batch, frames, height, width, 3)"}[dimension]
                                 for dimension in dimensions)  # fmt: skip
            return f"expected pictures of shape {shapes}, but {_shape(pixels)} came. Look at the node that made them."
        height, width, channels = pixels.shape[-3:]
        ratio = vae.spacial_compression_encode()
        if min(height, width) < ratio or channels < 3:
            return (
                f"expected a picture of three channels and at least {ratio}x{ratio} pixels, but one of {channels} and "
                f"{width}x{height} came. Make it larger, or look at the node that made it."
            )
        return None

    return why


def _wrong_latent(latent: Any, channels: int, dimensions: int, has_channels: bool = True) -> str | None:
    """``of shape ..., but ... came``; None if it is of that. An empty latent has no channels of its own."""
    axes = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}.get(dimensions, ())
    if latent.ndim == dimensions + 2 and (latent.shape[1] == channels or not has_channels):
        return None
    kinds = {3: ", as of sound", 4: ", as of images", 5: ", as of a video"}
    kind = kinds.get(latent.ndim, "") if latent.ndim != dimensions + 2 else ""
    return f"of shape ({', '.join(('batch', str(channels), *axes))}), but {_shape(latent)}{kind} came"


def _tensors(latent: Mapping[str, Any]) -> list[Any]:
    """Those of a LATENT: several where it is of video with sound."""
    samples = latent.get("samples")
    return list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]  # type: ignore[union-attr]


def _name(patcher: Any) -> str:
    return models.describe(patcher, {}).name


def _shape(tensor: Any) -> str:
    return f"one of shape ({', '.join(map(str, tensor.shape))})"


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor, {_shape(value)},"
    return _a(type(value).__name__)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
