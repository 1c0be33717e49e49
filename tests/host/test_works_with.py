"""Every node on every family of transformers: served within a bound against the host, idle and saying so, or refused in
words that say what serves instead. What was seen is the page WORKS-WITH.md.

Where the page is no longer what the tests see, they fail. `SLIPSTREAM_WRITE=1` writes it anew: look at it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import hosted
import pytest
import small_models
import torch
from comfy import latent_formats
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import TAESD
from hosted import NODES, execute, relative_error, run_node, sample
from safetensors.torch import save_file
from small_models import FAMILIES, deep, transformer_latent, transformer_prompt
from test_compile_vae import compile_vae

import nodes as host_nodes

PAGE = Path(__file__).resolve().parents[2] / "WORKS-WITH.md"
GPU = torch.device("cpu", 0)
"""The CPU by its index: another device to the host, so it loads and offloads, but nothing really moves."""

STEPS, CFG = 7, 3.0
CALL = {"steps": STEPS, "scheduler": "simple", "cfg": CFG}
"""The fewest steps of which Forecast may skip one."""

REFUSED_BY_ALL = {"SlipstreamDeepCache", "SlipstreamFreeU"}
"""Nodes that are for Stable Diffusion's UNets alone."""

ROUNDING, BF16, EIGHT_BITS, SKIPPED, SAME = 1e-5, 0.02, 0.03, 0.5, 0.0
"""Bounds on the norm of the difference over the norm. The budget of Forecast is wide, for one step of so few to be
skipped on models of random weights."""


@dataclass(frozen=True)
class Seen:
    """What became of a node on a family.

    Attributes:
        state: ``serves``, ``idle`` or ``refuses``.
        words: what the node said, where it did not serve.
    """

    state: str
    words: str = ""


SEEN: dict[tuple[str, str], Seen] = {}
"""By node and family: all that has been run in this process."""


class Case:
    """A family, with what its cells share."""

    def __init__(self, name: str):
        self.name = name
        # With blocks that repeat, as published models have them.
        self.inner = deep(name).model
        self.prompts = [transformer_prompt(name, seed) for seed in (1, 2)]
        self.image = transformer_latent(name)
        self.format = type(self.inner.latent_format).__name__
        self._patchers = {
            device: ModelPatcher(self.inner, load_device=device, offload_device=hosted.CPU)
            for device in (hosted.CPU, GPU)
        }
        # The host's own run. It notes on the model whose it is.
        self.exact = self.sampled(self.model())

    def model(self, device: torch.device = hosted.CPU) -> ModelPatcher:
        return self._patchers[device].clone()

    def sampled(self, patcher: ModelPatcher, **values: Any) -> torch.Tensor:
        return sample(patcher, *self.prompts, image=self.image, **{**CALL, **values})

    def by_the_host(self, *legs: tuple[ModelPatcher, float, int, int]) -> torch.Tensor:
        """KSamplers (Advanced) in a row: of each the model, its cfg, the first step and the one after the last."""
        latent = {"samples": self.image}
        for patcher, cfg, first, last in legs:
            with torch.inference_mode():
                (latent,) = host_nodes.common_ksampler(
                    patcher, 1, STEPS, cfg, "euler", "simple", *self.prompts, latent,
                    disable_noise=first > 0, start_step=first, last_step=last, force_full_denoise=last >= STEPS,
                )  # fmt: skip
        return latent["samples"]

    @functools.cached_property
    def vae(self) -> Any:
        return vae_of(self.format)

    @property
    def sampled_latent(self) -> torch.Tensor:
        """As small a latent as can be of what a VAE decodes."""
        generator = torch.Generator().manual_seed(1)
        frames = [2] if self.vae.latent_dim == 3 else []
        return torch.randn(1, self.vae.latent_channels, *frames, 4, 4, generator=generator)

    @property
    def pixels(self) -> torch.Tensor:
        frames = 9 if self.vae.latent_dim == 3 else 1
        return torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(2))


