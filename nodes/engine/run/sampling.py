"""The engine: runs a plan's methods during one sampling run, and takes everything back.

The model carries one wrapper, `outer_sample`. When sampling begins it reads the plan, makes the
methods' objects, and adds its own wrappers and patches to the options of this run alone: a copy
that the host makes for each run and drops after it. Being added last they stand closest to the
model, whatever else is on it and wherever our nodes were wired.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...methods.method import Evaluation, MethodRun, Run, State, Steps
from ..host import artifacts, machine
from ..plan import models
from ..plan.plan import KEY, Entry, Plan, plan_of
from ..plan.record import Record
from ..telling import history, metadata, verdicts
from . import budget
from .guidance import HostGuidance

logger = logging.getLogger(__name__)

OUTPUT_BLOCK_PATCH = "output_block_patch"

AUDIENCE = "slipstream.audience"
"""The attachment of a model that one node samples several times, or among several."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Audience:
    """Who is told of a model's runs, where one node makes many.

    Attributes:
        hear: called when a run ends, with each entry of the plan and its line. None: it is kept as any sampler's.
        name: what these runs are, on the nodes that take part: ``candidate``. None: they are not told there.
        number: that of all these runs: the line of a later one takes the place of the one before.
    """

    hear: Callable[[list[tuple[Entry, verdicts.Line]]], None] | None
    name: str | None
    number: int = field(default_factory=lambda: next(_numbers))


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
    run = SamplingRun(guider, plan, sigmas)
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


def takes_part(method: MethodRun, point: str) -> bool:
    """Whether a method takes part at one of the points of `MethodRun`."""
    return getattr(type(method), point) is not getattr(MethodRun, point)


class LeftOut(MethodRun):
    """In the place of a method that a node suggests, where it cannot serve the model as it is in this run."""

    def __init__(self, why: str):
        self.why = why

    def verdict(self) -> tuple[State, str]:
        return "inert", f"left out: {self.why}"


