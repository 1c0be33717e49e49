"""Which of the two demo models a study is of."""

from __future__ import annotations

import argparse

ARCHITECTURES = ("UNet", "transformer")


def add_architecture(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--architecture", default=ARCHITECTURES[0], choices=ARCHITECTURES, help="(default: %(default)s)"
    )
