"""Precision: what one model computes in, and how its convolutions lie in memory, for its own runs alone.

Half the bits are half the memory traffic, and on processors made for them several times the
arithmetic. bfloat16 keeps float32's range at 8 bits of precision; float16 has 11 bits but ends at
65504. TF32 lets a GPU multiply float32 numbers at 11 bits. Channels-last is the memory format that
such convolutions work in.

Source: "Accelerate inference of text-to-image diffusion models" (diffusers' documentation), and
PyTorch's notes on numerical accuracy.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .method import (
    NO_BF16,
    Configuration,
    Made,
    MethodRun,
    Model,
    ModelCall,
    Run,
    State,
    check_choice,
    check_unet,
    has_bf16,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SWITCH = ("auto", "on", "off")
SCOPES = ("model", "transformers")


@dataclass(frozen=True)
class Precision(Configuration):
    """Attributes:
    compute_dtype: ``fp16``, ``bf16`` or ``fp32``; ``auto``: bf16 in place of fp32 on a processor that
        has bf16 arithmetic, elsewhere what the host computes in.
    channels_last: ``on``, ``off``; ``auto``: on where a CPU computes in bf16, elsewhere as it is.
    tf32: ``on``, ``off``: whether a GPU may multiply float32 numbers at 11 bits; ``auto``: as it is.
    scope: ``model``, or ``transformers``: the transformers of a UNet alone, on a processor. Its convolutions, and the
        features that are handed from block to block, keep what the host computes in.
    """

    compute_dtype: str = "auto"
    channels_last: str = "auto"
    tf32: str = "auto"
    scope: str = "model"

    stem = "precision"
    title = "Precision"
    phase = "weights"
    is_exact = False

    def __post_init__(self) -> None:
        check_choice(self.title, "compute_dtype", self.compute_dtype, ("auto", *DTYPES))
        check_choice(self.title, "channels_last", self.channels_last, SWITCH)
        check_choice(self.title, "tf32", self.tf32, SWITCH)
        check_choice(self.title, "scope", self.scope, SCOPES)

    def off(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        if self.scope == "transformers":
            check_unet(self.title, model, "Its transformers are all of it; set scope to model.")
            if model.device != "cpu":
                raise RuntimeError(
                    f"{self.title}: scope transformers is for processors, but this model runs on {model.device}. Set "
                    "scope to model."
                )
        if self.compute_dtype == "fp16" and model.device == "cpu" and not has_fp16():
            raise RuntimeError(
                f"{self.title}: this processor has no fp16 arithmetic, and PyTorch's stand-in for it takes about a "
                "hundred times as long. Set compute_dtype to bf16, fp32 or auto."
            )

    def in_vain(self, device: str) -> str | None:
        is_auto = (self.compute_dtype, self.channels_last, self.tf32) == ("auto", "auto", "auto")
        return f"auto changes nothing: {NO_BF16}" if is_auto and device == "cpu" and not has_bf16() else None

    def begin(self, run: Run) -> PrecisionRun:
        return PrecisionRun(self)


def has_fp16() -> bool:
    """Whether this processor computes in fp16, and not by way of fp32."""
    return bool(getattr(torch.cpu, "_is_amx_fp16_supported", bool)())


# TF32: torch's switches for it are the process's, so they are thrown for one call of the model at a time.

_SWITCHES: dict[str, tuple[Any, Any]] = {
    # Off and on. The first throws mkldnn's too. The dotted ones with `fp32_precision` came with torch 2.9.
    "float32_matmul_precision": ("highest", "high"),
    "cudnn.allow_tf32": (False, True),
    **{
        f"{name}.fp32_precision": ("ieee", "tf32")
        for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul")
    },
}

_inside = 0
_switches = ExitStack()
_throwing = threading.Lock()


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Whether a GPU may multiply float32 numbers as TF32. On several GPUs one run is inside it in several threads."""
    global _inside
    with _throwing:
        if not _inside:
            _switches.enter_context(_thrown(is_allowed))
        _inside += 1
    try:
        yield
    finally:
        with _throwing:
            _inside -= 1
            if not _inside:
                _switches.close()


@contextmanager
def _thrown(is_allowed: bool) -> Iterator[None]:
    before = tf32_switches()
    try:
        for path in before:
            _throw(path, _SWITCHES[path][is_allowed])
        yield
    finally:
        for path, position in before.items():
            _throw(path, position)


def tf32_switches() -> dict[str, Any]:
    """The positions of torch's switches that decide it. Not those that torch refuses to read, as it does the older ones
    once somebody has thrown only the newer."""
    switches = {}
    for path in _SWITCHES:
        with suppress(AttributeError, RuntimeError):
            is_function = "." not in path
            switches[path] = torch.get_float32_matmul_precision() if is_function else attrgetter(path)(torch.backends)
    return switches


