"""Two models in one sampler call: a base makes the first part of an image, a refiner the rest of it."""

from __future__ import annotations

import functools
import inspect
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..methods.method import State
from ..methods.refiner_handoff import SPLITS, TITLE, Ensemble, ImageToImage
from . import latents
from .host import machine
from .inputs import check_prompt, check_width, explaining, unsampled
from .node import node_of, option
from .plan import models
from .plan.plan import plan_of
from .plan.record import outcome
from .telling import metadata, verdicts
from .telling.teller import AUDIENCE, Audience

STEM = "refiner_handoff"
MODES = {"ensemble": Ensemble, "image to image": ImageToImage}

CLIP_L = 768
"""The channels of CLIP-L in an SDXL prompt. CLIP-G's, behind them, are those that the refiner was trained with."""

OF_THE_BASE = {"control": "ControlNet", "gligen": "GLIGEN", "hooks": "hooks"}
"""What a prompt may carry that is made for one model's layers, and what to call it."""

NEED_TWO_STEPS = ("uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive")
"""Samplers of the host that return a single step's latent as it came."""


def mode_option() -> Any:
    """The input `mode`, with the inputs of each."""
    handoff = option(
        io.Float,
        "handoff",
        default=0.8,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="The base's fraction of the run. 0.8 is what the refiner was made for; 0.9 keeps more of the base.",
    )
    split = option(
        io.Combo,
        "split",
        options=list(SPLITS),
        default=SPLITS[0],
        tooltip=(
            "What handoff is a fraction of. timesteps: of the training timesteps, as denoising_end in diffusers: the "
            "same noise level in every schedule. steps: of the steps, as in KSampler (Advanced)."
        ),
    )
    exact = option(
        io.Boolean,
        "exact_handoff",
        default=False,
        advanced=True,
        tooltip=(
            "With timesteps: hand over exactly there, not at the end of the step that it falls into. Costs one step "
            "more, unless one ends near it anyway."
        ),
    )
    denoise = option(
        io.Float,
        "refiner_denoise",
        default=0.3,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=(
            "How much of the finished image the refiner makes anew: 0.3 of 30 steps are 9 steps, as strength in "
            "diffusers."
        ),
    )
    inputs = {"ensemble": [handoff, split, exact], "image to image": [denoise]}
    return option(
        io.DynamicCombo,
        "mode",
        options=[io.DynamicCombo.Option(name, inputs[name]) for name in MODES],
        tooltip=(
            "ensemble: one run, in which the refiner goes on where the base stops, and no noise is added. image to "
            "image: the base finishes, then the refiner noises the image a little and redoes the last steps."
        ),
    )


@dataclass(frozen=True)
class Part:
    """One of the two models, and what drives it."""

    name: str
    model: Any
    positive: Any
    negative: Any
    cfg: float

    @property
    def model_sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    @property
    def prompts(self) -> dict[str, Any]:
        """By the names of their inputs."""
        return {f"{self.name}_positive": self.positive, f"{self.name}_negative": self.negative}

    def heard(self) -> Any:
        """The model, its runs told as this part's on the nodes of its plan."""
        if not plan_of(self.model).entries:
            return self.model
        clone = self.model.clone()
        clone.set_attachments(AUDIENCE, Audience(None, self.name))
        return clone


@dataclass(frozen=True)
class Call:
    """What is sampled: the inputs of the host's KSampler node that are the same for both models."""

    latent: dict[str, Any]
    seed: int
    steps: int
    sampler_name: str
    scheduler: str

    @property
    def sampler(self) -> Any:
        """The host's KSAMPLER, a new one each time."""
        return comfy.samplers.sampler_object(self.sampler_name)

    def sigmas(self, model: Any) -> torch.Tensor:
        """The noise levels of a whole run, as the host's KSampler has them."""
        sampler = comfy.samplers.KSampler(model, self.steps, "cpu", self.sampler_name, self.scheduler)
        return sampler.sigmas

    @property
    def other_seed(self) -> int:
        return (self.seed + 1) % 2**64

    @property
    def refiner_seed(self) -> int:
        """That of a run that another one goes on with. A sampler that draws noise would draw that of the base again;
        for any other the seed stays, since the host makes more of it than noise."""
        draws = "noise_sampler" in inspect.signature(self.sampler.sampler_function).parameters
        return self.other_seed if draws else self.seed


