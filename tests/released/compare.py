"""Compares what the released prompts make here with what they made in their release, bit for bit.

Both run in servers of one environment, one after the other, each with its own copy of the pack:

    python tests/released/compare.py                   # every prompt of every release
    python tests/released/compare.py --only DeepCache  # the prompts whose titles contain this
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(ROOT / "tests"), str(ROOT / "demo")]

import torch
from comfyui import Server
from prompts import Prompt, promises_its_bits, released, scratch_server, small
from safetensors.torch import load_file

COMMITS = {"0.2.0": "b5a27a3"}
"""The commit that each release was made from."""
KEPT = ("IMAGE", "LATENT")
Kept = dict[str, torch.Tensor]


@contextlib.contextmanager
def pack_of(commit: str) -> Iterator[Path]:
    """The pack as it was in a commit.

    Raises:
        LookupError: this is no checkout, or one without that commit.
    """
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        raise LookupError(f"git should know the commit {commit}, but says: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def keeping(prompt: Prompt, nodes: dict[str, Any], folder: str) -> Prompt:
    """A prompt that also writes every picture and latent in it, as numbers, into a folder of the server's output."""
    more = dict(prompt)
    for number, node in prompt.items():
        # What returns anything returns what it got.
        for slot, kind in enumerate(nodes[node["class_type"]]["output"]):
            if kind in KEPT:
                name = f"{folder}/{number}-{slot}-{node['class_type']}"
                inputs = {"value": [number, slot], "name": name}
                more[f"keep-{number}-{slot}"] = {"class_type": "TestKeep", "inputs": inputs}
    return more


def run(server: Server, base: Path, prompts: dict[str, Prompt]) -> dict[str, Kept | str]:
    """What each prompt made, by node; or why it made nothing."""
    nodes = server.nodes()
    made: dict[str, Kept | str] = {}
    for count, (title, prompt) in enumerate(prompts.items()):
        # One of its own each: the host's cache answers for what an earlier prompt wrote.
        folder = f"kept-{count}"
        try:
            server.run(keeping(small(prompt), nodes, folder), {})
        except RuntimeError as error:
            made[title] = str(error)
        else:
            paths = sorted((base / "output" / folder).glob("*.safetensors"))
            made[title] = {path.stem: load_file(path)["value"] for path in paths}
    return made


def run_pack(pack: Path, prompts: dict[str, Prompt]) -> dict[str, Kept | str]:
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder, scratch_server(pack, Path(folder)) as server:
        return run(server, Path(folder), prompts)


def difference(now: Kept | str, then: Kept | str) -> str | None:
    """What is not the same, in a few words; None if every bit is."""
    for when, made in (("then", then), ("now", now)):
        if isinstance(made, str):
            return f"{when} it failed: {made}"
    if now.keys() != then.keys():
        return f"now {', '.join(now)}, then {', '.join(then)}"
    for name, value in now.items():
        if not torch.equal(value, then[name]):
            if value.shape != then[name].shape:
                return f"{name} is {tuple(value.shape)}, and was {tuple(then[name].shape)}"
            error = (value - then[name]).norm() / then[name].norm()
            return f"{name} differs, relative error {float(error):.2g}"
    return None


def compare(version: str, prompts: dict[str, Prompt]) -> dict[str, str | None]:
    """For each prompt of a release what differs from what it made then; None if nothing does."""
    with pack_of(COMMITS[version]) as pack:
        then = run_pack(pack, prompts)
    now = run_pack(ROOT, prompts)
    return {title: difference(now[title], then[title]) for title in prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the titles that are run")
    only = parser.parse_args().only
    failed = 0
    for version, prompts in released().items():
        wanted = {title: prompt for title, prompt in prompts.items() if only in title and promises_its_bits(prompt)}
        try:
            differences = compare(version, wanted)
        except LookupError as error:
            raise SystemExit(str(error)) from error
        for title, why in differences.items():
            failed += why is not None
            print(f"{version}  {title}: {why or 'the same bits'}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
