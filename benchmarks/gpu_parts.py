"""The parts of `gpu.py`: what holds on this device, and what each method gives there.

Random weights: times do not depend on them, and errors are those of one latent against another. Ratios come from rounds
in which all variants are sampled in turn, in one process; memory is the device's own figure.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "host")]

MIB = 2**20


@dataclass(frozen=True)
class Part:
    """Attributes:
    name: as `--only` has it, and the function that runs it.
    title: what it tells.
    seconds: what it is given on an H100.
    """

    name: str
    title: str
    seconds: float


PARTS = (
    Part("holds", "Does it hold", 55),
    Part("sdxl", "What it gives: SDXL", 72),
    Part("vae", "What it gives: the VAE", 25),
    Part("transformer", "What it gives: a transformer", 47),
    Part("offload", "Sequential Offload", 18),
    Part("sparse", "2:4 sparse weights", 15),
    Part("sync", "What reading the noise level costs", 8),
)
"""The most important first."""

ON: Mapping[str, Mapping[str, Any]] = {
    "SlipstreamForecast": {"error_budget": 0.5},
    "SlipstreamDeepCache": {"cache_interval": 2},
    "SlipstreamCFGCutoff": {"cutoff": 0.5},
    "SlipstreamFreeU": {"preset": "SD 1.5"},
    "SlipstreamPrecision": {"compute_dtype": "bf16", "channels_last": "on"},
    "SlipstreamAttention": {"backend": "math", "fuse_qkv": True},
    "SlipstreamQuantize": {"scheme": "int8 weight-only", "min_features": 0},
    "SlipstreamCompileModel": {"backend": {"backend": "eager"}},
    "SlipstreamSequentialOffload": {"budget_mib": 0},
}
"""Each method, doing something. What dynamo traces is run as it is: real compilers have checks of their own."""

OFF: Mapping[str, Mapping[str, Any]] = {
    "SlipstreamForecast": {"error_budget": 0.0},
    "SlipstreamDeepCache": {"cache_interval": 1},
    "SlipstreamCFGCutoff": {"cutoff": 1.0},
    "SlipstreamFreeU": {"preset": "custom", "b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
    "SlipstreamAttention": {"backend": "host", "fuse_qkv": False},
}
EXACT = ("SlipstreamAttention", "SlipstreamCompileModel", "SlipstreamSequentialOffload")
BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""What rounding may make of an exact method over a few steps, relative to the latent's norm."""

SCHEMES = ("int8 dynamic", "int8 weight-only", "fp8 dynamic", "fp8 weight-only")
ON_GPUS = ("fp8 dynamic",)
"""What a CPU has no instructions for."""

SPARSE = {"scheme": "2:4 sparse", "min_features": 0, "sparse_error": 1.0}
"""Every layer that can be pruned: random weights bear no bound."""

PRODUCTS = {
    "SDXL's attention": (2048, 1280, 1280),
    "SDXL's feed-forward": (2048, 1280, 10240),
    "Flux's feed-forward": (4608, 3072, 12288),
}
"""Of linear layers: tokens of a guided evaluation at 1024x1024, inputs, outputs."""
REPEATS = 50
"""A product takes less than can be timed."""

QUANTIZED = 0.2
"""The same for quantized weights, on random ones, and for attention in eight bits."""


# The process that runs them


def prepare(is_tiny: bool) -> None:
    """Load ComfyUI and the pack.

    Raises:
        RuntimeError: there is no ComfyUI, or no GPU for what is not tiny.
    """
    import torch
    from loading import find_comfyui, load_host, load_pack

    comfyui = find_comfyui()
    if comfyui is None:
        raise RuntimeError("No ComfyUI was found. Set COMFYUI_PATH to its folder.")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not is_tiny:
        raise RuntimeError("This needs a GPU that torch can use; --tiny runs everything in small on a CPU.")
    load_pack()
    load_host(comfyui, on_cpu=not has_gpu)
    import hosted  # noqa: F401


def about() -> dict[str, Any]:
    """The machine and the versions."""
    import hosted

    return dict(hosted.engine("host.machine").describe(device()))


def clean_up() -> None:
    """Give back what a part took."""
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device() -> Any:
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def is_cuda() -> bool:
    return bool(device().type == "cuda")


