"""Writes the API prompts of a release: each template as it is queued, and each node with several settings.

Run once, when a version is released; what it wrote is never written again:

    python tests/released/record.py 0.2.0

The models are the stand-ins of `tests/e2e/standins`, which the server's own loader returns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT / "tests"), str(ROOT / "demo")]

from comfy_cli.workflow_to_api import convert_ui_to_api
from prompts import Prompt, scratch_server

Inputs = Mapping[str, Any]
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
"""The type of an input whose choices have inputs of their own."""
UNET, VAE = "minimal.safetensors", "sd_xl_base_1.0.safetensors"
"""Stand-ins: a UNet with attention at every level, and one with a KL autoencoder."""

MODEL_NODES: dict[str, Sequence[Inputs]] = {
    "Forecast": (
        {},
        {"error_budget": 0.5, "max_skips": 1, "start_percent": 0.1, "end_percent": 0.9},
        {"error_budget": 0.0},
    ),
    "DeepCache": (
        {},
        {"cache_interval": 2, "cache_branch_id": 1, "schedule": "quadratic", "start_percent": 0.1, "end_percent": 0.9},
        {"cache_interval": 1},
    ),
    "CFGCutoff": ({}, {"cutoff": 0.5, "unit": "timesteps"}, {"cutoff": 0.0}, {"cutoff": 1.0}),
    "FreeU": (
        {},
        {"preset": "SDXL", "version": "v1", "start_percent": 0.2, "end_percent": 0.8},
        {"preset": "custom", "b1": 1.1, "b2": 1.2, "s1": 0.5, "s2": 0.4},
    ),
    "Quantize": (
        {"min_features": 0},
        {"scheme": "int8 weight-only", "min_features": 64, "skip": "attn2, ff", "offload_originals": "on"},
    ),
    "CompileModel": (
        {"backend": "auto"},
        {"backend": "inductor", "backend.scope": "model", "backend.dynamic": "on"},
        {"backend": "inductor", "backend.mode": "max-autotune-no-cudagraphs", "backend.fullgraph": True},
    ),
    "Precision": (
        {},
        {"compute_dtype": "bf16", "channels_last": "on", "tf32": "on"},
        {"compute_dtype": "bf16", "scope": "transformers"},
    ),
    "Attention": ({}, {"backend": "math", "fuse_qkv": True}, {"backend": "flash"}, {"backend": "host"}),
    "SequentialOffload": ({}, {"budget_mib": 512}),
    "CPU": (
        {},
        {"winograd": "F(2x2)", "bf16": False, "sdpa": False},
        {"winograd": "F(4x4)"},
        {"winograd": "off", "bf16": True, "sdpa": True},
    ),
    "Recipe": tuple(
        {"goal": goal} for goal in ("best quality", "balanced", "fastest", "under 8 GB", "under 6 GB", "under 4 GB")
    ),
}
VAE_NODES: dict[str, Sequence[Inputs]] = {
    "CompileVAE": ({"backend": "auto"}, {"backend": "inductor", "backend.dynamic": "off", "backend.fullgraph": True}),
    "FP16FixVAE": ({}, {"precision": "fp32"}, {"precision": "bf16", "method": "as is"}),
}
TILES: Sequence[Inputs] = (
    {},
    {"tile_size": 128},
    {"tile_size": 128, "statistics": "estimated", "batch_slicing": False},
)
STAGES = ("text encoders", "diffusion models", "all but the input's")
MODES: Sequence[Inputs] = (
    {"mode": "ensemble"},
    {"mode": "ensemble", "mode.handoff": 0.5, "mode.split": "steps", "mode.exact_handoff": True},
    {"mode": "image to image", "mode.refiner_denoise": 0.4},
)
SAMPLERS: Sequence[Inputs] = (
    {"sampler_name": "heun", "scheduler": "karras"},
    {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
    {"sampler_name": "euler_ancestral", "denoise": 0.6},
    {"sampler_name": "euler_cfg_pp", "cfg": 1.5},
    {"sampler_name": "uni_pc", "scheduler": "sgm_uniform"},
)
STACK: Sequence[tuple[str, Inputs]] = (
    ("FreeU", {"preset": "SD 1.5"}),
    ("CFGCutoff", {"cutoff": 0.5}),
    ("DeepCache", {"cache_interval": 2}),
    ("Precision", {"compute_dtype": "bf16", "scope": "transformers"}),
    ("Attention", {"fuse_qkv": True}),
)


class Graph:
    """A prompt in the making.

    Args:
        nodes: every node as the server describes it, by id: what is not given stays at its default.
        checkpoint: the stand-in that the first node loads.
    """

    def __init__(self, nodes: Mapping[str, Any], checkpoint: str):
        self.nodes = nodes
        self.prompt: Prompt = {}
        self.loader = self.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.model, self.clip, self.vae = ([self.loader, output] for output in range(3))

    def add(self, kind: str, **inputs: Any) -> str:
        """A node; returns its id."""
        about = self.nodes[kind]["input"]
        known = {**about.get("required", {}), **about.get("optional", {})}
        defaults = defaults_of(known)
        for name, (option_kind, *more) in known.items():
            if option_kind == DYNAMIC:
                chosen = next(option for option in more[0]["options"] if option["key"] == inputs[name])
                parts = {part: option for group in chosen["inputs"].values() for part, option in group.items()}
                defaults |= {f"{name}.{part}": value for part, value in defaults_of(parts).items()}
        values = {name: value for name, value in {**defaults, **inputs}.items() if value is not None}
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"class_type": kind, "inputs": values}
        return number

    def ours(self, name: str, **inputs: Any) -> str:
        return self.add(f"Slipstream{name}", **inputs)

    def text(self, text: str) -> list[Any]:
        return [self.add("CLIPTextEncode", clip=self.clip, text=text), 0]

    def latent(self, size: int = 64, batch: int = 1) -> list[Any]:
        return [self.add("EmptyLatentImage", width=size, height=size, batch_size=batch), 0]

    def sample(self, model: list[Any], latent: list[Any] | None = None, **inputs: Any) -> list[Any]:
        common = {"seed": 7, "steps": 6, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        links = {"model": model, "positive": self.text("a red circle"), "negative": self.text("blurry")}
        latent = latent or self.latent()
        return [self.add("KSampler", **links, latent_image=latent, **{**common, **inputs}), 0]

    def save(self, samples: list[Any], vae: list[Any] | None = None) -> Prompt:
        image = [self.add("VAEDecode", samples=samples, vae=vae or self.vae), 0]
        return self.saved(image)

    def saved(self, image: list[Any]) -> Prompt:
        self.add("SaveImage", images=image, filename_prefix="released")
        return self.prompt


def defaults_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: default_of(options) for name, options in inputs.items()}


def default_of(options: Any) -> Any:
    """An input's value where none is given, as the canvas has it; None for one that is wired."""
    kind, *more = options
    about = more[0] if more else {}
    if "default" in about:
        return about["default"]
    if isinstance(kind, list):
        return next(iter(kind), None)
    if kind == "COMBO":
        return next(iter(about.get("options", ())), None)
    return None


