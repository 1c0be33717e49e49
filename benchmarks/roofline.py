"""How near a processor comes to what it can: its measured peaks, and each kind of operation of a UNet against them.

    python benchmarks/roofline.py --output folder      # in the environment that `./slipstream env` names

Peaks: the best of several products of large square matrices in float32, bfloat16 and int8, and the best rate at which
memory much larger than any cache is read and written. Operations: those of torch in one call of a full-size UNet with
both guided conditions, ComfyUI's own and under SlipstreamCPU, each timed as it runs. The limit of an operation is the
longer of two times: its multiplications at the peak of the dtype it computes in, and its inputs and outputs once
through memory. What no peak limits so, such as an input that is still in a cache, can be below its limit; Winograd's
convolutions can, as their multiplications are counted as the direct way needs them. Last, what int8 (VNNI) would give
where there is bfloat16 arithmetic: each shape of linear layers and 3x3 convolutions in both, with what quantizing the
input takes, and the error of both for normally distributed values. Nothing else must be running.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "host")]

from loading import load_all
from readme import described, publish

SIZES = {"sd15": 512, "sdxl": 1024}
VARIANTS = ("ComfyUI", "SlipstreamCPU")
MATRIX, MEMORY = 2048, 512 * 2**20
ROUNDS = 5
LISTED = 12
"""Shapes that the page shows."""
KINDS = (
    ("convolution 3x3", ("convolve", "convolution", "conv2d")),
    ("attention", ("scaled_dot_product_attention", "_scaled_dot_product", "softmax", "_softmax", "attend")),
    ("linear", ("linear", "addmm", "mm", "matmul")),
    ("products of batches", ("bmm", "baddbmm", "einsum")),
    ("norms", ("group_norm", "native_group_norm", "layer_norm", "native_layer_norm", "rms_norm")),
    ("activations", ("silu", "gelu", "sigmoid", "glu")),
    ("casts and copies", ("_to_copy", "to", "copy_", "clone", "contiguous")),
    ("joins and resizing", ("cat", "upsample_nearest2d", "interpolate", "stack", "pad", "constant_pad_nd")),
)
"""Of operations, by their names; a view takes no time, and what is in none is `OTHER`."""
OTHER = "additions and others"


# What the machine can


def best(run: Callable[[], object]) -> float:
    """Seconds: the least of some rounds after one to warm up."""
    run()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def peaks(side: int, size: int) -> dict[str, float]:
    """Operations a second by dtype, and bytes a second as ``memory``.

    Args:
        side: of the matrices.
        size: bytes of what is copied.
    """
    import torch
    from slipstream_pack.nodes.methods.winograd import lays_out

    found: dict[str, float] = {}
    work = 2 * side**3
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            layer = torch.randn(side, side).to(dtype)
            x = torch.randn(side, side).to(dtype)
            name = str(dtype).removeprefix("torch.")
            runs = [lambda x=x, layer=layer: torch.nn.functional.linear(x, layer)]
            if lays_out(dtype):
                laid_out = torch.ops.mkldnn._reorder_linear_weight(layer)
                runs.append(
                    lambda x=x, weight=laid_out: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
                )
            found[name] = work / min(map(best, runs))
        found["int8"] = work / best(int8_product(side, side, side))
        one, other = (torch.ones(size // 4) for _ in range(2))
        # What is written is read first, unless it is streamed: counted as what the program asks for.
        found["memory"] = max(2 * size / best(lambda: other.copy_(one)), size / best(one.sum))
    return found


def fastest_float(peak: dict[str, float]) -> str:
    """The dtype that SlipstreamCPU's products may all be computed in."""
    return max(("float32", "bfloat16"), key=lambda name: peak[name])


def int8_product(rows: int, features: int, outputs: int) -> Callable[[], object]:
    """A product of int8 matrices as a linear layer has it."""
    import torch

    return Int8(torch.randn(rows, features), torch.randn(outputs, features)).product


