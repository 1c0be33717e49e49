"""The engine: runs a plan's methods during one sampling run, and takes everything back.

The model carries one wrapper, `outer_sample`. When sampling begins it reads the plan, makes the
methods' objects, and adds its own wrappers and patches to the options of this run alone: a copy
that the host makes for each run and drops after it. Being added last they stand closest to the
model, whatever else is on it and wherever our nodes were wired.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...methods.method import MethodRun, Model, Run, Steps
from ..host import artifacts, machine
from ..plan import models
from ..plan.plan import KEY, Entry, Plan, plan_of
from ..plan.record import Record
from ..telling.teller import AUDIENCE, LeftOut, Teller
from . import budget
from .conditions import Conditions
from .evaluation import Now
from .guidance import HostGuidance
from .model_calls import ModelCalls
from .unet_calls import UNetCalls

OUTPUT_BLOCK_PATCH = "output_block_patch"


def with_plan(model: Any, plan: Plan) -> Any:
    """A clone of a MODEL (ModelPatcher) that carries this plan, in place of the one it has."""
    clone = model.clone()
    clone.set_attachments(KEY, plan)
    clone.set_attachments(artifacts.ATTACHMENT, artifacts.Keeper())
    # The host appends wrappers: without this, two of our nodes would start the engine twice.
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    budget.put_on(clone)
    clone.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, on_detach)
    return clone


def on_detach(patcher: Any, unpatch_all: bool) -> None:
    """The callback that every model with a plan carries, at the host's ON_DETACH: it unloads the model. If not all is
    taken back, a clone of it comes in its place, which uses what was made."""
    if unpatch_all:
        patcher.get_attachment(artifacts.ATTACHMENT).model_unloaded()


def outer_sample(executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any):
    """The wrapper that every model with a plan carries, at the host's OUTER_SAMPLE."""
    if executor.idx + 1 < len(executor.wrappers) and executor.wrappers.count(outer_sample) == 1:
        # Other packs' wrappers, wherever they were wired, come first: some put wrappers of their own on the run as it
        # begins, such as those that run the UNet twice, or sample several times. The list is this executor's own. Once
        # only: where a guider samples inside its own run, the list holds this wrapper twice.
        executor.wrappers.append(outer_sample)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    guider = executor.class_obj
    plan = plan_of(guider.model_patcher)
    if not plan.entries or SamplingRun.is_in(guider.model_options):
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    run = SamplingRun(guider, plan, sigmas, sampler)
    error: BaseException | None = None
    try:
        run.begin()
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        # The run's time is that of its work, not of queueing it.
        machine.synchronize(guider.model_patcher.load_device)
        return samples
    except BaseException as raised:
        error = raised
        raise
    finally:
        run.end(error)
        # Its traceback holds this frame, and the tensors of those below: no cycle may keep them.
        error = None


def adapts_steps(sampler: Any) -> bool:
    """Whether a sampler chooses its steps by its own estimate of their error."""
    return "adaptive" in getattr(getattr(sampler, "sampler_function", None), "__name__", "")


def signal_of(model_sampling: Any, sigmas: Iterable[float]) -> Callable[[float], float]:
    """How much of the picture a latent at a noise level holds, by the model's own scaling.

    Args:
        sigmas: those that are known before: nothing is reckoned for them while the model runs.
    """

    @functools.cache
    def signal(sigma: float) -> float:
        return float(model_sampling.noise_scaling(torch.tensor([sigma]), torch.zeros(1), torch.ones(1)))

    for sigma in sigmas:
        signal(sigma)
    return signal


def takes_part(method: MethodRun, point: str) -> bool:
    """Whether a method takes part at one of the points of `MethodRun`."""
    return getattr(type(method), point) is not getattr(MethodRun, point)


