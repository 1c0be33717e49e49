"""What the approximations cost, on pictures that mean something: the demo models'.

    python benchmarks/approximations.py      # in the environment that `./slipstream env` names
    python benchmarks/approximations.py --architecture transformer

Every setting samples the same prompts at the same seeds as the exact run. SSIM and PSNR tell how near each picture is
to the exact one; the Frechet distance tells how near the set is to the exact set, whatever the single pictures do. Its
features are those of the demo model's own VAE: nothing is downloaded. For scale it is also given for the exact model at
other seeds, whose pictures are other ones of the same kind. Times are for the Benchmark node.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "tests", "tests/host", "training")]
RESULTS = Path(__file__).parent / "results" / "approximations"

from demo_models import add_architecture
from loading import load_all

INTERVALS = (2, 3, 5)
BRANCHES = (0, 3)
SCHEDULES = ("uniform", "quadratic")
CUTOFFS = (0.25, 0.5, 0.75, 1.0)
VERSIONS = ("v1", "v2")
SCHEMES = ("int8 dynamic", "int8 weight-only", "fp8 weight-only")
"""Those that a CPU has."""


def settings(architecture: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Method, label, node and inputs of each setting."""
    if architecture == "transformer":
        yield "Precision", "bf16", "SlipstreamPrecision", {"compute_dtype": "bf16"}
        for scheme in SCHEMES:
            yield "Quantize Model", scheme, "SlipstreamQuantize", {"scheme": scheme, "min_features": 0}
    else:
        for schedule, branch, interval in product(SCHEDULES, BRANCHES, INTERVALS):
            values = {"cache_interval": interval, "cache_branch_id": branch, "schedule": schedule}
            yield f"DeepCache, {schedule}", f"interval {interval}, branch {branch}", "SlipstreamDeepCache", values
        for version in VERSIONS:
            yield "FreeU", f"{version}, preset auto", "SlipstreamFreeU", {"version": version}
    for cutoff in CUTOFFS:
        yield "CFG Cutoff", f"cutoff {cutoff:g}", "SlipstreamCFGCutoff", {"cutoff": cutoff, "unit": "steps"}


def features(vae: Any, images: Any) -> Any:
    """What the VAE's encoder sees, (pictures x 16, 64): the last layer before the latent, in a grid of 4 x 4 a picture.

    Args:
        vae: the demo model's.
        images: (B, H, W, 3) in 0..1.
    """
    import torch

    encoder = torch.nn.Sequential(*list(vae.first_stage_model.taesd_encoder)[:-1])
    weight = next(encoder.parameters())
    with torch.inference_mode():
        seen = torch.cat([encoder(some.movedim(-1, 1).to(weight)) for some in images.split(8)])
    return torch.nn.functional.adaptive_avg_pool2d(seen, 4).flatten(2).movedim(1, 2).flatten(0, 1).double()


def frechet_distance(first: Any, second: Any) -> float:
    """Of two sets of features (N, C), taken as normal distributions.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    """
    import torch

    means, covariances = [one.mean(0) for one in (first, second)], [one.T.cov() for one in (first, second)]
    # The trace of the root of a product, by the eigenvalues of a symmetric matrix that has the same ones: a feature
    # that is always zero makes it singular, which a general root does not bear.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * shared
    return max(0.0, float((means[0] - means[1]).square().sum() + spread))


def study(architecture: str, count: int, steps: int) -> dict[str, Any]:
    """Sample everything, and compare."""
    import hosted
    import torch
    from pictures import CFG, SAMPLER, Demo, held_out
    from slipstream_pack.nodes.measuring.fidelity import compare

    demo = Demo(architecture)
    prompts, _ = held_out(count)

    def sample(model: Any, seeds: range) -> tuple[Any, Any]:
        latents = demo.sample(prompts, seeds, model=model, steps=steps)
        images = demo.decode(latents)
        return images, features(demo.vae, images)

    exact, exact_features = sample(demo.model, range(count))
    _, others = sample(demo.model, range(count, 2 * count))
    floor = frechet_distance(exact_features, others)
    rows = []
    for method, label, node, values in settings(architecture):
        images, seen = sample(hosted.run_node(node, demo.model, **values), range(count))
        each = [compare(a, b, a[None], b[None]) for a, b in zip(exact, images, strict=True)]
        # Equal pictures have none.
        psnr = [one.psnr_db for one in each if one.psnr_db is not None]
        rows.append(
            {
                "method": method,
                "setting": label,
                "ssim": statistics.mean(one.ssim for one in each),
                "ssim_worst": min(one.ssim for one in each),
                "psnr_db": statistics.mean(psnr) if psnr else None,
                "frechet": frechet_distance(exact_features, seen),
                "is_identical": bool(torch.equal(exact, images)),
            }
        )
        print(table_row(rows[-1]), flush=True)
    about = f"{count} prompts of combinations that training held out, a seed each, {steps} steps of {SAMPLER}, "
    about += f"{demo.scheduler()}, cfg {CFG:g}; demo model, 256x256"
    machine = hosted.engine("host.machine").describe(torch.device("cpu"))
    return {
        "about": about,
        "architecture": architecture,
        "machine": machine,
        "weights": demo.digest,
        "frechet_other_seeds": floor,
        "rows": rows,
    }


def table_row(row: dict[str, Any]) -> str:
    """One setting's line of the table."""
    figures = "1 (same bits) | 1 | - | 0"
    if not row["is_identical"]:
        figures = f"{row['ssim']:.4f} | {row['ssim_worst']:.4f} | {row['psnr_db']:.1f} | {row['frechet']:.2g}"
    return f"| {row['method']} | {row['setting']} | {figures} |"


def to_markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# What the approximations cost: {found['architecture']}",
        "",
        f"{found['about']}. `python benchmarks/approximations.py --architecture {found['architecture']}` repeats it.",
        "",
        "![Chart](chart.svg)",
        "",
        "| method | setting | SSIM | worst SSIM | PSNR (dB) | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    lines += [table_row(row) for row in found["rows"]]
    floor = f"{found['frechet_other_seeds']:.2g}"
    lines += ["", f"For scale: the exact model at other seeds has a Frechet distance of {floor}.", ""]
    return "\n".join(lines)


def draw_chart(found: dict[str, Any], file: Path) -> None:
    """SSIM against the Frechet distance, each method in its colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in found["rows"] if not row["is_identical"]]
    for method in dict.fromkeys(row["method"] for row in shown):
        rows = [row for row in shown if row["method"] == method]
        axes.scatter([row["frechet"] for row in rows], [row["ssim"] for row in rows], label=method)
        for row in rows:
            short = row["setting"].replace("interval ", "").replace("branch ", "").replace("cutoff ", "")
            axes.annotate(short, (row["frechet"], row["ssim"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axvline(found["frechet_other_seeds"], color="grey", linestyle=":", label="the exact model at other seeds")
    axes.set_xscale("log")
    axes.set(xlabel="Frechet distance to the exact set", ylabel="SSIM to the exact picture, mean")
    axes.set_title(found["about"], fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="prompts (default: %(default)s)")
    add_architecture(parser)
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    arguments = parser.parse_args()
    import matplotlib  # noqa: F401, or the lack of it would be found when all is done

    load_all()
    found = study(arguments.architecture, arguments.count, arguments.steps)
    folder = RESULTS if arguments.architecture == "UNet" else RESULTS.with_name("approximations-transformer")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "README.md").write_text(to_markdown(found))
    draw_chart(found, folder / "chart.svg")
    print(f"\n{to_markdown(found)}")


if __name__ == "__main__":
    main()
