"""What quantizing gives: time of a transformer-heavy UNet, bytes of its layers, and what it costs in the picture.

    python benchmarks/quantize.py --output folder       # in the environment that `./slipstream env` names

Times: a UNet of SDXL's layout and depth, at half its width so that fp32 fits, with random weights, in one process.
Each variant's first image is made with an empty disk cache; then all variants are sampled in turn, round after round,
and the medians count. Pictures: the demo model's, each scheme at the seeds of the exact run. Nothing else must be
running.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host"), str(ROOT / "training")]

from loading import load_all
from readme import described, publish
from rounds import in_turn

SCHEMES = ("int8 dynamic", "int8 weight-only", "fp8 weight-only")
"""Those that a CPU has."""


def transformer_heavy(width: int, depth: int) -> Any:
    """A model of SDXL's layout. Its width is 320, its depth 10."""
    import comfy.model_management
    import comfy.supported_models as families
    import small_models
    import torch
    from comfy.model_patcher import ModelPatcher

    unet = {
        **small_models.XL,
        "model_channels": width,
        "context_dim": 2048,
        "num_head_channels": 64,
        "transformer_depth": [0, 0, 2, 2, depth, depth],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, depth, depth, depth],
        "transformer_depth_middle": depth,
    }
    config = families.SDXL(unet)
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    small_models.initialize(model.diffusion_model, 0)
    return ModelPatcher(model, load_device=device, offload_device=device)


def variants(model: Any, min_features: int) -> dict[str, Any]:
    """The models to compare, by name."""
    from hosted import compile_model, run_node

    def quantized(scheme: str) -> Any:
        return run_node("SlipstreamQuantize", model, "1", scheme=scheme, min_features=min_features)

    return {
        "eager": model,
        "inductor": compile_model(model, "2", "inductor"),
        "int8 dynamic": quantized("int8 dynamic"),
        **{f"{scheme} + inductor": compile_model(quantized(scheme), "2", "inductor") for scheme in SCHEMES},
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """First image and steady seconds of each variant, and what it says of itself."""
    import hosted

    model = transformer_heavy(arguments.width, arguments.depth)
    latent = hosted.latent(model, arguments.size // 8)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def image(patcher: Any) -> Any:
        return hosted.sample(patcher, *prompts, steps=arguments.steps, cfg=7.5, image=latent)

    every = variants(model, arguments.min_features)
    return in_turn(every, arguments.only, image, model.load_device, arguments.runs)


def pictures(count: int, steps: int) -> list[dict[str, Any]]:
    """SSIM and PSNR of each scheme's pictures to the exact ones."""
    import hosted
    from pictures import Demo, held_out
    from slipstream_pack.nodes.measuring.fidelity import compare

    demo = Demo()
    prompts, _ = held_out(count)

    def sample(model: Any) -> Any:
        return demo.decode(demo.sample(prompts, range(count), model=model, steps=steps))

    exact, rows = sample(demo.model), []
    for scheme in SCHEMES:
        images = sample(hosted.run_node("SlipstreamQuantize", demo.model, scheme=scheme, min_features=0))
        each = [compare(a, b, a[None], b[None]) for a, b in zip(exact, images, strict=True)]
        rows.append(
            {
                "scheme": scheme,
                "ssim": statistics.mean(one.ssim for one in each),
                "ssim_worst": min(one.ssim for one in each),
                "psnr_db": statistics.mean(one.psnr_db for one in each if one.psnr_db is not None),
            }
        )
        print(rows[-1], flush=True)
    return rows


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    figures, settings = report["figures"], report["settings"]
    steady = {name: statistics.median(one["steady_s"] or [float("nan")]) for name, one in figures.items()}
    rows = [
        f"| {name} | {one['first_s']:.1f} s | {steady[name]:.2f} s | "
        + " | ".join(f"{steady.get(base, float('nan')) / steady[name]:.2f}x" for base in ("eager", "inductor"))
        + f" | {one['latent_error']:.1e} |"
        for name, one in figures.items()
    ]
    told = [f"- {name}: *{text}*" for name, one in figures.items() for text in one["verdicts"]]
    costs = [
        f"| {row['scheme']} | {row['ssim']:.4f} | {row['ssim_worst']:.4f} | {row['psnr_db']:.1f} |"
        for row in report["pictures"]
    ]
    return "\n".join(
        [
            "# What quantizing gives\n",
            f"A UNet of SDXL's layout, {settings['width']} channels (SDXL has 320), {settings['depth']} transformer "
            f"blocks at the deepest level (10), random weights, float32, {settings['size']}x{settings['size']}, "
            f"{settings['steps']} steps of euler, cfg 7.5; {described(report['machine'])}. First images with an empty "
            f"disk cache; then {settings['runs']} rounds in turn, medians. Errors are the norm of the latents' "
            "difference from eager ones over the norm of those.\n",
            "| variant | first image | steady | against eager | against inductor | error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "The verdicts of the first images:\n",
            *told,
            "",
            f"The demo model's pictures, {settings['count']} prompts of combinations that training held out, a seed "
            "each, 20 steps of dpmpp_2m, karras, cfg 5, all its layers within blocks quantized (`min_features` 0), "
            "against the exact ones:\n",
            "| scheme | SSIM | worst SSIM | PSNR (dB) |",
            "|---|---|---|---|",
            *costs,
            "",
            "`python benchmarks/quantize.py`, in the environment that `./slipstream env` names, repeats it.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=160, help="channels; SDXL has 320 (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=10, help="transformer blocks at the deepest level (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--min-features", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=32, help="prompts of the demo model (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="variants by name")
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted
    import torch

    figures = measure(arguments)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    report = {
        "machine": hosted.engine("host.machine").describe(torch.device("cpu")),
        "settings": settings,
        "figures": figures,
        "pictures": pictures(arguments.count, 20),
    }
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
