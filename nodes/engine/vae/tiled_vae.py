"""A VAE that decodes and encodes tile by tile.

What the host's VAE does around its network stays the host's: loading, the convolutions at the latent's end, the
posterior, pixel ranges and types. Only the network itself is run by `methods.tiled_vae`.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import psutil
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.model import Decoder, Downsample, Encoder, ResnetBlock, Upsample
from comfy_api.latest import io
from torch import nn

from ...measuring.memory import MIB, Peak
from ...methods.tiled_vae import (
    SMALLEST,
    STATISTICS,
    Network,
    Region,
    TiledVAE,
    Tiler,
    attend,
    attend_in_slices,
    decoder_network,
    encoder_network,
)
from ..host import machine
from ..inputs import explaining, undecoded, unencoded
from ..node import node_of, option
from ..plan.record import outcome
from ..telling import verdicts
from . import stages
from .compile_vae import CompiledStage
from .fp16_fix_vae import InFloat32

_numbers = itertools.count(1)

SIDES = (1024, 768, 512, 384, 256)
"""Tiles to choose from. Larger ones are no faster."""
SHARE = 0.5
"""Of the free memory that tiles may take."""
MARGIN = 1.3
"""What kernels take beside the tensors that they are given."""
TILE, OVERLAP, FRAMES, OVERLAP_T = 512, 64, 64, 8
"""The defaults of the host's own tiling nodes."""


def tile_options() -> list[Any]:
    """The inputs that both nodes have."""
    return [
        option(
            io.Int,
            "tile_size",
            default=0,
            min=0,
            max=8192,
            step=64,
            tooltip="Pixels of a tile's side. 0 takes what fits into half of the free memory, at most 1024.",
        ),
        option(
            io.Combo,
            "statistics",
            options=list(STATISTICS),
            default=STATISTICS[0],
            tooltip=(
                "Of the norms: they are why tiles show. exact: all tiles advance together, and what waits lies in RAM; "
                "the result is that of the whole. estimated: each tile goes by itself, with statistics of a quarter of "
                "the pixels; least memory, and colours may shift a little."
            ),
        ),
        option(
            io.Boolean,
            "batch_slicing",
            default=True,
            tooltip="One image of a batch at a time, for less memory. The result is the same.",
        ),
    ]


def decode(node: type[io.ComfyNode], samples: dict[str, Any], vae: Any, settings: dict[str, Any]) -> io.NodeOutput:
    """Latents to pictures.

    Args:
        node: the node class, as `execute` gets it.
        samples: LATENT, (B, C, H, W).
        vae: VAE.
        settings: those of `TiledVAE`.

    Raises:
        ValueError: a setting that can't be, a latent that is none of this VAE's, or one with NaN.
        RuntimeError: the memory does not suffice, or pixels are NaN.
    """
    with _Run(node, vae, "decoder") as run:
        run.settings = TiledVAE(**settings, title=run.title)
        latent = samples["samples"]
        if getattr(latent, "is_nested", False):
            # As in the host's nodes: what follows is sound.
            latent = latent.unbind()[0]
        network = run.network()
        with explaining(run.title, undecoded(vae, latent)):
            if network is None:
                images = vae.decode_tiled(latent, **_decode_arguments(vae, run.settings))
            else:
                _check_latent(latent, vae)
                size = [length * vae.spacial_compression_decode() for length in latent.shape[-2:]]
                images = run.tiled(network, Region(0, 0, *size), len(latent), lambda tiled: tiled.decode(latent))
        # Frames of a video are pictures, as for the host's VAEDecode.
        return io.NodeOutput(images.reshape(-1, *images.shape[-3:]))


def encode(node: type[io.ComfyNode], pixels: torch.Tensor, vae: Any, settings: dict[str, Any]) -> io.NodeOutput:
    """Pictures (B, H, W, 3), 0 to 1, to latents. As `decode` in all else."""
    with _Run(node, vae, "encoder") as run:
        run.settings = TiledVAE(**settings, title=run.title)
        network = run.network()
        with explaining(run.title, unencoded(vae, pixels)):
            if network is None:
                samples = vae.encode_tiled(pixels, **_encode_arguments(run.settings))
            else:
                _check_pixels(pixels, vae)
                size = vae.vae_encode_crop_pixels(pixels).shape[1:3]
                samples = run.tiled(network, Region(0, 0, *size), len(pixels), lambda tiled: tiled.encode(pixels))
        return io.NodeOutput({"samples": samples})


