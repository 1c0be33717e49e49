"""Other packs, as they are installed, on small models in the real host: with each method of ours and with all of them.

Runs where `SLIPSTREAM_OTHER_PACKS` names a folder with these, and where what they import is installed:

- https://github.com/cubiq/ComfyUI_IPAdapter_plus
- https://github.com/Kosinkadink/ComfyUI-Advanced-ControlNet
- https://github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved
- https://github.com/ltdrdata/ComfyUI-Impact-Pack
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosted
import pytest
import small_models
import torch
from hosted import METHODS, controlnet, latent, prompt, run_node, sample
from test_engine import EXACT, ON

FOLDER = os.environ.get("SLIPSTREAM_OTHER_PACKS")
if not FOLDER:
    pytest.skip("SLIPSTREAM_OTHER_PACKS names no folder with other packs", allow_module_level=True)

OURS = [name for name in METHODS if name != "SlipstreamSequentialOffload"]
"""On a CPU it has nothing to do."""
ALL = "all"
STEPS = 4
LONGER = {"SlipstreamForecast": 7, ALL: 11}
"""Where Forecast is to skip one: the first four steps and the last two are evaluated, and so is one for which
DeepCache's cached ones or CFG Cutoff's change leave too little to go by."""


@pytest.fixture(scope="module", autouse=True)
def server():
    """What packs expect of the host's server as they are loaded and run."""
    import server
    from aiohttp import web

    nothing = lambda *_: None  # noqa: E731
    server.PromptServer.instance = SimpleNamespace(
        routes=web.RouteTableDef(), client_id=None, send_sync=nothing, add_on_prompt_handler=nothing
    )
    yield
    del server.PromptServer.instance


@cache
def load(name: str) -> Any:
    """A pack, loaded as the host does. The module."""
    import nodes

    path = Path(FOLDER) / name
    if not path.is_dir():
        pytest.skip(f"{name} is not in SLIPSTREAM_OTHER_PACKS")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, nodes.load_custom_node(str(path))).result(), f"{name} could not be imported"
    return sys.modules[str(path).replace(".", "_x_")]


@cache
def load_nodes(name: str) -> None:
    """A file of the host's own further nodes, which packs look up by their names."""
    import comfy_extras

    import nodes

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, nodes.load_custom_node(str(Path(comfy_extras.__path__[0]) / name))).result()


def module_of(pack: Any, name: str) -> Any:
    """A module of a pack."""
    return sys.modules[f"{pack.__name__}.{name}"]


def node(name: str) -> Any:
    """Another pack's node, to be called by the name of what it executes."""
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(patcher: Any, steps: int) -> torch.Tensor:
    return sample(patcher, steps=steps)


@dataclass
class Setup:
    """Another pack at work.

    Attributes:
        model: a small model.
        sample: samples it, with what the pack puts around sampling.
        without: samples it without that; None where there is no such thing.
        wire: puts the pack's node on it.
        is_model_node: whether there is one.
        inert: which methods can do nothing here.
        exact: which can only do what changes no bit, and nothing beside all the others.
    """

    model: Any
    sample: Callable[[Any, int], torch.Tensor] = plainly
    without: Callable[[Any, int], torch.Tensor] | None = plainly
    wire: Callable[[Any], Any] = lambda patcher: patcher
    is_model_node: bool = False
    inert: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()

    def run(self, patcher: Any, steps: int) -> torch.Tensor:
        # Some draw from the one generator of the process.
        torch.manual_seed(0)
        with torch.inference_mode():
            return self.sample(patcher, steps)


# IPAdapter Plus


