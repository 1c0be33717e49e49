"""A VAE whose decoder and encoder are compiled."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import nn

from ..compiling import backends
from ..compiling.functions import Compiler
from ..compiling.settings import Settings
from ..compiling.tally import Tally
from . import attention, machine, verdicts
from .artifacts import Keeper
from .node import node_of
from .plan import Node
from .record import Record

_numbers = itertools.count(1)


@dataclass(frozen=True)
class CompileVAE(Settings):
    """`compiling.settings.Settings`, for an autoencoder, which is always compiled as one."""

    scope: str = "model"

    stem = "compile_vae"
    title = "Compile VAE"


def compiled(node: type[io.ComfyNode], vae: Any, settings: CompileVAE) -> Any:
    """A VAE like this one that decodes and encodes compiled. The one that came in is not touched.

    Raises:
        ValueError: it is compiled already, with other settings.
        RuntimeError: it is no autoencoder of images, or the backend can't work here.
    """
    source = node_of(node)
    try:
        stage = vae.first_stage_model
        if isinstance(stage, CompiledStage):
            if stage.settings != settings:
                raise ValueError(
                    f"{settings.title}: node {source.id} and node {stage.node.id} compile the same VAE with different "
                    "settings. Remove or bypass one of them, or give both the same settings."
                )
            verdicts.publish_added(source)
            return vae
        if stage is None or vae.latent_dim != 2:
            raise RuntimeError(
                f"{settings.title}: this node compiles autoencoders of images, but this VAE "
                f"({type(stage).__name__}) is none. Take the node out."
            )
        backend = backends.find(settings, vae.device)
        clone = _without_dynamic_vram(vae)
        clone.first_stage_model = CompiledStage(clone.first_stage_model, settings, backend, source)
    except (ValueError, RuntimeError) as error:
        verdicts.publish_refused(source, error)
        raise
    verdicts.publish_added(source)
    return clone


def _without_dynamic_vram(vae: Any) -> Any:
    """A VAE of the same weights whose own attributes may be set; loaded as a whole, if DynamicVRAM had it in pieces."""
    if not machine.is_dynamic(vae.patcher):
        return copy.copy(vae)
    other = comfy.sd.VAE(sd=vae.get_sd(), device=vae.device, dtype=vae.vae_dtype)
    other.patcher = ModelPatcher(other.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    return other


def decode(stage: Any, samples: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) to images (B, 3, 8 H, 8 W)."""
    return stage.decode(samples)


def encode(stage: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) to latents (B, C, H / 8, W / 8)."""
    return stage.encode(pixels)


class _Part(nn.Module):
    """One direction of an autoencoder as a module, for backends that take one."""

    def __init__(self, stage: nn.Module, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.stage = stage
        self.function = function

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.function(self.stage, values)


class CompiledStage:
    """Stands for a VAE's `first_stage_model`: decodes and encodes compiled, and is that module in all else.

    Args:
        stage: the host's module.
        settings: what was set.
        backend: what was found for that.
        node: the node that is told about.
    """

    def __init__(self, stage: nn.Module, settings: CompileVAE, backend: backends.Backend, node: Node):
        self.settings = settings
        self.node = node
        self._stage = stage
        self._backend = backend
        self._keeper = Keeper()
        self._where: Any = None
        self._tally = Tally(backend.name, "call of the VAE")
        self._number = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def decode(self, samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As the module does."""
        return self._run("decode", decode, samples, kwargs)

    def encode(self, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As the module does."""
        return self._run("encode", encode, pixels, kwargs)

    def _run(
        self, name: str, function: Callable[..., torch.Tensor], values: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        key = (self.settings, self._backend.name)
        compiler: Compiler = self._keeper.get(self._stage, key, lambda: Compiler(self.settings, self._backend))
        self._begin(compiler)
        error: BaseException | None = None
        try:
            why = machine.unsuited(self._stage, values.device)
            if why is None and kwargs:
                why = f"the host asks for more ({', '.join(kwargs)})"
            if why is not None:
                self._tally.eager[why] += 1
                return function(self._stage, values, **kwargs)
            shape = {
                "direction": name,
                "size": f"{values.shape[-1]}x{values.shape[-2]}",
                "batch": values.shape[0],
                "precision": str(values.dtype).removeprefix("torch."),
            }

            def run() -> torch.Tensor:
                with attention.opaque_in(self._stage):
                    if self._backend.takes_modules:
                        made = lambda: _Part(self._stage, function)  # noqa: E731
                        return compiler.module(name, made, (values,))(values)
                    return compiler.function(name, function)(self._stage, values)

            # A copy: a backend may write its next result where this one is.
            output: torch.Tensor = compiler.call(shape, run, None).clone()
            return output
        except BaseException as raised:
            error = raised
            raise
        finally:
            compiler.end()
            self._end(error)
            error = None

    def _begin(self, compiler: Compiler) -> None:
        where = verdicts.current_prompt()
        if self._where is None or (where.id, where.node) != (self._where.id, self._where.node) or where.id is None:
            self._where, self._number = where, next(_numbers)
            self._tally = Tally(self._backend.name, "call of the VAE", "the VAE")
        compiler.begin(self._tally, self._announce)
        compiler.follow(self._stage)

    def _announce(self, graphs: int, seconds: float) -> None:
        self._tell(verdicts.compiling(graphs, seconds), {})

    def _end(self, error: BaseException | None) -> None:
        record = Record(0)
        record.end(error)
        text = self._tally.sentence()
        if record.status == "failed":
            line = verdicts.Line("failed", f"failed ({record.reason}); until then: {text}")
        elif record.status == "interrupted":
            line = verdicts.Line("interrupted", f"interrupted; until then: {text}")
        else:
            line = verdicts.Line("active" if self._tally.is_active else "inert", text)
        self._tell(line, record.as_dict())

    def _tell(self, line: verdicts.Line, record: dict[str, Any]) -> None:
        verdicts.publish(self._where, self.node, line, record, (self._number, self.settings.stem))