def clock() -> float:
    """Seconds, once the device has nothing left to do."""
    import hosted

    return float(hosted.engine("host.machine").clock(device()))


def relative(value: Any, expected: Any) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def held(bench: Any, name: str, error: float, bound: float) -> None:
    """A figure with what it may be."""
    bench.keep(name, {"error": error, "bound": bound, "holds": bool(error <= bound)})


def small(name: str, dtype: Any, seed: int = 0) -> Any:
    import small_models

    return small_models.model(name, seed, dtype, device())


def full_sdxl(bench: Any, offload_device: Any = None) -> Any:
    """SDXL's layout in float16, or a small one."""
    import torch
    from comfy.model_patcher import ModelPatcher
    from compile import full_size

    dtype = torch.float16 if is_cuda() else torch.float32
    patcher = small("SDXL", dtype) if bench.is_tiny else full_size("sdxl", dtype)
    place = offload_device or device()
    return ModelPatcher(patcher.model, load_device=device(), offload_device=place)


def with_nodes(patcher: Any, *nodes: tuple[str, Mapping[str, Any]]) -> Any:
    """A model with nodes of ours on it, each under a number of its own."""
    import hosted

    for number, (name, settings) in enumerate(nodes, 1):
        patcher = hosted.run_node(f"Slipstream{name}", patcher, str(number), **settings)
    return patcher


def schemes(bench: Any, prefix: str = "") -> list[str]:
    """Those of Quantize Model that this device can do."""
    left_out = () if is_cuda() else ON_GPUS
    for scheme in left_out:
        bench.leave_out(prefix + scheme, "a CPU has no instructions for it")
    return [scheme for scheme in SCHEMES if scheme not in left_out]


def eight_bit_attentions(bench: Any, prefix: str = "") -> list[str]:
    """Those of Attention Backend that this machine has."""
    import hosted

    method = hosted.method("attention_backend")
    reasons = {name: method.lacking(name, device().type) for name in method.EIGHT_BITS}
    for name, reason in reasons.items():
        if reason is not None:
            # What follows names this machine's paths.
            bench.leave_out(f"{prefix}{name}", reason.split(". ")[0])
    return [name for name, reason in reasons.items() if reason is None]


def verdict(node_id: str) -> str:
    """What a node says of its last run."""
    import hosted

    found = hosted.engine("telling.verdicts")._kept.get((None, node_id))
    return "; ".join(line["text"] for line in found.lines.values()) if found else ""


# Does it hold


def holds(bench: Any) -> None:
    """The promises, on small models in each type, and on one UNet of full size."""
    import torch

    types = (torch.float16, torch.bfloat16) if is_cuda() else (torch.float32,)
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        bound = BOUNDS[name]
        for check in (_promises, _each_method, _attention, _quantize, _offload):
            with bench.trying(f"{name}: {check.__name__.strip('_')}"):
                check(bench, f"{name}: ", dtype, bound)
    with bench.trying("fp16-fix"):
        _fp16_fix(bench)
    with bench.trying("tiled VAE"):
        _tiled(bench)
    with bench.trying("full size"):
        _full_size(bench)
    # Compilers take longest.
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        with bench.trying(f"{name}: compile"):
            _compile(bench, f"{name}: ", dtype, BOUNDS[name])


