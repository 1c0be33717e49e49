"""Attention Backend: which kernel computes attention, and one projection for q, k and v.

Attention is most of the work at high resolutions. PyTorch has four kernels for it, and which is the
fastest, or there at all, depends on the device, the dtype and the shapes. Two of other packages multiply
in eight bits. The q, k and v of self-attention are three products with one matrix each; joined, they
are one with a wider one.

Source: "Accelerate inference of text-to-image diffusion models" (diffusers' documentation), and
torch.nn.attention (PyTorch).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compiling.backends import first_line
from .method import (
    Attention,
    Configuration,
    Evaluation,
    Made,
    MethodRun,
    Model,
    ModelCall,
    Run,
    State,
    check_choice,
    check_unet,
)

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
EIGHT_BITS = ("sage", "comfy_kitchen_int8")
"""Kernels of other packages. They round more, and some models overflow in them."""
BACKENDS = ("auto", *KERNELS, "host", *EIGHT_BITS)

SLOW = ("sub_quad", "split", "basic")
"""The host's attentions that are no kernels: what it takes where it knows of none, as on a CPU."""

CHOOSING = ("cpu", "cuda")
"""The devices on which PyTorch lets a kernel be chosen; elsewhere it has one, and ignores the choice."""

MAX_BATCH = 2**15
"""Beyond it kernels on NVIDIA's GPUs fail, as the host knows too."""


@dataclass(frozen=True)
class AttentionBackend(Configuration):
    """Attributes:
    backend: the kernel: ``flash``, ``efficient``, ``cudnn`` or ``math``; ``auto``: PyTorch's own
        choice, where the host would use none of them; ``host``: the host's attention as it is; ``sage``
        and ``comfy_kitchen_int8``: products in eight bits, by the packages of these names.
    fuse_qkv: one projection for the q, k and v of self-attention.
    """

    backend: str = "auto"
    fuse_qkv: bool = False

    stem = "attention_backend"
    title = "Attention Backend"
    phase = "weights"
    is_exact = True

    def __post_init__(self) -> None:
        check_choice(self.title, "backend", self.backend, BACKENDS)
        object.__setattr__(self, "is_exact", self.backend not in EIGHT_BITS)

    def off(self) -> str | None:
        return "backend is host, and fuse_qkv is off" if self.backend == "host" and not self.fuse_qkv else None

    def check(self, model: Model) -> None:
        if self.fuse_qkv:
            check_unet(f"{self.title} with fuse_qkv", model, "Turn fuse_qkv off: the backend works on any model.")
        reason = lacking(self.backend, model.device) if self.backend in EIGHT_BITS else None
        if reason is not None:
            raise RuntimeError(f"{self.title}: {reason}")

    def begin(self, run: Run) -> AttentionBackendRun:
        return AttentionBackendRun(self)


INSTALL = {"sage": "sageattention", "comfy_kitchen_int8": "--upgrade comfy-kitchen"}
MODULES = {"sage": "sageattention", "comfy_kitchen_int8": "comfy_kitchen"}


def lacking(backend: str, device: str) -> str | None:
    """Why a kernel of another package can't work on a device type, in sentences that say what to do; None if it can."""
    line = f'"{sys.executable}" -m pip install {INSTALL[backend]}'
    name = MODULES[backend]
    if device != "cuda":
        return (
            f"{backend} needs an NVIDIA or AMD GPU, but the model runs on {device}. Choose auto. On a machine with "
            f"such a GPU this installs it: {line}"
        )
    if importlib.util.find_spec(name) is None:
        return f"{backend} needs the package {name}, which is not installed. Install it with: {line}"
    try:
        module: Any = importlib.import_module(name)
        if backend == "sage":
            module.sageattn  # noqa: B018
        elif not module.int8_attention_is_available():
            return (
                f"the installed {name} has no int8 attention for this GPU. It needs one of NVIDIA's with compute "
                "capability 7.5 or newer (RTX 20 and later), or one of AMD's with matrix cores (RDNA 3 and later). "
                f"Choose auto, or, if it is one of these, install the newest: {line}"
            )
    # A version that does not fit torch or the driver raises anything.
    except (Exception, SystemExit) as error:
        return (
            f"the installed {name} can't be used with torch {torch.__version__} ({type(error).__name__}: "
            f"{first_line(error)}). Choose auto, or install it again: {line}"
        )
    return None


class NoKernelError(RuntimeError):
    """A kernel cannot compute this attention."""


# torch's choice of kernels is the process's, not the thread's.
_choosing = threading.Lock()


