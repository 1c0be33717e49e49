"""What can't be sampled, decoded or encoded, into every node that does: one sentence, and the next prompt runs."""

from __future__ import annotations

import comfy.sd
import hosted
import pytest
import small_models
import torch
from comfy.taesd.taesd import TAESD
from hosted import NODES, execute, latent, prompt

KINDS = ("MODEL", "VAE", "CONDITIONING", "LATENT", "IMAGE")
REQUIRED = [
    (name, one.id, one.get_io_type())
    for name, node in NODES.items()
    for one in node.define_schema().inputs
    if one.get_io_type() in KINDS and not one.optional
]
"""(node, input, type) of all that the host passes from node to node."""

CALL = {"seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}


def benchmark(model, positive, negative, image):
    return execute(
        "SlipstreamBenchmark",
        baseline=model,
        candidate=model,
        positive=positive,
        negative=negative,
        latent_image=image,
        denoise=1.0,
        runs=1,
        **CALL,
    )


def handoff(model, positive, negative, image):
    return execute(
        "SlipstreamRefinerHandoff",
        base=model,
        refiner=model,
        base_positive=positive,
        base_negative=negative,
        latent_image=image,
        refiner_cfg=5.0,
        mode={"mode": "ensemble", "handoff": 0.5, "split": "steps", "exact_handoff": False},
        **CALL,
    )


SAMPLERS = {"Benchmark": (benchmark, ""), "Refiner Handoff": (handoff, "base_")}


def refused(call, title, *words):
    """That the call ends in one sentence which names the node, and that nothing of it but torch's words is torch's."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(title), text
    assert "expected" in text, text
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize(("node", "name", "kind"), REQUIRED, ids=lambda value: value)
def test_nothing_from_a_switch_into_any_node(node, name, kind, model, last_lines):
    vae = small_models.kl_vae()
    good = {
        "MODEL": model,
        "VAE": vae,
        "CONDITIONING": prompt(model, 1),
        "LATENT": {"samples": latent(model)},
        "IMAGE": torch.rand(1, 64, 64, 3),
    }
    others = {one: good[its] for of, one, its in REQUIRED if of == node and one != name}
    title = NODES[node].define_schema().display_name.removesuffix(" (Slipstream)")
    refused(lambda: execute(node, **others, **{name: None}), f"{title}: ", f"{kind} at {name}", "nothing came (None)")
    assert last_lines("7")[0][0] == "failed"
    # A node for any type lets another one through.
    refused(lambda: execute(node, **others, **{name: 3}), f"{title}: ", f"{kind} at {name}", "but an int came")


LATENTS = {
    "a video's": ("minimal", (1, 4, 3, 16, 16), "(batch, 4, height, width)", "(1, 4, 3, 16, 16), as of a video"),
    "an empty video's": ("minimal", None, "(batch, 4, height, width)", "(1, 16, 3, 16, 16), as of a video"),
    "a sound's": ("minimal", (1, 64, 100), "(batch, 4, height, width)", "(1, 64, 100), as of sound"),
    "of other channels": ("minimal", (1, 16, 16, 16), "(batch, 4, height, width)", "(1, 16, 16, 16)"),
    "of other channels, for a transformer": ("DiT", (1, 16, 16, 16), "(batch, 4, height, width)", "(1, 16, 16, 16)"),
    "a video's, for a transformer": ("DiT", (1, 4, 3, 16, 16), "(batch, 4, height, width)", "as of a video"),
    "an image's of other channels, for video": ("Wan", (1, 4, 16, 16), "(batch, 16, frames", "(1, 4, 1, 16, 16)"),
    "no pixels": ("minimal", (1, 4, 0, 16), "a LATENT with pixels at latent_image", "(1, 4, 0, 16) has none"),
    "no batch": ("minimal", (0, 4, 16, 16), "a LATENT with pixels at latent_image", "(0, 4, 16, 16) has none"),
    "no pixels, for a transformer": ("DiT", (1, 4, 0, 16), "a LATENT with pixels", "(1, 4, 0, 16) has none"),
}


def model_of(name):
    return wan() if name == "Wan" else hosted.model(name)


def wan():
    """A small Wan 2.1, for video."""
    import comfy.supported_models as families

    config = {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 1, "text_dim": 64, "in_dim": 16, "out_dim": 16}
    config |= {"model_type": "t2v", "image_model": "wan2.1", "freq_dim": 32, "patch_size": (1, 2, 2)}
    return small_models.build(families.WAN21_T2V(config))


def good(model):
    return prompt_of(model, 10), prompt_of(model, 11), {"samples": latent_of(model)}


def prompt_of(model, seed):
    if "text_dim" not in model.model.model_config.unet_config:
        return prompt(model, seed)
    return [[torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(seed)), {}]]


def latent_of(model):
    form = model.model.latent_format
    return torch.zeros(1, form.latent_channels, *([3] if form.latent_dimensions == 3 else []), 8, 8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", LATENTS)
def test_latents(case, sampler):
    name, shape, *words = LATENTS[case]
    model = model_of(name)
    bad = torch.zeros(1, 16, 3, 16, 16) if shape is None else torch.ones(shape)
    if shape is None:
        words[1] = "as of a video"  # the host has given it the model's channels by then
    call, _ = SAMPLERS[sampler]
    positive, negative, image = good(model)
    refused(lambda: call(model, positive, negative, {"samples": bad}), sampler, *words)
    assert not isinstance(call(model, positive, negative, image), Exception)


def other_width(model, seed):
    return [[torch.randn(1, 8, 48), {"pooled_output": torch.randn(1, 1280)}]]


def other_pooled(model, seed):
    (tensor, _), = prompt(model, seed)  # fmt: skip
    return [[tensor, {"pooled_output": torch.randn(1, 768)}]]


def no_pooled(model, seed):
    (tensor, _), = prompt(model, seed)  # fmt: skip
    return [[tensor, {}]]


def no_text(model, seed):
    return [[None, {"pooled_output": torch.randn(1, 1280)}]]


PROMPTS = {
    "another UNet's": ("minimal", other_width, "64 values wide, but one of 48 came"),
    "another transformer's": ("DiT", other_width, "64 values wide, but one of 48 came"),
    "another video model's": ("Wan", other_width, "64 values wide, but one of 48 came"),
    "another one beside its own": ("minimal", lambda m, s: prompt(m, s) + other_width(m, s), "64 values wide"),
    "without a pooled output": ("base", no_pooled, "with a pooled output, but the one that came has none"),
    "of another pooled output": ("base", other_pooled, "but a pooled output of"),
    "without text": ("minimal", no_text, "has no text in it"),
    "without text, for a transformer": ("DiT", no_text, "has no text in it"),
    "empty": ("minimal", lambda m, s: [], "the conditioning that came is empty"),
}


@pytest.mark.parametrize("which", ["positive", "negative"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case, sampler, which, last_lines):
    name, bad, word = PROMPTS[case]
    model = model_of(name)
    call, prefix = SAMPLERS[sampler]
    positive, negative, image = good(model)
    prompts = (bad(model, 5), negative) if which == "positive" else (positive, bad(model, 5))
    refused(lambda: call(model, *prompts, image), sampler, word, f"{prefix}{which}")
    state, text = last_lines("7")[0]
    assert state == "failed"
    assert "expected" in text
    call(model, positive, negative, image)
    assert last_lines("7")[0][0] != "failed"


def test_a_refiners_prompt_is_refused_before_the_base_begins():
    base, refiner = hosted.model("base"), hosted.model("refiner")
    with hosted.Counter(base) as counted:
        refused(
            lambda: execute(
                "SlipstreamRefinerHandoff",
                base=base,
                refiner=refiner,
                base_positive=prompt(base, 1),
                base_negative=prompt(base, 2),
                refiner_positive=prompt(base, 3),
                latent_image={"samples": latent(base)},
                refiner_cfg=5.0,
                mode={"mode": "ensemble", "handoff": 0.5, "split": "steps", "exact_handoff": False},
                **CALL,
            ),
            "Refiner Handoff: ",
            "at refiner_positive, 64 values wide, but one of 832 came",
        )
    assert counted.unet_calls == 0


# What is legal goes on.


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prompt_that_a_node_on_the_model_adapts(sampler, model):
    patched = model.clone()

    def adapt(executor, x, t, context, *args, **kwargs):
        return executor(x, t, context.repeat(1, 1, 2)[..., :64], *args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "other", adapt)
    SAMPLERS[sampler][0](patched, other_width(model, 1), other_width(model, 2), {"samples": latent(model)})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "image",
    [
        {"samples": torch.zeros(3, 4, 8, 8), "noise_mask": torch.ones(1, 64, 64)},
        {"samples": torch.ones(2, 4, 8, 8), "batch_index": [4, 7]},
        {"samples": torch.zeros(1, 16, 8, 8)},
    ],
    ids=["a batch with a mask", "a part of a batch", "an empty one of other channels"],
)
def test_legal_latents(sampler, image, model):
    _, negative, _ = good(model)
    several = prompt(model, 10, tokens=8) + prompt(model, 12, tokens=16, area=(4, 4, 0, 0))
    SAMPLERS[sampler][0](model, several, negative, image)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_images_latent_for_video(sampler):
    model = wan()
    positive, negative, _ = good(model)
    SAMPLERS[sampler][0](model, positive, negative, {"samples": torch.ones(1, 16, 8, 8)})


def test_an_empty_negative_at_cfg_1(model):
    call = {**CALL, "cfg": 1.0}
    inputs = {"positive": prompt(model, 1), "negative": [], "latent_image": {"samples": latent(model)}}
    execute("SlipstreamBenchmark", baseline=model, candidate=model, denoise=1.0, runs=1, **inputs, **call)


def test_an_error_that_the_inputs_do_not_explain_stays_as_it_is(model):
    patched = model.clone()

    def fail(executor, *args, **kwargs):
        raise hosted.PlantedError("mat1 and mat2 shapes cannot be multiplied (8x99 and 64x32)")

    patched.add_wrapper_with_key("diffusion_model", "other", fail)
    with pytest.raises(hosted.PlantedError):
        benchmark(patched, *good(model))


VAES = {"KL": small_models.kl_vae, "tiny": small_models.vae}
DECODED = {
    "of other channels": ((1, 16, 8, 8), "channels"),
    "no pixels": ((1, 4, 0, 8), "a LATENT with pixels at samples"),
    "no batch": ((0, 4, 8, 8), "a LATENT with pixels at samples"),
    "a sound's": ((1, 4, 64), "(1, 4, 64), as of sound"),
    "no latent": ((4, 4), "of shape (4, 4)"),
}
ENCODED = {
    "one channel": ((1, 64, 64, 1), "a picture of three channels and at least 8x8 pixels, but one of 1 and 64x64"),
    "too small": ((1, 4, 4, 3), "at least 8x8 pixels, but one of 3 and 4x4"),
    "no pixels": ((1, 0, 64, 3), "an IMAGE with pixels at pixels"),
    "no batch": ((0, 64, 64, 3), "an IMAGE with pixels at pixels"),
    "a mask": ((1, 64, 64), "pictures of shape (batch, height, width, 3), but one of shape (1, 64, 64)"),
    "a video in one": ((1, 2, 64, 64, 3), "pictures of shape (batch, height, width, 3)"),
}


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("case", DECODED)
def test_decoding(case, vae, last_lines):
    shape, word = DECODED[case]
    one = VAES[vae]()
    with pytest.raises(ValueError, match="VAE Decode Tiled: ") as caught:
        execute("SlipstreamVAEDecodeTiled", vae=one, samples={"samples": torch.ones(shape)})
    assert word in str(caught.value)
    assert last_lines("7")[0] == ("failed", str(caught.value))
    execute("SlipstreamVAEDecodeTiled", vae=one, samples={"samples": torch.ones(1, 4, 8, 8)})


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("case", ENCODED)
def test_encoding(case, vae, last_lines):
    shape, word = ENCODED[case]
    one = VAES[vae]()
    refused(lambda: execute("SlipstreamVAEEncodeTiled", vae=one, pixels=torch.ones(shape)), "VAE Encode Tiled: ", word)
    execute("SlipstreamVAEEncodeTiled", vae=one, pixels=torch.ones(1, 64, 64, 3))


STAGES = {
    "FP16-Fix VAE": lambda vae: execute("SlipstreamFP16FixVAE", "4", vae=vae, precision="bf16", method="as is"),
    "Compile VAE": lambda vae: execute("SlipstreamCompileVAE", "4", vae=vae, backend={"backend": "eager"}),
}


@pytest.mark.parametrize("title", STAGES)
def test_a_latent_of_another_model_into_a_vae_of_ours(title, last_lines):
    vae = STAGES[title](small_models.kl_vae()).result[0]
    refused(
        lambda: vae.decode(torch.ones(1, 16, 8, 8)), f"{title} (node 4): ", "latent of this VAE's", "(batch, 4, height"
    )
    assert last_lines("4")[0][0] == "failed"
    # ComfyUI's own way through ours.
    assert vae.decode(torch.ones(1, 4, 8, 8)).isfinite().all()
    assert last_lines("4")[0][0] != "failed"


def test_a_vae_of_another_model_in_a_benchmark(model):
    others = TAESD(latent_channels=16).state_dict()
    refused(
        lambda: execute(
            "SlipstreamBenchmark",
            baseline=model,
            candidate=model,
            positive=prompt(model, 1),
            negative=prompt(model, 2),
            latent_image={"samples": latent(model)},
            vae=comfy.sd.VAE(sd={**others, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}),
            denoise=1.0,
            runs=1,
            **CALL,
        ),
        "Benchmark: ",
        "a latent of this VAE's",
    )
