"""Quantize: the weights of linear layers in eight bits, by torchao, or 2:4 sparse.

Each row of a weight has a scale of its own. Weight-only schemes multiply in the model's own dtype, after unpacking:
they save memory. Dynamic ones quantize each token of the activations as well, and multiply in eight bits. 2:4 sparse
(`semi_structured.py`) observes the first evaluation of a run and computes the others with half of the weights.

Source: torchao (PyTorch), and "Accelerate inference of text-to-image diffusion models" (diffusers' documentation) for
which layers to leave out.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear

from ..compiling.backends import first_line
from .method import (
    Configuration,
    Evaluation,
    MethodRun,
    Model,
    ModelCall,
    Pruned,
    Quantized,
    Run,
    State,
    check_choice,
    check_number,
)

SPARSE = "2:4 sparse"
SCHEMES = ("int8 dynamic", "int8 weight-only", "fp8 dynamic", "fp8 weight-only", SPARSE)
OFFLOAD = ("auto", "on", "off")
MULTIPLE, SPARSE_MULTIPLE = 16, 64
"""The kernels that multiply in eight bits, and those for 2:4 sparse weights, take no other sides."""

MODULATION = re.compile(r"modulation|ada[lL][nN]|norm\w*\.linear|(?:^|[._])mod(?:[A-Z]\w*|_\w+)?(?=\.|$)")
TIME = re.compile(r"emb|timestep|time_proj")
"""Layers inside blocks that see one row for each image, and not one for each token: their names in diffusion
transformers and UNets. Eight bits gain no time there, and would make nearly as much of a transformer's error as
all other layers of its blocks together (benchmarks/results/quantize_layers)."""

LARGE = 0.05
"""Of all linear weights: what is left out and takes more is told."""


def install_line() -> str:
    """The command that installs torchao for the python that runs this; it needs nothing beside torch."""
    return f'"{sys.executable}" -m pip install --no-deps torchao==0.18.*'


def lacking(scheme: str, device: str) -> str | None:
    """Why a scheme can't work on a device type, in a sentence that says what to do; None if it can."""
    if device not in ("cpu", "cuda", "xpu"):
        return (
            f"{scheme} needs an NVIDIA, AMD or Intel GPU or a CPU, but the model runs on {device}. Take the node out."
        )
    if scheme == SPARSE:
        return None
    try:
        if importlib.util.find_spec("torchao") is None:
            return f"torchao is not installed. Install it with: {install_line()}"
        importlib.import_module("torchao.quantization")
        if scheme == "fp8 dynamic":
            return _lacking_fp8(device)
        return None
    # A version that does not fit torch raises anything.
    except (Exception, SystemExit) as error:
        return (
            f"torchao is installed, but can't be used with torch {torch.__version__} "
            f"({type(error).__name__}: {first_line(error)}). "
            f"Install it again: {install_line()}"
        )


def _lacking_fp8(device: str) -> str | None:
    needs = "fp8 dynamic multiplies in fp8, which needs an NVIDIA GPU of compute capability 8.9 or newer (RTX 40 and "
    needs += "later, L4, H100), an AMD MI300 or an Intel GPU"
    if device == "xpu":
        return None
    if device == "cuda":
        if torch.version.hip is not None:
            utils: Any = importlib.import_module("torchao.utils")
            if utils.is_MI300() or utils.is_MI350():
                return None
            return f"{needs}, and this GPU is none. Choose int8 dynamic."
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= (8, 9):
            return None
        return f"{needs}, but this one has {major}.{minor}. Choose int8 dynamic."
    return f"{needs}, but the model runs on {device}. Choose int8 dynamic."


NO_VNNI = "this processor has no VNNI, without which products of int8 take many times as long"


def multiplies_in_int8(device: str) -> bool:
    """Whether a device type has what products of int8 need. On an x86 processor without AVX512-VNNI torch 2.11 adds
    them up one by one, in some thirty times as long as in float32 (measured), compiled or not."""
    if device != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # Not in every torch that the host supports, and no part of its documented interface.
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: True)())


