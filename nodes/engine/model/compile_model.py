"""The model of one run, compiled: its blocks, or all of it. Installed for each call, and taken back after it.

A UNet's blocks are known: those that residual and transformer blocks repeat, and DeepCache runs some of them alone. Of
every other model they are found by looking (`blocks`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from comfy.patcher_extension import WrappersMP
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from ...compiling import backends
from ...compiling.functions import STEADY_CALLS, Announce, Compiler
from ...compiling.settings import Settings
from ...compiling.tally import Tally
from ..host import machine
from ..host.artifacts import Keeper
from ..plan import models
from ..plan.plan import KEY
from . import attention
from .blocks import (
    OPTIONS,
    PATCHED,
    CompiledBlock,
    Forward,
    alone,
    called,
    for_graph,
    installed,
    repeated,
    unsuited,
    weights_form,
    words,
)
from .unet import HostUNetCall, capturing, outer_blocks

Found = TypeVar("Found", bound="Prepared")
Call = TypeVar("Call", bound="HostUNetCall | ModelCall")


class Compiling:
    """Compiles the models of one run: the guider's, and on several GPUs its copies.

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
        is_unet = models.is_image_unet(patcher.model.diffusion_model)
        self.tally = Tally(self.backend.name, "UNet call" if is_unet else "model call")
        # They change weights within the run, which a backend that keeps weights can't follow.
        self.has_hooks = bool(patcher.hook_patches) and not self.backend.shares_graphs(settings)
        self.family = type(patcher.model.model_config).__name__
        self.downscale = getattr(patcher.model.latent_format, "spacial_downscale_ratio", 8)
        self._keeper = keeper
        self._announce = announce
        self._has_operations = has_operations
        self._prepared: dict[int, Any] = {}

    def around(self, call: HostUNetCall) -> CompiledUNetCall:
        """A call of a UNet that runs compiled."""
        return CompiledUNetCall(call, self._prepare(call.unet, call.x.device, PreparedUNet), self)

    def around_model(self, module: nn.Module, call: ModelCall) -> CompiledModelCall:
        """A call of any other model that runs compiled.

        Args:
            module: the host's diffusion model.
            call: what it is given.
        """
        return CompiledModelCall(module, call, self._prepare(module, call.x.device, PreparedModel), self)

    def _prepare(self, module: Any, device: torch.device, kind: Callable[..., Found]) -> Found:
        prepared = self._prepared.get(id(module))
        if prepared is None:
            # Dynamo's graphs take the module along with its inputs: all models of a kind share them.
            owner = None if self.backend.shares_graphs(self.settings) else module
            if owner is not None and is_quantized(module):
                raise RuntimeError(
                    f"{self.settings.title}: {self.backend.name} keeps weights, and can't keep quantized ones. Set "
                    "backend to inductor with mode default or max-autotune-no-cudagraphs, or take Quantize Model out."
                )
            key = (self.settings, self.backend.name, self._has_operations)
            compiler = self._keeper.get(owner, key, lambda: Compiler(self.settings, self.backend))
            compiler.begin(self.tally, self._announce)
            compiler.follow(module)
            prepared = self._prepared[id(module)] = kind(module, compiler, device)
            self.tally.units = prepared.told
            for why, number in prepared.left_out.items():
                self.tally.notes[f"{number} of {prepared.total} blocks run without graphs: {why}"] = None
        return prepared

    def end(self) -> None:
        """The run is over."""
        for prepared in self._prepared.values():
            prepared.compiler.end()
        self._prepared.clear()


class Prepared:
    """A model as it is in one run: which of its blocks can be compiled, and their compiled forwards.

    Attributes:
        compiler: what makes and keeps the graphs.
        forwards: of the blocks that can be.
        left_out: why others can't, and how many.
        total: of the blocks.
        told: what is compiled, for the verdict.
        weights: how they are, in the user's words.
    """

    def __init__(self, module: nn.Module, compiler: Compiler):
        self.compiler = compiler
        self.weights = _weights(module)
        self.forwards: list[tuple[nn.Module, Forward]] = []
        self.left_out: Counter[str] = Counter()
        self.total = 0
        self.told = ""

    def _add(self, block: nn.Module, why: str | None, make: Callable[[], Forward]) -> None:
        if why is None:
            self.total += 1
            self.forwards.append((block, make()))
        else:
            self._leave_out(why)

    def _leave_out(self, why: str) -> None:
        self.total += 1
        self.left_out[why] += 1


