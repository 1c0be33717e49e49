"""Measures models against each other: the same sampler call, interleaved, with what each one cost and gave.

A variant is a model with a plan. The baseline and the candidate are wired by the user; since a plan
is data, an ablation makes more variants from the candidate's.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..measuring.fidelity import Fidelity, amplified_difference, compare, mean, worst
from ..measuring.memory import Peak
from ..measuring.report import Measured, Report, Role, Variant, to_markdown
from .host import machine
from .host.machine import clock
from .inputs import check_prompt, explaining, refusing, undecoded, unsampled
from .latents import as_sampled
from .node import node_of
from .plan import models
from .plan.plan import Entry, Plan, plan_of
from .plan.record import outcome
from .rivals import EasyCache, fewer_steps, matched
from .run.probe import Probe, compiled
from .run.sampling import with_plan
from .telling import verdicts
from .telling.teller import Audience

ABLATIONS = ("off", "each alone", "leave one out")
RIVALS = 2
CLEARLY = 0.9
"""Of how much of what its evaluations say a candidate's time must be, to count in their place."""

FOLDER = "slipstream"
PREFIX = "benchmark"


@dataclass(frozen=True)
class SamplerCall:
    """What is sampled: the inputs of the host's KSampler node; and the title of the node that has it sampled."""

    positive: Any
    negative: Any
    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    title: str = "Benchmark"

    def latent_for(self, model: Any) -> torch.Tensor:
        """The latent as the host samples it.

        Raises:
            ValueError: it is several latents in one, which cannot be compared.
        """
        if getattr(self.latent["samples"], "is_nested", False):
            raise ValueError(
                f"{self.title}: latent_image should be one latent, but holds several in one (as for video with sound). "
                "Measure such a workflow with Slipstream's Report node."
            )
        with self._explaining(model):
            return as_sampled(model, self.latent)

    def _explaining(self, model: Any) -> AbstractContextManager[None]:
        prompts = {"positive": self.positive, "negative": self.negative}
        return explaining(self.title, unsampled(model, ("latent_image", self.latent["samples"]), prompts))

    def prepare(
        self, model: Any, callback: Callable[..., None] | None = None, last_step: int | None = None
    ) -> Callable[[], torch.Tensor]:
        """The sampler call on a model, as the KSampler node makes it, with everything before it done."""
        latent = self.latent_for(model)
        noise = comfy.sample.prepare_noise(latent, self.seed, self.latent.get("batch_index"))

        def sample() -> torch.Tensor:
            with self._explaining(model):
                samples: torch.Tensor = comfy.sample.sample(
                    model,
                    noise,
                    self.steps,
                    self.cfg,
                    self.sampler_name,
                    self.scheduler,
                    self.positive,
                    self.negative,
                    latent,
                    denoise=self.denoise,
                    last_step=last_step,
                    noise_mask=self.latent.get("noise_mask"),
                    callback=callback,
                    disable_pbar=True,
                    seed=self.seed,
                )
            return samples

        return sample


@dataclass(frozen=True)
class Result:
    """What a run gave: its latent, and the pictures decoded from it, (B, H, W, C), if there is a VAE."""

    latent: torch.Tensor
    images: torch.Tensor | None

    def not_finite(self) -> str | None:
        """What of it has NaN or infinite values, if anything has."""
        if not torch.isfinite(self.latent).all():
            return "latent"
        return "picture" if self.images is not None and not torch.isfinite(self.images).all() else None