class Leg:
    """Some steps of a run.

    The host gets the image and the noise that the whole run began with, since it keeps what a mask leaves out as a mix
    of these; where the steps go on from is handed to the sampler itself, past the host's scaling of latents.

    Args:
        sigmas: (steps + 1,) their noise levels.
        whole: those of the whole run.
        begin: the latent that they go on from, as the model has it; None: the noised image.

    Attributes:
        end: the latent that they came to, likewise.
    """

    def __init__(self, sigmas: torch.Tensor, whole: torch.Tensor, begin: torch.Tensor | None = None):
        self.sigmas = sigmas
        self.end: torch.Tensor | None = None
        self._whole = whole
        self._begin = begin

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def on(self, sampler: Any) -> Any:
        """The host's KSAMPLER, made to do this leg."""
        function = sampler.sampler_function

        @functools.wraps(function)
        def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            # A mask that changes over the run (Differential Diffusion) asks how far the whole of it is.
            model.sigmas = self._whole.to(sigmas)
            begin = x if self._begin is None else self._begin.to(x)
            end: torch.Tensor = function(model, begin, sigmas, *args, **kwargs)
            self.end = end
            return end

        sampler.sampler_function = sample
        return sampler


class Handoff:
    """One execution of the node.

    Args:
        node: the node class, as `execute` gets it, with the host's hidden inputs.
        base, refiner: their prompts as wired; None for the refiner's that are not.
    """

    def __init__(self, node: type[io.ComfyNode], base: Part, refiner: Part, call: Call):
        self.node = node_of(node)
        self.where = verdicts.current_prompt()
        self.number = Audience(None, None).number
        self.base = base
        self.refiner = refiner
        self.call = call
        self.notes: list[str] = []
        self._translations: list[str] = []
        self._left_out: set[str] = set()
        self.record: dict[str, Any] = {}
        self.line = verdicts.Line("running", "")
        self._done = 0
        self._total = 0

    def execute(self, settings: Ensemble | ImageToImage) -> io.NodeOutput:
        """The output of the node: the LATENT, and the base's at the handoff."""
        try:
            self._check(settings)
            with self._explaining(self.base, self.call.latent["samples"]):
                image = latents.as_sampled(self.base.model, self.call.latent)
            samples, of_base = (
                self._ensemble(settings, image)
                if isinstance(settings, Ensemble)
                else self._image_to_image(settings, image)
            )
            self._keep(settings)
        except BaseException as error:
            status, reason = outcome(error)
            so_far = f"after {self._done} of {self._total} steps" if self._done else "before the first step"
            if status == "interrupted":
                self._tell(verdicts.Line("interrupted", f"interrupted {so_far}"))
            else:
                self._tell(verdicts.Line("failed", f"failed {so_far} ({reason})"))
            metadata.forget(self.where)
            raise
        return io.NodeOutput(*(latents.like(self.call.latent, latent) for latent in (samples, of_base)))

    def _ensemble(self, settings: Ensemble, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, rest = settings.legs(self.call.sigmas(self.base.model), self._boundary(settings))
        whole = torch.cat([first, rest[1:]])
        leg = Leg(first, whole)
        self._begin(leg.steps, len(rest) - 1, float(rest[0]))
        noise = comfy.sample.prepare_noise(image, self.call.seed, self.call.latent.get("batch_index"))
        samples = of_base = self._sample(self.base, leg, noise, image, self.call.seed) if leg.steps else image
        if len(rest) > 1:
            if leg.steps and leg.end is None:
                raise RuntimeError(
                    f"{TITLE} (node {self.node.id}): expected the base to be sampled by {self.call.sampler_name}, but "
                    "a node on it samples in its own way, so that there is nothing to hand over. Take that node out."
                )
            samples = self._sample(self.refiner, Leg(rest, whole, leg.end), noise, image, self.call.refiner_seed)
        if not leg.steps:
            self._conclude("inert", "handoff leaves the base none, so that the refiner made all of it")
        elif len(rest) == 1:
            self._conclude("inert", "handoff leaves the refiner none, so that the base made all of it")
        else:
            self._conclude("active", f"handed over at {_level(self.base.model_sampling, rest[0])}")
        return samples, of_base

    def _image_to_image(self, settings: ImageToImage, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.call.sigmas(self.base.model)
        again = settings.refining(self.call.sigmas(self.refiner.model))
        self._begin(len(first) - 1, len(again) - 1, float(again[0]))
        indices = self.call.latent.get("batch_index")
        noise = comfy.sample.prepare_noise(image, self.call.seed, indices)
        samples = of_base = self._sample(self.base, Leg(first, first), noise, image, self.call.seed)
        if len(again) > 1:
            # The same noise again would be that which the base's image was made from.
            seed = self.call.other_seed
            noise = comfy.sample.prepare_noise(of_base, seed, indices)
            samples = self._sample(self.refiner, Leg(again, again), noise, of_base, seed)
            self._conclude("active", f"made anew from {_level(self.refiner.model_sampling, again[0])} on")
        else:
            self._conclude("inert", f"refiner_denoise {settings.refiner_denoise:g} leaves the refiner none")
        return samples, of_base

    def _begin(self, base_steps: int, refiner_steps: int, sigma: float) -> None:
        """Take down what will be done.

        Raises:
            ValueError: the sampler can't do so few steps.
        """
        self._total = base_steps + refiner_steps
        self.record = {"base_steps": base_steps, "refiner_steps": refiner_steps, "sigma": sigma}
        if self.call.sampler_name in NEED_TWO_STEPS and 1 in (base_steps, refiner_steps):
            raise ValueError(
                f"{TITLE}: sampler {self.call.sampler_name} needs two steps or none of each model, but here are "
                f"{base_steps} for the base and {refiner_steps} for the refiner. Set more steps, hand over elsewhere, "
                "or choose another sampler."
            )

    def _sample(self, part: Part, leg: Leg, noise: torch.Tensor, image: torch.Tensor, seed: int) -> torch.Tensor:
        """One model's steps. Returns the latent as a VAE takes it.

        Raises:
            RuntimeError: it is not finite.
        """
        done = self._done
        if part is self.refiner and self._release_base(image):
            self.notes.append("the base was taken off the device first, as there is no room for both")
        self._tell(verdicts.Line("running", f"{part.name}: steps {done + 1} to {done + leg.steps} of {self._total}"))
        show = latent_preview.prepare_callback(part.model, self._total)

        def callback(step: int, x0: Any, x: Any, total_steps: int) -> None:
            # An adaptive sampler makes as many as it likes.
            step = done + min(step, leg.steps - 1)
            self._done = step + 1
            show(step, x0, x, self._total)

        with self._explaining(part, image):
            samples: torch.Tensor = comfy.sample.sample_custom(
                part.heard(),
                noise,
                part.cfg,
                leg.on(self.call.sampler),
                leg.sigmas,
                part.positive,
                part.negative,
                image,
                noise_mask=self.call.latent.get("noise_mask"),
                callback=callback,
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
        self._done = done + leg.steps
        if leg.end is not None and not bool(torch.isfinite(leg.end).all()):
            raise RuntimeError(
                f"{TITLE} (node {self.node.id}): expected a latent of finite values from the {part.name}, but it holds "
                "NaN or infinity. Look at the nodes on that model, and at the type of its weights."
            )
        return samples

    def _explaining(self, part: Part, latent: Any) -> AbstractContextManager[None]:
        """Around the host's work on what came in."""
        return explaining(
            f"{TITLE} (node {self.node.id})", unsampled(part.model, ("latent_image", latent), part.prompts)
        )

    def _release_base(self, image: torch.Tensor) -> bool:
        """Take the base off its device, if the refiner would not fit beside it. Returns whether it was."""
        base, refiner = self.base.model, self.refiner.model
        if base.model is refiner.model or base.load_device != refiner.load_device:
            return False
        # DynamicVRAM takes of the base what the refiner needs, as it needs it.
        if machine.is_dynamic(refiner) or machine.has_room(refiner, image.shape):
            return False
        return machine.release(base)

    # What the two models must have in common.

    def _check(self, settings: Ensemble | ImageToImage) -> None:
        """Raise what can't be served, and give the refiner the base's prompts where it has none of its own.

        Raises:
            RuntimeError: the refiner can't go on with the base's latent.
            ValueError: there is no prompt for the refiner, or one is empty or made for another model.
        """
        base, refiner = self.base, self.refiner
        for part in (base, refiner):
            for name, conditioning in part.prompts.items():
                if part is base or conditioning is not None:
                    check_prompt(TITLE, name, conditioning, part.cfg if name.endswith("negative") else None)
        described = [models.describe(part.model, part.model.model_options) for part in (base, refiner)]
        names = f"the base is {described[0].name} and the refiner {described[1].name}"
        formats = [part.model.get_model_object("latent_format") for part in (base, refiner)]
        kinds = [(type(one), one.scale_factor) for one in formats]
        scalings = [type(part.model_sampling).noise_scaling for part in (base, refiner)]
        if kinds[0] != kinds[1] or (isinstance(settings, Ensemble) and scalings[0] is not scalings[1]):
            what = "noise" if kinds[0] == kinds[1] else "latents"
            raise RuntimeError(
                f"{TITLE}: expected two models of the same kind of {what}, but {names}, of which the second can't read "
                "what the first one leaves. Use a refiner that shares the base's latents and noise: another model of "
                "its own family; for SDXL its refiner too."
            )
        prompts = {}
        for name in ("positive", "negative"):
            wired, of_base = getattr(refiner, name), getattr(base, name)
            prompts[name] = self._translated(name, of_base, *described) if wired is None else wired
        self.refiner = Part(refiner.name, refiner.model, **prompts, cfg=refiner.cfg)
        # Before the base's steps, which would be for nothing.
        for part in (base, self.refiner):
            for name, conditioning in part.prompts.items():
                check_width(TITLE, name, conditioning, part.model)

    def _translated(self, name: str, conditioning: Any, base: models.Model, refiner: models.Model) -> Any:
        """The base's prompt for the refiner. Its CLIP-G part and the pooled output are what the refiner's own text
        encoder would give: it is the same one, with the same layer read."""
        if base.name == refiner.name or (base.family is not None and base.family == refiner.family):
            return conditioning
        is_sdxl = (base.family, refiner.family) == ("SDXL", "SDXL refiner")
        width = CLIP_L + self.refiner.model.model.model_config.unet_config["context_dim"] if is_sdxl else 0
        if not is_sdxl or any(tensor is None or tensor.shape[-1] != width for tensor, _ in conditioning):
            raise ValueError(
                f"{TITLE}: refiner_{name} is not connected, and the base's prompt can't stand in for it: that takes an "
                f"SDXL base with its own prompts and an SDXL refiner, but the base is {base.name} and the refiner "
                f"{refiner.name}. Connect a prompt that was made with the refiner's own CLIP to refiner_{name}."
            )
        self._translations.append(name)
        self._left_out |= {
            called for _, values in conditioning for key, called in OF_THE_BASE.items() if values.get(key) is not None
        }
        return [
            [tensor[..., CLIP_L:], {key: value for key, value in values.items() if key not in OF_THE_BASE}]
            for tensor, values in conditioning
        ]

    def _boundary(self, settings: Ensemble) -> float:
        """The noise level at the cutoff."""
        sampling = self.base.model_sampling
        if settings.handoff <= 0:
            return math.inf
        if not _has_timesteps(sampling):
            return float(sampling.percent_to_sigma(settings.handoff))
        cutoff = settings.cutoff(sampling.num_timesteps)
        if cutoff >= sampling.num_timesteps:
            return math.inf
        return float(sampling.sigma(torch.tensor(float(cutoff)))) if cutoff > 0 else 0.0

    # What is told.

    def _conclude(self, state: State, what: str) -> None:
        notes = list(self.notes)
        if self._translations:
            notes.append(f"CLIP-G of the base's {' and '.join(self._translations)} drives the refiner")
        if self._left_out:
            notes.append(f"it goes without their {' and '.join(sorted(self._left_out))}, made for the base alone")
        text = f"{self.record['base_steps']} + {self.record['refiner_steps']} steps, {what}"
        self._tell(verdicts.Line(state, "; ".join([text, *notes])))

    def _keep(self, settings: Ensemble | ImageToImage) -> None:
        """Record the handoff itself beside the plans of the two models."""
        (mode,) = (name for name, kind in MODES.items() if isinstance(settings, kind))
        told = {"stem": STEM, "title": TITLE, "settings": {"mode": mode, **asdict(settings)}, "nodes": [self.node.id]}
        metadata.keep(self.where, settings, self._total, [{**told, **asdict(self.line)}])

    def _tell(self, line: verdicts.Line) -> None:
        self.line = line
        verdicts.publish(self.where, self.node, line, self.record, (self.number, STEM))


def _has_timesteps(sampling: Any) -> bool:
    """Whether a model counts its noise levels in training timesteps."""
    discrete, edm = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.ModelSamplingDiscreteEDM
    return isinstance(sampling, discrete) and not isinstance(sampling, edm)


def _level(sampling: Any, sigma: torch.Tensor) -> str:
    """A noise level in the words of a model."""
    return f"timestep {int(sampling.timestep(sigma))}" if _has_timesteps(sampling) else f"sigma {float(sigma):.3f}"


def hand_over(node: type[io.ComfyNode], base: Part, refiner: Part, call: Call, mode: dict[str, Any]) -> io.NodeOutput:
    """The output of the node: the LATENT, and the base's at the handoff.

    Args:
        mode: the node's input: which one, and its own inputs.
    """
    settings = dict(mode)
    return Handoff(node, base, refiner, call).execute(MODES[settings.pop("mode")](**settings))
