"""Runs what `./slipstream gpu --pack` packed, on a machine without a network: `python run.py --output FOLDER`."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder) / "packages"
        with zipfile.ZipFile(HERE / "source.zip") as source:
            source.extractall(folder)
        for wheel in sorted((HERE / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        host = Path(folder) / "ComfyUI"
        os.environ["COMFYUI_PATH"] = str(host)
        program = str(host / "custom_nodes" / "slipstream" / "benchmarks" / "gpu.py")
        sys.argv = [program, "--packages", str(packages), "--output", "results", *sys.argv[1:]]
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
