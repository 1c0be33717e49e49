"""Tune: finds the fastest plan above a floor by measuring plans on the user's own model, prompts and seeds.

`measuring.search` decides what is tried. Here is what it needs of the host: a run of a plan at a picture, failures told
as results, and everything that was measured kept on disk, so that nothing is measured twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.utils
import folder_paths
import safetensors.torch
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..measuring import tuned
from ..measuring.fidelity import compare
from ..measuring.search import Candidate, Dial, Found, Level, Search
from ..measuring.trials import EXACT, Interleaved, Log, Task, Trial, from_data
from ..methods.method import Configuration
from ..methods.tune import Given, ladder
from .apply import with_entries
from .benchmark import Result, SamplerCall, Subject, check_kornia, title_of
from .host import identity, machine
from .inputs import check_prompt, refusing
from .node import node_of
from .plan import models, registry
from .plan.plan import Entry, plan_of
from .plan.record import outcome
from .plan.saved import as_data
from .saved_plans import described, path_of, write
from .telling import verdicts

METRIC = "SSIM"
FOLDER = ("slipstream", "tune")
"""In the host's folder for what belongs to its users."""

SCHEMA = 1
KEPT_MODELS = 6
"""Plans whose compiled code or quantized weights stay while others are tried."""

COMPILED_AGAIN = 3
"""Runs of a plan that may make graphs, before one counts all the same."""

BAR = 1000

_unfinished = itertools.count(1)
_token = 0


def fingerprint() -> int:
    """What changes when a search that was not finished should go on: the host's cache must not answer for it."""
    return _token


@dataclass(frozen=True)
class Prompts:
    """A pair of CONDITIONINGs."""

    positive: Any
    negative: Any

    @property
    def key(self) -> str:
        return identity.digest(self.positive, self.negative)


@dataclass(frozen=True)
class Wanted:
    """What a user asked for.

    Attributes:
        floor: the least similarity of the worst picture.
        seeds: how many seeds each prompt is tried with.
        minutes: how long it may take.
        may_use: one of `methods.tune.MAY_USE`.
        save_as: the name to save the plan under; empty: it is not saved.
        chosen: the name of a plan that was tried, to be used in the place of the best; empty for the best.
    """

    floor: float
    seeds: int
    minutes: float
    may_use: str
    save_as: str = ""
    chosen: str = ""


class Kept:
    """What is on disk of all searches of one model with one sampler call: the trials, and pictures.

    Args:
        about: what makes the trials comparable, as plain data; its digest is the name.
    """

    def __init__(self, about: dict[str, Any]):
        self.about = about
        self.folder = Path(folder_paths.get_user_directory()).joinpath(*FOLDER)
        self.name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.problem = ""
        self.log = Log(self._read())

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def pictures(self) -> Path:
        return self.folder / self.name

    def _read(self) -> list[Trial]:
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            if data["schema"] == SCHEMA and data["about"] == self.about:
                return from_data(data["trials"])
            self.problem = "what was kept of earlier runs is of another version of Slipstream, and was measured anew"
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.problem = f"what was kept of earlier runs can't be read, and was measured anew ({error})"
        return []

    def write(self) -> None:
        """Write all trials. A new file, renamed: a crash leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {"schema": SCHEMA, "about": self.about, "trials": self.log.as_data()}
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.file)

    def _named(self, plan: str, picture: str, suffix: str) -> Path:
        return self.pictures / f"{hashlib.sha256(f'{plan}@{picture}'.encode()).hexdigest()[:16]}{suffix}"

    def put(self, plan: str, picture: str, result: Result) -> None:
        """Keep a latent, and its picture small."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        latent = {"latent": result.latent.contiguous().cpu()}
        safetensors.torch.save_file(latent, self._named(plan, picture, ".safetensors"))
        if result.images is not None:
            pixels = result.images[0, ..., :3].nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(self._named(plan, picture, ".webp"), quality=92)

    def latent(self, plan: str, picture: str) -> torch.Tensor | None:
        """A latent that was kept; None where it is not there any more, or only a part of it."""
        try:
            return safetensors.torch.load_file(self._named(plan, picture, ".safetensors"))["latent"]
        except (OSError, KeyError, safetensors.SafetensorError):
            return None

    def shown(self, plan: str, picture: str) -> dict[str, str] | None:
        """A picture that was kept, where the page can see it, as the host names it."""
        path = self._named(plan, picture, ".webp")
        if not path.is_file():
            return None
        name = f"tune_{self.name}_{path.name}"
        place = Path(folder_paths.get_temp_directory()) / "slipstream"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / name).exists():
            shutil.copyfile(path, place / name)
        return {"filename": name, "subfolder": "slipstream", "type": "temp"}


