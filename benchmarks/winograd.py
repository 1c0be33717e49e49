"""Every 3x3 convolution of stride 1 in a UNet: the host's time, each of Winograd's variants, and what would be chosen.

    python benchmarks/winograd.py --output folder      # in the environment that `./slipstream env` names

One process, all threads, nothing else running. Each shape is warmed up; then all are run in turn, round after round,
and the medians count. Both guided conditions are in one batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from compile import architecture
from loading import PACK, load_all
from readme import described, publish

SIZES = {"sd15": 512, "sdxl": 1024}
BATCH = 2
Shape = tuple[int, int, int, int]
"""Channels, outputs, height, width."""


def shapes(family: str, size: int) -> Counter[Shape]:
    """The shapes, and how many convolutions of one call of the UNet have each. Nothing is computed."""
    import torch

    config = architecture(family)
    config.set_inference_dtype(torch.float32, None)
    meta = torch.device("meta")
    unet = config.get_model({}, "", device=meta).diffusion_model.to(meta)
    found: Counter[Shape] = Counter()

    def count(module: Any, inputs: Any, output: Any) -> None:
        if (module.kernel_size, module.stride) == ((3, 3), (1, 1)):
            found[(module.in_channels, module.out_channels, *output.shape[2:])] += 1

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    y = config.unet_config["adm_in_channels"]
    unet(
        torch.zeros(BATCH, 4, size // 8, size // 8, device=meta),
        torch.zeros(BATCH, device=meta),
        torch.zeros(BATCH, 77, config.unet_config["context_dim"], device=meta),
        None if y is None else torch.zeros(BATCH, y, device=meta),
        transformer_options={"optimized_attention_override": lambda function, q, *_, **__: q},
    )
    return found


def time_one(shape: Shape, arguments: argparse.Namespace, winograd: Any) -> dict[str, Any]:
    """Seconds and errors of one shape: the host's, and each variant's."""
    import torch
    from torch.nn import functional

    channels, outputs, height, width = shape
    dtype = getattr(torch, arguments.dtype)
    memory_format = torch.channels_last if arguments.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.randn(BATCH, channels, height, width).to(dtype, memory_format=memory_format)
    weight = (torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype, memory_format=memory_format)
    bias = torch.randn(outputs).to(dtype)
    runs: dict[str, Any] = {winograd.HOST: lambda: functional.conv2d(x, weight, bias, padding=1)}
    transform_s = {}
    for form in winograd.forms("auto", dtype, True):
        began = time.perf_counter()
        filters = form.transform(weight)
        transform_s[str(form)] = time.perf_counter() - began
        runs[str(form)] = partial(form.convolve, x, filters, bias, memory_format)
    exact = functional.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    # Of the host in float32 this is its own rounding, which is far below ours.
    errors = {name: float((run().float() - exact).norm() / exact.norm()) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.runs):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {
        "shape": shape,
        "gain": winograd.GAIN,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "spread": {name: [min(taken), max(taken)] for name, taken in seconds.items()},
        "errors": errors,
        "transform_s": transform_s,
        "filter_mib": {str(f): f.filter_bytes(weight) / 2**20 for f in winograd.forms("auto", dtype, True)},
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of all shapes of the models that were asked for."""
    import hosted
    import torch

    winograd = sys.modules[f"{PACK}.nodes.methods.winograd"]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {}
    known: dict[Shape, dict[str, Any]] = {}
    with torch.inference_mode():
        for family in arguments.family:
            found = shapes(family, arguments.size or SIZES[family])
            rows = []
            for shape, number in sorted(found.items(), key=lambda item: (-item[0][2], item[0])):
                if shape not in known:
                    known[shape] = time_one(shape, arguments, winograd)
                rows.append({**known[shape], "number": number})
                print(row_of(rows[-1]), flush=True)
            figures[family] = rows
    return {
        "machine": hosted.engine("host.machine").describe(torch.device("cpu")),
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "figures": figures,
    }


def row_of(row: dict[str, Any]) -> str:
    """One shape as a row of the table: milliseconds, and how many times as fast as the host's."""
    channels, outputs, height, width = row["shape"]
    seconds = dict(row["seconds"])
    host = seconds.pop("host")
    best = min(seconds, key=seconds.__getitem__)
    cells = [f"{channels} to {outputs}", f"{width}x{height}", str(row["number"]), f"{1000 * host:.1f} ms"]
    cells += [f"{1000 * taken:.1f} ms, {host / taken:.2f}x" for taken in seconds.values()]
    cells.append(f"{best}, {host / seconds[best]:.2f}x" if seconds[best] <= row["gain"] * host else "the host's own")
    return "| " + " | ".join(cells) + " |"


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings = report["settings"]
    gain = next(iter(report["figures"].values()))[0]["gain"]
    lines = ["# 3x3 convolutions on a processor\n"]
    layout = "channels-last" if settings["channels_last"] else "contiguous"
    lines.append(
        f"{settings['dtype']}, {layout}, batch {BATCH}; {described(report['machine'])}, {report['machine']['threads']} "
        f"threads. Medians of {settings['runs']} interleaved rounds. Where none takes at most {gain:.0%} of the host's "
        "time, the host's own stays. The node takes *direct in bf16* also where it is up to 15 % behind: an eighth "
        "of the memory.\n"
    )
    for family, rows in report["figures"].items():
        names = [name for name in rows[0]["seconds"] if name != "host"]
        lines.append(f"## {family} at {settings['size'] or SIZES[family]} pixels\n")
        lines.append(f"| channels | size | in a UNet call | host | {' | '.join(names)} | fastest |")
        lines.append("|" + "---|" * (5 + len(names)))
        lines += [row_of(row) for row in rows]
        host = sum(row["number"] * row["seconds"]["host"] for row in rows)
        ours, kept = 0.0, 0.0
        for row in rows:
            best = min(names, key=row["seconds"].__getitem__)
            is_chosen = row["seconds"][best] <= gain * row["seconds"]["host"]
            ours += row["number"] * (row["seconds"][best] if is_chosen else row["seconds"]["host"])
            kept += row["number"] * row["filter_mib"][best] if is_chosen else 0
        errors = ", ".join(f"{name} {max(row['errors'][name] for row in rows):.1e}" for name in names)
        lines.append(
            f"\nAll of them in one UNet call: {host:.2f} s by the host, {ours:.2f} s with what is fastest, "
            f"{host / ours:.2f}x; {kept:.0f} MiB of filters kept. Errors against the host's in float32, relative to "
            f"the output's norm, at most: {errors}.\n"
        )
    lines.append("`python benchmarks/winograd.py`, in the environment that `./slipstream env` names, repeats it.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--size", type=int, help="pixels; 512 for SD 1.5 and 1024 for SDXL if not given")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted  # noqa: F401  imports the pack

    report = measure(arguments)
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
