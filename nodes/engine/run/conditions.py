"""The conditions that a guider asks for at once, for the methods that decide whether they are evaluated, and which."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import add_callback_with_key

from ...methods.method import ConditionsCall, Evaluation, MethodRun
from ..plan.plan import KEY
from .evaluation import Now

HANDLER = "context_handler"
WINDOW_BEGINS = "evaluate_context_windows"
"""Of the host's context windows: the model option that has their handler, and its callback."""

POST_CFG = "sampler_post_cfg_function"


class Conditions:
    """The host's CALC_COND_BATCH.

    Args:
        now: where the run stands.
        guider: the host's CFGGuider.

    Attributes:
        around: the methods around it, outermost first.
    """

    def __init__(self, now: Now, guider: Any):
        self.around: list[MethodRun] = []
        self._now = now
        self._guider = guider
        # In which evaluation, and the frames.
        self._window: tuple[Evaluation | None, tuple[int, ...]] = (None, ())
        self._handler: Any = None

    def install(self) -> None:
        """Have the host's context windows tell which one is evaluated: nothing else does, and some schedules have
        others in each step. In the options of this run alone."""
        handler = self._guider.model_options.get(HANDLER)
        if not self.around or not isinstance(getattr(handler, "callbacks", None), dict):
            return
        watched = copy.copy(handler)
        watched.callbacks = _copied(handler.callbacks)
        add_callback_with_key(WINDOW_BEGINS, KEY, self._enter_window, watched.callbacks)
        self._handler, self._guider.model_options[HANDLER] = handler, watched

    def _enter_window(self, *args: Any) -> None:
        (window,) = (one for one in args if hasattr(one, "index_list"))
        self._window = self._now.evaluation, tuple(window.index_list)

    def call(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: Any, model_options: dict[str, Any]
    ) -> list[torch.Tensor]:
        """One call. The arguments are those of the host's wrapper; a condition may be None, which gives zeros."""
        evaluation = self._now.evaluation
        if not self.around or evaluation is None:
            found: list[torch.Tensor] = executor(model, conds, x, timestep, model_options)
            return found
        run = lambda some: executor(model, some, x, timestep, model_options)  # noqa: E731
        window = self._window[1] if self._window[0] is evaluation else ()
        host = HostConditionsCall(self._now, self._guider, run, model, conds, x, timestep, model_options, window)
        around: ConditionsCall = host
        for method in reversed(self.around):
            around = Within(evaluation, around, method)
        live = iter(around.evaluate())
        return [torch.zeros_like(x) if cond is None else next(live) for cond in conds]

    def end(self) -> None:
        """The run is over: nothing of it is kept."""
        if self._handler is not None:
            self._guider.model_options[HANDLER] = self._handler
        self.around, self._handler = [], None
        self._window = None, ()


class Within:
    """A call with a method around it: `methods.method.ConditionsCall`."""

    def __init__(self, evaluation: Evaluation, call: ConditionsCall, method: MethodRun):
        self.keys = call.keys
        self.x, self.sigma, self.window = call.x, call.sigma, call.window
        self._evaluation = evaluation
        self._call = call
        self._method = method

    @property
    def states(self) -> tuple[Hashable, ...]:
        return self._call.states

    @property
    def weights(self) -> tuple[float, ...] | None:
        return self._call.weights

    @property
    def are_positive(self) -> tuple[bool, ...]:
        return self._call.are_positive

    def only(self, places: Sequence[int]) -> Within:
        return Within(self._evaluation, self._call.only(places), self._method)

    def evaluate(self) -> Sequence[torch.Tensor]:
        return self._method.conditions(self._evaluation, self._call)


