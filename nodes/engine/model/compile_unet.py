"""The UNet of one run, compiled: its blocks, or all of it. Installed for each call, and taken back after it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from torch import nn

from ...compiling import backends
from ...compiling.functions import STEADY_CALLS, Announce, Compiler
from ...compiling.settings import Settings
from ...compiling.tally import Tally
from ..host import machine
from ..host.artifacts import Keeper
from . import attention
from .unet import HostUNetCall, capturing, outer_blocks

Forward = Callable[..., torch.Tensor]


class UNetCompiling:
    """Compiles the UNets of one run: the model's, and on several GPUs its copies.

    Args:
        settings: what was set.
        patcher: the guider's ModelPatcher.
        keeper: holds what was compiled, for the next run.
        announce: told while something is compiled: graphs so far, and seconds.
        has_operations: whether convolutions are called as an operation, which is then part of the graphs.
    """

    def __init__(
        self, settings: Settings, patcher: Any, keeper: Keeper, announce: Announce, has_operations: bool = False
    ):
        self.settings = settings
        self.backend = backends.find(settings, patcher.load_device)
        self.tally = Tally(self.backend.name, "UNet call")
        # They change weights within the run, which a backend that keeps weights can't follow.
        self.has_hooks = bool(patcher.hook_patches) and not self.backend.shares_graphs(settings)
        self.family = type(patcher.model.model_config).__name__
        self.downscale = getattr(patcher.model.latent_format, "spacial_downscale_ratio", 8)
        self._keeper = keeper
        self._announce = announce
        self._has_operations = has_operations
        self._prepared: dict[int, Prepared] = {}

    def around(self, call: HostUNetCall) -> CompiledUNetCall:
        """A call of the UNet that runs compiled."""
        unet = call.unet
        prepared = self._prepared.get(id(unet))
        if prepared is None:
            # Dynamo's graphs take the module along with its inputs: all models of a kind share them.
            owner = None if self.backend.shares_graphs(self.settings) else unet
            if owner is not None and is_quantized(unet):
                raise RuntimeError(
                    f"{self.settings.title}: {self.backend.name} keeps weights, and can't keep quantized ones. Set "
                    "backend to inductor with mode default or max-autotune-no-cudagraphs, or take Quantize Model out."
                )
            key = (self.settings, self.backend.name, self._has_operations)
            compiler = self._keeper.get(owner, key, lambda: Compiler(self.settings, self.backend))
            compiler.begin(self.tally, self._announce)
            compiler.follow(unet)
            prepared = self._prepared[id(unet)] = Prepared(unet, compiler, call.x.device)
            self.tally.units = prepared.told
            for why, number in prepared.left_out.items():
                self.tally.notes[f"{number} of {prepared.total} blocks run without graphs: {why}"] = None
        return CompiledUNetCall(call, prepared, self)

    def end(self) -> None:
        """The run is over."""
        for prepared in self._prepared.values():
            prepared.compiler.end()
        self._prepared.clear()


class Prepared:
    """A UNet as it is in this run: which of its blocks can be compiled, and their compiled forwards.

    Args:
        unet: the host's UNetModel, loaded.
        compiler: what makes and keeps the graphs.
        device: where it runs.
    """

    def __init__(self, unet: Any, compiler: Compiler, device: torch.device):
        self.unet = unet
        self.compiler = compiler
        self.left_out: Counter[str] = Counter()
        self.forwards: list[tuple[nn.Module, Forward]] = []
        self.total = 0
        self.weights = "quantized" if is_quantized(unet) else "as they are"
        for level, block in _blocks(unet):
            self.total += 1
            why = machine.unsuited(block, device)
            if why is None:
                kind = (type(block).__name__, level, _geometry(block))
                make = _residual if isinstance(block, ResBlock) else _transformer
                self.forwards.append((block, make(block, kind, compiler)))
            else:
                self.left_out[why] += 1
        is_whole = compiler.settings.is_whole
        # Everything else in the UNet must be as the blocks are.
        self.unsuited = _unsuited(unet, device) if is_whole else None
        self.geometry = _geometry(unet) if is_whole else ()
        self.told = "the UNet" if is_whole and not self.unsuited else f"{len(self.forwards)} blocks"

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The compiled forwards on the blocks, for one call. What is around a block's forward, such as hooks, stays."""
        try:
            for block, forward in self.forwards:
                block.__dict__["forward"] = forward
            yield
        finally:
            for block, _ in self.forwards:
                block.__dict__.pop("forward", None)


