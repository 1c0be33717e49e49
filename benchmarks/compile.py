"""What compiling gives a full-size UNet: first image, steady time, peak memory, beside core's TorchCompileModel.

    python benchmarks/compile.py --output folder       # in the environment that `./slipstream env` names

Random weights, one process. Each variant's first image is made with an empty disk cache; then all variants are sampled
in turn, round after round, and the medians count. Nothing else must be running.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all
from readme import described, publish


def architecture(family: str) -> Any:
    """The host's configuration of a model of the real architecture."""
    import comfy.supported_models as families
    import small_models

    unet, kind = {
        "sd15": ({**small_models.UNET, "model_channels": 320, "context_dim": 768}, families.SD15),
        "sdxl": (
            {
                **small_models.XL,
                "model_channels": 320,
                "context_dim": 2048,
                "num_head_channels": 64,
                "transformer_depth": [0, 0, 2, 2, 10, 10],
                "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
                "transformer_depth_middle": 10,
            },
            families.SDXL,
        ),
    }[family]
    return kind(unet)


def full_size(family: str, dtype: Any) -> Any:
    """A UNet of the real architecture with random weights."""
    return random_model(architecture(family), dtype)


def flux(is_tiny: bool, depth: int = 2, depth_single_blocks: int = 4) -> Any:
    """The host's configuration of Flux's layout at its full width, but for some blocks only: 340 M weights each, or
    140 M where image and prompt are one stream."""
    import comfy.supported_models as families

    width = {"hidden_size": 128, "num_heads": 4, "axes_dim": [8, 12, 12], "context_in_dim": 64, "vec_in_dim": 64}
    if not is_tiny:
        width = {
            "hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "context_in_dim": 4096, "vec_in_dim": 768,
        }  # fmt: skip
    return families.Flux({
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": depth,
        "depth_single_blocks": depth_single_blocks, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": [], **width,
    })  # fmt: skip


def flux_prompt(model: Any, tokens: int) -> list[Any]:
    """A random prompt for a model of Flux's layout."""
    import torch

    config, generator = model.model.model_config.unet_config, torch.Generator().manual_seed(1)
    context = torch.randn(1, tokens, config["context_in_dim"], generator=generator)
    pooled = torch.randn(1, config["vec_in_dim"], generator=generator)
    return [[context, {"pooled_output": pooled, "guidance": 3.5}]]


def random_model(config: Any, dtype: Any) -> Any:
    """A model of one of the host's configurations with random weights, made where it runs."""
    import comfy.model_management
    import torch
    from comfy.model_patcher import ModelPatcher

    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            is_norm = weight.ndim == 1 and name.endswith(("weight", "scale"))
            weight.fill_(1.0) if is_norm else weight.normal_(std=0.02 if weight.ndim > 1 else 0.01)
    return ModelPatcher(model, load_device=device, offload_device=device)


def variants(model: Any) -> dict[str, Any]:
    """The models to compare, by name."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from hosted import compile_model, run_node

    def methods(patcher: Any) -> Any:
        cached = run_node("SlipstreamDeepCache", patcher, "2", cache_interval=3)
        return run_node("SlipstreamCFGCutoff", cached, "3", cutoff=0.5)

    blocks = compile_model(model, "1", "inductor", scope="blocks")
    whole = compile_model(model, "1", "inductor", scope="model")
    return {
        "eager": model,
        "core TorchCompileModel": TorchCompileModel.execute(model, "inductor").result[0],
        "Compile Model, blocks": blocks,
        "Compile Model, model": whole,
        "eager + DeepCache + CFG Cutoff": methods(model),
        "Compile Model, blocks + DeepCache + CFG Cutoff": methods(blocks),
        "Compile Model, model + DeepCache + CFG Cutoff": methods(whole),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """First image, steady seconds and peak memory of each variant."""
    import hosted
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    machine = hosted.engine("host.machine")
    dtype = getattr(torch, arguments.dtype)
    model = full_size(arguments.family, dtype)
    device = model.load_device
    latent = torch.zeros(1, 4, arguments.size // 8, arguments.size // 8)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def image(patcher: Any) -> tuple[float, Any]:
        began = machine.clock(device)
        result = hosted.sample(patcher, *prompts, steps=arguments.steps, cfg=7.5, image=latent)
        return machine.clock(device) - began, result

    chosen = {name: patcher for name, patcher in variants(model).items() if name in (arguments.only or [name])}
    figures: dict[str, Any] = {}
    verdicts = hosted.engine("telling.verdicts")
    image(model)  # the process's own first time
    expected = {}
    with ExitStack() as caches:
        for name, patcher in chosen.items():
            # An empty disk cache each, which stays for the rounds.
            if not arguments.keep_cache:
                caches.enter_context(fresh_cache(delete=False))
            counters.clear()
            machine.release_unused()
            with machine.watch_memory(device) as peak:
                seconds, result = image(patcher)
            expected[name] = result
            told = verdicts._kept.get((None, "1"))
            reference = expected.get("eager + DeepCache + CFG Cutoff" if "DeepCache" in name else "eager", result)
            figures[name] = {
                "first_s": seconds,
                "peak_increase_mib": [one.increase_mib for one in peak.peaks],
                "error": float((result - reference).abs().max() / reference.abs().max()),
                "graphs": counters["stats"]["unique_graphs"],
                "disk_cache": {key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss")},
                "verdict": [line["text"] for line in told.lines.values()]
                if told and name.startswith("Compile")
                else [],
                "steady_s": [],
            }
            print(f"{name}: first image {seconds:.1f} s; {figures[name]['verdict']}", flush=True)
        for number in range(arguments.runs):
            for name, patcher in chosen.items():
                figures[name]["steady_s"].append(image(patcher)[0])
            print(f"round {number + 1} of {arguments.runs}", flush=True)
    return {
        "machine": machine.describe(device),
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "figures": figures,
    }


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    figures, settings = report["figures"], report["settings"]
    steady = {name: statistics.median(one["steady_s"] or [float("nan")]) for name, one in figures.items()}
    eager = steady.get("eager", float("nan"))
    rows = [
        f"| {name} | {one['first_s']:.1f} s | {steady[name]:.2f} s | {eager / steady[name]:.2f}x "
        f"| {statistics.median(one['peak_increase_mib']):.0f} MiB | {one['graphs']} | {one['error']:.1e} |"
        for name, one in figures.items()
    ]
    told = [f"- {name}: *{text}*" for name, one in figures.items() for text in one["verdict"]]
    return "\n".join(
        [
            "# What compiling gives\n",
            f"{settings['family']}, random weights, {settings['dtype']}, {settings['size']}x{settings['size']}, "
            f"{settings['steps']} steps of euler, cfg 7.5; {described(report['machine'])}. "
            "First images with an empty disk cache; then "
            f"{settings['runs']} rounds in turn, medians. Variants with DeepCache (interval 3) and CFG Cutoff (0.5) "
            "come last and use what was compiled before. Memory is the peak above that before the image; errors are "
            "the greatest difference of the latents from those without compiling, relative to the greatest value.\n",
            "| variant | first image | steady | against eager | memory | new graphs | error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "The verdicts of the first images:\n",
            *told,
            "",
            "`python benchmarks/compile.py`, in the environment that `./slipstream env` names, repeats it.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep-cache", action="store_true", help="use the disk cache that is there, as a restart does")
    parser.add_argument("--only", nargs="*", help="variants by name")
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    report = measure(arguments)
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
