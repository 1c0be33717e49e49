"""Compile Model: the diffusion model's Python, traced once and turned into fused code by one of several compilers.

Source: torch.compile (PyTorch 2), and "Accelerate inference of text-to-image diffusion models"
(diffusers' documentation) for what to set and for compiling the repeated blocks alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compiling import backends
from ..compiling.settings import Settings
from .method import Compilation, Configuration, MethodRun, Model, Run, State


@dataclass(frozen=True)
class CompileModel(Settings, Configuration):
    """`compiling.settings.Settings`, for a diffusion model."""

    stem = "compile_model"
    title = "Compile Model"
    phase = "compile"
    is_exact = True

    def off(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        if model.compiler:
            raise RuntimeError(
                f"{self.title}: {model.compiler} compiles this model already. Remove or bypass one of them."
            )
        backends.find(self, torch.device(model.device))

    def begin(self, run: Run) -> CompileModelRun:
        return CompileModelRun()


class CompileModelRun(MethodRun):
    """Tells what compiling did."""

    def __init__(self) -> None:
        self.compilation: Compilation | None = None

    def compile(self, compilation: Compilation) -> None:
        self.compilation = compilation

    def verdict(self) -> tuple[State, str]:
        if self.compilation is None:
            return "inert", "compiled nothing: the run did not begin"
        return "active" if self.compilation.is_active else "inert", self.compilation.sentence()
