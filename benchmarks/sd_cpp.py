"""A guided step by stable-diffusion.cpp on a processor, on the same architecture and weights as `cpu.py`.

    pip install stable-diffusion-cpp-python     # into an environment of its own: it builds itself for this processor
    python benchmarks/sd_cpp.py --checkpoint file.safetensors --make  # in ours: writes it
    python benchmarks/sd_cpp.py --checkpoint file.safetensors --size 512   # in its: measures

One process, all threads, nothing else running. The checkpoint is in float16, as SD 1.5 is distributed. The first step,
which warms up, is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(path: Path) -> None:
    """A checkpoint of SD 1.5 with random weights, those of `compile.full_size`."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]
    from loading import load_all

    load_all()
    import comfy.sd1_clip
    import small_models
    import torch
    from compile import full_size
    from safetensors.torch import save_file

    unet = full_size("sd15", torch.float32).model.diffusion_model.state_dict()
    text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32).transformer
    small_models.initialize(text, 1)
    parts = {
        "model.diffusion_model": unet,
        "first_stage_model": small_models.full_vae().first_stage_model.state_dict(),
        # These two are in no SD 1.5 checkpoint.
        "cond_stage_model.transformer": {
            key: value
            for key, value in text.state_dict().items()
            if "text_projection" not in key and "logit_scale" not in key
        },
    }
    weights = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    save_file({key: value.half().contiguous() for key, value in weights.items()}, path)


def measure(path: Path, size: int, steps: int) -> float:
    """Seconds of a guided step: the median."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(model_path=str(path), n_threads=os.cpu_count(), verbose=False)
    times: list[float] = []
    model.generate_image(
        prompt="a",
        negative_prompt="b",
        width=size,
        height=size,
        cfg_scale=7.5,
        sample_steps=1 + steps,
        sample_method="euler",
        seed=1,
        progress_callback=lambda *_: times.append(time.perf_counter()),
    )
    return statistics.median(after - before for before, after in pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="write the checkpoint")
    parser.add_argument("--size", type=int, default=256, help="one a process: a second model in one crashes (0.4.7)")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.checkpoint)
        return
    size = arguments.size
    print(f"{size}x{size}: {measure(arguments.checkpoint, size, arguments.steps):.2f} s a guided step")


if __name__ == "__main__":
    main()
