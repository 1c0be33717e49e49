"""What other nodes patch into a model that computes in another dtype: each patch point of the host, its own nodes that
use them, and every family of transformers."""

from __future__ import annotations

import hosted
import pytest
import small_models
import torch
from comfy.model_patcher import ModelPatcher
from hosted import compile_model, controlnet, prompt, relative_error, run_node, with_control
from small_models import FAMILIES
from torch import nn

WAYS = {
    "model": lambda patcher: run_node("SlipstreamPrecision", patcher, "1", compute_dtype="bf16", scope="model"),
    "transformers": lambda patcher: run_node(
        "SlipstreamPrecision", patcher, "1", compute_dtype="bf16", scope="transformers"
    ),
    "CPU": lambda patcher: run_node("SlipstreamCPU", patcher, "1", winograd="off"),
    "Recipe": lambda patcher: run_node("SlipstreamRecipe", patcher, "1"),
}
"""Who computes in bf16. The last two suggest it by themselves where the processor has it."""

BY_SUGGESTION = ("CPU", "Recipe")


def ways(cases, always=(), among=tuple(WAYS), few=BY_SUGGESTION):
    """Cases in each way. What nodes suggest is what Precision does: a few of those, and all with --long."""
    marks = lambda case, way: [pytest.mark.long] if way in few and case not in always else []  # noqa: E731
    return [pytest.param(case, way, marks=marks(case, way)) for case in cases for way in among]


BOUND = 1e-2
"""Relative error of a UNet's latent after two steps: bf16's rounding."""
APART = 3e-3
"""How much a patch must do at least, to be seen."""


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """As on a processor that has it, and without what else Recipe would choose: that is approximate."""
    monkeypatch.setattr(hosted.method("precision"), "has_bf16", lambda: True)
    monkeypatch.setattr("slipstream_pack.nodes.engine.recipe.has_bf16", lambda: True)
    rows = hosted.method("recipe").ROWS
    wanted = [row for row in rows if row.stem in ("precision", "attention_backend")]
    monkeypatch.setattr(hosted.method("recipe"), "ROWS", tuple(wanted))


def sample(patcher, *args, steps=2, **kwargs):
    return hosted.sample(patcher, *args, steps=steps, **kwargs)


class Mixing(nn.Module):
    """A patch's own weights, as packs have them: plain, and in fp32. Notes the dtypes that it is given."""

    def __init__(self, strength=0.5):
        super().__init__()
        self.strength = strength
        self.layers = {}
        self.dtypes = set()

    def forward(self, x, dim=-1):
        self.dtypes.add(x.dtype)
        width = x.shape[dim]
        if width not in self.layers:
            self.layers[width] = nn.Linear(width, width)
            small_models.initialize(self.layers[width], width)
        return x + self.strength * self.layers[width](x.movedim(dim, -1)).movedim(-1, dim)


# The UNet's patch points


def on_features(mix):
    return lambda h, options: mix(h, 1)


def in_place(mix):
    def patch(h, options):
        h.copy_(mix(h, 1))
        return h

    return patch


def on_both(mix):
    return lambda h, skip, options: (mix(h, 1), mix(skip, 1))


def after_middle(mix):
    def patch(args):
        assert args["timesteps"].dtype == torch.float32
        return {"h": mix(args["h"], 1) + args["emb"][..., None, None].mean(1, keepdim=True)}

    return patch


def on_qkv(mix):
    return lambda q, k, v, extra: (mix(q), mix(k), v)


def on_tokens(mix):
    return lambda n, extra: mix(n)


def on_tokens_in_place(mix):
    def patch(n, extra):
        n[:, 1:] = mix(n)[:, 1:]
        return n

    return patch


def handled(mix):
    from comfy.ldm.modules.attention import SpatialTransformer

    def handler(layer, x, emb, context, options, *more):
        mix(emb)
        return mix(layer(mix(x, 1), context, options), 1)

    return SpatialTransformer, handler


POINTS = {
    "emb_patch": lambda mix: lambda emb, channels, options: 8 * mix(emb),
    "input_block_patch": on_features,
    "input_block_patch, in place": in_place,
    "input_block_patch_after_skip": on_features,
    "middle_block_after_patch": after_middle,
    "output_block_patch": on_both,
    "forward_timestep_embed_patch": handled,
    "attn1_patch": on_qkv,
    "attn2_patch": on_qkv,
    "attn1_output_patch": on_tokens,
    "attn1_output_patch, in place": on_tokens_in_place,
    "attn2_output_patch": on_tokens,
    "middle_patch": on_tokens,
}


