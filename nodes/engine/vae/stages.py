"""Stages: what stands for a VAE's `first_stage_model`, in the VAE that a node of ours returns.

The host decodes and encodes by `vae.first_stage_model.decode` and `.encode`. A stage is called in that module's
place, does its node's part, tells the node what became of it, and is that module in all else. Several stages stand
one around another, in their canonical order, whichever way their nodes are wired.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...methods.method import State
from ..host import machine
from ..inputs import explaining, undecoded
from ..plan.plan import Node
from ..plan.record import Record
from ..telling import verdicts

HOSTS_BOOKS = ("dynamic_pins", "dynamic_vbars", "dynamic_patchers")
"""What DynamicVRAM keeps on a module, by device: memory that is not the module's own."""

_numbers = itertools.count(1)


def unchanged(vae: Any) -> Any:
    return vae


@dataclass(frozen=True)
class Latents:
    """What a VAE decodes: what of it a stage may keep, which is a part of it."""

    latent_channels: int
    latent_dim: int


class Stage:
    """One node's part in decoding and encoding.

    Args:
        stage: the host's module, or the stage that this one stands around.
        settings: what was set, compared with `==`.
        node: the node that is told about.

    Attributes:
        title: the node's name, for messages.
        stem: the method's.
        does: what two nodes of this kind do to one VAE, for a message.
        rank: its place in the canonical order; 0 is next to the host's module.
    """

    title: ClassVar[str]
    stem: ClassVar[str]
    does: ClassVar[str]
    rank: ClassVar[int]

    def __init__(self, stage: Any, settings: Any, node: Node):
        self.settings = settings
        self.node = node
        self._stage = stage
        self._latents: Latents | None = None
        self._where: verdicts.Prompt | None = None
        self._number = 0

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for special methods before there is a module to ask.
        if name.startswith("__") or name == "_stage":
            raise AttributeError(name)
        return getattr(self._stage, name)

    def decode(self, samples: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As the module does."""
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As the module does."""
        raise NotImplementedError

    def over(self, stage: Any, change: Callable[[Any], Any] = unchanged) -> Stage:
        """The same part, around another module or stage.

        Args:
            change: what becomes of another VAE that it may have to use.
        """
        return type(self)(stage, self.settings, self.node)

    def _begin(self) -> None:
        """Another node begins to call: count anew."""
        raise NotImplementedError

    def _verdict(self) -> tuple[State, str]:
        """What was done since `_begin`."""
        raise NotImplementedError

    def _check(self, name: str, values: torch.Tensor) -> None:
        """Raises RuntimeError if what is to be decoded or encoded is not finite: no VAE makes a picture of it."""
        if not bool(values.isfinite().all()):
            what, maker = {"decode": ("latent", "sampler"), "encode": ("image", "node that made it")}[name]
            raise RuntimeError(
                f"{self.title} (node {self.node.id}): expected a {what} of finite values to {name}, but it holds NaN "
                f"or infinity already. Look at the {maker}, or at what is between."
            )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Around one call. The node has one line for each node that decodes or encodes, and it is written anew after
        each of its calls: tiles are many."""
        where = verdicts.current_prompt()
        if self._where is None or (where.id, where.node) != (self._where.id, self._where.node) or where.id is None:
            self._where, self._number = where, next(_numbers)
            self._begin()
        record, error = Record(0), None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            record.end(error)
            # Or the error would hold this frame, and with it what ran out of memory.
            error = None
            self._tell(self._line(record), record.as_dict())

    def _explaining(self, name: str, values: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Around what is inside: a latent of another model is told in words."""
        if name == "encode" or self._latents is None:
            return contextlib.nullcontext()
        return explaining(f"{self.title} (node {self.node.id})", undecoded(self._latents, values))

    def _line(self, record: Record) -> verdicts.Line:
        state, text = self._verdict()
        if record.status == "failed":
            return verdicts.Line("failed", f"failed ({record.reason}); until then: {text}")
        if record.status == "interrupted":
            return verdicts.Line("interrupted", f"interrupted; until then: {text}")
        return verdicts.Line(state, text)

    def _tell(self, line: verdicts.Line, record: dict[str, Any]) -> None:
        if self._where is not None:
            verdicts.publish(self._where, self.node, line, record, (self._number, self.stem))


def not_finite(images: torch.Tensor) -> list[int]:
    """Which of a batch have a value that is NaN or infinite."""
    return (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


class Calls:
    """What was decoded and encoded, to be told. A tile comes as an image does: only its number tells."""

    def __init__(self, is_video: bool = False) -> None:
        self._what = "video" if is_video else "image"
        self._calls: Counter[str] = Counter()
        self._images: Counter[str] = Counter()
        self._again: Counter[str] = Counter()

    def add(self, name: str, images: int, again: int = 0) -> None:
        """One more call.

        Args:
            name: ``decode`` or ``encode``.
            images: how many it was for.
            again: how many of them had to be redone.
        """
        self._calls[name] += 1
        self._images[name] += images
        self._again[name] += again

    def told(self, why_again: str = "") -> list[str]:
        """``decoded 2 images, 1 of them again ...``; ``encoded in 19 calls``."""
        lines = []
        for name, calls in self._calls.items():
            count = self._images[name]
            told = f"{count} {self._what}{'s' * (count != 1)}" if calls == 1 else f"in {calls} calls"
            again = f", {self._again[name]} of them again {why_again}" if self._again[name] else ""
            lines.append(f"{name}d {told}{again}")
        return lines


def of(vae: Any) -> tuple[Stage, ...]:
    """The stages of a VAE, from the outermost."""
    found, stage = [], vae.first_stage_model
    while isinstance(stage, Stage):
        found.append(stage)
        stage = stage._stage
    return tuple(found)


def module_of(vae: Any) -> Any:
    """The host's own module, inside all stages; None if the VAE has none."""
    stages = of(vae)
    return stages[-1]._stage if stages else vae.first_stage_model


def check_there_is_one(title: str, vae: Any) -> None:
    """Raises RuntimeError for what the host gives where a file holds no VAE."""
    if module_of(vae) is None:
        raise RuntimeError(
            f"{title}: expected a VAE, but the file that was loaded holds none that ComfyUI knows. Add a Load VAE with "
            "the model's own."
        )


def has_equal(vae: Any, kind: type[Stage], settings: Any, source: Node) -> bool:
    """Whether a VAE has a stage of this kind already, with the same settings.

    Raises:
        ValueError: with others.
    """
    there = next((stage for stage in of(vae) if isinstance(stage, kind)), None)
    if there is None or there.settings == settings:
        return there is not None
    raise ValueError(
        f"{kind.title}: node {source.id} and node {there.node.id} {kind.does} the same VAE with different settings. "
        "Remove or bypass one of them, or give both the same settings."
    )


def with_stage(vae: Any, new: Stage) -> Any:
    """A VAE like this one with one more stage, which came around nothing yet. The VAE that came in is not touched."""
    other = without_dynamic_vram(vae)
    put(other, module_of(other), *of(other), new)
    return other


def put(vae: Any, module: Any, *stages: Stage, change: Callable[[Any], Any] = unchanged) -> None:
    """Give a VAE of ours a module, and around it these stages in their canonical order. `change` as of `Stage.over`."""
    for stage in sorted(stages, key=lambda stage: stage.rank):
        module = stage.over(module, change)
        module._latents = Latents(vae.latent_channels, vae.latent_dim)
    vae.first_stage_model = module


def loaded_again(vae: Any) -> torch.nn.Module:
    """Its module, loaded a second time: where DynamicVRAM has the weights of the first is for the host alone to know.

    Raises:
        RuntimeError: the host does not know it by its weights, or another node changed it since it was loaded.
    """
    first = module_of(vae)
    # Some tiny VAEs have a number of channels that their weights do not tell.
    metadata = {"tae_latent_channels": vae.latent_channels}
    module = comfy.sd.VAE(sd=vae.get_sd(), device=vae.device, dtype=vae.vae_dtype, metadata=metadata).first_stage_model
    if type(module) is not type(first) or has_replaced_code(first):
        raise RuntimeError(
            "this VAE can't be loaded a second time, which it takes where DynamicVRAM has it. Start ComfyUI with "
            "--disable-dynamic-vram, or take the node out."
        )
    for name in HOSTS_BOOKS:
        vars(module).pop(name, None)
    return module


def has_replaced_code(module: torch.nn.Module) -> bool:
    """Whether another node put code of its own into a module, as those do that make pictures tileable."""
    return any(
        not vars(inner).keys().isdisjoint(("forward", "_conv_forward"))
        or getattr(inner, "padding_mode", "zeros") != "zeros"
        for inner in module.modules()
    )


def without_dynamic_vram(vae: Any) -> Any:
    """A VAE of the same weights whose own attributes may be set; loaded as a whole, if DynamicVRAM had it in pieces."""
    other = copy.copy(vae)
    if machine.is_dynamic(vae.patcher):
        module = loaded_again(vae)
        # With DynamicVRAM the host leaves weights in their file's type, and casts them as they are used.
        give_patcher(other, module.to(vae.vae_dtype))
        put(other, module, *of(vae))
    return other


def give_patcher(vae: Any, module: torch.nn.Module) -> None:
    """Make the host load this module for a VAE of ours, as a whole."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:  # not on hosts as old as 0.8
        archive(module)
    vae.size = comfy.model_management.module_size(module)
    vae.patcher = ModelPatcher(module, vae.patcher.load_device, vae.patcher.offload_device)
    # A copied module says of itself what it was when it was copied; loaded, most likely.
    vae.patcher.unpatch_model(vae.patcher.offload_device)


def publish_twice(node: Node, vae: Any, kind: type[Stage]) -> None:
    """Say that another node did a node's part already, and tells about it."""
    other = next(stage.node.id for stage in of(vae) if isinstance(stage, kind))
    text = f"node {other} does the same to this VAE already, and says what became of it"
    verdicts.publish(verdicts.current_prompt(), node, verdicts.Line("inert", text), {})


def publish_ready(node: Node) -> None:
    """Say that a node did its part. Stands only where nothing uses the VAE that it returned."""
    text = "on the VAE, but nothing was decoded or encoded with it in this prompt"
    verdicts.publish(verdicts.current_prompt(), node, verdicts.Line("inert", text), {})
