"""The blocks that a model repeats, found by looking, and each call of one by the compiled function of its kind.

A block is what stands in a list, computes with several linear layers (which attention has), and has another of its
class and weights beside it. Lists inside a block belong to it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from ...compiling.functions import Compiler
from ..host import machine
from . import attention

Forward = Callable[..., Any]
Kind = tuple[Any, ...]

OPTIONS = "transformer_options"
"""The argument by which the host hands its options through a model."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
PATCHED = ("patches", "patches_replace")
"""Entries of the options that hold other nodes' functions."""
APART = (*PATCHED, "wrappers", "callbacks", "uuids", attention.OVERRIDE)
"""Entries of the options that no graph is given: they hold functions, or name the conditions of one call."""


def weights_form(module: nn.Module) -> Kind:
    """What two modules of a class must share to share a graph: names, shapes, dtypes and quantization of their weights.
    Dynamo checks the rest."""
    return tuple((name, _form(weight)) for name, weight in module.named_parameters())


def _form(weight: Any) -> Hashable:
    inner: Any = getattr(weight, "__tensor_flatten__", None)
    parts = tuple(_form(getattr(weight, name)) for name in inner()[0]) if inner is not None else ()
    return type(weight).__name__, tuple(weight.shape), weight.dtype, parts


def foreign_weights(module: nn.Module) -> str | None:
    """The class of weights in a module that no compiler takes: another pack's tensors, as GGUF's; None if there are
    none."""
    for weight in module.parameters():
        # What torchao and the host keep in tensors of their own can be taken apart into plain ones.
        if type(weight) not in (nn.Parameter, torch.Tensor) and not hasattr(weight, "__tensor_flatten__"):
            return type(weight).__name__
    return None


def repeated(module: nn.Module) -> dict[Kind, list[nn.Module]]:
    """The blocks of a model by their kinds, in their order; each kind has at least two, in one list: what lists are
    given differs in length, as refiners' prompts and images do.

    Outermost first: where no other block of a list is like one, the lists inside it are looked through.
    """
    return _repeated(module, "")


def _repeated(module: nn.Module, path: str) -> dict[Kind, list[nn.Module]]:
    kinds: dict[Kind, list[tuple[str, nn.Module]]] = defaultdict(list)
    for place, name, candidate in _in_lists(module, path):
        kinds[(type(candidate), weights_form(candidate), place)].append((name, candidate))
    found: dict[Kind, list[nn.Module]] = {}
    for kind, members in kinds.items():
        if len(members) > 1:
            found[kind] = [member for _, member in members]
        else:
            found |= _repeated(members[0][1], f"{kind[-1]}.{members[0][0]}")
    return found


def alone(module: nn.Module, kinds: dict[Kind, list[nn.Module]], path: str = "") -> Iterator[nn.Module]:
    """What stands in a list beside some of these blocks, and is like none of them and made of none."""
    places = {place for *_, place in kinds}
    blocks = {block for members in kinds.values() for block in members}
    for place, name, candidate in _in_lists(module, path):
        if candidate in blocks:
            continue
        if not blocks.isdisjoint(candidate.modules()):
            yield from alone(candidate, kinds, f"{place}.{name}")
        elif place in places:
            yield candidate


def _in_lists(module: nn.Module, path: str) -> Iterator[tuple[str, str, nn.Module]]:
    """What stands in lists and may be a block, none of it inside another; with the list's path, and its name there."""
    is_list = isinstance(module, CONTAINERS)
    for name, child in module.named_children():
        if is_list and _may_be_block(child):
            yield path, name, child
        else:
            yield from _in_lists(child, f"{path}.{name}")


def _may_be_block(module: nn.Module) -> bool:
    # The host may call the members of such a container, and not the container.
    if isinstance(module, CONTAINERS):
        return False
    return sum(hasattr(part, "in_features") for part in module.modules()) > 1


def words(module: nn.Module) -> frozenset[str]:
    """The strings in the code of a module and its parts, and of what that calls of the host's models: what it may look
    for in the options is among them."""
    found: set[str] = set()
    seen: set[CodeType] = set()
    classes = {base for part in module.modules() for base in type(part).__mro__ if machine.is_host_s(base)}
    waiting = [value for base in classes for value in vars(base).values()]
    while waiting:
        value = waiting.pop()
        function: Any = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        strings, names = _named_in(code)
        found |= strings
        # Not what is below the models, such as what manages memory: it never sees the options.
        called = (function.__globals__.get(name) for name in names)
        waiting += [one for one in called if str(getattr(one, "__module__", "")).startswith("comfy.ldm.")]
    return frozenset(found)


