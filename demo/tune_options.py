"""The options of `./slipstream tune`: standard library only, for the launcher's help as for the command itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_options import add_sampling

MAY_USE = ("exact and approximate", "exact only", "everything")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint to tune for")
    model.add_argument(
        "--demo",
        action="store_true",
        help="tune for the pack's own demo model, as is done where there is no checkpoint",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt as you use them, up to five (default: one or two)"
    )
    parser.add_argument("--negative", metavar="TEXT", help="the negative prompt of all of them")
    parser.add_argument(
        "--floor", type=float, default=0.95, help="least SSIM of the worst picture (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each prompt (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long it may take (default: %(default)s)")
    parser.add_argument("--may-use", choices=MAY_USE, default=MAY_USE[0], help="(default: %(default)s)")
    add_sampling(parser, "the first one (default: %(default)s)")
    parser.add_argument(
        "--save-as", default="", metavar="NAME", help="write the plan to plans/NAME.json in the output folder"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for plans and what was measured (default: the cache folder)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the trials on a Ray cluster, a worker a GPU or machine; each needs ComfyUI and requirements-ray.txt",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