def _promises(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    """Any order the same bits, off is identity, nothing left behind, memory returned."""
    import hosted
    import torch

    model = small("minimal", dtype)
    untouched, names = hosted.sample(model), list(ON)
    clean_up()
    before = torch.cuda.memory_allocated() if is_cuda() else 0
    orders = [names, names[::-1], names[3:] + names[:3], (names[5:] + names[:5])[::-1]]
    images = [hosted.sample(_wired(model, order)) for order in orders]
    bench.keep(f"{prefix}orders give the same bits", {"holds": all(torch.equal(image, images[0]) for image in images)})
    bench.keep(f"{prefix}the image is another", {"holds": not torch.equal(images[0], untouched)})
    bench.keep(f"{prefix}the image is finite", {"holds": bool(torch.isfinite(images[0]).all())})
    same = [hosted.run_node(name, model, "1", **settings) is model for name, settings in OFF.items()]
    bench.keep(f"{prefix}off is identity", {"holds": all(same)})

    def fail(step: int, *_: Any) -> None:
        if step == 3:
            raise hosted.PlantedError

    try:
        hosted.sample(_wired(model, names), callback=fail)
    except hosted.PlantedError:
        bench.keep(
            f"{prefix}after a fault the next run is right", {"holds": torch.equal(hosted.sample(model), untouched)}
        )
    bench.keep(f"{prefix}the model is as it was", {"holds": torch.equal(hosted.sample(model), untouched)})
    again = hosted.sample(_wired(model, names))
    bench.keep(f"{prefix}a second run gives the same bits", {"holds": torch.equal(again, images[0])})
    clean_up()
    if is_cuda():
        kept = torch.cuda.memory_allocated() - before
        bench.keep(f"{prefix}memory is returned", {"kept_mib": kept / MIB, "holds": kept < MIB})


def _wired(model: Any, names: list[str]) -> Any:
    return with_nodes(model, *((name.removeprefix("Slipstream"), ON[name]) for name in names))


def _each_method(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    import hosted
    import torch

    model = small("minimal", dtype)
    expected = hosted.sample(model)
    for name, settings in ON.items():
        with bench.trying(prefix + name):
            image = hosted.sample(hosted.run_node(name, model, "1", **settings))
            if name in EXACT:
                held(bench, prefix + name, relative(image, expected), bound)
            else:
                figure = {"error": relative(image, expected), "holds": bool(torch.isfinite(image).all())}
                bench.keep(prefix + name, figure)


def _attention(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    """Every kernel against the host's own."""
    import hosted

    model = small("SD15", dtype)
    expected = hosted.sample(model)
    for backend in ("auto", "flash", "efficient", "cudnn", "math"):
        with bench.trying(f"{prefix}attention {backend}"):
            image = hosted.sample(with_nodes(model, ("Attention", {"backend": backend, "fuse_qkv": True})))
            held(bench, f"{prefix}attention {backend}", relative(image, expected), bound)
            bench.keep(f"{prefix}attention {backend}, its verdict", verdict("1"))
    for backend in eight_bit_attentions(bench, f"{prefix}attention "):
        with bench.trying(f"{prefix}attention {backend}"):
            image = hosted.sample(with_nodes(model, ("Attention", {"backend": backend})))
            held(bench, f"{prefix}attention {backend}", relative(image, expected), QUANTIZED)
            bench.keep(f"{prefix}attention {backend}, its verdict", verdict("1"))


def _quantize(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    import hosted
    import torch

    model = small("SD20", dtype)
    expected = hosted.sample(model)
    for scheme in schemes(bench, prefix):
        with bench.trying(f"{prefix}{scheme}"):
            image = hosted.sample(with_nodes(model, ("Quantize", {"scheme": scheme, "min_features": 0})))
            held(bench, f"{prefix}{scheme}", relative(image, expected), QUANTIZED)
    with bench.trying(f"{prefix}2:4 sparse"):
        images = [hosted.sample(with_nodes(model, ("Quantize", SPARSE))) for _ in range(2)]
        is_held = torch.equal(*images) and not torch.equal(images[0], expected) and torch.isfinite(images[0]).all()
        figure = {"error": relative(images[0], expected), "holds": bool(is_held), "verdict": verdict("1")}
        bench.keep(f"{prefix}2:4 sparse, twice the same bits", figure)
    bench.keep(f"{prefix}weights are back", {"holds": torch.equal(hosted.sample(model), expected)})


def _offload(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    import hosted
    import torch

    model = small("SD15", dtype)
    expected = hosted.sample(model)
    for budget in (0, 8):
        with bench.trying(f"{prefix}budget {budget} MiB"):
            image = hosted.sample(with_nodes(model, ("SequentialOffload", {"budget_mib": budget})))
            bench.keep(f"{prefix}budget {budget} MiB", {"holds": torch.equal(image, expected), "verdict": verdict("1")})


def _compile(bench: Any, prefix: str, dtype: Any, bound: float) -> None:
    import hosted

    model = small("tiniest", dtype)
    expected = hosted.sample(model)
    backends: dict[str, dict[str, Any]] = {"dynamo alone": {"backend": "eager"}}
    if not bench.is_tiny:
        backends["inductor, blocks"] = {"backend": "inductor"}
    if is_cuda():
        backends["CUDA graphs"] = {"backend": "cudagraphs"}
        if not bench.is_tiny:
            backends["reduce-overhead"] = {"backend": "inductor", "mode": "reduce-overhead", "scope": "model"}
    for name, backend in backends.items():
        if bench.left() < 10:
            bench.leave_out(f"{prefix}compile, {name}", "no time was left")
            continue
        with bench.trying(f"{prefix}compile, {name}"):
            compiled = with_nodes(model, ("CompileModel", {"backend": backend}))
            held(bench, f"{prefix}compile, {name}", relative(hosted.sample(compiled), expected), bound)
            lora = hosted.add_lora(model)
            followed = hosted.sample(hosted.add_lora(compiled))
            held(bench, f"{prefix}compile, {name}, a LoRA later", relative(followed, hosted.sample(lora)), bound)


def _fp16_fix(bench: Any) -> None:
    """A full-size autoencoder in fp16, exactly rescaled, against float32."""
    import hosted
    import small_models
    import torch

    vae = small_models.kl_vae() if bench.is_tiny else small_models.full_vae()
    size = 8 if bench.is_tiny else 64
    latent = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = hosted.execute("SlipstreamFP16FixVAE", vae=vae, precision="fp32").result[0].decode(latent)
        # A CPU computes it a hundred times slower.
        precisions = ("fp16", "bf16") if is_cuda() else ("bf16",)
        for precision in precisions:
            with bench.trying(f"fp16-fix, {precision}"):
                fixed = hosted.execute("SlipstreamFP16FixVAE", vae=vae, precision=precision).result[0].decode(latent)
                held(bench, f"fp16-fix, {precision}", relative(fixed, exact), 0.05)


def _tiled(bench: Any) -> None:
    import hosted
    import small_models
    import torch

    vae = small_models.kl_vae() if bench.is_tiny else small_models.full_vae()
    size = 24 if bench.is_tiny else 96
    latent = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = vae.decode(latent)
        tiled = hosted.execute(
            "SlipstreamVAEDecodeTiled", samples={"samples": latent}, vae=vae, tile_size=64 if bench.is_tiny else 256
        ).result[0]
        held(bench, "tiled VAE, against whole", relative(tiled, whole), 0.02)


def _full_size(bench: Any) -> None:
    """Each method on SDXL's layout against the host's own."""
    import hosted
    import torch

    model = full_sdxl(bench)
    size = 16 if bench.is_tiny else 64
    more = {"image": torch.zeros(1, 4, size, size), "steps": 4}
    expected = hosted.sample(model, **more)
    bench.keep("full size: finite", {"holds": bool(torch.isfinite(expected).all())})
    for name, settings in ON.items():
        if name == "SlipstreamSequentialOffload":
            continue
        with bench.trying(f"full size: {name}"):
            image = hosted.sample(hosted.run_node(name, model, "1", **settings), **more)
            figure = {"error": relative(image, expected), "holds": bool(torch.isfinite(image).all())}
            if name in EXACT:
                figure |= {"bound": BOUNDS["float16"], "holds": figure["error"] <= BOUNDS["float16"]}
            bench.keep(f"full size: {name}", figure)
    for backend in eight_bit_attentions(bench, "full size: "):
        with bench.trying(f"full size: {backend}"):
            image = hosted.sample(with_nodes(model, ("Attention", {"backend": backend})), **more)
            held(bench, f"full size: {backend}", relative(image, expected), QUANTIZED)
            bench.keep(f"full size: {backend}, its verdict", verdict("1"))
    bench.keep("full size: as it was", {"holds": torch.equal(hosted.sample(model, **more), expected)})


# What it gives


@dataclass
class Variant:
    """One of those that are compared.

    Attributes:
        make: what is sampled or decoded.
        seconds: what its first run may take, on an H100.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    seconds: float


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """The most in use on the device meanwhile, in MiB above what was before; None where it does not tell."""
    import hosted

    machine = hosted.engine("host.machine")
    with machine.watch_memory(device()) as watch:
        yield lambda: float(watch.peaks[0].increase_mib)


def compare(bench: Any, variants: list[Variant], rounds: int, expected: str) -> dict[str, Any]:
    """First runs, one after the other as long as there is time, and then rounds in turn.

    Returns:
        By name: the first run's seconds and peak memory, all runs' seconds, and how far the result is from that of
        the variant `expected`.
    """
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    results: dict[str, Any] = {}
    reserve = 0.0
    for variant in variants:
        if not bench.is_tiny and bench.left() - reserve < variant.seconds:
            bench.leave_out(
                variant.name, f"{bench.left():.0f} s were left, and it takes {variant.seconds:.0f} at first"
            )
            continue
        with bench.trying(variant.name):
            run = variant.make()
            clean = clock()
            with peak() as increase:
                result = run()
            first = clock() - clean
            began = clock()
            results[variant.name] = run()
            steady = clock() - began
            runs[variant.name] = run
            reserve += 2 * steady
            found[variant.name] = {"first_s": first, "peak_increase_mib": increase(), "seconds": []}
            if expected in results and variant.name != expected:
                found[variant.name]["error"] = relative(result, results[expected])
            bench.keep(variant.name, found[variant.name])
    for number in range(rounds):
        began = time.monotonic()
        for name, run in runs.items():
            start = clock()
            run()
            found[name]["seconds"].append(clock() - start)
        for name in runs:
            bench.keep(name, found[name])
        if bench.left() < 1.2 * (time.monotonic() - began):
            bench.leave_out(f"rounds after the {number + 1}.", "no time was left")
            break
    return found


def sdxl(bench: Any) -> None:
    """A guided picture of 1024x1024 in 30 steps, in many ways; the matrix product's peak; the UNet's share of it."""
    import hosted
    import torch

    model = full_sdxl(bench)
    size, steps = (16, 4) if bench.is_tiny else (128, 30)
    latent = torch.zeros(1, 4, size, size)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def sampling(*nodes: tuple[str, Mapping[str, Any]], on: Callable[[Any], Any] = lambda patcher: patcher) -> Any:
        def make() -> Callable[[], Any]:
            patcher = with_nodes(on(model), *nodes)
            return lambda: hosted.sample(patcher, *prompts, steps=steps, cfg=7.0, image=latent)

        return make

    compiler = {"backend": {"backend": "eager"}} if bench.is_tiny else {"backend": {"backend": "inductor"}}
    exact = (("Attention", {"fuse_qkv": True}), ("Precision", {"channels_last": "on"}))
    fewer = (("DeepCache", {"cache_interval": 3}), ("CFGCutoff", {"cutoff": 0.5}))
    compiled = ("CompileModel", compiler)

    def quantized(scheme: str) -> tuple[str, Mapping[str, Any]]:
        return ("Quantize", {"scheme": scheme, "min_features": 0 if bench.is_tiny else 256})

    everything = (*exact, *fewer, compiled, quantized("fp8 dynamic" if is_cuda() else "int8 dynamic"))
    found = compare(
        bench,
        [
            Variant("stock", sampling(), 4),
            Variant("Attention and channels-last", sampling(*exact), 5),
            Variant("Forecast", sampling(("Forecast", {})), 4),
            Variant("DeepCache and CFG Cutoff", sampling(*fewer), 3),
            Variant("CFG Cutoff, guidance reused", sampling(("CFGCutoff", {"cutoff": 1.0, "reuse_every": 3})), 4),
            Variant("core EasyCache", sampling(on=_easycache), 4),
            Variant("Compile Model, Attention, channels-last", sampling(*exact, compiled), 30),
            Variant("all, with fp8", sampling(*everything), 25),
            Variant("core TorchCompileModel", sampling(on=lambda patcher: _core_compiled(patcher, bench)), 45),
        ],
        1 if bench.is_tiny else 3,
        "stock",
    )
    with bench.trying("peak"):
        _peak(bench, model, found, size, steps)


def _easycache(patcher: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(patcher, 0.2, 0.15, 0.95, False).result[0]


def _core_compiled(patcher: Any, bench: Any) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return patcher if bench.is_tiny else TorchCompileModel.execute(patcher, "inductor").result[0]


def _peak(bench: Any, model: Any, found: dict[str, Any], size: int, steps: int) -> None:
    """What share of the device's matrix products a step of the UNet reaches."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    dtype = model.model.get_dtype()
    side = 256 if bench.is_tiny else 8192
    one, other = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
    for _ in range(3):
        one @ other
    began = clock()
    for _ in range(10):
        one @ other
    flops_s = 10 * 2 * side**3 / (clock() - began)
    unet, config = model.model.diffusion_model, model.model.model_config.unet_config
    make = lambda *shape: torch.randn(*shape, device=device(), dtype=dtype)  # noqa: E731
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet(
            make(2, 4, size, size), make(2).abs().float(), make(2, 77, config["context_dim"]),
            y=make(2, config["adm_in_channels"]),
        )  # fmt: skip
    step = counter.get_total_flops()
    figure = {"matmul_tflops": flops_s / 1e12, "step_tflop": step / 1e12, "reached": {}}
    for name in ("stock", "Compile Model, Attention, channels-last"):
        if found.get(name, {}).get("seconds"):
            figure["reached"][name] = steps * step / statistics.median(found[name]["seconds"]) / flops_s
    bench.keep("of the matrix product's peak", figure)


def vae(bench: Any) -> None:
    """Decoding whole, in core's tiles, in ours, compiled."""
    import hosted
    import small_models
    import torch

    network = small_models.kl_vae() if bench.is_tiny else small_models.full_vae()
    compiler = {"backend": "eager"} if bench.is_tiny else {"backend": "inductor"}
    for side in (64, 128) if bench.is_tiny else (1024, 2048):
        latent = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
        tile = max(64, side // 2)

        def whole(vae: Any = network, latent: Any = latent) -> Any:
            return vae.decode(latent)

        def cores(latent: Any = latent, tile: int = tile) -> Any:
            return network.decode_tiled(latent, tile_x=tile // 8, tile_y=tile // 8, overlap=tile // 32)

        def ours(latent: Any = latent, tile: int = tile) -> Any:
            more = {"samples": {"samples": latent}, "vae": network, "tile_size": tile}
            return hosted.execute("SlipstreamVAEDecodeTiled", **more).result[0]

        def compiled(latent: Any = latent) -> Any:
            made = hosted.execute("SlipstreamCompileVAE", vae=network, backend=compiler).result[0]
            return lambda: made.decode(latent)

        with torch.inference_mode():
            compare(
                bench,
                [
                    Variant(f"{side}, whole", lambda run=whole: run, 2),
                    Variant(f"{side}, core's tiles", lambda run=cores: run, 3),
                    Variant(f"{side}, our tiles", lambda run=ours: run, 3),
                    Variant(f"{side}, compiled", compiled, 15),
                ],
                1 if bench.is_tiny else 3,
                f"{side}, whole",
            )


def flux_sampling(bench: Any) -> Callable[..., Any]:
    """A few of Flux's blocks at full width in bfloat16: what gives the variant of 12 steps with some nodes on them."""
    import hosted
    import small_models
    import torch
    from compile import flux, flux_prompt, random_model

    config = flux(bench.is_tiny)
    in_small = bench.is_tiny and small_models.build(config, 0, torch.bfloat16, device())
    model = in_small or random_model(config, torch.bfloat16)
    prompt = flux_prompt(model, 64)
    size = 8 if bench.is_tiny else 128
    latent = torch.zeros(1, 16, size, size)

    def sampling(*nodes: tuple[str, Mapping[str, Any]]) -> Any:
        def make() -> Callable[[], Any]:
            patcher = with_nodes(model, *nodes)
            return lambda: hosted.sample(patcher, prompt, prompt, steps=12, cfg=1.0, scheduler="simple", image=latent)

        return make

    return sampling


def transformer(bench: Any) -> None:
    """A few of Flux's blocks at full width in bfloat16, 12 steps: eager, with fewer evaluations, quantized weights,
    attention in eight bits, and compiled."""
    sampling = flux_sampling(bench)
    least = {"min_features": 0 if bench.is_tiny else 256}
    compiled = ("CompileModel", {"backend": {"backend": "eager" if bench.is_tiny else "inductor"}})
    found = schemes(bench)
    variants = [Variant("stock", sampling(), 3), Variant("Attention", sampling(("Attention", {"backend": "auto"})), 3)]
    variants.append(Variant("Forecast", sampling(("Forecast", {})), 3))
    variants.append(Variant("Compile Model", sampling(compiled), 15))
    for scheme in [scheme for scheme in found if scheme.endswith(" dynamic")]:
        variants.append(
            Variant(f"Compile Model and {scheme}", sampling(compiled, ("Quantize", {"scheme": scheme, **least})), 15)
        )
    for scheme in found:
        variants.append(Variant(scheme, sampling(("Quantize", {"scheme": scheme, **least})), 4))
    for backend in eight_bit_attentions(bench):
        variants.append(Variant(f"Attention {backend}", sampling(("Attention", {"backend": backend})), 4))
    compare(bench, variants, 1 if bench.is_tiny else 3, "stock")


def offload(bench: Any) -> None:
    """SDXL's layout within budgets: seconds and memory."""
    import hosted
    import torch

    model = full_sdxl(bench, torch.device("cpu"))
    size, steps = (16, 2) if bench.is_tiny else (128, 4)
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def sampling(*nodes: tuple[str, Mapping[str, Any]]) -> Any:
        def make() -> Callable[[], Any]:
            def run() -> Any:
                # What was loaded within another budget is no part of this one.
                clean_up()
                patcher = with_nodes(model, *nodes)
                return hosted.sample(patcher, *prompts, steps=steps, cfg=7.0, image=torch.zeros(1, 4, size, size))

            return run

        return make

    budgets = (4, 0) if bench.is_tiny else (2560, 1024, 0)
    variants = [Variant("all of it", sampling(), 4)]
    variants += [
        Variant(f"{budget} MiB", sampling(("SequentialOffload", {"budget_mib": budget})), 5) for budget in budgets
    ]
    compare(bench, variants, 1, "all of it")


def sparse(bench: Any) -> None:
    """Single products by kernels for 2:4 sparse weights, and a few of Flux's blocks by them: what they gain, and what
    pruning costs a run of 12 steps. No more is pruned where a bound holds."""
    import hosted
    import torch

    dtype = torch.float16 if is_cuda() else torch.float32
    method = hosted.method("semi_structured")
    why = method.lacks_kernels(device(), dtype)
    for name, sides in PRODUCTS.items():
        if why is not None:
            bench.leave_out(name, why)
            continue
        tokens, features, out = (side // 16 for side in sides) if bench.is_tiny else sides
        weight, x = torch.randn(out, features, device=device()), torch.randn(tokens, features, device=device())
        dense = method.magnitudes(weight, method.Inputs(features, device())).to(dtype)
        given = x.to(dtype)

        def times(weight: Any, x: Any = given) -> Callable[[], Any]:
            def run() -> Any:
                for _ in range(REPEATS):
                    y = torch.nn.functional.linear(x, weight)
                return y

            return run

        def as_it_is(dense: Any = dense, times: Any = times) -> Any:
            return times(dense)

        def packed(dense: Any = dense, times: Any = times) -> Any:
            return times(method.packed(dense))

        with torch.inference_mode():
            variants = [Variant(name, as_it_is, 0.5), Variant(f"{name}, 2:4", packed, 0.5)]
            compare(bench, variants, 3, name)
    sampling = flux_sampling(bench)
    compiled = ("CompileModel", {"backend": {"backend": "eager" if bench.is_tiny else "inductor"}})
    variants = [
        Variant("Flux's blocks", sampling(), 2),
        Variant("Flux's blocks, 2:4 sparse", sampling(("Quantize", SPARSE)), 3),
        Variant("Flux's blocks, Compile Model and 2:4 sparse", sampling(compiled, ("Quantize", SPARSE)), 15),
    ]
    compare(bench, variants, 1 if bench.is_tiny else 2, "Flux's blocks")
    bench.keep("2:4 sparse, its verdict", verdict("2" if bench.is_tiny else "1"))


def sync(bench: Any) -> None:
    """What a plan costs an evaluation beyond its methods' work: the engine reads the noise level from the device."""
    import hosted
    import torch

    name = "SD15" if bench.is_tiny else "sdxl"
    model = small("SD15", torch.float32) if bench.is_tiny else full_sdxl(bench)
    size, steps = (16, 4) if bench.is_tiny else (64, 20)
    idle = ("DeepCache", {"cache_interval": 2, "end_percent": 1e-4})
    prompts = [hosted.prompt(model, seed, tokens=77) for seed in (10, 11)]

    def sampling(patcher: Any) -> Callable[[], Any]:
        return lambda: hosted.sample(patcher, *prompts, steps=steps, image=torch.zeros(1, 4, size, size))

    variants = [
        Variant(f"{name}, stock", lambda: sampling(model), 3),
        Variant(f"{name}, a plan that does nothing", lambda: sampling(with_nodes(model, idle)), 3),
    ]
    found = compare(bench, variants, 2 if bench.is_tiny else 7, f"{name}, stock")
    stock, planned = (statistics.median(one["seconds"]) for one in found.values())
    bench.keep("an evaluation", {"overhead_percent": 100 * (planned / stock - 1), "steps": steps})


# The page


def page(data: dict[str, Any]) -> str:
    """All that is known, as Markdown."""
    from readme import described

    machine, settings = data["about"], data["settings"]
    lines = ["# On a GPU\n"]
    where = described(machine) if machine else "no process could begin"
    tiny = " **In small (`--tiny`): these figures say that it runs, not how fast.**" if settings["tiny"] else ""
    lines.append(
        f"{where}. Random weights; ratios from rounds in turn, in one process; memory is the device's peak above what "
        f"was in use before.{tiny}\n"
    )
    for part in PARTS:
        entry = data["parts"].get(part.name)
        if entry is None:
            continue
        why = f": {entry['why']}" if entry.get("why") else ""
        lines += [f"## {part.title}\n", f"{entry['status'].capitalize()} in {entry.get('seconds', 0)} s{why}.\n"]
        lines += _checks(entry) if part.name == "holds" else _comparison(entry)
        lines += [f"- failed: {name}: {why}" for name, why in entry["failed"].items()]
        lines += [f"- left out: {name}: {why}" for name, why in entry["left_out"].items()]
        lines.append("")
    lines.append("`./slipstream gpu`, or `python benchmarks/gpu.py`, repeats it.\n")
    return "\n".join(lines)


def _checks(entry: dict[str, Any]) -> list[str]:
    checks = {name: figure for name, figure in entry["figures"].items() if isinstance(figure, dict)}
    holding = sum(bool(figure.get("holds")) for figure in checks.values())
    lines = [f"{holding} of {len(checks)} checks hold.\n", "| check | holds | error | bound |", "|---|---|---|---|"]
    for name, figure in checks.items():
        error, bound = (f"{figure[key]:.1e}" if key in figure else "" for key in ("error", "bound"))
        lines.append(f"| {name} | {'yes' if figure.get('holds') else '**no**'} | {error} | {bound} |")
    return [*lines, ""]


def spelled(figure: Any) -> str:
    """Figures under names, in one line."""
    if isinstance(figure, dict):
        return ", ".join(f"{name.replace('_', ' ')} {spelled(value)}" for name, value in figure.items())
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)


def _comparison(entry: dict[str, Any]) -> list[str]:
    lines = ["| variant | first | steady | against the first row | memory | error |", "|---|---|---|---|---|---|"]
    first = None
    rest = []
    for name, figure in entry["figures"].items():
        if not isinstance(figure, dict) or "seconds" not in figure:
            rest.append(f"- {name}: {spelled(figure)}")
            continue
        steady = statistics.median(figure["seconds"] or [float("nan")])
        # Sizes are tables of their own, each with a first row.
        first = steady if first is None or "error" not in figure else first
        error = f"{figure['error']:.1e}" if "error" in figure else ""
        lines.append(
            f"| {name} | {figure['first_s']:.2f} s | {steady:.3f} s | {first / steady:.2f}x "
            f"| {figure['peak_increase_mib']:.0f} MiB | {error} |"
        )
    return [*lines, "", *rest, ""]