class Tuning:
    """One search, from the first run to the report.

    Args:
        node: the node class, as `execute` gets it, with the host's hidden inputs.
        model: ModelPatcher, as it came.
        call: what is sampled, with the first prompts and the first seed.
    """

    def __init__(
        self,
        node: type[io.ComfyNode],
        model: Any,
        vae: Any,
        call: SamplerCall,
        prompts: Sequence[Prompts],
        wanted: Wanted,
    ):
        self.node = node_of(node)
        self.where = verdicts.current_prompt()
        self.model = model
        self.vae = vae
        self.call = call
        self.wanted = wanted
        self._prompts = {one.key: one for one in prompts}
        self._began = time.monotonic()
        self._session = uuid4().hex[:12]
        self._references: dict[str, Result] = {}
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._inner: dict[int, Any] = {}
        self._ready: set[str] = set()
        self._weights: Any = None
        self._exact_rows = 0
        self._is_warm = False
        self._run_number = next(_numbers)
        self._notes: list[str] = []
        device = model.load_device
        described_model = models.describe(model, model.model_options)
        taken = frozenset(entry.config.stem for entry in plan_of(model).entries)
        self._dials, left_out = ladder(wanted.may_use, Given(described_model, call.cfg, taken), registry.kind)
        self._notes += left_out
        self.kept = Kept(self._about())
        self._notes += [self.kept.problem] if self.kept.problem else []
        self.log = Log(self.kept.log.trials, self._changed)
        self.kept.log = self.log
        self._configs: dict[str, Configuration] = {}
        self.search = Search(
            self._ladder(),
            [self._picture(prompt, seed) for seed in self._seeds() for prompt in self._prompts],
            self._fresh,
            self.log,
            Interleaved(self._run, self.log, self._has_reference),
            wanted.floor,
            call.steps,
            self._left_s,
            may_run=not wanted.chosen.strip(),
        )
        self.bar = comfy.utils.ProgressBar(BAR)
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "title": title_of(model, call),
            "settings": {**asdict(wanted), "seed": str(call.seed), "prompts": len(self._prompts)},
            "machine": machine.describe(device),
            "metric": METRIC,
            "floor": wanted.floor,
            "status": "running",
            "reason": "",
            "chosen": None,
            "notes": self._notes,
        }

    # What is tried

    def _about(self) -> dict[str, Any]:
        """What makes trials comparable."""
        call, model = self.call, self.model
        described_machine = machine.describe(model.load_device)
        versions = ("device", "device_type", "processor", "threads", "python", "torch", "comfyui", "slipstream")
        return {
            "model": identity.of_weights(model),
            "patches": identity.of_patches(model),
            "plan": as_data(plan_of(model)),
            "vae": identity.of_weights(self.vae.patcher),
            "latent": identity.digest({name: one for name, one in call.latent.items() if name != "batch_index"}),
            "steps": call.steps,
            "cfg": call.cfg,
            "sampler_name": call.sampler_name,
            "scheduler": call.scheduler,
            "denoise": call.denoise,
            "metric": METRIC,
            **{name: described_machine[name] for name in versions},
        }

    def _ladder(self) -> list[Dial]:
        """The dials as the search knows them."""
        found = []
        for dial in self._dials:
            levels = []
            for rank, config in enumerate(dial.configs):
                key = json.dumps({"stem": config.stem, "settings": asdict(config)}, sort_keys=True)
                self._configs[key] = config
                levels.append(Level(dial.row.stem, rank, key, described(config)))
            found.append(Dial(dial.row.stem, tuple(levels), dial.row.is_exact, frozenset(dial.row.excludes)))
        return found

    def _seeds(self) -> list[int]:
        return [(self.call.seed + number) % 2**64 for number in range(self.wanted.seeds)]

    def _fresh(self, number: int) -> list[str]:
        """Pictures of seeds that the search never sees: one of each prompt, and at least two."""
        per_prompt = 1 if len(self._prompts) > 1 else 2
        found = []
        for index in range(per_prompt):
            name = f"{self.call.seed} {number} {index}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            found += [self._picture(prompt, seed) for prompt in self._prompts]
        return found

    @staticmethod
    def _picture(prompt: str, seed: int) -> str:
        return f"{prompt} {seed}"

    def _left_s(self) -> float:
        return self.wanted.minutes * 60 - (time.monotonic() - self._began)

    # One run

    def _has_reference(self, picture: str) -> bool:
        if picture not in self._references and self.log.has(EXACT, picture):
            latent = self.kept.latent(EXACT, picture)
            if latent is not None:
                self._references[picture] = Result(latent, self._decoded(latent))
        return picture in self._references

    def _decoded(self, latent: torch.Tensor) -> torch.Tensor | None:
        return self._subject(self.model).decode(latent, "Tune")[0]

    def _run(self, task: Task) -> Trial:
        """One run, whatever comes of it.

        Raises:
            RuntimeError: the exact model itself can't be sampled or gives pictures that are not finite.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        one = task.of or Candidate()
        self._tell(f"{one.name}, {len(self.log.trials) + 1} runs so far")
        problem = ""
        try:
            trial = self._measured(task, one)
        except Exception as error:
            status, reason = outcome(error)
            if status == "interrupted" or task.plan == EXACT:
                raise
            problem = "out of memory" if machine.is_out_of_memory(error) else reason
            trial = None
        if trial is None:
            # Not in the handler: the error's traceback would hold what is to be freed.
            self._models.clear()
            machine.release_unused()
            trial = Trial(task.plan, task.picture, self._session, time.monotonic() - self._began, problem=problem)
        return trial

    def _measured(self, task: Task, one: Candidate) -> Trial:
        call = self._call(one, task.picture)
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
            at = (began + time.monotonic()) / 2 - self._began
            first_s += measured.compile_s
            if not measured.graphs:
                break
        result = subject.result
        assert result is not None
        trial = Trial(task.plan, task.picture, self._session, at, first_s=first_s)
        broken = result.not_finite()
        if task.plan == EXACT:
            if broken:
                raise RuntimeError(
                    f"Tune: the model itself gives NaN or infinite values in its {broken} at seed {call.seed}, so that "
                    "there is nothing to compare with. Look at its precision, or at the VAE's."
                )
            self._references[task.picture] = result
            self._exact_rows = measured.rows
            self._keep(task, result)
            return replace(trial, seconds=measured.seconds)
        if broken:
            return replace(trial, problem=f"its {broken} has NaN or infinite values")
        reference = self._references[task.picture]
        if result.images is None or reference.images is None or result.images.shape != reference.images.shape:
            return replace(trial, problem="its picture can't be compared with the exact one")
        if task.picture == self.search.pictures[0] or not self.log.of(task.plan):
            self._keep(task, result)
        share = measured.rows / self._exact_rows if self._exact_rows else None
        return replace(trial, seconds=measured.seconds, similarity=_similarity(reference, result), share=share)

    def _subject(self, model: Any) -> Subject:
        return Subject("", "ablation", model, self.vae, False)

    def _keep(self, task: Task, result: Result) -> None:
        try:
            self.kept.put(task.plan, task.picture, result)
        except OSError as error:
            self._note(f"not everything could be kept: {error}")

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
            entries = [Entry(self._configs[level.key], ()) for level in one.levels]
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
        exact_s = self.log.exact_s()
        if exact_s is None or not is_first:
            return 0.0
        # Twice a usual step is nothing that anybody waits for.
        took = time.monotonic() - began - 2 * exact_s / max(1, call.steps)
        return max(0.0, took)

    # What is told

    def _progress(self, step: int, *_: Any) -> None:
        spent = min(1.0, 1 - self._left_s() / (self.wanted.minutes * 60))
        self.bar.update_absolute(int(spent * (BAR - 1)))

    def _changed(self) -> None:
        try:
            self.kept.write()
        except OSError as error:
            self._note(f"not everything could be kept: {error}")

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def as_shown(self) -> dict[str, Any]:
        """The report as it stands, with itself as text."""
        report = {**self.report, **tuned.as_dict(self.search, self.search.found)}
        ones = {one.name: one for one in self._tried()}
        keys = {name: one.key for name, one in ones.items()}
        for plan in report["plans"]:
            configs = self.configs(ones[plan["name"]])
            plan["methods"] = [{"title": config.title, "settings": asdict(config)} for config in configs]
            # Of the picture that it was tried on first, beside the exact one of the same prompt and seed.
            picture = self.log.of(keys[plan["name"]])[0].picture
            plan["image"] = self.kept.shown(keys[plan["name"]], picture)
            plan["exact_image"] = self.kept.shown(EXACT, picture)
        report["chosen"] = report["chosen"] or report["best"]
        report["summary"] = tuned.summary(report)
        report["told"] = tuned.told(report)
        return {**report, "markdown": tuned.to_markdown(report)}

    def _tried(self) -> list[Candidate]:
        rival = self.search.found.rival
        return [*self.search.tried(), *([] if rival is None else [rival])]

    def _tell(self, doing: str | None = None) -> None:
        report = self.as_shown()
        if doing is not None:
            line = verdicts.Line("running", doing)
        elif report["status"] == "finished":
            line = verdicts.Line("active" if report["chosen"] else "inert", report["summary"])
        else:
            told = "interrupted" if report["status"] == "interrupted" else f"failed ({report['reason']})"
            so_far = f"{told} after {report['runs']} runs, which are kept: run it again to go on"
            line = verdicts.Line(report["status"], so_far)
        verdicts.publish(self.where, self.node, line, {}, (self._run_number, "tune"), report)

    def execute(self) -> Candidate | None:
        """Search, unless a plan was chosen. Returns the plan to use.

        Raises:
            ValueError: what was chosen was never tried.
        """
        global _token
        error: BaseException | None = None
        chosen: Candidate | None = None
        try:
            chosen = self.search.run().best
            if not self.search.may_run:
                chosen = self._chosen()
                self.report["chosen"] = chosen.name
        except BaseException as raised:
            error = raised
            raise
        finally:
            found: Found = self.search.found
            if self.search.may_run and not found.is_complete:
                _token = next(_unfinished)
            self.report["status"], self.report["reason"] = outcome(error)
            self._tell()
            error = None
        self.bar.update_absolute(BAR)
        return chosen

    def _chosen(self) -> Candidate:
        wanted = self.wanted.chosen.strip()
        usable = [one for one in self.search.tried() if not self.log.problem(one.key)]
        found = next((one for one in usable if one.name == wanted), None)
        if found is None:
            there = ", ".join(one.name for one in usable) or "none yet: clear it to search"
            raise ValueError(
                f"Tune: chosen should be a plan that was tried here, but is {wanted!r}; there are {there}."
            )
        return found

    def pictures(self, chosen: Candidate | None) -> torch.Tensor | ExecutionBlocker:
        """The exact pictures and the plan's, of the first prompt and seed that it was tried on, (2 B, H, W, C)."""
        first = self.search.pictures[0]
        if chosen is not None and not self.log.has(chosen.key, first):
            first = self.log.of(chosen.key)[0].picture
        if not self._has_reference(first):
            self.log.add(self._run(Task(EXACT, first)))
        exact = self._references[first].images
        if exact is None:
            return ExecutionBlocker("Tune: there are no images to give, since the VAE gives no pictures.")
        latent = None if chosen is None else self.kept.latent(chosen.key, first)
        images = exact if latent is None else self._decoded(latent)
        return torch.cat([exact, exact if images is None else images])

    def configs(self, chosen: Candidate) -> list[Configuration]:
        """A plan's settings."""
        return [self._configs[level.key] for level in chosen.levels]