@dataclass(frozen=True)
class Quantize(Configuration):
    """Attributes:
    scheme: one of SCHEMES.
    min_features: layers with fewer inputs or outputs stay as they are.
    skip: parts of names, separated by commas; layers whose path has one of them stay as they are.
    offload_originals: whether the weights that were quantized leave a GPU for the run: ``on``,
        ``off``; ``auto``: where the host could not load the whole model.
    sparse_error: 2:4 sparse: the most that a layer's outputs may lose in the first evaluation, relative to them.
    sparse_share: 2:4 sparse: the most of the layers' multiplications that are pruned, those first that save most for
        what they lose.
    """

    scheme: str = "int8 dynamic"
    min_features: int = 256
    skip: str = ""
    offload_originals: str = "auto"
    sparse_error: float = 0.05
    sparse_share: float = 1.0

    stem = "quantize"
    title = "Quantize Model"
    phase = "weights"
    is_exact = False

    def __post_init__(self) -> None:
        check_choice(self.title, "scheme", self.scheme, SCHEMES)
        check_choice(self.title, "offload_originals", self.offload_originals, OFFLOAD)
        check_number(self.title, "min_features", self.min_features, 0, 2**16)
        check_number(self.title, "sparse_error", self.sparse_error, 0.0, 1.0)
        check_number(self.title, "sparse_share", self.sparse_share, 0.0, 1.0)
        # Equal settings, however they were typed, are one.
        object.__setattr__(self, "skip", ", ".join(sorted(self._skipped)))

    def off(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        reason = lacking(self.scheme, model.device)
        if reason is not None:
            raise RuntimeError(f"{self.title}: {reason}")

    def in_vain(self, device: str) -> str | None:
        return None if self.computed_as(device) == self.scheme else f"{self.scheme} is no faster: {NO_VNNI}"

    def begin(self, run: Run) -> QuantizeRun:
        kind = SparseRun if self.scheme == SPARSE else QuantizeRun
        return kind(self, run.model.device, run.is_compiled)

    # As `method.Quantizer` and `method.Pruner`.

    def leaves_out(self, path: str, layer: nn.Linear, is_in_block: bool) -> str | None:
        if any(part in path for part in self._skipped):
            return "named in skip"
        if not is_in_block:
            return "first, last or embedding"
        if MODULATION.search(path):
            return "of modulation"
        if TIME.search(path):
            return "of time embeddings"
        sides = (layer.in_features, layer.out_features)
        if min(sides) < self.min_features:
            return "small"
        multiple = SPARSE_MULTIPLE if self.scheme == SPARSE else MULTIPLE if self.is_dynamic else 1
        if any(side % multiple for side in sides):
            return f"of sides that are no multiples of {multiple}"
        return None

    def computed_as(self, device: str) -> str:
        """The scheme that serves this one on a device type."""
        is_slow = self.scheme == "int8 dynamic" and not multiplies_in_int8(device)
        return "int8 weight-only" if is_slow else self.scheme

    def quantize(self, weight: Tensor) -> nn.Parameter:
        ao: Any = importlib.import_module("torchao.quantization")
        layer = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        # torchao would set inductor's options for the whole process.
        options: dict[str, Any] = {"set_inductor_config": False}
        scheme = self.computed_as(weight.device.type)
        if scheme == "int8 weight-only":
            config = ao.Int8WeightOnlyConfig(**options)
        elif scheme == "fp8 weight-only":
            config = ao.Float8WeightOnlyConfig(**options)
        elif scheme == "int8 dynamic":
            # Elsewhere than on x86 too sums of products may overflow without VNNI, unless the numbers are smaller.
            utils: Any = importlib.import_module("torchao.utils")
            if getattr(utils, "should_reduce_range", lambda device: False)(weight.device):
                options["reduce_range"] = True
            config = ao.Int8DynamicActivationInt8WeightConfig(**options)
        else:
            # A scale for each row is finer, but the kernel that takes it gives bfloat16 alone.
            granularity = ao.PerRow() if weight.dtype == torch.bfloat16 else ao.PerTensor()
            config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity, **options)
        ao.quantize_(layer, config, filter_fn=lambda *_: True)
        return layer.weight

    def should_offload(self, is_partially_loaded: bool) -> bool:
        return is_partially_loaded if self.offload_originals == "auto" else self.offload_originals == "on"

    @property
    def is_dynamic(self) -> bool:
        return self.scheme.endswith("dynamic")

    @property
    def _skipped(self) -> set[str]:
        return {part.strip() for part in self.skip.split(",")} - {""}


