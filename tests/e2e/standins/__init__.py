"""A test-only pack: the host's checkpoint loader returns small models for stand-in files, and faults can be had.

The files are named as the templates name theirs, so that templates are opened and queued unmodified.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[2]))

import small_models

STANDINS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "SD15",
    "sd_xl_base_1.0.safetensors": "SDXL",
    "sd_xl_refiner_1.0.safetensors": "SDXLRefiner",
    "tiniest.safetensors": "tiniest",
    "minimal.safetensors": "minimal",
}
"""The tiniest is for templates that compile; the minimal has attention at each level."""

TRANSFORMERS = {"flux1": "Flux", "qwen_image": "Qwen-Image", "z_image": "Z-Image", "wan2": "Wan 2.1"}
"""Families of `small_models`, by what the files of diffusion models and text encoders begin with."""


class Clip:
    """What the host's text encoding nodes need of a CLIP: a text gives noise that depends on it."""

    def __init__(self, width: int, pooled: int = 1280):
        self.width = width
        self.pooled = pooled

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, add_dict: dict | None = None) -> list:
        generator = torch.Generator().manual_seed(sum(tokens.encode()))
        context = torch.randn(1, 77, self.width, generator=generator)
        return [[context, {"pooled_output": torch.randn(1, self.pooled, generator=generator), **(add_dict or {})}]]


def small(name: str):
    if name in ("tiniest", "minimal"):
        return small_models.model(name), Clip(small_models.UNET["context_dim"]), small_models.vae(), None
    family, config = small_models.CONFIGS[name]
    # At the templates' sizes attention takes all the time: one block, at the lowest resolution. And then width.
    config = {**config, "model_channels": 32}
    for part in ("transformer_depth", "transformer_depth_output"):
        config = {**config, part: [0] * len(config[part])}
    model = small_models.build(family({**config, "transformer_depth_middle": 1}))
    # What rescales and tiles wants a KL autoencoder.
    vae = small_models.kl_vae() if name == "SDXL" else small_models.vae()
    return model, Clip(config["context_dim"]), vae, None


load = comfy.sd.load_checkpoint_guess_config


def load_or_stand_in(path, *args, **kwargs):
    name = STANDINS.get(Path(path).name)
    return load(path, *args, **kwargs) if name is None else small(name)


comfy.sd.load_checkpoint_guess_config = load_or_stand_in


def load_transformer(path, *args, **kwargs):
    name = next(name for start, name in TRANSFORMERS.items() if Path(path).name.startswith(start))
    return small_models.transformer(name)


def load_text_encoder(*args, **kwargs):
    """That of every family of transformers: their small models are equally wide."""
    return Clip(64, pooled=32)


comfy.sd.load_diffusion_model = load_transformer
comfy.sd.load_clip = load_text_encoder


def put_vaes() -> None:
    """Small ones in the files of VAEs, of which the host finds out by itself what they are."""
    folder = Path(folder_paths.get_folder_paths("vae")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in small_models.vae_files().items():
        save_file(weights, folder / f"{name}.safetensors")


put_vaes()


def put_tiny_vae() -> None:
    """The files that templates ask for: the decoders alone."""
    folder = Path(folder_paths.get_folder_paths("vae_approx")[0])
    folder.mkdir(parents=True, exist_ok=True)
    weights = small_models.vae().first_stage_model.taesd_decoder.state_dict()
    for name in ("taesd_decoder", "taesdxl_decoder"):
        save_file(weights, folder / f"{name}.safetensors")


put_tiny_vae()


class Fault(io.ComfyNode):
    """Makes sampling slow, or fail at a step."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestFault",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("fail_at", default=-1, min=-1),
                io.Float.Input("step_s", default=0.0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, fail_at, step_s):
        clone, evaluations = model.clone(), []

        def predict_noise(executor, *args, **kwargs):
            evaluations.append(1)
            deadline = time.monotonic() + step_s
            while time.monotonic() < deadline:
                comfy.model_management.throw_exception_if_processing_interrupted()
                time.sleep(0.02)
            if len(evaluations) > fail_at >= 0:
                evaluations.clear()
                raise RuntimeError("a planted fault")
            return executor(*args, **kwargs)

        clone.add_wrapper("predict_noise", predict_noise)
        return io.NodeOutput(clone)


class ManyRuns(io.ComfyNode):
    """Samples many times, as nodes do that go through an image by tiles or regions, or loop."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestManyRuns",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Int.Input("seed", default=0, max=2**63),
                io.Int.Input("runs", default=500),
                io.Int.Input("kinds", default=1, tooltip="Each of another number of steps."),
                io.Int.Input("fails", default=-1, tooltip="The run that fails, after which the node goes on."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, runs, kinds, fails):
        samples = latent_image["samples"]
        noise = comfy.sample.prepare_noise(samples, seed)

        def stop(step, *_):
            raise RuntimeError("a planted fault")

        for number in range(runs):
            with contextlib.suppress(RuntimeError):
                comfy.sample.sample(
                    model, noise, 2 + number % kinds, 5.0, "euler", "normal", positive, negative, samples,
                    callback=stop if number == fails else None, disable_pbar=True, seed=seed,
                )  # fmt: skip
        return io.NodeOutput(latent_image)


class Keep(io.ComfyNode):
    """Writes the numbers of an IMAGE or LATENT as they are, for two runs to be compared bit for bit."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestKeep", inputs=[io.AnyType.Input("value"), io.String.Input("name")], is_output_node=True
        )

    @classmethod
    def execute(cls, value, name):
        tensor = value["samples"] if isinstance(value, dict) else value
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"value": tensor.contiguous()}, path)
        return io.NodeOutput()


class StandIns(ComfyExtension):
    async def get_node_list(self):
        return [Fault, ManyRuns, Keep]


async def comfy_entrypoint():
    return StandIns()
