"""What Tune and its workers on other machines share: what can be tried on a model here, what makes trials comparable,
and one run of a plan at a picture, whose failures are results."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import comfy.model_management
import torch

from ..measuring.fidelity import compare
from ..measuring.search import Candidate, Dial, Level
from ..measuring.trials import EXACT, Task, Trial
from ..methods.method import Configuration
from ..methods.tune import Given, ladder
from .apply import with_entries
from .benchmark import Result, SamplerCall, Subject
from .host import identity, machine
from .plan import models, registry
from .plan.plan import Entry, plan_of
from .plan.record import outcome
from .plan.saved import as_data
from .saved_plans import described

METRIC = "SSIM"
KEPT_MODELS = 6
"""Plans whose compiled code or quantized weights stay while others are tried."""

COMPILED_AGAIN = 3
"""Runs of a plan that may make graphs, before one counts all the same."""

VERSIONS = ("device", "device_type", "processor", "threads", "python", "torch", "comfyui", "slipstream")
"""What of a machine decides times and bits."""


@dataclass(frozen=True)
class Prompts:
    """A pair of CONDITIONINGs."""

    positive: Any
    negative: Any

    @cached_property
    def key(self) -> str:
        return identity.digest(self.positive, self.negative)


def picture_of(prompt: str, seed: int) -> str:
    """The key of a picture."""
    return f"{prompt} {seed}"


def comparable(model: Any, vae: Any, call: SamplerCall) -> dict[str, Any]:
    """What makes trials comparable, as plain data."""
    described_machine = machine.describe(model.load_device)
    return {
        "model": identity.of_weights(model),
        "patches": identity.of_patches(model),
        "plan": as_data(plan_of(model)),
        "vae": identity.of_weights(vae.patcher),
        "latent": identity.digest(call.latent),
        "steps": call.steps,
        "cfg": call.cfg,
        "sampler_name": call.sampler_name,
        "scheduler": call.scheduler,
        "denoise": call.denoise,
        "metric": METRIC,
        **{name: described_machine[name] for name in VERSIONS},
    }


@dataclass(frozen=True)
class Ladder:
    """What can be tried on a model on this machine.

    Attributes:
        dials: as the search knows them.
        configs: the settings of each level, by its key.
        left_out: what can't be tried, with why.
    """

    dials: list[Dial]
    configs: dict[str, Configuration]
    left_out: list[str]

    @classmethod
    def of(cls, model: Any, call: SamplerCall, may_use: str) -> Ladder:
        """For one of `methods.tune.MAY_USE`."""
        taken = frozenset(entry.config.stem for entry in plan_of(model).entries)
        given = Given(models.describe(model, model.model_options), call.cfg, taken)
        found, left_out = ladder(may_use, given, registry.kind)
        dials, configs = [], {}
        for dial in found:
            levels = []
            for rank, config in enumerate(dial.configs):
                key = json.dumps({"stem": config.stem, "settings": asdict(config)}, sort_keys=True)
                configs[key] = config
                levels.append(Level(dial.row.stem, rank, key, described(config)))
            dials.append(Dial(dial.row.stem, tuple(levels), dial.row.is_exact, frozenset(dial.row.excludes)))
        return cls(dials, configs, left_out)


class Runs:
    """Runs of plans on one device, in one session: its times can be compared.

    Args:
        model: ModelPatcher, as it came.
        call: what is sampled; each picture has its own prompts and seed.
        prompts: by their keys.
        configs: the settings of each level, by its key.
        progress: called at each step.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        call: SamplerCall,
        prompts: Iterable[Prompts],
        configs: dict[str, Configuration],
        progress: Callable[..., None] = lambda *args: None,
    ):
        self.model = model
        self.call = call
        self.configs = configs
        self.session = uuid4().hex[:12]
        self.began = time.monotonic()
        self._vae = vae
        self._prompts = {one.key: one for one in prompts}
        self._progress = progress
        self._references: dict[str, Result] = {}
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._inner: dict[int, Any] = {}
        self._ready: set[str] = set()
        self._weights: Any = None
        self._exact_rows = 0
        self._exact_s = 0.0
        self._is_warm = False

    def knows(self, picture: str) -> bool:
        """Whether a picture is there to compare with, or of prompts that can be sampled here."""
        return picture in self._references or picture.split(" ")[0] in self._prompts

    def reference(self, picture: str) -> Result | None:
        """What the exact model gives at a picture, if that is known."""
        return self._references.get(picture)

    def take_reference(self, picture: str, latent: torch.Tensor) -> None:
        """Know it from a run of another session."""
        self._references[picture] = Result(latent, self.decoded(latent))

    def decoded(self, latent: torch.Tensor) -> torch.Tensor | None:
        """The pictures of a latent, (B, H, W, C)."""
        return self._subject(self.model).decode(latent, self.call.title)[0]

    def configs_of(self, one: Candidate) -> list[Configuration]:
        """A plan's settings."""
        return [self.configs[level.key] for level in one.levels]

    def run(self, task: Task) -> tuple[Trial, Result | None]:
        """One run, whatever comes of it: the trial, and its result if there is one to compare.

        Raises:
            RuntimeError: the exact model itself can't be sampled or gives pictures that are not finite.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        one, problem = task.of or Candidate(), ""
        # A picture that nobody here knows is the asker's fault, no plan's.
        call = self._call(one, task.picture)
        try:
            return self._measured(task, one, call)
        except Exception as error:
            status, reason = outcome(error)
            if status == "interrupted" or task.plan == EXACT:
                raise
            problem = "out of memory" if machine.is_out_of_memory(error) else reason
        # Not in the handler: the error's traceback would hold what is to be freed.
        self._models.clear()
        machine.release_unused()
        at = time.monotonic() - self.began
        return Trial(task.plan, task.picture, self.session, at, problem=problem, is_error=True), None

    def _measured(self, task: Task, one: Candidate, call: SamplerCall) -> tuple[Trial, Result | None]:
        model = self._model(one)
        first_s = self._make_ready(task.plan, model, call)
        if task.plan == EXACT and not self._is_warm:
            # As the Benchmark does: what a process does once is no part of any time.
            self._subject(model).run(call, self._progress)
            self._is_warm = True
        for _ in range(COMPILED_AGAIN):
            subject = self._subject(model)
            began = time.monotonic()
            measured = subject.run(call, self._progress)
            at = (began + time.monotonic()) / 2 - self.began
            first_s += measured.compile_s
            if not measured.graphs:
                break
        result = subject.result
        assert result is not None
        trial = Trial(task.plan, task.picture, self.session, at, first_s=first_s)
        broken = result.not_finite()
        if task.plan == EXACT:
            if broken:
                raise RuntimeError(
                    f"Tune: the model itself gives NaN or infinite values in its {broken} at seed {call.seed}, so that "
                    "there is nothing to compare with. Look at its precision, or at the VAE's."
                )
            self._references[task.picture] = result
            self._exact_rows, self._exact_s = measured.rows, measured.seconds
            return replace(trial, seconds=measured.seconds), result
        if broken:
            return replace(trial, problem=f"its {broken} has NaN or infinite values"), None
        reference = self._references[task.picture]
        if result.images is None or reference.images is None or result.images.shape != reference.images.shape:
            return replace(trial, problem="its picture can't be compared with the exact one"), None
        share = measured.rows / self._exact_rows if self._exact_rows else None
        similarity = _similarity(reference, result)
        return replace(trial, seconds=measured.seconds, similarity=similarity, share=share), result

    def _subject(self, model: Any) -> Subject:
        return Subject("", "ablation", model, self._vae, False)

    def _call(self, one: Candidate, picture: str) -> SamplerCall:
        prompt, seed = picture.split(" ")
        prompts = self._prompts[prompt]
        call = replace(self.call, positive=prompts.positive, negative=prompts.negative, seed=int(seed))
        return call if one.steps is None else replace(call, steps=one.steps)

    def _model(self, one: Candidate) -> Any:
        """The model with a plan on it."""
        if not one.levels:
            return self.model
        if one.key not in self._models:
            entries = [Entry(config, ()) for config in self.configs_of(one)]
            self._models[one.key] = with_entries(self.model, entries)
        self._models.move_to_end(one.key)
        while len(self._models) > KEPT_MODELS:
            self._models.popitem(last=False)
        return self._models[one.key]

    def _make_ready(self, plan: str, model: Any, call: SamplerCall) -> float:
        """Bring device and model into the state of a run that is not the first. Returns what that took over a usual
        step, in seconds."""
        self._inner[id(model.model)] = model.model
        others = [inner for inner in self._inner.values() if inner is not model.model]
        machine.take_off_device(others, model.load_device)
        weights = id(model.model), model.patches_uuid
        is_moved = machine.is_dynamic(model) and weights != self._weights
        self._weights = weights
        is_prepared = plan != EXACT and any(entry.config.phase != "evaluate" for entry in plan_of(model).entries)
        is_first = plan not in self._ready and is_prepared
        self._ready.add(plan)
        if not (is_first or is_moved):
            return 0.0
        began = time.monotonic()
        self._subject(model).settle(call)
        if not self._exact_s or not is_first:
            return 0.0
        # Twice a usual step is nothing that anybody waits for.
        took = time.monotonic() - began - 2 * self._exact_s / max(1, call.steps)
        return max(0.0, took)


def _similarity(reference: Result, result: Result) -> float:
    """Of the worst picture of a batch."""
    assert reference.images is not None
    assert result.images is not None
    pairs = zip(reference.images, result.images, strict=True)
    found = (compare(reference.latent, result.latent, one[None], other[None]).ssim for one, other in pairs)
    return min(one for one in found if one is not None)