def attend(call: Attention, kernel: SDPBackend | str | None) -> Tensor:
    """Scaled dot product attention.

    Args:
        call: what is attended to what.
        kernel: what computes it: one of PyTorch's, or one of EIGHT_BITS; None leaves the choice to PyTorch.

    Returns:
        (B, tokens, heads * width), or (B, heads, tokens, width) if the call keeps the heads split.

    Raises:
        NoKernelError: the kernel does not serve this device, dtype or shape.
    """
    if call.is_split:
        q, k, v = call.q, call.k, call.v
    else:
        width, batch = call.q.shape[-1] // call.heads, call.q.shape[0]
        # As the host: by q's batch. HyperTile cuts q alone into tiles, and each attends to its part of k and v.
        heads = call.k.shape[-1] // width if call.has_fewer_kv_heads else call.heads
        q = call.q.reshape(batch, -1, call.heads, width).transpose(1, 2)
        k, v = (t.reshape(batch, -1, heads, width).transpose(1, 2) for t in (call.k, call.v))
    mask = call.mask
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
        if mask.is_floating_point() and mask.dtype != torch.float32:
            # What torch adds is q's or float32; the host adds any.
            mask = mask.to(q.dtype)
    if isinstance(kernel, str):
        output = _in_eight_bits(kernel, q, k, v, mask, call.scale)
    else:
        output = _by_pytorch(kernel, q, k, v, mask, call.scale, call.has_fewer_kv_heads)
    return output if call.keeps_split else output.transpose(1, 2).flatten(2)


def _by_pytorch(
    kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_gqa: bool
) -> Tensor:
    try:
        with nullcontext() if kernel is None else _choosing, nullcontext() if kernel is None else sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_gqa
            )
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NoKernelError("") from error
        raise


def _in_eight_bits(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    module: Any = importlib.import_module(MODULES[kernel])
    output: Tensor
    try:
        if kernel == "comfy_kitchen_int8":
            output = module.int8_attention(q, k, v, scale=scale, attn_mask=mask)
            return output
        more: dict[str, Any] = {}
        if mask is not None:
            # Version 1 would ignore it.
            if "attn_mask" not in inspect.signature(module.sageattn).parameters:
                raise NoKernelError("this version takes no mask")
            more["attn_mask"] = mask
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        # What all keys share changes nothing in a softmax, but uses up the eight bits. Version 1 would subtract it in
        # the caller's own tensor.
        k = k - k.mean(2, keepdim=True)
        output = module.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale, smooth_k=False, **more)
        return output
    except (NoKernelError, torch.OutOfMemoryError):
        raise
    # They tell what they don't serve by assertions, errors of values and of types, and failures of their compiler.
    except Exception as error:
        raise NoKernelError(first_line(error)) from error


