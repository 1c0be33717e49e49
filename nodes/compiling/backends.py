"""The backends: whether each can work here, and how it takes a graph or a module.

A graph backend is one of torch.compile's: dynamo traces a function, and the backend gets each graph
as an FX module whose weights are inputs, so that edited, swapped and assigned weights are followed.
A module backend takes a module and its example inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .installs import INSTALL
from .settings import Settings
from .tally import Tally

FX = torch.fx.GraphModule
Graph = Callable[..., Any]
TRITON = "triton-windows" if sys.platform == "win32" else "triton"
"""The package that has Triton."""


def install_line(name: str) -> str:
    """The command that installs a backend for the python that runs this."""
    return f'"{sys.executable}" -m pip install {INSTALL[name].format(torch=torch.__version__.split("+")[0])}'


class Backend:
    """A backend.

    Class attributes:
        name: its name in settings.
        package: the package that it needs beside torch; empty if none.
        modules: what must be imported of it.
        devices: torch device types that it runs on.
        takes_modules: whether it takes a module, and not dynamo's graphs.
        follows_weights: whether what it made uses a weight that was changed later. If not, it is made
            anew when one was.
        is_static: whether each size needs graphs of its own.
    """

    name: str
    package: str = ""
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    takes_modules = False
    follows_weights = True
    is_static = False

    def availability(self, device: torch.device, settings: Settings) -> str | None:
        """Why it can't work here, in a sentence that says what to do, or None if it can."""
        if device.type not in self.devices:
            served = " or ".join({"cuda": "an NVIDIA GPU", "cpu": "the CPU"}.get(name, name) for name in self.devices)
            return f"{self.name} needs {served}, but the model runs on {device.type}. Choose another backend."
        reason = missing_dynamo()
        if reason is not None:
            return f"{self.name} needs {reason}"
        try:
            if self.package and importlib.util.find_spec(self.package) is None:
                return f"{self.name} is not installed. Install it with: {install_line(self.name)}"
            self.load()
            return self.missing(device, settings)
        # A broken install raises anything: a placeholder a RuntimeError, others OSError or a bare Exception; some exit.
        except (Exception, SystemExit) as error:
            again = f", or install it again: {install_line(self.name)}" if self.package else "."
            return (
                f"{self.name} is installed, but can't be used ({type(error).__name__}: {first_line(error)}). "
                f"Choose another backend{again}"
            )

    def shares_graphs(self, settings: Settings) -> bool:
        """Whether what it made for one module serves another of the same shapes."""
        return self.follows_weights and not self.takes_modules and not settings.records_cuda_graphs

    def load(self) -> None:
        """Import it."""
        for module in self.modules:
            importlib.import_module(module)

    def missing(self, device: torch.device, settings: Settings) -> str | None:
        """What else is missing, once it can be imported."""
        return None

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        """Compile one graph of dynamo's, and say in the tally what was left out."""
        raise NotImplementedError

    def compile_module(self, module: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> Graph:
        """Compile a module that takes and gives tensors alone."""
        raise NotImplementedError


def missing_dynamo() -> str | None:
    """Why torch's own part of compiling, which all backends are called through, can't work here; None if it can."""
    try:
        import torch._dynamo  # noqa: F401
    # Triton, where there is one, is imported with it.
    except (Exception, SystemExit) as error:
        return (
            f"torch's compiler, which can't be imported ({type(error).__name__}: {first_line(error)}). If that is "
            f'Triton\'s, uninstall it or install it again: "{sys.executable}" -m pip install --force-reinstall '
            f"--no-deps {TRITON}. Or take the node out."
        )
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


class Inductor(Backend):
    name = "inductor"
    devices = ("cuda", "cpu", "xpu")

    # Of "Accelerate inference of text-to-image diffusion models" (diffusers' documentation).
    TUNED = {  # noqa: RUF012
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }

    def missing(self, device: torch.device, settings: Settings) -> str | None:
        if device.type != "cpu":
            if importlib.util.find_spec("triton") is None:
                return (
                    f"inductor needs Triton to compile for a GPU. Install it with: "
                    f'"{sys.executable}" -m pip install {TRITON}'
                )
            from torch.utils._triton import has_triton

            if not has_triton():
                return (
                    "inductor needs a GPU that Triton can compile for (NVIDIA: compute capability 7.0 or newer), "
                    "and this one or its driver is none. Take the node out."
                )
            return None
        return self._missing_compiler()

    @staticmethod
    def _missing_compiler() -> str | None:
        from torch._inductor import config

        named = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
        compilers = [name for name in named if name]
        if not any(shutil.which(name) for name in compilers):
            return (
                f"inductor needs a C++ compiler to compile for the CPU, and none was found ({', '.join(compilers)}). "
                "Install one (Debian and Ubuntu: apt install g++; macOS: xcode-select --install; Windows: Visual "
                "Studio's Build Tools) and start ComfyUI again."
            )
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if sys.platform != "win32" and not header.exists():
            return (
                "inductor needs Python's headers to compile for the CPU, and Python.h was not found "
                "(Debian and Ubuntu: apt install python3-dev)."
            )
        return None

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        # The disk cache: a restart does not compile again. Only known options: they change with torch's version.
        options = {"fx_graph_cache": True, **list_mode_options(settings.mode)}
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in inputs):
            # It would copy each convolution's weights into another layout at each call: they are inputs here.
            options["layout_optimization"] = False
        if settings.tuned:
            known = torch._inductor.config.get_config_copy()
            options.update({name: value for name, value in self.TUNED.items() if name in known})
        compiled: Any = compile_fx(graph, list(inputs), config_patches=options)
        return cast(Graph, compiled)


