"""The options of `./slipstream bench`: standard library only, for the launcher's help as for the command itself."""

from __future__ import annotations

import argparse
from pathlib import Path

METHODS = ("DeepCache", "CFGCutoff:cutoff=0.5", "FreeU")
DEMO_METHODS = ("DeepCache:cache_interval=2,schedule=quadratic", "CFGCutoff:cutoff=0.75")
"""On the demo model, which is small: settings for SD 1.5 change its pictures."""


def add_sampling(parser: argparse.ArgumentParser, seed: str) -> None:
    """Declare those of one run of the sampler; `seed` is the help of that one."""
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--cfg", type=float, default=7.5, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="euler", help="(default: %(default)s)")
    parser.add_argument("--scheduler", default="normal", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help=seed)
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="of the square picture (default: what suits the machine)"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint to measure on")
    model.add_argument(
        "--random",
        choices=("sd15",),
        help="measure on SD 1.5 in full size with random weights: times do not depend on them; pictures would mean "
        "nothing, and are left out",
    )
    model.add_argument(
        "--demo",
        action="store_true",
        help="measure on the pack's own demo model, as is done where ComfyUI has no SD 1.5 checkpoint",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:INPUT=VALUE,...]",
        help=f"a Slipstream node on the candidate, as often as you like (default: {', '.join(METHODS)}; "
        f"on the demo model {', '.join(DEMO_METHODS)})",
    )
    parser.add_argument(
        "--ablation",
        default="each alone",
        choices=("off", "each alone", "leave one out"),
        help="which other variants to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--rivals", action="store_true", help="measure fewer steps and ComfyUI's EasyCache too, with as much work"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="seeds that the rounds take in turn (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="measured rounds (default: %(default)s)")
    add_sampling(parser, "(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for report and pictures (default: the cache folder)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report there too, with the command that repeats it"
    )
