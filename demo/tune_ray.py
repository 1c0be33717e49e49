"""`./slipstream tune --ray`: the trials of Tune on a Ray cluster, one worker a GPU or, without one, a machine.

Each worker loads the model once, and times what it runs against its own exact runs, so that slower machines and faster
ones of a kind can share the work. Where there are several kinds of devices, each has a search of its own: their times,
and the bits of their pictures, say nothing of each other. Python, torch and ComfyUI must be installed on every machine;
the pack is sent along.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from workspace import PACK, say

SENT = {
    "excludes": [".?*", "__pycache__", "/tests/e2e", "/tests/released", "/training", "/benchmarks", "*.jpg", "*.png"]
}
"""What of this folder the workers do not need. The folder itself is "." to Ray, which newer versions of pathspec match
with ".*"."""

READY_S = 600
TOLD_S = 30


class Worker:
    """A model on a device of the cluster. Its methods' errors are the driver's to tell.

    Args:
        job: what is sampled, as `job_of` makes it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        root = Path.cwd()
        sys.path.insert(0, str(root / "tests"))
        from loading import find_comfyui, load_host, load_pack

        os.environ.setdefault("COMFYUI_PATH", job["comfyui"])
        comfyui = find_comfyui()
        if comfyui is None:
            raise RuntimeError(f"no ComfyUI was found here: set COMFYUI_PATH, or install it at {job['comfyui']}")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        load_pack()
        load_host(comfyui, on_cpu=not torch.cuda.is_available())
        from slipstream_pack.nodes.engine.benchmark import title_of
        from slipstream_pack.nodes.engine.trying import Ladder, Runs, comparable

        with torch.inference_mode():
            model, vae, call, prompts = loaded(job)
            self._ladder = Ladder.of(model, call, job["may_use"])
            self._runs = Runs(model, vae, call, prompts, self._ladder.configs)
            self._about = {
                "comparable": comparable(model, vae, call),
                "prompts": list(dict.fromkeys(one.key for one in prompts)),
                "title": title_of(model, call),
                "session": self._runs.session,
            }

    def about(self) -> dict[str, Any]:
        """What is sampled here, on what; and what can be tried."""
        from slipstream_pack.nodes.engine.host import machine

        described = machine.describe(self._runs.model.load_device)
        return {**self._about, "machine": described, "dials": self._ladder.dials, "left_out": self._ladder.left_out}

    def reference(self, picture: str, latent: Any) -> None:
        """Know the exact model's picture from another worker's run."""
        import torch

        with torch.inference_mode():
            self._runs.take_reference(picture, latent)

    def run(self, task: Any, is_kept: bool) -> tuple[Any, Any]:
        """One run: the trial, and its result if that is to be kept."""
        import torch

        with torch.inference_mode():
            trial, result = self._runs.run(task)
        return trial, result if is_kept else None


def loaded(job: dict[str, Any]) -> tuple[Any, Any, Any, list[Any]]:
    """Model, VAE, sampler call and prompts of a job, in a process that has host and pack."""
    import comfy.sd
    import folder_paths
    from slipstream_pack.nodes.engine import demo_model
    from slipstream_pack.nodes.engine.benchmark import SamplerCall
    from slipstream_pack.nodes.engine.trying import Prompts

    if job["checkpoint"] is None:
        model, clip, vae = demo_model.load_model(), demo_model.load_clip(), demo_model.load_vae()
    else:
        here = folder_paths.get_full_path("checkpoints", job["checkpoint"].name)
        path = job["checkpoint"] if job["checkpoint"].is_file() else here
        if path is None:
            raise RuntimeError(f"the checkpoint {job['checkpoint'].name} is not among ComfyUI's, nor at that place")
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path))[:3]

    host_nodes: Any = importlib.import_module("nodes")
    (latent,) = host_nodes.EmptyLatentImage().generate(job["size"], job["size"])
    positives = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in job["prompts"]]
    (negative,) = host_nodes.CLIPTextEncode().encode(clip, job["negative"])
    call = SamplerCall(positives[0], negative, latent, **job["call"], title="Tune")
    return model, vae, call, [Prompts(positive, negative) for positive in positives]