def titled(name: str, inputs: Inputs) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in inputs.items())])


def of_nodes(nodes: Mapping[str, Any]) -> dict[str, Prompt]:
    """Each node with several settings, and several of them together."""
    made: dict[str, Prompt] = {}
    for name, several in MODEL_NODES.items():
        for inputs in several:
            # Compilers take their time: one level.
            graph = Graph(nodes, "tiniest.safetensors" if name == "CompileModel" else UNET)
            made[titled(name, inputs)] = graph.save(graph.sample([graph.ours(name, model=graph.model, **inputs), 0]))
    for name, several in VAE_NODES.items():
        for inputs in several:
            graph = Graph(nodes, VAE)
            made[titled(name, inputs)] = graph.save(graph.latent(256), [graph.ours(name, vae=graph.vae, **inputs), 0])
    graph = Graph(nodes, UNET)
    made["TinyVAE"] = graph.save(graph.sample(graph.model), [graph.ours("TinyVAE", model=graph.model), 0])
    for inputs in TILES:
        graph = Graph(nodes, VAE)
        there = graph.ours("VAEDecodeTiled", samples=graph.latent(256, 2), vae=graph.vae, **inputs)
        made[titled("VAEDecodeTiled", inputs)] = graph.saved([there, 0])
        graph = Graph(nodes, VAE)
        image = [graph.add("EmptyImage", width=256, height=256, batch_size=2, color=0x336699), 0]
        back = graph.ours("VAEEncodeTiled", pixels=image, vae=graph.vae, **inputs)
        made[titled("VAEEncodeTiled", inputs)] = graph.save([back, 0])
    for stages in STAGES:
        graph = Graph(nodes, UNET)
        staged = graph.ours("StageOffload", value=graph.sample(graph.model), stages=stages)
        made[titled("StageOffload", {"stages": stages})] = graph.save([staged, 0])
    for inputs in MODES:
        made[titled("RefinerHandoff", inputs)] = refined(nodes, inputs)
    graph = Graph(nodes, UNET)
    del graph.prompt["1"]
    demo = graph.ours("DemoModel")
    graph.model, graph.clip, graph.vae = ([demo, output] for output in range(3))
    made["DemoModel"] = graph.save(graph.sample(graph.model, graph.latent(96)))
    for inputs in ({"runs": 1}, {"runs": 1, "ablation": "each alone"}):
        made[titled("Benchmark", inputs)] = measured(nodes, inputs)
    graph = Graph(nodes, UNET)
    model = [graph.ours("DeepCache", model=graph.model), 0]
    samples = graph.sample(model)
    report = graph.ours("Report", model=model, after=samples)
    graph.add("PreviewAny", source=[report, 0])
    made["Report"] = graph.save(samples)
    for inputs in SAMPLERS:
        for order in (STACK, STACK[::-1]):
            graph = Graph(nodes, UNET)
            model = graph.model
            for name, settings in order:
                model = [graph.ours(name, model=model, **settings), 0]
            title = titled("all together" if order is STACK else "the other way round", inputs)
            made[title] = graph.save(graph.sample(model, graph.latent(64, 2), **inputs))
    made["custom sampler"] = custom(nodes)
    return made


