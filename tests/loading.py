"""Finding ComfyUI, and loading it and the pack into this process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "slipstream_pack"


def find_comfyui() -> Path | None:
    """`COMFYUI_PATH`, else around the pack, else comfy-cli's default workspace."""
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    places = [Path(named)] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((place.resolve() for place in places if (place / "comfy" / "model_patcher.py").is_file()), None)


def find_chromium() -> str | None:
    """A Chromium or Chrome on the path."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def find_node() -> str | None:
    """Playwright's own node, which runs the page's modules without a browser; or one on the path."""
    spec = importlib.util.find_spec("playwright")
    if spec is not None and spec.origin is not None:
        driver = Path(spec.origin).parent / "driver"
        for own in (driver / "node", driver / "node.exe"):
            if own.is_file():
                return str(own)
    return shutil.which("node")


def packed_files(pack: Path = ROOT) -> list[str]:
    """The paths, in the pack, of the files that `comfy node pack` takes of it and users get."""
    from pathspec import PathSpec

    lines = (pack / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = PathSpec.from_lines("gitwildmatch", lines)
    found = []
    for folder, folders, files in os.walk(pack):
        folders[:] = set(folders) - {".git", "__pycache__"}
        found += [(Path(folder) / name).relative_to(pack).as_posix() for name in files]
    return sorted(name for name in found if not ignored.match_file(name))


def load_pack() -> None:
    """Import the pack under a name of its own, from its file, as the host's loader does."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def load_host(comfyui: Path, on_cpu: bool = True) -> None:
    """Put the host on the path, and tell it to run on the CPU before any of it is imported."""
    # Its own `nodes.py` must be the one that is found: our root is never on the path.
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = on_cpu


def load_all() -> None:
    """The pack and the host, for a program that needs both; it ends with one line where there is no host."""
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("No ComfyUI was found. Set COMFYUI_PATH to its folder.")
    load_pack()
    load_host(comfyui)
