"""Measures models against each other: the same sampler call, interleaved, with what each one cost and gave.

A variant is a model with a plan. The baseline and the candidate are wired by the user; since a plan
is data, an ablation makes more variants from the candidate's.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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

from ..measuring.fidelity import amplified_difference, compare
from ..measuring.memory import Peak
from ..measuring.report import Measured, Report, Role, Variant, to_markdown
from . import machine, models, verdicts
from .machine import clock
from .node import node_of, supported
from .plan import Entry, Plan, plan_of
from .probe import Probe, compiled
from .record import outcome
from .sampling import Audience, with_plan

ABLATIONS = ("off", "each alone", "leave one out")
FOLDER = "slipstream"
PREFIX = "benchmark"


@dataclass(frozen=True)
class SamplerCall:
    """What is sampled: the inputs of the host's KSampler node."""

    positive: Any
    negative: Any
    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def prepare(self, model: Any, callback: Callable[..., None]) -> Callable[[], torch.Tensor]:
        """The sampler call on a model, as the KSampler node makes it, with everything before it done.

        Raises:
            ValueError: the latent is one of several in one, which cannot be compared.
        """
        latent = self.latent["samples"]
        if getattr(latent, "is_nested", False):
            raise ValueError(
                "Benchmark: latent_image should be one latent, but holds several in one (as for video with sound). "
                "Measure such a workflow with Slipstream's Report node."
            )
        # The host's own spelling.
        ratios = {name: self.latent.get(name) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
        fix = comfy.sample.fix_empty_latent_channels
        latent = fix(model, latent, **supported(fix, **ratios))
        noise = comfy.sample.prepare_noise(latent, self.seed, self.latent.get("batch_index"))
        return lambda: comfy.sample.sample(
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
            noise_mask=self.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=True,
            seed=self.seed,
        )


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

    Attributes:
        variant: its part of the report.
        result: of its first run.
    """

    def __init__(self, name: str, role: Role, model: Any, vae: Any, is_decode_timed: bool):
        self.variant = Variant(name, role, [_method(entry) for entry in plan_of(model).entries])
        self.result: Result | None = None
        self.model = model
        # An ablation's runs would overwrite on the nodes what the whole plan did.
        self.audience = Audience(self._hear, None if role == "ablation" else name)
        self._vae = vae
        self._is_decode_timed = is_decode_timed

    def _hear(self, told: list[tuple[Entry, verdicts.Line]]) -> None:
        self.variant.verdicts = [{"title": entry.config.title, **asdict(line)} for entry, line in told]

    def run(self, call: SamplerCall, callback: Callable[..., None]) -> Measured:
        """One run: sampled, and decoded if it is the first one or decoding is measured."""
        machine.leave_alone_on_device(self.model)
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
        # NaN is not equal to itself.
        if self.result is not None and not torch.equal(latent.nan_to_num(), self.result.latent.nan_to_num()):
            self.note("its runs differ though their seed is the same: the picture is the first run's")
        images = None
        if self._vae is not None and (self.result is None or self._is_decode_timed):
            images, seconds, (memory, _) = self._decode(latent)
            if self._is_decode_timed:
                measured = replace(measured, decode_s=seconds, decode_memory=memory)
        self.result = self.result or Result(latent, images)
        return measured

    def _decode(self, latent: torch.Tensor) -> tuple[torch.Tensor, float, tuple[Peak, ...]]:
        # Its weights belong on the device before the clock starts, as the model's.
        comfy.model_management.load_models_gpu([self._vae.patcher])
        images, seconds, peaks = timed(self._vae.device, lambda: self._vae.decode(latent))
        # Frames of a video are pictures, as for the host's VAEDecode.
        return images.reshape(-1, *images.shape[-3:]).float().cpu(), seconds, peaks

    def note(self, problem: str) -> None:
        """Add a problem, once."""
        if problem not in self.variant.problems:
            self.variant.problems.append(problem)

    def compare(self, baseline: Subject) -> None:
        """Say how far the first run's result is from the baseline's."""
        own, other = self.result, baseline.result
        if own is None or other is None:
            return
        broken = own.not_finite()
        if broken:
            self.note(f"its {broken} has NaN or infinite values")
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
        self.variant.fidelity = compare(other.latent, own.latent, *images)


def timed(device: torch.device, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, tuple[Peak, ...]]:
    """What some work gives, the seconds it takes on a device, and the memory of device and process meanwhile."""
    machine.release_unused()
    with machine.watch_memory(device) as memory:
        began = clock(device)
        result = work()
        seconds = clock(device) - began
    return result, seconds, memory.peaks


class Benchmark:
    """One benchmark, from the first warm-up to the saved report.

    Args:
        node: the node class, as `execute` gets it, with the host's hidden inputs.
        subjects: the baseline first, then the candidate.
        call: what is sampled.
        runs: measured rounds.
        save: whether the report is kept in the host's output folder.
    """

    def __init__(self, node: type[io.ComfyNode], subjects: list[Subject], call: SamplerCall, runs: int, save: bool):
        self.node = node_of(node)
        self.where = verdicts.current_prompt()
        self.number = subjects[0].audience.number
        self.subjects = subjects
        self.call = call
        self.runs = runs
        self.files = _Files(save)
        self.bar = comfy.utils.ProgressBar((runs + 1) * len(subjects) * call.steps)
        device = subjects[0].model.load_device
        _, memory_is, is_device_memory = machine.device_memory(device)
        self.report = Report(
            title=self._title(),
            settings=self._settings(),
            machine=machine.describe(device),
            memory_is=memory_is,
            is_device_memory=is_device_memory,
            variants=[subject.variant for subject in subjects],
            total=(runs + 1) * len(subjects),
        )

    def _title(self) -> str:
        model, call = self.subjects[0].model, self.call
        shape = call.latent["samples"].shape
        ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
        size = f"{shape[-1] * ratio}x{shape[-2] * ratio}" + (f", batch of {shape[0]}" if shape[0] > 1 else "")
        name = models.describe(model, model.model_options).name
        return f"{name}, {size}, {call.steps} steps of {call.sampler_name}, {call.scheduler}, cfg {call.cfg:g}"

    def _settings(self) -> dict[str, Any]:
        names = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
        shape = list(self.call.latent["samples"].shape)
        return {"runs": self.runs, "latent": shape} | {name: getattr(self.call, name) for name in names}

    def execute(self) -> None:
        """Measure everything, telling the page after each run.

        Whatever ends it, what was measured so far is told and saved.
        """
        error: BaseException | None = None
        try:
            for number in range(self.runs + 1):
                for subject in self.subjects:
                    self._tell(f"{f'round {number} of {self.runs}' if number else 'warm-up'}: {subject.variant.name}")
                    self._measure(subject, is_warm_up=number == 0)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.report.status, self.report.reason = outcome(error)
            try:
                self.files.save_report(self.report)
            except OSError as unsaved:
                self.report.notes.append(f"the report could not be saved: {unsaved}")
            self._tell()

    def _measure(self, subject: Subject, is_warm_up: bool) -> None:
        done = self.report.done * self.call.steps
        # The model's own layers stop for an interrupt; here is where one between two runs is seen.
        comfy.model_management.throw_exception_if_processing_interrupted()
        measured = subject.run(self.call, lambda step, *_: self.bar.update_absolute(done + step + 1))
        self.report.done += 1
        self.bar.update_absolute(self.report.done * self.call.steps)
        if not is_warm_up:
            subject.variant.runs.append(measured)
            return
        subject.variant.warm_up = measured
        subject.compare(self.subjects[0])
        images = self._images(subject)
        if images is not None:
            subject.variant.image = self.files.save_picture(images, subject.variant.name)
        difference = self.difference()
        if difference is not None and self.report.difference is None:
            self.report.difference = self.files.save_picture(difference, "difference")

    @staticmethod
    def _images(subject: Subject) -> torch.Tensor | None:
        return None if subject.result is None else subject.result.images

    def difference(self) -> torch.Tensor | None:
        """Between baseline and candidate, amplified, (B, H, W, C); None where they cannot be compared."""
        baseline, candidate = (self._images(subject) for subject in self.subjects[:2])
        if baseline is None or candidate is None or baseline.shape != candidate.shape:
            return None
        return amplified_difference(baseline, candidate)

    def pictures(self) -> torch.Tensor | ExecutionBlocker:
        """What the IMAGE output gives: baseline, candidate, difference, (3 B, H, W, C)."""
        baseline, candidate = (self._images(subject) for subject in self.subjects[:2])
        if baseline is None or candidate is None:
            return ExecutionBlocker("Benchmark: there are no images without a VAE. Connect one to its vae input.")
        difference = self.difference()
        if difference is None:
            return ExecutionBlocker("Benchmark: baseline and candidate gave images of different sizes.")
        return torch.cat([baseline, candidate, difference])

    def _tell(self, doing: str | None = None) -> None:
        """Show the report as it stands on the node."""
        report = self.report.as_dict()
        line = verdicts.Line("running", doing) if doing else self._result(report)
        record = {**report, "markdown": to_markdown(report)}
        verdicts.publish(self.where, self.node, line, record, (self.number, PREFIX))

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
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stem = self._reserved() if is_kept else f"{PREFIX}_{uuid4().hex}"

    def _reserved(self) -> str:
        """The first free number, taken by making its file: nobody's report is ever overwritten."""
        for number in itertools.count(1):
            stem = f"{PREFIX}_{number:05}"
            try:
                (self.folder / f"{stem}.json").touch(exist_ok=False)
            except FileExistsError:
                continue
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


def _method(entry: Entry) -> dict[str, Any]:
    return {
        "stem": entry.config.stem,
        "title": entry.config.title,
        "settings": asdict(entry.config),
        "nodes": [node.id for node in entry.nodes],
    }


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
) -> io.NodeOutput:
    """The output of the node: pictures and report, and the report's data for the page.

    Args:
        baseline, candidate: ModelPatcher.
        vae: the VAE of the baseline, and of the candidate if that has none of its own; None for neither.
        ablation: one of `ABLATIONS`.
    """
    is_decode_timed = candidate_vae is not None
    other_vae = candidate_vae if candidate_vae is not None else vae
    plans = _ablated(plan_of(candidate), ablation)
    subjects = [
        Subject("baseline", "baseline", baseline, vae, is_decode_timed),
        Subject("candidate", "candidate", candidate, other_vae, is_decode_timed),
        *(Subject(name, "ablation", with_plan(candidate, plan), other_vae, is_decode_timed) for name, plan in plans),
    ]
    measured = Benchmark(node, subjects, call, runs, save)
    if ablation != "off" and not plans:
        found = "one Slipstream method" if plan_of(candidate).entries else "no Slipstream method"
        measured.report.notes.append(f"ablation '{ablation}' has nothing to add: the candidate has {found}")
    measured.execute()
    report = measured.report.as_dict()
    return io.NodeOutput(measured.pictures(), to_markdown(report), ui={"slipstream_report": [report]})
