"""Trains the demo model from nothing: `./slipstream train`.

Five stages: the autoencoder, the latents of our pictures, the UNet with its words, the transformer over both, and the
judge that tells whether pictures show what their captions say. Each is kept in a file of a work folder, which is that
of these very sources and steps, so that a run that was stopped begins again with the stage it was in. Some hours on two
CPU cores, minutes on a GPU. It ends by writing the models and the judge into the pack; `evaluate.py` then samples them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parents[1] / "weights" / "slipstream-demo.safetensors"
TRANSFORMER = WEIGHTS.with_stem("slipstream-demo-transformer")
JUDGE = Path(__file__).with_name("judge.safetensors")

STEPS = {"autoencoder": 7000, "pictures": 5120, "denoiser": 4600, "transformer": 4000, "finished": 300, "judge": 1200}
"""How long each stage takes."""
SEEDS = {"autoencoder": 0, "pictures": 1_000_000, "denoiser": 2, "transformer": 4, "finished": 5, "judge": 3_000_000}
"""Far apart, so that no two stages see the same picture."""


def load_host(comfyui: Path, is_cpu: bool) -> None:
    """Load the host, whose layers are what is trained, and the pack."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import loading

    loading.load_host(comfyui, is_cpu)
    from comfy.cli_args import args

    # Its default on a CPU saves memory that isn't short here.
    args.use_pytorch_cross_attention = True
    loading.load_pack()


def train(folder: Path, weights: Path, transformer: Path, judge: Path, device: Any, steps: Mapping[str, int]) -> None:
    """Run the stages that aren't done yet, and write the models and the judge."""
    import autoencoder
    import diffusion
    import judge as judging
    import torch
    import transformer as flow
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import load_file

    def stage(name: str, run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        file = folder / f"{name}.safetensors"
        if not file.exists():
            save(run(), file)
        return load_file(file, device=str(device))

    taesd = TAESD(latent_channels=4)
    taesd.load_state_dict(
        stage(
            "autoencoder",
            lambda: autoencoder.train(steps["autoencoder"], device, SEEDS["autoencoder"]).state_dict(),
        )
    )
    taesd.to(device, memory_format=torch.channels_last)

    def encoded() -> dict[str, torch.Tensor]:
        latents, choices = diffusion.encode(taesd, steps["pictures"], device, SEEDS["pictures"])
        return {"latents": latents, "choices": choices}

    pictures = stage("latents", encoded)
    latents, choices = pictures["latents"], pictures["choices"]
    deviation = latents.float().std().item()

    def denoiser() -> dict[str, torch.Tensor]:
        return diffusion.train(latents / deviation, choices, steps["denoiser"], device, SEEDS["denoiser"]).state_dict()

    learned = stage("denoiser", denoiser)
    export(weights, taesd, learned, latents, deviation)

    def over_the_same_words(name: str, before: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        given = latents / deviation, choices, learned["words.weight"]
        return stage(name, lambda: flow.train(*given, steps[name], device, SEEDS[name], before).state_dict())

    export_transformer(transformer, over_the_same_words("finished", over_the_same_words("transformer")))
    save(stage("judge", lambda: judging.train(steps["judge"], device, SEEDS["judge"]).state_dict()), judge)


def save(tensors: Mapping[str, Any], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a file as a whole, or not at all."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, unfinished, metadata=header)
    unfinished.replace(file)


def export(file: Path, taesd: Any, denoiser: Mapping[str, Any], latents: Any, deviation: float) -> None:
    """Write the model as the pack's node reads it: float16, with what it is in the header.

    Args:
        file: Where to.
        taesd: The autoencoder.
        denoiser: The state dict of the UNet and the words.
        latents: (N, 4, H, W), some of the autoencoder's.
        deviation: Of these; the denoiser was trained on latents of deviation 1.
    """
    import diffusion
    import torch
    import vocabulary
    from comfy.latent_formats import SD15

    tensors = {
        **{f"first_stage_model.{name}": value for name, value in taesd.state_dict().items()},
        # The host multiplies latents by its factor before the UNet sees them.
        "first_stage_model.vae_scale": torch.tensor(SD15().scale_factor * deviation),
        "first_stage_model.vae_shift": torch.tensor(0.0),
    }
    for name, value in denoiser.items():
        prefix = "cond_stage_model." if name.startswith("words.") else "model.diffusion_model."
        tensors[prefix + name.removeprefix("unet.")] = value
    header = {
        "unet_config": diffusion.CONFIG,
        "words": vocabulary.WORDS,
        "length": vocabulary.LENGTH,
        "size": latents.shape[-1] * 8,
        "latent_rgb": latent_rgb(latents[:64].float(), deviation, taesd.taesd_decoder),
    }
    save_halved(tensors, file, "Slipstream demo model", header)


def export_transformer(file: Path, weights: Mapping[str, Any]) -> None:
    """Write the transformer beside it. Words and VAE are those of the first file."""
    import transformer

    tensors = {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    save_halved(tensors, file, "Slipstream demo transformer", {"transformer_config": transformer.CONFIG})


def save_halved(tensors: Mapping[str, Any], file: Path, title: str, header: Mapping[str, Any]) -> None:
    """Write weights as float16, with what they are."""
    save(
        {name: value.half() for name, value in tensors.items()},
        file,
        {
            **{name: json.dumps(value) for name, value in header.items()},
            "title": title,
            "license": "GPL-3.0-or-later",
            "description": "Trained on pictures drawn by the Slipstream pack's training/scenes.py alone.",
        },
    )


def latent_rgb(latents: Any, deviation: float, decoder: Any) -> tuple[list[list[float]], list[float]]:
    """The linear map from a latent's channels to colours in -1..1 that fits best: the host previews with it."""
    import torch

    with torch.inference_mode():
        pictures = torch.cat([torch.nn.functional.avg_pool2d(decoder(some), 8) for some in latents.split(4)]) * 2 - 1
    channels = (latents / deviation).movedim(1, -1).reshape(-1, latents.shape[1])
    channels = torch.cat((channels, torch.ones_like(channels[:, :1])), 1)
    fitted = torch.linalg.lstsq(channels, pictures.movedim(1, -1).reshape(-1, 3).float()).solution
    *factors, bias = [[round(value, 4) for value in row] for row in fitted.tolist()]
    return factors, bias


def fingerprint(steps: Mapping[str, int]) -> str:
    """What these sources train in these steps."""
    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join([*sources, json.dumps(steps).encode()])).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the work folders are")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the model's file")
    parser.add_argument("--transformer", type=Path, default=TRANSFORMER, help="the transformer's file")
    parser.add_argument("--judge", type=Path, default=JUDGE, help="the judge's file")
    parser.add_argument("--share", type=float, default=1.0, help="do this share of each stage's steps, to try it out")
    arguments = parser.parse_args()

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load_host(arguments.comfyui, is_cpu=device.type == "cpu")
    steps = {name: max(4, round(count * arguments.share)) for name, count in STEPS.items()}
    train(
        arguments.folder / fingerprint(steps), arguments.weights, arguments.transformer, arguments.judge, device, steps
    )


if __name__ == "__main__":
    main()
