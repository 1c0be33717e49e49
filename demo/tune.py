"""`./slipstream tune`, inside the environment that the launcher makes: the Tune node in a real ComfyUI, headless.

What was measured stays in the output folder, so that the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import (
    DEMO_PIXELS,
    DEMO_POSITIVE,
    GPU_PIXELS,
    NEGATIVE,
    POSITIVE,
    Graph,
    Prompt,
    end,
    measure,
    started,
    write_json,
)
from tune_options import add_options
from workspace import run_program

NODE = "SlipstreamTune"
PROMPTS = (POSITIVE, "portrait of an old fisherman, soft light, photograph")
DEMO_PROMPTS = (DEMO_POSITIVE, "winter day, cloudy sky, mountains, a lake, trees and a blue house")
MOST = 5


def texts(arguments: argparse.Namespace, checkpoint: str | None) -> tuple[list[str], str]:
    """The prompts, and the negative one of all of them.

    Raises:
        RuntimeError: there are more prompts than the node takes.
    """
    prompts = list(arguments.prompt or (PROMPTS if checkpoint else DEMO_PROMPTS))
    if len(prompts) > MOST:
        raise RuntimeError(f"--prompt should be given at most {MOST} times, but is given {len(prompts)} times")
    return prompts, arguments.negative if arguments.negative is not None else NEGATIVE if checkpoint else ""


def build_prompt(nodes: dict[str, Any], checkpoint: str | None, arguments: argparse.Namespace) -> Prompt:
    """The search as an API prompt."""
    prompts, negative = texts(arguments, checkpoint)
    graph = Graph(nodes)
    loader = graph.loader(checkpoint)
    wired: dict[str, Any] = {"model": [loader, 0], "vae": [loader, 2]}
    for number, text in enumerate(prompts, 1):
        ending = "" if number == 1 else f"_{number}"
        wired[f"positive{ending}"] = [graph.add("CLIPTextEncode", text=text, clip=[loader, 1]), 0]
    wired["negative"] = [graph.add("CLIPTextEncode", text=negative, clip=[loader, 1]), 0]
    wired["latent_image"] = [graph.add("EmptyLatentImage", width=arguments.size, height=arguments.size), 0]
    names = ("seed", "steps", "cfg", "scheduler", "floor", "seeds", "minutes", "may_use", "save_as")
    call = {name: getattr(arguments, name) for name in names}
    graph.add(NODE, **wired, **call, sampler_name=arguments.sampler, denoise=1.0)
    return graph.prompt


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    print("\n" + report["markdown"])


def put(saved: Path | None, output: Path) -> None:
    """Put the plan that was saved, if one was, into the output folder."""
    if saved is not None:
        (output / "plans").mkdir(exist_ok=True)
        print(shutil.copyfile(saved, output / "plans" / saved.name))


def saved_by(report: dict[str, Any], save_as: str, user: Path) -> Path | None:
    """The file that the node saved its plan in. One that is there of an earlier search is none of this one's."""
    name = save_as.strip().removesuffix(".json")
    if not name or report["status"] != "finished" or report["chosen"] is None:
        return None
    return user / "slipstream" / "plans" / f"{name}.json"


def was_measured(report: dict[str, Any]) -> bool:
    """Whether a search came to anything. One that found nothing to try on the model has."""
    return bool(report.get("plans")) or report.get("status") == "finished"


def without_text(report: dict[str, Any]) -> dict[str, Any]:
    """A report as data alone: its text is there already, as what was printed."""
    return {name: value for name, value in report.items() if name != "markdown"}


def on_cluster(arguments: argparse.Namespace, output: Path, user: Path) -> None:
    """The same on a Ray cluster: a report for each kind of device."""
    from tune_ray import tune_on_cluster

    name = arguments.checkpoint.name if arguments.checkpoint else None
    arguments.size = arguments.size or (GPU_PIXELS if name else DEMO_PIXELS)

    reports = tune_on_cluster(arguments, user, *texts(arguments, name), show, lambda saved: put(saved, output))
    if arguments.json:
        data = [without_text(report) for report in reports]
        write_json(arguments.json, data if len(data) > 1 else data[0])
    if any(report["status"] == "failed" for report in reports):
        raise RuntimeError("; ".join(f"the search failed: {one['reason']}" for one in reports if one["reason"]))
    if any(report["status"] == "interrupted" for report in reports):
        sys.exit(130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="slipstream tune")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--env", type=Path)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise RuntimeError(f"--json should be a file in a folder that exists, but is {arguments.json}")
    output = arguments.output.absolute()
    user = output / "user"
    user.mkdir(parents=True, exist_ok=True)

    if arguments.ray:
        on_cluster(arguments, output, user)
        return

    with contextlib.ExitStack() as stack:
        server, name = started(stack, arguments, output, "--user-directory", str(user))
        report = measure(server, build_prompt(server.nodes(), name, arguments), NODE)

    if not was_measured(report):
        raise RuntimeError(f"nothing was measured. ComfyUI's log: {server.log}")
    show(report)
    put(saved_by(report, arguments.save_as, user), output)
    if arguments.json:
        write_json(arguments.json, without_text(report))
    end(report, "search", server)


if __name__ == "__main__":
    run_program(main)
