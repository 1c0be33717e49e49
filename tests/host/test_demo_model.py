"""The models that come with the pack: as the host's MODEL, CLIP and VAE, with the host's own nodes and ours."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

import comfy.model_base
import comfy.sd
import comfy.supported_models
import comfy.utils
import hosted
import pytest
import torch
from hosted import engine
from loading import ROOT
from slipstream_pack.nodes.measuring import fidelity

sys.path.insert(0, str(ROOT / "training"))

from judge import Judge, agreement
from pictures import Demo, held_out
from scenes import draw_on
from train import JUDGE

demo_model = engine("demo_model")
long = partial(pytest.param, marks=pytest.mark.long)

HOUSE = "winter night, clear sky, moon, mountains, lake, pines, red house"


@pytest.fixture(scope="module")
def demo():
    return Demo()


@pytest.fixture(scope="module")
def transformer():
    return Demo("transformer")


def exactly(demo):
    """Eight captions that training never saw, their choices, and 20 exact steps."""
    prompts, choices = held_out(8)
    latents = demo.sample(prompts, range(8), steps=20)
    return prompts, choices, latents, demo.decode(latents)


@pytest.fixture(scope="module")
def exact(demo):
    return exactly(demo)


@pytest.fixture(scope="module")
def exact_transformer(transformer):
    return exactly(transformer)


def encoded(demo, text):
    return demo.clip.encode_from_tokens_scheduled(demo.clip.tokenize(text))[0][0]


def test_it_is_small():
    assert demo_model.FILE.stat().st_size < 16e6
    assert demo_model.FILE.stat().st_size + demo_model.TRANSFORMER_FILE.stat().st_size < 40e6
    parts = {prefix: demo_model.Demo.read().part(prefix) for prefix in (demo_model.NETWORK, demo_model.VAE)}
    size = {prefix: sum(value.nbytes for value in part.values()) for prefix, part in parts.items()}
    assert size[demo_model.NETWORK] < 9e6
    assert size[demo_model.VAE] < 5.1e6


def test_the_engine_and_other_packs_see_an_sd15_model(demo):
    described = engine("plan.models").describe(demo.model, demo.model.model_options)
    assert described.family == "SD1"
    assert described.depth == 8
    assert isinstance(demo.model.model.model_config, comfy.supported_models.SD15)
    assert demo.vae.latent_channels == 4


def test_the_engine_and_other_packs_see_a_transformer(transformer, demo):
    described = engine("plan.models").describe(transformer.model, transformer.model.model_options)
    assert described.family is None
    assert isinstance(transformer.model.model.model_config, comfy.supported_models.AuraFlow)
    assert transformer.model.model.model_type is comfy.model_base.ModelType.FLOW
    # The same words and the same VAE: a workflow changes the model alone.
    assert torch.equal(transformer.clip.encode(HOUSE), demo.clip.encode(HOUSE))
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(transformer.vae.decode(latent), demo.vae.decode(latent))


@pytest.fixture(scope="module")
def judge():
    return Judge.load(JUDGE)


def test_the_judge_knows_what_the_generator_drew(judge):
    scenes, pictures = draw_on(hosted.CPU, range(7_000_000, 7_000_032), held_out=True)
    assert agreement(judge.read(pictures), scenes.choices)[1] >= 30 / 32


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["UNet", "transformer"])
def test_pictures_show_what_their_captions_say_and_less_so_in_two_steps(architecture, judge, request):
    is_unet = architecture == "UNet"
    demo = request.getfixturevalue("demo" if is_unet else "transformer")
    prompts, choices, _, images = request.getfixturevalue("exact" if is_unet else "exact_transformer")
    seen = judge.read(images.movedim(-1, 1))
    assert agreement(seen, choices)[0] > 0.9
    # By chance it is about 0.4.
    assert agreement(seen, choices.roll(1, 0))[0] < 0.6
    worse = judge.read(demo.decode(demo.sample(prompts, range(8), steps=2)).movedim(-1, 1))
    assert agreement(worse, choices)[0] < agreement(seen, choices)[0]


def test_the_vae_gives_back_what_it_was_given(exact, demo):
    images = exact[3][:2]
    with torch.inference_mode():
        again = demo.vae.decode(demo.vae.encode(images))
    assert fidelity.compare(images, again, images, again).psnr_db > 25


@pytest.mark.parametrize(
    ("node", "values", "ssim"),
    [
        ("SlipstreamDeepCache", {"cache_interval": 2, "cache_branch_id": 0}, 0.95),
        long("SlipstreamDeepCache", {"cache_interval": 3, "cache_branch_id": 0}, 0.88),
        long("SlipstreamCFGCutoff", {"cutoff": 0.75, "unit": "steps"}, 0.985),
        long("SlipstreamCFGCutoff", {"cutoff": 0.5, "unit": "steps"}, 0.95),
        long("SlipstreamQuantize", {"scheme": "int8 dynamic", "min_features": 0}, 0.998),
        long("SlipstreamQuantize", {"scheme": "fp8 weight-only", "min_features": 0}, 0.99),
    ],
)
def test_what_approximations_cost(demo, exact, node, values, ssim):
    """The bounds are the means of benchmarks/results/{approximations,quantize} less their scatter over eight
    pictures."""
    prompts, _, latents, images = exact
    found = demo.sample(prompts, range(8), model=hosted.run_node(node, demo.model, **values), steps=20)
    compared = fidelity.compare(latents, found, images, demo.decode(found))
    assert not compared.is_identical
    assert compared.ssim > ssim


@pytest.mark.long
@pytest.mark.parametrize(
    ("node", "values", "ssim"),
    [
        ("SlipstreamForecast", {}, 0.99),
        ("SlipstreamPrecision", {"compute_dtype": "bf16"}, 0.99),
        ("SlipstreamCFGCutoff", {"cutoff": 0.75, "unit": "steps"}, 0.98),
        ("SlipstreamQuantize", {"scheme": "int8 dynamic", "min_features": 0}, 0.99),
    ],
)
def test_what_approximations_cost_on_the_transformer(transformer, exact_transformer, node, values, ssim):
    test_what_approximations_cost(transformer, exact_transformer, node, values, ssim)


def test_a_seed_is_a_picture(demo):
    one = demo.sample([HOUSE], [1], steps=6)
    assert torch.equal(demo.sample([HOUSE], [1], steps=6), one)
    other = demo.sample([HOUSE], [2], steps=6)
    assert fidelity.compare(one, other, demo.decode(one), demo.decode(other)).ssim < 0.95


@pytest.mark.parametrize(
    ("text", "understood", "ignored"),
    [
        ("a red cottage by the pond in the evening", "red cottage pond evening", ""),
        ("no dragons, dragons and castles", "", "no dragons castles"),
        ("blue lake, white clouds, a red house", "lake clouds red house", "blue white"),
        ("pine trees and a pine forest", "pine", ""),
        ("snowy winter, winter", "snowy", ""),
        ("trees, pines", "trees pines", ""),
        ("", "", ""),
    ],
)
def test_what_is_understood(text, understood, ignored):
    said = text.replace(",", "").split()
    known, unknown = demo_model.understand(said, demo_model.Demo.read().words)
    assert [said[position] for position in known.values()] == understood.split()
    assert unknown == ignored.split()


def test_what_is_said_instead_is_a_word_that_it_knows():
    words = set(demo_model.Demo.read().words)
    assert set(demo_model.MEANINGS.values()) | demo_model.COLOURS <= words
    assert not demo_model.FILLERS & (words | set(demo_model.MEANINGS))


def test_a_prompt_becomes_tokens_with_weights(demo):
    tokens = demo.clip.tokenize("a (house:1.5) by a lake")["l"]
    house, lake = (demo_model.Demo.read().words.index(word) for word in ("house", "lake"))
    assert tokens == [[(house, 1.5), (lake, 1.0)] + [(0, 1.0)] * 14]
    assert demo.clip.tokenize("lake", return_word_ids=True)["l"][0][:2] == [(lake, 1.0, 1), (0, 1.0, 0)]
    assert demo.clip.tokenize("a (red:1.2) house") != demo.clip.tokenize("a (red:1.2) lake")
    assert encoded(demo, "house lake").shape == (1, 16, 768)
    assert torch.equal(encoded(demo, "a house near a lake"), encoded(demo, "house, lake"))
    empty, plain, heavy = (encoded(demo, text)[0, 0] for text in ("", "house", "(house:1.5)"))
    assert torch.allclose(heavy - empty, 1.5 * (plain - empty), atol=1e-4)


def test_a_long_prompt_is_read_to_its_end(demo):
    words = [word for word in demo_model.Demo.read().words if word and word not in demo_model.COLOURS]
    long = encoded(demo, " ".join(words))
    assert long.shape == (1, 32, 768)
    assert torch.equal(long[0, 16], encoded(demo, words[16])[0, 0])


def test_the_node_tells_what_it_knows_and_what_it_ignored(last_lines, caplog):
    _, clip, _ = hosted.execute("SlipstreamDemoModel", "5").result
    ((state, about),) = last_lines("5")
    assert state == "active"
    assert "M parameters, trained on pictures of 256x256. Words it knows: " in about
    assert "mountains, lake" in about
    with caplog.at_level(logging.WARNING):
        clip.tokenize("a castle by a lake")
    assert last_lines("5") == [("active", '"a castle by a lake": understood lake; ignored castle')]
    assert "ignored castle" in caplog.text
    clip.tokenize("a castle")
    assert last_lines("5") == [("inert", '"a castle": ignored castle')]
    clip.tokenize("")
    assert last_lines("5") == [("active", "an empty prompt")]
    clip.tokenize("a house " + "by a lake " * 20)
    ((_, text),) = last_lines("5")
    assert text.endswith('...": understood house, lake')
    assert len(text) < 100


@pytest.mark.parametrize("which", ["FILE", "TRANSFORMER_FILE"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "another file"])
def test_weights_that_cannot_be_read_are_told_on_the_node(damage, which, tmp_path, monkeypatch, last_lines):
    whole = getattr(demo_model, which)
    file = tmp_path / whole.name
    if damage == "cut short":
        file.write_bytes(whole.read_bytes()[:1000])
    if damage == "another file":
        comfy.utils.save_torch_file({"weight": torch.zeros(1)}, str(file), metadata={"format": "pt"})
    monkeypatch.setattr(demo_model, which, file)
    with pytest.raises(RuntimeError, match=rf"Demo Model: expected its weights in .*{file.name}.*damaged.*Install"):
        hosted.execute("SlipstreamDemoModel", "5", architecture="transformer")
    assert last_lines("5")[0][0] == "failed"


def test_the_host_can_make_copies_of_its_own(demo, transformer):
    """As hooks, core's TorchCompileModel and several GPUs have it do."""
    for patcher in (demo.model, transformer.model, demo.clip.patcher, demo.vae.patcher):
        make, arguments = patcher.cached_patcher_init
        copy = make(*arguments)
        assert copy.model is not patcher.model
        weights, others = patcher.model_state_dict(), copy.model_state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert make(*arguments, disable_dynamic=True).model is not patcher.model