class Subject:
    """One variant while it is measured.

    Args:
        steps: to sample with in the place of the call's.
        easycache: what is on the model, if core's EasyCache is measured.

    Attributes:
        variant: its part of the report.
        result: of the first run with the seed of this round, until it is let go of.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        model: Any,
        vae: Any,
        is_decode_timed: bool,
        steps: int | None = None,
        easycache: EasyCache | None = None,
    ):
        self.variant = Variant(name, role, [entry.as_dict() for entry in plan_of(model).entries])
        self.result: Result | None = None
        self.model = model
        # An ablation's runs would overwrite on the nodes what the whole plan did, and a rival's are none of its.
        self.audience = Audience(self._hear, name if role in ("baseline", "candidate") else None)
        self._vae = vae
        self._is_decode_timed = is_decode_timed
        self._steps = steps
        self._easycache = easycache
        self._latents: dict[int, torch.Tensor] = {}
        self._found: list[Fidelity] = []

    def _hear(self, told: list[tuple[Entry, verdicts.Line]]) -> None:
        self.variant.verdicts = [{"title": entry.config.title, **asdict(line)} for entry, line in told]

    @property
    def weights(self) -> tuple[int, Any]:
        """What identifies the weights it samples with."""
        return id(self.model.model), self.model.patches_uuid

    def settle(self, call: SamplerCall) -> None:
        """One step, that nobody is told of."""
        unheard = Audience(lambda told: None, None)
        self._own(call).prepare(Probe(self.model.load_device).on(self.model, unheard), last_step=1)()

    def run(self, call: SamplerCall, callback: Callable[..., None]) -> Measured:
        """One run: sampled, and decoded if it is the first one with its seed or decoding is measured."""
        call = self._own(call)
        probe = Probe(self.model.load_device)
        sample = call.prepare(probe.on(self.model, self.audience), callback)
        graphs, compile_s = compiled()
        latent, seconds, (memory, ram) = timed(self.model.load_device, sample)
        graphs_after, compile_s_after = compiled()
        measured = Measured(
            seconds=seconds - probe.loading_s,
            loading_s=probe.loading_s,
            step_s=probe.step_s,
            evaluations=probe.evaluations,
            predictions=probe.predictions,
            rows=probe.rows,
            memory=memory,
            ram=ram,
            graphs=graphs_after - graphs,
            compile_s=compile_s_after - compile_s,
        )
        if self._easycache is not None:
            reached = self._easycache.take()
            predictions = round(probe.predictions * reached / max(1, probe.rows))
            measured = replace(measured, rows=reached, predictions=predictions)
        is_first = call.seed not in self._latents
        # NaN is not equal to itself.
        if not is_first and not torch.equal(latent.nan_to_num(), self._latents[call.seed].nan_to_num()):
            self.note("its runs differ though their seed is the same: the picture is the first run's")
        images = None
        if self._vae is not None and (is_first or self._is_decode_timed):
            images, seconds, (memory, _) = self.decode(latent, call.title)
            if self._is_decode_timed:
                measured = replace(measured, decode_s=seconds, decode_memory=memory)
        if is_first:
            self._latents[call.seed] = latent
            self.result = Result(latent, images)
        return measured

    def _own(self, call: SamplerCall) -> SamplerCall:
        return call if self._steps is None else replace(call, steps=self._steps)

    def decode(self, latent: torch.Tensor, title: str) -> tuple[torch.Tensor | None, float, tuple[Peak, ...]]:
        """The pictures of a latent, (B, H, W, C), None if the VAE gives none; the seconds and memory it took."""
        vae = self._vae
        vae.throw_exception_if_invalid()
        # What it needs is brought to the device, and what is in its way taken off, before the clock starts.
        images_alone = latent[:, :, 0] if vae.latent_dim == 2 and latent.ndim == 5 else latent
        with explaining(title, undecoded(vae, images_alone)):
            memory = vae.memory_used_decode(images_alone.shape, vae.vae_dtype)
            comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
            images, seconds, peaks = timed(vae.device, lambda: vae.decode(latent))
        if images.ndim not in (4, 5) or images.shape[-1] not in (3, 4):
            self.note("its VAE gives no pictures: only the latents are compared")
            return None, seconds, peaks
        # Frames of a video are pictures, as for the host's VAEDecode.
        return images.reshape(-1, *images.shape[-3:]).float().cpu(), seconds, peaks

    def note(self, problem: str) -> None:
        """Add a problem, once."""
        if problem not in self.variant.problems:
            self.variant.problems.append(problem)

    def compare(self, baseline: Subject) -> None:
        """Say how far its results are from the baseline's, with those of this round, if they are new."""
        own, other = self.result, baseline.result
        if own is None or other is None:
            return
        broken = own.not_finite()
        if broken:
            self.note(f"its {broken} has NaN or infinite values")
        if self is baseline:
            return
        if broken == "latent" or other.not_finite() == "latent":
            return
        if own.latent.shape != other.latent.shape:
            shapes = f"{tuple(own.latent.shape)} against {tuple(other.latent.shape)}"
            self.note(f"its latent has another shape than the baseline's ({shapes}): not compared")
            return
        images = other.images, own.images
        if broken or other.not_finite():
            images = None, None
        elif own.images is not None and other.images is not None and own.images.shape != other.images.shape:
            self.note("its picture has another size than the baseline's: only the latents are compared")
            images = None, None
        latents = other.latent, own.latent
        if images[0] is None or images[1] is None:
            self._found.append(compare(*latents))
        else:
            pairs = zip(images[0], images[1], strict=True)
            self._found += (compare(*latents, one[None], two[None]) for one, two in pairs)
        self.variant.fidelity = mean(self._found)
        self.variant.worst = worst(self._found) if len(self._latents) > 1 else None

    def forget(self) -> None:
        """Let go of this round's result: the pictures of a video are large."""
        self.result = None