def _decode_arguments(vae: Any, settings: TiledVAE) -> dict[str, Any]:
    """As the host's VAEDecodeTiled gives them."""
    tile = settings.tile_size or TILE
    ratio, temporal = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    arguments = {"tile_x": tile // ratio, "tile_y": tile // ratio, "overlap": min(OVERLAP, tile // 4) // ratio}
    if temporal is None:
        return arguments
    frames = max(2, FRAMES // temporal)
    return {**arguments, "tile_t": frames, "overlap_t": max(1, min(frames // 2, OVERLAP_T // temporal))}


def _encode_arguments(settings: TiledVAE) -> dict[str, Any]:
    """As the host's VAEEncodeTiled gives them."""
    tile = settings.tile_size or TILE
    overlap = min(OVERLAP, tile // 4)
    return {"tile_x": tile, "tile_y": tile, "overlap": overlap, "tile_t": FRAMES, "overlap_t": OVERLAP_T}


def _check_latent(latent: torch.Tensor, vae: Any) -> None:
    if latent.shape[1] != vae.latent_channels:
        raise ValueError(
            f"VAE Decode Tiled: this VAE decodes latents of {vae.latent_channels} channels, but this one has "
            f"{latent.shape[1]}. Load the VAE that belongs to the model which the latent was sampled with."
        )
    if not torch.isfinite(latent).all():
        raise ValueError(
            "VAE Decode Tiled: the latent has NaN or infinite values, which no VAE makes a picture of. Look for the "
            "cause where it was sampled: a model in a precision that it does not bear, most often."
        )


def _check_pixels(pixels: torch.Tensor, vae: Any) -> None:
    wrong = unencoded(vae, pixels)("")
    if wrong is not None:
        raise ValueError(f"VAE Encode Tiled: {wrong}")
    if not torch.isfinite(pixels).all():
        raise ValueError(
            "VAE Encode Tiled: the picture has NaN or infinite values. Look for the cause where it was made."
        )


class _Run:
    """One execution of a node: a context that tells on it what was done.

    Args:
        node: the node class, as `execute` gets it.
        vae: VAE.
        part: the network that is run, ``decoder`` or ``encoder``.
    """

    settings: TiledVAE

    def __init__(self, node: type[io.ComfyNode], vae: Any, part: str):
        self._node = node_of(node)
        self._where = verdicts.current_prompt()
        self._number = next(_numbers)
        self._vae = vae
        self._part = part
        self.title = f"VAE {part[:-1].title()} Tiled"
        self._line = verdicts.Line("inert", "did nothing")

    def __enter__(self) -> _Run:
        self._tell(verdicts.Line("running", f"{self._part[:-1].removesuffix('e')}ing"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status, _ = outcome(error)
        if status == "failed":
            self._line = verdicts.Line("failed", str(error))
        elif status == "interrupted":
            self._line = verdicts.Line("interrupted", "interrupted")
        self._tell(self._line)

    def _tell(self, line: verdicts.Line) -> None:
        verdicts.publish(self._where, self._node, line, {}, (self._number, TiledVAE.stem))

    def network(self) -> Network | None:
        """The network, if it can be run by tiles: else the host's own tiling is to be used, and the node says so."""
        self._vae.throw_exception_if_invalid()
        module = stages.module_of(self._vae)
        found: Any = getattr(module, self._part, None)
        why = _unsuited(self._vae, found)
        if why is None:
            return _network(found)
        text = f"left to ComfyUI's own tiling, which averages overlapping tiles: {why}"
        self._line = verdicts.Line("inert", text)
        return None

    def tiled(self, network: Network, image: Region, batch: int, call: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """What a VAE like this one gives whose network runs tile by tile.

        Args:
            network: of the VAE.
            image: of the picture's size.
            batch: how many pictures.
            call: decodes or encodes with it.
        """
        vae, settings = self._vae, self.settings
        if settings.statistics == "estimated" and not network.can_estimate(image):
            settings = replace(settings, statistics="exact")
        at_once = 1 if settings.batch_slicing else batch

        def needed(side: int, dtype: torch.dtype) -> float:
            """Bytes on the device, for one picture."""
            return MARGIN * dtype.itemsize * network.on_device(image, side, settings.statistics)

        longest = -(-max(image.height, image.width) // 8) * 8
        free = getattr(vae.patcher, "get_free_memory", comfy.model_management.get_free_memory)(vae.device)
        fits = (one for one in SIDES if at_once * needed(one, vae.vae_dtype) <= SHARE * free)
        side = min(settings.tile_size or next(fits, SIDES[-1]), max(SMALLEST, longest))
        tiles = _Tiles(network, side, image, settings, batch)

        def by_tiles(vae: Any, tiles: _Tiles) -> Any:
            """A VAE like another one that runs its network tile by tile."""
            dtype = vae.vae_dtype
            self._check_ram(dtype.itemsize * at_once * network.in_ram(image, settings.statistics))
            other = copy.copy(vae)
            other.memory_used_decode = other.memory_used_encode = lambda *_: needed(tiles.side, dtype)
            # Where memory runs out before the tiles or after them the host would make tiles of its own, of ours.
            other.decode_tiled_ = other.encode_tiled_ = self._fail_out_of_memory
            # Layers are called one by one: nothing is left of what was compiled.
            kept = [stage for stage in stages.of(vae) if not isinstance(stage, CompiledStage)]
            module = _with(stages.module_of(vae), self._part, tiles)
            stages.put(other, module, *kept, change=redone)
            return other

        def redone(vae: Any) -> Any:
            part = _network(stages.module_of(vae).get_submodule(self._part))
            return by_tiles(vae, _Tiles(part, tiles.side, image, settings, 1))

        other = by_tiles(vae, tiles)
        # Before memory is watched: the weights are none of the tiles' doing, nor is what others left in torch's cache.
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=at_once * needed(side, vae.vae_dtype))
        comfy.model_management.soft_empty_cache()
        began = time.perf_counter()
        with machine.watch_memory(vae.device) as memory:
            result = call(other)
        if not torch.isfinite(result).all():
            advice = "Its file may be damaged: load another VAE."
            if vae.vae_dtype == torch.float16:
                advice = "Put an FP16-Fix VAE before it, or start ComfyUI with --bf16-vae or --fp32-vae."
            raise RuntimeError(
                f"{self.title}: the result has NaN or infinite values, though what came in had none: this VAE gives "
                f"them in {str(vae.vae_dtype).removeprefix('torch.')}. {advice}"
            )
        self._line = verdicts.Line("active", self._text(tiles, batch, time.perf_counter() - began, memory.peaks))
        return result

    def _fail_out_of_memory(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{self.title}: out of memory beside the tiles. Free some, make the image smaller, or set batch_slicing."
        )

    def _check_ram(self, needed: float) -> None:
        """Or the system would end the whole process once feature maps no longer fit."""
        available = psutil.virtual_memory().available
        if needed > available:
            advice = "Free some, or make the image smaller."
            if self.settings.statistics == "exact":
                advice = "Set statistics to estimated, which needs far less."
            raise RuntimeError(
                f"{self.title}: feature maps of {_gib(needed)} wait in RAM, of which "
                f"{_gib(available)} are free. {advice}"
            )

    def _text(self, tiles: _Tiles, batch: int, seconds: float, peaks: tuple[Peak, ...]) -> str:
        on_device, in_ram = (_gib(peak.increase_mib * MIB) for peak in peaks)
        together = f"{tiles.most} at a time" if tiles.most > 1 else "one at a time"
        images = f"{batch} images, {'together' if tiles.most == batch else together}: " if batch > 1 else ""
        said = [f"{images}{tiles.sentence(self.settings.statistics)}", f"{seconds:.1f} s"]
        if self._vae.device.type != "cpu":
            said.append(f"at most {on_device} more in use on the device")
        said.append(f"at most {in_ram} more RAM in use")
        said += [
            f"{stage.title} (node {stage.node.id}) is not used: layers are called one by one"
            for stage in stages.of(self._vae)
            if isinstance(stage, CompiledStage)
        ]
        return "; ".join(said)


def _gib(number: float) -> str:
    return f"{number / MIB:.0f} MiB" if number < 1024 * MIB else f"{number / MIB / 1024:.1f} GiB"


def _unsuited(vae: Any, network: Any) -> str | None:
    """Why a network can't be run by tiles of ours; None if it can."""
    kind = type(stages.module_of(vae)).__name__
    if vae.latent_dim != 2 or getattr(vae, "extra_1d_channel", None) is not None:
        return "this VAE is for video or sound"
    if type(network) not in (Decoder, Encoder) or network.carried:
        if isinstance(stages.module_of(vae), AutoencodingEngine):
            kind = f"its network is a {type(network).__name__}"
        return f"this VAE ({kind}) is no KL autoencoder of images, as Stable Diffusion's, SD 3's and Flux's are"
    if stages.has_replaced_code(network):
        return "another node replaced code of this VAE"
    levels = network.up if type(network) is Decoder else network.down
    is_plain = (
        not getattr(network, "tanh_out", False)
        and not any(len(level.attn) for level in levels)
        and len(levels) > 1
        and all(not block.use_conv_shortcut for block in network.modules() if isinstance(block, ResnetBlock))
        and all(block.with_conv for block in network.modules() if isinstance(block, (Downsample, Upsample)))
    )
    return None if is_plain else "this VAE is of an unusual layout"


def _network(part: nn.Module) -> Network:
    """Of the host's decoder or encoder."""
    return decoder_network(part) if isinstance(part, Decoder) else encoder_network(part)


def _with(module: nn.Module, part: str, stand_in: nn.Module) -> nn.Module:
    """A module like this one, of the same weights, with something else as one of its parts."""
    other = copy.copy(module)
    other.__dict__["_modules"] = {**module._modules, part: stand_in}
    return other


class _Tiles(nn.Module):
    """Stands for a VAE's decoder or encoder, and runs it tile by tile.

    Args:
        network: what it stands for.
        side: of a tile in pixels of the image.
        image: of the picture's size.
        settings: of the node.
        batch: how many pictures will come.

    Attributes:
        side: as it is now.
        too_large: those for which memory did not suffice.
        most: how many pictures went through at once.
    """

    def __init__(self, network: Network, side: int, image: Region, settings: TiledVAE, batch: int):
        super().__init__()
        self.side = side
        self.too_large: list[int] = []
        self.most = 0
        self._network = network
        self._image = image
        self._settings = settings
        self._bar = comfy.utils.ProgressBar(1000 * batch)
        self._done = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """As the network does; a decoder's pictures come in RAM."""
        parts = values.split(1) if self._settings.batch_slicing else [values]
        results = torch.cat([self._run(part) for part in parts])
        return results if self._network.is_decoder else results.to(values.device)

    def _run(self, values: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                return self._attempt(values)
            except Exception as error:
                if not machine.is_out_of_memory(error):
                    raise
                if self.side <= SMALLEST:
                    raise RuntimeError(
                        f"{self._settings.title}: out of memory even with tiles of {SMALLEST}x{SMALLEST} pixels."
                        + (" Set statistics to estimated." if self._settings.statistics == "exact" else "")
                    ) from None
            # Out here the error is gone, and with it what it held.
            comfy.model_management.soft_empty_cache()
            self.too_large.append(self.side)
            self.side = max(SMALLEST, self.side // 16 * 8)

    def _attempt(self, values: torch.Tensor) -> torch.Tensor:
        begun = self._done
        self.most = max(self.most, len(values))
        share = 0.0

        def advanced(more: float) -> None:
            nonlocal share
            share += more
            self._bar.update_absolute(begun + round(1000 * share * len(values)))
            comfy.model_management.throw_exception_if_processing_interrupted()

        weights_of = partial(_weights_of, values[:0])
        tiler = Tiler(self._network, self.side, values.device, weights_of, advanced, _attend_on(values.device))
        run = tiler.exact if self._settings.statistics == "exact" else tiler.estimated
        result = run(values.cpu())
        self._done = begun + 1000 * len(values)
        return result

    def sentence(self, asked: str) -> str:
        """What was done to each picture.

        Args:
            asked: the statistics that were set.
        """
        tiles = list(self._image.tiles(self.side))
        size = f"{max(tile.width for tile in tiles)}x{max(tile.height for tile in tiles)}"
        said = f"{self._settings.statistics}: {len(tiles)} tiles of {size}"
        if len(tiles) == 1:
            said = f"{self._settings.statistics}: 1 tile of {size}, since the image is no larger"
        elif self._settings.statistics == "exact":
            said += f", as if {'de' if self._network.is_decoder else 'en'}coded whole"
        else:
            said += f" within {self._network.halo} more pixels on each side, norms as of a quarter of the pixels"
        if asked != self._settings.statistics:
            said += f", since the image is too small for {asked} ones"
        if self.too_large:
            sides = " and of ".join(map(str, self.too_large))
            said += f"; out of memory with tiles of {sides}, so they were made smaller"
        return said


def _attend_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """How attention is computed in a VAE: by torch, but for where the host does not trust it there, as on AMD's."""
    has_torchs = device.type == "cpu" or comfy.model_management.pytorch_attention_enabled_vae()
    kernel = attend if has_torchs or comfy.model_management.xformers_enabled_vae() else attend_in_slices

    def chosen(block: Any, *tokens: torch.Tensor) -> torch.Tensor:
        if not isinstance(block.optimized_attention, InFloat32):
            return kernel(block, *tokens)
        return kernel(block, *(token.float() for token in tokens)).to(tokens[0].dtype)

    return chosen


def _weights_of(like: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight and bias, as the host gives them for a tensor of this type on this device."""
    if not isinstance(norm, comfy.ops.CastWeightBiasOp):
        return norm.weight, norm.bias
    weight, bias, held = comfy.ops.cast_bias_weight(norm, like, offloadable=True)
    weights = weight.clone(), bias.clone()
    comfy.ops.uncast_bias_weight(norm, weight, bias, held)
    return weights