class CUDAGraphs(Backend):
    name = "cudagraphs"

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        return _registered("cudagraphs")(graph, inputs)


class TensorRT(Backend):
    name = "tensorrt"
    package = "torch_tensorrt"
    modules = ("torch_tensorrt",)
    follows_weights = False

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        types = {value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point()}
        return _registered("torch_tensorrt")(
            graph, inputs, options={"enabled_precisions": types | {torch.float32}, "truncate_double": True}
        )


class OpenVINO(Backend):
    """OpenVINO's partitioner and converter, in a runner of ours.

    Its own torch.compile backend keeps weights as constants, hides failures (it goes on with inductor, or
    with torch, and says so in its debug log), returns memory that its next call overwrites, and
    switches an option of dynamo's off for everyone when it is imported.
    """

    name = "openvino"
    package = "openvino"
    modules = ("openvino.torch",)
    devices = ("cpu",)
    is_static = True  # its converter fails at sizes that are inputs

    def load(self) -> None:
        import torch._dynamo

        inlines = torch._dynamo.config.inline_inbuilt_nn_modules
        try:
            super().load()
        finally:
            torch._dynamo.config.inline_inbuilt_nn_modules = inlines

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        from functorch.compile import make_boxed_func
        from openvino.frontend.pytorch.torchdynamo.decompositions import (
            get_aot_decomposition_list,
            get_inf_decomposition_list,
        )
        from openvino.frontend.pytorch.torchdynamo.partition import Partitioner
        from torch._decomp import get_decompositions
        from torch._dynamo.backends.common import aot_autograd

        kinds = {value.dtype for value in inputs if isinstance(value, Tensor)}
        if torch.bfloat16 in kinds:
            raise RuntimeError("OpenVINO takes no bfloat16 from torch")

        def compile_lowered(lowered: torch.fx.GraphModule, _: Sequence[Any]) -> Graph:
            partitioned = Partitioner({}).make_partitions(lowered, {})
            for node in partitioned.graph.nodes:
                if node.op == "call_module" and "fused_" in node.name:
                    part = getattr(partitioned, node.target)
                    partitioned.delete_submodule(node.target)
                    partitioned.add_submodule(node.target, _OpenVINOPart(part))
                elif node.op == "call_function" and node.target is not operator.getitem:
                    tally.outside[_operation(node.target)] += 1
            return cast(Graph, make_boxed_func(partitioned.forward))

        decompositions = get_decompositions(get_inf_decomposition_list() + get_aot_decomposition_list())
        return aot_autograd(fw_compiler=compile_lowered, decompositions=decompositions)(graph, inputs)


def _operation(target: Any) -> str:
    """The name of an operation, without its variant; our own is called what it is."""
    name = str(getattr(target, "overloadpacket", target)).split(".")[-1]
    return "attention" if name.startswith("attend") else name


