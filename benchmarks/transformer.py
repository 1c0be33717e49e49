"""What compiling and quantizing give a transformer: Flux's blocks at full width, a few of them, on this machine.

    python benchmarks/transformer.py --output folder    # in the environment that `./slipstream env` names

Random weights, one process. Each variant's first image is made with an empty disk cache; then all variants are sampled
in turn, round after round, and the medians count. Nothing else must be running.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from compile import flux, flux_prompt, random_model
from loading import load_all
from readme import described, publish
from rounds import in_turn

SCHEME = "int8 dynamic"


def variants(model: Any, min_features: int) -> dict[str, Any]:
    """The models to compare, by name."""
    from hosted import compile_model, run_node

    quantized = run_node("SlipstreamQuantize", model, "1", scheme=SCHEME, min_features=min_features)
    return {
        "eager": model,
        "Compile Model": compile_model(model, "2", "inductor"),
        f"Quantize Model, {SCHEME}": quantized,
        f"Compile Model and {SCHEME}": compile_model(quantized, "2", "inductor"),
    }


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """First image, steady seconds and peak memory of each variant, and what it says of itself; the model's bytes."""
    import comfy.model_management
    import hosted
    import torch

    config = flux(arguments.tiny, arguments.depth, arguments.depth_single_blocks)
    model = random_model(config, getattr(torch, arguments.dtype))
    prompt = flux_prompt(model, arguments.tokens)
    latent = torch.zeros(1, 16, arguments.size // 8, arguments.size // 8)

    def image(patcher: Any) -> Any:
        return hosted.sample(patcher, prompt, prompt, steps=arguments.steps, cfg=1.0, scheduler="simple", image=latent)

    every = variants(model, arguments.min_features)
    figures = in_turn(every, arguments.only, image, model.load_device, arguments.runs)
    return figures, comfy.model_management.module_size(model.model)


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    figures, settings = report["figures"], report["settings"]
    steady = {name: statistics.median(one["steady_s"] or [float("nan")]) for name, one in figures.items()}
    rows = [
        f"| {name} | {one['first_s']:.1f} s | {steady[name]:.2f} s | {steady['eager'] / steady[name]:.2f}x "
        f"| {statistics.median(one['peak_increase_mib']):.0f} MiB | {one['latent_error']:.1e} |"
        for name, one in figures.items()
    ]
    told = [f"- {name}: *{text}*" for name, one in figures.items() for text in one["verdicts"]]
    return "\n".join(
        [
            "# What compiling and quantizing give a transformer\n",
            f"Flux's layout at {'a small' if settings['tiny'] else 'its full'} width, {settings['depth']} of its 19 "
            f"blocks of two streams and {settings['depth_single_blocks']} of its 38 of one "
            f"({report['bytes'] / 2**20:.0f} MiB of weights), random weights, {settings['dtype']}, "
            f"{settings['size']}x{settings['size']}, {settings['tokens']} tokens of prompt, {settings['steps']} steps "
            f"of euler; {described(report['machine'])}. First images with an empty "
            f"disk cache; then {settings['runs']} rounds in turn, medians. Memory is the peak above that before the "
            "image; errors are the norm of the latents' difference from eager ones over the norm of those.\n",
            "| variant | first image | steady | against eager | memory | error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "The verdicts of the first images:\n",
            *told,
            "",
            "`python benchmarks/transformer.py`, in the environment that `./slipstream env` names, repeats it.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2, help="blocks of two streams (default: %(default)s)")
    parser.add_argument("--depth-single-blocks", type=int, default=4, help="of one (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--min-features", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks: whether it runs, not how fast")
    parser.add_argument("--only", nargs="*", help="variants by name, beside the eager one")
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted

    figures, size = measure(arguments)
    report = {
        "machine": hosted.engine("host.machine").describe(hosted.CPU),
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "bytes": size,
        "figures": figures,
    }
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