def job_of(arguments: argparse.Namespace, prompts: Sequence[str], negative: str) -> dict[str, Any]:
    """What the workers need to know."""
    names = ("seed", "steps", "cfg", "scheduler")
    call = {name: getattr(arguments, name) for name in names}
    return {
        "comfyui": str(arguments.comfyui),
        "checkpoint": arguments.checkpoint,
        "prompts": list(prompts),
        "negative": negative,
        "size": arguments.size,
        "call": {**call, "sampler_name": arguments.sampler, "denoise": 1.0},
        "may_use": arguments.may_use,
    }


class Cluster:
    """A Ray cluster, and a worker on each of its devices.

    Args:
        address: Ray's, as `ray start` prints it.

    Raises:
        RuntimeError: ray is not installed, there is no cluster, or no worker could begin.
    """

    def __init__(self, address: str, job: dict[str, Any]) -> None:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                f'--ray needs ray: "{sys.executable}" -m pip install -r {PACK / "requirements-ray.txt"}'
            ) from error
        self._ray = ray
        # The class goes along as it stands here: the workers have no such module.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            answers(address)
            ray.init(address=address, runtime_env={"working_dir": str(PACK), **SENT}, log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"--ray should be a cluster's address, but is {address}: {error}") from error
        self.workers: dict[str, Any] = {}
        self.abouts: dict[str, dict[str, Any]] = {}
        self._start(job)

    def _start(self, job: dict[str, Any]) -> None:
        """A worker a GPU; without one, one for all of a machine's cores: nothing else of ours runs beside it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = self._ray.remote(Worker)
        for node in self._ray.nodes():
            cores, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
            if not node["Alive"] or not cores:
                continue
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            share = {"num_gpus": 1, "num_cpus": max(1, cores // gpus)} if gpus else {"num_cpus": cores}
            for number in range(gpus or 1):
                name = f"{node['NodeManagerHostname']} {node['NodeID'][:6]}" + (f" GPU {number}" if gpus else "")
                self.workers[name] = remote.options(scheduling_strategy=here, **share).remote(job)
        asked = {name: worker.about.remote() for name, worker in self.workers.items()}
        for name, answer in asked.items():
            try:
                self.abouts[name] = self._ray.get(answer, timeout=READY_S)
            except self._ray.exceptions.RayError as error:
                say(f"{name} can't take part: {last_line(error)}")
                del self.workers[name]
        if not self.workers:
            raise RuntimeError("no machine of the cluster can take part")

    def groups(self) -> list[list[str]]:
        """The workers' names, those of one kind together, the largest group first."""
        found = defaultdict(list)
        for name, about in self.abouts.items():
            found[json.dumps(about["comparable"], sort_keys=True)].append(name)
        return sorted(found.values(), key=len, reverse=True)

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """What a worker's method gives.

        Raises:
            LostError: it is gone.
        """
        from slipstream_pack.nodes.measuring.trials import LostError

        errors = self._ray.exceptions
        try:
            return self._ray.get(getattr(self.workers[name], method).remote(*arguments))
        except errors.RayTaskError as error:
            raise RuntimeError(last_line(error)) from error
        except errors.RayError as error:
            raise LostError(f"{name} was lost ({type(error).__name__})") from error

    def close(self) -> None:
        self._ray.shutdown()


