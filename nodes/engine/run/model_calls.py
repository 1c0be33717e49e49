"""The calls of the model in one run, of any architecture, for the methods that stand around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...methods.method import MethodRun
from ..host.artifacts import Keeper
from ..plan import models
from .evaluation import OBSERVED, Now


class ModelCalls:
    """The host's APPLY_MODEL.

    Args:
        now: where the run stands.
        patchers: tells that of the model, and those of its copies on other devices.
        keeper: holds what may outlive the run.

    Attributes:
        around: the methods around a call, outermost first.
        compiling: what compiles models that are no UNets; None if nothing does.
    """

    def __init__(self, now: Now, patchers: Callable[[], list[Any]], keeper: Keeper):
        self.around: Sequence[MethodRun] = ()
        self.compiling: Any = None
        self._now = now
        self._patchers = patchers
        self._keeper = keeper
        # By the id of the host's model: several on several GPUs.
        self._host_models: dict[int, Any] = {}

    def apply(
        self, executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call, counted, with the methods around it. The arguments are those of the host's wrapper."""
        self._now.count_call(len(options.get("cond_or_uncond", (0,))), id(executor.class_obj))
        host_model, now_given = self._host_model(executor.class_obj), lambda: options
        if host_model is not None:
            from ..model.model_call import HostModelCall

            call = HostModelCall(host_model, options)
            now_given = lambda: call.options  # noqa: E731
        run = lambda: executor(x, t, c_concat, c_crossattn, control, now_given(), **kwargs)  # noqa: E731
        if self.compiling is not None and self._now.evaluation is not None:
            run = partial(self._compiled, executor.class_obj.diffusion_model, x, c_crossattn, control, now_given, run)
        for method in reversed(self.around if host_model is not None else ()):
            run = partial(method.apply_model, call, run)
        return run()

    def _compiled(self, module: Any, x: Any, context: Any, control: Any, now_given: Any, run: Any) -> Any:
        """A call that runs compiled, inside all that other methods do around it. UNets are compiled where they are
        called."""
        if models.is_image_unet(module):
            return run()
        if not self._now.compiles:
            self.compiling.tally.eager[OBSERVED] += 1
            return run()
        from ..model.compile_model import ModelCall

        call = ModelCall(x, context, control, now_given(), run)
        with self._now.lock:
            compiled = self.compiling.around_model(module, call)
        return compiled.run()

    def _host_model(self, model: Any) -> Any:
        """What the methods keep of a model in this run; None if none stands around it."""
        if not self.around or self._now.evaluation is None:
            return None
        # A guider may run a second, other model under the first one's options (DualModelGuider).
        patchers = self._patchers()
        if not any(model is patcher.model for patcher in patchers):
            return None
        # Here, since it uses more of the host's internals than the rest: if they change, these methods alone fail.
        from ..model.model_call import HostModel

        with self._now.lock:
            if id(model) not in self._host_models:
                self._host_models[id(model)] = HostModel(model, self._keeper, len(patchers) > 1)
            return self._host_models[id(model)]

    def end(self) -> None:
        """The run is over: nothing of it is kept."""
        self.around = ()
        self.compiling = None
        self._host_models.clear()
