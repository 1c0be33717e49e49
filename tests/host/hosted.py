"""Small models in the real host: our nodes executed on them, other packs' things put on them, sampled, counted."""

from __future__ import annotations

import asyncio
import importlib
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.hooks
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from loading import PACK
from small_models import CONFIGS, CPU, build, initialize, model

__all__ = ["CONFIGS", "CPU", "METHODS", "NODES", "build", "initialize", "model"]


def load_nodes() -> list[Any]:
    """What the host gets of the pack. In a thread, since the browser tests leave an event loop running in this one."""
    extension = importlib.import_module(f"{PACK}.nodes.extension").SlipstreamExtension()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, extension.get_node_list()).result()


NODES = {node.define_schema().node_id: node for node in load_nodes()}
"""All of them, by id."""
HOSTS_OWN = ("sampler_name", "scheduler", "name", "plan")
"""Inputs whose choices are the host's, or the user's files."""
_registry = importlib.import_module(f"{PACK}.nodes.engine.plan.registry").METHODS
SEVERAL = ("cpu", "recipe")
"""Files of nodes that add several methods."""
_ids = dict(importlib.import_module(f"{PACK}.nodes").NODES)
METHODS = {_ids[file]: NODES[_ids[file]] for group in (_registry, SEVERAL) for file in _ids if file in group}
"""Those that put a method on a model; those that only suggest come last."""


def orders() -> list[list[str]]:
    """Orders of the methods' nodes: each method once at each place, both ways round."""
    names = list(METHODS)
    rotations = [names[first:] + names[:first] for first in range(len(names))]
    return [*rotations, *(order[::-1] for order in rotations)]


def prompt(patcher: ModelPatcher, seed: int, tokens: int = 8, batch: int = 1, **values: Any) -> list[Any]:
    """A CONDITIONING, as CLIPTextEncode makes it, of the model's width."""
    config = patcher.model.model_config.unet_config
    width = config.get("context_dim") or config.get("cond_seq_dim")
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, tokens, width, generator=generator)
    pooled = torch.randn(batch, 1280, generator=generator)
    return [[context, {"pooled_output": pooled, **values}]]


def latent(patcher: ModelPatcher, size: int = 16, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, patcher.model.latent_format.latent_channels, size, size)