def refined(nodes: Mapping[str, Any], inputs: Inputs) -> Prompt:
    graph = Graph(nodes, "sd_xl_base_1.0.safetensors")
    refiner = graph.add("CheckpointLoaderSimple", ckpt_name="sd_xl_refiner_1.0.safetensors")
    positive, negative = graph.text("a red circle"), graph.text("blurry")
    base_clip, graph.clip = graph.clip, [refiner, 1]
    refined_positive, refined_negative = graph.text("a red circle"), graph.text("blurry")
    graph.clip = base_clip
    handoff = graph.ours(
        "RefinerHandoff", base=graph.model, refiner=[refiner, 0], base_positive=positive, base_negative=negative,
        latent_image=graph.latent(128), seed=7, steps=8, cfg=5.0, refiner_cfg=5.0, sampler_name="euler",
        scheduler="normal", refiner_positive=refined_positive, refiner_negative=refined_negative, **inputs,
    )  # fmt: skip
    return graph.save([handoff, 0])


def measured(nodes: Mapping[str, Any], inputs: Inputs) -> Prompt:
    graph = Graph(nodes, UNET)
    model = [graph.ours("DeepCache", model=graph.model), 0]
    model = [graph.ours("CFGCutoff", model=model, cutoff=0.5), 0]
    benchmark = graph.ours(
        "Benchmark", baseline=graph.model, candidate=model, positive=graph.text("a red circle"),
        negative=graph.text("blurry"), latent_image=graph.latent(), seed=7, steps=6, cfg=5.0, sampler_name="euler",
        scheduler="normal", vae=graph.vae, **inputs,
    )  # fmt: skip
    return graph.saved([benchmark, 0])


def custom(nodes: Mapping[str, Any]) -> Prompt:
    """The host's sampler in parts."""
    graph = Graph(nodes, UNET)
    model = graph.model
    for name, settings in STACK:
        model = [graph.ours(name, model=model, **settings), 0]
    guider = graph.add(
        "CFGGuider", model=model, positive=graph.text("a red circle"), negative=graph.text("blurry"), cfg=5.0
    )
    sampler = graph.add("KSamplerSelect", sampler_name="dpm_2")
    sigmas = graph.add("BasicScheduler", model=model, scheduler="normal", steps=6, denoise=1.0)
    noise = graph.add("RandomNoise", noise_seed=7)
    made = graph.add(
        "SamplerCustomAdvanced", noise=[noise, 0], guider=[guider, 0], sampler=[sampler, 0], sigmas=[sigmas, 0],
        latent_image=graph.latent(),
    )  # fmt: skip
    return graph.save([made, 0])


def of_templates(nodes: Mapping[str, Any]) -> dict[str, Prompt]:
    """Each template as the canvas would queue it."""
    paths = sorted((ROOT / "workflows").glob("*.json"))
    return {path.stem: convert_ui_to_api(json.loads(path.read_text(encoding="utf-8")), nodes) for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="what is released: the folder's name")
    folder = FOLDER / parser.parse_args().version
    if folder.exists():
        raise SystemExit(f"{folder} is there: a release's prompts are not written again.")
    with scratch_server(ROOT) as server:
        nodes = server.nodes()
        made = {"nodes": of_nodes(nodes), "templates": of_templates(nodes)}
    folder.mkdir()
    for name, prompts in made.items():
        (folder / f"{name}.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
