"""The demo model: a small latent diffusion model that comes with the pack, as the host's MODEL, CLIP and VAE.

`training/` made its files and says there, in their headers, what they are: the UNet's configuration, the words it
was trained on, and how its latents look as colours; and, in a second file, the transformer's, which reads the same
words and makes the same latents.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy import latent_formats, model_management, model_patcher, ops, sd1_clip, supported_models
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .host import machine
from .node import node_of, supported
from .plan.plan import Node
from .telling import verdicts

logger = logging.getLogger(__name__)

FILE = Path(__file__).parents[2] / "weights" / "slipstream-demo.safetensors"
TRANSFORMER_FILE = FILE.with_stem("slipstream-demo-transformer")
ARCHITECTURES = ("UNet", "transformer")
NETWORK, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."

MEANINGS = {
    "dusk": "sunset",
    "evening": "sunset",
    "fall": "autumn",
    "fog": "foggy",
    "forest": "trees",
    "hill": "hills",
    "midnight": "night",
    "mist": "foggy",
    "misty": "foggy",
    "mountain": "mountains",
    "overcast": "cloudy",
    "cloud": "cloudy",
    "clouds": "cloudy",
    "cabin": "house",
    "cottage": "house",
    "home": "house",
    "pine": "pines",
    "pond": "lake",
    "snow": "winter",
    "snowy": "winter",
    "sunny": "sun",
    "tree": "trees",
    "water": "lake",
}
"""What users may say instead of the model's own words."""

FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an and are at behind beside by during from front full has in is it its landscape near next of on over "
        "painting picture scene scenery season skies sky some that the there time to under view weather with",
    )
)
"""What a sentence needs and the model doesn't: nothing is lost with them. `no` is none of them, since it would be."""

COLOURS = frozenset({"red", "white", "blue"})
"""Only houses had one in training."""

QUOTED = 60
"""Characters of a prompt that a verdict quotes."""


@dataclass(frozen=True)
class Demo:
    """What the files hold.

    Attributes:
        weights: the state dict, with the prefixes of a checkpoint.
        unet_config: the UNet's, as the host's supported models take it.
        words: by token; token 0 is padding.
        length: tokens that the model reads at a time.
        size: side of the pictures it was trained on, in pixels.
        latent_rgb: for each latent channel its red, green and blue, and the colour of zeros: for previews.
        transformer_config: the transformer's, if `weights` are that one's.
    """

    weights: dict[str, Tensor]
    unet_config: dict[str, Any]
    words: list[str]
    length: int
    size: int
    latent_rgb: tuple[list[list[float]], list[float]]
    transformer_config: dict[str, Any] | None = None

    @classmethod
    def read(cls, architecture: str = ARCHITECTURES[0]) -> Demo:
        """Raises RuntimeError where a file is missing or damaged."""
        weights, header = _read(FILE, ("unet_config", "words", "length", "size", "latent_rgb"))
        if architecture == "transformer":
            weights = {name: value for name, value in weights.items() if not name.startswith(NETWORK)}
            network, also = _read(TRANSFORMER_FILE, ("transformer_config",))
            weights |= network
            header |= also
        return cls(weights, **header)

    @property
    def about(self) -> str:
        """What it is, for a verdict."""
        count = sum(value.numel() for value in self.part(NETWORK).values())
        what = "" if self.transformer_config is None else "a transformer (AuraFlow's, flow matching) of "
        return (
            f"{what}{count / 1e6:.1f} M parameters, trained on pictures of {self.size}x{self.size}. "
            f"Words it knows: {listed(self.words)}"
        )

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights of the diffusion model, the text encoder or the VAE."""
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}


def _read(file: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
        return weights, {name: json.loads(header[name]) for name in names}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"Demo Model: expected its weights in {file.parent.name}/{file.name} of the pack's folder, but they "
            f"are missing or damaged ({error}). Install the pack again."
        ) from error


def listed(words: Sequence[str]) -> str:
    """The model's words, for a message."""
    return ", ".join(filter(None, words))


