"""One guided step of a full-size Stable Diffusion UNet on a processor: ComfyUI's own, with SlipstreamCPU, and with each
of its ingredients alone.

    python benchmarks/cpu.py --output folder      # in the environment that `./slipstream env` names

One process, all threads, nothing else running. Random weights: the time does not depend on them. Each variant is run
once, which warms it up and measures what is measured once; then all are run in turn, and the medians count. Each turn
begins with a run that is not counted, since one variant's filters may have to make room for another's. The error is the
latent's after the step, relative to its norm. For the memory of one variant alone, run it with `--only`.

    python benchmarks/cpu.py --whole --output folder

measures whole runs, with what leaves out work: Forecast, CFG Cutoff, DeepCache. What that costs in likeness is a matter
of trained weights: `benchmarks/forecast.py --plans` tells it, on the demo model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from compile import full_size
from loading import load_all
from readme import described, publish

STEPS = 20
"""Of which the first is run."""
STOCK = "ComfyUI"
OFF = {"winograd": "off", "bf16": False, "sdpa": False}
COMPILED = {"backend": {"backend": "inductor"}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    STOCK: {},
    "SlipstreamCPU": {"SlipstreamCPU": {}},
    "SlipstreamCPU, filters in 1024 MiB": {"SlipstreamCPU": {"filters_mib": 1024}},
    "SlipstreamCPU, filters in 512 MiB": {"SlipstreamCPU": {"filters_mib": 512}},
    "winograd alone": {"SlipstreamCPU": {**OFF, "winograd": "auto"}},
    "bf16 alone": {"SlipstreamCPU": {**OFF, "bf16": True}},
    "sdpa alone": {"SlipstreamCPU": {**OFF, "sdpa": True}},
    "winograd and sdpa": {"SlipstreamCPU": {**OFF, "winograd": "auto", "sdpa": True}},
    "SlipstreamCPU, Compile Model": {"SlipstreamCPU": {}, "SlipstreamCompileModel": COMPILED},
    "SlipstreamCPU, Quantize Model": {"SlipstreamCPU": {}, "SlipstreamQuantize": {}},
    "SlipstreamCPU, Quantize Model, Compile Model": {
        "SlipstreamCPU": {},
        "SlipstreamQuantize": {},
        "SlipstreamCompileModel": COMPILED,
    },
}
"""The nodes of each, with their settings. Quantize Model's are int8 dynamic."""
PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "Forecast": {"SlipstreamForecast": {}},
    "DeepCache 3, CFG Cutoff 0.5": {
        "SlipstreamDeepCache": {"cache_interval": 3},
        "SlipstreamCFGCutoff": {"cutoff": 0.5},
    },
    "Forecast 0.5, CFG Cutoff 0.1": {
        "SlipstreamForecast": {"error_budget": 0.5, "max_skips": 10},
        "SlipstreamCFGCutoff": {"cutoff": 0.1},
    },
}
"""What leaves out work. The last is the fastest whose pictures of the demo model still have a mean SSIM above 0.9."""
WHOLE: dict[str, dict[str, dict[str, Any]]] = {
    STOCK: {},
    "SlipstreamCPU": {"SlipstreamCPU": {}},
    **{f"SlipstreamCPU, {name}": {"SlipstreamCPU": {}, **nodes} for name, nodes in PLANS.items()},
}
"""Whole runs."""


def keep_lines(told: list[str], lines: list[tuple[Any, Any]]) -> None:
    """Keep what each method says of its run."""
    told += [f"{entry.config.title}: {line.text}" for entry, line in lines]