class CompiledUNetCall:
    """`methods.method.UNetCall`, compiled."""

    def __init__(self, call: HostUNetCall, prepared: Prepared, run: UNetCompiling):
        self.call = call
        self.prepared = prepared
        self.compiler = prepared.compiler
        self.tally = run.tally
        self.family = run.family
        self.has_hooks = run.has_hooks
        self.downscale = run.downscale
        self.keys = call.keys

    def full(self, branch: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, *captured = self._run("full", branch, lambda: self.call.full(branch), _Whole)
        return output, captured[0] if captured else None

    def partial(self, branch: int, deep: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._run("cached", branch, lambda: (self.call.partial(branch, deep),), _Outer, deep)[0]
        return output

    def _run(
        self, step: str, branch: int | None, host: Callable[[], Any], adapter: type[_Adapter], *extra: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        call, compiler = self.call, self.compiler
        shape = self._shape()
        shape["step"] = step if step == "cached" or branch is None else "full, features kept"
        why = self._not_whole() if compiler.settings.is_whole else None
        if compiler.settings.is_whole and why is None:
            shape |= {"compiled": "whole", "ControlNet": "off" if call.control is None else "on"}
            run = self._whole(branch, adapter, extra)
        elif compiler.backend.takes_modules or compiler.settings.records_cuda_graphs:
            # What was recorded can't see what another node changes inside.
            self.tally.eager[why or ""] += 1
            return tuple(value for value in host() if value is not None)
        else:
            if why is not None:
                self.tally.notes[f"block by block, since {why}"] = None
            if not self.prepared.forwards:
                self.tally.eager["no block can be compiled"] += 1
                return tuple(value for value in host() if value is not None)
            shape |= {"compiled": "in blocks"}
            run = self._by_blocks(host)
        self._time(shape, step)
        # Cached steps are other calls than the one that was timed without graphs.
        wait = machine.waiting(call.x.device) if step == "full" else None
        outputs: tuple[torch.Tensor, ...] = compiler.call(shape, run, wait)
        return outputs

    def _shape(self) -> dict[str, Any]:
        """What graphs may depend on, in the user's words."""
        call = self.call
        height, width = (side * self.downscale for side in call.x.shape[-2:])
        return {
            "model": self.family,
            "resolution": f"{width}x{height}",
            "batch": call.x.shape[0],
            "prompt length": 0 if call.context is None else call.context.shape[1],
            "precision": str(call.x.dtype).removeprefix("torch."),
            "weights": self.prepared.weights,
            "attention": attention.described(call.options),
        }

    def _not_whole(self) -> str | None:
        """Why this call can't be one graph: another node's code runs inside the UNet, which no graph may keep."""
        call = self.call
        if self.prepared.unsuited:
            return self.prepared.unsuited
        if self.has_hooks:
            return "hooks change the weights within the run"
        if call.kwargs and any(value is not None for value in call.kwargs.values()):
            return "the model is given further inputs"
        if attention.is_overridden(call.options):
            return "another node overrides its attention"
        if attention.OVERRIDE in call.options and self.compiler.settings.records_cuda_graphs:
            return "CUDA graphs would keep the kernel that Attention Backend chose"
        for name in ("patches", "patches_replace"):
            found = sorted(kind for kind, entries in (call.options.get(name) or {}).items() if entries)
            if found:
                return f"the inside of the UNet is patched ({', '.join(found)})"
        if call.has_wrappers_inside:
            return "another node wraps the UNet from inside"
        return None

    def _by_blocks(self, host: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> tuple[torch.Tensor, ...]:
            with self.prepared.installed():
                return tuple(value for value in host() if value is not None)

        return run

    def _whole(
        self, branch: int | None, adapter: type[_Adapter], extra: tuple[torch.Tensor, ...]
    ) -> Callable[[], tuple[torch.Tensor, ...]]:
        call, compiler = self.call, self.compiler
        layout, tensors = _flattened(call.control)
        given = (call.context is not None, call.y is not None)
        key = (adapter.__name__, branch, given, layout, self.prepared.geometry)
        inputs = (call.x, call.timesteps, *(t for t in (call.context, call.y) if t is not None), *extra, *tensors)

        def run() -> tuple[torch.Tensor, ...]:
            with attention.using(call.options):
                if compiler.backend.takes_modules:
                    made = lambda: adapter(call.unet, branch, given, layout)  # noqa: E731
                    outputs = compiler.module(key, made, inputs)(*inputs)
                else:
                    function = compiler.function(key, _flat_function(adapter, branch, given, layout))
                    outputs = function(call.unet, *inputs)
            # Copies: a backend may write its next result where this one is.
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            return tuple(output.clone() for output in outputs)

        return run

    def _time(self, shape: dict[str, Any], step: str) -> None:
        """Before the first compilation: run it without graphs, once to warm up and then to time it, so that the gain
        can be told. Not where it could be noticed: a patch, a hook or another node's code may count or draw random
        numbers, and control is used up."""
        call = self.call
        is_alone = not call.options.get("patches") and not call.options.get("patches_replace")
        if step != "full" or not is_alone or call.control is not None or not self.compiler.is_untimed:
            return
        if attention.is_overridden(call.options) or call.has_wrappers_inside:
            return
        if self.prepared.left_out.keys() & {machine.REPLACED, machine.HOOKED}:
            return
        seconds = []
        for _ in range(1 + STEADY_CALLS):
            began = machine.clock(call.x.device)
            call.full()
            seconds.append(machine.clock(call.x.device) - began)
        self.compiler.timed(shape, seconds[1:])


# Blocks


def _unsuited(unet: Any, device: torch.device) -> str | None:
    """Why no graph should be made of a whole UNet; None if one may."""
    run_inside = (type(unet)._forward, openaimodel.forward_timestep_embed, openaimodel.apply_control)
    return machine.unsuited(unet, device) if all(map(machine.is_host_s, run_inside)) else machine.REPLACED


def is_quantized(unet: nn.Module) -> bool:
    """Whether other tensors than torch's own stand in for some weights."""
    return any(hasattr(weight, "__tensor_flatten__") for weight in unet.parameters())


def _blocks(unet: Any) -> Iterator[tuple[int, nn.Module]]:
    """The blocks that repeat, and how many times the image was halved where each stands."""
    level = 0
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for layers in (*unet.input_blocks, *middle, *unet.output_blocks):
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, (ResBlock, BasicTransformerBlock)):
                    yield level, module
            level += isinstance(layer, Downsample) - isinstance(layer, Upsample)


def _geometry(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks must share to share a graph. Dynamo checks the rest."""
    return tuple((name, tuple(weight.shape), weight.dtype) for name, weight in block.named_parameters())


def _residual(block: nn.Module, kind: Any, compiler: Compiler) -> Forward:
    def forward(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = compiler.function(kind, residual)(block, x, emb)
        return output

    return forward


def residual(block: Any, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """A residual block, past what stands in its instance's place for the call."""
    return type(block).forward(block, x, emb)


def feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The feed-forward part of a transformer block."""
    return type(module).forward(module, x)


def _transformer(block: Any, kind: Any, compiler: Compiler) -> Forward:
    def forward(
        x: torch.Tensor, context: torch.Tensor | None = None, transformer_options: dict[str, Any] | None = None
    ) -> torch.Tensor:
        options = {} if transformer_options is None else transformer_options
        kinds = attention.replaced(options)
        if kinds is not None:
            function = compiler.function((kind, kinds), _TRANSFORMERS[kinds])
            try:
                with attention.using(options):
                    output: torch.Tensor = function(block, x, context)
                return output
            except attention.UnsuitedError as error:
                compiler.tally.eager[f"a transformer block ran without its graph: {error}"] += 1
        # A patch that may change shapes runs between the parts: what is behind all of them can be a graph still.
        block.ff.__dict__["forward"] = lambda x: compiler.function((kind, "ff"), feed_forward)(block.ff, x)
        try:
            return type(block).forward(block, x, context, options)
        finally:
            del block.ff.__dict__["forward"]

    return forward


def _make_transformer(kinds: attention.Kinds) -> Callable[..., torch.Tensor]:
    options = attention.plain_options(kinds)

    def transformer(block: Any, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return type(block).forward(block, x, context, options)

    return transformer


_TRANSFORMERS: dict[attention.Kinds, Callable[..., torch.Tensor]] = {
    kinds: _make_transformer(kinds) for kinds in ((), ("attn1",), ("attn2",), ("attn1", "attn2"))
}


# The whole UNet, as a function or a module of tensors alone

Layout = tuple[tuple[str, tuple[bool, ...]], ...]
"""A ControlNet's residuals: for each place, which entries of its list are tensors."""


def _flattened(control: dict[str, list[Any]] | None) -> tuple[Layout | None, list[torch.Tensor]]:
    if control is None:
        return None, []
    layout = tuple((name, tuple(entry is not None for entry in entries)) for name, entries in control.items())
    return layout, [entry for entries in control.values() for entry in entries if entry is not None]


def _unflattened(layout: Layout | None, tensors: list[torch.Tensor]) -> dict[str, list[Any]] | None:
    if layout is None:
        return None
    return {name: [tensors.pop(0) if is_there else None for is_there in there] for name, there in layout}


def _inputs(given: tuple[bool, bool], inputs: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """x, timesteps, context and y, told apart again, and what comes after them."""
    rest = list(inputs)
    first = [rest.pop(0) if is_there else None for is_there in (True, True, *given)]
    return tuple(first), rest


class _Adapter(nn.Module):
    """The UNet as a module of tensors: x, timesteps, context and y where they are given, then what `run` takes first,
    then control."""

    def __init__(self, unet: Any, branch: int | None, given: tuple[bool, bool], layout: Layout | None):
        super().__init__()
        self.unet = unet
        self.branch = branch
        self.given = given
        self.layout = layout

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self.unet, self.branch, self.given, self.layout, *inputs)

    @staticmethod
    def run(unet: Any, branch: Any, given: Any, layout: Any, *inputs: torch.Tensor) -> Any:
        raise NotImplementedError


class _Whole(_Adapter):
    """All of it; with a branch, also the features that enter there."""

    @staticmethod
    def run(unet: Any, branch: Any, given: Any, layout: Any, *inputs: torch.Tensor) -> Any:
        first, rest = _inputs(given, inputs)
        options = attention.plain_options()
        captured: list[torch.Tensor] = []
        if branch is not None:
            options = capturing(unet, branch, options, captured)
        output = type(unet)._forward(unet, *first, _unflattened(layout, rest), options)
        return output, *captured


class _Outer(_Adapter):
    """The outer blocks on given deep features, which are its input after context and y."""

    @staticmethod
    def run(unet: Any, branch: Any, given: Any, layout: Any, *inputs: torch.Tensor) -> Any:
        first, (deep, *rest) = _inputs(given, inputs)
        x, timesteps, context, y = first
        control = _unflattened(layout, rest)
        return (outer_blocks(unet, branch, deep, x, timesteps, context, y, control, attention.plain_options()),)


def _flat_function(
    adapter: type[_Adapter], branch: int | None, given: tuple[bool, bool], layout: Layout | None
) -> Callable[..., Any]:
    run_adapter = adapter.run

    def unet_call(unet: Any, *inputs: torch.Tensor) -> Any:
        return run_adapter(unet, branch, given, layout, *inputs)

    return unet_call
