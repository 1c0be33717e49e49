"""A Tiny VAE: TAESD or one of its relatives, found for a model, with its own estimate of the memory that it takes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy import latent_formats, model_management
from comfy.taesd import taesd
from comfy_api.latest import io
from safetensors import SafetensorError
from torch import Tensor

from ...measuring.memory import MIB
from ...methods.method import State
from ..node import node_of
from ..plan.plan import Node
from ..telling import verdicts
from . import stages

TITLE = "Tiny VAE"
FOLDER = "vae_approx"
AUTO = "auto"

IMAGE = ("SD15", "SDXL", "SD3", "Flux", "Flux2", "QwenImage21")
"""The host's latent formats for images that have a tiny VAE. Another model may have latents of one of them."""
ENCODER, DECODER = "taesd_encoder.", "taesd_decoder."

VALUES = 256
"""Values that one pixel takes in the worst moment: three maps of 64 channels live at once (192 values were measured in
decoding, 195 in encoding, at any size), and a fourth is for what a kernel takes meanwhile."""

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)
"""What damaged files raise in the host's loader."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """A tiny VAE that was loaded.

    Attributes:
        vae: the host's VAE.
        file: the decoder's file.
        channels: of the latents that it is for.
        no_encoder: which file is missing, if it can't encode.
        about: what it is, for the verdict.
    """

    vae: Any
    file: str
    channels: int
    no_encoder: str
    about: str


def choices() -> list[str]:
    """What can be chosen: every file of the folder that may hold a decoder."""
    return [AUTO, *(file for file in folder_paths.get_filename_list(FOLDER) if "_encoder" not in PurePath(file).stem)]


def tiny(node: type[io.ComfyNode], model: Any, name: str) -> Any:
    """The tiny VAE for a model's latents.

    Args:
        node: the node class, as `execute` gets it.
        model: ModelPatcher.
        name: a file of models/vae_approx, or ``auto``.

    Raises:
        ValueError: the file is for other latents than the model's.
        RuntimeError: there is no file, or it can't be used.
    """
    source = node_of(node)
    try:
        form = getattr(model.model, "latent_format", None)
        if form is None:
            raise RuntimeError(
                f"{TITLE}: expected a diffusion model, but this one ({type(model.model).__name__}) has no latents."
            )
        file = _find(form) if name == AUTO else name
        weights = _read(file)
        loaded = _load_video(form, file, weights) if "decoder.22.bias" in weights else _load_image(form, file, weights)
    except (ValueError, RuntimeError) as error:
        verdicts.publish_refused(source, error)
        raise
    stages.put(loaded.vae, loaded.vae.first_stage_model, TinyStage(None, loaded, source))
    line = verdicts.Line("inert", f"{loaded.about}; nothing was decoded or encoded with it in this prompt")
    verdicts.publish(verdicts.current_prompt(), source, line, {})
    return loaded.vae


# Files


def _find(form: Any) -> str:
    """The file of the decoder for a latent format."""
    wanted = form.taesd_decoder_name
    if not wanted:
        raise RuntimeError(
            f"{TITLE}: no tiny VAE is known for the latents of this model ({type(form).__name__}). Choose a file by "
            "its name, or use the model's own VAE."
        )
    file = _file(wanted)
    if file is None:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        raise RuntimeError(
            f"{TITLE}: expected {wanted}.safetensors or {wanted}.pth for this model, but there is no such file in "
            f"{folder}. Download it from {_source(wanted)} into that folder."
        )
    return file


def _file(stem: str, beside: str = "") -> str | None:
    """A file of the folder by its name without ending. Beside another file if there is one, and safetensors before
    others."""
    found = (PurePath(file) for file in folder_paths.get_filename_list(FOLDER))
    files = [file for file in found if file.stem == stem]

    def rank(file: PurePath) -> tuple[Any, ...]:
        return bool(beside) and file.parent != PurePath(beside).parent, file.suffix != ".safetensors", file

    return str(min(files, key=rank)) if files else None


def _source(stem: str) -> str:
    if stem.endswith(("_decoder", "_encoder")):
        return "https://github.com/madebyollin/taesd"
    if stem.startswith("light"):
        return "https://huggingface.co/lightx2v/Autoencoders"
    return "https://github.com/madebyollin/taehv"


def _read(file: str) -> Weights:
    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        raise RuntimeError(f"{TITLE}: {file} is no longer in models/{FOLDER}. Choose another file, or auto.")
    try:
        weights = comfy.utils.load_torch_file(path, safe_load=True)
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"{TITLE}: {file} is damaged or incomplete and can't be read ({first}). Download it again from "
            f"{_source(PurePath(file).stem)}."
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise _wrong(file, "it holds no weights")
    return dict(weights)


def _wrong(file: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"{TITLE}: expected {file} to be TAESD's decoder, or one of its relatives, but {why}. Choose another file."
    )


def _check_channels(form: Any, file: str, channels: int) -> None:
    if channels != form.latent_channels:
        raise ValueError(
            f"{TITLE}: this model's latents ({type(form).__name__}) have {form.latent_channels} channels, but {file} "
            f"decodes latents of {channels}. Choose auto, or a file made for this model."
        )


# Images


def _load_image(form: Any, file: str, weights: Weights) -> Tiny:
    stem = PurePath(file).stem
    no_encoder = ""
    has_both_names = f"{DECODER}1.weight" in weights  # as the host saves a VAE
    if not has_both_names:
        weights = {DECODER + name: value for name, value in weights.items()}
    if not has_both_names or f"{ENCODER}0.weight" not in weights:
        wanted = stem.removesuffix("_decoder") + "_encoder"
        encoder = _file(wanted, beside=file)
        if encoder is None:
            no_encoder = f"{wanted}.safetensors or {wanted}.pth in models/{FOLDER}, from {_source(wanted)}"
        else:
            weights |= {ENCODER + name: value for name, value in _read(encoder).items()}
    first = weights.get(f"{DECODER}1.weight")
    if first is None or first.ndim != 4:
        raise _wrong(file, "its layers are others")
    channels = first.shape[1]
    # Flux 2's packs 2x2 latent pixels of 32 channels into one.
    is_packed = channels == 32 and form.latent_channels == 128 and hasattr(taesd, "DecoderFlux2")
    channels = 128 if is_packed else channels
    _check_channels(form, file, channels)
    known = _formats()
    if stem in known and form.taesd_decoder_name not in (None, stem):
        raise ValueError(
            f"{TITLE}: {file} is made for other latents than this model's ({type(form).__name__}), which need "
            f"{form.taesd_decoder_name}. Choose auto."
        )
    with torch.device("meta"):
        module = taesd.TAESD(latent_channels=channels)
    weights = _complete(file, module, weights, bool(no_encoder))
    colors, ratio = _geometry(module, channels)
    if colors > 3 and ratio != form.spacial_downscale_ratio:
        raise ValueError(
            f"{TITLE}: a latent pixel of this model ({type(form).__name__}) is {form.spacial_downscale_ratio} pixels "
            f"wide, but {file} makes {ratio} of it. Choose auto, or a file made for this model."
        )
    # Playground's latents are SDXL's, scaled in its own way: what counts is what the decoder was trained on.
    trained = known.get(stem) or known.get(form.taesd_decoder_name, form)
    weights["vae_scale"], weights["vae_shift"] = _scales(trained, module.vae_scale.shape)
    dtype = model_management.vae_dtype(model_management.vae_device(), [torch.float16, torch.bfloat16, torch.float32])
    vae = comfy.sd.VAE(sd=weights, dtype=dtype, metadata={"tae_latent_channels": channels})
    vae.downscale_ratio = vae.upscale_ratio = ratio
    if colors > 3:
        # A picture without transparency is opaque.
        vae.output_channels, vae.pad_channel_value = colors, 1.0
    full = vae.memory_used_decode((1, channels, 1024 // ratio, 1024 // ratio), dtype)
    # Those that put the last pixels together from channels work on a smaller picture.
    shuffled = [one.upscale_factor for one in module.taesd_decoder if isinstance(one, torch.nn.PixelShuffle)]
    values = VALUES // math.prod(shuffled) ** 2
    vae.memory_used_decode = lambda shape, dtype: _memory(shape, dtype, values) * ratio * ratio
    vae.memory_used_encode = lambda shape, dtype: _memory(shape, dtype, values)
    own = vae.memory_used_decode((1, channels, 1024 // ratio, 1024 // ratio), dtype)
    gain = f"1024x1024 decoded in about {own / MIB:.0f} MiB, where ComfyUI would reserve {full / MIB:.0f}"
    return _tiny(vae, file, channels, no_encoder, gain)


def _memory(shape: Any, dtype: torch.dtype, values: int) -> int:
    """Bytes that one of (B, C, H, W) images takes, at so many values a pixel. The host decides how many go at once."""
    size: int = values * shape[2] * shape[3] * model_management.dtype_size(dtype)
    return size


def _formats() -> dict[str, Any]:
    """The latent formats that decoders were trained on, by the decoder's name."""
    found = (getattr(latent_formats, name, None) for name in IMAGE)
    forms = [form() for form in found if form is not None]
    return {form.taesd_decoder_name: form for form in forms if form.taesd_decoder_name}


