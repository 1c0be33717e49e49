"""The demo, inside the environment that `./slipstream demo` makes: the template with and without Slipstream.

It runs in the real server, in a scratch base directory: nothing is written into the ComfyUI that is used.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api
from comfyui import Server
from workspace import PACK, has_gpu, install_pack, run_program, say, show_models

TEMPLATE = PACK / "workflows" / "1 - Try it, no downloads.json"
BYPASSED = 4
"""The canvas's mode of a bypassed node."""
VARIANTS = ("without", "with")
ROUNDS = 3
WARM_UP_STEPS = 4
ENOUGH_S = 50
"""No round begins after this, so that a slow machine stays bearable."""


def without_slipstream(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with our nodes on the model bypassed, as the canvas's Bypass does."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"].startswith("Slipstream") and any(slot["name"] == "model" for slot in node["inputs"]):
            node["mode"] = BYPASSED
    return workflow


def set_inputs(prompt: dict[str, Any], **values: object) -> None:
    """Set inputs of these names wherever a node has one that isn't wired."""
    for node in prompt.values():
        for name in node["inputs"].keys() & values.keys():
            if not isinstance(node["inputs"][name], list):
                node["inputs"][name] = values[name]


def measure(server: Server, workflow: dict[str, Any]) -> dict[str, list[Any]]:
    """Run both variants in turn, after one warm-up of each.

    Returns:
        For each variant, its runs in order: (prompt id, outputs, seconds).
    """
    nodes = server.nodes()
    workflows = {"without": without_slipstream(workflow), "with": workflow}
    runs: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
    began = time.monotonic()
    for turn in range(ROUNDS + 1):
        if turn > 1 and time.monotonic() - began > ENOUGH_S:
            break
        for variant in VARIANTS:
            say(f"running {variant} Slipstream, {f'{turn} of {ROUNDS}' if turn else 'warm-up'}")
            prompt = convert_ui_to_api(workflows[variant], nodes)
            # Each round has its own seed, or the host would answer from its cache.
            set_inputs(prompt, seed=turn, noise_seed=turn, filename_prefix=f"{variant}-slipstream")
            if not turn:
                set_inputs(prompt, steps=WARM_UP_STEPS)
            run = server.run(prompt, workflows[variant])
            if turn:
                runs[variant].append(run)
    return runs


def print_table(server: Server, runs: dict[str, list[Any]], about: str, output: Path) -> None:
    """Times, evaluations, verdicts and where the images are."""
    seconds = {variant: statistics.median(run[2] for run in runs[variant]) for variant in VARIANTS}
    last = runs["with"][-1][0]
    verdicts = [verdict for verdict in server.get("/slipstream/verdicts")["verdicts"] if verdict["prompt_id"] == last]
    record: dict[str, Any] = next((verdict["record"] for verdict in verdicts if verdict["record"]), {})
    # A run without Slipstream keeps no record: the same sampler evaluates the same steps, each for two prompts.
    evaluations = {"without": 2 * record.get("evaluations", 0), "with": record.get("predictions", 0)}

    print(f"\n{TEMPLATE.stem}: {about}\n")
    print(f"{'':20}{'seconds':>10}{'UNet evaluations':>20}")
    for variant in VARIANTS:
        print(f"{variant + ' Slipstream':20}{seconds[variant]:>10.2f}{evaluations[variant] or '-':>20}")
    print(f"{'times faster':20}{seconds['without'] / seconds['with']:>10.2f}\n")
    for verdict in verdicts:
        for line in verdict["lines"]:
            print(f"{verdict['node_type'].removeprefix('Slipstream'):12}{line['state']:10}{line['text']}")
    print()
    for variant in VARIANTS:
        for node in runs[variant][-1][1].values():
            for image in node.get("images", []):
                print(f"{variant:10}{output / image['subfolder'] / image['filename']}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()

    workflow = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-", ignore_cleanup_errors=True)))
        install_pack(base)
        options = [*show_models(arguments.comfyui, base), "--output-directory", str(arguments.output)]
        if not has_gpu():
            options.append("--cpu")

        say("starting ComfyUI")
        server = stack.enter_context(Server(arguments.comfyui, base, arguments.output / "server.log", options))
        runs = measure(server, workflow)
        device = "GPU" if has_gpu() else "CPU"
        print_table(server, runs, f"on the {device}, median of {len(runs['with'])} after a warm-up", arguments.output)
        if not arguments.once:
            print(f"\nServing at {server.url} until Ctrl-C. The template is under Templates, slipstream.", flush=True)
            server.wait()


if __name__ == "__main__":
    run_program(main)
