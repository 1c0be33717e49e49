"""What a ComfyUI of our own needs around it: a scratch base directory with the pack, and a checkpoint to run."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    """One progress line."""
    print(f"slipstream: {text}", file=sys.stderr, flush=True)


def has_gpu() -> bool:
    """Whether ComfyUI can use more than the CPU here."""
    import torch

    xpu = getattr(torch, "xpu", None)
    return torch.cuda.is_available() or torch.backends.mps.is_available() or bool(xpu and xpu.is_available())


def install_pack(base: Path) -> None:
    """Put the pack into a base directory's custom nodes."""
    target = base / "custom_nodes" / "slipstream"
    target.parent.mkdir(parents=True)
    link(PACK, target)


def link(source: Path, target: Path) -> None:
    """A link to a file or folder, or a copy of it where links cannot be made."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows, without the right to make links
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "tests", "demo", "__pycache__"))
        else:
            shutil.copy2(source, target)


def show_models(comfyui: Path, base: Path) -> list[str]:
    """The server's options that let it see the user's own models, which a base directory hides."""
    folders = {path.name: str(path) for path in comfyui.glob("models/*") if path.is_dir()}
    config = base / "extra_model_paths.yaml"
    config.write_text(json.dumps({"own": folders}), encoding="utf-8")  # JSON is YAML
    return ["--extra-model-paths-config", str(config)]


def own_checkpoint(comfyui: Path, wanted: str) -> str | None:
    """The user's own SD 1.5 checkpoint, as the host lists it: the wanted one, or another."""
    from checkpoint import is_sd15

    folder = comfyui / "models" / "checkpoints"
    found = sorted(folder.rglob("*.safetensors"), key=lambda path: path.name != wanted)
    return next((str(path.relative_to(folder)) for path in found if is_sd15(path)), None)


def make_random_sd15(comfyui: Path, path: Path) -> None:
    """Write a checkpoint with random weights, made from the host's own layers."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # importing the host looks for a GPU otherwise; only its layers' shapes are needed
    from checkpoint import make_random_sd15

    path.parent.mkdir(parents=True, exist_ok=True)
    make_random_sd15(path)


def run_program(main: Callable[[], None]) -> None:
    """Run a command's main function: however it is ended, what it started is stopped, and errors are one line."""
    for name in ("SIGTERM", "SIGHUP"):  # as an exception, so that the server is stopped and the scratch folder removed
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    except (RuntimeError, OSError) as error:  # a server that ended while it was asked is an OSError
        raise SystemExit(f"slipstream: {error}") from error