class PreparedUNet(Prepared):
    """A UNet.

    Args:
        unet: the host's UNetModel, loaded.
        compiler: what makes and keeps the graphs.
        device: where it runs.
    """

    def __init__(self, unet: Any, compiler: Compiler, device: torch.device):
        super().__init__(unet, compiler)
        self.unet = unet
        for level, block in _blocks(unet):
            kind = (type(block).__name__, level, weights_form(block))
            make = _residual if isinstance(block, ResBlock) else _transformer
            self._add(block, unsuited(block, device), partial(make, block, kind, compiler))
        is_whole = compiler.settings.is_whole
        # Everything else in the UNet must be as the blocks are.
        self.unsuited = _unsuited(unet, device) if is_whole else None
        self.geometry = weights_form(unet) if is_whole else ()
        self.told = "the UNet" if is_whole and not self.unsuited else f"{len(self.forwards)} blocks"


class _CompiledCall(Generic[Call, Found]):
    """What calls of a UNet and of other models share."""

    def __init__(self, call: Call, prepared: Found, run: Compiling):
        self.call = call
        self.prepared = prepared
        self.compiler = prepared.compiler
        self.tally = run.tally
        self.family = run.family
        self.has_hooks = run.has_hooks
        self.downscale = run.downscale

    def _given(self) -> dict[str, Any]:
        """What graphs may depend on beside the size, in the user's words."""
        call = self.call
        return {
            "batch": call.x.shape[0],
            "prompt length": 0 if call.context is None else call.context.shape[1],
            "precision": str(call.x.dtype).removeprefix("torch."),
            "weights": self.prepared.weights,
            "attention": attention.described(call.options),
        }