class Int8:
    """A linear layer or 3x3 convolution in int8, by oneDNN: a scale for each output, and one for the whole input.

    Args:
        x: (rows, in), or (B, in, H, W).
        weight: (out, in), or (out, in, 3, 3).
    """

    def __init__(self, x: Any, weight: Any):
        import torch

        self._torch = torch
        self._onednn = torch.ops.onednn
        self.x = x if x.ndim == 2 else x.to(memory_format=torch.channels_last)
        self._scales = weight.abs().flatten(1).amax(1) / 127
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        whole = (weight.flatten(1) / self._scales[:, None]).round().to(torch.int8).view_as(weight)
        self._given, scale, zero = self._quantized(self.x)
        if x.ndim == 2:
            self._weight = self._onednn.qlinear_prepack(whole, None)
        else:
            around = ([1, 1], [1, 1], [1, 1], 1)
            self._weight = self._onednn.qconv_prepack(whole, self._scales, scale, zero, *around, list(x.shape))
        self._scale, self._zero = scale, zero

    def _quantized(self, x: Any) -> tuple[Any, float, int]:
        torch = self._torch
        low, high = (float(one) for one in torch.aminmax(x))
        scale = max(max(high, 0.0) - min(low, 0.0), 1e-9) / 255
        zero = min(255, max(0, round(-min(low, 0.0) / scale)))
        return torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr(), scale, zero

    def _multiplied(self, x: Any, scale: float, zero: int) -> Any:
        weight = (scale, zero, self._weight, self._scales, self._zeros, None)
        after = (1.0, 0, self._torch.float32, "none", [], "")
        if x.ndim == 2:
            return self._onednn.qlinear_pointwise(x, *weight, *after)
        return self._onednn.qconv2d_pointwise(x, *weight, [1, 1], [1, 1], [1, 1], 1, *after)

    def product(self) -> Any:
        """The product alone, float32."""
        return self._multiplied(self._given, self._scale, self._zero)

    def __call__(self) -> Any:
        """Quantizing the input, and the product."""
        return self._multiplied(*self._quantized(self.x))


def in_eight_bits(shapes: dict[tuple[Any, ...], int]) -> list[dict[str, Any]]:
    """Seconds and errors of each shape in bfloat16 and in int8, the most time first.

    Args:
        shapes: (shape of x, shape of the weight), and how often it comes.
    """
    import torch
    from torch.nn import functional

    rows = []
    with torch.inference_mode():
        for (given, of_weight), number in shapes.items():
            torch.manual_seed(0)
            x, weight = torch.randn(given), torch.randn(of_weight) / math.prod(of_weight[1:]) ** 0.5
            layer = (
                functional.linear if len(of_weight) == 2 else lambda x, weight: functional.conv2d(x, weight, padding=1)
            )
            form = torch.channels_last if len(of_weight) == 4 else torch.contiguous_format
            low, low_weight = (one.to(torch.bfloat16, memory_format=form) for one in (x, weight))
            exact, quantized = layer(x, weight), Int8(x, weight)
            runs = {
                "bf16": lambda layer=layer, x=low, weight=low_weight: layer(x, weight),
                # As under SlipstreamCPU, where what goes from block to block is in float32.
                "bf16, cast": lambda layer=layer, x=x, form=form, weight=low_weight: layer(
                    x.to(torch.bfloat16, memory_format=form), weight
                ),
                "int8": quantized.product,
                "int8, quantized": quantized,
            }
            errors = {
                name: float((runs[name]().float() - exact).norm() / exact.norm())
                for name in ("bf16", "int8, quantized")
            }
            seconds = {name: best(run) for name, run in runs.items()}
            rows.append({"x": given, "weight": of_weight, "number": number, "seconds": seconds, "errors": errors})
    return sorted(rows, key=lambda row: -row["number"] * row["seconds"]["bf16"])


# What a UNet does


def kind_of(name: str, arguments: Any) -> str:
    """What an operation is, by its name and, of a convolution, by its filters."""
    found = next((kind for kind, names in KINDS if name in names), None)
    if found is None:
        found = next(
            (kind for kind, names in KINDS if any(name.startswith(one) for one in names if one[0] == "_")), OTHER
        )
    if found == "convolution 3x3" and arguments[1].shape[-1] == 1:
        return "convolution 1x1"
    return found