def timed(device: torch.device, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, tuple[Peak, ...]]:
    """What some work gives, the seconds it takes on a device, and the memory of device and process meanwhile."""
    machine.release_unused()
    with machine.watch_memory(device) as memory:
        began = clock(device)
        result = work()
        seconds = clock(device) - began
    return result, seconds, memory.peaks


def title_of(model: Any, call: SamplerCall) -> str:
    """What is sampled, in one line: the model, the size, the sampler."""
    shape = call.latent_for(model).shape
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    size = f"{shape[-1] * ratio}x{shape[-2] * ratio}"
    if len(shape) == 5:
        size += f", {shape[2]} latent frames"
    if shape[0] > 1:
        size += f", batch of {shape[0]}"
    name = models.describe(model, model.model_options).name
    return f"{name}, {size}, {call.steps} steps of {call.sampler_name}, {call.scheduler}, cfg {call.cfg:g}"


class Benchmark:
    """One benchmark, from the first warm-up to the saved report.

    Args:
        node: the node class, as `execute` gets it, with the host's hidden inputs.
        subjects: the baseline first, then the candidate.
        call: what is sampled.
        runs: measured rounds; more, if there are more seeds.
        save: whether the report is kept in the host's output folder.
        seeds: how many seeds the rounds take in turn, from the call's on.
        rival: makes a subject of a rival, of its name, model and the rest of what `Subject` takes; None for no rivals.
    """

    def __init__(
        self,
        node: type[io.ComfyNode],
        subjects: list[Subject],
        call: SamplerCall,
        runs: int,
        save: bool,
        seeds: int = 1,
        rival: Callable[..., Subject] | None = None,
    ):
        self.node = node_of(node)
        self.where = verdicts.current_prompt()
        self.number = subjects[0].audience.number
        self.subjects = subjects
        self.call = call
        self.runs = max(runs, seeds - 1)
        self.seeds = seeds
        self._rival = rival
        self.images: list[torch.Tensor] = []
        self._files = _Files(save)
        self._weights: tuple[int, Any] | None = None
        total = (self.runs + 1) * (len(subjects) + (RIVALS if rival else 0))
        self.bar = comfy.utils.ProgressBar(total * call.steps)
        device = subjects[0].model.load_device
        _, memory_is, is_device_memory = machine.device_memory(device)
        self.report = Report(
            title=title_of(subjects[0].model, call),
            settings=self._settings(),
            machine=machine.describe(device),
            memory_is=memory_is,
            is_device_memory=is_device_memory,
            variants=[subject.variant for subject in subjects],
            total=total,
        )
        if machine.waiting(device) is None:
            self.report.notes.append(f"{device.type} cannot be waited for: times may be those of queueing work")

    def _settings(self) -> dict[str, Any]:
        names = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
        shape = list(self.call.latent_for(self.subjects[0].model).shape)
        # A text, since seeds go beyond what JavaScript's numbers hold.
        fixed = {"runs": self.runs, "seed": str(self.call.seed), "seeds": self.seeds, "latent": shape}
        return fixed | {name: getattr(self.call, name) for name in names}

    def execute(self) -> None:
        """Measure everything, telling the page after each run.

        Whatever ends it, what was measured so far is told and saved.
        """
        error: BaseException | None = None
        try:
            for number in range(self.runs + 1):
                call = replace(self.call, seed=(self.call.seed + number % self.seeds) % 2**64)
                for subject in self.subjects:
                    self._tell(f"{f'round {number} of {self.runs}' if number else 'warm-up'}: {subject.variant.name}")
                    self._measure(subject, call, is_warm_up=number == 0)
                if number == 0 and self._rival is not None:
                    self._add_rivals(self._rival)
                for subject in self.subjects:
                    subject.forget()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.report.status, self.report.reason = outcome(error)
            self._write(lambda: self._files.save_report(self.report))
            self._tell()
            # Its traceback holds this frame, and the tensors of those below: no cycle may keep them.
            error = None

    def _measure(self, subject: Subject, call: SamplerCall, is_warm_up: bool) -> None:
        self._keep(subject, self._run(subject, call), is_warm_up)

    def _run(self, subject: Subject, call: SamplerCall) -> Measured:
        done = self.report.done * self.call.steps
        # The model's own layers stop for an interrupt; here is where one between two runs is seen.
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._make_ready(subject)
        return subject.run(call, lambda step, *_: self.bar.update_absolute(done + step + 1))

    def _keep(self, subject: Subject, measured: Measured, is_warm_up: bool) -> None:
        self.report.done += 1
        self.bar.update_absolute(self.report.done * self.call.steps)
        subject.compare(self.subjects[0])
        if is_warm_up:
            subject.variant.warm_up = measured
            self._keep_images(subject)
        else:
            subject.variant.runs.append(measured)

    # Rivals

    def _add_rivals(self, make: Callable[..., Subject]) -> None:
        """Measure what does as much work as the candidate without it, from here on."""
        share = self._share()
        if share >= 1:
            self.report.notes.append("no rivals: the candidate leaves out no work that they could leave out too")
        for find in (self._fewer_steps, self._easycache) if share < 1 else ():
            found = find(make, share)
            if found is not None:
                subject, measured = found
                self.subjects.append(subject)
                self.report.variants.append(subject.variant)
                self._keep(subject, measured, is_warm_up=True)
        self.report.total = (self.runs + 1) * len(self.subjects)

    def _share(self) -> float:
        """The candidate's work over the baseline's: as rows through the network; as time where that is clearly less,
        for what works within an evaluation."""
        times, rows = [], []
        for subject in self.subjects[:2]:
            self._tell(f"rivals: how fast {subject.variant.name} is")
            # Once more: the first run of a process takes longer than any other.
            measured = self._run(subject, self.call)
            times.append(measured.seconds)
            rows.append(measured.rows)
        by_rows, by_time = rows[1] / max(1, rows[0]), times[1] / times[0]
        return by_time if by_time < CLEARLY * by_rows else by_rows

    def _fewer_steps(self, make: Callable[..., Subject], share: float) -> tuple[Subject, Measured] | None:
        steps = fewer_steps(self.call.steps, share)
        if steps >= self.call.steps:
            self.report.notes.append("no fewer steps are as much work as the candidate's")
            return None
        subject = make(f"{steps} steps", self.subjects[0].model, steps=steps)
        self._tell(f"warm-up: {subject.variant.name}")
        return subject, self._run(subject, self.call)

    def _easycache(self, make: Callable[..., Subject], share: float) -> tuple[Subject, Measured] | None:
        """With the threshold at which it evaluates about as much as the candidate."""
        baseline = self.subjects[0]
        assert baseline.variant.warm_up is not None
        tried: dict[float, tuple[Subject, Measured]] = {}

        def rows_at(threshold: float) -> float:
            name = f"EasyCache {threshold:g}"
            self._tell(f"rivals: {name}, to find as many evaluations as the candidate's")
            cached = EasyCache(baseline.model, threshold)
            subject = make(name, cached.model, easycache=cached)
            tried[threshold] = subject, self._run(subject, self.call)
            return tried[threshold][1].rows

        problem = ""
        try:
            threshold, _, runs = matched(rows_at, share * baseline.variant.warm_up.rows)
        except ImportError:
            problem = "this ComfyUI has none"
        except Exception as error:
            status, problem = outcome(error)
            if status == "interrupted":
                raise
        if problem:
            self.report.notes.append(f"no EasyCache: {problem}")
            return None
        self.report.notes.append(f"EasyCache's threshold was found by {runs} runs, to evaluate what the candidate does")
        return tried[threshold]

    def _make_ready(self, subject: Subject) -> None:
        """Bring the device into the state it would be in if nothing but this variant ran."""
        others = [other.model.model for other in self.subjects if other.model.model is not subject.model.model]
        machine.take_off_device(others, subject.model.load_device)
        if machine.is_dynamic(subject.model) and subject.weights != self._weights:
            subject.settle(self.call)
        self._weights = subject.weights

    def _keep_images(self, subject: Subject) -> None:
        """Save a variant's picture. Baseline, candidate and their difference are the node's output too."""
        images = None if subject.result is None else subject.result.images
        if images is None:
            return
        variant = subject.variant
        variant.image = self._write(lambda: self._files.save_picture(images, variant.name))
        if variant.role not in ("baseline", "candidate"):
            return
        self.images.append(images)
        if variant.role == "candidate" and len(self.images) == 2 and self.images[0].shape == images.shape:
            difference = amplified_difference(self.images[0], images)
            self.images.append(difference)
            self.report.difference = self._write(lambda: self._files.save_picture(difference, "difference"))

    def _write(self, write: Callable[[], Any]) -> Any:
        """Write a file. A folder that is full or read-only must not cost the measurement: it is noted."""
        try:
            return write()
        except OSError as error:
            note = f"not everything could be saved: {error}"
            self.report.notes += [note] if note not in self.report.notes else []
            return None

    def pictures(self) -> torch.Tensor | ExecutionBlocker:
        """What the IMAGE output gives: baseline, candidate, difference, (3 B, H, W, C)."""
        if len(self.images) == 3:
            return torch.cat(self.images)
        return ExecutionBlocker(
            "Benchmark: there are no images to give. They need a VAE for pictures at the vae input, and the same size."
        )

    def _tell(self, doing: str | None = None) -> None:
        """Show the report as it stands on the node."""
        report = self.as_shown()
        line = verdicts.Line("running", doing) if doing else self._result(report)
        verdicts.publish(self.where, self.node, line, report, (self.number, PREFIX))

    def as_shown(self) -> dict[str, Any]:
        """The report, with itself as text."""
        report = self.report.as_dict()
        return {**report, "markdown": to_markdown(report)}

    def _result(self, report: dict[str, Any]) -> verdicts.Line:
        if self.report.status == "finished":
            return verdicts.Line("active", report["summary"])
        so_far = f"after {self.report.done} of {self.report.total} runs"
        if self.report.status == "interrupted":
            return verdicts.Line("interrupted", f"interrupted {so_far}: {report['summary']}")
        return verdicts.Line("failed", f"failed {so_far} ({self.report.reason}): {report['summary']}")