class HostConditionsCall:
    """`methods.method.ConditionsCall` over the host's."""

    def __init__(
        self, now: Now, guider: Any, run: Callable[[list[Any]], list[torch.Tensor]], model: Any, conds: list[Any],
        x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], window: tuple[int, ...],
    ):  # fmt: skip
        # Read from the device only where another node evaluates at a noise level of its own.
        evaluation = now.evaluation
        assert evaluation is not None
        self._now = now
        self.x = x
        self.sigma = evaluation.sigma if timestep is now.timestep else float(timestep.flatten()[0])
        self.window = window
        self._run = run
        self._guider = guider
        self._model_options = model_options
        self._conds = conds
        options = (id(model), _structure(model_options), window, tuple(x.shape))
        self.keys = tuple(self._keys(now.occurrences_of_conditions, options))

    def _keys(self, occurrences: Counter[Hashable], options: Hashable) -> Iterator[Hashable]:
        for cond in self._conds:
            if cond is None:
                continue
            key = (options, _uuids(cond))
            occurrences[key] += 1
            yield key, occurrences[key]

    @cached_property
    def states(self) -> tuple[Hashable, ...]:
        """What of each is in force at this noise level."""
        return tuple(tuple(_state(entry, self.sigma) for entry in cond) for cond in self._conds if cond is not None)

    @property
    def are_positive(self) -> tuple[bool, ...]:
        """By the prompts' own marks: windows and other nodes hand in copies, or some of several prompts."""
        positive = set(_uuids(self._guider.conds.get("positive") or ()))
        marks = (set(_uuids(cond)) for cond in self._conds if cond is not None)
        return tuple(bool(some) and some <= positive for some in marks)

    def only(self, places: Sequence[int]) -> HostConditionsCall:
        found = copy.copy(self)
        found.__dict__.pop("states", None)
        live = [at for at, cond in enumerate(self._conds) if cond is not None]
        kept = {live[place] for place in places}
        found._conds = [cond if at in kept else None for at, cond in enumerate(self._conds)]
        found.keys = tuple(self.keys[place] for place in places)
        return found

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of each prediction in what the sampler gets."""
        is_plain = type(self._guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
        if not is_plain or "sampler_cfg_function" in self._model_options:
            return None
        if len(self.keys) == 1:
            return (1.0,)
        cfg = float(self._guider.cfg)
        if self._is_read_by_the_sampler:
            # cfg++ steps along the negative: x' = D + (1 - share) (x - N), which is a step by that share to another
            # prediction, D as at a scale of cfg / share.
            if not self._now.share:
                return None
            cfg /= self._now.share
        return (cfg, 1 - cfg) if len(self.keys) == 2 else None

    @property
    def _is_read_by_the_sampler(self) -> bool:
        """Whether the sampler looks at the negative itself: what it puts after guidance is in its own options alone."""
        given, own = (options.get(POST_CFG, ()) for options in (self._guider.model_options, self._model_options))
        return any(function not in given for function in own)

    def evaluate(self) -> Sequence[torch.Tensor]:
        """The model's prediction for each."""
        return [result for result, cond in zip(self._run(self._conds), self._conds, strict=True) if cond is not None]


def _copied(callbacks: Any) -> Any:
    """Callbacks in mappings and lists of our own. What is called stays what it was: it may be the method of an object
    that remembers, or that can't be copied."""
    if isinstance(callbacks, dict):
        return {key: _copied(some) for key, some in callbacks.items()}
    return [*callbacks] if isinstance(callbacks, list) else callbacks


def _uuids(cond: Sequence[dict[str, Any]]) -> tuple[Hashable, ...]:
    return tuple(entry.get("uuid") for entry in cond)


def _structure(model_options: dict[str, Any]) -> Hashable:
    """What other nodes put on the model for a call of their own, such as an attention that perturbs: by the places."""
    options = model_options.get("transformer_options", {})
    patches = options.get("patches") or {}
    replaced = options.get("patches_replace") or {}
    return (
        tuple(sorted((name, len(some)) for name, some in patches.items() if some)),
        tuple(sorted((name, len(some)) for name, some in replaced.items() if some)),
    )


def _state(entry: dict[str, Any], sigma: float) -> Hashable:
    """What of one entry of a condition is in force at a noise level."""
    is_on = entry.get("timestep_start", sigma) >= sigma >= entry.get("timestep_end", sigma)
    controls, control = [], entry.get("control")
    while control is not None:
        ends = getattr(control, "timestep_range", None)
        controls.append(ends is None or ends[0] >= sigma >= ends[1])
        control = getattr(control, "previous_controlnet", None)
    hooks = getattr(entry.get("hooks"), "hooks", ())
    keyframes = tuple(
        sum(getattr(frame, "start_t", sigma) >= sigma for frame in getattr(hook.hook_keyframe, "keyframes", ()))
        for hook in hooks
        if getattr(hook, "hook_keyframe", None) is not None
    )
    return is_on, tuple(controls), keyframes