class QuantizeRun(MethodRun):
    """Has each call of the model computed with quantized weights."""

    def __init__(self, config: Quantize, device: str, is_compiled: bool):
        self.config = config
        self.device = device
        self.is_compiled = is_compiled
        # By the copy of the model: there are several on several GPUs, in threads.
        self.made: dict[int, Quantized] = {}
        self.lock = threading.Lock()

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        with call.quantizing(self.config) as made:
            self.keep(made)
            return run()

    def keep(self, made: Quantized) -> None:
        """What was made of one copy of the model."""
        with self.lock:
            self.made[id(made)] = made

    def verdict(self) -> tuple[State, str]:
        if not self.made:
            return "inert", "changed nothing: the model was not called"
        all_made = list(self.made.values())
        first = all_made[0]
        left: Counter[str] = Counter(first.left)
        out = ", ".join(f"{number} {why}{_share(first, why)}" for why, number in left.most_common())
        total = first.modules + left.total()
        if not first.modules:
            return "inert", f"{self.done} none of {total} linear layers; left out: {out or 'none'}"
        held, original = (sum(getattr(made, name) for made in all_made) for name in ("extra_bytes", "original_bytes"))
        copies = f" on each of {len(all_made)} devices" if len(all_made) > 1 else ""
        told = [
            f"{self.config.scheme}: {first.modules} of {total} linear layers{copies}, {_mib(held)} in place of "
            f"{_mib(original)} ({held / original:.0%})"
        ]
        told += self._lost(all_made)
        told.append(self._whereabouts(sum(made.offloaded_bytes for made in all_made)))
        if out:
            told.append(f"left out: {out}")
        if first.hooked:
            told.append(f"{first.hooked} layers are quantized anew at each call, since hooks change them")
        elapsed = max(made.elapsed_s for made in all_made)
        told.append(f"{self.done} in {elapsed:.1f} s" if elapsed else f"{self.done} earlier")
        return "active", "; ".join([*told, *self._speed()])

    @property
    def done(self) -> str:
        """What is done to layers, in a word."""
        return "quantized"

    def _lost(self, all_made: list[Quantized]) -> list[str]:
        """What that costs."""
        return []

    def _whereabouts(self, offloaded: int) -> str:
        if offloaded:
            return f"{_mib(offloaded)} of the originals left the device"
        return "beside the originals, which stay in memory"

    def _speed(self) -> list[str]:
        """What the scheme needs to be faster than without."""
        served = self.config.computed_as(self.device)
        if served != self.config.scheme:
            return [f"computed as {served}, so no faster: {NO_VNNI}"]
        if self.config.is_dynamic:
            if self.is_compiled:
                return []
            if self.device == "cpu":
                return ["Compile Model with inductor makes it faster still"]
            return ["add Compile Model: without it, it is slower than without this node as a rule"]
        if self.device == "cpu":
            other = ": int8 dynamic is" if multiplies_in_int8(self.device) else ""
            return [f"computes as before, so it is no faster on a CPU{other}"]
        if not self.is_compiled:
            return ["add Compile Model: without it, unpacking the weights at each use takes time"]
        return ["computes as before: it saves memory, not time"]


class SparseRun(QuantizeRun):
    """Observes what layers are given in the first evaluation, and has the others computed with 2:4 sparse weights."""

    def __init__(self, config: Quantize, device: str, is_compiled: bool):
        super().__init__(config, device, is_compiled)
        self.evaluations = self.attempts = 0

    def observes(self, evaluation: Evaluation) -> bool:
        self.evaluations += not evaluation.is_again
        self.attempts += 1
        return self.is_observing

    @property
    def is_observing(self) -> bool:
        """In the first evaluation."""
        return self.evaluations <= 1

    def apply_model(self, call: ModelCall, run: Callable[[], Tensor]) -> Tensor:
        if self.is_observing:
            with call.observing(self.config, self.attempts):
                return run()
        with call.pruning(self.config) as made:
            self.keep(made)
            return run()

    def verdict(self) -> tuple[State, str]:
        if self.evaluations and not self.made:
            return "inert", "changed nothing: the run had one evaluation, which is the one that is observed"
        return super().verdict()

    @property
    def done(self) -> str:
        return "pruned"

    def _lost(self, all_made: list[Quantized]) -> list[str]:
        pruned = [made for made in all_made if isinstance(made, Pruned)]
        share = statistics.mean(made.work for made in pruned)
        worst = max(error for made in pruned for error in made.errors.values())
        return [
            f"{share:.0%} of the multiplications of the layers that it is for",
            f"outputs lose {worst:.1%} at most in the first evaluation, and more in later ones",
        ]

    def _speed(self) -> list[str]:
        why = {made.why_dense for made in self.made.values() if isinstance(made, Pruned) and made.why_dense}
        return [f"computed dense, so no faster and no smaller, since {reason}" for reason in sorted(why)]


def _share(made: Quantized, why: str) -> str:
    """How much of all linear weights was left out for a reason, where that is much."""
    share = made.left_bytes[why] / max(1, made.original_bytes + made.left_bytes.total())
    return f" ({share:.0%} of all linear weights)" if share > LARGE else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
