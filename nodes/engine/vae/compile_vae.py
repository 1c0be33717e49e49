"""A VAE whose decoder and encoder are compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import nn

from ...compiling import backends
from ...compiling.settings import Settings
from ...compiling.tally import Tally
from ...methods.method import State
from ..host import machine
from ..host.artifacts import Keeper
from ..model import attention
from ..node import node_of
from ..plan.plan import Node
from ..telling import verdicts
from . import stages

if TYPE_CHECKING:
    from ...compiling.functions import Compiler


@dataclass(frozen=True)
class CompileVAE(Settings):
    """`compiling.settings.Settings`, for an autoencoder, which is always compiled as one."""

    scope: str = "model"

    stem = "compile_vae"
    title = "Compile VAE"
    has_blocks = False


def compiled(node: type[io.ComfyNode], vae: Any, settings: CompileVAE) -> Any:
    """A VAE like this one that decodes and encodes compiled. The one that came in is not touched.

    Raises:
        ValueError: it is compiled already, with other settings.
        RuntimeError: it is no autoencoder of images, or the backend can't work here.
    """
    source = node_of(node)
    try:
        if not stages.has_equal(vae, CompiledStage, settings, source):
            module = stages.module_of(vae)
            stages.check_there_is_one(settings.title, vae)
            if vae.latent_dim != 2:
                raise RuntimeError(
                    f"{settings.title}: this node compiles autoencoders of images, but this VAE "
                    f"({type(module).__name__}) is none. Take the node out; what decodes its latents faster is Tiny "
                    "VAE, where there is one for the model."
                )
            backend = backends.find(settings, vae.device)
            vae = stages.with_stage(vae, CompiledStage(None, settings, source, backend))
            stages.publish_ready(source)
        else:
            stages.publish_twice(source, vae, CompiledStage)
    except (ValueError, RuntimeError) as error:
        verdicts.publish_refused(source, error)
        raise
    return vae


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


class CompiledStage(stages.Stage):
    """Decodes and encodes compiled.

    Args:
        backend: what was found for the settings.
    """

    title = CompileVAE.title
    stem = CompileVAE.stem
    does = "compile"
    rank = 0

    def __init__(self, stage: Any, settings: CompileVAE, node: Node, backend: backends.Backend):
        super().__init__(stage, settings, node)
        self._backend = backend
        self._keeper = Keeper()
        self._begin()

    def over(self, stage: Any, change: Callable[[Any], Any] = stages.unchanged) -> CompiledStage:
        return CompiledStage(stage, self.settings, self.node, self._backend)

    def decode(self, samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._run("decode", decode, samples, kwargs)

    def encode(self, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._run("encode", encode, pixels, kwargs)

    def _run(
        self, name: str, function: Callable[..., torch.Tensor], values: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # Not at the top: dynamo imports Triton, and a Triton that is broken must not take other VAE nodes down.
        from ...compiling.functions import Compiler

        key = (self.settings, self._backend.name)
        compiler: Compiler = self._keeper.get(self._stage, key, lambda: Compiler(self.settings, self._backend))
        with self._telling(), self._explaining(name, values):
            compiler.begin(self._tally, self._announce)
            compiler.follow(self._stage)
            try:
                return self._call(compiler, name, function, values, kwargs)
            finally:
                compiler.end()

    def _call(
        self,
        compiler: Compiler,
        name: str,
        function: Callable[..., torch.Tensor],
        values: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        why = machine.unsuited(self._stage, values.device)
        if why is None and kwargs:
            why = f"the host asks for more ({', '.join(kwargs)})"
        if why is not None:
            self._tally.eager[why] += 1
            return getattr(self._stage, name)(values, **kwargs)
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

    def _begin(self) -> None:
        self._tally = Tally(self._backend.name, "call of the VAE", "the VAE")

    def _announce(self, graphs: int, seconds: float) -> None:
        self._tell(verdicts.compiling(graphs, seconds), {})

    def _verdict(self) -> tuple[State, str]:
        return "active" if self._tally.is_active else "inert", self._tally.sentence()
