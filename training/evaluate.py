"""Whether the demo models draw what they are told: `./slipstream train --evaluate`.

Captions of combinations that were held out of training, sampled by the host's sampler, on the CPU; a judge that saw
only the generator's pictures reads the attributes back. Writes the figures and a sheet of pictures into `results/`,
and fails where the model or the judge is worse than it must be.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]
RESULTS = Path(__file__).parent / "results"

SAMPLES = 200
DRAWN = 6_000_000
"""The first of the seeds of the pictures that test the judge: training saw none of them."""
STEPS = (3, 6, 12, 30)
JUDGED = "the generator's own pictures"
GUIDED, SHUFFLED, UNGUIDED = "guided, 30 steps", "guided, 30 steps, captions shuffled", "unguided, 30 steps"
CHANCE = "by chance"
LEAST = {"UNet": {JUDGED: 0.98, GUIDED: 0.90}, "transformer": {JUDGED: 0.98, GUIDED: 0.85}}
"""The least share of pictures in which every attribute is the caption's."""
NEAR_CHANCE = 0.05
SHEET = (
    "spring day, clear sky, sun, mountains, lake, trees, red house",
    "summer day, cloudy sky, hills, lake, pines, white house",
    "autumn sunset, clear sky, sun, mountains, trees, blue house",
    "winter night, clear sky, moon, mountains, lake, pines, red house",
    "autumn day, foggy sky, hills, lake, trees",
)
SHEET_SEEDS = (1, 2, 3, 4, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=list(LEAST), choices=list(LEAST))
    for architecture in parser.parse_args().architectures:
        print(f"{architecture}:")
        evaluate(architecture)


def evaluate(architecture: str) -> None:
    """Judge one of the two."""
    from loading import load_all

    load_all()
    import torch
    from judge import Judge, agreement
    from pictures import Demo, held_out
    from PIL import Image
    from scenes import ATTRIBUTES, draw_on
    from train import JUDGE

    demo, judge = Demo(architecture), Judge.load(JUDGE)
    figures: dict[str, dict[str, float]] = {}

    def tell(name: str, attributes: float, whole: float) -> None:
        figures[name] = {"whole_captions": round(whole, 4), "attributes": round(attributes, 4)}
        print(f"{name:42}{whole:8.1%} of whole captions {attributes:8.1%} of attributes", flush=True)

    def look(latents: torch.Tensor) -> torch.Tensor:
        return judge.read(demo.decode(latents).movedim(-1, 1))

    drawn = [draw_on(torch.device("cpu"), [seed], held_out=True) for seed in range(DRAWN, DRAWN + SAMPLES)]
    seen = torch.cat([judge.read(picture) for _, picture in drawn])
    tell(JUDGED, *agreement(seen, torch.cat([scenes.choices for scenes, _ in drawn])))

    captions, choices = held_out(SAMPLES)
    seeds = range(SAMPLES)
    tell(UNGUIDED, *agreement(look(demo.sample(captions, seeds, cfg=1.0)), choices))
    for steps in STEPS:
        seen = look(demo.sample(captions, seeds, steps=steps))
        tell(f"guided, {steps} steps", *agreement(seen, choices))
    for index, name in enumerate(ATTRIBUTES):
        print(f"    {name:10}{(seen[:, index] == choices[:, index]).float().mean():.1%}")
    tell(SHUFFLED, *agreement(seen, choices.roll(1, 0)))
    # Every picture against every caption.
    tell(CHANCE, *agreement(seen.repeat_interleave(SAMPLES, 0), choices.repeat(SAMPLES, 1)))

    prompts = [prompt for prompt in SHEET for _ in SHEET_SEEDS]
    pictures = demo.decode(demo.sample(prompts, SHEET_SEEDS * len(SHEET)))
    rows = pictures.unflatten(0, (len(SHEET), len(SHEET_SEEDS)))
    sheet = torch.cat([torch.cat(list(row), dim=1) for row in rows], dim=0)
    RESULTS.mkdir(exist_ok=True)
    suffix = "" if architecture == "UNet" else f"-{architecture}"
    Image.fromarray((sheet * 255).round().byte().numpy()).save(RESULTS / f"sheet{suffix}.jpg", quality=88)
    (RESULTS / f"agreement{suffix}.json").write_text(json.dumps(figures, indent=2) + "\n")

    for name, least in LEAST[architecture].items():
        if figures[name]["whole_captions"] < least:
            raise SystemExit(f"{name}: should be {least:.0%} of whole captions at least")
    if abs(figures[SHUFFLED]["attributes"] - figures[CHANCE]["attributes"]) > NEAR_CHANCE:
        raise SystemExit(f"{SHUFFLED}: should be as by chance")
    if figures[UNGUIDED]["whole_captions"] >= figures[GUIDED]["whole_captions"]:
        raise SystemExit(f"{UNGUIDED}: should agree less than guided")


if __name__ == "__main__":
    main()
