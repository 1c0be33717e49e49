"""Tune held against trying everything, on the demo models: what it finds, how fast, and whether its floor holds.

    python benchmarks/tune.py                                # in the environment that `./slipstream env` names
    python benchmarks/tune.py --architecture transformer
    python benchmarks/tune.py --count 4 --seeds 1 --steps 8  # a look
    python benchmarks/tune.py --replay                       # try everything, and search in what was seen

For each sampler every plan of a ladder is tried on every picture, once. Then the search runs by itself for each floor,
and measures anew. The plan that it finds is held against the best one of all by the same rule for the floor, both by
the times of trying everything; and the floor against prompts and seeds that neither saw. Once more it runs without the
machine, whose times scatter: each run is answered with the picture that trying everything made and with the time that
the plan's work foretells, which tells what the search itself misses. One thread, nothing else must be running. Each run
is written as it comes: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "tests", "tests/host", "training")]
RESULTS = Path(__file__).parent / "results" / "tune"

from demo_models import add_architecture
from loading import load_all

FLOORS = (0.95, 0.99)
SAMPLERS = ("euler", "dpmpp_2m")
LEVELS = {
    "UNet": {"attention_backend": (1,), "cfg_cutoff": (0, 1, 2), "forecast": (1, 2, 3), "deepcache": (1,)},
    "transformer": {"attention_backend": (0,), "cfg_cutoff": (0, 1, 2, 3), "forecast": (1, 2, 3)},
}
"""Which of each method's levels make the ladder, so that it has no more than forty plans."""

MOST = 40
PROMPTS = 2


class Held:
    """One model with one sampler: all that is measured, kept in a file.

    Args:
        file: JSON, which is gone on with if it is there.
        runs: what makes one run.
        ladder: what is tried.
    """

    def __init__(self, file: Path, about: dict[str, Any], runs: Any, ladder: Any):
        self.file, self.runs, self.ladder = file, runs, ladder
        self.data: dict[str, Any] = {"about": about, "logs": {}}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["about"] != about:
                sys.exit(f"{file} is of other settings or another machine: remove it to begin anew.")
            self.data = found
        self._logs: dict[str, Any] = {}

    def log(self, name: str) -> Any:
        """A log that is written after each run."""
        from slipstream_pack.nodes.measuring.trials import Log, from_data

        if name not in self._logs:
            log = self._logs[name] = Log(from_data(self.data["logs"].get(name, [])), lambda: self._write(name, log))
        return self._logs[name]

    def _write(self, name: str, log: Any) -> None:
        self.data["logs"][name] = log.as_data()
        self.write()
        trial = log.trials[-1]
        like = "" if trial.similarity is None else f", SSIM {trial.similarity:.4f}"
        took = "" if trial.seconds is None else f"{trial.seconds:.2f} s"
        print(f"{self.file.stem}, {name}, run {len(log.trials)}: {took}{like} {trial.problem}", flush=True)

    def write(self) -> None:
        """Write it all: a crash leaves the old file or the new one."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.file)

    def measure(self, name: str) -> Any:
        """What runs tasks and puts them into a log, between exact runs of that log's own."""
        from slipstream_pack.nodes.measuring.trials import EXACT, Interleaved

        log = self.log(name)

        def has(picture: str) -> bool:
            return log.has(EXACT, picture) and self.runs.reference(picture) is not None

        return Interleaved(lambda task: self.runs.run(task)[0], log, has)


def by_work(whole: Any) -> Any:
    """The log of trying everything, with the times that the plans' work foretells: the share of rows that go through
    the network; and for what does not show in it (DeepCache, Attention Backend), its own time alone."""
    from slipstream_pack.nodes.measuring.trials import Log

    plans = whole.every()
    alone = [one for one in plans if len(one.levels) == 1 and whole.log.share(one.key) == 1]
    hidden = {one.levels[0]: whole.ratio(one) for one in alone}
    seconds = {
        one.key: whole.log.share(one.key) * math.prod(hidden.get(level, 1.0) for level in one.levels) for one in plans
    }
    return Log(replace(trial, seconds=seconds.get(trial.plan, 1.0)) for trial in whole.log.trials)


