"""What can be set when something is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

BACKENDS = ("inductor", "cudagraphs", "tensorrt", "openvino", "onediff", "stable-fast", "xla")
"""In the order in which ``auto`` looks for one that is available."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SCOPES = ("blocks", "model")
DYNAMIC = ("auto", "on", "off")

WHOLE = ("cudagraphs", "onediff", "stable-fast")
"""Backends that take a module as a whole: they keep what belongs to its weights, or its memory."""


@dataclass(frozen=True)
class Settings:
    """Attributes:
    backend: one of BACKENDS, or ``auto``.
    mode: inductor's preset, one of MODES.
    scope: ``blocks``: each kind of block is one graph, which all blocks of its kind share;
        ``model``: one graph, as some backends always do.
    dynamic: ``auto``: a size that changes becomes dynamic when it first does; ``on``: from the
        beginning; ``off``: each size gets graphs of its own.
    fullgraph: raise where a graph would break.
    tuned: what the diffusers guide recommends for inductor: 1x1 convolutions as matrix
        multiplications, coordinate descent tuning, no epilogue fusion. Compiles longer.
    onediff_backend: what OneDiff compiles with: ``oneflow``, ``nexfort``, or one that was registered.
    """

    backend: str = "auto"
    mode: str = "default"
    scope: str = "blocks"
    dynamic: str = "auto"
    fullgraph: bool = False
    tuned: bool = False
    onediff_backend: str = "nexfort"

    title: ClassVar[str]
    has_blocks: ClassVar[bool] = True
    """Whether what is compiled can be, block by block."""

    def __post_init__(self) -> None:
        choices = (("backend", ("auto", *BACKENDS)), ("mode", MODES), ("scope", SCOPES), ("dynamic", DYNAMIC))
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{self.title}: {name} must be one of {', '.join(allowed)}, but is {value!r}. Choose one of these."
                )
        if self.records_cuda_graphs and not self.is_whole:
            raise ValueError(
                f"{self.title}: mode {self.mode} records CUDA graphs, whose results the next block would overwrite. "
                "Set scope to model, or mode to default or max-autotune-no-cudagraphs."
            )

    @property
    def is_whole(self) -> bool:
        """Whether the model is compiled as one, and not block by block."""
        return self.scope == "model" or self.backend in WHOLE

    @property
    def records_cuda_graphs(self) -> bool:
        """Whether graphs are recorded and replayed: what runs inside them can't change from one call to the next."""
        return self.backend == "cudagraphs" or (
            self.backend == "inductor" and self.mode in ("reduce-overhead", "max-autotune")
        )
