"""The calls of a UNet in one run: cached, compiled, convolutions handed out, features changed between blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...methods.method import MethodRun
from ..host.artifacts import Keeper
from .evaluation import OBSERVED, Now


class UNetCalls:
    """The host's DIFFUSION_MODEL, and its patch of output blocks.

    Args:
        now: where the run stands.
        patchers: tells that of the model, and those of its copies on other devices.
        keeper: holds what may outlive the run.

    Attributes:
        around: the method around a call.
        at_output_block: those that change what an output block joins.
    """

    def __init__(self, now: Now, patchers: Callable[[], list[Any]], keeper: Keeper):
        self.around: MethodRun | None = None
        self.at_output_block: Sequence[MethodRun] = ()
        self._now = now
        self._patchers = patchers
        self._keeper = keeper
        self._convolutions: Any = None
        self._compiling: Any = None

    @property
    def takes_part(self) -> bool:
        """Whether anything is to be done around a call."""
        return any(part is not None for part in (self.around, self._compiling, self._convolutions))

    def convolve(self, method: MethodRun, patcher: Any) -> None:
        """Hand a method the convolutions of a model, from now on."""
        # Here, since it needs more of the host's internals than the rest.
        from ..model.convolutions import Convolutions

        self._convolutions = Convolutions(method, patcher, self._keeper)

    def compile(self, config: Any, method: MethodRun, patcher: Any, announce: Callable[[int, float], None]) -> Any:
        """Compile a model by a method's settings, when it is first called. Returns what compiles, for the calls of
        models that are no UNets."""
        # Here, since it needs torch's compiler too.
        from ..model.compile_model import Compiling

        # Graphs made with the operation for convolutions in them are others than those without.
        has_operations = self._convolutions is not None
        self._compiling = Compiling(config, patcher, self._keeper, announce, has_operations)
        method.compile(self._compiling.tally)
        return self._compiling

    def call(
        self, executor: Any, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call. The arguments are those of the host's wrapper."""
        method, evaluation = self.around, self._now.evaluation
        if evaluation is None:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        # Here, since it uses more of the host's internals than the rest: if they change, this method alone fails.
        from ..model.unet import HostUNetCall

        now = self._now
        with now.lock:
            call: Any = HostUNetCall(
                executor, x, timesteps, context, y, control, options, kwargs, now.latent, now.occurrences
            )
            if self._compiling is not None and now.compiles:
                call = self._compiling.around(call)
            elif self._compiling is not None:
                self._compiling.tally.eager[OBSERVED] += 1
        with self._convolving(executor.class_obj):
            return call.full()[0] if method is None else method.unet(evaluation, call)

    def _convolving(self, unet: Any) -> contextlib.AbstractContextManager[None]:
        """Hands a UNet's convolutions to the method that takes them, for one call."""
        # Of another model, what changes weights within the run is not known.
        if self._convolutions is None or not any(unet is one.model.diffusion_model for one in self._patchers()):
            return contextlib.nullcontext()
        installed: contextlib.AbstractContextManager[None] = self._convolutions.installed(unet)
        return installed

    def output_block(self, h: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What an output block is to join in place of `h` and `skip`, (B, C, H, W) each."""
        for method in self.at_output_block:
            if self._now.evaluation is not None:
                h, skip = method.output_block(self._now.evaluation, h, skip)
        return h, skip

    def end(self) -> None:
        """The run is over: nothing of it is kept."""
        if self._compiling is not None:
            self._compiling.end()
        self.around = self._compiling = self._convolutions = None
        self.at_output_block = ()
