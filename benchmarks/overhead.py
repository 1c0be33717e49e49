"""What the engine itself costs an evaluation of the model.

    python benchmarks/overhead.py            # in the environment that `./slipstream env` names

A plan whose methods find nothing to do, on a UNet that computes nothing. Interleaved in one process;
nothing else must be running.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all


def overhead(evaluations: int, runs: int) -> None:
    """Time the steps of a model without a plan, and of the same with three idle methods."""
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
    times: dict[str, list[float]] = {"stock": [], "planned": []}
    for _ in range(runs):
        for name, patcher in (("stock", model), ("planned", planned)):
            stamps: list[float] = []
            hosted.sample(patcher, steps=evaluations, callback=lambda *_, into=stamps: into.append(time.perf_counter()))
            times[name].append(statistics.median(b - a for a, b in itertools.pairwise(stamps)))
    stock, with_plan = (statistics.median(taken) * 1000 for taken in times.values())
    print(f"UNet stub, {evaluations} evaluations, {runs} interleaved runs, {torch.get_num_threads()} threads")
    print(
        f"stock {stock:.3f} ms, with three idle methods {with_plan:.3f} ms: {with_plan - stock:+.3f} ms an evaluation"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    load_all()
    overhead(arguments.evaluations, arguments.runs)


if __name__ == "__main__":
    main()
