"""Tune: finds the fastest plan above a floor by measuring plans on the user's own model, prompts and seeds.

`measuring.search` decides what is tried. Here is what it needs of the host: a run of a plan at a picture, failures told
as results, and everything that was measured kept on disk, so that nothing is measured twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import safetensors.torch
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..measuring import tuned
from ..measuring.search import Candidate, Found, Search
from ..measuring.trials import EXACT, Interleaved, Log, Task, Trial, from_data
from ..methods.method import Configuration
from .apply import with_entries
from .benchmark import Result, SamplerCall, check_kornia, title_of
from .host import machine
from .inputs import check_prompt, refusing
from .node import node_of
from .plan.plan import Entry, plan_of
from .plan.record import outcome
from .saved_plans import path_to_write, put_in_place, write
from .telling import verdicts
from .trying import METRIC, Ladder, Prompts, Runs, comparable, picture_of

FOLDER = ("slipstream", "tune")
"""In the host's folder for what belongs to its users."""

SCHEMA = 1
BAR = 1000

_unfinished = itertools.count(1)
_token = 0


def fingerprint() -> int:
    """What changes when a search that was not finished should go on: the host's cache must not answer for it."""
    return _token


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


@dataclass(frozen=True)
class Asked:
    """What a search looks at: keys of prompts, the first seed, and how many seeds."""

    prompts: list[str]
    seed: int
    seeds: int

    @property
    def pictures(self) -> list[str]:
        return pictures_of(self.prompts, self.seed, self.seeds)

    def fresh(self, number: int) -> list[str]:
        return fresh_pictures(self.prompts, self.seed, number)

    @classmethod
    def from_data(cls, data: Any) -> Asked | None:
        """What `asdict` told of; None where it is none."""
        match data:
            case {"prompts": [str(), *_] as prompts, "seed": int(seed), "seeds": int(seeds)}:
                return cls(prompts, seed, seeds) if seeds > 0 and all(isinstance(one, str) for one in prompts) else None
        return None


class Kept:
    """What is on disk of all searches of one model with one sampler call: the trials, and pictures.

    Args:
        about: what makes the trials comparable, as plain data; its digest is the name.

    Attributes:
        last: what the last search looked at, None where that is not known.
    """

    def __init__(self, about: dict[str, Any]):
        self.about = about
        self.folder = Path(folder_paths.get_user_directory()).joinpath(*FOLDER)
        self.name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.problem = ""
        self.last: Asked | None = None
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
                self.last = Asked.from_data(data.get("last"))
                return from_data(data["trials"])
            self.problem = "what was kept of earlier runs is of another version of Slipstream, and was measured anew"
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.problem = f"what was kept of earlier runs can't be read, and was measured anew ({error})"
        return []

    def write(self) -> None:
        """Write all trials.

        Raises:
            OSError: see `put_in_place`.
        """
        last = {} if self.last is None else {"last": asdict(self.last)}
        data = {"schema": SCHEMA, "about": self.about, **last, "trials": self.log.as_data()}
        text = json.dumps(data, indent=1) + "\n"
        put_in_place(self.file, lambda part: part.write_text(text, encoding="utf-8"))

    def _named(self, plan: str, picture: str, suffix: str) -> Path:
        return self.pictures / f"{hashlib.sha256(f'{plan}@{picture}'.encode()).hexdigest()[:16]}{suffix}"

    def put(self, plan: str, picture: str, result: Result) -> None:
        """Keep a latent, and its picture small.

        Raises:
            OSError: see `put_in_place`.
        """
        latent = {"latent": result.latent.contiguous().cpu()}
        put_in_place(self._named(plan, picture, ".safetensors"), lambda part: _save(latent, part))
        if result.images is not None:
            pixels = result.images[0, ..., :3].nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
            image = Image.fromarray(pixels.numpy())
            put_in_place(self._named(plan, picture, ".webp"), lambda part: image.save(part, format="WEBP", quality=92))

    def latent(self, plan: str, picture: str) -> torch.Tensor | None:
        """A latent that was kept; None where it is not there any more, or only a part of it."""
        try:
            return safetensors.torch.load_file(self._named(plan, picture, ".safetensors"))["latent"]
        except (OSError, KeyError, safetensors.SafetensorError):
            return None

    def shown(self, plan: str, picture: str) -> dict[str, str] | None:
        """A picture that was kept, where the page can see it, as the host names it; None where it can't be had."""
        path = self._named(plan, picture, ".webp")
        name = f"tune_{self.name}_{path.name}"
        shown = Path(folder_paths.get_temp_directory()) / "slipstream" / name
        try:
            if not shown.exists():
                put_in_place(shown, lambda part: shutil.copyfile(path, part))
        except OSError:
            return None
        return {"filename": name, "subfolder": "slipstream", "type": "temp"}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        # What the system says of a full disk comes as its own kind; without the path, it is the same each time.
        raise OSError(str(error).split(" at path ")[0]) from error


@contextlib.contextmanager
def noting(note: Callable[[str], None]) -> Iterator[None]:
    """What can't be kept costs no run: it is told."""
    try:
        yield
    except OSError as error:
        note(f"not everything could be kept: {error.strerror or error}")


def pictures_of(prompts: Sequence[str], seed: int, seeds: int) -> list[str]:
    """The keys of a search's pictures: those of all prompts with the first seed, then with the second, and so on."""
    return [picture_of(prompt, (seed + number) % 2**64) for number in range(seeds) for prompt in prompts]