@pytest.mark.parametrize(("point", "way"), ways(POINTS, ["attn2_patch"]))
def test_a_patch_gets_what_the_host_would_give_it(point, way, model):
    mix, patched = Mixing(), model.clone()
    patched.set_model_patch(POINTS[point](mix), point.split(",")[0])
    exact = sample(patched)
    assert relative_error(exact, sample(model)) > APART
    mix.dtypes.clear()
    error = relative_error(sample(WAYS[way](patched)), exact)
    print(f"{point}, {way}: {error:.1e}")
    assert mix.dtypes == {torch.float32}
    assert 0 < error < BOUND


def given_back(*args, **kwargs):
    """What a patch is given, unchanged."""
    if isinstance(args[0], dict):
        return dict(args[0])
    values = tuple(value for value in args if isinstance(value, torch.Tensor))
    return values if len(values) > 1 else values[0]


def looking(layer, x, emb, context, options, *more):
    return layer(x, context, options)


@pytest.mark.parametrize("scope", ["model", "transformers"])
def test_what_is_given_back_as_it_was_changes_no_bit(scope, model):
    from comfy.ldm.modules.attention import SpatialTransformer

    patched, expected = model.clone(), sample(WAYS[scope](model))
    for name in {point.split(",")[0] for point in POINTS} - {"forward_timestep_embed_patch"}:
        patched.set_model_patch(given_back, name)
    patched.set_model_patch((SpatialTransformer, looking), "forward_timestep_embed_patch")
    assert torch.equal(sample(WAYS[scope](patched)), expected)


@pytest.mark.parametrize(("kind", "way"), ways(["attn1", "attn2"]))
def test_a_replacement_gets_what_the_host_would_give_it(kind, way, model):
    mix, patched = Mixing(), model.clone()
    patched.set_model_patch_replace(lambda q, k, v, extra: mix(q) + v.mean(1, keepdim=True), kind, "input", 1)
    patched.set_model_patch_replace(lambda q, k, v, extra: mix(q), kind, "output", 3)
    exact = sample(patched)
    assert relative_error(exact, sample(model)) > BOUND
    mix.dtypes.clear()
    assert relative_error(sample(WAYS[way](patched)), exact) < BOUND
    assert mix.dtypes == {torch.float32}


def test_narrower_than_what_is_computed_in(model):
    """A host that computes in bf16, and fp32 from us: what the patch writes in place and what it does not."""
    in_bf16, seen = model.clone(), []
    in_bf16.set_model_compute_dtype(torch.bfloat16)
    written = in_bf16.clone()

    def patch(h, options):
        seen.append(h.dtype)
        h[:, :2] *= 0.5
        return h

    exact_model, exact = model.clone(), None
    exact_model.set_model_input_block_patch(patch)
    exact = sample(exact_model)
    written.set_model_input_block_patch(patch)
    seen.clear()
    fast = run_node("SlipstreamPrecision", written, "1", compute_dtype="fp32")
    assert relative_error(sample(fast), exact) < BOUND / 2
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("point", "scope"),
    [
        ("attn1_patch", "blocks"),
        ("output_block_patch", "model"),
        *(
            pytest.param(point, scope, marks=pytest.mark.long)
            for point, scope in [
                *(("attn1_patch", "model"), ("middle_patch", "blocks")),
                *(("attn2_output_patch", "blocks"), ("output_block_patch", "blocks")),
            ]
        ),
    ],
)
def test_compiled_blocks_have_the_bits_of_running_without_graphs(point, scope, model):
    patched = model.clone()
    patched.set_model_patch(POINTS[point](Mixing()), point)
    fast = WAYS["transformers"](patched)
    assert torch.equal(sample(compile_model(fast, "2", scope=scope)), sample(fast))


# What the host's own nodes bring


