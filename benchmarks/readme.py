"""The README's tables of measurements, from the files in `benchmarks/results/`.

    python benchmarks/readme.py             # rewrites README.md

A table stands between ``<!-- results: FILE -->`` and ``<!-- /results -->``. The files are reports of
`./slipstream bench --json benchmarks/results/FILE`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)


def table(report: dict[str, Any]) -> str:
    """What was measured, the figures, and the command that repeats it, as Markdown."""
    machine, settings = report["machine"], report["settings"]
    has_pictures = report["weights"] != "random"
    lines = [
        f"{report['title']}; {report['weights']} weights; {described(machine)}; {settings['runs']} interleaved rounds "
        "after a warm-up of each.",
        "",
        "| on the model | speed (95 % interval) |" + (" SSIM |" if has_pictures else ""),
        "|---|---|" + ("---|" if has_pictures else ""),
    ]
    for variant in report["variants"][1:]:
        cells = [name(variant), variant["speedup"]["text"]]
        cells += [f"{variant['fidelity']['ssim']:.3f}"] if has_pictures else []
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"`{report['command']}` repeats it."]
    if not has_pictures:
        lines[-1] += " Pictures of random weights mean nothing and are left out; times do not depend on weights."
    return "\n".join(lines) + "\n"


def described(machine: dict[str, Any]) -> str:
    """What it was measured on."""
    device = machine["processor"] if machine["device_type"] == "cpu" else machine["device"]
    return f"{device}, {machine['cores']} cores; ComfyUI {machine['comfyui']}, torch {machine['torch']}"


def publish(report: dict[str, Any], page: str, folder: Path | None) -> None:
    """Print a benchmark's page; with a folder, keep it there beside its figures."""
    print("\n" + page)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figures.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        (folder / "README.md").write_text(page)


def name(variant: dict[str, Any]) -> str:
    """The methods that a variant has on it, with the settings that matter."""
    shown = {
        "forecast": ("error_budget",),
        "deepcache": ("cache_interval", "cache_branch_id"),
        "cfg_cutoff": ("cutoff",),
    }
    parts = []
    for method in variant["methods"]:
        settings = ", ".join(f"{key} {method['settings'][key]}" for key in shown.get(method["stem"], ()))
        parts.append(method["title"] + (f" ({settings})" if settings else ""))
    return " + ".join(parts) or "nothing"


def rendered(text: str) -> str:
    """The README with its tables as the results give them."""

    def render(found: re.Match[str]) -> str:
        report = json.loads((RESULTS / found[2]).read_text(encoding="utf-8"))
        return found[1] + table(report) + found[4]

    return TABLE.sub(render, text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
