"""Variants of one model in one process: the first image of each, and then all of them in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any


def in_turn(
    variants: dict[str, Any],
    only: Collection[str] | None,
    image: Callable[[Any], Any],
    device: Any,
    runs: int,
) -> dict[str, Any]:
    """First image, steady seconds and peak memory of each variant, and what it says of itself.

    Args:
        variants: MODEL by name; the one called ``eager`` is what the others' latents are compared with.
        only: names of those that are measured beside it; None for all.
        image: samples one, and returns the latent.
        device: where they run.
        runs: rounds, in each of which every variant is sampled once.
    """
    import hosted
    from slipstream_pack.nodes.measuring.fidelity import compare
    from torch._inductor.utils import fresh_cache

    machine, verdicts = hosted.engine("host.machine"), hosted.engine("telling.verdicts")

    def timed(patcher: Any) -> tuple[float, Any]:
        began = machine.clock(device)
        result = image(patcher)
        return machine.clock(device) - began, result

    chosen = {name: patcher for name, patcher in variants.items() if name == "eager" or name in (only or [name])}
    figures: dict[str, Any] = {}
    image(variants["eager"])  # the process's own first time
    exact: Any = None
    with ExitStack() as caches:
        for name, patcher in chosen.items():
            # An empty disk cache each, which stays for the rounds.
            caches.enter_context(fresh_cache(delete=False))
            verdicts._kept.clear()
            machine.release_unused()
            with machine.watch_memory(device) as peak:
                seconds, result = timed(patcher)
            exact = result if exact is None else exact
            figures[name] = {
                "first_s": seconds,
                "peak_increase_mib": [one.increase_mib for one in peak.peaks],
                "latent_error": compare(exact, result).latent_error,
                "verdicts": [line["text"] for one in verdicts._kept.values() for line in one.lines.values()],
                "steady_s": [],
            }
            print(f"{name}: first image {seconds:.1f} s; {figures[name]['verdicts']}", flush=True)
        for number in range(runs):
            for name, patcher in chosen.items():
                figures[name]["steady_s"].append(timed(patcher)[0])
            print(f"round {number + 1} of {runs}", flush=True)
    return figures
