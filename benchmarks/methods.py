"""What each node gives on a full-size SD 1.5 UNet, and what the engine costs.

    python benchmarks/methods.py            # in the environment that `./slipstream env` names

Weights are random: times do not depend on them, pictures would mean nothing. All variants run
interleaved in one process; medians and ratios are reported, and nothing else must be running.
Absolute times on a CPU say nothing about other machines.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import find_comfyui, load_host, load_pack

SD15 = {
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "context_dim": 768,
}
VARIANTS = {
    "stock": (),
    "DeepCache (3, 0)": ("SlipstreamDeepCache",),
    "CFG Cutoff 0.5": ("SlipstreamCFGCutoff",),
    "FreeU": ("SlipstreamFreeU",),
    "DeepCache + CFG Cutoff": ("SlipstreamDeepCache", "SlipstreamCFGCutoff"),
    "all three": ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU"),
}
SETTINGS = {"SlipstreamCFGCutoff": {"cutoff": 0.5}}


def methods(steps: int, runs: int, size: int, variants: list[str]) -> None:
    """Time the variants on the full-size UNet."""
    import hosted
    import small_models

    family, config = small_models.CONFIGS["SD15"]
    model = hosted.build(family({**config, **SD15}))
    positive, negative = hosted.prompt(model, 10, tokens=77), hosted.prompt(model, 11, tokens=77)
    patchers = {}
    for name in variants:
        patchers[name] = model
        for node_id, node in enumerate(VARIANTS[name], 1):
            patchers[name] = hosted.run_node(node, patchers[name], str(node_id), **SETTINGS.get(node, {}))

    def run(name: str, steps: int) -> float:
        image = hosted.latent(model, size // 8)
        began = time.perf_counter()
        hosted.sample(patchers[name], positive, negative, steps=steps, image=image)
        return time.perf_counter() - began

    for name in variants:
        run(name, 2)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(runs):
        for name in variants:
            times[name].append(run(name, steps))
            print(f"run {i + 1} of {runs}, {name}: {times[name][-1]:.1f} s", flush=True)
    stock = statistics.median(times["stock"])
    print(f"\nSD 1.5 UNet, random weights, {size}x{size}, guided, {steps} Euler steps, {runs} interleaved runs")
    print("| variant | median s | min to max | faster by |\n|---|---|---|---|")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.2f} | {min(taken):.2f} to {max(taken):.2f} | {stock / median:.2f}x |")


def overhead(evaluations: int, runs: int) -> None:
    """Time the engine with a plan whose methods find nothing to do, on a UNet that computes nothing."""
    import hosted
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Stub(UNetModel):
        def _forward(self, x, *args, **kwargs):
            return x

    model = hosted.model("SD15")
    model.model.diffusion_model.__class__ = Stub
    planned = model
    nowhere = {"start_percent": 0.0, "end_percent": 1e-6}
    for node_id, (node, values) in enumerate(
        (
            ("SlipstreamDeepCache", nowhere),
            ("SlipstreamFreeU", nowhere),
            ("SlipstreamCFGCutoff", {"cutoff": 0.999999, "unit": "timesteps"}),
        )
    ):
        planned = hosted.run_node(node, planned, str(node_id), **values)
    times: dict[str, list[float]] = {"stock": [], "planned": []}
    for _ in range(runs):
        for name, patcher in (("stock", model), ("planned", planned)):
            stamps: list[float] = []
            hosted.sample(patcher, steps=evaluations, callback=lambda *_, into=stamps: into.append(time.perf_counter()))
            times[name].append(statistics.median(b - a for a, b in itertools.pairwise(stamps)))
    stock, with_plan = (statistics.median(taken) * 1000 for taken in times.values())
    print(f"\nUNet stub, {evaluations} evaluations, {runs} interleaved runs, {torch.get_num_threads()} threads")
    print(
        f"stock {stock:.3f} ms, with three idle methods {with_plan:.3f} ms: {with_plan - stock:+.3f} ms an evaluation"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="of the image, in pixels")
    parser.add_argument("--only", choices=("methods", "overhead"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS)[1:], default=list(VARIANTS)[1:], metavar="NAME")
    arguments = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("No ComfyUI was found. Set COMFYUI_PATH to its folder.")
    load_pack()
    load_host(comfyui)
    if arguments.only != "methods":
        overhead(200, 9)
    if arguments.only != "overhead":
        methods(arguments.steps, arguments.runs, arguments.size, ["stock", *arguments.variants])


if __name__ == "__main__":
    main()