def replayed(log: Any, make: Any) -> dict[str, Any]:
    """What a search finds where every run is as it is in a log, and in how many runs; beside the best of all there.

    Args:
        log: with everything tried.
        make: makes a search of a log and of what measures.
    """
    from slipstream_pack.nodes.measuring.search import exhaustive
    from slipstream_pack.nodes.measuring.trials import EXACT, Interleaved, Log, Trial

    whole = make(log, None)
    own, clock = Log(), itertools.count()

    def run(task: Any) -> Trial:
        at = float(next(clock))
        if task.plan == EXACT:
            return Trial(EXACT, task.picture, "replayed", at, seconds=1.0, similarity=1.0)
        similar = log.similarities(task.plan)
        # The checks are at pictures of their own, which were not tried there.
        like = similar.get(task.picture, min(similar.values(), default=0.0))
        return Trial(task.plan, task.picture, "replayed", at, seconds=whole.ratio(task.of), similarity=like)

    found = {"found": make(own, Interleaved(run, own, lambda picture: own.has(EXACT, picture))).run().best}
    found["best"] = exhaustive(whole)
    named = {key: None if one is None else one.name for key, one in found.items()}
    ratios = {f"{key}_ratio": None if one is None else whole.ratio(one) for key, one in found.items()}
    return {**named, **ratios, "runs": len(own.trials)}


