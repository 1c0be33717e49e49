"""Attention as one opaque operation, so that a graph neither breaks at it nor keeps what it found there.

Inside a compiled block, attention and what other nodes put in its place are calls of operations whose
Python runs each time: whatever the host chose, and whichever override or replacement is in force in
this call, is what is used. Nothing of it is part of a graph, so nothing of it can go stale.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.ldm.modules import attention as host
from comfy.ldm.modules.diffusionmodules.model import AttnBlock

from ...methods.method import Attention
from ..host import machine

Kinds = tuple[str, ...]

IMAGE = "slipstream.image_attention"
OVERRIDE = "optimized_attention_override"
INSIDE = "_inside_attn_wrapper"
"""By which the host knows, further in, that it has looked for an override."""
SAID = {"scale", "enable_gqa", "low_precision_attention"}
"""What a model may say of attention beside its tensors. What says more is traced as it is."""
LISTED = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
"""The patches that a transformer block runs, which may change shapes."""

# The host may load the pack twice, and an operation can be defined only once.
NAMESPACE = f"slipstream_{zlib.crc32(__name__.encode()):x}"

_now = threading.local()


class UnsuitedError(RuntimeError):
    """A replacement gave what no graph was made for."""


@contextlib.contextmanager
def using(options: dict[str, Any]) -> Iterator[None]:
    """The transformer options that the operations read, while a compiled function runs in this thread."""
    before = getattr(_now, "options", None)
    _now.options = options
    try:
        yield
    finally:
        _now.options = before


def replaced(options: dict[str, Any]) -> Kinds | None:
    """Which of a transformer block's attentions other nodes replace in a call with these options; None if they do
    more, which may change shapes, so that no graph can be made of the block."""
    patches = options.get("patches")
    if patches and any(patches.get(name) for name in LISTED):
        return None
    replacements = options.get("patches_replace")
    if not replacements:
        return ()
    return tuple(which for which in ("attn1", "attn2") if _replacement(replacements, which, options) is not None)


def described(options: dict[str, Any]) -> str:
    """What other nodes do to attention anywhere in a call with these options, in a word or two."""
    if any((options.get("patches") or {}).get(name) for name in LISTED):
        return "patched"
    replacements = options.get("patches_replace") or {}
    return " and ".join(f"{which} replaced" for which in ("attn1", "attn2") if replacements.get(which)) or "plain"


class Override:
    """A method's attention in the host's only slot for one. What another node had there stays around it.

    Args:
        attend: takes the place of the host's attention.
        before: what was in the slot: a function of the attention that it replaces, and its arguments.
    """

    def __init__(self, attend: Callable[[Attention], torch.Tensor], before: Callable[..., torch.Tensor] | None):
        self.attend = attend
        self.before = before

    def __call__(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        @functools.wraps(function)
        def ours(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            heads: int,
            mask: torch.Tensor | None = None,
            attn_precision: torch.dtype | None = None,
            skip_reshape: bool = False,
            skip_output_reshape: bool = False,
            **more: Any,
        ) -> torch.Tensor:
            name = getattr(function, "__name__", "other").removeprefix("attention_")
            host = functools.partial(
                function, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **more
            )
            scale, has_fewer = more.get("scale"), bool(more.get("enable_gqa"))
            dtype = q.dtype
            if attn_precision is not None:
                q, k, v = (one.to(attn_precision) for one in (q, k, v))
            needs_precision = more.get("low_precision_attention") is False
            call = Attention(
                q, k, v, heads, mask, skip_reshape, skip_output_reshape, scale, has_fewer, name, host, needs_precision,
                is_counted=not machine.is_trial(),
            )  # fmt: skip
            return self.attend(call).to(dtype)

        return ours(*args, **kwargs) if self.before is None else self.before(ours, *args, **kwargs)


def is_overridden(options: dict[str, Any]) -> bool:
    """Whether another node has put its own attention into these options."""
    return overriding(options) is not None


def overriding(options: dict[str, Any]) -> str | None:
    """The attention that another node has put into these options, by its name; None if none did."""
    override: Any = options.get(OVERRIDE)
    if isinstance(override, Override):
        override = override.before
    if override is None:
        return None
    # The host's own choice of one for a model (0.31) hides it in a function that it makes.
    hidden = inspect.getclosurevars(override).nonlocals if inspect.isfunction(override) else {}
    chosen = hidden.get("optimized_attention", override)
    name: str = getattr(chosen, "__name__", type(chosen).__name__)
    return name.removeprefix("attention_")


def _replacement(replacements: dict[str, Any], which: str, options: dict[str, Any]) -> Any:
    block = options.get("block")
    found = replacements.get(which)
    if not found or block is None:
        return None
    exact = (block[0], block[1], options.get("block_index", 0))
    return found.get(exact, found.get(block))


def plain_options(kinds: Kinds = ()) -> dict[str, Any]:
    """Constant transformer options for a graph: attention and these replacements are operations; there is no more."""
    options: dict[str, Any] = {OVERRIDE: _attention}
    if kinds:
        place = ("input", 0)
        options["block"] = place
        options["patches_replace"] = {kind: {place: _REPLACING[kind]} for kind in kinds}
    return options


@contextlib.contextmanager
def opaque_in(module: torch.nn.Module) -> Iterator[None]:
    """An autoencoder's attention as an operation, for as long as a graph of it is made or called. Only its
    attention blocks of the host's kind, which all have one function in the same attribute."""
    blocks = [block for block in module.modules() if isinstance(block, AttnBlock)]
    functions = [block.optimized_attention for block in blocks]
    try:
        for block in blocks:
            block.__dict__["optimized_attention"] = _attend_image
        with using({IMAGE: functions[0]} if functions else {}):
            yield
    finally:
        for block, function in zip(blocks, functions, strict=True):
            block.__dict__["optimized_attention"] = function