def answers(address: str) -> None:
    """Ray itself would ask for minutes.

    Raises:
        OSError: nobody answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def last_line(error: BaseException) -> str:
    """What an error that comes from another machine ends in."""
    return str(error).strip().splitlines()[-1]


class Group:
    """The search on all devices of one kind.

    Args:
        names: of the workers.
    """

    def __init__(self, cluster: Cluster, names: list[str], arguments: argparse.Namespace) -> None:
        from slipstream_pack.nodes.engine import tune
        from slipstream_pack.nodes.measuring.search import Search
        from slipstream_pack.nodes.measuring.trials import Interleaved, Log, Spread

        self.cluster, self.names, self.arguments = cluster, names, arguments
        self._tune = tune
        self.about = cluster.abouts[names[0]]
        self.kept = tune.Kept(self.about["comparable"])
        self.log = self.kept.log = Log(self.kept.log.trials, self._changed)
        self.before = len(self.log.trials)
        self.notes = [*self.about["left_out"], *([self.kept.problem] if self.kept.problem else [])]
        self.began = time.monotonic()
        self._told_at = 0.0
        self._known: dict[str, set[str]] = {name: set() for name in names}
        devices = [Interleaved(partial(self._run, name), self.log, partial(self._has, name)) for name in names]
        asked = self.kept.last = tune.Asked(self.about["prompts"], arguments.seed, arguments.seeds)
        self.search = Search(
            self.about["dials"],
            asked.pictures,
            asked.fresh,
            self.log,
            Spread(devices, self._lost),
            arguments.floor,
            arguments.steps,
            lambda: arguments.minutes * 60 - (time.monotonic() - self.began),
            at_once=len(names),
        )
        self.status, self.reason, self.is_stopped = "running", "", False

    def _has(self, name: str, picture: str) -> bool:
        """Whether a worker has the exact model's picture; one that another made is sent to it."""
        if picture not in self._known[name] and self.log.has("", picture):
            latent = self.kept.latent("", picture)
            if latent is not None:
                self.cluster.call(name, "reference", picture, latent)
                self._known[name].add(picture)
        return picture in self._known[name]

    def _run(self, name: str, task: Any) -> Any:
        is_kept = self._tune.is_kept(task, self.search, self.log)
        trial, result = self.cluster.call(name, "run", task, is_kept)
        if task.plan == "":
            self._known[name].add(task.picture)
        if result is not None:
            with self._tune.noting(self._note):
                self.kept.put(task.plan, task.picture, result)
        if time.monotonic() - self._told_at > TOLD_S:
            self._told_at = time.monotonic()
            say(f"{len(self.log.trials) + 1} runs so far, {task.of.name if task.of else 'as it is'} on {name}")
        return trial

    def _changed(self) -> None:
        with self._tune.noting(self._note):
            self.kept.write()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            say(text)

    def _lost(self, error: Exception) -> None:
        if self.is_stopped:
            return
        self._note(f"{error}: what it was at ran elsewhere")

    def run(self) -> None:
        """Search, whatever ends it."""
        try:
            self._changed()
            self.search.run()
            self.status = "finished"
        except Exception as error:
            self.status, self.reason = ("interrupted", "") if self.is_stopped else ("failed", str(error))
        seconds = time.monotonic() - self.began
        count = len(self.log.trials) - self.before
        if count:
            workers = f"{len(self.names)} worker" + ("s" if len(self.names) > 1 else "")
            self.notes.append(f"{count} runs in {seconds:.0f} s on {workers}: {60 * count / seconds:.1f} a minute")

    def report(self) -> dict[str, Any]:
        """As the Tune node makes it."""
        from slipstream_pack.nodes.measuring import tuned

        wanted = ("floor", "seeds", "minutes", "may_use", "save_as")
        report = {
            "schema": tuned.SCHEMA,
            "title": self.about["title"],
            "settings": {
                **{name: getattr(self.arguments, name) for name in wanted},
                "seed": str(self.arguments.seed),
                "prompts": len(self.about["prompts"]),
            },
            "machine": self.about["machine"],
            "metric": self.about["comparable"]["metric"],
            "floor": self.arguments.floor,
            "status": self.status,
            "reason": self.reason,
            "notes": self.notes,
            **tuned.as_dict(self.search, self.search.found),
        }
        report["chosen"] = report["best"]
        report["summary"] = tuned.summary(report)
        report["told"] = tuned.told(report)
        return {**report, "markdown": tuned.to_markdown(report)}

    def save(self, name: str) -> Path | None:
        """Write the plan that was found, if there is one."""
        from slipstream_pack.nodes.engine.plan import registry
        from slipstream_pack.nodes.engine.plan.plan import Entry, Plan
        from slipstream_pack.nodes.engine.saved_plans import write

        best, plan = self.search.found.best, Plan()
        if best is None or self.status != "finished":
            return None
        for level in best.levels:
            about = json.loads(level.key)
            plan = plan.adding(Entry(registry.kind(about["stem"])(**about["settings"]), ()))
        return Path(write("Tune", name, plan))