class _OpenVINOPart(nn.Module):
    """A part of a graph that OpenVINO runs, compiled at its first call, for one set of shapes after another."""

    # Else it computes in bfloat16 where the processor can.
    OPTIONS = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}  # noqa: RUF012

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__()
        object.__setattr__(self, "graph", graph)
        self.requests: dict[tuple[Any, ...], Any] = {}

    def forward(self, *inputs: Any) -> Any:
        from openvino.frontend.pytorch.torchdynamo.compile import openvino_compile

        key = tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in inputs)
        request = self.requests.get(key)
        if request is None:
            compiled = openvino_compile(self.graph, *inputs, options=self.OPTIONS)
            request = self.requests[key] = compiled.create_infer_request()
        arrays = [value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in inputs]
        results = request.infer(arrays, share_inputs=True)
        outputs = [torch.from_numpy(results[i]) for i in range(len(results))]
        return outputs[0] if len(outputs) == 1 else outputs


class OneDiff(Backend):
    name = "onediff"
    package = "onediff"
    modules = ("onediff.infer_compiler",)
    devices = ("cuda", "cpu")
    takes_modules = True
    follows_weights = False

    def missing(self, device: torch.device, settings: Settings) -> str | None:
        from onediff.infer_compiler.backends.registry import lookup_backend

        try:
            lookup_backend(settings.onediff_backend)
        except (Exception, SystemExit) as error:
            return (
                f"OneDiff's backend {settings.onediff_backend} can't be used "
                f"({type(error).__name__}: {first_line(error)}). Install that, or set onediff_backend to one that is."
            )
        return None

    def compile_module(self, module: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> Graph:
        from onediff.infer_compiler import compile

        return cast(Graph, compile(module, backend=settings.onediff_backend))


class StableFast(Backend):
    name = "stable-fast"
    package = "sfast"
    modules = ("sfast.compilers.diffusion_pipeline_compiler",)
    devices = ("cuda", "cpu")
    takes_modules = True
    follows_weights = False

    def compile_module(self, module: nn.Module, inputs: tuple[Tensor, ...], settings: Settings) -> Graph:
        from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile_unet

        config = CompilationConfig.Default()
        config.memory_format = None  # it would change the weights of the model itself
        # They sum in float16.
        config.enable_fused_linear_geglu = config.prefer_lowp_gemm = False
        config.enable_triton = inputs[0].is_cuda and importlib.util.find_spec("triton") is not None
        compiled = compile_unet(module, config)

        def call(*values: Tensor) -> Any:
            with warnings.catch_warnings():
                # We compile for each set of shapes, which is what they warn about.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return compiled(*values)

        return call


class XLA(Backend):
    name = "xla"
    package = "torch_xla"
    modules = ("torch_xla",)
    devices = ("xla",)

    def compile_graph(self, graph: FX, inputs: Sequence[Any], settings: Settings, tally: Tally) -> Graph:
        return _registered("openxla")(graph, inputs)


def _registered(name: str) -> Callable[..., Graph]:
    """A backend from torch.compile's own registry."""
    from torch._dynamo.backends.registry import lookup_backend

    return cast(Callable[..., Graph], lookup_backend(name))


ALL: dict[str, Backend] = {
    backend.name: backend
    for backend in (Inductor(), CUDAGraphs(), TensorRT(), OpenVINO(), OneDiff(), StableFast(), XLA())
}
"""Every backend, by name."""

AUTO = ("inductor", "tensorrt", "openvino", "xla")
"""Which ones ``auto`` looks at, best first."""


def find(settings: Settings, device: torch.device) -> Backend:
    """The backend that settings name, or for ``auto`` the best one that is available.

    Raises:
        RuntimeError: it can't work here; the message says why, and what to do.
    """
    if settings.backend != "auto":
        reason = ALL[settings.backend].availability(device, settings)
        if reason is not None:
            raise RuntimeError(f"{settings.title}: {reason}")
        return ALL[settings.backend]
    reasons = {name: ALL[name].availability(device, settings) for name in AUTO}
    for name, reason in reasons.items():
        if reason is None:
            return ALL[name]
    said = " ".join(reason for reason in reasons.values() if reason)
    raise RuntimeError(f"{settings.title}: no backend is available. {said}")