@functools.cache
def vae_of(form: str) -> Any:
    """One for all families of a latent format, and for what is found out of it."""
    return small_models.VAES[form]()


@pytest.fixture(scope="module")
def cases():
    """The family that the tests are at, by its name: one at a time."""
    return {}


@pytest.fixture
def case(family, cases):
    if family not in cases:
        cases.clear()
        cases[family] = Case(family)
        # What compilers and torchao brought with the family before is not looked through each time either.
        gc.collect()
        gc.freeze()
    found = cases[family]
    before = hosted.fingerprint(found.inner)
    yield found
    assert hosted.fingerprint(found.inner) == before


@pytest.fixture(scope="module")
def found_out():
    """What was seen of a node, by its name and the family's or the latent format's."""
    return {}


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """models/vae_approx with a tiny VAE of each kind that the host knows one of."""
    folder = tmp_path_factory.mktemp("vae_approx")
    with torch.no_grad():
        for seed, (name, channels) in enumerate({"taesdxl": 4, "taesd3": 16, "taef1": 16, "taef2": 128}.items()):
            module = TAESD(latent_channels=channels)
            small_models.initialize(module, seed)
            for part in ("encoder", "decoder"):
                save_file(getattr(module, f"taesd_{part}").state_dict(), folder / f"{name}_{part}.safetensors")
        for name, form in {"taehv": latent_formats.HunyuanVideo, "lighttaew2_1": None}.items():
            module = TAEHV(latent_channels=16, latent_format=form)
            small_models.initialize(module, 5)
            # Which of the two look alike the host knows by the type of the weights.
            dtype = torch.float16 if form else torch.float32
            weights = {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")
    return folder


# The cells: each returns how far the node's result is from the host's, and the verdict's state.


def sampled_with(case: Case, name: str, **inputs: Any) -> float:
    return relative_error(case.sampled(run_node(name, case.model(), "1", **inputs)), case.exact)


def recipe(case: Case) -> float:
    """Its methods' own nodes, one after another, give the same."""
    model = run_node("SlipstreamRecipe", case.model(), "1", goal="balanced")
    by_hand = case.model()
    for entry in hosted.engine("plan.plan").plan_of(model).entries:
        by_hand = run_node(hosted._ids[entry.config.stem], by_hand, "2", **asdict(entry.config))
    return relative_error(case.sampled(model), case.sampled(by_hand))


def forecast(case: Case) -> float:
    return sampled_with(case, "SlipstreamForecast", error_budget=SKIPPED)


def cfg_cutoff(case: Case) -> float:
    """The host's two samplers in a row, the second one without guidance."""
    image = case.sampled(run_node("SlipstreamCFGCutoff", case.model(), "1", cutoff=0.5))
    half = STEPS // 2
    return relative_error(image, case.by_the_host((case.model(), CFG, 0, half), (case.model(), 1.0, half, 10000)))


def compile_model(case: Case) -> float:
    image = case.sampled(hosted.compile_model(case.model(), "1"), steps=1)
    return relative_error(image, case.sampled(case.model(), steps=1))


def sequential_offload(case: Case) -> float:
    return with_offloading(case, lambda patcher: run_node("SlipstreamSequentialOffload", patcher, "1", budget_mib=0))


def stage_offload(case: Case) -> float:
    def freed(patcher: ModelPatcher) -> ModelPatcher:
        case.sampled(patcher, steps=1)
        assert patcher.loaded_size()
        execute("SlipstreamStageOffload", "1", value=case.image, stages="diffusion models")
        assert not patcher.loaded_size()
        return patcher

    return with_offloading(case, freed)


@contextlib.contextmanager
def alone():
    """Nothing is loaded before and after: the host then takes patches out, and brings weights back."""
    comfy.model_management.unload_all_models()
    try:
        yield
    finally:
        comfy.model_management.unload_all_models()


def with_offloading(case: Case, put: Any) -> float:
    with alone():
        return relative_error(case.sampled(put(case.model(GPU)), steps=2), case.sampled(case.model(), steps=2))


def refiner_handoff(case: Case) -> float:
    """Another model of the family, which is the first one with a LoRA, goes on with what the first one leaves."""
    base, refiner, half = case.model(), hosted.add_diff(case.model()), STEPS // 2
    positive, negative = case.prompts
    with alone():
        samples = execute(
            "SlipstreamRefinerHandoff", "1", base=base, refiner=refiner, base_positive=positive, base_negative=negative,
            latent_image={"samples": case.image}, seed=1, steps=STEPS, cfg=CFG, refiner_cfg=CFG, sampler_name="euler",
            scheduler="simple",
            mode={"mode": "ensemble", "handoff": half / STEPS, "split": "steps", "exact_handoff": False},
        ).result[0]["samples"]  # fmt: skip
        expected = case.by_the_host((base, CFG, 0, half), (refiner, CFG, half, 10000))
    assert relative_error(samples, case.exact) > 1e-3
    return relative_error(samples, expected)


def benchmark(case: Case) -> float:
    positive, negative = case.prompts
    models = {"baseline": case.model(), "candidate": run_node("SlipstreamAttention", case.model(), "2")}
    prompts = {"positive": positive, "negative": negative, "latent_image": {"samples": case.image}}
    call = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    pictures, told = execute("SlipstreamBenchmark", "1", **models, **prompts, **call, runs=1, vae=case.vae).result
    assert "Attention Backend" in told
    assert pictures.isfinite().all()
    return 0.0


def tune(case: Case) -> float:
    """The model with the plan that it finds samples as that plan's own node has it. Times are those of the work."""
    table, engine = hosted.method("tune"), hosted.engine("benchmark")
    row = next(row for row in table.ROWS if row.stem == "cfg_cutoff")
    real = engine.Subject.run

    def run(self: Any, *args: Any) -> Any:
        measured = real(self, *args)
        return replace(measured, seconds=0.01 * measured.rows)

    def picture(self: Any, latent: torch.Tensor, title: str) -> tuple[torch.Tensor, float, tuple[None, None]]:
        # Decoding is the other cells' part, and takes longest.
        pixels = torch.nn.functional.adaptive_avg_pool1d(latent.flatten(1)[:, None], 16 * 16 * 3)
        return pixels.reshape(-1, 16, 16, 3).sigmoid(), 0.0, (None, None)

    positive, negative = case.prompts
    prompts = {"positive": positive, "negative": negative, "latent_image": {"samples": case.image}}
    call = {"seed": 1, "steps": 2, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as users:
        patch.setattr(folder_paths, "user_directory", users)
        patch.setattr(table, "ROWS", (replace(row, levels=({"cutoff": 0.5},)),))
        patch.setattr(engine.Subject, "run", run)
        patch.setattr(engine.Subject, "decode", picture)
        # Of a model of random weights anything holds that is finite.
        found = execute("SlipstreamTune", "1", model=case.model(), vae=case.vae, **prompts, **call, floor=-1.0, seeds=1)
    by_hand = run_node("SlipstreamCFGCutoff", case.model(), "2", cutoff=0.5)
    return relative_error(case.sampled(found.result[0], steps=2), case.sampled(by_hand, steps=2))


def save_plan(case: Case) -> float:
    """It returns what came."""
    model = run_node("SlipstreamPrecision", case.model(), "2", compute_dtype="bf16")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as users:
        patch.setattr(folder_paths, "user_directory", users)
        saved = run_node("SlipstreamSavePlan", model, "1", save_as="mine")
        assert os.listdir(os.path.join(users, "slipstream", "plans")) == ["mine.json"]
    return relative_error(case.sampled(saved, steps=1), case.sampled(model, steps=1))


def load_plan(case: Case) -> float:
    """A plan with Precision in it, as its own node has it."""
    plan = run_node("SlipstreamPrecision", case.model(), "2", compute_dtype="bf16")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as users:
        patch.setattr(folder_paths, "user_directory", users)
        run_node("SlipstreamSavePlan", plan, "3", save_as="mine")
        loaded = run_node("SlipstreamLoadPlan", case.model(), "1", plan="mine")
    return relative_error(case.sampled(loaded, steps=1), case.sampled(plan, steps=1))


def report(case: Case) -> float:
    """It samples nothing, and the next run is as the one before."""
    model = run_node("SlipstreamPrecision", case.model(), "2", compute_dtype="bf16")
    image = case.sampled(model, steps=1)
    (text,) = execute("SlipstreamReport", "1", model=model, after={"samples": image}).result
    assert ": 1 steps in " in text
    assert "Precision: computed in bf16" in text
    return relative_error(case.sampled(model, steps=1), image)


def decoded_with(case: Case, vae: Any) -> float:
    with torch.inference_mode():
        return relative_error(vae.decode(case.sampled_latent), case.vae.decode(case.sampled_latent))


def compiled_vae(case: Case) -> float:
    return decoded_with(case, compile_vae(case.vae, "1", backend="eager"))


def fp16_fix_vae(case: Case) -> float:
    return decoded_with(case, execute("SlipstreamFP16FixVAE", "1", vae=case.vae, precision="fp16").result[0])


def tiny_vae(case: Case) -> float:
    """As the host's own node loads the same file."""
    vae = execute("SlipstreamTinyVAE", "1", model=case.model(), name="auto").result[0]
    stem = case.inner.latent_format.taesd_decoder_name
    name = stem.removesuffix("_decoder") if stem.endswith("_decoder") else f"{stem}.safetensors"
    with torch.inference_mode():
        (expected,) = host_nodes.VAELoader().load_vae(name)
        return relative_error(vae.decode(case.sampled_latent), expected.decode(case.sampled_latent).to(torch.float32))


TILES = {"tile_size": 64, "statistics": "exact", "batch_slicing": True}


def vae_decode_tiled(case: Case) -> float:
    latent = {"samples": case.sampled_latent}
    (images,) = execute("SlipstreamVAEDecodeTiled", "1", samples=latent, vae=case.vae, **TILES).result
    with torch.inference_mode():
        (expected,) = host_nodes.VAEDecode().decode(case.vae, latent)
        if case.vae.latent_dim == 3:
            (expected,) = host_nodes.VAEDecodeTiled().decode(case.vae, latent, TILES["tile_size"])
    return relative_error(images, expected)


def vae_encode_tiled(case: Case) -> float:
    (latent,) = execute("SlipstreamVAEEncodeTiled", "1", pixels=case.pixels, vae=case.vae, **TILES).result
    with torch.inference_mode():
        (expected,) = host_nodes.VAEEncode().encode(case.vae, case.pixels)
        if case.vae.latent_dim == 3:
            (expected,) = host_nodes.VAEEncodeTiled().encode(case.vae, case.pixels, TILES["tile_size"], 64)
    return relative_error(latent["samples"], expected["samples"])


CELLS = {
    "SlipstreamRecipe": (recipe, SAME, "goal *balanced*: bit for bit what its methods' own nodes give"),
    "SlipstreamForecast": (forecast, SKIPPED, "one of seven evaluations skipped, error within its budget"),
    "SlipstreamDeepCache": (functools.partial(sampled_with, name="SlipstreamDeepCache"), SKIPPED, ""),
    "SlipstreamCFGCutoff": (cfg_cutoff, ROUNDING, "as two KSamplers in a row, the second one at cfg 1"),
    "SlipstreamFreeU": (functools.partial(sampled_with, name="SlipstreamFreeU"), SKIPPED, ""),
    "SlipstreamQuantize": (
        functools.partial(sampled_with, name="SlipstreamQuantize", scheme="int8 dynamic", min_features=0),
        EIGHT_BITS,
        "*int8 dynamic*",
    ),
    "SlipstreamCompileModel": (compile_model, ROUNDING, "graphs as dynamo makes them"),
    "SlipstreamPrecision": (
        functools.partial(sampled_with, name="SlipstreamPrecision", compute_dtype="bf16"),
        BF16,
        "bf16 in place of fp32",
    ),
    "SlipstreamAttention": (functools.partial(sampled_with, name="SlipstreamAttention"), ROUNDING, "*auto*"),
    "SlipstreamSequentialOffload": (sequential_offload, SAME, "no weights kept on the device"),
    "SlipstreamStageOffload": (stage_offload, SAME, "*diffusion models* freed, and sampled with again"),
    "SlipstreamCPU": (functools.partial(sampled_with, name="SlipstreamCPU"), BF16, "bf16 and PyTorch's attention"),
    "SlipstreamRefinerHandoff": (
        refiner_handoff,
        ROUNDING,
        "as two KSampler (Advanced) in a row, with the model and itself with a LoRA",
    ),
    "SlipstreamBenchmark": (benchmark, SAME, "a report of two models"),
    "SlipstreamTune": (tune, SAME, "a search with one dial: bit for bit what its method's own node gives"),
    "SlipstreamSavePlan": (save_plan, SAME, "a model with Precision, passed on"),
    "SlipstreamLoadPlan": (load_plan, SAME, "a plan with Precision, as its own node has it"),
    "SlipstreamReport": (report, SAME, "a run with Precision told"),
    "SlipstreamCompileVAE": (compiled_vae, ROUNDING, "graphs as dynamo makes them"),
    "SlipstreamTinyVAE": (tiny_vae, ROUNDING, "*auto*: as ComfyUI's Load VAE with that file"),
    "SlipstreamFP16FixVAE": (fp16_fix_vae, BF16, "fp16 in place of fp32"),
    "SlipstreamVAEDecodeTiled": (vae_decode_tiled, 1e-4, "*exact*: as decoding whole"),
    "SlipstreamVAEEncodeTiled": (vae_encode_tiled, 1e-4, "*exact*: as encoding whole"),
}
"""By node: what is run, the bound, and what that is in words."""

OWN_MODEL = {"SlipstreamDemoModel"}
"""Nodes that bring a model, and take none."""

OF_THE_VAE = [name for name in CELLS if "VAE" in name]
"""Nodes of which one cell stands for all families that share a latent format."""


def test_each_node_has_a_row():
    assert CELLS.keys() | OWN_MODEL == NODES.keys()


@pytest.mark.parametrize(("family", "node"), list(itertools.product(FAMILIES, CELLS)))
def test_a_cell(family, node, case, found_out, last_lines, tiny_files, monkeypatch):
    endings = folder_paths.folder_names_and_paths["vae_approx"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tiny_files)], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    # What a processor without bf16 does with the others' default is theirs to test.
    monkeypatch.setattr(hosted.method("precision"), "has_bf16", lambda: True)
    monkeypatch.setattr(hosted.engine("recipe"), "has_bf16", lambda: True)
    key = (node, case.format if node in OF_THE_VAE else family)
    if key not in found_out:
        found_out[key] = seen(case, node, last_lines)
    SEEN[node, family] = found_out[key]
    assert found_out[key].state != "refuses" or node in REFUSED_BY_ALL or node in OF_THE_VAE, found_out[key].words
    assert found_out[key].state == "refuses" or node not in REFUSED_BY_ALL


def seen(case: Case, node: str, last_lines: Any) -> Seen:
    """Run a cell."""
    run, bound, _ = CELLS[node]
    try:
        error = run(case)
    except (ValueError, RuntimeError) as refusal:
        text = str(refusal)
        assert text.startswith(f"{title_of(node)}: "), text
        assert "\n" not in text
        return Seen("refuses", text)
    assert error <= bound
    ((state, text),) = [line for line in last_lines("1") if line[0] == "active"][:1] or last_lines("1")[:1]
    assert state in ("active", "inert")
    return Seen("serves") if state == "active" else Seen("idle", text)


# The page.


MODELS = {
    "AuraFlow": "",
    "Chroma": "",
    "Cosmos": "Cosmos 1",
    "Cosmos Predict2": "",
    "Flux": "Flux.1 dev, schnell, Krea, Kontext, Fill",
    "Flux 2": "dev, klein",
    "HiDream": "HiDream I1",
    "HunyuanDiT": "",
    "HunyuanVideo": "",
    "Kandinsky 5": "Kandinsky 5 Image",
    "LTXV": "",
    "Lumina 2": "also NetaYume Lumina",
    "Mochi": "",
    "OmniGen 2": "",
    "PixArt": "PixArt Sigma",
    "Qwen-Image": "also Qwen-Image-Edit",
    "SD3": "SD 3, SD 3.5",
    "Wan 2.1": "text to video; Wan 2.2 14B too",
    "Wan 2.1 I2V": "image to video",
    "Z-Image": "also Turbo",
}
"""What is published of a family, where that has other names."""

SIGNS = {"serves": "✓", "idle": "○", "refuses": "✗"}


def title_of(node: str) -> str:
    return NODES[node].define_schema().display_name.removesuffix(" (Slipstream)")


def row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    told = {node: title_of(node) for node in CELLS}
    matrix = [row(["", *told.values()]), row(["---", *[":-:"] * len(told)])]
    for family in FAMILIES:
        name = f"**{family}**" + (f" ({MODELS[family]})" if MODELS[family] else "")
        matrix.append(row([name, *(SIGNS[SEEN[node, family].state] for node in CELLS)]))
    held = [row(["node", "what is run", "error at most"]), row(["---", "---", "---"])]
    for node, (_, bound, what) in CELLS.items():
        if node not in REFUSED_BY_ALL:
            held.append(row([told[node], what, "the same bits" if bound == SAME else f"{bound:g}"]))
    others = []
    for node, title in told.items():
        for state, what in (("refuses", "is refused"), ("idle", "leaves it to ComfyUI")):
            families = [family for family in FAMILIES if SEEN[node, family].state == state]
            if families:
                where = "all of them" if len(families) == len(FAMILIES) else ", ".join(families)
                first = SEEN[node, families[0]].words.removeprefix(f"{title}: ")
                others.append(f"- **{title}** {what} on {where}. It says, on {families[0]}: *{first}*")
    brought = " and ".join(title_of(node) for node in OWN_MODEL)
    return PAGE_TEXT.format(
        matrix="\n".join(matrix), held="\n".join(held), others="\n".join(others), brought=brought, steps=STEPS, cfg=CFG
    )


PAGE_TEXT = """\
# Works with

Which nodes serve which of ComfyUI's diffusion transformers. `tests/host/test_works_with.py` writes this page from what
it saw, and fails where that is no longer so. Each cell is a node on a small model of ComfyUI's own class for the
family, with random weights, on a CPU: sampled (euler, at most {steps} steps, cfg {cfg:g}; Benchmark at cfg 1) or
decoded, and compared with what ComfyUI gives without the node; and nothing of the node stays on the model. Published
weights and GPUs are no part of it.

✓ serves, within the bound below. ○ leaves it to ComfyUI, and says so. ✗ is refused, and says what serves instead.

{matrix}

VAE nodes: with the VAE of the family's latents, video VAEs among them. Attention Backend: without `fuse_qkv`, which is
for Stable Diffusion's UNets. {brought} brings a model of its own. All of them serve Stable Diffusion's UNets. ComfyUI's
MultiGPU, ComfyUI-Distributed and raylight: [Several GPUs and machines](SEVERAL-GPUS.md).

## What is held

{held}

Error: the norm of the difference over the norm of what ComfyUI gives, after the last step. Approximations are as far
off as random weights make them; what they cost in pictures is in the README.

## Where a node does not serve

{others}
"""


def test_the_page_is_what_was_seen():
    if len(SEEN) < len(FAMILIES) * len(CELLS):
        pytest.skip("not every cell was run")
    if os.environ.get("SLIPSTREAM_WRITE"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "SLIPSTREAM_WRITE=1 writes it anew: look at it"
