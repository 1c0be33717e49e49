"""What a machine without a network needs to run `gpu.py`, in one folder: `./slipstream gpu --pack FOLDER`.

The pack and the host's source come as one archive, and with them the wheels of what the host requires that are pure
Python or small. That machine's Python brings the rest, torch before all. `run.py` there unpacks it and runs it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 50 * 2**20
"""What all of it may take."""

OURS = ("__init__.py", "pyproject.toml", "LICENSE", "nodes", "benchmarks/*.py", "tests/*.py", "tests/*.safetensors")
OURS_TOO = ("tests/host",)
HOSTS = ("*.py", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "app", "middleware", "utils")
NOT_NEEDED = re.compile(r"__pycache__|(^|/)test_[^/]*\.py$|tokenizer[^/]*/.*(?<!\.py)$")
"""Also what text encoders read: prompts are made without one."""

SCARCE = ("comfy-aimdo", "comfy-kitchen", "torchsde", "trampoline", "torchao", "av")
"""What machines that have torch for other work do not have: packed whatever it takes."""

EXPECTED = ("torch", "torchvision", "torchaudio", "transformers", "numpy", "scipy")
"""What that machine's Python has, with all that these require: most images for GPUs do."""

FOR_PAGES = ("comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs", "comfy-angle")
LARGE = 12e6
"""Bytes installed, from which on a package is not small."""

LARGE_WHEEL = 40e6
"""Bytes, from which on a wheel is taken in pure Python, where there is one."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

README = """# Slipstream on a GPU, without a network

    python run.py --output FOLDER

by a Python {python} for Linux that has torch with CUDA, and these, which are not packed here: {absent}.
`python run.py --tiny` runs all of it in small, also on a CPU. `--help` tells the rest.
"""


def pack(folder: Path, comfyui: Path, python: str) -> None:
    """Make the folder anew.

    Args:
        folder: none yet, empty, or one that this made.
        comfyui: the host that is packed.
        python: the version that the machine has, such as `3.12`.

    Raises:
        RuntimeError: the folder has something else in it, or there is no wheel of what must be packed.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "source.zip").exists():
        raise RuntimeError(f"--pack takes an empty folder or one that it made, but {folder} has other files.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    shutil.copy(ROOT / "benchmarks" / "packed_gpu.py", folder / "run.py")
    with zipfile.ZipFile(folder / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for root, names, place in (
            (comfyui, HOSTS, "ComfyUI"),
            (ROOT, (*OURS, *OURS_TOO), "ComfyUI/custom_nodes/slipstream"),
        ):
            for path in sources(root, names):
                archive.write(path, f"{place}/{path.relative_to(root).as_posix()}")
    absent = add_wheels(folder, comfyui, python)
    text = README.format(python=python, absent=", ".join(absent))
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(
        f"{folder} has what a GPU machine needs, in {size(folder) / 2**20:.1f} MiB: its README.md says how to run it."
    )


def sources(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The files under some names that are needed."""
    for name in names:
        for found in sorted(root.glob(name)):
            for path in [found] if found.is_file() else sorted(found.rglob("*")):
                relative = path.relative_to(root).as_posix()
                if path.is_file() and not NOT_NEEDED.search(relative):
                    yield path


def add_wheels(folder: Path, comfyui: Path, python: str) -> list[str]:
    """Fill the folder with wheels up to the limit, what is scarce first and then the smallest.

    Returns:
        What the machine's Python must have by itself.
    """
    wheels = folder / "wheels"
    wheels.mkdir()
    brought = required(EXPECTED)
    wanted = required(read_names(comfyui / "requirements.txt"), without=FOR_PAGES) | required(["torchao"])
    small = [name for name, installed in wanted.items() if name not in brought and installed < LARGE]
    with tempfile.TemporaryDirectory() as scratch:
        fetched = {name: fetch(name, python, Path(scratch) / name) for name in {*small, *SCARCE}}
        missing = [name for name in SCARCE if fetched[name] is None]
        if missing:
            raise RuntimeError(f"pip found no wheel for Python {python} of {', '.join(missing)}.")
        by_size = sorted((path.stat().st_size, name, path) for name, path in fetched.items() if path is not None)
        packed = set()
        left = LIMIT - size(folder) - 2**16
        for bytes_, name, path in sorted(by_size, key=lambda found: found[1] not in SCARCE):
            if name in SCARCE or bytes_ < left:
                shutil.copy(path, wheels)
                left -= bytes_
                packed.add(name)
    return sorted(set(wanted) - packed - set(brought) | set(EXPECTED))


def read_names(path: Path) -> list[str]:
    """The packages that a requirements file names."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line).name for line in lines if line]


def required(names: list[str] | tuple[str, ...], without: tuple[str, ...] = ()) -> dict[str, int]:
    """Packages with all that they require, as they are installed here: the bytes that each takes."""
    found: dict[str, int] = {}
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in without:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = sum(file.size or 0 for file in package.files or ())
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def fetch(name: str, python: str, folder: Path) -> Path | None:
    """The wheel of the version that is installed here; None if there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    command.append(f"{name}=={distribution(name).version.partition('+')[0]}")
    found = None
    for platforms in ((*PLATFORMS, "any"), ("any",)):
        options = [option for platform in platforms for option in ("--platform", platform)]
        place = folder / str(len(platforms))
        done = subprocess.run([*command, "--dest", str(place), *options], capture_output=True, check=False)
        found = next(place.glob("*.whl"), found) if done.returncode == 0 else found
        if found is None or found.stat().st_size < LARGE_WHEEL:
            break
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
