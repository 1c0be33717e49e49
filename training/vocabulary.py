"""The words that the demo model knows, and captions as it reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from scenes import ATTRIBUTES, words
from torch import Tensor

PADDING = ""
WORDS = [PADDING, *dict.fromkeys(" ".join(word for options in ATTRIBUTES.values() for word in options).split()), "moon"]
"""Every word by its token; token 0 fills what a caption leaves empty."""
LENGTH = 16
"""Tokens that the model reads at a time. Their order has no meaning."""
WIDTH = 768
"""Channels of a token's embedding, as in SD 1.x."""

DROPPED = {"season": 0.1, "time": 0.1, "weather": 0.1, "land": 0.4}
"""How often training leaves out a word, so that a prompt needn't say everything. What stands in the picture is always
said, or a lake would have to be expected in each picture that doesn't mention one. Hills are no news."""
COLOUR_DROPPED = 0.1
CAPTION_DROPPED = 0.1
"""How often training leaves out the whole caption, for classifier-free guidance."""


def tokens(caption: Sequence[str]) -> list[int]:
    """A caption's words as LENGTH tokens."""
    known = [WORDS.index(word) for word in caption]
    return known + [0] * (LENGTH - len(known))


def shortened(choices: Sequence[int], random: numpy.random.Generator) -> list[str]:
    """The words that training shows for a scene this time."""
    if random.random() < CAPTION_DROPPED:
        return []
    said = []
    for name, phrase in words(choices).items():
        if name == "land" and phrase == "mountains":
            said.append(phrase)
        elif random.random() >= DROPPED.get(name, 0.0):
            parts = phrase.split()
            said += parts[1:] if len(parts) > 1 and random.random() < COLOUR_DROPPED else parts
    return said


def batch(captions: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """(B, LENGTH) int64 tokens."""
    return torch.tensor([tokens(caption) for caption in captions], device=device)