def check(arguments: argparse.Namespace) -> None:
    """Before anything runs: the node's own ranges hold here too.

    Raises:
        RuntimeError: a figure is out of its range, or the name to save under is none.
    """
    from slipstream_pack.nodes.tune import SlipstreamTune

    for one in SlipstreamTune.define_schema().inputs:
        least, most = getattr(one, "min", None), getattr(one, "max", None)
        value = getattr(arguments, one.id, None)
        if least is not None and most is not None and value is not None and not least <= value <= most:
            raise RuntimeError(f"--{one.id} should be {least} to {most}, but is {value}")
    if arguments.save_as.strip():
        check_name(arguments.save_as)


def check_name(name: str) -> None:
    """
    Raises:
        RuntimeError: it is no name to save a plan under.
    """
    from slipstream_pack.nodes.engine.saved_plans import path_to_write

    try:
        path_to_write("Tune", name)
    except ValueError as error:
        raise RuntimeError(f"--save-as: {error}") from error


def name_of(save_as: str, number: int) -> str:
    """What the plan of a kind of devices is saved under; empty: it is not saved."""
    name = save_as.strip().removesuffix(".json")
    return f"{name} {number + 1}" if name and number else name


def tune_on_cluster(
    arguments: argparse.Namespace,
    user: Path,
    prompts: Sequence[str],
    negative: str,
    show: Callable[[dict[str, Any]], None],
    put: Callable[[Path | None], None],
) -> list[dict[str, Any]]:
    """Search on a cluster, each kind of device by itself. The reports, the largest group's first.

    Args:
        user: the folder for what is kept.
        show: gets each report.
        put: gets the file of each plan, None where it was not saved; after all reports, since that may fail.

    Raises:
        RuntimeError: see `check` and `Cluster`; or a plan can't be written.
    """
    sys.path.insert(0, str(PACK / "tests"))
    from loading import load_host, load_pack

    load_pack()
    load_host(arguments.comfyui)
    import folder_paths

    folder_paths.set_user_directory(str(user))
    check(arguments)
    cluster = Cluster(arguments.ray, job_of(arguments, prompts, negative))
    try:
        groups = [Group(cluster, names, arguments) for names in cluster.groups()]
        names = [name_of(arguments.save_as, number) for number in range(len(groups))]
        for name in filter(None, names):
            check_name(name)
        if len(groups) > 1:
            kinds = "; ".join(f"{len(one.names)} of {one.about['machine']['device']}" for one in groups)
            say(f"devices of {len(groups)} kinds, whose times can't be compared: each has its own search ({kinds})")
        with ThreadPoolExecutor(len(groups)) as pool:
            doing = [pool.submit(group.run) for group in groups]
            try:
                for future in doing:
                    future.result()
            except KeyboardInterrupt:
                say("stopping; what was measured is kept")
                for group in groups:
                    group.is_stopped = True
                cluster.close()
    finally:
        cluster.close()
    reports = [group.report() for group in groups]
    for report in reports:
        show(report)
    for group, name in zip(groups, names, strict=True):
        put(group.save(name) if name else None)
    return reports
