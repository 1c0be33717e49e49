"""What the engine itself costs an evaluation of the model.

    python benchmarks/overhead.py            # in the environment that `./slipstream env` names

A plan whose methods find nothing to do, and Forecast where it makes every evaluation and scores it, on a UNet that
computes nothing, for a picture of 512x512. Interleaved in one process; nothing else must be running. Beside the time it
counts torch's operations: on a GPU each is a kernel or two.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all


def overhead(evaluations: int, runs: int) -> None:
    """Time the steps of a model without a plan, of the same with three idle methods, and with Forecast."""
    import hosted
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Stub(UNetModel):
        def _forward(self, x, *args, **kwargs):
            return x

    model = hosted.model("SD15")
    model.model.diffusion_model.__class__ = Stub
    planned = model
    nowhere = {"start_percent": 0.0, "end_percent": 1e-6}
    for node_id, (node, values) in enumerate(
        (
            ("SlipstreamDeepCache", nowhere),
            ("SlipstreamFreeU", nowhere),
            ("SlipstreamCFGCutoff", {"cutoff": 0.999999, "unit": "timesteps"}),
        )
    ):
        planned = hosted.run_node(node, planned, str(node_id), **values)
    scored = hosted.run_node("SlipstreamForecast", model, "9", error_budget=1e-9)
    variants = {"stock": model, "three idle methods": planned, "Forecast, every evaluation made": scored}
    times: dict[str, list[float]] = {name: [] for name in variants}
    latent = torch.zeros(1, 4, 64, 64)
    for _ in range(runs):
        for name, patcher in variants.items():
            stamps: list[float] = []
            note = lambda *_, into=stamps: into.append(time.perf_counter())  # noqa: E731
            hosted.sample(patcher, steps=evaluations, image=latent, callback=note)
            times[name].append(statistics.median(b - a for a, b in itertools.pairwise(stamps)))
    print(f"UNet stub, {evaluations} evaluations, {runs} interleaved runs, {torch.get_num_threads()} threads")
    stock = statistics.median(times["stock"]) * 1000
    before = operations(lambda: hosted.sample(model, steps=evaluations, image=latent))
    for name, patcher in variants.items():
        taken = statistics.median(times[name]) * 1000
        count = operations(lambda patcher=patcher: hosted.sample(patcher, steps=evaluations, image=latent)) - before
        print(
            f"{name}: {taken:.3f} ms, {taken - stock:+.3f} ms and {count / evaluations:+.0f} operations an evaluation"
        )


def operations(run: Callable[[], object]) -> int:
    """How many of torch's operations something takes, views not counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not function.is_view
            return function(*args, **(kwargs or {}))

    with Counting() as counting:
        run()
    return counting.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    load_all()
    overhead(arguments.evaluations, arguments.runs)


if __name__ == "__main__":
    main()