class DemoFamily(supported_models.SD15):
    """SD 1.x in small. Its class says to the engine, and to other packs, what it is."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012, the host's: SD 1.5's number of heads doesn't fit these widths

    def __init__(self, demo: Demo) -> None:
        super().__init__(demo.unet_config)
        _preview(self.latent_format, demo)


class DemoAuraFlow(supported_models.AuraFlow):
    """AuraFlow in small, over the same latents as the UNet."""

    latent_format = latent_formats.SD15

    def __init__(self, demo: Demo) -> None:
        super().__init__(demo.transformer_config)
        _preview(self.latent_format, demo)


def _preview(latent_format: Any, demo: Demo) -> None:
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = demo.latent_rgb
    # SD's own preview decoder would draw noise.
    latent_format.taesd_decoder_name = None


def load_model(architecture: str = ARCHITECTURES[0], demo: Demo | None = None, disable_dynamic: bool = False) -> Any:
    """The MODEL. The host calls this again where it wants a copy of its own (hooks, compiling, several GPUs)."""
    demo = demo or Demo.read(architecture)
    config = DemoFamily(demo) if demo.transformer_config is None else DemoAuraFlow(demo)
    weights = demo.part(NETWORK)
    count = comfy.utils.calculate_parameters(weights)
    device, types = model_management.get_torch_device(), list(config.supported_inference_dtypes)
    dtype = model_management.unet_dtype(model_params=count, supported_dtypes=types, weight_dtype=torch.float16)
    config.set_inference_dtype(dtype, model_management.unet_manual_cast(dtype, device, types))
    model = config.get_model(weights, device=model_management.unet_inital_load_device(count, dtype))
    patcher = _patcher_class(disable_dynamic)(
        model, load_device=device, offload_device=model_management.unet_offload_device()
    )
    model.load_model_weights(weights, **supported(model.load_model_weights, assign=machine.is_dynamic(patcher)))
    patcher.cached_patcher_init = (load_model, (architecture,))
    return patcher


def load_clip(demo: Demo | None = None, source: Node | None = None, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The CLIP: an embedding of words.

    Args:
        demo: what the file holds, if it was read already.
        source: the node that tells which words were understood.
        disable_dynamic: the host's.
    """
    demo = demo or Demo.read()
    weights = {f"clip_l.{name}": value for name, value in demo.part(TEXT).items()}
    target = ClipTarget(partial(DemoTokenizer, demo, source), partial(_text_model, demo))
    clip = comfy.sd.CLIP(
        target,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=weights,
        **supported(comfy.sd.CLIP.__init__, disable_dynamic=disable_dynamic),
    )
    clip.patcher.cached_patcher_init = (_load_clip_patcher, ())
    return clip


def load_vae(demo: Demo | None = None) -> comfy.sd.VAE:
    """The VAE: TAESD's architecture, which the host knows by its keys."""
    vae = comfy.sd.VAE(sd=(demo or Demo.read()).part(VAE))
    vae.patcher.cached_patcher_init = (_load_vae_patcher, ())
    return vae


def load(node: type[io.ComfyNode], architecture: str) -> io.NodeOutput:
    """The node's output: all three, and what it is."""
    source = node_of(node)
    try:
        demo = Demo.read(architecture)
        loaded = load_model(architecture, demo), load_clip(demo, source), load_vae(demo)
    except RuntimeError as error:
        verdicts.publish_refused(source, error)
        raise
    _publish_about(verdicts.current_prompt(), source, demo.about)
    return io.NodeOutput(*loaded)


def _publish_about(where: verdicts.Prompt, source: Node, about: str) -> None:
    verdicts.publish(
        replace(where, node=source.id), source, verdicts.Line("active", about), {}, (verdicts.OF_ITSELF, "model")
    )


def _patcher_class(disable_dynamic: bool) -> Any:
    # Hosts before 0.15 have one class only.
    core = getattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcher)
    return model_patcher.ModelPatcher if disable_dynamic else core


def _load_clip_patcher(disable_dynamic: bool = False) -> Any:
    return load_clip(disable_dynamic=disable_dynamic).patcher


def _load_vae_patcher(disable_dynamic: bool = False) -> Any:
    # The host's own factory of a VAE ignores it too.
    return load_vae().patcher


