"""Attention Backend: which of PyTorch's kernels computes attention, and one projection for q, k and v.

Attention is most of the work at high resolutions. PyTorch has four kernels for it, and which is the
fastest, or there at all, depends on the device, the dtype and the shapes. The q, k and v of
self-attention are three products with one matrix each; joined, they are one with a wider one.

Source: "Accelerate inference of text-to-image diffusion models" (diffusers' documentation), and
torch.nn.attention (PyTorch).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .method import Attention, Configuration, Made, MethodRun, Model, ModelCall, Run, State, check_choice, check_unet

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("auto", *KERNELS, "host")

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
        choice, where the host would use none of them; ``host``: the host's attention as it is.
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

    def off(self) -> str | None:
        return "backend is host, and fuse_qkv is off" if self.backend == "host" and not self.fuse_qkv else None

    def check(self, model: Model) -> None:
        if self.fuse_qkv:
            check_unet(f"{self.title} with fuse_qkv", model, "Turn fuse_qkv off: the backend works on any model.")

    def begin(self, run: Run) -> AttentionBackendRun:
        return AttentionBackendRun(self)


class NoKernelError(RuntimeError):
    """A kernel cannot compute this attention."""


# torch's choice of kernels is the process's, not the thread's.
_choosing = threading.Lock()


def attend(call: Attention, kernel: SDPBackend | None) -> Tensor:
    """Scaled dot product attention by PyTorch.

    Args:
        call: what is attended to what.
        kernel: what computes it; None leaves the choice to PyTorch.

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
    try:
        with nullcontext() if kernel is None else _choosing, nullcontext() if kernel is None else sdpa_kernel(kernel):
            output = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.has_fewer_kv_heads
            )
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NoKernelError(str(error)) from error
        raise
    return output if call.keeps_split else output.transpose(1, 2).flatten(2)


class AttentionBackendRun(MethodRun):
    """Has attention computed by one kernel where that serves, and by the host's own elsewhere."""

    def __init__(self, config: AttentionBackend):
        self.config = config
        self.kernel = KERNELS.get(config.backend)
        self.ran = 0
        self.host: Counter[tuple[str, str]] = Counter()
        self.lacking: set[Hashable] = set()
        self.calls = 0
        self.overridden = 0
        self.is_one_of_several = False
        self.patched = 0
        self.made: dict[int, Made] = {}
        # The host samples on several GPUs in threads; counts are shared between them.
        self.lock = threading.Lock()

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            self.calls += 1
            self.overridden += call.is_attention_overridden
            self.is_one_of_several = call.is_one_of_several
            self.patched += call.has_self_attention_patches
        with ExitStack() as stack:
            if self.config.backend != "host":
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
            except NoKernelError:
                with self.lock:
                    self.lacking.add(_signature(call))
                why = self._why_host(call)
            else:
                with self.lock:
                    self.ran += 1
                return output
        with self.lock:
            self.host[call.host_name, why or ""] += 1
        return call.host()

    def _why_host(self, call: Attention) -> str | None:
        """Why the host's own attention computes this; None if it does not."""
        device, backend = call.q.device.type, self.config.backend
        if self.kernel is None and call.host_name not in SLOW:
            return "which is a kernel already"
        if self.kernel is not None and self.is_one_of_several:
            # What the other threads compute meanwhile, ControlNets too, would have to do with that kernel.
            return "since PyTorch's choice is the whole process's, and several devices compute at once"
        if self.kernel is not None and device not in CHOOSING:
            return f"since on {device} PyTorch lets none be chosen"
        if call.q.shape[0] > MAX_BATCH:
            return f"since {backend} takes no batches above {MAX_BATCH}"
        if _signature(call) in self.lacking:
            width = call.q.shape[-1] if call.is_split else call.q.shape[-1] // call.heads
            dtype, masked = str(call.q.dtype).removeprefix("torch."), " with a mask" if call.mask is not None else ""
            return f"since {backend} does not serve {dtype} heads {width} wide{masked} on this {device} device"
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
        total = self.ran + sum(self.host.values())
        if not total:
            if self.overridden:
                return ["another node overrides attention and leaves nothing to this one"]
            return ["this model asks for no attention that can be overridden"]
        name = "PyTorch's choice of kernel" if self.kernel is None else f"the {self.config.backend} kernel"
        parts = [f"{name} in {self.ran} of {total} attention calls"]
        parts += [f"the host's own ({host}) in {number}, {why}" for (host, why), number in self.host.items()]
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
