"""Whether the Benchmark node can be believed: equal models, planted effects, and a stopwatch outside.

    python benchmarks/honesty.py            # in the environment that `./slipstream env` names

Real benchmarks of a small model. Nothing else must be running: this measures whether noise is told from
effects, and on a busy machine there is more of the one. With one thread a machine of several cores has
one to spare for whatever else goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all

MIB = 1024 * 1024


class Bench:
    """Runs the node on a small SD 1.5 model."""

    def __init__(self, steps: int, size: int):
        import comfy.sample
        import folder_paths
        import hosted
        import small_models

        folder_paths.set_temp_directory(tempfile.mkdtemp())
        self.model = hosted.model("SD15")
        self.inputs = {
            "positive": hosted.prompt(self.model, 10, tokens=77),
            "negative": hosted.prompt(self.model, 11, tokens=77),
            "latent_image": {"samples": hosted.latent(self.model, size)},
            "sampler_name": "euler",
            "scheduler": "normal",
            "steps": steps,
            "vae": small_models.vae(),
        }
        self.stopwatch: list[float] = []
        sample = comfy.sample.sample

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = sample(*args, **kwargs)
            self.stopwatch.append(time.perf_counter() - began)
            return result

        comfy.sample.sample = timed

    def run(self, candidate: Any, runs: int) -> list[dict[str, Any]]:
        """The report's two variants."""
        import hosted

        output = hosted.execute(
            "SlipstreamBenchmark", baseline=self.model, candidate=candidate, runs=runs, **self.inputs
        )
        return list(output.ui["slipstream_report"][0]["variants"])

    def with_wrapper(self, action: Any) -> Any:
        """The model with something that happens before each prediction."""
        clone = self.model.clone()

        def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
            kept = action()
            result = executor(*args, **kwargs)
            del kept
            return result

        clone.add_wrapper("predict_noise", predict_noise)
        return clone


def repeated(bench: Bench, candidate: Any, benchmarks: int, runs: int) -> list[dict[str, Any]]:
    """The candidate's part of several benchmarks, each printed as it comes."""
    variants = []
    for number in range(benchmarks):
        variants.append(bench.run(candidate, runs)[1])
        print(f"  {number + 1}: {variants[-1]['speedup']['text']}", flush=True)
    return variants


def equal_models(bench: Bench, benchmarks: int, runs: int) -> None:
    """A model against itself."""
    variants = repeated(bench, bench.model.clone(), benchmarks, runs)
    claims = sum(variant["speedup"]["is_difference"] for variant in variants)
    similar = min(variant["fidelity"]["ssim"] for variant in variants)
    print(f"equal models: {claims} of {benchmarks} claim a difference; SSIM {similar:.6f} at least\n")


def small_effect(bench: Bench, benchmarks: int, runs: int, step_s: float) -> None:
    """A sleep of a tenth of a step before each step."""
    variants = repeated(bench, bench.with_wrapper(lambda: time.sleep(0.1 * step_s)), benchmarks, runs)
    found = sum(variant["speedup"]["is_difference"] and variant["speedup"]["value"] < 1 for variant in variants)
    print(f"a tenth of a step: found in {found} of {benchmarks}\n")


def planted(bench: Bench, runs: int, step_s: float) -> None:
    """Time, memory and noise of known size, each in its column."""
    import torch

    sleep_s = 0.2 * step_s
    baseline, slower = bench.run(bench.with_wrapper(lambda: time.sleep(sleep_s)), runs)
    per_step = slower["step_s"]["median"] - baseline["step_s"]["median"]
    per_run = (slower["time_s"]["median"] - baseline["time_s"]["median"]) / bench.inputs["steps"]
    print(f"a sleep of {sleep_s * 1000:.1f} ms a step: {per_step * 1000:.1f} ms in the step's column, ", end="")
    print(f"{per_run * 1000:.1f} ms a step in the run's")

    hungry = bench.with_wrapper(lambda: torch.ones(256 * MIB, dtype=torch.uint8))
    baseline, more = bench.run(hungry, runs)
    difference = more["memory_mib"]["median"] - baseline["memory_mib"]["median"]
    print(f"256 MiB: {difference:.1f} MiB in the memory column")

    noise = torch.randn(bench.inputs["latent_image"]["samples"].shape, generator=torch.Generator().manual_seed(5))
    noisy = bench.model.clone()

    def add_noise(args: dict[str, Any]) -> Any:
        if args["sigma"].max() > 0.1:  # only the last prediction, which is the latent
            return args["denoised"]
        return args["denoised"] + 0.05 * args["denoised"].norm() / noise.norm() * noise

    noisy.set_model_sampler_post_cfg_function(add_noise)
    _, candidate = bench.run(noisy, runs)
    fidelity = candidate["fidelity"]
    print(f"noise of 0.0500: {fidelity['latent_error']:.4f} in its column, SSIM {fidelity['ssim']:.3f}\n")


def stopwatch(bench: Bench, runs: int) -> None:
    """The time it measures against one measured outside, around the same sampler calls."""
    bench.stopwatch.clear()
    variants = bench.run(bench.model.clone(), runs)
    inside = [run for pair in zip(*(variant["runs"] for variant in variants), strict=True) for run in pair]
    outside = bench.stopwatch[len(variants) :]
    off = [abs(run["seconds"] / seconds - 1) for run, seconds in zip(inside, outside, strict=True)]
    print(f"against a stopwatch outside, {len(off)} runs: {statistics.median(off):.3%} off, {max(off):.3%} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmarks", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=24, help="of the latent")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    load_all()
    import torch

    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.steps, arguments.size)
    step_s = bench.run(bench.model.clone(), arguments.runs)[0]["step_s"]["median"]
    print(
        f"a step takes {step_s * 1000:.1f} ms; {arguments.runs} rounds of {arguments.steps} steps in each benchmark\n"
    )
    stopwatch(bench, arguments.runs)
    planted(bench, arguments.runs, step_s)
    if arguments.benchmarks:
        equal_models(bench, arguments.benchmarks, arguments.runs)
        small_effect(bench, arguments.benchmarks, arguments.runs, step_s)


if __name__ == "__main__":
    main()