def understand(said: Sequence[str], words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """What the model knows of a text.

    Args:
        said: the text's words, in lower case.
        words: the model's own.

    Returns:
        The model's words that are meant, each with the position where it was said first; and the said ones that it
        ignores, each once.
    """
    meant = [MEANINGS.get(word, word) for word in said]
    known: dict[str, int] = {}
    unknown: list[str] = []
    for position, (word, meaning) in enumerate(zip(said, meant, strict=True)):
        if meaning == "trees" and position and meant[position - 1] == "pines":
            continue
        # A colour before anything else would go to the house.
        is_stray_colour = meaning in COLOURS and meant[position + 1 : position + 2] != ["house"]
        if meaning in words and not is_stray_colour:
            known.setdefault(meaning, position)
        elif word not in FILLERS and word not in unknown:
            unknown.append(word)
    return known, unknown


class DemoTokenizer:
    """What the host's CLIP asks of a tokenizer, over the model's few words. Says which of them it took in."""

    def __init__(self, demo: Demo, source: Node | None, embedding_directory: Any = None, tokenizer_data: Any = None):
        # Textual inversions are made for SD's own text encoder. Of `demo` not the weights, which would stay in memory.
        self._words, self._length, self._about, self._source = demo.words, demo.length, demo.about, source

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
        """Tokenize a prompt, with weights such as (house:1.3), and tell what was understood of it.

        Returns:
            As SD 1.x's: lists of (token, weight), or (token, weight, word's number), each as long as the model reads at
            a time, under the name of SD 1.x's text encoder.
        """
        said: list[str] = []
        weights: list[float] = []
        for part, weight in sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0):
            found = re.findall(r"[^\W\d_]+", sd1_clip.unescape_important(part).lower())
            said += found
            weights += [weight] * len(found)
        known, unknown = understand(said, self._words)
        self._tell(text, [said[position] for position in known.values()], unknown)
        tokens = [
            (self._words.index(word), weights[position], number)
            for number, (word, position) in enumerate(known.items(), start=1)
        ]
        tokens += [(0, 1.0, 0)] * (-len(tokens) % self._length if tokens else self._length)
        kept = tokens if return_word_ids else [token[:2] for token in tokens]
        return {"l": [kept[first : first + self._length] for first in range(0, len(kept), self._length)]}

    def _tell(self, text: str, known: Sequence[str], unknown: Sequence[str]) -> None:
        """Say on the loader's node, and in the log, what was taken in of a text."""
        told = [f"{what} {', '.join(words)}" for what, words in (("understood", known), ("ignored", unknown)) if words]
        if unknown:
            logger.warning("Demo Model: ignored %s. It knows: %s", ", ".join(unknown), listed(self._words))
        if self._source is None:
            return
        where = verdicts.current_prompt()
        # In a prompt in which the loader was cached nothing has told yet what it is.
        _publish_about(where, self._source, self._about)
        quoted = f'"{shorten(text, QUOTED, placeholder=" ...")}": ' if told else "an empty prompt"
        line = verdicts.Line("active" if known or not unknown else "inert", quoted + "; ".join(told))
        verdicts.publish(where, self._source, line, {}, (text, "text"))

    def untokenize(self, pairs: Sequence[Any]) -> list[tuple[Any, str]]:
        """Each (token, weight) with its word."""
        return [(pair, self._words[pair[0]]) for pair in pairs]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The words of tokens."""
        return " ".join(filter(None, (self._words[token] for token in tokens)))

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}


def _text_model(demo: Demo, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> torch.nn.Module:
    """The host's frame around a text encoder, around ours."""
    return sd1_clip.SD1ClipModel(
        device=device,
        dtype=dtype,
        model_options=model_options or {},
        clip_model=partial(WordEmbedding, len(demo.words), demo.unet_config["context_dim"]),
    )


class WordEmbedding(torch.nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """The text encoder: each word's embedding, in no order."""

    special_tokens = {"pad": 0}  # noqa: RUF012, the host's

    def __init__(self, count: int, width: int, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
        super().__init__()
        operations = (model_options or {}).get("custom_operations") or ops.manual_cast
        self.words = operations.Embedding(count, width, device=device, dtype=dtype)
        self._device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """There is one layer only, so that "clip skip" and the like have no meaning here."""
        self._device = options.get("execution_device", self._device)

    def reset_clip_options(self) -> None:
        self._device = None

    def encode(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, length) tokens to (B, length, width) float32, and their means (B, width)."""
        device = self.words.weight.device if self._device is None else self._device
        embedded = self.words(torch.tensor(tokens, device=device), out_dtype=torch.float32)
        return embedded, embedded.mean(1)