def _attention(
    function: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    layout, said = (skip_reshape, skip_output_reshape), kwargs.keys() - {"transformer_options", INSIDE}
    if said - SAID:
        return function(q, k, v, heads, mask, attn_precision, *layout, **kwargs)
    if any(layout) or said:
        scale, has_fewer = kwargs.get("scale"), kwargs.get("enable_gqa")
        may_be_low = kwargs.get("low_precision_attention")
        return _attend_laid_out(q, k, v, heads, mask, attn_precision, *layout, scale, has_fewer, may_be_low)
    return _attend(q, k, v, heads, mask, attn_precision)


def _replacing(kind: str) -> Callable[..., torch.Tensor]:
    def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return _replace(q, k, v, kind, extra["n_heads"], extra["dim_head"], extra["attn_precision"])

    return replace


_REPLACING = {kind: _replacing(kind) for kind in ("attn1", "attn2")}


def _attend_now(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    precision: torch.dtype | None,
) -> torch.Tensor:
    function = host.optimized_attention if mask is None else host.optimized_attention_masked
    options = getattr(_now, "options", None) or {}
    return _fitting(function(q, k, v, heads, mask, attn_precision=precision, transformer_options=options), q, k, v)


def _attend_laid_out_now(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    precision: torch.dtype | None,
    skip_reshape: bool,
    skip_output_reshape: bool,
    scale: float | None,
    has_fewer: bool | None,
    may_be_low: bool | None,
) -> torch.Tensor:
    function = host.optimized_attention if mask is None else host.optimized_attention_masked
    given = {"scale": scale, "enable_gqa": has_fewer, "low_precision_attention": may_be_low}
    output = function(
        q, k, v, heads, mask,
        attn_precision=precision,
        skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape,
        transformer_options=getattr(_now, "options", None) or {},
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    shape = _laid_out(q, v, heads, skip_reshape, skip_output_reshape)
    return _fitting(output, q, k, v, shape=shape)


def _laid_out(
    q: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool, skip_output_reshape: bool
) -> tuple[int, ...]:
    """The shape that attention gives: (B, heads, N, width) without its reshape, (B, N, heads * width) with it."""
    if skip_reshape:
        tokens, width = q.shape[-2], v.shape[-1]
    else:
        # Where k and v have fewer heads, their own width tells nothing.
        tokens, width = q.shape[1], q.shape[2] // heads
    return (q.shape[0], heads, tokens, width) if skip_output_reshape else (q.shape[0], tokens, heads * width)


def _replace_now(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str, heads: int, width: int, precision: torch.dtype | None
) -> torch.Tensor:
    options: dict[str, Any] = _now.options
    extra = {name: value for name, value in options.items() if name not in ("patches", "patches_replace")}
    extra |= {"n_heads": heads, "dim_head": width, "attn_precision": precision}
    return _fitting(_replacement(options["patches_replace"], kind, options)(q, k, v, extra), q, k, v)


def _attend_image_now(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _fitting(_now.options[IMAGE](q, k, v), q, k, v)


def _fitting(output: torch.Tensor, *inputs: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """What an operation gave, as its graph expects it: of its first input's shape or this one, and nobody else's
    memory."""
    q = inputs[0]
    if output.shape != (q.shape if shape is None else shape) or output.dtype != q.dtype:
        raise UnsuitedError(f"attention gave {tuple(output.shape)} {output.dtype} for {tuple(q.shape)} {q.dtype}")
    storages = {value.untyped_storage().data_ptr() for value in inputs}
    return output.clone() if output.untyped_storage().data_ptr() in storages else output.contiguous()


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, int heads, Tensor? mask, ScalarType? precision) -> Tensor")
_library.define(
    "replace(Tensor q, Tensor k, Tensor v, str kind, int heads, int width, ScalarType? precision) -> Tensor"
)
_library.define(
    "attend_laid_out(Tensor q, Tensor k, Tensor v, int heads, Tensor? mask, ScalarType? precision, bool skip_reshape, "
    "bool skip_output_reshape, float? scale, bool? has_fewer, bool? may_be_low) -> Tensor"
)
_library.impl("attend_laid_out", _attend_laid_out_now, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{NAMESPACE}::attend_laid_out",
    lambda q, k, v, heads, mask, precision, *more: q.new_empty(_laid_out(q, v, heads, *more[:2])),
    lib=_library,
)
_library.define("attend_image(Tensor q, Tensor k, Tensor v) -> Tensor")
_library.impl("attend_image", _attend_image_now, "CompositeExplicitAutograd")
_library.impl("attend", _attend_now, "CompositeExplicitAutograd")
_library.impl("replace", _replace_now, "CompositeExplicitAutograd")
for _name in ("attend", "attend_image", "replace"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda q, *_: q.new_empty(q.shape), lib=_library)
_attend = getattr(torch.ops, NAMESPACE).attend.default
_attend_laid_out = getattr(torch.ops, NAMESPACE).attend_laid_out.default
_attend_image = getattr(torch.ops, NAMESPACE).attend_image.default
_replace = getattr(torch.ops, NAMESPACE).replace.default
