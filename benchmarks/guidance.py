"""What guidance costs and how much of it can be spared on a demo model, at as many predictions evaluated.

    python benchmarks/guidance.py            # in the environment that `./slipstream env` names; hours on two cores
    python benchmarks/guidance.py --count 8  # a look
    python benchmarks/guidance.py --architecture transformer

Every setting samples the same prompts at the same seeds as the exact run, one picture at a time: each decides for
itself. Predictions are the conditions that go through the network: two for a guided evaluation, one for the positive
alone. Each setting is held against a plain cutoff with as many, interpolated between the cutoffs that were run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "tests", "tests/host", "training")]
RESULTS = Path(__file__).parent / "results" / "guidance"

from demo_models import add_architecture
from loading import load_all

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")
CUTOFFS = (0.9, 0.8, 0.65, 0.5)
PLAIN = "cutoff"
ADAPTIVE = "adaptive"
FLOOR = 0.98
"""The SSIM that `adaptive` is to hold, on at least `SHARE` of the prompts, at each scale of guidance."""
SHARE = 0.95
CFG = 5.0
OTHER_SCALES = (3.0, 8.0)


def settings() -> list[tuple[str, dict[str, dict[str, Any]], float]]:
    """Name, inputs of the nodes by their short names, and the share of the steps of each setting."""
    whole = {"cutoff": 1.0}
    found: list[tuple[str, dict[str, dict[str, Any]], float]] = [
        (PLAIN, {"CFGCutoff": {"cutoff": cutoff}}, 1.0) for cutoff in CUTOFFS
    ]
    found += [
        ("start", {"CFGCutoff": {**whole, "start": 0.05}}, 1.0),
        ("interval", {"CFGCutoff": {"start": 0.05, "cutoff": 0.8}}, 1.0),
    ]
    found += [("reuse", {"CFGCutoff": {**whole, "reuse_every": every}}, 1.0) for every in (2, 3, 5)]
    found += [(ADAPTIVE, {"CFGCutoff": {**whole, "adaptive": value}}, 1.0) for value in (0.04, 0.06)]
    found += [("reuse and cutoff", {"CFGCutoff": {"cutoff": cutoff, "reuse_every": 3}}, 1.0) for cutoff in (0.8, 0.5)]
    forecast = {"Forecast": {"error_budget": 0.05}}
    found += [
        ("reuse and adaptive", {"CFGCutoff": {**whole, "reuse_every": 3, "adaptive": 0.06}}, 1.0),
        ("Forecast", forecast, 1.0),
        ("Forecast and reuse", {**forecast, "CFGCutoff": {**whole, "reuse_every": 3}}, 1.0),
        ("fewer steps", {}, 0.8),
    ]
    return found


METHODS = tuple(dict.fromkeys(method for method, *_ in settings()))


def told(nodes: dict[str, dict[str, Any]], steps: int) -> str:
    """A setting, for the table."""
    inputs = {name: value for given in nodes.values() for name, value in given.items()}
    shown = {name: value for name, value in inputs.items() if (name, value) != ("cutoff", 1.0)}
    return ", ".join(f"{name} {value:g}" for name, value in shown.items()) or f"{steps} steps"


class Study:
    """A demo model, and what its exact runs give."""

    def __init__(self, architecture: str, count: int, steps: int):
        import hosted
        import pictures

        # Each picture decides for itself what it can spare.
        pictures.BATCH = 1
        self.count, self.steps = count, steps
        self.demo = pictures.Demo(architecture)
        self.prompts, _ = pictures.held_out(64)
        self.predictions = 0
        self.demo.model.model.diffusion_model.register_forward_hook(self._count)
        self.run_node = hosted.run_node

    def _count(self, module: Any, given: Any, output: Any) -> None:
        self.predictions += output.shape[0]

    def sample(self, sampler: str, nodes: dict[str, dict[str, Any]], steps: int, cfg: float) -> tuple[Any, float]:
        """Pictures (B, H, W, 3), and the predictions that each took."""
        model = self.demo.model
        for number, (name, inputs) in enumerate(nodes.items()):
            model = self.run_node(f"Slipstream{name}", model, str(number), **inputs)
        self.predictions = 0
        latents = self.demo.sample(
            self.prompts[: self.count], range(self.count), model=model, steps=steps, cfg=cfg, sampler=sampler,
        )  # fmt: skip
        return self.demo.decode(latents), self.predictions / self.count

    def rows(self, sampler: str, cfg: float, methods: Sequence[str]) -> list[dict[str, Any]]:
        """Every setting of some methods with one sampler."""
        exact, full = self.sample(sampler, {}, self.steps, cfg)
        found = []
        for method, nodes, share in settings():
            if method not in methods:
                continue
            steps = round(self.steps * share)
            images, predictions = self.sample(sampler, nodes, steps, cfg)
            each = likeness(exact, images)
            found.append(
                {
                    "sampler": sampler, "cfg": cfg, "method": method, "setting": told(nodes, steps),
                    "predictions": predictions, "full": full, "ssim": statistics.mean(each), "ssim_worst": min(each),
                    "held": sum(one >= FLOOR for one in each) / len(each), "pictures": self.count,
                }
            )  # fmt: skip
            print(row_of(found[-1]), flush=True)
        return found


def likeness(exact: Any, images: Any) -> list[float]:
    """SSIM of each picture to the exact one."""
    from slipstream_pack.nodes.measuring.fidelity import compare

    return [compare(a, b, a[None], b[None]).ssim for a, b in zip(exact, images, strict=True)]


def plain_at(rows: Sequence[dict[str, Any]], sampler: str, predictions: float, figure: str) -> float | None:
    """What a plain cutoff gives with as many predictions; None where none was run with as few."""
    some = [row for row in rows if (row["sampler"], row["method"]) == (sampler, PLAIN)]
    points = sorted({(row["predictions"], row[figure]) for row in some} | {(row["full"], 1.0) for row in some})
    places = [place for place, _ in points]
    at = bisect_left(places, predictions)
    if not points or predictions < places[0] or at == len(places):
        return None
    if places[at] == predictions:
        return points[at][1]
    (low, below), (high, above) = points[at - 1], points[at]
    return below + (above - below) * (predictions - low) / (high - low)


def row_of(row: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> str:
    """One setting's line of the table."""
    plain = [plain_at(rows, row["sampler"], row["predictions"], figure) for figure in ("ssim", "ssim_worst")]
    beside = "" if None in plain or row["method"] == PLAIN else " / ".join(f"{value:.4f}" for value in plain)
    return (
        f"| {row['sampler']} | {row['method']} | {row['setting']} | {row['predictions']:.1f} of {row['full']:.0f} "
        f"| {row['ssim']:.4f} / {row['ssim_worst']:.4f} | {beside} |"
    )


