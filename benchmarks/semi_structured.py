"""What 2:4 sparse weights cost: each layer's error, and a demo model's pictures, with and without correction.

    python benchmarks/semi_structured.py --output folder    # in the environment that `./slipstream env` names
    python benchmarks/semi_structured.py --architecture transformer --output folder

Each layer is pruned by what it is given in the first evaluation, as Quantize Model does it, and its error is told for
what it is given there, half way and in the last one. Uncorrected: the smaller two of each four weights are zero, and
the others as they were. Shares of the layers are those of their multiplications, those first that save most for the
square of their error. All pictures are sampled at the seeds of the exact run. Nothing here is faster: a processor
computes it dense.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "tests", "tests/host", "training")]

from demo_models import add_architecture
from loading import load_all
from readme import described, publish

SHARES = (0.25, 0.5, 0.75, 1.0)
BOUNDS = (0.02, 0.05, 0.1)
MOMENTS = ("first", "half way", "last")
EVERY = {"scheme": "2:4 sparse", "min_features": 0, "sparse_error": 1.0}
KIND = re.compile(r".*(?:blocks|layers)\.\d+\.")
"""What stands before a layer's name within its block."""


def given(demo: Any, prompts: list[str], steps: int, layers: dict[str, Any]) -> dict[str, list[Any]]:
    """For each layer its inputs (rows, in) in the evaluations of `MOMENTS`."""
    network, found, calls = demo.model.model.diffusion_model, defaultdict(list), []
    wanted = {1, steps // 2, steps}

    def keep(path: str) -> Any:
        def hook(layer: Any, inputs: Any) -> None:
            if len(calls) in wanted:
                found[path].append(inputs[0].detach().reshape(-1, layer.in_features).float().clone())

        return hook

    handles = [network.register_forward_pre_hook(lambda *_: calls.append(None))]
    handles += [layer.register_forward_pre_hook(keep(path)) for path, layer in layers.items()]
    try:
        demo.sample(prompts, range(len(prompts)), steps=steps)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != steps:
        raise RuntimeError(f"expected one call of the model a step, but {steps} steps made {len(calls)}")
    return found


def layer_errors(demo: Any, prompts: list[str], steps: int) -> list[dict[str, Any]]:
    """For each layer its error at each of `MOMENTS`, corrected and not."""
    import hosted
    import torch

    method = hosted.method("semi_structured")
    network = demo.model.model.diffusion_model
    config = hosted.method("quantize").Quantize(**EVERY)
    paths = {part: path for path, part in network.named_modules()}
    chosen = hosted.engine("model.quantized").sorted_out(paths, config)
    layers = {path: layer for layer, path, why in chosen if why is None}
    rows = []
    for path, inputs in given(demo, prompts, steps, layers).items():
        weight = layers[path].weight.detach().float()
        seen = []
        for x in inputs:
            seen.append(method.Inputs(x.shape[-1], x.device))
            seen[-1].add(x)
        row: dict[str, Any] = {"path": path, "kind": KIND.sub("", path), "sides": list(weight.shape)}
        with torch.inference_mode():
            for name, make in (("corrected", method.prune), ("uncorrected", method.magnitudes)):
                pruned = make(weight, seen[0])
                row[name] = [one.error(weight, pruned) for one in seen]
        rows.append(row)
    return rows


def pictures(demo: Any, prompts: list[str], steps: int) -> list[dict[str, Any]]:
    """SSIM and PSNR to the exact pictures: by share of the layers, corrected and not, and by the bound on the error."""
    import hosted
    from slipstream_pack.nodes.measuring.fidelity import compare

    method = hosted.method("semi_structured")
    own = method.prune

    def sample(model: Any) -> Any:
        return demo.decode(demo.sample(prompts, range(len(prompts)), model=model, steps=steps))

    exact, rows = sample(demo.model), []
    settings = [("corrected", own, {"sparse_share": share}) for share in SHARES]
    settings += [("uncorrected", method.magnitudes, {"sparse_share": share}) for share in SHARES]
    settings += [("corrected", own, {"sparse_error": bound}) for bound in BOUNDS]
    try:
        for name, method.prune, values in settings:
            images = sample(hosted.run_node("SlipstreamQuantize", demo.model, "1", **{**EVERY, **values}))
            each = [compare(a, b, a[None], b[None]) for a, b in zip(exact, images, strict=True)]
            psnr = [one.psnr_db for one in each if one.psnr_db is not None]
            kept = hosted.engine("telling.verdicts")._kept[(None, "1")]
            rows.append(
                {
                    "correction": name,
                    **values,
                    "ssim": statistics.mean(one.ssim for one in each),
                    "ssim_worst": min(one.ssim for one in each),
                    # Equal pictures have none.
                    "psnr_db": statistics.mean(psnr) if psnr else None,
                    "verdict": "; ".join(line["text"] for line in kept.lines.values()),
                }
            )
            print(rows[-1], flush=True)
    finally:
        method.prune = own
    return rows


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    by_kind = defaultdict(list)
    for row in report["layers"]:
        by_kind[row["kind"]].append(row)

    def errors(rows: list[dict[str, Any]], name: str) -> str:
        return " | ".join(f"{statistics.mean(row[name][at] for row in rows):.1%}" for at in range(len(MOMENTS)))

    layers = [
        f"| {kind} | {len(rows)} | {errors(rows, 'uncorrected')} | {errors(rows, 'corrected')} |"
        for kind, rows in [*by_kind.items(), ("all", report["layers"])]
    ]
    by_setting = []
    for row in report["pictures"]:
        what = f"share {row['sparse_share']:.0%}" if "sparse_share" in row else f"error {row['sparse_error']:g}"
        work = re.search(r"(\d+%) of the multiplications", row["verdict"])
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        by_setting.append(
            f"| {what} | {row['correction']} | {work[1] if work else '0%'} | {row['ssim']:.4f} "
            f"| {row['ssim_worst']:.4f} | {psnr} |"
        )
    heads = " | ".join(f"{name}, {at}" for name in ("uncorrected", "corrected") for at in MOMENTS)
    return "\n".join(
        [
            f"# What 2:4 sparse weights cost: {report['architecture']}\n",
            f"The demo model, {report['count']} prompts of combinations that training held out, a seed each, "
            f"{report['steps']} steps of dpmpp_2m, cfg 5, 256x256; all linear layers within blocks; "
            f"{described(report['machine'])}.\n",
            "What layers' outputs lose, relative to them, for what they are given in the first evaluation, by which "
            "they are pruned, half way, and in the last:\n",
            f"| layer | number | {heads} |",
            "|---|---|" + "---|" * (2 * len(MOMENTS)),
            *layers,
            "",
            "Pictures against the exact ones, by the share of the layers' multiplications that is pruned, those first "
            "that save most for the square of their error, and by the bound on what a layer's outputs may lose in the "
            "first evaluation:\n",
            "| setting | correction | pruned | SSIM | worst SSIM | PSNR (dB) |",
            "|---|---|---|---|---|---|",
            *by_setting,
            "",
            f"`python benchmarks/semi_structured.py --architecture {report['architecture']}`, in the environment that "
            "`./slipstream env` names, repeats it.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    add_architecture(parser)
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted
    import torch
    from pictures import Demo, held_out

    demo = Demo(arguments.architecture)
    prompts, _ = held_out(arguments.count)
    report = {
        "architecture": arguments.architecture,
        "machine": hosted.engine("host.machine").describe(torch.device("cpu")),
        "count": arguments.count,
        "steps": arguments.steps,
        "layers": layer_errors(demo, prompts[:4], arguments.steps),
        "pictures": pictures(demo, prompts, arguments.steps),
    }
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