def _named_in(code: CodeType) -> tuple[set[str], set[str]]:
    """The strings and the names in a function's code, and in that of functions inside it."""
    strings = {value for value in code.co_consts if isinstance(value, str)}
    names = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _named_in(inner)
            strings, names = strings | more[0], names | more[1]
    return strings, names


def for_graph(options: dict[str, Any]) -> dict[str, Any]:
    """The host's options as a graph is given them: attention an operation, other nodes' functions left out. What a
    module reads of the rest is guarded by dynamo, or an input."""
    return {name: value for name, value in options.items() if name not in APART} | attention.plain_options()


@contextlib.contextmanager
def installed(forwards: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Compiled forwards on their modules, for one call. What is around a module's forward, such as hooks, stays."""
    before = [block.__dict__.get("forward") for block, _ in forwards]
    try:
        for block, forward in forwards:
            block.__dict__["forward"] = forward
        yield
    finally:
        for (block, _), own in zip(forwards, before, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


def unsuited(module: nn.Module, device: torch.device) -> str | None:
    """Why no graph should be made of a module as it is now; None if one may."""
    why = machine.unsuited(module, device)
    if why is None and (kind := foreign_weights(module)) is not None:
        return f"their weights are another pack's {kind}s, which no compiler takes"
    return why


def _laid_out_plainly(value: Any) -> Any:
    """A tensor contiguous, if it is all of its memory and only its dimensions are in another order."""
    if not isinstance(value, torch.Tensor):
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value if value.is_contiguous() or extent != value.numel() else value.contiguous()


def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's own forward, past what stands in its instance's place for the call."""
    return type(module).forward(module, *args, **kwargs)


class CompiledBlock:
    """A block's forward for one run: its kind's compiled function, or, where another node's code runs inside it, its
    own.

    Args:
        block: the block.
        kind: its kind.
        known: `words` of one of its kind.
        compiler: what makes and keeps the graphs.
    """

    def __init__(self, block: nn.Module, kind: Kind, known: frozenset[str], compiler: Compiler):
        self.block = block
        self.kind = kind
        self.words = known
        self.compiler = compiler
        parameters = list(inspect.signature(type(block).forward).parameters)[1:]
        self.position = parameters.index(OPTIONS) if OPTIONS in parameters else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = self._options(args, kwargs)
        inside = self._patched_by_others(options)
        if inside:
            self.compiler.tally.eager[f"a block ran without its graph: other nodes patch it inside ({inside})"] += 1
            return called(self.block, args, kwargs)
        args, kwargs = self._with(for_graph(options), args, kwargs)
        # A first block may get what was turned round just before, the others their like's output: one graph for both.
        args = tuple(map(_laid_out_plainly, args))
        kwargs = {name: _laid_out_plainly(value) for name, value in kwargs.items()}
        function = self.compiler.function(self.kind, called)
        try:
            with attention.using(options):
                return function(self.block, args, kwargs)
        except attention.UnsuitedError as error:
            # It may have written into its inputs: to run it again would not do.
            raise RuntimeError(
                f"{self.compiler.settings.title}: {error}, which its graph can't go on with. That attention is another "
                "node's: take that node, or this one, out."
            ) from error

    def _options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given: Any = kwargs.get(OPTIONS)
        if given is None and self.position is not None and self.position < len(args):
            given = args[self.position]
        return given or {}

    def _with(
        self, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these options in the place of what was given."""
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], options, *args[self.position + 1 :]), kwargs
        if self.position is not None or OPTIONS in kwargs:
            return args, {**kwargs, OPTIONS: options}
        return args, kwargs

    def _patched_by_others(self, options: dict[str, Any]) -> str:
        """Which of the patches in these options a block of this kind would run."""
        patched = (kind for name in PATCHED for kind, entries in (options.get(name) or {}).items() if entries)
        return ", ".join(sorted(self.words.intersection(patched)))