def held_row(row: dict[str, Any]) -> str:
    """One value's line of the table of `adaptive`."""
    value = row["setting"].split()[1]
    return (
        f"| {value} | {row['sampler']} | {row['cfg']:g} | {row['predictions']:.1f} of {row['full']:.0f} "
        f"| {100 * row['held']:.0f} % | {row['ssim']:.4f} / {row['ssim_worst']:.4f} |"
    )


def to_markdown(models: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = ["# Guidance: where, and how often", "", "`python benchmarks/guidance.py` repeats it.", ""]
    for name, found in models.items():
        rows = [row for row in found["rows"] if row["cfg"] == CFG]
        held = sorted((row for row in found["rows"] if row["method"] == ADAPTIVE), key=lambda row: row["setting"])
        lines += [
            f"## {name}", "", f"{found['about']}.", "", f"![Chart]({chart_name(name)})", "",
            "SSIM to the exact image, mean and worst; beside it that of a plain cutoff with as many predictions.", "",
            "| sampler | method | setting | predictions | SSIM | plain cutoff |", "|---|---|---|---|---|---|",
            *(row_of(row, rows) for row in rows), "",
            f"What `adaptive` holds: the share of pictures with an SSIM of {FLOOR} at least.", "",
            "| adaptive | sampler | cfg | predictions | held | SSIM |", "|---|---|---|---|---|---|",
            *(held_row(row) for row in held), "",
        ]  # fmt: skip
    return "\n".join(lines)


def chart_name(model: str) -> str:
    return f"{model.lower()}.svg"


def draw_chart(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """SSIM over the share of predictions, a panel for each sampler."""
    from matplotlib.figure import Figure

    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    figure = Figure(figsize=(4.5 * len(samplers), 3.8), layout="constrained")
    for axes, sampler in zip(figure.subplots(1, len(samplers), squeeze=False).flat, samplers, strict=True):
        some = [row for row in rows if row["sampler"] == sampler]
        for method in dict.fromkeys(row["method"] for row in some):
            points = sorted((row["predictions"], 1 - row["ssim"]) for row in some if row["method"] == method)
            axes.plot([place for place, _ in points], [max(loss, 1e-5) for _, loss in points], "o-", label=method)
        axes.set_yscale("log")
        axes.set(title=sampler, xlabel="predictions evaluated", ylabel="1 - SSIM, mean")
    next(iter(figure.axes)).legend(fontsize=6)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_architecture(parser)
    parser.add_argument("--count", type=int, default=64, help="prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    import matplotlib  # noqa: F401, or the lack of it would be found when all is done

    load_all()
    import hosted
    import torch

    study = Study(arguments.architecture, arguments.count, arguments.steps)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "figures.json"
    models = json.loads(file.read_text()) if file.exists() else {}
    # What is not run again keeps its figures.
    before = models.get(arguments.architecture, {"rows": []})["rows"]
    is_again = lambda row: row["sampler"] in arguments.samplers and row["method"] in arguments.methods  # noqa: E731
    rows = [row for row in before if not is_again(row)]
    for sampler in arguments.samplers:
        rows += study.rows(sampler, CFG, arguments.methods)
        for cfg in OTHER_SCALES if ADAPTIVE in arguments.methods else ():
            rows += study.rows(sampler, cfg, [ADAPTIVE])
        rows.sort(key=lambda row: (SAMPLERS.index(row["sampler"]), METHODS.index(row["method"])))
        counts = " or ".join(map(str, sorted({row["pictures"] for row in rows})))
        about = f"{counts} prompts of combinations that training held out, a seed each, {arguments.steps} steps, "
        about += f"cfg {CFG:g}; demo model, 256x256"
        machine = hosted.engine("host.machine").describe(torch.device("cpu"))
        models[arguments.architecture] = {
            "about": about, "machine": machine, "weights": study.demo.digest, "rows": rows,
        }  # fmt: skip
        file.write_text(json.dumps(models, indent=1) + "\n")
        (RESULTS / "README.md").write_text(to_markdown(models))
        draw_chart([row for row in rows if row["cfg"] == CFG], RESULTS / chart_name(arguments.architecture))


if __name__ == "__main__":
    main()
