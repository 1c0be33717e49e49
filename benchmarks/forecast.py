"""What Forecast costs and saves on the demo models, against its rivals at as many evaluations.

    python benchmarks/forecast.py            # in the environment that `./slipstream env` names; hours on two cores
    python benchmarks/forecast.py --count 8  # a look
    python benchmarks/forecast.py --architecture transformer --samplers euler dpmpp_2m --steps 20 30

Every setting samples the same prompts at the same seeds as the exact run, one picture at a time: each decides for
itself. Evaluations are those that reach the network. Rivals: core's EasyCache and LazyCache, fewer steps on the same
scheduler, and DeepCache, whose cached evaluations count as none though they are not free. On the transformer core's
caches run in bfloat16, against bfloat16's own exact pictures: in float32 they write into what it computes with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "tests", "tests/host", "training")]
RESULTS = Path(__file__).parent / "results" / "forecast"

from cpu import PLANS
from demo_models import add_architecture
from loading import load_all

SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral", "er_sde", "uni_pc")
BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.5)
THRESHOLDS = (0.05, 0.1, 0.2)
FEWER = (15, 12, 10)
METHODS = ("Forecast", "core EasyCache", "core LazyCache", "fewer steps", "DeepCache")
INTERVALS = (2, 3)


def settings(architecture: str, steps: int) -> list[tuple[str, str, dict[str, Any], int]]:
    """Method, node, inputs and steps of each setting."""
    found: list[tuple[str, str, dict[str, Any], int]] = [
        ("Forecast", "SlipstreamForecast", {"error_budget": budget}, steps) for budget in BUDGETS
    ]
    for threshold in THRESHOLDS:
        window = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        found += [
            ("core EasyCache", "EasyCacheNode", window, steps),
            ("core LazyCache", "LazyCacheNode", window, steps),
        ]
    found += [("fewer steps", "", {}, steps * fewer // 20) for fewer in FEWER]
    if architecture == "UNet":
        found += [("DeepCache", "SlipstreamDeepCache", {"cache_interval": interval}, steps) for interval in INTERVALS]
    return found


class Study:
    """A demo model, and what its exact runs give."""

    def __init__(self, architecture: str, count: int):
        import hosted
        import pictures
        import torch

        # Each picture decides for itself what it can spare.
        pictures.BATCH = 1
        self.architecture, self.count, self.cfg = architecture, count, pictures.CFG
        self.demo = pictures.Demo(architecture)
        self.for_core = self.demo.model
        if architecture == "transformer":
            self.for_core = self.demo.model.clone()
            self.for_core.set_model_compute_dtype(torch.bfloat16)
        self.prompts, _ = pictures.held_out(64)
        self.evaluations = 0
        network = self.demo.model.model.diffusion_model
        (network.t_embedder if architecture == "transformer" else network.time_embed).register_forward_hook(self._count)
        self.run_node = hosted.run_node

    def _count(self, *_: Any) -> None:
        self.evaluations += 1

    def model(self, node: str, inputs: dict[str, Any]) -> Any:
        if not node:
            return self.demo.model
        if node.startswith("Slipstream"):
            return self.run_node(node, self.demo.model, **inputs)
        import comfy_extras.nodes_easycache as core

        return getattr(core, node).execute(self.for_core, **inputs).result[0]

    def sample(self, sampler: str, model: Any, steps: int) -> tuple[Any, float]:
        """Pictures (B, H, W, 3), and the evaluations that each took."""
        self.evaluations = 0
        latents = self.demo.sample(
            self.prompts[: self.count], range(self.count), model=model, steps=steps, cfg=self.cfg,
            sampler=sampler,
        )  # fmt: skip
        return self.demo.decode(latents), self.evaluations / self.count

    def plans(self, steps: int) -> None:
        """Print the likeness that each plan of `cpu.py --whole` keeps: euler, normal, cfg 7.5."""
        from slipstream_pack.nodes.measuring.fidelity import compare

        given = {"steps": steps, "cfg": 7.5, "sampler": "euler", "scheduler": "normal"}
        exact = self.demo.decode(self.demo.sample(self.prompts[: self.count], range(self.count), **given))
        print("| plan | evaluations | SSIM | worst SSIM |\n|---|---|---|---|")
        for name, nodes in PLANS.items():
            model = self.demo.model
            for number, (node, inputs) in enumerate(nodes.items()):
                model = self.run_node(node, model, str(number), **inputs)
            self.evaluations = 0
            latents = self.demo.sample(self.prompts[: self.count], range(self.count), model=model, **given)
            evaluations, images = self.evaluations / self.count, self.demo.decode(latents)
            each = [compare(a, b, a[None], b[None]).ssim for a, b in zip(exact, images, strict=True)]
            print(f"| {name} | {evaluations:.1f} | {statistics.mean(each):.4f} | {min(each):.4f} |", flush=True)

    def rows(self, sampler: str, all_steps: int, methods: Sequence[str]) -> list[dict[str, Any]]:
        """Every setting of these methods with one sampler."""
        from slipstream_pack.nodes.measuring.fidelity import compare

        ours, full = self.sample(sampler, self.demo.model, all_steps)
        is_one = self.for_core is self.demo.model or not any(method.startswith("core") for method in methods)
        theirs = ours if is_one else self.sample(sampler, self.for_core, all_steps)[0]
        found = []
        for method, node, inputs, steps in settings(self.architecture, all_steps):
            if method not in methods:
                continue
            images, evaluations = self.sample(sampler, self.model(node, inputs), steps)
            exact = theirs if method.startswith("core") else ours
            each = [compare(a, b, a[None], b[None]).ssim for a, b in zip(exact, images, strict=True)]
            value = next(iter(inputs.values())) if inputs else steps
            if node == "SlipstreamDeepCache":
                evaluations = full / inputs["cache_interval"]
            found.append(
                {
                    "sampler": sampler, "scheduler": self.demo.scheduler(sampler), "steps": all_steps,
                    "method": method, "setting": value,
                    "share": evaluations / full, "ssim": statistics.mean(each), "ssim_worst": min(each),
                    "pictures": self.count,
                }
            )  # fmt: skip
            print(table_row(found[-1]), flush=True)
        return found


def table_row(row: dict[str, Any]) -> str:
    """One setting's line of the table."""
    run = f"{row['sampler']}, {row['scheduler']}, {row['steps']}"
    figures = f"{100 * row['share']:.0f} % | {row['ssim']:.4f} | {row['ssim_worst']:.4f}"
    return f"| {run} | {row['method']} | {row['setting']:g} | {figures} |"