def fresh_pictures(prompts: Sequence[str], seed: int, number: int) -> list[str]:
    """Pictures of seeds that the search never sees: one of each prompt, and at least two."""
    found = []
    for index in range(1 if len(prompts) > 1 else 2):
        name = f"{seed} {number} {index}"
        other = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        found += [picture_of(prompt, other) for prompt in prompts]
    return found


def is_kept(task: Task, search: Search, log: Log) -> bool:
    """Whether a run's picture is kept: the exact model's, and of a plan the one that is shown."""
    return task.plan == EXACT or task.picture == search.pictures[0] or not log.of(task.plan)


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
        self.call = call
        self.wanted = wanted
        self._run_number = next(_numbers)
        ladder = Ladder.of(model, call, wanted.may_use)
        self._runs = Runs(model, vae, call, prompts, ladder.configs, self._progress)
        self.kept = Kept(comparable(model, vae, call))
        self._notes = [*ladder.left_out, *([self.kept.problem] if self.kept.problem else [])]
        self.log = Log(self.kept.log.trials, self._changed)
        self.kept.log = self.log
        is_chosen = bool(wanted.chosen.strip())
        asked = Asked(list(dict.fromkeys(one.key for one in prompts)), call.seed, wanted.seeds)
        if is_chosen:
            # A plan is chosen from what the last search told, whatever seed stands in the node by now.
            asked = self.kept.last or asked
        else:
            self.kept.last = asked
        self.search = Search(
            ladder.dials,
            asked.pictures,
            asked.fresh,
            self.log,
            Interleaved(self._run, self.log, self._has_reference),
            wanted.floor,
            call.steps,
            self._left_s,
            may_run=not is_chosen,
        )
        self.bar = comfy.utils.ProgressBar(BAR)
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "title": title_of(model, call),
            "settings": {
                **asdict(wanted),
                "seeds": asked.seeds,
                "seed": str(asked.seed),
                "prompts": len(asked.prompts),
            },
            "machine": machine.describe(model.load_device),
            "metric": METRIC,
            "floor": wanted.floor,
            "status": "running",
            "reason": "",
            "chosen": None,
            "notes": self._notes,
        }

    # What is tried

    def _left_s(self) -> float:
        return self.wanted.minutes * 60 - (time.monotonic() - self._runs.began)

    # One run

    def _has_reference(self, picture: str) -> bool:
        if self._runs.reference(picture) is None and self.log.has(EXACT, picture):
            latent = self.kept.latent(EXACT, picture)
            if latent is not None:
                self._runs.take_reference(picture, latent)
        return self._runs.reference(picture) is not None

    def _run(self, task: Task) -> Trial:
        """One run of the search, whatever comes of it; see `Runs.run`."""
        self._tell(f"{(task.of or Candidate()).name}, {len(self.log.trials) + 1} runs so far")
        return self._ran(task)[0]

    def _ran(self, task: Task) -> tuple[Trial, Result | None]:
        trial, result = self._runs.run(task)
        if result is not None and is_kept(task, self.search, self.log):
            with noting(self._note):
                self.kept.put(task.plan, task.picture, result)
        return trial, result

    # What is told

    def _progress(self, step: int, *_: Any) -> None:
        spent = min(1.0, 1 - self._left_s() / (self.wanted.minutes * 60))
        self.bar.update_absolute(int(spent * (BAR - 1)))

    def _changed(self) -> None:
        with noting(self._note):
            self.kept.write()

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
            best = f"; best so far: {tuned.best(report)}" if report["best"] is not None else ""
            line = verdicts.Line(report["status"], so_far + best)
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
            if self.search.may_run:
                # What is looked at, also where all of it was measured before.
                self._changed()
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

    def configs(self, chosen: Candidate) -> list[Configuration]:
        """A plan's settings."""
        return self._runs.configs_of(chosen)

    def pictures(self, chosen: Candidate | None) -> torch.Tensor | ExecutionBlocker:
        """The exact pictures and the plan's, of the first prompt and seed that both are kept of, (2 B, H, W, C). Where
        there is none, they are made of the first one."""
        both = (picture for picture in self.search.pictures if self._is_shown(chosen, picture))
        picture = next(both, self.search.pictures[0])
        if not self._runs.knows(picture):
            return ExecutionBlocker("Tune: there are no images to give: those of the last search's prompts are gone.")
        if not self._has_reference(picture):
            self.log.add(self._ran(Task(EXACT, picture))[0])
        reference = self._runs.reference(picture)
        exact = None if reference is None else reference.images
        if exact is None:
            return ExecutionBlocker("Tune: there are no images to give, since the VAE gives no pictures.")
        if chosen is None:
            return torch.cat([exact, exact])
        latent = self.kept.latent(chosen.key, picture)
        if latent is None:
            # No trial of the search: its time may stand alone, and what was told of the plan stays as it is.
            trial, result = self._ran(Task(chosen.key, picture, chosen))
            if result is None:
                return ExecutionBlocker(
                    f"Tune: there are no images to give: {chosen.name} fails now ({trial.problem})."
                )
            latent = result.latent
        images = self._runs.decoded(latent)
        return torch.cat([exact, exact if images is None else images])

    def _is_shown(self, chosen: Candidate | None, picture: str) -> bool:
        is_there = chosen is None or self.kept.latent(chosen.key, picture) is not None
        return is_there and self._has_reference(picture)


_numbers = itertools.count(1)


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
            path_to_write("Tune", wanted.save_as)
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