_numbers = itertools.count(1)


def _similarity(reference: Result, result: Result) -> float:
    """Of the worst picture of a batch."""
    assert reference.images is not None
    assert result.images is not None
    pairs = zip(reference.images, result.images, strict=True)
    found = (compare(reference.latent, result.latent, one[None], other[None]).ssim for one, other in pairs)
    return min(one for one in found if one is not None)


def tune(
    node: type[io.ComfyNode],
    model: Any,
    vae: Any,
    call: SamplerCall,
    others: Sequence[tuple[Any, Any]],
    wanted: Wanted,
) -> io.NodeOutput:
    """The output of the node: the model with the plan, pictures and report, and the report's data for the page.

    Args:
        model: ModelPatcher.
        call: the sampler call, with the first pair of prompts.
        others: further pairs; where a negative one is missing, the first one's is used.

    Raises:
        ValueError: a prompt is empty, what came in is not this model's, or a name is none.
        RuntimeError: what compares pictures can't be imported, or the model itself can't be sampled.
    """
    prompts = [Prompts(call.positive, call.negative)]
    prompts += [Prompts(one, call.negative if other is None else other) for one, other in others if one is not None]
    with refusing(node):
        for number, pair in enumerate(prompts, 1):
            ending = "" if number == 1 else f"_{number}"
            check_prompt("Tune", f"positive{ending}", pair.positive)
            check_prompt("Tune", f"negative{ending}", pair.negative, call.cfg)
        call.latent_for(model)
        if wanted.save_as.strip():
            path_of("Tune", wanted.save_as.strip())
    check_kornia("Tune")
    model = machine.as_sampled(model, *(side for pair in prompts for side in (pair.positive, pair.negative)))
    with refusing(node):
        tuning = Tuning(node, model, vae, call, prompts, wanted)
        chosen = tuning.execute()
    report = tuning.as_shown()
    images = tuning.pictures(chosen)
    output = model
    if chosen is not None:
        configs = tuning.configs(chosen)
        source = replace(tuning.node, has_several=True, told=report["summary"])
        output = with_entries(model, [Entry(config, (source,), suggested=True) for config in configs])
        if wanted.save_as.strip():
            write("Tune", wanted.save_as, plan_of(output))
    return io.NodeOutput(output, images, report["markdown"], ui={"slipstream_tuned": [report]})