def to_markdown(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        f"# Forecast and its rivals: {found['architecture']}", "",
        f"{found['about']}. `python benchmarks/forecast.py --architecture {found['architecture']}` repeats it.", "",
        "![Chart](chart.svg)", "",
        "*Setting* is `error_budget`, core's `reuse_threshold`, the steps, or DeepCache's interval; DeepCache's cached "
        "evaluations count as none here, though they are not free.", "",
        "| sampler, scheduler, steps | method | setting | evaluations | SSIM | worst SSIM |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *(table_row(row) for row in found["rows"]), ""])


def draw_chart(found: dict[str, Any], file: Path) -> None:
    """SSIM over the share of evaluations, a panel for each sampler."""
    from matplotlib.figure import Figure

    runs = list(dict.fromkeys((row["sampler"], row["steps"]) for row in found["rows"]))
    columns = min(len(runs), 3)
    figure = Figure(figsize=(4 * columns, 3.6 * -(-len(runs) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(runs) // columns), columns, squeeze=False).flat
    for axes, (sampler, steps) in zip(panels, runs, strict=False):
        rows = [row for row in found["rows"] if (row["sampler"], row["steps"]) == (sampler, steps)]
        for method in dict.fromkeys(row["method"] for row in rows):
            some = sorted((row["share"], 1 - row["ssim"]) for row in rows if row["method"] == method)
            axes.plot([100 * share for share, _ in some], [max(loss, 1e-5) for _, loss in some], "o-", label=method)
        axes.set_yscale("log")
        axes.set(title=f"{sampler}, {steps} steps", xlabel="evaluations (%)", ylabel="1 - SSIM, mean")
    next(iter(figure.axes)).legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="prompts (default: %(default)s)")
    add_architecture(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="(default: 20)")
    parser.add_argument("--plans", action="store_true", help="print what the plans of cpu.py --whole keep, and end")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    import matplotlib  # noqa: F401, or the lack of it would be found when all is done

    load_all()
    import hosted
    import torch

    study = Study(arguments.architecture, arguments.count)
    if arguments.plans:
        study.plans(arguments.steps[0])
        return
    folder = RESULTS if study.architecture == "UNet" else RESULTS.with_name(f"forecast-{study.architecture}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    runs = list(product(arguments.samplers, arguments.steps))
    # What is not run again keeps its figures.
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for sampler, steps in runs:
        new = study.rows(sampler, steps, arguments.methods)
        again = {(row["sampler"], row["steps"], row["method"]) for row in new}
        rows = [row for row in rows if (row["sampler"], row["steps"], row["method"]) not in again] + new
        rows.sort(key=lambda row: (SAMPLERS.index(row["sampler"]), row["steps"], METHODS.index(row["method"])))
        pictures = sorted({row["pictures"] for row in rows})
        about = f"{' or '.join(map(str, pictures))} prompts of combinations that training held out, a seed each, "
        about += f"cfg {study.cfg:g}; demo model, 256x256"
        machine = hosted.engine("host.machine").describe(torch.device("cpu"))
        found = {
            "about": about, "architecture": study.architecture, "machine": machine,
            "weights": study.demo.digest, "rows": rows,
        }  # fmt: skip
        file.write_text(json.dumps(found, indent=1) + "\n")
        (folder / "README.md").write_text(to_markdown(found))
        draw_chart(found, folder / "chart.svg")


if __name__ == "__main__":
    main()