class SamplingRun:
    """One sampling run of one model with a plan.

    Args:
        guider: the host's CFGGuider, its `model_options` already those of this run.
        plan: the plan of its model.
        sigmas: (steps + 1,) noise levels.
    """

    def __init__(self, guider: Any, plan: Plan, sigmas: torch.Tensor):
        self.audience: Audience | None = guider.model_patcher.get_attachment(AUDIENCE)
        self.number = next(_numbers) if self.audience is None else self.audience.number
        self.guider = guider
        self.plan = plan
        self.options: dict[str, Any] = guider.model_options["transformer_options"]
        self.steps = Steps(tuple(sigmas.tolist()))
        self.record = Record(len(self.steps))
        self.where = verdicts.current_prompt()
        if self.audience is not None:
            self.where = replace(self.where, part=self.audience.name or "")
        self.methods: list[MethodRun] = []
        self.around_evaluation: MethodRun | None = None
        self.around_unet: MethodRun | None = None
        self.around_model: list[MethodRun] = []
        # By the id of the host's model: several on several GPUs.
        self.host_models: dict[int, Any] = {}
        self.convolutions: Any = None
        self.compiling: Any = None
        self.memory: budget.Watch | None = None
        self.at_output_block: list[MethodRun] = []
        self.evaluation: Evaluation | None = None
        self.latent = torch.Size()
        self.occurrences: dict[Hashable, int] = {}
        # The host samples on several GPUs in threads, which share the counts.
        self.lock = threading.Lock()

    def begin(self) -> None:
        """Make the methods' objects and install what they take part in.

        Raises:
            ValueError, RuntimeError: a method cannot serve the model as it is now, with everything
                that was put on it after our nodes. Its nodes are named.
        """
        self.publish()
        model_sampling = self.guider.model_patcher.get_model_object("model_sampling")
        model = models.describe(self.guider.model_patcher, self.guider.model_options)
        left_out: dict[Entry, LeftOut] = {}
        for entry in self.plan.entries:
            entry.check_agreed()
            try:
                entry.config.check(model)
            except (ValueError, RuntimeError) as error:
                if not entry.suggested:
                    raise type(error)(f"{error} ({entry.config.title} was added by {entry}.)") from error
                left_out[entry] = LeftOut(str(error).removeprefix(f"{entry.config.title}: "))
        plan = tuple(entry.config for entry in self.plan.entries if entry not in left_out)
        is_compiled = model.compiler is not None or any(config.phase == "compile" for config in plan)
        run = Run(model, self.steps, lambda percent: float(model_sampling.percent_to_sigma(percent)), is_compiled, plan)
        for entry in self.plan.entries:
            method = left_out.get(entry) or entry.config.begin(run)
            self.methods.append(method)
            if takes_part(method, "load"):
                self._load(method)
            if takes_part(method, "convolution"):
                self._convolve(method)
            if takes_part(method, "compile"):
                self._compile(entry.config, method)
        self.around_evaluation = next(iter(self._taking_part("predict_noise")), None)
        self.around_unet = next(iter(self._taking_part("unet")), None)
        self.around_model = self._taking_part("apply_model")
        self.at_output_block = self._taking_part("output_block")
        self._install()

    def _load(self, method: MethodRun) -> None:
        # Another pack's clone may be of a class of its own, and one without DynamicVRAM is of the host's.
        budget.put_on(self.guider.model_patcher)
        self.memory = budget.Watch(self.guider.model_patcher)
        method.load(self.memory.look)

    def _compile(self, config: Any, method: MethodRun) -> None:
        # Here, since it needs torch's compiler and more of the host's internals than the rest.
        from ..model.compile_unet import UNetCompiling

        # Graphs made with the operation for convolutions in them are others than those without.
        has_operations = self.convolutions is not None
        self.compiling = UNetCompiling(config, self.guider.model_patcher, self._keeper(), self.announce, has_operations)
        method.compile(self.compiling.tally)

    def _convolve(self, method: MethodRun) -> None:
        # Here, for the same reason.
        from ..model.convolutions import Convolutions

        self.convolutions = Convolutions(method, self.guider.model_patcher, self._keeper())

    def _keeper(self) -> artifacts.Keeper:
        keeper: artifacts.Keeper = self.guider.model_patcher.get_attachment(artifacts.ATTACHMENT)
        return keeper

    def _patchers(self) -> list[Any]:
        """That of the model, and those of its copies on other devices."""
        return [self.guider.model_patcher, *self.guider.model_options.get("multigpu_clones", {}).values()]

    def _taking_part(self, point: str) -> list[MethodRun]:
        return [method for method in self.methods if takes_part(method, point)]

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
        if any(part is not None for part in (self.around_unet, self.compiling, self.convolutions)):
            wrappers[WrappersMP.DIFFUSION_MODEL] = self.diffusion_model
        return wrappers

    def _install(self) -> None:
        for kind, wrapper in self._wrappers().items():
            self.options.setdefault("wrappers", {}).setdefault(kind, {})[KEY] = [wrapper]
        if self.at_output_block:
            self.options.setdefault("patches", {}).setdefault(OUTPUT_BLOCK_PATCH, []).append(self.output_block)

    def _remove(self) -> None:
        for kind in self._wrappers():
            self.options.get("wrappers", {}).get(kind, {}).pop(KEY, None)
        patches = self.options.get("patches", {}).get(OUTPUT_BLOCK_PATCH, [])
        patches[:] = [patch for patch in patches if patch != self.output_block]

    def end(self, error: BaseException | None) -> None:
        """Take everything back and say what became of it."""
        self._remove()
        if self.compiling is not None:
            self.compiling.end()
        self.record.end(error)
        if self.memory is not None:
            self.memory.end()
        self.publish()
        told = list(zip(self.plan.entries, self.lines(), strict=True))
        logger.info("Slipstream: %s", "; ".join(f"{entry.config.title}: {line.text}" for entry, line in told))
        if self.audience is None or self.audience.hear is None:
            history.keep(self.where, self.plan, self.record, told)
        else:
            self.audience.hear(told)
        if error is not None:
            metadata.forget(self.where)
        elif self.audience is None or self.audience.name is not None:
            methods = [{**entry.as_dict(), **asdict(line)} for entry, line in told]
            metadata.keep(self.where, self.plan, len(self.steps), methods)
        self.methods.clear()
        self.evaluation = self.around_evaluation = self.around_unet = self.compiling = self.convolutions = None
        self.memory = None
        self.at_output_block.clear()
        self.around_model.clear()
        self.host_models.clear()

    # The host's wrappers, outermost first.

    def predict_noise(
        self,
        executor: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
        seed: int | None = None,
    ) -> torch.Tensor:
        sigma = float(timestep.flatten()[0])
        step = self.steps.at(sigma, self.record.step)
        self.evaluation = Evaluation(step, sigma)
        self.latent = x.shape
        self.occurrences.clear()
        self.record.evaluation(step)
        if self.around_evaluation is None:
            return executor(x, timestep, model_options, seed)
        guidance = HostGuidance(executor, self.guider, x, timestep, model_options, seed, sigma)
        return self.around_evaluation.predict_noise(self.evaluation, guidance)

    def apply_model(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        conditions = len(options.get("cond_or_uncond", (0,)))
        with self.lock:
            self.record.model_calls += 1
            self.record.predictions += conditions
            if self.evaluation is not None:
                self.evaluation.predictions += conditions
        host_model = self._host_model(executor.class_obj)
        if host_model is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        from ..model.model_call import HostModelCall

        call = HostModelCall(host_model, options)
        run = lambda: executor(x, t, c_concat, c_crossattn, control, call.options, **kwargs)  # noqa: E731
        for method in reversed(self.around_model):
            run = partial(method.apply_model, call, run)
        return run()

    def _host_model(self, model: Any) -> Any:
        """What methods that stand around it keep of a model in this run; None if none does."""
        if not self.around_model or self.evaluation is None:
            return None
        # A guider may run a second, other model under the first one's options (DualModelGuider).
        patchers = self._patchers()
        if not any(model is patcher.model for patcher in patchers):
            return None
        # Here, since it uses more of the host's internals than the rest: if they change, these methods alone fail.
        from ..model.model_call import HostModel

        with self.lock:
            if id(model) not in self.host_models:
                self.host_models[id(model)] = HostModel(model, self._keeper(), len(patchers) > 1)
            return self.host_models[id(model)]

    def diffusion_model(
        self, executor: Any, x: Any, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        method, evaluation = self.around_unet, self.evaluation
        # A guider may run a second, other model under the first one's options (DualModelGuider).
        if evaluation is None or not models.is_image_unet(executor.class_obj):
            return executor(x, timesteps, context, y, control, options, **kwargs)
        # Here, since it uses more of the host's internals than the rest: if they change, this method alone fails.
        from ..model.unet import HostUNetCall

        with self.lock:
            call: Any = HostUNetCall(
                executor, x, timesteps, context, y, control, options, kwargs, self.latent, self.occurrences
            )
            if self.compiling is not None:
                call = self.compiling.around(call)
        with self._convolving(executor.class_obj):
            return call.full()[0] if method is None else method.unet(evaluation, call)

    def _convolving(self, unet: Any) -> contextlib.AbstractContextManager[None]:
        """Hands a UNet's convolutions to the method that takes them, for one call."""
        # Of another model, what changes weights within the run is not known.
        if self.convolutions is None or not any(unet is one.model.diffusion_model for one in self._patchers()):
            return contextlib.nullcontext()
        installed: contextlib.AbstractContextManager[None] = self.convolutions.installed(unet)
        return installed

    def output_block(self, h: torch.Tensor, skip: torch.Tensor, transformer_options: dict[str, Any]):
        for method in self.at_output_block:
            if self.evaluation is not None:
                h, skip = method.output_block(self.evaluation, h, skip)
        return h, skip

    # What is told.

    def lines(self) -> list[verdicts.Line]:
        """One line for each entry of the plan, as things stand; also before its method could begin."""
        told = [method.verdict() for method in self.methods]
        told += [("inert", "")] * (len(self.plan.entries) - len(told))
        return [verdicts.line(self.record, state, text) for state, text in told]

    def announce(self, graphs: int, seconds: float) -> None:
        """Tell that something is being compiled, on the node that asked for it."""
        self.publish({"compile": verdicts.compiling(graphs, seconds)})

    def publish(self, instead: Mapping[str, verdicts.Line] | None = None) -> None:
        """Tell every node its line, or the methods of some phases another one alone."""
        if self.audience is not None and self.audience.name is None:
            return
        for entry, line in zip(self.plan.entries, self.lines(), strict=True):
            if instead is not None:
                if entry.config.phase not in instead:
                    continue
                line = instead[entry.config.phase]
            others = line if entry.suggested else verdicts.Line("inert", f"as {entry} sets it")
            lines = [(node, line) for node in entry.nodes]
            lines += [(node, others) for other in entry.others for node in other.nodes]
            for node, told in lines:
                named = replace(told, text=f"{entry.config.title}: {told.text}") if node.has_several else told
                verdicts.publish(self.where, node, named, self.record.as_dict(), (self.number, entry.config.stem))