def gligen(patcher, seed=6):
    """The host's GLIGEN of the published layout for a small UNet, its gates open."""
    import comfy.gligen
    from comfy.ldm.modules.attention import BasicTransformerBlock

    blocks = [part for part in patcher.model.diffusion_model.modules() if isinstance(part, BasicTransformerBlock)]
    made = []
    for block in blocks:
        width = block.norm1.weight.shape[0]
        made.append(comfy.gligen.GatedSelfAttentionDense(width, 64, 2, width // 2))
    net = comfy.gligen.Gligen(made, comfy.gligen.PositionNet(64, 64), 64)
    hosted.initialize(net, seed)
    with torch.no_grad():
        for one in made:
            one.alpha_attn.fill_(1.0)
            one.alpha_dense.fill_(1.0)
    return net


def with_gligen(patcher):
    loaded = ModelPatcher(gligen(patcher), load_device=hosted.CPU, offload_device=hosted.CPU)
    box = (torch.randn(1, 64, generator=torch.Generator().manual_seed(3)), 8, 8, 2, 2)
    return patcher, prompt(patcher, 10, gligen=("position", loaded, [box]))


def with_hypernetwork(patcher, folder):
    from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch

    widths = {
        64,
        *(part.to_k.weight.shape[1] for part in patcher.model.diffusion_model.modules() if hasattr(part, "to_k")),
    }
    generator = torch.Generator().manual_seed(4)
    layer = lambda width: {  # noqa: E731
        "linear.weight": torch.randn(width, width, generator=generator) / width**0.5,
        "linear.bias": torch.zeros(width),
    }
    torch.save({str(width): [layer(width), layer(width)] for width in widths}, folder / "hyper.pt")
    loaded = torch.load(folder / "hyper.pt", weights_only=True)
    torch.save({int(width): layers for width, layers in loaded.items()}, folder / "hyper.pt")
    patch, clone = load_hypernetwork_patch(str(folder / "hyper.pt"), 0.7), patcher.clone()
    clone.set_model_attn1_patch(patch)
    clone.set_model_attn2_patch(patch)
    return clone, prompt(patcher, 10)


def with_t2i_adapter(patcher):
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter

    # It is for as many levels.
    patcher = hosted.model("SD15")
    channels = [patcher.model.diffusion_model.model_channels * factor for factor in (1, 2, 4, 4)]
    adapter = Adapter(channels=channels, nums_rb=1, cin=64 * 3, ksize=1, sk=True, use_conv=False, xl=False)
    hosted.initialize(adapter, 5)
    with torch.no_grad():
        adapter.conv_in.weight.mul_(1e3)
    control = comfy.controlnet.T2IAdapter(adapter, 3, 8, "nearest-exact", hosted.CPU)
    return patcher, with_control(prompt(patcher, 10), control, both=True)


def named(file, node, *settings):
    """One of the host's nodes."""

    def wire(patcher):
        import importlib

        made = getattr(importlib.import_module(f"comfy_extras.{file}"), node).execute(patcher, *settings)
        return (made if isinstance(made, tuple) else made.result)[0], prompt(patcher, 10)

    return wire


BROUGHT = {
    "GLIGEN": with_gligen,
    "hypernetwork": with_hypernetwork,
    "ControlNet": lambda patcher: (patcher, with_control(prompt(patcher, 10), controlnet(patcher), both=True)),
    "T2I adapter": with_t2i_adapter,
    "FreeU": named("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "HyperTile": named("nodes_hypertile", "HyperTile", 64, 2, 2, True),
    "ToMe": named("nodes_tomesd", "TomePatchModel", 0.5),
    "NAG": named("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5),
    "PAG": named("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "SAG": named("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
    "Deep Shrink": named(
        "nodes_model_downscale", "PatchModelAddDownscale", 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ),
    "attention multiplied": named("nodes_attention_multiply", "UNetCrossAttentionMultiply", 1.2, 0.9, 1.1, 1.2),
}


@pytest.mark.parametrize(
    ("brought", "way"), ways(BROUGHT, ["GLIGEN", "hypernetwork"], few=(*BY_SUGGESTION, "transformers"))
)
def test_what_the_host_s_nodes_bring(brought, way, model, tmp_path):
    arguments = (tmp_path,) if brought == "hypernetwork" else ()
    patched, positive = BROUGHT[brought](model, *arguments)
    exact = sample(patched, positive)
    assert relative_error(exact, sample(patched.clone() if brought == "T2I adapter" else model)) > 1e-3
    error = relative_error(sample(WAYS[way](patched), positive), exact)
    own = relative_error(sample(WAYS[way](model)), sample(model))
    print(f"{brought}, {way}: {error:.1e}, without it {own:.1e}")
    # Merging tokens is a choice by likeness, which rounding may tip.
    assert error < (0.1 if brought == "ToMe" else 3 * BOUND)


# Transformers' patch points


def on_dict(mix, key="img"):
    def patch(args):
        return {**args, key: mix(args[key])}

    return patch


def on_dict_in_place(mix):
    """As the host's Z-Image ControlNet: what it writes is not among what it returns."""

    def patch(args):
        img = args.pop("img")
        img[:, 1:] = mix(img)[:, 1:]
        args.pop("txt", None)
        return args

    return patch


def on_heads(mix):
    return lambda q, k, v, pe=None, attn_mask=None, extra_options=None: {"q": mix(q), "k": mix(k), "v": v, "pe": pe}


TRANSFORMERS_POINTS = {
    ("Flux", "post_input"): on_dict,
    ("Flux", "attn1_patch"): on_heads,
    ("Flux", "attn1_output_patch"): on_tokens,
    ("Qwen-Image", "post_input"): on_dict,
    ("Qwen-Image", "attn1_patch"): on_heads,
    ("Qwen-Image", "double_block"): on_dict,
    ("Lumina 2", "double_block"): on_dict,
    ("Lumina 2", "noise_refiner"): on_dict,
    ("Z-Image", "double_block"): on_dict_in_place,
    ("Wan 2.1", "double_block"): on_dict,
    ("Wan 2.1", "attn1_patch"): lambda mix: lambda args: mix(args["x"]),
    ("Wan 2.1", "attn2_patch"): lambda mix: lambda args: mix(args["x"]),
    ("Cosmos Predict2", "post_input"): on_dict,
    ("Cosmos Predict2", "attn1_patch"): on_heads,
    ("Cosmos Predict2", "attn2_patch"): on_heads,
    ("Cosmos Predict2", "mlp_patch"): lambda mix: on_dict(mix, "x"),
}

OF_TRANSFORMERS = [way for way in WAYS if way != "transformers"]


def sample_transformer(name, patcher):
    positive, negative = (small_models.transformer_prompt(name, seed) for seed in (10, 11))
    return sample(patcher, positive, negative, image=small_models.transformer_latent(name))


@pytest.mark.parametrize(("case", "way"), ways(TRANSFORMERS_POINTS, among=OF_TRANSFORMERS))
def test_a_transformer_s_patch_gets_what_the_host_would_give_it(case, way):
    family, point = case
    model, mix = small_models.transformer(family), Mixing()
    patched = model.clone()
    patched.set_model_patch(TRANSFORMERS_POINTS[family, point](mix), point)
    exact = sample_transformer(family, patched)
    assert relative_error(exact, sample_transformer(family, model)) > BOUND
    mix.dtypes.clear()
    error = relative_error(sample_transformer(family, WAYS[way](patched)), exact)
    print(f"{family} {point}, {way}: {error:.1e}")
    assert mix.dtypes == {torch.float32}
    assert error < 3 * BOUND


BLOCKS = {
    "AuraFlow": ("double_block", "single_block"),
    "Chroma": ("double_block", "single_block"),
    "Flux": ("double_block", "single_block"),
    "HunyuanDiT": ("double_block",),
    "HunyuanVideo": ("double_block", "single_block"),
    "LTXV": ("double_block",),
    "Mochi": ("double_block",),
    "Qwen-Image": ("double_block",),
    "SD3": ("double_block",),
    "Wan 2.1": ("double_block",),
}
"""Families whose blocks can be replaced."""


@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_s_replacement_may_run_the_block(family):
    """Before, behind and around it in its own dtype; what it only passes on changes no bit."""
    model, mix = small_models.transformer(family), Mixing(0.2)
    changed, passed = model.clone(), model.clone()

    def replace(args, more):
        out = more["original_block"]({**args, "img": mix(args["img"])})
        return {**out, "img": mix(out["img"])}

    for kind in BLOCKS[family]:
        place = {"AuraFlow": 1}.get(family, 0) if kind == "single_block" else 0
        changed.set_model_patch_replace(replace, "dit", kind, place)
        passed.set_model_patch_replace(lambda args, more: more["original_block"](args), "dit", kind, place)
    exact = sample_transformer(family, changed)
    assert relative_error(exact, sample_transformer(family, model)) > BOUND
    mix.dtypes.clear()
    error = relative_error(sample_transformer(family, WAYS["model"](changed)), exact)
    print(f"{family}: {error:.1e}")
    assert mix.dtypes == {torch.float32}
    assert error < 4 * BOUND
    assert torch.equal(
        sample_transformer(family, WAYS["model"](passed)), sample_transformer(family, WAYS["model"](model))
    )


# Families


@pytest.mark.parametrize(("family", "way"), ways(FAMILIES, ["Wan 2.1"], OF_TRANSFORMERS))
def test_every_family_of_transformers_computes_in_bf16(family, way):
    """As close to fp32 as the host's own bf16, whatever the model casts by itself."""
    model = small_models.transformer(family)
    exact = sample_transformer(family, model)
    in_bf16 = model.clone()
    in_bf16.set_model_compute_dtype(torch.bfloat16)
    own = relative_error(sample_transformer(family, in_bf16), exact)
    error = relative_error(sample_transformer(family, WAYS[way](model)), exact)
    print(f"{family}, {way}: {error:.1e}, the host's own {own:.1e}")
    assert 0 < error < 1.5 * own < 5e-2
    assert torch.equal(sample_transformer(family, model), exact)