def _throw(path: str, position: Any) -> None:
    owner, _, name = path.rpartition(".")
    if owner:
        setattr(attrgetter(owner)(torch.backends), name, position)
    else:
        torch.set_float32_matmul_precision(position)


class PrecisionRun(MethodRun):
    """Has each call of the model computed as was set."""

    def __init__(self, config: Precision):
        self.config = config
        self.calls: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        self.laid_out = 0
        self.as_tf32 = 0
        self.made: dict[int, Made] = {}
        self.device = ""
        # The host samples on several GPUs in threads; counts are shared between them.
        self.lock = threading.Lock()

    def dtype(self, call: ModelCall) -> torch.dtype:
        """What a call is to be computed in."""
        if self.config.compute_dtype != "auto":
            return DTYPES[self.config.compute_dtype]
        is_slow = call.device == "cpu" and call.dtype == torch.float32
        return torch.bfloat16 if is_slow and has_bf16() else call.dtype

    def layout(self, call: ModelCall, dtype: torch.dtype) -> torch.memory_format | None:
        """How a call's convolutions are to lie in memory; None leaves them."""
        if self.config.channels_last == "auto":
            is_faster = call.device == "cpu" and dtype == torch.bfloat16 and self.config.scope == "model"
            return torch.channels_last if is_faster else None
        return torch.channels_last if self.config.channels_last == "on" else torch.contiguous_format

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        before, dtype = call.dtype, self.dtype(call)
        layout = self.layout(call, dtype)
        is_switched = self.config.tf32 != "auto" and call.device == "cuda" and dtype == torch.float32
        with ExitStack() as stack:
            made = stack.enter_context(call.computing_in(dtype, layout, self.config.scope == "transformers"))
            if is_switched:
                stack.enter_context(tf32(self.config.tf32 == "on"))
            output = run()
        with self.lock:
            self.device = call.device
            self.calls[before, dtype] += 1
            self.laid_out += layout is torch.channels_last
            self.as_tf32 += is_switched
            self.made[id(made)] = made
        if dtype == torch.float16 != before and not bool(output.isfinite().all()):
            raise RuntimeError(
                f"{self.config.title}: the model gave values that are no numbers in fp16, which ends at 65504. Set "
                "compute_dtype to bf16 or fp32."
            )
        return output

    def verdict(self) -> tuple[State, str]:
        if not self.calls:
            return "inert", "changed nothing: the model was not called"
        ((before, dtype), calls), *_ = self.calls.most_common()
        did = []
        if dtype != before:
            what = "the transformers" if self.config.scope == "transformers" else "the model"
            did.append(f"computed in {_name(dtype)} in place of {_name(before)} in {calls} calls of {what}")
        if self.laid_out:
            did.append(f"convolutions channels-last in {self.laid_out} calls")
        if self.as_tf32:
            did.append(f"TF32 {self.config.tf32} in {self.as_tf32} calls")
        notes = self._notes(before, dtype)
        if not did:
            why = f"computes in {_name(dtype)}, as without this node"
            return "inert", "; ".join([f"changed nothing: the model {why}", *notes])
        return "active", "; ".join([", ".join(did), *notes])

    def _notes(self, before: torch.dtype, dtype: torch.dtype) -> list[str]:
        notes = []
        extra = sum(made.extra_bytes for made in self.made.values())
        if extra:
            notes.append(f"{extra / 2**20:.0f} MiB more memory for its weights in that form, until the run ends")
        left: Counter[str] = sum((made.left for made in self.made.values()), Counter())
        notes += [f"the weights of {number} layers are cast at each use ({why})" for why, number in left.items()]
        others = max((made.others for made in self.made.values()), default=0)
        if others:
            parts = "1 part that another node put" if others == 1 else f"{others} parts that other nodes put"
            notes.append(f"{parts} into the model computed in {_name(before)}")
        if self.device == "cpu" and not has_bf16():
            if dtype == torch.bfloat16:
                notes.append(f"{NO_BF16}, so fp32 may be faster")
            elif dtype == torch.float32 and self.config.compute_dtype == "auto":
                notes.append(f"{NO_BF16}, which is what auto takes where it is faster")
        if self.config.tf32 != "auto" and not self.as_tf32:
            where = "is for NVIDIA GPUs" if self.device != "cuda" else f"is for fp32, not {_name(dtype)}"
            notes.append(f"tf32 {where}: not used")
        return notes


def _name(dtype: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype).removeprefix("torch."))