class _Files:
    """Where a benchmark's files go: the host's output folder if they are to be kept, else its temporary one."""

    def __init__(self, is_kept: bool):
        self.is_kept = is_kept
        self.type = "output" if is_kept else "temp"
        root = folder_paths.get_output_directory() if is_kept else folder_paths.get_temp_directory()
        self.folder = Path(root) / FOLDER

    @cached_property
    def stem(self) -> str:
        """What their names begin with. A number is taken by making its file: nothing is ever overwritten."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_kept:
            return f"{PREFIX}_{uuid4().hex}"
        for number in itertools.count(1):
            stem = f"{PREFIX}_{number:05}"
            if not any(self.folder.glob(f"{stem}[._]*")):
                with suppress(FileExistsError):
                    (self.folder / f"{stem}.json").touch(exist_ok=False)
                    return stem
        raise AssertionError

    def _named(self, name: str) -> dict[str, str]:
        return {"filename": name, "subfolder": FOLDER, "type": self.type}

    def save_picture(self, images: torch.Tensor, name: str) -> dict[str, str]:
        """The first picture of a (B, H, W, C) batch as PNG."""
        file = f"{self.stem}_{name.replace(' ', '-')}.png"
        pixels = images[0].nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(self.folder / file)
        return self._named(file)

    def save_report(self, report: Report) -> None:
        """Write it as JSON and Markdown, if it is to be kept."""
        if not self.is_kept:
            return
        names = {"json": f"{self.stem}.json", "markdown": f"{self.stem}.md"}
        saved = {kind: self._named(name) for kind, name in names.items()}
        data = {**report.as_dict(), "saved": saved, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        texts = {"json": json.dumps(data, indent=1) + "\n", "markdown": to_markdown(data)}
        for kind, text in texts.items():
            (self.folder / names[kind]).write_text(text, encoding="utf-8")
        report.saved = saved


def _rival(name: str, model: Any, vae: Any, is_decode_timed: bool, **more: Any) -> Subject:
    return Subject(name, "rival", model, vae, is_decode_timed, **more)


def _ablated(plan: Plan, ablation: str) -> list[tuple[str, Plan]]:
    """The plans that tell what each method of a plan gives: by itself, or by being missing."""
    if ablation == "each alone":
        # One method alone is the candidate itself.
        entries = plan.entries if len(plan.entries) > 1 else ()
        return [(f"{entry.config.title} alone", Plan((entry,))) for entry in entries]
    if ablation == "leave one out":
        return [
            (f"without {left_out.config.title}", Plan(tuple(entry for entry in plan.entries if entry is not left_out)))
            for left_out in plan.entries
        ]
    return []


def check_kornia(title: str) -> None:
    """Before the first run, and not after it: what compares the pictures can be imported."""
    try:
        importlib.import_module("kornia.metrics")
    except (Exception, SystemExit) as error:
        raise RuntimeError(
            f"{title}: kornia, which ComfyUI itself installs, can't be imported ({type(error).__name__}: {error}). "
            f'Install it again: "{sys.executable}" -m pip install --force-reinstall --no-deps kornia kornia_rs. Or '
            "disconnect the vae: latents are compared without it."
        ) from error


def benchmark(
    node: type[io.ComfyNode],
    baseline: Any,
    candidate: Any,
    call: SamplerCall,
    runs: int,
    vae: Any,
    candidate_vae: Any,
    ablation: str,
    save: bool,
    rivals: bool = False,
    seeds: int = 1,
) -> io.NodeOutput:
    """The output of the node: pictures and report, and the report's data for the page.

    Args:
        baseline, candidate: ModelPatcher.
        vae: the VAE of the baseline, and of the candidate if that has none of its own; None for neither.
        ablation: one of `ABLATIONS`.
        rivals: whether fewer steps and core's EasyCache are measured too, with as much work as the candidate.
        seeds: how many seeds are compared.

    Raises:
        ValueError: a prompt is empty, or what came in is not this model's.
        RuntimeError: what compares pictures can't be imported.
    """
    with refusing(node):
        check_prompt("Benchmark", "positive", call.positive)
        check_prompt("Benchmark", "negative", call.negative, call.cfg)
        for model in (baseline, candidate):
            call.latent_for(model)
    if vae is not None:
        check_kornia("Benchmark")
    baseline, candidate = (machine.as_sampled(model, call.positive, call.negative) for model in (baseline, candidate))
    is_decode_timed = candidate_vae is not None
    other_vae = candidate_vae if candidate_vae is not None else vae
    plans = _ablated(plan_of(candidate), ablation)
    subjects = [
        Subject("baseline", "baseline", baseline, vae, is_decode_timed),
        Subject("candidate", "candidate", candidate, other_vae, is_decode_timed),
        *(Subject(name, "ablation", with_plan(candidate, plan), other_vae, is_decode_timed) for name, plan in plans),
    ]
    rival = partial(_rival, vae=vae, is_decode_timed=is_decode_timed) if rivals else None
    measured = Benchmark(node, subjects, call, runs, save, seeds, rival)
    if ablation != "off" and not plans:
        found = "one Slipstream method" if plan_of(candidate).entries else "no Slipstream method"
        measured.report.notes.append(f"ablation '{ablation}' has nothing to add: the candidate has {found}")
    measured.execute()
    report = measured.as_shown()
    return io.NodeOutput(measured.pictures(), report["markdown"], ui={"slipstream_report": [report]})
