"""The API prompts that were released, made small enough to run here, and a server to run them."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comfyui import Server
from loading import PACK, ROOT, find_comfyui, load_all, packed_files

FOLDER = Path(__file__).resolve().parent
STANDINS = ROOT / "tests" / "e2e" / "standins"
Prompt = dict[str, dict[str, Any]]

SMALL: Mapping[str, Mapping[str, Any]] = {
    "EmptyLatentImage": {"width": 256, "height": 256},
    "KSampler": {"steps": 8},
    "SlipstreamRefinerHandoff": {"steps": 8},
    "SlipstreamBenchmark": {"steps": 8, "runs": 1},
    "ImageScale": {"width": 960, "height": 544},
    "SlipstreamVAEEncodeTiled": {"tile_size": 512},
    "SlipstreamVAEDecodeTiled": {"tile_size": 512},
}
"""What of a template is set lower: a CPU takes minutes."""

FILES = {
    "CheckpointLoaderSimple": ("checkpoints", 1),
    "UNETLoader": ("diffusion_models", 1),
    "CLIPLoader": ("text_encoders", 1),
    "DualCLIPLoader": ("text_encoders", 2),
}
"""The host's loaders: the folder of their files, and how many of these they name, first of all."""

SMALL_MODEL = "tiniest.safetensors"
"""In the place of a template's model where something compiles."""


def released() -> dict[str, dict[str, Prompt]]:
    """Every released prompt as it was queued, by version and title."""
    folders = sorted(path for path in FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit())
    return {
        folder.name: {
            title: prompt
            for path in sorted(folder.glob("*.json"))
            for title, prompt in json.loads(path.read_text(encoding="utf-8")).items()
        }
        for folder in folders
    }


def kinds(prompt: Prompt) -> set[str]:
    return {node["class_type"] for node in prompt.values()}


def compiles(prompt: Prompt) -> bool:
    """Whether a compiler has a part in it, which takes minutes."""
    return not kinds(prompt).isdisjoint({"SlipstreamCompileModel", "SlipstreamCompileVAE"})


def promises_its_bits(prompt: Prompt) -> bool:
    """Whether a later version is to make the same picture. A recipe promises its goal, and may come to it by other
    methods; which convolution is fastest is measured anew in each process; and *int8 dynamic* is computed as *int8
    weight-only* where the processor has no products of int8."""

    def has(kind: str, name: str, value: str) -> bool:
        return any(node["class_type"] == kind and node["inputs"].get(name) == value for node in prompt.values())

    if has("SlipstreamQuantize", "scheme", "int8 dynamic") and not has_int8_products():
        return False
    return not has("SlipstreamCPU", "winograd", "auto") and "SlipstreamRecipe" not in kinds(prompt)


@functools.cache
def has_int8_products() -> bool:
    load_all()
    return bool(importlib.import_module(f"{PACK}.nodes.methods.quantize").multiplies_in_int8("cpu"))


def small(prompt: Prompt) -> Prompt:
    """A prompt that runs in seconds. A node's own are so already."""
    prompt = copy.deepcopy(prompt)
    is_template = any(node["inputs"].get("width", 0) > 256 for node in prompt.values())
    for node in prompt.values() if is_template else ():
        values = dict(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "CheckpointLoaderSimple" and compiles(prompt):
            values["ckpt_name"] = SMALL_MODEL
        if node["class_type"] == "SlipstreamQuantize":
            values["min_features"] = 0
        node["inputs"].update(values)
    if "SlipstreamFP16FixVAE" in kinds(prompt) and not is_template:
        # Its VAE has its full width: a minute and more in bf16, on a processor without it.
        latent = next(node for node in prompt.values() if node["class_type"] == "EmptyLatentImage")
        latent["inputs"] |= {"width": 64, "height": 64}
    return prompt


def make_base(base: Path, pack: Path) -> None:
    """A base directory for a server: the files of a pack that users get, the stand-ins, and files for them."""
    packs, models = base / "custom_nodes", base / "models"
    for folder in {folder for folder, _ in FILES.values()}:
        (models / folder).mkdir(parents=True)
    for name in packed_files(pack):
        file = packs / "slipstream" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pack / name, file)
    (packs / "standins").symlink_to(STANDINS)
    for name in ("tiniest", "minimal"):
        (models / "checkpoints" / f"{name}.safetensors").touch()
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            folder, count = FILES.get(node["type"], ("", 0))
            for name in node["widgets_values"][:count] if count else ():
                (models / folder / name).touch()


@contextlib.contextmanager
def scratch_server(pack: Path, base: Path | None = None) -> Iterator[Server]:
    """A server on the CPU, in a scratch folder, with a pack and the stand-ins; in one that is there, again."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("No ComfyUI was found. Set COMFYUI_PATH to its folder.")
    with contextlib.ExitStack() as stack:
        folder = base or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-")))
        if not (folder / "custom_nodes").exists():
            make_base(folder, pack)
        yield stack.enter_context(Server(comfyui, folder, folder / "server.log", ["--cpu"]))
