"""`./slipstream bench`, inside the environment that the launcher makes: the Benchmark node in a real ComfyUI, headless.

The server runs in a scratch base directory: nothing is written into the ComfyUI that is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_options import DEMO_METHODS, METHODS, add_options
from comfyui import Server
from workspace import (
    has_gpu,
    install_pack,
    link,
    make_random_sd15,
    own_checkpoint,
    run_program,
    say,
    show_models,
)

NODE = "SlipstreamBenchmark"
DEMO_LOADER = "SlipstreamDemoModel"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
INTERVAL_S = 5
POSITIVE = "a lighthouse on a cliff above a stormy sea, last light, oil painting"
NEGATIVE = "blurry, low quality, text, watermark"
CPU_PIXELS = 256
GPU_PIXELS = 512
DEMO_POSITIVE = "autumn sunset, clear sky, the sun, mountains, a lake, pines and a red house"
DEMO_PIXELS = 256
"""The demo model was trained on no other size."""

Prompt = dict[str, dict[str, Any]]
"""In API format: nodes by id."""


def parse_method(text: str, nodes: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """A ``NAME:input=value,...`` as a node of the server's and the inputs that are given.

    Raises:
        RuntimeError: there is no such node or input; the message lists what there is.
    """
    name, _, settings = text.partition(":")
    models = {kind: entry for kind, entry in nodes.items() if entry["category"] == "Slipstream/model"}
    kind = name if name in models else f"Slipstream{name}"
    if kind not in models:
        there = ", ".join(sorted(one.removeprefix("Slipstream") for one in models))
        raise RuntimeError(f"--method should name a Slipstream node on a model ({there}), but is {name}")
    inputs = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        known = [one for one in inputs_of(models[kind]) if one != "model"]
        if key not in known:
            raise RuntimeError(f"--method {name} should set its inputs ({', '.join(known)}), but sets {key}")
        inputs[key] = value
    return kind, inputs


def methods(arguments: argparse.Namespace, checkpoint: str | None) -> Sequence[str]:
    """What is measured: as was asked for, or else what suits the checkpoint or the demo model."""
    return arguments.method or (METHODS if checkpoint else DEMO_METHODS)


def inputs_of(node: dict[str, Any]) -> dict[str, list[Any]]:
    """The inputs of a node as the server describes it: name to type and options."""
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def default(described: list[Any]) -> Any:
    """An input's default as the page has it: its own, or a list's first. None for what must be wired."""
    kind, options = described[0], described[1] if len(described) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options", [])
    return options.get("default", choices[0] if choices else None)


TYPES: dict[str, Callable[[str], Any]] = {
    "INT": int,
    "FLOAT": float,
    "BOOLEAN": {"true": True, "false": False}.__getitem__,
}


def typed(value: str, described: list[Any]) -> Any:
    """A value of the command line as its input takes it. Ranges and choices are the server's to check.

    Raises:
        RuntimeError: it is of another type.
    """
    kind = described[0] if isinstance(described[0], str) else ""
    try:
        return TYPES[kind](value) if kind in TYPES else value
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"--method should give an input of type {kind} such a value, but gives '{value}'") from error


class Graph:
    """An API prompt that is being built, of the nodes that a server has.

    Attributes:
        prompt: as far as it is built.
    """

    def __init__(self, nodes: dict[str, Any]) -> None:
        self.prompt: Prompt = {}
        self._nodes = nodes

    def add(self, kind: str, **inputs: Any) -> str:
        """One more node, with defaults for what is not given. Returns its id."""
        described = inputs_of(self._nodes[kind])
        required = self._nodes[kind]["input"].get("required", {})
        defaults = {name: default(required[name]) for name in required}
        number = str(len(self.prompt) + 1)
        values = {
            name: typed(value, described[name]) if isinstance(value, str) else value for name, value in inputs.items()
        }
        self.prompt[number] = {"class_type": kind, "inputs": {**defaults, **values}}
        return number

    def loader(self, checkpoint: str | None) -> str:
        """The node that loads a checkpoint, or else the demo model."""
        return self.add("CheckpointLoaderSimple", ckpt_name=checkpoint) if checkpoint else self.add(DEMO_LOADER)


def build_prompt(
    nodes: dict[str, Any], checkpoint: str | None, arguments: argparse.Namespace, is_random: bool = False
) -> Prompt:
    """The benchmark as an API prompt: a checkpoint, or else the demo model, as baseline, and with the wanted methods
    as candidate."""
    graph = Graph(nodes)
    add = graph.add
    loader = graph.loader(checkpoint)
    model = loader
    for method in methods(arguments, checkpoint):
        kind, inputs = parse_method(method, nodes)
        model = add(kind, model=[model, 0], **inputs)
    wired: dict[str, Any] = {"baseline": [loader, 0], "candidate": [model, 0]}
    texts = (POSITIVE, NEGATIVE) if checkpoint else (DEMO_POSITIVE, "")
    for side, text in zip(("positive", "negative"), texts, strict=True):
        wired[side] = [add("CLIPTextEncode", text=text, clip=[loader, 1]), 0]
    wired["latent_image"] = [add("EmptyLatentImage", width=arguments.size, height=arguments.size), 0]
    if not is_random:
        wired["vae"] = [loader, 2]
    names = ("seed", "steps", "cfg", "scheduler", "runs", "ablation", "rivals", "seeds")
    call = {name: getattr(arguments, name) for name in names}
    add(NODE, **wired, **call, sampler_name=arguments.sampler, denoise=1.0, save=True)
    return graph.prompt


class Progress:
    """Prints what a node that measures shows, whenever it changes."""

    def __init__(self, server: Server, node: str) -> None:
        self.server = server
        self.node = node
        self.report: dict[str, Any] = {}
        self._told = ""

    def __call__(self) -> None:
        for verdict in self.server.get("/slipstream/verdicts")["verdicts"]:
            if verdict["node_type"] == self.node:
                self.report = verdict["record"]
                text = verdict["lines"][-1]["text"]
                if text != self._told:
                    say(text)
                    self._told = text


def measure(server: Server, prompt: Prompt, node: str = NODE) -> dict[str, Any]:
    """Run it, and get the report: of what was measured so far, if it was stopped or failed; empty if nothing was."""
    progress = Progress(server, node)
    prompt_id = server.queue(prompt)
    try:
        server.wait_for(prompt_id, INTERVAL_S, progress)
    except KeyboardInterrupt:
        say("stopping after the step that is running")
        server.post("/interrupt", {})
        server.wait_for(prompt_id)
    progress()
    return progress.report


def repeatable(arguments: argparse.Namespace, checkpoint: str | None) -> str:
    """The command that repeats a benchmark: all that was chosen, also by default, and no path of this machine."""
    command = ["./slipstream", "bench"]
    if arguments.random:
        command += ["--random", arguments.random]
    else:
        command += ["--checkpoint", Path(checkpoint).name] if checkpoint else ["--demo"]
    for method in methods(arguments, checkpoint):
        command += ["--method", method]
    for name in ("size", "steps", "cfg", "sampler", "scheduler", "seed", "runs", "ablation"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--rivals"] if arguments.rivals else []
    command += ["--seeds", str(arguments.seeds)] if arguments.seeds > 1 else []
    return shlex.join(command)


def started(
    stack: contextlib.ExitStack, arguments: argparse.Namespace, output: Path, *more: str
) -> tuple[Server, str | None]:
    """A server with the pack and the model that was asked for, and the name of its checkpoint, None for the demo model.

    Args:
        stack: ends it.
        arguments: also gets the size that suits the model, if none was asked for.
        output: takes what is saved, and the server's log.
        more: options of the server.
    """
    base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-", ignore_cleanup_errors=True)))
    install_pack(base)
    options = [*show_models(arguments.comfyui, base), "--output-directory", str(output), *more]
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    name: str | None = None
    if arguments.checkpoint:
        if not arguments.checkpoint.is_file():
            raise RuntimeError(f"--checkpoint should be a file, but there is none at {arguments.checkpoint}")
        name = arguments.checkpoint.name
        link(arguments.checkpoint.absolute(), checkpoints / arguments.checkpoint.name)
    elif getattr(arguments, "random", None):
        say("making an SD 1.5 checkpoint with random weights")
        name = CHECKPOINT
        make_random_sd15(arguments.comfyui, checkpoints / CHECKPOINT)
    elif not arguments.demo:
        name = own_checkpoint(arguments.comfyui, CHECKPOINT)
    if not has_gpu():
        options.append("--cpu")
    if not arguments.size:
        arguments.size = DEMO_PIXELS if name is None else GPU_PIXELS if has_gpu() else CPU_PIXELS
    say("starting ComfyUI")
    return stack.enter_context(Server(arguments.comfyui, base, output / "server.log", options)), name


def write_json(file: Path, data: Any) -> None:
    """Write what was measured, and say where."""
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(file)


def end(report: dict[str, Any], what: str, server: Server) -> None:
    """End as the node did.

    Raises:
        RuntimeError: it failed.
        SystemExit: it was interrupted.
    """
    if report["status"] == "failed":
        raise RuntimeError(f"the {what} failed: {report['reason']}. ComfyUI's log: {server.log}")
    if report["status"] == "interrupted":
        sys.exit(130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="slipstream bench")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--env", type=Path)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise RuntimeError(f"--json should be a file in a folder that exists, but is {arguments.json}")
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as stack:
        server, name = started(stack, arguments, output)
        report = measure(server, build_prompt(server.nodes(), name, arguments, is_random=bool(arguments.random)))

    if not report.get("variants"):
        raise RuntimeError(f"nothing was measured. ComfyUI's log: {server.log}")
    print("\n" + report["markdown"])
    if arguments.random:
        print("The weights are random: times do not depend on them, but the latent error means nothing.\n")
    for file in report["saved"].values():
        print(output / file["subfolder"] / file["filename"])
    if arguments.json:
        command = repeatable(arguments, name)
        # Text and files are this machine's own.
        data = {key: value for key, value in report.items() if key not in ("markdown", "saved")}
        data = {"command": command, "weights": "random" if arguments.random else "trained", **data}
        write_json(arguments.json, data)
    end(report, "benchmark", server)


if __name__ == "__main__":
    run_program(main)