def multiplications(name: str, arguments: Any, output: Any) -> float:
    """Twice the multiplications of an operation, counted the direct way; 0 for what has none to speak of."""
    tensors = [one for one in arguments if hasattr(one, "shape")]
    if name in ("convolve", "convolution", "conv2d"):
        return 2.0 * output.numel() * tensors[1][0].numel()
    if name in ("addmm", "baddbmm"):
        return 2.0 * output.numel() * tensors[1].shape[-1]
    if name in ("mm", "bmm", "matmul", "linear"):
        return 2.0 * output.numel() * tensors[0].shape[-1]
    if "scaled_dot_product" in name:
        q, k, v = tensors[:3]
        return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return 0.0


def tensors_of(value: Any) -> Iterator[Any]:
    """The tensors in what an operation takes or gives."""
    if hasattr(value, "nbytes"):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)


def watched(call: Callable[[], object], shapes: Counter[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """What one call does: by kind of operation its time, its work and the bytes that go in and out, by dtype.

    Args:
        shapes: counts linear layers (True) and convolutions by the shapes of input and weight.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "calls": 0, "parts": []})

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            began = time.perf_counter()
            output = function(*args, **(kwargs or {}))
            seconds = time.perf_counter() - began
            name = function._schema.name.split("::")[1]
            given = list(tensors_of(args))
            is_view = function.is_view or name in ("empty", "detach", "view", "t", "transpose")
            if not is_view:
                entry = found[kind_of(name, args)]
                entry["seconds"] += seconds
                entry["calls"] += 1
                moved = sum(one.nbytes for one in (*given, *tensors_of(output)))
                dtype = str(next((one.dtype for one in given if one.is_floating_point()), torch.float32))
                work = multiplications(name, args, output)
                entry["parts"].append((dtype.removeprefix("torch."), work, moved))
                if name in ("linear", "convolve", "convolution", "conv2d"):
                    shapes[name == "linear", tuple(given[0].shape), tuple(given[1].shape)] += 1
            return output

    with Watch():
        call()
    return dict(found)


def limits(found: dict[str, dict[str, Any]], peak: dict[str, float], products: str | None) -> list[dict[str, Any]]:
    """By kind, the most time first: seconds, the least that the peaks allow, work and bytes.

    Args:
        found: from `watched`.
        peak: from `peaks`.
        products: the dtype whose peak limits all that may be computed in it; None for each operation's own.
    """
    rows = []
    for kind, entry in found.items():
        least = 0.0
        for dtype, work, moved in entry["parts"]:
            rate = peak.get(products or dtype, peak["float32"])
            least += max(work / rate, moved / peak["memory"])
        work, moved = (sum(part[at] for part in entry["parts"]) for at in (1, 2))
        rows.append(
            {
                "kind": kind,
                "calls": entry["calls"],
                "seconds": entry["seconds"],
                "least_s": least,
                "operations": work,
                "bytes": moved,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def unet_call(family: str, size: int, peak: dict[str, float], variants: list[str]) -> dict[str, Any]:
    """The kinds of operations of one call of a UNet, by variant; and the call's own time, unwatched."""
    import hosted
    import torch
    from compile import full_size

    model = full_size(family, torch.float32)
    latent = torch.zeros(1, 4, size // 8, size // 8)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]
    figures = {}
    for name in variants:
        patcher = model if name == VARIANTS[0] else hosted.run_node("SlipstreamCPU", model, "1")
        seen: dict[str, Any] = {"shapes": Counter()}
        is_watched = [False]

        def wrapper(executor: Any, *args: Any, seen: Any = seen, is_watched: Any = is_watched, **kwargs: Any) -> Any:
            result, began = [], time.perf_counter()
            call = lambda: result.append(executor(*args, **kwargs))  # noqa: E731
            if is_watched[0]:
                seen["found"] = watched(call, seen["shapes"])
            else:
                call()
                seen["seconds"] = time.perf_counter() - began
            return result[0]

        # Innermost: what our methods do around a call has happened by then.
        patcher = patcher.clone()
        patcher.add_wrapper("diffusion_model", wrapper)

        def step(patcher: Any = patcher) -> None:
            hosted.sample(patcher, *prompts, steps=20, cfg=7.5, image=latent, last_step=1)

        for is_watched[0] in (False, False, True):
            step()
        rows = limits(seen["found"], peak, fastest_float(peak) if name != VARIANTS[0] else None)
        figures[name] = {"seconds": seen["seconds"], "rows": rows}
        print(f"{family} {size}, {name}: {seen['seconds']:.2f} s", flush=True)
        for row in rows:
            print(f"  {row_of(row, seen['seconds'])}", flush=True)
    products: dict[tuple[Any, ...], int] = defaultdict(int)
    for (is_linear, x, weight), number in seen["shapes"].items():
        # Prompts have few rows; what is no 3x3 convolution is little.
        if is_linear and math.prod(x[:-1]) >= 512:
            products[(math.prod(x[:-1]), x[-1]), weight] += number
        elif not is_linear and weight[-1] == 3 and min(weight[:2]) > 4:
            products[x, weight] += number
    return {"variants": figures, "products": in_eight_bits(products) if fastest_float(peak) == "bfloat16" else []}


# The page


def row_of(row: dict[str, Any], whole: float) -> str:
    """One kind as a line of the table."""
    rate = row["operations"] / row["seconds"] / 1e9
    reached = row["least_s"] / row["seconds"]
    return (
        f"| {row['kind']} | {row['calls']} | {row['seconds']:.3f} s | {row['seconds'] / whole:.0%} "
        f"| {row['operations'] / 1e9:.0f} | {rate:.0f} | {row['bytes'] / row['seconds'] / 1e9:.1f} "
        f"| {row['least_s']:.3f} s | {reached:.0%} |"
    )


def page(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    peak = report["peaks"]
    lines = [
        "# How near a processor comes to what it can\n",
        f"{described(report['machine'])}, {report['machine']['threads']} threads"
        f"{'' if report['has_amx'] else '; no AMX'}.\n",
        "| peak | |",
        "|---|---|",
        *(f"| products in {name} | {peak[name] / 1e9:.0f} GFLOP/s |" for name in ("float32", "bfloat16", "int8")),
        f"| memory | {peak['memory'] / 1e9:.1f} GB/s |",
        "",
        "![Chart](chart.svg)\n",
        "Each kind of torch's operations in one call of a UNet with both guided conditions, random weights, float32, "
        "timed as it runs, once. The least time is what the peaks allow: products at the dtype's peak (with "
        f"SlipstreamCPU at {fastest_float(peak)}'s, whatever they are computed in), inputs and outputs once through "
        "memory. Convolutions count as the direct way computes them, which Winograd's don't have to.\n",
    ]
    for layout, figures in report["figures"].items():
        for name, one in figures["variants"].items():
            total = sum(row["seconds"] for row in one["rows"])
            least = sum(row["least_s"] for row in one["rows"])
            lines += [
                f"## {layout}: {name}\n",
                f"{one['seconds']:.2f} s a call, {total:.2f} s of it in operations as they were timed; the least is "
                f"{least:.2f} s: {least / one['seconds']:.0%} of what the machine can.\n",
                "| operations | calls | time | of the call | GFLOP | GFLOP/s | GB/s | least | reached |",
                "|---|---|---|---|---|---|---|---|---|",
                *(row_of(row, one["seconds"]) for row in one["rows"] if row["seconds"] > 0.001 * one["seconds"]),
                "",
            ]
        if figures["products"]:
            lines += eight_bits(layout, figures["products"])
    if fastest_float(peak) != "bfloat16":
        lines.append("No shapes in int8 beside bfloat16: this processor has no arithmetic for that.\n")
    lines.append("`python benchmarks/roofline.py`, in the environment that `./slipstream env` names, repeats it.\n")
    return "\n".join(lines)


def eight_bits(layout: str, rows: list[dict[str, Any]]) -> list[str]:
    """What int8 would give, as Markdown: the shapes with most time, and all of them."""
    names = ("bf16", "bf16, cast", "int8", "int8, quantized")
    lines = [
        f"## {layout}: in int8\n",
        "By shape, in milliseconds, the least of several runs: products in bfloat16, with the input cast from float32; "
        "in int8 by oneDNN, with the input quantized as a whole. Errors for normally distributed values, relative to "
        "the output.\n",
        "| input | weight | in a call | " + " | ".join(names) + " | error bf16 | error int8 |",
        "|---|---|---|" + "---|" * (len(names) + 2),
    ]
    for row in rows[:LISTED]:
        sides = ["x".join(map(str, row[name])) for name in ("x", "weight")]
        times = [f"{1e3 * row['seconds'][name]:.2f}" for name in names]
        errors = [f"{row['errors'][name]:.2%}" for name in ("bf16", "int8, quantized")]
        lines.append("| " + " | ".join([*sides, str(row["number"]), *times, *errors]) + " |")
    for what, dimensions in (("linear layers", 2), ("3x3 convolutions", 4)):
        some = [row for row in rows if len(row["weight"]) == dimensions]
        totals = [sum(row["number"] * row["seconds"][name] for row in some) for name in names]
        lines.append(
            f"| all {what} | | {sum(row['number'] for row in some)} | "
            + " | ".join(f"{1e3 * total:.0f}" for total in totals)
            + " | | |"
        )
    return [*lines, ""]


def draw_chart(report: dict[str, Any], file: Path) -> None:
    """The roofs, and each kind of operation under them: larger the more time it takes."""
    from matplotlib.figure import Figure

    peak = report["peaks"]
    panels = [
        (layout, name, one)
        for layout, figures in report["figures"].items()
        for name, one in figures["variants"].items()
    ]
    figure = Figure(figsize=(6 * min(2, len(panels)), 4.5 * math.ceil(len(panels) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False, sharex=True, sharey=True)
    across = [10 ** (power / 20) for power in range(-40, 81)]
    for axes, (layout, name, one) in zip(grid.flat, panels, strict=False):
        for dtype, colour in (("float32", "tab:blue"), ("bfloat16", "tab:green"), ("int8", "tab:red")):
            roof = [min(peak[dtype], x * peak["memory"]) / 1e9 for x in across]
            axes.plot(across, roof, color=colour, linewidth=1, label=f"{dtype}, {peak[dtype] / 1e9:.0f} GFLOP/s")
        for row in one["rows"]:
            # What multiplies nothing stands on the left, at its share of the memory's rate.
            intensity = max(row["operations"], row["bytes"] / 100) / row["bytes"]
            rate = intensity * row["bytes"] / row["seconds"] / 1e9
            if row["seconds"] > 0.005 * one["seconds"]:
                axes.scatter([intensity], [rate], s=20 + 400 * row["seconds"] / one["seconds"], alpha=0.6, color="grey")
                axes.annotate(row["kind"], (intensity, rate), fontsize=7, xytext=(5, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", title=f"{layout}: {name}", xlabel="FLOP a byte", ylabel="GFLOP/s")
        axes.legend(fontsize=7, loc="lower right")
    figure.savefig(file, metadata={"Date": None})


def has_amx() -> bool:
    """Whether this processor multiplies tiles."""
    import torch

    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels; 512 for SD 1.5 and 1024 for SDXL if not given")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--side", type=int, default=MATRIX, help="of the matrices for the peaks (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="a folder for the figures, a chart and a page that shows them")
    arguments = parser.parse_args()
    import matplotlib  # noqa: F401, or the lack of it would be found when all is done

    load_all()
    import hosted
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    peak = peaks(arguments.side, MEMORY)
    print({name: f"{value / 1e9:.1f} G/s" for name, value in peak.items()}, flush=True)
    report = {
        "machine": hosted.engine("host.machine").describe(torch.device("cpu")),
        "has_amx": has_amx(),
        "peaks": peak,
        "figures": {
            f"{family}, {size}x{size}": unet_call(family, size, peak, arguments.variants)
            for family in arguments.family
            for size in arguments.sizes or [SIZES[family]]
        },
    }
    publish(report, page(report), arguments.output)
    if arguments.output is not None:
        draw_chart(report, arguments.output / "chart.svg")


if __name__ == "__main__":
    main()