def ipadapter_weights(patcher: Any, width: int) -> dict[str, dict[str, torch.Tensor]]:
    """An IPAdapter of the published layout for a small UNet."""
    unet, is_xl = patcher.model.diffusion_model, width == 2048
    if is_xl:
        depths = {("input", 4): 2, ("input", 5): 2, ("input", 7): 10, ("input", 8): 10}
        depths |= {("output", i): 10 if i < 3 else 2 for i in range(6)} | {("middle", 1): 10}
    else:
        depths = dict.fromkeys([("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("output", i) for i in range(3, 12)], 1)
        depths |= {("middle", 1): 1}
    layers, number = {}, 0
    for (kind, i), depth in depths.items():
        block = {"input": unet.input_blocks, "output": unet.output_blocks, "middle": [None, unet.middle_block]}[kind][i]
        for j in range(depth):
            blocks = block[1].transformer_blocks
            out = blocks[j].attn2.to_k.weight.shape[0] if j < len(blocks) else 1
            for name in ("k", "v"):
                weight = randn(out, width, seed=number) / width**0.5
                layers[f"{2 * number + 1}.to_{name}_ip.weight"] = weight
            number += 1
    projection = {
        "proj.weight": randn(4 * width, 32, seed=1),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def ipadapter(family: str, **options: Any) -> Setup:
    load("ComfyUI_IPAdapter_plus")
    model = hosted.model(family)
    # As the host loads and executes.
    with torch.inference_mode():
        weights = ipadapter_weights(model, 2048 if family == "SDXL" else 64)
    embeds = {"pos_embed": randn(1, 32, seed=2), "neg_embed": torch.zeros(1, 32)}
    options = {"weight": 1.0, "weight_type": "ease in", "start_at": 0.0, "end_at": 1.0} | options

    def wire(patcher: Any) -> Any:
        with torch.inference_mode():
            return node("IPAdapterEmbeds")().apply_ipadapter(patcher, weights, **embeds, **options)[0]

    return Setup(model, wire=wire, is_model_node=True)


# Advanced-ControlNet


def advanced_controlnet() -> Setup:
    load("ComfyUI-Advanced-ControlNet")
    model = hosted.model("SD15")
    late = node("TimestepKeyframe").execute(
        0.5,
        strength=0.4,
        prev_timestep_kf=node("TimestepKeyframe").execute(0.0, strength=1.0, guarantee_steps=1).result[0],
        guarantee_steps=1,
    )
    weights = node("ACN_ScaledSoftControlNetWeights").execute(base_multiplier=0.8, uncond_multiplier=1.0).result[0]
    control, image = controlnet(model), torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(7))
    mask = torch.ones(1, 128, 128)
    mask[..., :64] = 0.5

    def run(patcher: Any, steps: int) -> torch.Tensor:
        conditionings = node("ACN_AdvancedControlNetApply_v2").execute(
            prompt(model, 10), prompt(model, 11), control, image, 1.0, 0.0, 1.0,
            mask_optional=mask, timestep_kf=late.result[0], weights_override=weights,
        )  # fmt: skip
        return sample(patcher, *conditionings.result, steps=steps)

    return Setup(model, run)


REFERENCE = {"inert": frozenset({"SlipstreamRecipe"}), "exact": frozenset({"SlipstreamAttention"})}
"""Its code for the transformers hands their attention nothing that could override it, which leaves the joined
projections; beside Quantize Model there are none."""


def reference_controlnet(kind: str) -> Setup:
    pack = load("ComfyUI-Advanced-ControlNet")
    model = hosted.model("SD15")
    control = node("ACN_ReferenceControlNet").execute(kind, 0.5, 1.0).result[0]
    image = module_of(pack, "adv_control.control_reference").ReferencePreprocWrapper(
        condhint=randn(1, 4, 16, 16, seed=3)
    )

    def run(patcher: Any, steps: int) -> torch.Tensor:
        apply = node("ACN_AdvancedControlNetApply_v2")
        conditionings = apply.execute(prompt(model, 10), prompt(model, 11), control, image, 1.0, 0.0, 1.0)
        return sample(patcher, *conditionings.result, steps=steps)

    return Setup(model, run, **REFERENCE)


# AnimateDiff-Evolved

FRAMES = 8


def motion_model(patcher: Any, pack: Any, version: str = "v3", seed: int = 4) -> Any:
    """A motion module of the published layout for the small SD 1.5."""
    modules = module_of(pack, "animatediff.motion_module_ad")
    info = modules.AnimateDiffInfo("SD1.5", "AnimateDiff", version, "small")
    positions = {f"temporal.attention_blocks.{i}.pos_encoder.pe": torch.zeros(1, 32, 32) for i in (0, 1)}
    model = modules.AnimateDiffModel(positions, info)
    widths = [patcher.model.diffusion_model.model_channels * factor for factor in (1, 2, 4, 4)]
    for name, kind, order in (("down_blocks", "down", widths), ("up_blocks", "up", widths[::-1])):
        blocks = [
            modules.MotionModule(width, True, 32, kind, i, model.attn_block_types, model.ops)
            for i, width in enumerate(order)
        ]
        setattr(model, name, torch.nn.ModuleList(blocks))
    hosted.initialize(model, seed)
    return module_of(pack, "animatediff.model_injection").create_MotionModelPatcher(model, hosted.CPU, hosted.CPU)


def animatediff(version: str = "v3", context: str | None = None, **inputs: Any) -> Setup:
    pack = load("ComfyUI-AnimateDiff-Evolved")
    model = hosted.model("SD15")
    motion = motion_model(model, pack, version)
    options = None
    if context is not None:
        arguments = {"context_length": 4, "context_overlap": 2, "fuse_method": "pyramid"}
        arguments |= {} if context == "StandardStatic" else {"context_stride": 1}
        options = node(f"ADE_{context}ContextOptions")().create_options(**arguments)[0]
    settings = inputs.pop("settings", lambda: None)()
    extras = inputs.pop("extras", None)
    if extras is not None:
        options = node("ADE_ContextExtras_Set")().set_context_extras(options, extras())[0]
    inputs = {name: make() for name, make in inputs.items()}

    def wire(patcher: Any) -> Any:
        motions = node("ADE_ApplyAnimateDiffModel")().apply_motion_model(motion, **inputs)[0]
        return node("ADE_UseEvolvedSampling")().use_evolved_sampling(
            patcher, "autoselect", motions, context_options=options, sample_settings=settings
        )[0]

    def run(patcher: Any, steps: int) -> torch.Tensor:
        return sample(patcher, image=latent(model, batch=FRAMES), steps=steps)

    return Setup(model, run, run, wire, True, **(REFERENCE if extras is not None else {}))


def keyframes() -> Any:
    make = node("ADE_AnimateDiffKeyframe")().load_keyframe
    return make(0.5, make(0.0, effect_multival=1.0)[0], effect_multival=0.3)[0]


def sample_settings(**more: Any) -> Any:
    return node("ADE_AnimateDiffSamplingSettings")().create_settings(0, "FreeNoise", "comfy", 0, **more)[0]


def custom_cfg() -> Any:
    return sample_settings(custom_cfg=node("ADE_CustomCFGSimple")().create_custom_cfg(3.0)[0])


def free_init() -> Any:
    options = node("ADE_IterationOptsFreeInit")().create_iter_opts(
        2, "gaussian", 0.25, 0.25, 4, 999, False, "FreeInit [sampler sigma]"
    )
    return sample_settings(iteration_opts=options[0])


def context_ref() -> Any:
    load("ComfyUI-Advanced-ControlNet")
    return node("ADE_ContextExtras_ContextRef")().create_context_extra(0.0, 1.0)[0]


# Impact Pack


def impact(name: str) -> Setup:
    load("ComfyUI-Impact-Pack")
    load_nodes("nodes_mask.py")
    model, vae = hosted.model("SD15"), small_models.trained_vae()
    positive, negative = prompt(model, 10), prompt(model, 11)
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1.0
    pipe = lambda patcher: (patcher, None, vae, positive, negative)  # noqa: E731
    arguments = {"seed": 1, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    empty = lambda: {"samples": latent(model)}  # noqa: E731

    def basic_pipe(patcher: Any, steps: int) -> torch.Tensor:
        _, out, _ = node("ImpactKSamplerBasicPipe").sample(
            pipe(patcher), latent_image=empty(), steps=steps, **arguments
        )
        return out["samples"]

    def two_samplers(patcher: Any, steps: int) -> torch.Tensor:
        make = node("KSamplerProvider").doit
        samplers = [
            make(**arguments | {"seed": i, "steps": steps}, denoise=1.0, basic_pipe=pipe(patcher))[0] for i in (1, 2)
        ]
        return node("TwoSamplersForMask").doit(empty(), *samplers, mask)[0]["samples"]

    def regional(patcher: Any, steps: int) -> torch.Tensor:
        make = node("KSamplerAdvancedProvider").doit
        base, region = [make(cfg, "euler", "normal", pipe(patcher))[0] for cfg in (5.0, 3.0)]
        prompts = node("RegionalPrompt").doit(mask, region)[0]
        return node("RegionalSampler").doit(
            1, 0, "ignore", steps, 1, 1.0, empty(), base, prompts, 10, True, "DISABLE", "AUTO", 0.3
        )[0]["samples"]

    def upscale(patcher: Any, steps: int) -> torch.Tensor:
        upscaler = node("PixelKSampleUpscalerProvider")().doit(
            "bilinear",
            patcher,
            vae,
            steps=steps,
            **arguments,
            positive=positive,
            negative=negative,
            denoise=1.0,
            use_tiled_vae=False,
        )[0]
        return node("IterativeLatentUpscale")().doit(empty(), 1.5, 2, "", upscaler)[0]["samples"]

    def detailer(patcher: Any, steps: int) -> torch.Tensor:
        image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(7))
        segments = node("MaskToSEGS").doit(mask, False, 1.5, False, 8)[0]
        return node("DetailerForEach")().doit(
            image, segments, patcher, None, vae, 128, True, 256, **arguments, steps=steps, positive=positive,
            negative=negative, denoise=0.6, feather=5, noise_mask=True, force_inpaint=True, wildcard="", cycle=1,
        )[0]  # fmt: skip

    kinds = (basic_pipe, two_samplers, regional, upscale, detailer)
    run = {kind.__name__: kind for kind in kinds}[name]
    # Each step of it is a run of its own.
    inert = (
        frozenset({"SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamForecast"})
        if name == "regional"
        else frozenset()
    )
    return Setup(model, run, None, inert=inert)


SETUPS: dict[str, Callable[[], Setup]] = {
    "IPAdapter, SD15": lambda: ipadapter("SD15"),
    "IPAdapter, SDXL": lambda: ipadapter("SDXL", weight_type="style transfer"),
    "IPAdapter, masked, from 0.3": lambda: ipadapter(
        "SD15", start_at=0.3, attn_mask=torch.rand(1, 64, 64), embeds_scaling="K+V"
    ),
    "Advanced-ControlNet": advanced_controlnet,
    "Reference, attn": lambda: reference_controlnet("reference_attn"),
    "Reference, adain": lambda: reference_controlnet("reference_adain"),
    "AnimateDiff": animatediff,
    "AnimateDiff v1": lambda: animatediff("v1"),
    "AnimateDiff, windows": lambda: animatediff(context="StandardStatic"),
    "AnimateDiff v1, windows": lambda: animatediff("v1", "StandardStatic"),
    "AnimateDiff, moving windows": lambda: animatediff(context="StandardUniform"),
    "AnimateDiff, keyframes": lambda: animatediff(context="StandardStatic", ad_keyframes=keyframes),
    "AnimateDiff, custom CFG": lambda: animatediff(context="StandardStatic", settings=custom_cfg),
    "AnimateDiff, FreeInit": lambda: animatediff(settings=free_init),
    "AnimateDiff, ContextRef": lambda: animatediff(context="StandardStatic", extras=context_ref),
    "Impact, basic pipe": lambda: impact("basic_pipe"),
    "Impact, two samplers": lambda: impact("two_samplers"),
    "Impact, regional": lambda: impact("regional"),
    "Impact, upscale": lambda: impact("upscale"),
    "Impact, detailer": lambda: impact("detailer"),
}


@cache
def made(name: str) -> Setup:
    return SETUPS[name]()


@cache
def prepared(name: str, steps: int) -> tuple[Setup, torch.Tensor]:
    """A setup, and its image without ours."""
    setup = made(name)
    without = None if setup.without is None else setup.without(setup.model, steps)
    image = setup.run(setup.wire(setup.model), steps)
    assert without is None or not torch.equal(image, without), "the pack does nothing"
    return setup, image


def ours(patcher: Any, names: list[str]) -> Any:
    for node_id, name in enumerate(names, 1):
        patcher = run_node(name, patcher, str(node_id), **ON[name])
    return patcher


@pytest.mark.parametrize("method", [*OURS, ALL])
@pytest.mark.parametrize("name", list(SETUPS))
def test_it_works_with(name, method, last_lines):
    """One image wherever ours are wired, each active, and nothing left behind."""
    steps = LONGER.get(method, STEPS)
    setup, theirs = prepared(name, steps)
    names = [other for other in OURS if method in (other, ALL)]
    modules = list(setup.model.model.diffusion_model.named_modules())
    below = setup.run(ours(setup.wire(setup.model), names), steps)
    inert = {one for node_id, one in enumerate(names, 1) if is_inert(last_lines(str(node_id)))}
    # What Recipe would choose, other nodes have set.
    replaced = setup.exact | {"SlipstreamRecipe"} if method == ALL else set()
    assert inert == setup.inert.intersection(names) | replaced
    if setup.is_model_node:
        assert torch.equal(setup.run(setup.wire(ours(setup.model, names)), steps), below)
    assert below.isfinite().all()
    assert torch.equal(below, theirs) == (inert.issuperset(names) or method in EXACT | setup.exact)
    if method == "SlipstreamDeepCache" and setup.without is not None:
        assert not torch.equal(below, setup.without(ours(setup.model, names), steps))
    assert torch.equal(setup.run(setup.wire(setup.model), steps), theirs)
    assert list(setup.model.model.diffusion_model.named_modules()) == modules


def is_inert(lines: list[tuple[str, str]]) -> bool:
    states = {state for state, _ in lines}
    assert states <= {"active", "inert"}, lines
    return states == {"inert"}