def held(file: Path, architecture: str, sampler: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of one sampler on one model: the figures."""
    import hosted
    import pictures
    import torch
    from slipstream_pack.nodes.measuring.search import Search, exhaustive
    from slipstream_pack.nodes.measuring.trials import Task

    table, trying, tune = hosted.method("tune"), hosted.engine("trying"), hosted.engine("tune")
    demo = pictures.Demo(architecture)
    texts, _ = pictures.held_out(PROMPTS + arguments.count)
    negative = demo.conditioning([""])
    prompts = [trying.Prompts(demo.conditioning([text]), negative) for text in texts]
    keys = [one.key for one in prompts]
    latent = {"samples": torch.zeros(1, 4, arguments.size // 8, arguments.size // 8)}
    scheduler = demo.scheduler(sampler)
    call = hosted.engine("benchmark").SamplerCall(
        prompts[0].positive, negative, latent, 1, arguments.steps, pictures.CFG, sampler, scheduler, 1.0, "Tune"
    )
    levels, every = LEVELS[architecture], table.ROWS
    rows = [row for row in every if row.stem in levels]
    table.ROWS = tuple(replace(row, levels=tuple(row.levels[rank] for rank in levels[row.stem])) for row in rows)
    ladder = trying.Ladder.of(demo.model, call, table.APPROXIMATE)
    table.ROWS = every
    about = trying.comparable(demo.model, demo.vae, call) | {
        "prompts": keys, "seeds": arguments.seeds, "levels": list(ladder.configs)
    }  # fmt: skip
    one = Held(file, about, trying.Runs(demo.model, demo.vae, call, prompts, ladder.configs), ladder)
    seen = tune.pictures_of(keys[:PROMPTS], call.seed, arguments.seeds)

    def fresh(number: int) -> list[str]:
        return tune.fresh_pictures(keys[:PROMPTS], call.seed, number)

    def searching(floor: float, log: Any, measure: Any) -> Search:
        return Search(ladder.dials, seen, fresh, log, measure, floor, call.steps)

    figures: dict[str, Any] = {"title": hosted.engine("benchmark").title_of(demo.model, call), "floors": {}}
    chosen = {}
    for floor in FLOORS:
        whole = searching(floor, one.log("all"), one.measure("all"))
        plans = whole.every()
        assert len(plans) <= MOST, len(plans)
        best = exhaustive(whole)
        figures["plans"], figures["runs"] = len(plans), len(one.log("all").trials)
        figures["floors"][str(floor)] = {
            "best": None if best is None else best.name,
            "best_ratio": None if best is None else whole.ratio(best),
            "replayed": replayed(by_work(whole), partial(searching, floor)),
        }
        if arguments.replay:
            continue
        name = f"floor {floor}"
        found = searching(floor, one.log(name), one.measure(name)).run()
        chosen[floor] = found.best
        figures["floors"][str(floor)] |= {
            "found": None if found.best is None else found.best.name,
            "found_ratio": None if found.best is None else whole.ratio(found.best),
            "failed": [check.plan.name for check in found.checks if not check.holds],
            "runs": len(one.log(name).trials),
        }

    one.data["figures"] = figures
    one.write()
    if arguments.replay:
        return figures

    # The exact model once for all floors.
    unseen = [trying.picture_of(key, 1_000 + number) for number, key in enumerate(keys[PROMPTS:])]
    measure, log = one.measure("unseen"), one.log("unseen")
    for picture in unseen:
        wanted = {plan.key: plan for plan in chosen.values() if plan is not None}
        measure([Task(key, picture, plan) for key, plan in wanted.items() if not log.has(key, picture)])
    for floor, plan in chosen.items():
        similar = [] if plan is None else [log.similarities(plan.key)[picture] for picture in unseen]
        figures["floors"][str(floor)] |= {
            "unseen": len(similar),
            "held": sum(like >= floor for like in similar),
            "unseen_worst": min(similar, default=None),
            "unseen_mean": sum(similar) / len(similar) if similar else None,
        }
    one.write()
    return figures


def to_markdown(found: dict[str, dict[str, Any]], machine: str) -> str:
    """The page."""
    lines = [
        "# Tune against trying everything", "", "`python benchmarks/tune.py` repeats it.", "",
        "*Loss*: how much longer the plan that was found takes than the best one of all by the same rule for the "
        "floor, by the times of trying everything. *Runs*: of the search, its exact runs, its checks on fresh seeds "
        "and fewer steps among them, and of trying everything. *Unseen*: prompts and seeds that neither saw, above "
        "the floor.", "",
        "| model, sampler | floor | found | best of all | loss | runs | unseen | worst | mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, figures in found.items():
        for floor, one in figures["floors"].items():
            if "unseen" not in one:
                continue
            told = [told_of(one, key) for key in ("found", "best")]
            like = [f"{one[key]:.4f}" if one[key] is not None else "-" for key in ("unseen_worst", "unseen_mean")]
            runs = runs_of(one["runs"], figures["runs"])
            cells = [name, floor, *told, loss_of(one, "found"), runs, f"{one['held']} of {one['unseen']}", *like]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "", "The same search without the machine: its runs answered with the pictures of trying everything, and the "
        "times that the plans' work foretells, which don't scatter (`python benchmarks/tune.py --replay`).", "",
        "| model, sampler | floor | found | best of all | loss | runs |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, figures in found.items():
        for floor, one in figures["floors"].items():
            if again := one.get("replayed"):
                runs = runs_of(again["runs"], figures["runs"])
                cells = [name, floor, told_of(again, "found"), told_of(again, "best"), loss_of(again, "found"), runs]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{machine}.", ""])


def told_of(one: dict[str, Any], key: str) -> str:
    """A plan with its speed."""
    return f"{one[key]} ({1 / one[f'{key}_ratio']:.2f}x)" if one[key] else "none"


def runs_of(own: int, every: int) -> str:
    """A search's runs, of those of trying everything."""
    return f"{own} of {every} ({100 * own / every:.0f} %)"


def loss_of(one: dict[str, Any], key: str) -> str:
    """How much longer a plan takes than the best of all."""
    return f"{100 * (one[f'{key}_ratio'] / one['best_ratio'] - 1):.1f} %" if one[key] and one["best"] else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_architecture(parser)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS, help="(default: both)")
    parser.add_argument("--count", type=int, default=32, help="unseen prompts (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--replay", action="store_true", help="try everything, and search in what was seen alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(default: results/tune)")
    arguments = parser.parse_args()

    load_all()
    import hosted
    import torch

    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for sampler in arguments.samplers:
        file = arguments.output / f"{arguments.architecture}-{sampler}.json"
        with torch.inference_mode():
            figures = held(file, arguments.architecture, sampler, arguments)
        print(json.dumps(figures, indent=1), flush=True)
    files = sorted(arguments.output.glob("*.json"))
    data = {file.stem.replace("-", ", "): json.loads(file.read_text()) for file in files}
    machine = hosted.engine("host.machine").describe(torch.device("cpu"))
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if value)
    page = to_markdown({name: one["figures"] for name, one in data.items() if "figures" in one}, told)
    (arguments.output / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
