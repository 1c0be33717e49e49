"""The demo, inside the environment that `./slipstream demo` makes: the template with and without Slipstream.

It runs in the real server, in a scratch base directory: nothing is written into the ComfyUI that is used.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import is_sd15, make_checkpoint
from comfy_cli.workflow_to_api import convert_ui_to_api
from comfyui import Server

PACK = Path(__file__).resolve().parent.parent
TEMPLATE = PACK / "workflows" / "SD 1.5 - DeepCache, CFG Cutoff and FreeU.json"
LOADER = "CheckpointLoaderSimple"
BYPASSED = 4
"""The canvas's mode of a bypassed node."""
VARIANTS = ("without", "with")
ROUNDS = 3
WARM_UP_STEPS = 4
ENOUGH_S = 50
"""No round begins after this, so that a large model on a CPU stays bearable."""
RANDOM_MODEL_CPU_PIXELS = 128
REAL_MODEL_CPU_PIXELS = 256


def say(text: str) -> None:
    print(f"slipstream: {text}", file=sys.stderr, flush=True)


def has_gpu() -> bool:
    """Whether ComfyUI can use more than the CPU here."""
    xpu = getattr(torch, "xpu", None)
    return torch.cuda.is_available() or torch.backends.mps.is_available() or bool(xpu and xpu.is_available())


def install_pack(base: Path) -> None:
    """Put the pack into a base directory's custom nodes."""
    target = base / "custom_nodes" / "slipstream"
    target.parent.mkdir(parents=True)
    try:
        target.symlink_to(PACK, target_is_directory=True)
    except OSError:  # Windows, without the right to make links
        shutil.copytree(PACK, target, ignore=shutil.ignore_patterns(".*", "tests", "demo", "__pycache__"))


def show_models(comfyui: Path, base: Path) -> list[str]:
    """The server's options that let it see the user's own models, which a base directory hides."""
    folders = {path.name: str(path) for path in comfyui.glob("models/*") if path.is_dir()}
    config = base / "extra_model_paths.yaml"
    config.write_text(json.dumps({"own": folders}), encoding="utf-8")  # JSON is YAML
    return ["--extra-model-paths-config", str(config)]


def own_checkpoint(comfyui: Path, wanted: str) -> str | None:
    """The user's own SD 1.5 checkpoint, as the host lists it: the wanted one, or another."""
    folder = comfyui / "models" / "checkpoints"
    found = sorted(folder.rglob("*.safetensors"), key=lambda path: path.name != wanted)
    return next((str(path.relative_to(folder)) for path in found if is_sd15(path)), None)


def make_random_checkpoint(comfyui: Path, path: Path) -> None:
    """Write one with random weights, made from the host's own layers."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # importing the host looks for a GPU otherwise; only its layers' shapes are needed
    path.parent.mkdir(parents=True)
    make_checkpoint(path)


def without_slipstream(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with our nodes bypassed, as the canvas's Bypass does."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"].startswith("Slipstream"):
            node["mode"] = BYPASSED
    return workflow


def set_inputs(prompt: dict[str, Any], **values: object) -> None:
    """Set inputs of these names wherever a node has one that isn't wired."""
    for node in prompt.values():
        for name in node["inputs"].keys() & values.keys():
            if not isinstance(node["inputs"][name], list):
                node["inputs"][name] = values[name]


def measure(server: Server, workflow: dict[str, Any], values: dict[str, object]) -> dict[str, list[Any]]:
    """Run both variants in turn, after one warm-up of each.

    Returns:
        For each variant, its runs in order: (prompt id, outputs, seconds).
    """
    nodes = server.get("/object_info")
    if not any(name.startswith("Slipstream") for name in nodes):
        raise RuntimeError(f"ComfyUI should have loaded the Slipstream pack, but did not. Its log: {server.log}")
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
            set_inputs(prompt, **values, seed=turn, noise_seed=turn, filename_prefix=f"{variant}-slipstream")
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
        wanted = next(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == LOADER)
        own = own_checkpoint(arguments.comfyui, wanted)
        if own is None:
            say("no SD 1.5 checkpoint among ComfyUI's models: making a tiny one with random weights")
            make_random_checkpoint(arguments.comfyui, base / "models" / "checkpoints" / wanted)
        values: dict[str, object] = {"ckpt_name": own or wanted}
        size = "on the GPU, at the template's size"
        if not has_gpu():
            options.append("--cpu")
            pixels = REAL_MODEL_CPU_PIXELS if own else RANDOM_MODEL_CPU_PIXELS
            values |= {"width": pixels, "height": pixels}
            size = f"on the CPU, so at {pixels}x{pixels}"

        say("starting ComfyUI")
        server = stack.enter_context(Server(arguments.comfyui, base, arguments.output / "server.log", options))
        runs = measure(server, workflow, values)
        about = f"{values['ckpt_name']}, {size}, median of {len(runs['with'])} after a warm-up"
        print_table(server, runs, about, arguments.output)
        if own is None:
            print("\nThe model is tiny and random: the times show what is saved, the pictures mean nothing.")
        if not arguments.once:
            print(f"\nServing at {server.url} until Ctrl-C. The template is under Templates, slipstream.", flush=True)
            server.wait()


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # as an exception, so that the server is stopped and the scratch folder removed
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        say("stopped")
    except RuntimeError as error:
        raise SystemExit(f"slipstream: {error}") from error