class AttentionBackendRun(MethodRun):
    """Has attention computed by one kernel where that serves, and by the host's own elsewhere.

    What a kernel in eight bits gives is looked at after each evaluation. If it overflowed, that evaluation is made once
    more, and the rest of the run, with the host's own.
    """

    def __init__(self, config: AttentionBackend):
        self.config = config
        self.has_eight_bits = config.backend in EIGHT_BITS
        self.kernel = config.backend if self.has_eight_bits else KERNELS.get(config.backend)
        self.ran = 0
        self.host: Counter[tuple[str, str]] = Counter()
        self.lacking: dict[Hashable, str] = {}
        self.accepted = 0
        self.refused_at: int | None = None
        self.thrown_away = 0
        self.is_host_finite: bool | None = None
        self.calls = 0
        self.before: str | None = None
        self.own_attentions = 0
        self.is_one_of_several = False
        self.patched = 0
        self.made: dict[int, Made] = {}
        # The host samples on several GPUs in threads; counts are shared between them.
        self.lock = threading.Lock()

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            self.calls += 1
            self.before = call.attention_before or self.before
            self.own_attentions = max(self.own_attentions, call.own_attentions)
            self.is_one_of_several = call.is_one_of_several
            self.patched += call.has_self_attention_patches
        with ExitStack() as stack:
            # auto takes the place of what is no kernel alone, and what a checkpoint names is one.
            if self.config.backend != "host" and not (self.config.backend == "auto" and call.own_attentions):
                stack.enter_context(call.attending(self.attend))
            if self.config.fuse_qkv:
                made = stack.enter_context(call.fusing_qkv())
                with self.lock:
                    self.made[id(made)] = made
            return run()

    def attend(self, call: Attention) -> Tensor:
        """One call of attention."""
        why = self._why_host(call)
        if why is None:
            try:
                output = attend(call, self.kernel)
            except NoKernelError as error:
                with self.lock:
                    self.lacking[_signature(call)] = str(error)
                why = self._why_host(call)
            else:
                with self.lock:
                    self.ran += call.is_counted
                return output
        if call.is_counted:
            with self.lock:
                self.host[call.host_name, why or ""] += 1
        return call.host()

    def accepts(self, evaluation: Evaluation, denoised: Tensor) -> bool:
        if self.refused_at is not None:
            if self.is_host_finite is None:
                self.is_host_finite = bool(denoised.isfinite().all())
            return True
        if not self.has_eight_bits or self.ran == self.accepted:
            return True
        if bool(denoised.isfinite().all()):
            self.accepted = self.ran
            return True
        self.refused_at = evaluation.step
        self.thrown_away, self.ran = self.ran - self.accepted, self.accepted
        return False

    def _why_host(self, call: Attention) -> str | None:
        """Why the host's own attention computes this; None if it does not."""
        device, backend = call.q.device.type, self.config.backend
        if self.kernel is None and call.host_name not in SLOW:
            return "which is a kernel already"
        if self.refused_at is not None:
            return f"since what {backend} gave in step {self.refused_at + 1} was not finite"
        if self.has_eight_bits and call.needs_precision:
            return "since the model asks for more precision there"
        is_chosen = self.kernel is not None and not self.has_eight_bits
        if is_chosen and self.is_one_of_several:
            # What the other threads compute meanwhile, ControlNets too, would have to do with that kernel.
            return "since PyTorch's choice is the whole process's, and several devices compute at once"
        if is_chosen and device not in CHOOSING:
            return f"since on {device} PyTorch lets none be chosen"
        if call.q.shape[0] > MAX_BATCH:
            return f"since {backend} takes no batches above {MAX_BATCH}"
        said = self.lacking.get(_signature(call))
        if said is not None:
            width = call.q.shape[-1] if call.is_split else call.q.shape[-1] // call.heads
            dtype, masked = str(call.q.dtype).removeprefix("torch."), " with a mask" if call.mask is not None else ""
            said = f" ({said})" if said else ""
            return f"since {backend} does not serve {dtype} heads {width} wide{masked} on this {device} device{said}"
        return None

    def verdict(self) -> tuple[State, str]:
        if not self.calls:
            return "inert", "changed nothing: the model was not called"
        parts = [*self._kernel_parts(), *self._fused_parts()]
        is_active = bool(self.ran) or any(made.modules for made in self.made.values())
        return "active" if is_active else "inert", "; ".join(parts)

    def _kernel_parts(self) -> list[str]:
        if self.config.backend == "host":
            return []
        if self.config.backend == "auto" and self.own_attentions:
            return [f"left to ComfyUI: the checkpoint names an attention for {self.own_attentions} of its layers"]
        total = self.ran + sum(self.host.values())
        if not total:
            if self.before is not None:
                return [f"another node chose attention before ({self.before}) and leaves nothing to this one"]
            flag = "ComfyUI's flags, such as --use-pytorch-cross-attention, choose it for all models"
            return [f"this model asks for no attention that can be overridden: {flag}"]
        name = "PyTorch's choice of kernel" if self.kernel is None else f"the {self.config.backend} kernel"
        parts = [f"{name} in {self.ran} of {total} attention calls"]
        parts += [f"the host's own ({host}) in {number}, {why}" for (host, why), number in self.host.items()]
        if self.thrown_away:
            parts.append(f"{self.thrown_away} calls with {self.config.backend} were thrown away and computed again")
        if self.is_host_finite is False:
            parts.append("the host's own gave nothing finite either, so that it is not the kernel's doing")
        if self.before is not None:
            parts.append(f"inside what another node chose before ({self.before})")
        if self.own_attentions:
            parts.append(f"in place of the attention that the checkpoint names for {self.own_attentions} of its layers")
        return parts

    def _fused_parts(self) -> list[str]:
        if not self.config.fuse_qkv:
            return []
        fused = sum(made.modules for made in self.made.values())
        left: Counter[str] = sum((made.left for made in self.made.values()), Counter())
        extra = sum(made.extra_bytes for made in self.made.values()) / 2**20
        parts = [f"one projection for q, k and v in {fused} of {fused + sum(left.values())} self-attentions"]
        if fused:
            parts[0] += f", {extra:.1f} MiB more memory until the run ends"
        parts += [f"{number} keep three: {why}" for why, number in left.items()]
        if self.patched:
            parts.append("where another node changes what self-attention is given, it had three")
        return parts


def _signature(call: Attention) -> Hashable:
    """What decides whether a kernel serves a call."""
    mask = None if call.mask is None else (tuple(call.mask.shape), call.mask.dtype)
    return call.q.device.type, call.q.dtype, tuple(call.q.shape), tuple(call.k.shape), call.heads, mask