class SamplingRun:
    """One sampling run of one model with a plan.

    Args:
        guider: the host's CFGGuider, its `model_options` already those of this run.
        plan: the plan of its model.
        sigmas: (steps + 1,) noise levels.
        sampler: the host's Sampler.
    """

    def __init__(self, guider: Any, plan: Plan, sigmas: torch.Tensor, sampler: Any):
        self.guider = guider
        self.sampler = sampler
        self.plan = plan
        self.options: dict[str, Any] = guider.model_options["transformer_options"]
        levels = tuple(sigmas.tolist())
        self.steps = Steps(levels, signal_of(guider.model_patcher.get_model_object("model_sampling"), levels))
        self.record = Record(len(self.steps))
        self.teller = Teller(plan, self.record, guider.model_patcher.get_attachment(AUDIENCE))
        self.methods: list[MethodRun] = []
        self.memory: budget.Watch | None = None
        self.now = Now(self.steps, self.record)
        keeper: artifacts.Keeper = guider.model_patcher.get_attachment(artifacts.ATTACHMENT)
        self.around_evaluation: MethodRun | None = None
        self.conditions = Conditions(self.now, guider)
        self.observers: list[MethodRun] = []
        self.judges: list[MethodRun] = []
        self.model_calls = ModelCalls(self.now, self._patchers, keeper)
        self.unet_calls = UNetCalls(self.now, self._patchers, keeper)

    @property
    def around_unet(self) -> MethodRun | None:
        """The method around a call of the UNet."""
        return self.unet_calls.around

    def _patchers(self) -> list[Any]:
        """That of the model, and those of its copies on other devices."""
        return [self.guider.model_patcher, *self.guider.model_options.get("multigpu_clones", {}).values()]

    # Begin and end.

    def begin(self) -> None:
        """Make the methods' objects and install what they take part in.

        Raises:
            ValueError, RuntimeError: a method cannot serve the model as it is now, with everything
                that was put on it after our nodes. Its nodes are named.
        """
        self.teller.publish(self.methods)
        model_sampling = self.guider.model_patcher.get_model_object("model_sampling")
        model = models.describe(self.guider.model_patcher, self.guider.model_options)
        left_out = self._left_out(model)
        plan = tuple(entry.config for entry in self.plan.entries if entry not in left_out)
        is_compiled = model.compiler is not None or any(config.phase == "compile" for config in plan)
        percent_to_sigma = lambda percent: float(model_sampling.percent_to_sigma(percent))  # noqa: E731
        run = Run(model, self.steps, percent_to_sigma, is_compiled, plan, adapts_steps(self.sampler))
        for entry in self.plan.entries:
            method = left_out.get(entry) or entry.config.begin(run)
            self.methods.append(method)
            if takes_part(method, "load"):
                self._load(method)
            if takes_part(method, "convolution"):
                self.unet_calls.convolve(method, self.guider.model_patcher)
            if takes_part(method, "compile"):
                patcher = self.guider.model_patcher
                self.model_calls.compiling = self.unet_calls.compile(entry.config, method, patcher, self._announce)
        self.around_evaluation = next(iter(self._taking_part("predict_noise")), None)
        # The other way round than elsewhere: which conditions are reused is asked only of an evaluation that is made.
        self.conditions.around = self._taking_part("conditions")[::-1]
        self.observers = self._taking_part("observes")
        self.judges = self._taking_part("accepts")
        self.model_calls.around = self._taking_part("apply_model")
        self.unet_calls.around = next(iter(self._taking_part("unet")), None)
        self.unet_calls.at_output_block = self._taking_part("output_block")
        self._install()

    def _left_out(self, model: Model) -> dict[Entry, LeftOut]:
        """The suggestions that can't serve the model. What is explicit raises."""
        left_out: dict[Entry, LeftOut] = {}
        for entry in self.plan.entries:
            entry.check_agreed()
            try:
                entry.config.check(model)
            except (ValueError, RuntimeError) as error:
                if not entry.suggested:
                    raise type(error)(f"{error} ({entry.config.title} was added by {entry}.)") from error
                left_out[entry] = LeftOut(str(error).removeprefix(f"{entry.config.title}: "))
        return left_out

    def _load(self, method: MethodRun) -> None:
        # Another pack's clone may be of a class of its own, and one without DynamicVRAM is of the host's.
        budget.put_on(self.guider.model_patcher)
        self.memory = budget.Watch(self.guider.model_patcher)
        method.load(self.memory.look)

    def _announce(self, graphs: int, seconds: float) -> None:
        self.teller.compiling(self.methods, graphs, seconds)

    def _taking_part(self, point: str) -> list[MethodRun]:
        return [method for method in self.methods if takes_part(method, point)]

    def end(self, error: BaseException | None) -> None:
        """Take everything back and say what became of it."""
        self._remove()
        self.unet_calls.end()
        self.record.end(error)
        if self.memory is not None:
            self.memory.end()
        self.teller.end(self.methods, error)
        self.conditions.end()
        self.model_calls.end()
        self.methods.clear()
        self.observers.clear()
        self.judges.clear()
        self.around_evaluation = self.memory = self.now.evaluation = None

    # What is installed for the run, and taken back after it.

    @staticmethod
    def is_in(model_options: dict[str, Any]) -> bool:
        wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
        return KEY in wrappers.get(WrappersMP.PREDICT_NOISE, {})

    def _wrappers(self) -> dict[str, Callable[..., Any]]:
        wrappers: dict[str, Callable[..., Any]] = {
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.APPLY_MODEL: self.apply_model,
        }
        if self.conditions.around:
            wrappers[WrappersMP.CALC_COND_BATCH] = self.conditions.call
        if self.unet_calls.takes_part:
            wrappers[WrappersMP.DIFFUSION_MODEL] = self.diffusion_model
        return wrappers

    def _install(self) -> None:
        self.conditions.install()
        for kind, wrapper in self._wrappers().items():
            self.options.setdefault("wrappers", {}).setdefault(kind, {})[KEY] = [wrapper]
        if self.unet_calls.at_output_block:
            self.options.setdefault("patches", {}).setdefault(OUTPUT_BLOCK_PATCH, []).append(self.output_block)

    def _remove(self) -> None:
        for kind in self._wrappers():
            self.options.get("wrappers", {}).get(kind, {}).pop(KEY, None)
        patches = self.options.get("patches", {}).get(OUTPUT_BLOCK_PATCH, [])
        patches[:] = [patch for patch in patches if patch != self.output_block]

    # The host's wrappers, outermost first.

    def predict_noise(
        self,
        executor: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
        seed: int | None = None,
    ) -> torch.Tensor:
        devices = len(self.guider.model_options.get("multigpu_clones", ())) or 1
        evaluation = self.now.begin_evaluation(x.shape, timestep, devices)
        guidance = HostGuidance(executor, self.guider, x, timestep, model_options, seed, evaluation.sigma)
        while True:
            # Each is asked: they count.
            observed = [method.observes(evaluation) for method in self.observers]
            evaluation.is_observed = any(observed)
            around = self.around_evaluation
            denoised = guidance.guided() if around is None else around.predict_noise(evaluation, guidance)
            if all(method.accepts(evaluation, denoised) for method in self.judges):
                self.now.end_evaluation()
                return denoised
            evaluation = self.now.begin_again()

    def apply_model(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        return self.model_calls.apply(executor, x, t, c_concat, c_crossattn, control, options, kwargs)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any):
        # Those of other models take other arguments. A guider may run one of each (DualModelGuider).
        if not models.is_image_unet(executor.class_obj):
            return executor(*args, **kwargs)
        return self._unet(executor, *args, **kwargs)

    def _unet(
        self, executor: Any, x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        return self.unet_calls.call(executor, x, timesteps, context, y, control, options, kwargs)

    def output_block(self, h: torch.Tensor, skip: torch.Tensor, transformer_options: dict[str, Any]):
        return self.unet_calls.output_block(h, skip)