class CompiledUNetCall(_CompiledCall[HostUNetCall, PreparedUNet]):
    """`methods.method.UNetCall`, compiled."""

    def __init__(self, call: HostUNetCall, prepared: PreparedUNet, run: Compiling):
        super().__init__(call, prepared, run)
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
        height, width = (side * self.downscale for side in self.call.x.shape[-2:])
        return {"model": self.family, "resolution": f"{width}x{height}", **self._given()}

    def _not_whole(self) -> str | None:
        """Why this call can't be one graph: another node's code runs inside the UNet, which no graph may keep."""
        call = self.call
        if self.prepared.unsuited:
            return self.prepared.unsuited
        if self.has_hooks:
            return HOOKED
        if call.kwargs and any(value is not None for value in call.kwargs.values()):
            return "the model is given further inputs"
        return _not_plain(call.options, call.has_wrappers_inside, self.compiler.settings, "UNet")

    def _by_blocks(self, host: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> tuple[torch.Tensor, ...]:
            with installed(self.prepared.forwards):
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
            with machine.trial():
                call.full()
            seconds.append(machine.clock(call.x.device) - began)
        self.compiler.timed(shape, seconds[1:])


class PreparedModel(Prepared):
    """Any other model.

    Args:
        module: the host's diffusion model, loaded.
        compiler: what makes and keeps the graphs.
        device: where it runs.
    """

    def __init__(self, module: nn.Module, compiler: Compiler, device: torch.device):
        super().__init__(module, compiler)
        # The most first: one of them is timed.
        kinds = repeated(module)
        for kind, blocks in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
            known = words(blocks[0])
            for block in blocks:
                self._add(block, unsuited(block, device), partial(CompiledBlock, block, kind, known, compiler))
        is_whole = compiler.settings.is_whole
        self.unsuited = unsuited(module, device) if is_whole else None
        if not is_whole or self.unsuited:
            for _ in alone(module, kinds):
                self._leave_out("no other is like it")
        self.kind = ("whole", type(module), weights_form(module)) if is_whole else ()
        self.words = words(module) if is_whole else frozenset()
        self.told = "the model" if is_whole and not self.unsuited else f"{len(self.forwards)} blocks"


@dataclass(frozen=True)
class ModelCall:
    """What a model is given at the host's APPLY_MODEL.

    Attributes:
        x: noisy latents, (B, C, ...).
        context: the prompts, (B, tokens, width); None if there are none.
        control: a ControlNet's residuals by their places; None if there is none.
        options: the host's options for this call.
        run: makes the call.
    """

    x: torch.Tensor
    context: torch.Tensor | None
    control: dict[str, Any] | None
    options: dict[str, Any]
    run: Callable[[], torch.Tensor]


class CompiledModelCall(_CompiledCall[ModelCall, PreparedModel]):
    """A call of a model that is no UNet, compiled."""

    def __init__(self, module: nn.Module, call: ModelCall, prepared: PreparedModel, run: Compiling):
        super().__init__(call, prepared, run)
        self.module = module

    def run(self) -> torch.Tensor:
        """Make it."""
        compiler, settings = self.compiler, self.compiler.settings
        shape = self._shape()
        why = self._not_whole() if settings.is_whole else None
        forwards = self.prepared.forwards
        if settings.is_whole and why is None:
            shape |= {"compiled": "whole", "ControlNet": "off" if self.call.control is None else "on"}
            forwards = [(self.module, self._whole)]
        elif compiler.backend.takes_modules or settings.records_cuda_graphs:
            # What was recorded can't see what another node changes inside.
            self.tally.eager[why or ""] += 1
            return self.call.run()
        else:
            if why is not None:
                self.tally.notes[f"block by block, since {why}"] = None
            if not forwards:
                none = "no block can be compiled" if self.prepared.total else "no two of its blocks are alike"
                self.tally.eager[none] += 1
                return self.call.run()
            shape |= {"compiled": "in blocks"}
            forwards = self._timed(forwards, shape)

        def run() -> torch.Tensor:
            with installed(forwards):
                return self.call.run()

        output: torch.Tensor = compiler.call(shape, run, None)
        return output

    def _shape(self) -> dict[str, Any]:
        """What graphs may depend on, in the user's words."""
        sides = self.call.x.shape[2:]
        shape: dict[str, Any] = {"model": self.family}
        if len(sides) > 1:
            height, width = (side * self.downscale for side in sides[-2:])
            shape["resolution"] = f"{width}x{height}"
        if len(sides) != 2:
            shape["length"] = sides[0]
        return shape | self._given()

    def _timed(
        self, forwards: list[tuple[nn.Module, Forward]], shape: dict[str, Any]
    ) -> list[tuple[nn.Module, Forward]]:
        """These forwards, one of which is timed, so that the gain can be told: before anything is compiled without its
        graph, on copies of what it is given, and then with it. A whole call would take too long for that."""
        options, compiler = self.call.options, self.compiler
        if not compiler.is_untimed and not compiler.is_timing(shape):
            return forwards
        # Other nodes' code may count or draw random numbers.
        is_patched = any(entries for name in PATCHED for entries in (options.get(name) or {}).values())
        if is_patched or attention.is_overridden(options):
            return forwards
        (block, forward), *rest = forwards
        self.tally.timed = "block"
        return [(block, partial(self._timing, block, forward, shape)), *rest]

    def _timing(self, block: nn.Module, forward: Forward, shape: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        compiler, device = self.compiler, self.call.x.device
        if compiler.is_untimed:
            # Such as a cache of what it saw before.
            has_state = any(isinstance(value, dict) for name, value in kwargs.items() if name != OPTIONS)
            seconds = []
            for _ in range(0 if has_state else 1 + STEADY_CALLS):
                # It may write into what it is given.
                copies, named = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                began = machine.clock(device)
                with machine.trial():
                    called(block, copies, named)
                seconds.append(machine.clock(device) - began)
            compiler.timed(shape, seconds[1:])
            return forward(*args, **kwargs)
        began = machine.clock(device)
        output = forward(*args, **kwargs)
        compiler.steady(machine.clock(device) - began)
        return output

    def _not_whole(self) -> str | None:
        """Why this call can't be one graph: another node's code runs inside the model, which no graph may keep."""
        if self.prepared.unsuited:
            return self.prepared.unsuited
        if self.has_hooks:
            return HOOKED
        options = self.call.options
        wrappers = (options.get("wrappers") or {}).get(WrappersMP.DIFFUSION_MODEL) or {}
        is_wrapped = any(entries for key, entries in wrappers.items() if key != KEY)
        return _not_plain(options, is_wrapped, self.compiler.settings, "model")

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in one graph."""
        compiler, options = self.compiler, kwargs.get(OPTIONS) or {}
        given = for_graph(options)
        with attention.using(options):
            if compiler.backend.takes_modules:
                known = self.prepared.words
                given = {name: value for name, value in given.items() if name in known or name == attention.OVERRIDE}
                output = self._as_module(args, {**kwargs, OPTIONS: given})
            else:
                output = compiler.function(self.prepared.kind, called)(self.module, args, {**kwargs, OPTIONS: given})
        # Copies: a backend may write its next result where this one is.
        return tree_map_only(torch.Tensor, torch.clone, output)

    def _as_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By a backend that takes a module of tensors alone: what else there is, is part of it."""
        leaves, layout = tree_flatten((args, kwargs))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        are_tensors = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        key = (self.prepared.kind, repr(layout), repr(constants), are_tensors)
        make = lambda: _Flat(self.module, constants, are_tensors, layout)  # noqa: E731
        return self.compiler.module(key, make, tensors)(*tensors)


class _Flat(nn.Module):
    """A model as a module of tensors alone."""

    def __init__(self, module: nn.Module, constants: tuple[Any, ...], are_tensors: tuple[bool, ...], layout: TreeSpec):
        super().__init__()
        self.module = module
        self.constants = constants
        self.are_tensors = are_tensors
        self.layout = layout

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        leaves = [
            next(rest) if is_one else constant
            for is_one, constant in zip(self.are_tensors, self.constants, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self.layout)
        return called(self.module, args, kwargs)


HOOKED = "hooks change the weights within the run"


def _not_plain(options: dict[str, Any], is_wrapped: bool, settings: Settings, noun: str) -> str | None:
    """What other nodes do inside a model in a call with these options, so that it can't be one graph; None if
    nothing."""
    if attention.is_overridden(options):
        return "another node overrides its attention"
    if attention.OVERRIDE in options and settings.records_cuda_graphs:
        return "CUDA graphs would keep the kernel that Attention Backend chose"
    for name in PATCHED:
        found = sorted(kind for kind, entries in (options.get(name) or {}).items() if entries)
        if found:
            return f"the inside of the {noun} is patched ({', '.join(found)})"
    return f"another node wraps the {noun} from inside" if is_wrapped else None


# A UNet's blocks


def _unsuited(unet: Any, device: torch.device) -> str | None:
    """Why no graph should be made of a whole UNet; None if one may."""
    run_inside = (type(unet)._forward, openaimodel.forward_timestep_embed, openaimodel.apply_control)
    return unsuited(unet, device) if all(map(machine.is_host_s, run_inside)) else machine.REPLACED


def _weights(module: nn.Module) -> str:
    """What weights are, as far as graphs depend on it: those that the host patches it makes anew, in inference mode."""
    if is_quantized(module):
        return "quantized"
    return "patched" if any(weight.is_inference() for weight in module.parameters()) else "as they are"


def is_quantized(unet: nn.Module) -> bool:
    """Whether other tensors stand in for some weights, torch's own or not."""
    return any(hasattr(weight, "__tensor_flatten__") or hasattr(weight, "is_stand_in") for weight in unet.parameters())


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
        feed = lambda x: compiler.function((kind, "ff"), feed_forward)(block.ff, x)  # noqa: E731
        with installed([(block.ff, feed)]):
            result: torch.Tensor = type(block).forward(block, x, context, options)
            return result

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