def _geometry(module: Any, channels: int) -> tuple[int, int]:
    """How many color channels a decoder on the meta device gives, and how many pixels to a latent one, each way."""
    image = module.taesd_decoder(torch.empty(1, channels, 4, 4, device="meta"))
    return image.shape[1], image.shape[-1] // 4


def _scales(form: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The factor of latents and what is subtracted before, of TAESD's shape for them: () or (C, 1, 1)."""
    if shape and hasattr(form, "latents_std"):
        return (1 / form.latents_std).reshape(shape), form.latents_mean.reshape(shape)
    values = float(form.scale_factor), float(getattr(form, "shift_factor", 0.0))
    scale, shift = (torch.full(shape, value) for value in values)
    return scale, shift


def _complete(file: str, module: Any, weights: Weights, without_encoder: bool) -> Weights:
    """The weights that TAESD (on the meta device) has; zeros for an encoder that there is none of.

    Raises:
        RuntimeError: some are missing, or of another shape.
    """
    wanted = {name: value for name, value in module.state_dict().items() if name.startswith((ENCODER, DECODER))}
    if without_encoder:
        weights |= {name: torch.zeros(value.shape) for name, value in wanted.items() if name.startswith(ENCODER)}
    other = [name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape]
    other += [name for name in weights if name.startswith((ENCODER, DECODER)) and name not in wanted]
    if other:
        why = f"some of its layers are missing or others ({', '.join(other[:3])})"
        is_newer = weights[f"{DECODER}1.weight"].shape[:2] == (256, 64) and not hasattr(taesd, "DecoderF16")
        raise _wrong(file, f"{why}; those of Qwen-Image 2.1 need ComfyUI 0.37 or newer" if is_newer else why)
    return weights


# Video


def _load_video(form: Any, file: str, weights: Weights) -> Tiny:
    # The host knows these by their keys, their scale and their memory too. Some are published in bf16 only.
    dtype = model_management.vae_dtype(model_management.vae_device(), [torch.bfloat16, torch.float16, torch.float32])
    try:
        vae = comfy.sd.VAE(sd=weights, dtype=dtype)
    except (RuntimeError, KeyError) as error:
        raise _wrong(file, "its layers are missing or of other sizes") from error
    missing = set(vae.first_stage_model.state_dict()) - weights.keys()
    if any(name.startswith("decoder.") for name in missing):
        raise _wrong(file, f"some of its layers are missing ({', '.join(sorted(missing)[:3])})")
    _check_channels(form, file, vae.latent_channels)
    forms = [one() for one in vars(latent_formats).values() if _is_of_video(one)]
    known = {one.taesd_decoder_name: one for one in forms if one.taesd_decoder_name}
    stem = PurePath(file).stem
    if not _is_of_video(type(form)) or (stem in known and form.taesd_decoder_name not in (None, stem)):
        raise ValueError(
            f"{TITLE}: {file} decodes the latents of a video model, other than this model's ({type(form).__name__}). "
            "Choose auto, or a file made for this model."
        )
    if vae.latent_channels == 16 and stem in known:
        # The host guesses from the weights' type whether the two that look alike scale their latents.
        module = vae.first_stage_model
        scales = known[stem] if stem == "taehv" else latent_formats.LatentFormat()
        module.process_in, module.process_out = scales.process_in, scales.process_out
    return _tiny(vae, file, vae.latent_channels, "one that was published with its encoder" if missing else "", "")


def _is_of_video(form: Any) -> bool:
    return getattr(form, "latent_dimensions", 0) == 3


def _tiny(vae: Any, file: str, channels: int, no_encoder: str, gain: str) -> Tiny:
    stages.give_patcher(vae, vae.first_stage_model.to(vae.vae_dtype))
    about = f"{file} in {str(vae.vae_dtype).removeprefix('torch.')}, {vae.size / MIB:.0f} MiB"
    about = "; ".join(filter(None, (about, gain, "decodes only, without its encoder's file" if no_encoder else "")))
    return Tiny(vae, file, channels, no_encoder, about)


class TinyStage(stages.Stage):
    """Refuses what a tiny VAE can't decode or encode."""

    title = TITLE
    stem = "tiny_vae"
    does = "load"
    rank = 1

    def __init__(self, stage: Any, settings: Tiny, node: Node):
        super().__init__(stage, settings, node)
        self._begin()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the encoder, if there was none: a file should not hold one that was made up."""
        weights: dict[str, Any] = self._stage.state_dict(*args, **kwargs)
        made_up = (ENCODER, "encoder.") if self.settings.no_encoder else ()
        return {name: value for name, value in weights.items() if not name.startswith(made_up)}

    def decode(self, samples: Tensor, **kwargs: Any) -> Tensor:
        return self._run("decode", samples, kwargs)

    def encode(self, pixels: Tensor, **kwargs: Any) -> Tensor:
        return self._run("encode", pixels, kwargs)

    def _run(self, name: str, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        loaded = self.settings
        with self._telling(), self._explaining(name, values):
            if name == "encode" and loaded.no_encoder:
                raise self._error(
                    f"{loaded.file} only decodes. To encode it needs {loaded.no_encoder}; or use the full VAE."
                )
            if name == "decode" and values.shape[1] != loaded.channels:
                raise self._error(
                    f"expected latents of {loaded.channels} channels, but got {values.shape[1]}. Are they from another "
                    "model than the one that is wired into this node?"
                )
            self._check(name, values)
            output: Tensor = getattr(self._stage, name)(values, **kwargs)
            if stages.not_finite(output):
                raise self._error(f"{loaded.file} gave NaN or infinity. Download it again, or use the full VAE.")
            self._calls.add(name, len(output))
            return output

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self.title} (node {self.node.id}): {what}")

    def _begin(self) -> None:
        self._calls = stages.Calls(self.settings.vae.latent_dim == 3)

    def _verdict(self) -> tuple[State, str]:
        return "active", "; ".join([self.settings.about, *self._calls.told()])
