"""Tiled decoding beside decoding whole and beside core's tiles: how near, how fast, in how much memory.

    python benchmarks/tiled_vae.py --output FOLDER       # in the environment that `./slipstream env` names

The KL autoencoder of SD 1.x and SDXL in full size with random weights, and a narrow one that was trained: random
weights have the same statistics everywhere, which flatters whatever estimates them. Nothing else must be running.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host"), str(ROOT / "training")]

from loading import load_all
from readme import described, publish

PARTS = ("cost", "limit", "trained", "full")
GIB = 1024**3
SEEDS = 7_000_003, 7_000_011
"""Pictures that the trained one never saw."""


def network(name: str) -> Any:
    import small_models

    return {"full": small_models.full_vae, "trained": small_models.trained_vae}[name]()


def latents(name: str, vae: Any, width: int, height: int) -> list[Any]:
    """Of pictures for the trained one; noise for the other."""
    import torch
    from scenes import draw, render

    if name == "full":
        return [torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))]
    pictures = (render(draw([seed]), max(width, height))[:, :, :height, :width] for seed in SEEDS)
    return [vae.encode(picture.movedim(1, -1)) for picture in pictures]


def ours(vae: Any, samples: Any, tile_size: int, statistics: str) -> Any:
    from hosted import execute

    settings = {"tile_size": tile_size, "statistics": statistics}
    return execute("SlipstreamVAEDecodeTiled", samples={"samples": samples}, vae=vae, **settings).result[0]


def cores(vae: Any, samples: Any, tile_size: int) -> Any:
    """As the node VAEDecodeTiled calls it, with its default overlap."""
    overlap = min(64, tile_size // 4)
    return vae.decode_tiled(samples, tile_x=tile_size // 8, tile_y=tile_size // 8, overlap=overlap // 8)


def ways(vae: Any, samples: Any, tile_size: int) -> dict[str, Callable[[], Any]]:
    """The ways to decode a latent, by name."""
    return {
        "whole": lambda: vae.decode(samples),
        "exact": lambda: ours(vae, samples, tile_size, "exact"),
        "estimated": lambda: ours(vae, samples, tile_size, "estimated"),
        "core": lambda: cores(vae, samples, tile_size),
    }


def compared(images: Any, whole: Any, tile_size: int) -> dict[str, float]:
    """How near images are to those decoded whole: seam energy is relative to theirs, colours are from 0 to 1."""
    from tiling import decibel, seam_energy

    return {
        "decibel": decibel(images, whole),
        "seam": seam_energy(images, tile_size) / seam_energy(whole, tile_size),
        "shift": float((images - whole).mean((0, 1, 2)).abs().max()),
    }


def fidelity(name: str, sizes: list[tuple[int, int]], tile_sizes: list[int]) -> list[dict[str, Any]]:
    """How near every way comes at several sizes of image and tile."""
    vae, rows = network(name), []
    for width, height in sizes:
        for number, samples in enumerate(latents(name, vae, width, height)):
            whole = vae.decode(samples)
            for tile_size in tile_sizes:
                for way, run in list(ways(vae, samples, tile_size).items())[1:]:
                    what = {"network": name, "image": f"{width}x{height}", "picture": number, "tile_size": tile_size}
                    rows.append({**what, "way": way, **compared(run(), whole, tile_size)})
                    print(rows[-1], flush=True)
    return rows


def cost(size: int, tile_sizes: list[int], runs: int) -> dict[str, Any]:
    """Seconds, in turn, and memory of each way, and how near it comes; memory on the device by accounting: the tensors
    that live at once, without what kernels take for themselves."""
    import hosted
    import torch
    from tiling import Accounting, on_device

    machine = hosted.engine("host.machine")
    vae = network("full")
    (samples,) = latents("full", vae, size, size)
    vae.decode(samples[..., :8, :8])
    whole, figures = None, {}
    for tile_size in tile_sizes:
        for way, run in ways(vae, samples, tile_size).items():
            name = way if way == "whole" else f"{way}, {tile_size}"
            if name in figures:
                continue
            machine.release_unused()
            with machine.watch_memory(torch.device("cpu")) as memory:
                images = run()
            whole = images if whole is None else whole
            figures[name] = {"peak_gib": memory.peaks[0].increase_mib / 1024, "seconds": []}
            figures[name] |= {} if way == "whole" else compared(images, whole, tile_size)
            if way != "core":
                with Accounting() if way == "whole" else on_device(hosted.method("tiled_vae")) as accounting:
                    run()
                figures[name]["on_device_gib"] = accounting.peak / GIB
            print(name, figures[name], flush=True)
    timed = ways(vae, samples, tile_sizes[0])
    for _ in range(runs):
        for way, run in timed.items():
            began = time.perf_counter()
            run()
            figures[way if way == "whole" else f"{way}, {tile_sizes[0]}"]["seconds"].append(time.perf_counter() - began)
            print(way, f"{time.perf_counter() - began:.1f} s", flush=True)
    for figure in figures.values():
        figure["of_whole_peak"] = figure["peak_gib"] / figures["whole"]["peak_gib"]
        if figure["seconds"]:
            medians = [statistics.median(one["seconds"]) for one in (figure, figures["whole"])]
            figure["of_whole_seconds"] = medians[0] / medians[1]
        if "on_device_gib" in figure:
            figure["on_device_of_whole"] = figure["on_device_gib"] / figures["whole"]["on_device_gib"]
    return figures


def limited(way: str, size: int, tile_size: int, gib: float) -> dict[str, Any]:
    """Whether a child process decodes that may take this much more memory than it has when it begins."""
    command = [sys.executable, __file__, "--child", way, str(size), str(tile_size), str(gib)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return {
        "way": way,
        "limit_gib": gib,
        "rc": done.returncode,
        "seconds": time.perf_counter() - began,
        "said": " ".join(last),
    }


def child(way: str, size: int, tile_size: int, gib: float) -> None:
    import psutil
    import torch

    vae = network("full")
    (samples,) = latents("full", vae, size, size)
    ways(vae, samples[..., :32, :32], tile_size)[way]()  # what libraries take once
    data = psutil.Process().memory_full_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (data + int(gib * GIB),) * 2)
    images = ways(vae, samples, tile_size)[way]()
    print(f"decoded {tuple(images.shape)}, all finite: {bool(torch.isfinite(images).all())}")


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# What tiled decoding takes and gives\n",
        f"{described(report['machine'])}; float32. The autoencoder of SD 1.x and SDXL in full size with random "
        "weights, and a narrow one of the same layout that was trained (`training/train_kl.py`). *core* is ComfyUI's "
        "own VAE Decode (Tiled) with its default overlap: three passes, averaged. Decibel are against decoding whole.",
    ]
    if "cost" in report:
        lines += [
            "\n## Time and memory, full size, 1024x1024\n",
            "Rounds in turn in one process, medians. Memory is the peak above that before; *tensors* are those that "
            "live at once, counted, where tiles are on a device (for *whole*, all of them).\n",
            "| way, tile size | time | against whole | memory | against whole | tensors on the device | against whole "
            "| decibel | seams |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, one in report["cost"].items():
            timed = bool(one["seconds"])
            cells = [
                f"{statistics.median(one['seconds']):.1f} s" if timed else "",
                f"{one['of_whole_seconds']:.2f}" if timed else "",
                f"{one['peak_gib']:.2f} GiB",
                f"{one['of_whole_peak']:.2f}",
                f"{one['on_device_gib']:.2f} GiB" if "on_device_gib" in one else "",
                f"{one['on_device_of_whole']:.2f}" if "on_device_gib" in one else "",
                f"{one['decibel']:.1f}" if "decibel" in one else "",
                f"{one['seam']:.3f}" if "seam" in one else "",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if "limit" in report:
        lines.append("\n## 2048x2048 in a process that may take no more (`RLIMIT_DATA`)\n")
        lines += [
            f"- *{one['way']}*, {one['limit_gib']:g} GiB more than it has when it begins: "
            f"{'decoded' if one['rc'] == 0 else 'failed'} after {one['seconds']:.0f} s ({one['said'][:160]})"
            for one in report["limit"]
        ]
    for name, title in (("trained", "The trained one"), ("full", "Full size")):
        if name in report:
            lines += [
                f"\n## {title}: how near\n",
                "Seams are the mean step from pixel to pixel across borders of tiles over that elsewhere, relative to "
                "the same pixels decoded whole. Colours are the largest shift of a channel's mean, of 0 to 1.\n",
                "| image | picture | tile size | way | decibel | seams | colours |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {one['image']} | {one['picture'] + 1} | {one['tile_size']} | {one['way']} | {one['decibel']:.1f} "
                f"| {one['seam']:.3f} | {one['shift']:.4f} |"
                for one in report[name]
            ]
    lines.append("\n`python benchmarks/tiled_vae.py`, in the environment that `./slipstream env` names, repeats it.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="the others are kept as they are")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted
    import torch

    if arguments.child:
        way, size, tile_size, gib = arguments.child
        with torch.inference_mode():
            child(way, int(size), int(tile_size), float(gib))
        return
    kept = arguments.output / "figures.json" if arguments.output else None
    report = json.loads(kept.read_text()) if kept and kept.exists() else {}
    report["machine"] = hosted.engine("host.machine").describe(torch.device("cpu"))
    with torch.inference_mode():
        if "cost" in arguments.only:
            report["cost"] = cost(1024, [512, 256], arguments.runs)
        if "trained" in arguments.only:
            report["trained"] = fidelity("trained", [(1024, 1024), (936, 680)], [256, 360, 512])
        if "full" in arguments.only:
            report["full"] = fidelity("full", [(936, 680)], [256, 360])
    if "limit" in arguments.only:
        report["limit"] = [limited(way, 2048, 256, arguments.limit_gib) for way in ("whole", "estimated")]
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