def sample(
    patcher: ModelPatcher,
    positive: Any = None,
    negative: Any = None,
    *,
    steps: int = 6,
    cfg: float = 5.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 1,
    image: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What the KSampler node does: a latent (B, C, H, W)."""
    positive = prompt(patcher, 10) if positive is None else positive
    negative = prompt(patcher, 11) if negative is None else negative
    image = latent(patcher) if image is None else image
    noise = comfy.sample.prepare_noise(image, seed) if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            image,
            seed=seed,
            disable_pbar=True,
            **kwargs,
        )


def execute(name: str, node_id: str = "7", /, **inputs: Any) -> Any:
    """Execute one of our nodes as the host does, missing inputs at their defaults. Returns its NodeOutput."""
    node = NODES[name]
    for option in node.define_schema().inputs:
        default = getattr(option, "default", None)
        if default is not None:
            inputs.setdefault(option.id, default)
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: node_id}, "dynamic_paths": None})
    with torch.inference_mode():
        return clone.EXECUTE_NORMALIZED(**inputs)


def run_node(name: str, patcher: ModelPatcher, node_id: str = "7", **inputs: Any) -> ModelPatcher:
    """Execute one of our nodes on a model. Returns the MODEL that comes out."""
    return execute(name, node_id, model=patcher, **inputs).result[0]


def engine(name: str) -> Any:
    """A module of the engine, as the pack has it."""
    return importlib.import_module(f"{PACK}.nodes.engine.{name}")


def method(name: str) -> Any:
    """A module of the methods, as the pack has it."""
    return importlib.import_module(f"{PACK}.nodes.methods.{name}")


def compiling(name: str) -> Any:
    """A module of what compiles, as the pack has it."""
    return importlib.import_module(f"{PACK}.nodes.compiling.{name}")


class DynamoAlone(compiling("backends").Backend):
    """Dynamo traces and guards, and its graphs run as they are: what can go stale does not depend on the backend."""

    name = "eager"
    devices = ("cpu",)

    def compile_graph(self, graph, inputs, settings, tally):
        return graph.forward


compiling("backends").ALL["eager"] = DynamoAlone()
compiling("settings").BACKENDS += ("eager",)


def compile_model(patcher: ModelPatcher, node_id: str = "7", backend: str = "eager", **options: Any) -> ModelPatcher:
    """Our Compile Model on a model."""
    return run_node("SlipstreamCompileModel", patcher, node_id, backend={"backend": backend, **options})


def add_lora(patcher: ModelPatcher, seed: int = 3, strength: float = 0.5) -> ModelPatcher:
    """A clone with a low-rank update on every attention projection, patched as a loaded LoRA is."""
    generator = torch.Generator().manual_seed(seed)
    patches = {}
    for key, weight in patcher.model_state_dict().items():
        if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            up = torch.randn(weight.shape[0], 2, generator=generator)
            down = torch.randn(2, weight.shape[1], generator=generator)
            patches[key] = ("diff", (up @ down * 0.05,))
    clone = patcher.clone()
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def lora_of_queries_and_keys(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """A LoRA as its file has it."""
    generator, weights = torch.Generator().manual_seed(4), {}
    for key, weight in patcher.model_state_dict("diffusion_model.").items():
        if key.endswith(("to_q.weight", "to_k.weight")):
            stem = key.removesuffix(".weight")
            weights[f"{stem}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
            weights[f"{stem}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
    return weights


def bypass_lora(patcher: ModelPatcher) -> ModelPatcher:
    """A clone with a LoRA as the host's Load LoRA (Bypass) puts it: beside the layers, each run."""
    weights = lora_of_queries_and_keys(patcher)
    clone: ModelPatcher = comfy.sd.load_bypass_lora_for_models(patcher, None, weights, 1.0, 0)[0]
    return clone


def add_diff(patcher: ModelPatcher, seed: int = 3, strength: float = 0.3) -> ModelPatcher:
    """A clone with a low-rank update on every matrix of its blocks, whatever they are called."""
    generator = torch.Generator().manual_seed(seed)
    patches = {}
    for key, weight in patcher.model_state_dict("diffusion_model.").items():
        if weight.ndim == 2 and key.endswith("weight") and any(part.isdigit() for part in key.split(".")):
            up = torch.randn(weight.shape[0], 2, generator=generator)
            down = torch.randn(2, weight.shape[1], generator=generator)
            patches[key] = ("diff", (up @ down / weight.shape[1] ** 0.5,))
    clone = patcher.clone()
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def regional_prompt(patcher: ModelPatcher) -> list[Any]:
    """A CONDITIONING of three: an area, a mask of the upper half, and one for all of a latent of 16x16."""
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    return prompt(patcher, 20, area=(16, 8, 0, 0)) + prompt(patcher, 21, mask=mask) + prompt(patcher, 22)


def scheduled_prompt(patcher: ModelPatcher) -> list[Any]:
    """A CONDITIONING of two, one after the other."""
    halves = ((20, 0.0, 0.5), (21, 0.5, 1.0))
    return [one for seed, begin, end in halves for one in prompt(patcher, seed, start_percent=begin, end_percent=end)]


def hooked_prompt(patcher: ModelPatcher, strengths: dict[float, float] | None = None) -> list[Any]:
    """A CONDITIONING with a LoRA of its own, which the host patches in for it alone, between two calls of the model.

    Args:
        strengths: of the LoRA, by the fraction of the timesteps from which each holds; None for 1 throughout.
    """
    generator, weights = torch.Generator().manual_seed(4), {}
    for key, weight in patcher.model_state_dict("diffusion_model.").items():
        if key.endswith(("to_q.weight", "to_k.weight")):
            name = key.removesuffix(".weight")
            weights[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            weights[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3
    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 1.0)
    if strengths is not None:
        frames = comfy.hooks.HookKeyframeGroup()
        for start, strength in strengths.items():
            frames.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
    return prompt(patcher, 10, hooks=hooks)


def fingerprint(inner: Any) -> list[Any]:
    """What of a model a test may leave changed: weights, code put in a module's place, hooks, what it computes in, and
    what the host knows of it."""
    latents, config = inner.latent_format, inner.model_config
    found: list[Any] = [
        inner.manual_cast_dtype,
        inner.current_patcher.__class__,
        type(inner),
        type(latents),
        type(config),
    ]
    found += [repr(sorted(vars(one).items(), key=str)) for one in (latents, config)]
    for name, module in inner.named_modules():
        own = sorted(key for key in vars(module) if key not in vars(type(module)) and not key.startswith("comfy_"))
        found.append((name, type(module), own, len(module._forward_hooks), len(module._forward_pre_hooks)))
    for name, weight in inner.named_parameters():
        bits = weight.detach().contiguous().flatten().view(torch.uint8).numpy()
        found.append((name, weight.shape, weight.dtype, zlib.crc32(bits)))
    return found


def relative_error(image: torch.Tensor, expected: torch.Tensor) -> float:
    return float((image - expected).norm() / expected.norm())


def add_core_freeu(patcher: ModelPatcher, name: str = "FreeU_V2", **values: float) -> ModelPatcher:
    """Core's FreeU node."""
    from comfy_extras import nodes_freelunch

    values = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2, **values}
    return getattr(nodes_freelunch, name).execute(patcher, **values).result[0]


def controlnet(patcher: ModelPatcher, seed: int = 5) -> Any:
    """The host's ControlNet around a small control model of the patcher's shape."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {k: v for k, v in patcher.model.model_config.unet_config.items() if k != "out_channels"}
    config.pop("transformer_depth_output", None)
    for name in ("dtype", "use_temporal_resblock", "use_temporal_attention"):
        config.pop(name, None)
    control_model = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=torch.float32, device=CPU, operations=comfy.ops.disable_weight_init
    )
    initialize(control_model, seed)
    return comfy.controlnet.ControlNet(control_model, load_device=CPU)


def with_control(conditioning: list[Any], control: Any, size: int = 128, both: bool = False) -> list[Any]:
    """What ControlNetApply does: the conditioning with a picture to follow."""
    generator = torch.Generator().manual_seed(7)
    hint = torch.rand(1, 3, size, size, generator=generator)
    control = control.copy().set_cond_hint(hint, 1.0)
    return [
        [tensor, {**values, "control": control, "control_apply_to_uncond": not both}] for tensor, values in conditioning
    ]


def sample_with(
    guider: Any, *, steps: int = 6, sampler: str = "euler", scheduler: str = "normal", seed: int = 1, image: Any = None
):
    """Sample with a guider, as SamplerCustomAdvanced does."""
    patcher = guider.model_patcher
    image = latent(patcher) if image is None else image
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, steps)
    noise = comfy.sample.prepare_noise(image, seed)
    with torch.inference_mode():
        return guider.sample(noise, image, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=seed)


def sample_by_hand(patcher: ModelPatcher, sampler: Any, sigmas: torch.Tensor, cfg: float = 5.0) -> torch.Tensor:
    """Sample with a function of one's own: (denoiser, x, sigmas, extra_args, ...) -> x."""
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(prompt(patcher, 10), prompt(patcher, 11))
    guider.set_cfg(cfg)
    image = latent(patcher)
    noise = comfy.sample.prepare_noise(image, 1)
    with torch.inference_mode():
        return guider.sample(noise, image, comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=1)


class Counter:
    """Counts, by a forward hook on each block of the real UNet, how often it ran and on how many rows."""

    def __init__(self, patcher: ModelPatcher):
        unet = patcher.model.diffusion_model
        self.unet_calls = 0
        self.rows: list[int] = []
        self.blocks: dict[str, int] = {}
        middle = [] if unet.middle_block is None else [("middle", unet.middle_block)]
        named = [
            *((f"input{i}", block) for i, block in enumerate(unet.input_blocks)),
            *middle,
            *((f"output{i}", block) for i, block in enumerate(unet.output_blocks)),
        ]
        self.handles = []
        for name, block in named:
            # The host calls a block's layers, not the block: its first layer stands for it.
            self.handles.append(block[0].register_forward_hook(self._counting(name)))
        self.handles.append(unet.out[0].register_forward_hook(self._called))

    def _counting(self, name: str):
        def hook(module, args, output):
            self.blocks[name] = self.blocks.get(name, 0) + 1

        return hook

    def _called(self, module, args, output):
        self.unet_calls += 1
        self.rows.append(output.shape[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


class PlantedError(Exception):
    """An error that a test planted."""


def scribbling(model: ModelPatcher, factor: float) -> tuple[ModelPatcher, list[Any]]:
    """A clone on which predictions are multiplied in place once they were handed out, as guidance may: they are the
    caller's. Asserts that the latent stays as it came in. Also weak references to those predictions, as they come."""
    given: list[Any] = []

    def wrapper(executor, denoiser, conds, x, timestep, options):
        before = x.clone()
        found = executor(denoiser, conds, x, timestep, options)
        assert torch.equal(x, before)
        for one in found:
            one.mul_(factor)
        given.extend(weakref.ref(one) for one in found)
        return found

    patched = model.clone()
    patched.add_wrapper("calc_cond_batch", wrapper)
    return patched, given