@pytest.mark.skipif(not hasattr(demo_model.model_patcher, "CoreModelPatcher"), reason="this host has no DynamicVRAM")
def test_under_dynamic_vram_it_is_a_dynamic_model_unless_the_host_wants_another(monkeypatch):
    class Dynamic(hosted.ModelPatcher):
        def is_dynamic(self):
            return True

    monkeypatch.setattr(demo_model.model_patcher, "CoreModelPatcher", Dynamic)
    model = demo_model.load_model()
    assert type(model) is Dynamic
    # Weights are assigned, not copied: they stay as in the file.
    assert model.model.diffusion_model.out[2].weight.dtype == torch.float16
    assert type(demo_model.load_model(disable_dynamic=True)) is hosted.ModelPatcher


def test_the_hosts_lora_loader_finds_its_layers(demo):
    unet = demo.model.model.diffusion_model
    layer = unet.input_blocks[5][1].transformer_blocks[0].attn2.to_k
    generator = torch.Generator().manual_seed(3)
    name = "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k"
    lora = {
        f"{name}.lora_up.weight": torch.randn(layer.weight.shape[0], 2, generator=generator),
        f"{name}.lora_down.weight": torch.randn(2, layer.weight.shape[1], generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    model, clip = comfy.sd.load_lora_for_models(demo.model, demo.clip, lora, 1.0, 1.0)
    plain, changed = (demo.sample([HOUSE], [1], steps=4, model=one) for one in (demo.model, model))
    assert (changed - plain).abs().mean() > 0.01
    assert torch.equal(demo.sample([HOUSE], [1], steps=4), plain)
    assert clip.clone().encode("lake").shape == (1, 16, 768)


def test_the_benchmarks_template_leaves_pictures_nearly_as_they_are(demo, exact):
    """Or the first benchmark that a newcomer runs shows a broken picture."""
    template = json.loads((ROOT / "workflows" / "9 - Benchmark - what each optimization gives.json").read_text())
    nodes = {node["id"]: node for node in template["nodes"]}
    links = {link[0]: link for link in template["links"]}
    measured = next(node for node in nodes.values() if node["type"] == "SlipstreamBenchmark")
    chain, slot = [], "candidate"
    while nodes[links[link_to(measured, slot)][1]]["type"] != "SlipstreamDemoModel":
        measured, slot = nodes[links[link_to(measured, slot)][1]], "model"
        chain.append(measured)
    model = demo.model
    for node in chain:
        model = hosted.run_node(node["type"], model, str(node["id"]), **node["widgets_values_named"])
    prompts, _, latents, images = exact
    found = demo.sample(prompts, range(8), steps=20, model=model)
    assert chain
    assert 0.975 < fidelity.compare(latents, found, images, demo.decode(found)).ssim < 1


def link_to(node, name):
    return next(entry["link"] for entry in node["inputs"] if entry["name"] == name)


def test_the_hosts_own_nodes_work_on_it(demo):
    import nodes

    with torch.inference_mode():
        (clip,) = nodes.CLIPSetLastLayer().set_last_layer(demo.clip, -2)
        (positive,) = nodes.CLIPTextEncode().encode(clip, HOUSE)
        (negative,) = nodes.CLIPTextEncode().encode(demo.clip, "")
        (other,) = nodes.CLIPTextEncode().encode(demo.clip, "summer day")
        (average,) = nodes.ConditioningAverage().addWeighted(positive, other, 0.5)
        (both,) = nodes.ConditioningConcat().concat(average, other)
        (latent,) = nodes.EmptyLatentImage().generate(256, 256)
        (latent,) = nodes.KSampler().sample(demo.model, 1, 3, 5.0, "euler", "normal", both, negative, latent)
        (image,) = nodes.VAEDecode().decode(demo.vae, latent)
        assert image.shape == (1, 256, 256, 3)
        assert image.isfinite().all()
        (latent,) = nodes.VAEEncode().encode(demo.vae, image)
    assert latent["samples"].shape == (1, 4, 32, 32)