def measure_size(model: Any, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one image size."""
    import hosted
    import torch

    machine, teller = hosted.engine("host.machine"), hosted.engine("telling.teller")
    latent = torch.zeros(1, 4, size // 8, size // 8)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def step(patcher: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        more = {} if arguments.whole else {"last_step": 1}
        result = hosted.sample(patcher, *prompts, steps=STEPS, cfg=7.5, image=latent, **more)
        return time.perf_counter() - began, result

    table = WHOLE if arguments.whole else VARIANTS
    chosen = {name: nodes for name, nodes in table.items() if name in (STOCK, *(arguments.only or table))}
    patchers = dict.fromkeys(chosen, model)
    for name, nodes in chosen.items():
        for number, (node, settings) in enumerate(nodes.items()):
            patchers[name] = hosted.run_node(node, patchers[name], str(number), **settings)
    hosted.sample(model, *prompts, steps=STEPS, cfg=7.5, image=latent, last_step=1)  # the process's own first time
    figures: dict[str, Any] = {}
    expected = None
    for name, patcher in patchers.items():
        told: list[str] = []
        patcher.set_attachments(teller.AUDIENCE, teller.Audience(partial(keep_lines, told), None))
        machine.release_unused()
        with machine.watch_memory(model.load_device) as watch:
            first, result = step(patcher)
        expected = result if expected is None else expected
        patcher.remove_attachments(teller.AUDIENCE)
        figures[name] = {
            "first_s": first,
            "error": float((result - expected).norm() / expected.norm()),
            "peak_rss_mib": watch.peaks[0].peak_mib,
            "peak_increase_mib": watch.peaks[0].increase_mib,
            "verdict": told,
            "steady_s": [],
        }
        print(f"{size}: {name}: first {first:.1f} s; {figures[name]['verdict']}", flush=True)
    for round_ in range(arguments.runs):
        for name, patcher in patchers.items():
            # Within a whole run what is done once is little.
            if not arguments.whole:
                step(patcher)
            figures[name]["steady_s"].append(step(patcher)[0])
        print(f"{size}: round {round_ + 1} of {arguments.runs}", flush=True)
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of all sizes."""
    import hosted
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = full_size("sd15", torch.float32)
    return {
        "machine": hosted.engine("host.machine").describe(model.load_device),
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "figures": {str(size): measure_size(model, size, arguments) for size in arguments.sizes},
    }


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings = report["settings"]
    lines = [
        "# A whole run on a processor\n" if settings["whole"] else "# A guided step on a processor\n",
        f"SD 1.5 at full size, random weights, float32, {'all' if settings['whole'] else 'the first'} of {STEPS} steps "
        "of euler, normal, cfg 7.5; "
        f"{described(report['machine'])}, "
        f"{report['machine']['threads']} threads. Medians of {settings['runs']} interleaved rounds after a first one. "
        "Errors are the latent's afterwards, relative to ComfyUI's own; memory is the process's peak in the first "
        "run, and that above what it had before; filters of variants before are kept.\n",
    ]
    for size, figures in report["figures"].items():
        seconds = {name: statistics.median(one["steady_s"] or [one["first_s"]]) for name, one in figures.items()}
        lines += [
            f"## {size}x{size}\n",
            "| variant | first | steady | range | against ComfyUI | error | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, one in figures.items():
            taken = one["steady_s"] or [one["first_s"]]
            lines.append(
                f"| {name} | {one['first_s']:.1f} s | {seconds[name]:.2f} s | {min(taken):.2f} to {max(taken):.2f} s "
                f"| {seconds[STOCK] / seconds[name]:.2f}x | {one['error']:.1e} "
                f"| {one['peak_rss_mib']:.0f} MiB, +{one['peak_increase_mib']:.0f} |"
            )
        lines.append("")
        lines += [f"- {name}: *{text}*" for name, one in figures.items() for text in one["verdict"]]
        lines.append("")
    command = "python benchmarks/cpu.py" + " --whole" * settings["whole"]
    lines.append(f"`{command}`, in the environment that `./slipstream env` names, repeats it.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--whole", action="store_true", help="whole runs, and what leaves out work")
    parser.add_argument("--only", nargs="*", choices=(*VARIANTS, *WHOLE), help="variants to compare with ComfyUI's own")
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    report = measure(arguments)
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
