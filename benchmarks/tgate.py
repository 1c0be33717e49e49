"""What holding the text's cross-attention would cost and save (T-GATE, Zhang et al. 2024, arXiv:2404.02747).

    python benchmarks/tgate.py --output folder      # in the environment that `./slipstream env` names

After a step each cross-attention of the UNet gives what it gave then. Likeness: on the demo model, by itself and beside
CFG Cutoff, which the same paper proposes; each against what does without it. Time: one guided evaluation of full-size
layouts with random weights, held and computed in turn, medians. It decides whether this is worth a node.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks", "tests", "tests/host", "training")]

from compile import full_size
from loading import load_all
from readme import described, publish

STEPS = 20
SHARES = (0.25, 0.5, 0.75)
SIZES = {"sd15": (512,), "sdxl": (512,)}


@contextmanager
def held(unet: Any, from_call: int) -> Iterator[None]:
    """The UNet's cross-attentions give, from a call on, what they gave in the call before."""
    layers = [module.attn2 for module in unet.modules() if hasattr(module, "attn2")]
    kept: dict[Any, Any] = {}
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def replaced(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            # A batch that lost its negatives: those that are left come first or last, as the host put them.
            if calls <= from_call or layer not in kept or kept[layer].shape[0] < x.shape[0]:
                kept[layer] = forward(x, *args, **kwargs)
            return kept[layer][-x.shape[0] :]

        return call

    hook = unet.register_forward_pre_hook(count)
    for layer in layers:
        layer.forward = replaced(layer, layer.forward)
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            del layer.forward


@contextmanager
def timed(unet: Any) -> Iterator[list[float]]:
    """When each call of the UNet began and ended."""
    moments: list[float] = []
    note = lambda *_: moments.append(time.perf_counter())  # noqa: E731  (None: what a hook returns would count)
    hooks = [unet.register_forward_pre_hook(note), unet.register_forward_hook(note)]
    yield moments
    for hook in hooks:
        hook.remove()


def likeness(count: int) -> list[dict[str, Any]]:
    """SSIM on the demo model: held after a share of the run, with and without guidance from there on."""
    import hosted
    import pictures
    import torch
    from slipstream_pack.nodes.measuring.fidelity import compare

    pictures.BATCH = 1
    demo = pictures.Demo()
    prompts, _ = pictures.held_out(count)
    unet = demo.model.model.diffusion_model

    def images(model: Any, from_call: int | None) -> Any:
        latents = []
        for seed, prompt in enumerate(prompts):
            # Each run begins with nothing held.
            with held(unet, STEPS if from_call is None else from_call):
                latents.append(demo.sample([prompt], [seed], model=model, steps=STEPS, sampler="euler"))
        return demo.decode(torch.cat(latents))

    exact = images(demo.model, None)
    rows = []
    for share in SHARES:
        cut = hosted.run_node("SlipstreamCFGCutoff", demo.model, cutoff=share)
        for name, model, from_call in (
            ("held", demo.model, round(share * STEPS)),
            ("cutoff", cut, None),
            ("cutoff, held", cut, round(share * STEPS)),
        ):
            each = [compare(a, b, a[None], b[None]).ssim for a, b in zip(exact, images(model, from_call), strict=True)]
            rows.append({"what": name, "after": share, "ssim": statistics.mean(each), "ssim_worst": min(each)})
            print(rows[-1], flush=True)
    return rows


def times(runs: int) -> list[dict[str, Any]]:
    """Seconds of a guided evaluation of full-size layouts, computed and held."""
    import hosted
    import torch
    from slipstream_pack.nodes.methods.method import has_bf16

    dtype = torch.bfloat16 if has_bf16() else torch.float32
    rows = []
    for layout, sizes in SIZES.items():
        model = full_size(layout, dtype)
        unet = model.model.diffusion_model
        prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]
        for size in sizes:
            latent = torch.zeros(1, 4, size // 8, size // 8)
            taken: dict[str, list[float]] = {"computed": [], "held": []}
            for _ in range(runs + 1):
                for name, from_call in (("computed", 3), ("held", 1)):
                    with held(unet, from_call), timed(unet) as moments:
                        hosted.sample(model, *prompts, steps=STEPS, cfg=7.5, image=latent, last_step=2)
                    # The second evaluation is the one that may be held.
                    taken[name].append(moments[3] - moments[2])
            seconds = {name: statistics.median(values[1:]) for name, values in taken.items()}
            rows.append({"layout": layout, "size": size, "dtype": str(dtype).removeprefix("torch."), **seconds})
            print(rows[-1], flush=True)
    return rows


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Holding the text's cross-attention (T-GATE)", "",
        f"{described(report['machine'])}. `python benchmarks/tgate.py` repeats it.", "",
        f"SSIM to the exact image: demo model, {report['count']} prompts that training held out, {STEPS} steps of "
        "euler, cfg 5.", "",
        "| after | what | SSIM | worst SSIM |", "|---|---|---|---|",
        *(
            f"| {100 * row['after']:.0f} % | {row['what']} | {row['ssim']:.4f} | {row['ssim_worst']:.4f} |"
            for row in report["rows"]
        ),
        "", "A guided evaluation of full-size layouts, random weights, on "
        f"{report['machine']['threads']} threads; medians of {report['runs']} rounds in turn.", "",
        "| layout | dtype | size | computed | held | saves |", "|---|---|---|---|---|---|",
        *(
            f"| {t['layout']} | {t['dtype']} | {t['size']} | {t['computed']:.2f} s | {t['held']:.2f} s "
            f"| {100 * (1 - t['held'] / t['computed']):.1f} % |"
            for t in report["times"]
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="prompts (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for the figures and their page")
    arguments = parser.parse_args()
    load_all()
    import hosted
    import torch

    report = {
        "machine": hosted.engine("host.machine").describe(torch.device("cpu")),
        "count": arguments.count,
        "runs": arguments.runs,
        "times": times(arguments.runs),
        "rows": likeness(arguments.count),
    }
    publish(report, page(report), arguments.output)


if __name__ == "__main__":
    main()
