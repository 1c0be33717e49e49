"""Which layers of a diffusion transformer quantizing hurts: each kind of them alone, in eight bits.

    python benchmarks/quantize_layers.py --output folder    # in the environment that `./slipstream env` names

The host's own classes at a part of their width and depth, with random weights: what a kind of layer makes of the error
there is that of its place in the model, not of trained values. Two steps of euler, cfg 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all
from readme import described, publish

SCHEMES = ("int8 weight-only", "int8 dynamic")
LAST = re.compile(r"final|proj_out|norm_out|head\.")

WIDE: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Flux": (
        {
            "hidden_size": 1024,
            "num_heads": 8,
            "axes_dim": [16, 56, 56],
            "depth": 2,
            "depth_single_blocks": 4,
            "mlp_ratio": 4.0,
        },
        (16, 32, 32),
    ),
    "Qwen-Image": (
        {"num_layers": 4, "attention_head_dim": 128, "num_attention_heads": 8, "axes_dims_rope": [16, 56, 56]},
        (16, 1, 32, 32),
    ),
    "SD3": ({"depth": 12, "num_blocks": 12, "adm_in_channels": 2048}, (16, 32, 32)),
    "Wan 2.1": ({"dim": 1024, "ffn_dim": 4096, "freq_dim": 256, "num_heads": 8, "num_layers": 6}, (16, 2, 32, 32)),
}
"""By family of `small_models`: what is larger than there, and the latent."""


def layout(name: str) -> Any:
    """A family, as wide as memory and minutes allow."""
    import small_models

    config, latent = WIDE[name]
    family = small_models.FAMILIES[name]
    config = {**family.config, **config}
    values = dict(family.values)
    if name == "SD3":
        # Its width is 64 times its depth.
        values["pooled_output"] = (2048,)
        target = {"in_features": family.width, "out_features": 64 * config["depth"]}
        config["context_embedder_config"] = {"target": "torch.nn.Linear", "params": target}
    return dataclasses.replace(family, config=config, latent=latent, values=values)


def kind(why: str | None, path: str) -> str:
    """What a layer is, by what Quantize Model says of it."""
    if why is None:
        return "blocks"
    if why == "first, last or embedding":
        return "last" if LAST.search(path) else "first and embeddings"
    return why.removeprefix("of ")


def measure(name: str) -> list[dict[str, Any]]:
    """For each kind its share of the weights, and the error of each scheme on it alone."""
    import hosted
    import small_models

    small_models.FAMILIES[name] = layout(name)
    prompts = [small_models.transformer_prompt(name, seed) for seed in (1, 2)]
    call = {"image": small_models.transformer_latent(name), "steps": 2, "scheduler": "simple", "cfg": 1.0}
    quantize = hosted.method("quantize").Quantize
    own = quantize.leaves_out

    def sampled(scheme: str | None = None) -> Any:
        model = small_models.transformer(name)
        if scheme is not None:
            model = hosted.run_node("SlipstreamQuantize", model, scheme=scheme, min_features=0)
        return hosted.sample(model, *prompts, **call)

    exact, weights = sampled(), Counter()
    chosen = ""

    def leaves_out(self: Any, path: str, layer: Any, is_in_block: bool) -> str | None:
        found = kind(own(dataclasses.replace(self, scheme=SCHEMES[0]), path, layer, is_in_block), path)
        weights[found] += layer.weight.numel()
        has_kernel = not self.is_dynamic or not (layer.in_features % 16 or layer.out_features % 16)
        return None if found == chosen and has_kernel else "another kind"

    quantize.leaves_out = leaves_out
    try:
        sampled(SCHEMES[0])
        total, rows = weights.total(), []
        for chosen, size in weights.most_common():
            errors = {scheme: hosted.relative_error(sampled(scheme), exact) for scheme in SCHEMES}
            rows.append({"family": name, "kind": chosen, "share": size / total, "errors": errors})
            print(rows[-1], flush=True)
        return rows
    finally:
        quantize.leaves_out = own


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        f"| {row['family']} | {row['kind']} | {row['share']:.1%} | "
        + " | ".join(f"{row['errors'][scheme]:.2%}" for scheme in SCHEMES)
        + " |"
        for row in report["rows"]
    ]
    widths = "; ".join(f"{name}: {config}" for name, (config, _) in WIDE.items())
    return "\n".join(
        [
            "# Which layers of a transformer quantizing hurts\n",
            "Each kind of layer alone in eight bits, all others as they are: the norm of the latent's difference after "
            "two steps of euler over its norm. The host's own classes with random weights, at a part of their width "
            f"and depth ({widths}); {described(report['machine'])}. Quantize Model takes the blocks alone.\n",
            "| family | kind of layer | share of linear weights | " + " | ".join(SCHEMES) + " |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "`python benchmarks/quantize_layers.py`, in the environment that `./slipstream env` names, repeats it.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder for the figures and a page that shows them")
    arguments = parser.parse_args()
    load_all()
    import hosted
    import torch

    rows = [row for name in WIDE for row in measure(name)]
    machine = hosted.engine("host.machine").describe(torch.device("cpu"))
    publish({"machine": machine, "rows": rows}, page({"machine": machine, "rows": rows}), arguments.output)


if __name__ == "__main__":
    main()
