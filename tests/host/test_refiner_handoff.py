"""Refiner Handoff on real models: one run, whoever makes it; diffusers' own pipelines; the host's own nodes."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import hosted
import latent_preview
import pytest
import small_models
import torch
from comfy import sdxl_clip
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hosted import Counter, PlantedError, execute, latent, prompt, run_node, sample

import nodes as host_nodes

SCALE = 0.13025
SEED = 1


@pytest.fixture(scope="module")
def base():
    return small_models.model("base")


@pytest.fixture(scope="module")
def refiner():
    return small_models.model("refiner", seed=1)


def hand_over(base, refiner, **values):
    """Both outputs of the node: two latents."""
    call = {"seed": SEED, "steps": 6, "cfg": 5.0, "refiner_cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    mode = {"mode": "ensemble", **values.pop("mode", {})}
    values.setdefault("latent_image", {"samples": latent(base, 8)})
    for side, seed in (("positive", 10), ("negative", 11)):
        for part, model in (("base", base), ("refiner", refiner)):
            if f"{part}_{side}" not in values:
                values[f"{part}_{side}"] = prompt(model, seed)
    inputs = {**call, **values}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    result = execute("SlipstreamRefinerHandoff", "9", base=base, refiner=refiner, mode=mode, **inputs).result
    return [output["samples"] for output in result]


def uninterrupted(model, image=None, **values):
    """The same run by one model alone."""
    image = {"samples": latent(model, 8)} if image is None else image
    noise = comfy.sample.prepare_noise(image["samples"], SEED, image.get("batch_index"))
    return sample(model, image=image["samples"], noise=noise, noise_mask=image.get("noise_mask"), **values)


def by_hand(base, refiner, steps, at, sampler="euler", seed=SEED, scheduler="normal", image=None):
    """Two of the host's KSampler (Advanced) in a row."""
    image = {"samples": latent(base, 8)} if image is None else image
    with torch.inference_mode():
        (half,) = host_nodes.common_ksampler(
            base, seed, steps, 5.0, sampler, scheduler, prompt(base, 10), prompt(base, 11), image, last_step=at
        )
        (whole,) = host_nodes.common_ksampler(
            refiner, seed, steps, 5.0, sampler, scheduler, prompt(refiner, 10), prompt(refiner, 11), half,
            disable_noise=True, start_step=at, force_full_denoise=True,
        )  # fmt: skip
    return whole["samples"], half["samples"]


def picture(model, batch=1):
    """A latent to inpaint: an image, a mask, noise of one's own."""
    generator = torch.Generator().manual_seed(4)
    return {
        "samples": torch.randn(batch, 4, 8, 8, generator=generator),
        "batch_index": [3, 5][:batch],
        "noise_mask": torch.rand(batch, 1, 64, 64, generator=generator),
    }


def relative(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


# Against diffusers.


def diffusers_unet(patcher):
    """The same network in diffusers, with the same weights."""
    config = patcher.model.model_config.unet_config
    channels = [config["model_channels"] * factor for factor in config["channel_mult"]]
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=[count // 64 for count in channels],
        cross_attention_dim=config["context_dim"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=config["adm_in_channels"],
    )
    names = comfy.utils.unet_to_diffusers(config)
    weights = patcher.model.diffusion_model.state_dict()
    assert len(unet.state_dict()) == len(weights)
    unet.load_state_dict({name: weights[names[name]].clone() for name in unet.state_dict()})
    return unet.eval()


def prompts_of(patcher):
    (((positive, pooled),), ((negative, negative_pooled),)) = prompt(patcher, 10), prompt(patcher, 11)
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled["pooled_output"],
        "negative_pooled_prompt_embeds": negative_pooled["pooled_output"],
    }


@pytest.fixture(scope="module")
def pipelines(base, refiner):
    """diffusers' own base and refiner."""
    level = {"block_out_channels": [32] * 4, "layers_per_block": 1}
    vae = AutoencoderKL(**level, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    common = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))

    def pipeline(kind, patcher, **options):
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        )
        unet = diffusers_unet(patcher)
        made = kind(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **common, **options)
        made.set_progress_bar_config(disable=True)
        return made

    return (
        pipeline(StableDiffusionXLPipeline, base),
        pipeline(StableDiffusionXLImg2ImgPipeline, refiner, requires_aesthetics_score=True),
    )


@pytest.mark.parametrize("handoff", [0.8, 0.9])
@pytest.mark.parametrize("steps", [20, 25, 50])
def test_an_ensemble_is_that_of_diffusers(steps, handoff, base, refiner, pipelines, last_lines):
    first, second = pipelines
    common = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}
    noise = comfy.sample.prepare_noise(latent(base, 8), SEED)
    scheduler = first.scheduler
    scheduler.set_timesteps(steps)
    # diffusers scales noise by sqrt(sigma^2 + 1), the host by sigma unless it is the largest that there is.
    start = noise * scheduler.sigmas[0] / scheduler.init_noise_sigma
    half = first(**prompts_of(base), **common, denoising_end=handoff, latents=start, height=64, width=64).images
    whole = second(**prompts_of(refiner), **common, denoising_start=handoff, image=half).images

    ours = {"mode": {"handoff": handoff}, "steps": steps, "scheduler": "ddim_uniform"}
    samples, of_base = hand_over(base, refiner, **ours)
    ((state, text),) = last_lines("9")
    assert (state, text.split(",")[0]) == ("active", f"{first.num_timesteps} + {second.num_timesteps} steps")
    assert text.endswith(f"timestep {int(second.scheduler.timesteps[first.num_timesteps])}")
    assert relative(of_base * SCALE, half) < 1e-4
    assert relative(samples * SCALE, whole) < 1e-4


# A base that is its own refiner: one run.


@pytest.mark.parametrize("split", ["timesteps", "steps"])
@pytest.mark.parametrize("handoff", [0.0, 0.15, 0.5, 0.8, 1.0])
def test_a_base_that_is_its_own_refiner_makes_one_run(handoff, split, base):
    samples, _ = hand_over(base, base, mode={"handoff": handoff, "split": split})
    assert relative(samples, uninterrupted(base)) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("gradual", [False, True], ids=["mask", "differential"])
def test_inpainting_too(gradual, sampler, base):
    model = DifferentialDiffusion.execute(base).result[0] if gradual else base
    image = picture(model, batch=2)
    samples, _ = hand_over(model, model, mode={"handoff": 0.5}, latent_image=image, sampler_name=sampler)
    expected = uninterrupted(model, image, sampler=sampler)
    assert relative(samples, expected) < 1e-5


def test_what_a_mask_leaves_out_stays_as_it_is(base, refiner):
    image = picture(base)
    image["noise_mask"] = torch.zeros(1, 1, 64, 64)
    image["noise_mask"][..., :32] = 1
    samples, _ = hand_over(base, refiner, mode={"handoff": 0.5}, latent_image=image)
    assert torch.allclose(samples[..., 4:], image["samples"][..., 4:], atol=1e-4)
    assert not torch.allclose(samples[..., :4], image["samples"][..., :4], atol=1e-1)


def test_a_model_that_counts_no_timesteps_too(last_lines):
    model = small_models.model("DiT")
    samples, _ = hand_over(model, model)
    assert relative(samples, uninterrupted(model)) < 1e-5
    ((_, text),) = last_lines("9")
    assert "handed over at sigma 0." in text


# Against the host's own nodes.


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "uni_pc", "dpm_2", "ipndm"])
def test_a_sampler_begins_anew_as_in_two_of_the_hosts(sampler, base, refiner):
    mode = {"handoff": 0.5, "split": "steps"}
    samples, of_base = hand_over(base, refiner, mode=mode, sampler_name=sampler)
    whole, half = by_hand(base, refiner, 6, 3, sampler)
    assert relative(of_base, half) < 1e-5
    assert relative(samples, whole) < 1e-5


def test_image_to_image_is_that_of_the_host(base, refiner, last_lines):
    samples, of_base = hand_over(base, refiner, mode={"mode": "image to image", "refiner_denoise": 0.5})
    expected = uninterrupted(base)
    assert torch.equal(of_base, expected)
    with torch.inference_mode():
        (again,) = host_nodes.common_ksampler(
            refiner, SEED + 1, 6, 5.0, "euler", "normal", prompt(refiner, 10), prompt(refiner, 11),
            {"samples": expected}, start_step=3,
        )  # fmt: skip
    assert torch.equal(samples, again["samples"])
    assert last_lines("9") == [("active", "6 + 3 steps, made anew from timestep 400 on")]


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_makes_a_step_each_or_says_that_it_cannot(sampler, base, refiner):
    call = {"mode": {"handoff": 0.5, "split": "steps"}, "steps": 2, "sampler_name": sampler}
    if sampler in hosted.engine("refiner_handoff").NEED_TWO_STEPS:
        with pytest.raises(ValueError, match="needs two steps or none of each model, but here are 1 for the base"):
            hand_over(base, refiner, **call)
        call["steps"] = 4
    samples, of_base = hand_over(base, refiner, **call)
    assert torch.isfinite(samples).all()
    assert not torch.equal(samples, of_base)


@pytest.fixture
def calls(monkeypatch):
    """What the host's sampler is called with, one for each model."""
    seen, real = [], comfy.sample.sample_custom

    def sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent_image, **kwargs):
        kwargs.update(model=model, noise=noise, cfg=cfg, sigmas=sigmas.clone(), image=latent_image)
        seen.append(kwargs)
        names = ("model", "noise", "cfg", "sigmas", "image")
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return real(model, noise, cfg, sampler, sigmas, positive, negative, latent_image, **rest)

    monkeypatch.setattr(comfy.sample, "sample_custom", sample_custom)
    return seen


@pytest.mark.parametrize(("sampler", "other"), [("euler", 0), ("euler_ancestral", 1), ("dpmpp_2m_sde", 1), ("ddim", 0)])
def test_a_sampler_that_draws_noise_gets_another_seed_and_no_noise_is_added(sampler, other, base, refiner, calls):
    hand_over(base, refiner, sampler_name=sampler, refiner_cfg=3.0)
    first, second = calls
    assert second["seed"] - first["seed"] == other
    assert second["noise"] is first["noise"]
    assert (first["cfg"], second["cfg"]) == (5.0, 3.0)
    assert first["sigmas"][-1] == second["sigmas"][0] > 0


def test_exactly_at_the_boundary(base, refiner, calls, last_lines):
    hand_over(base, refiner, mode={"handoff": 0.7, "exact_handoff": True})
    boundary = base.get_model_object("model_sampling").sigmas[300]
    assert [len(call["sigmas"]) - 1 for call in calls] == [4, 3]
    assert [float(call["sigmas"][at]) for call, at in zip(calls, (-1, 0), strict=True)] == pytest.approx(
        [float(boundary)] * 2
    )
    assert last_lines("9") == [("active", "4 + 3 steps, handed over at timestep 300")]


def test_the_schedule_of_the_issue(base, refiner, last_lines):
    hand_over(base, refiner, steps=30, scheduler="simple", cfg=1.0, refiner_cfg=1.0)
    assert last_lines("9") == [("active", "24 + 6 steps, handed over at timestep 199")]


@pytest.mark.parametrize(
    ("mode", "idle", "text"),
    [
        ({"handoff": 0.0}, "base", "0 + 6 steps, handoff leaves the base none, so that the refiner made all of it"),
        ({"handoff": 1.0}, "refiner", "6 + 0 steps, handoff leaves the refiner none, so that the base made all of it"),
        (
            {"mode": "image to image", "refiner_denoise": 0.1},
            "refiner",
            "6 + 0 steps, refiner_denoise 0.1 leaves the refiner none",
        ),
    ],
)
def test_a_model_without_a_step_is_not_even_loaded(mode, idle, text, base, refiner, last_lines):
    models = {"base": base, "refiner": refiner}
    counters = {name: Counter(model) for name, model in models.items()}
    with counters["base"], counters["refiner"]:
        samples, of_base = hand_over(base, refiner, mode=mode)
    assert counters[idle].unet_calls == 0
    assert last_lines("9") == [("inert", text)]
    if idle == "refiner":
        assert torch.equal(samples, of_base)
        assert torch.equal(samples, uninterrupted(base))
    else:
        assert torch.equal(of_base, latent(base, 8))
        assert relative(samples, uninterrupted(refiner)) < 1e-5


def test_what_else_a_latent_carries_stays(base, refiner):
    image = {**picture(base), "downscale_ratio_spacial": 8}
    inputs = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "latent_image": image}
    for side in ("positive", "negative"):
        inputs |= {f"base_{side}": prompt(base, 10), f"refiner_{side}": prompt(refiner, 10)}
    mode = {"mode": "ensemble", "handoff": 0.5}
    for output in execute("SlipstreamRefinerHandoff", base=base, refiner=refiner, mode=mode, **inputs).result:
        assert set(output) == {"samples", "batch_index", "noise_mask"}


# Prompts for the refiner.


def test_the_refiner_takes_clip_g_of_the_bases_prompt(base, refiner, last_lines):
    own = {}
    for side, seed in (("positive", 10), ("negative", 11)):
        ((tensor, values),) = prompt(base, seed)
        own[f"refiner_{side}"] = [[tensor[..., 768:], values]]
    expected, _ = hand_over(base, refiner, **own)
    samples, _ = hand_over(base, refiner, refiner_positive=None, refiner_negative=None)
    assert torch.equal(samples, expected)
    assert last_lines("9")[-1][1].endswith("; CLIP-G of the base's positive and negative drives the refiner")


def test_clip_g_of_the_base_is_what_the_refiners_own_encoder_gives():
    small = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    options = {
        "model_options": {"clip_l_model_config": dict(small), "clip_g_model_config": {**small, "projection_dim": 64}}
    }
    of_base = sdxl_clip.SDXLClipModel(dtype=torch.float32, **options)
    of_refiner = sdxl_clip.SDXLRefinerClipModel(dtype=torch.float32, **options)
    small_models.initialize(of_base, 1)
    of_refiner.clip_g.load_state_dict(of_base.clip_g.state_dict())
    tokens = sdxl_clip.SDXLTokenizer().tokenize_with_weights("a (red:1.3) boat on a lake, " * 12)
    with torch.inference_mode():
        both, pooled = of_base.encode_token_weights(tokens)
        alone, own_pooled = of_refiner.encode_token_weights(tokens)
    assert both.shape[1] > 77
    assert torch.equal(both[..., 64:], alone)
    assert torch.equal(pooled, own_pooled)


def test_aesthetic_scores_are_6_and_2_5_unless_the_prompt_says_otherwise(base, refiner):
    by_default, _ = hand_over(base, refiner)
    for scores, is_same in (((6.0, 2.5), True), ((6.0, 6.0), False)):
        prompts = {
            f"refiner_{side}": prompt(refiner, seed, aesthetic_score=score)
            for side, seed, score in zip(("positive", "negative"), (10, 11), scores, strict=True)
        }
        samples, _ = hand_over(base, refiner, **prompts)
        assert torch.equal(samples, by_default) == is_same


def test_a_controlnet_of_the_base_is_left_out_and_told(base, refiner, last_lines):
    control = hosted.with_control(prompt(base, 10), hosted.controlnet(base), size=64)
    without, of_base_without = hand_over(base, refiner, refiner_positive=None)
    samples, of_base = hand_over(base, refiner, base_positive=control, refiner_positive=None)
    assert not torch.equal(of_base, of_base_without)
    assert not torch.equal(samples, without)
    assert "it goes without their ControlNet, made for the base alone" in last_lines("9")[0][1]


def test_another_model_of_the_bases_family_takes_its_prompts_as_they_are(base, last_lines):
    other = small_models.model("base", seed=3)
    expected, _ = hand_over(base, other)
    samples, _ = hand_over(base, other, refiner_positive=None, refiner_negative=None)
    assert torch.equal(samples, expected)
    assert "CLIP-G" not in last_lines("9")[-1][1]


# What can't be served.


def test_prompts_that_cannot_be_translated_are_asked_for(refiner, last_lines):
    narrow = small_models.model("SDXL")
    with pytest.raises(ValueError, match=r"refiner_negative is not connected.* the base is SDXL and the ref"):
        hand_over(narrow, refiner, refiner_negative=None)
    ((state, text),) = last_lines("9")
    assert state == "failed"
    assert text.startswith("failed before the first step (ValueError: Refiner Handoff: refiner_negative")


@pytest.mark.parametrize("mode", ["ensemble", "image to image"])
def test_latents_of_another_kind_are_refused(mode, base, model):
    with pytest.raises(RuntimeError, match="same kind of latents, but the base is SDXL and the refiner SD15"):
        hand_over(base, model, mode={"mode": mode})


def test_noise_of_another_kind_is_refused_in_an_ensemble_alone(base):
    flow = base.clone()
    sampling = comfy.model_sampling

    class Flow(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
        pass

    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(RuntimeError, match="same kind of noise"):
        hand_over(base, flow)
    samples, _ = hand_over(base, flow, mode={"mode": "image to image"})
    assert torch.isfinite(samples).all()


def hand_over_transformers(base, refiner, seed=SEED, steps=6, **mode):
    """Two families of transformers, each with its own prompts; and what the host's SamplerCustom makes in two calls."""
    models = [small_models.transformer(name) for name in (base, refiner)]
    prompts = [[small_models.transformer_prompt(name, one) for one in (1, 2)] for name in (base, refiner)]
    image = small_models.transformer_latent(base)
    named = dict(zip(("base_positive", "base_negative"), prompts[0], strict=True))
    named |= dict(zip(("refiner_positive", "refiner_negative"), prompts[1], strict=True))
    call = {"latent_image": {"samples": image}, "scheduler": "simple", "steps": steps, "mode": mode}
    samples, _ = hand_over(*models, **named, **call)
    sigmas = comfy.samplers.KSampler(models[0], steps, "cpu", "euler", "simple").sigmas
    noise, expected = comfy.sample.prepare_noise(image, seed), image
    half = steps // 2
    for model, (positive, negative), part in zip(models, prompts, (sigmas[: half + 1], sigmas[half:]), strict=True):
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            expected = comfy.sample.sample_custom(
                model, noise, 5.0, sampler, part, positive, negative, expected, disable_pbar=True, seed=seed
            )
        noise = torch.zeros_like(image)
    return samples, expected


@pytest.mark.parametrize(
    ("base", "refiner"),
    [
        ("Wan 2.1", "Wan 2.1"),
        ("Flux", "Chroma"),
        ("Flux", "HiDream"),
        ("Flux", "Z-Image"),
        ("Qwen-Image", "Wan 2.1"),
    ],
)
def test_two_transformers_of_the_same_latents_and_noise(base, refiner):
    """The noise levels are the base's, whatever the shift of the other one's own schedule."""
    samples, expected = hand_over_transformers(base, refiner, handoff=0.5, split="steps")
    assert relative(samples, expected) < 1e-5


@pytest.mark.parametrize(
    ("base", "refiner", "what"),
    [
        ("Flux", "SD3", "latents, but the base is Flux and the refiner SD3"),
        ("Wan 2.1", "HunyuanVideo", "latents, but the base is WAN21_T2V and the refiner HunyuanVideo"),
        ("Qwen-Image", "Cosmos Predict2", "noise, but the base is QwenImage and the refiner CosmosT2IPredict2"),
    ],
)
def test_two_transformers_of_other_latents_or_noise_are_refused(base, refiner, what):
    with pytest.raises(RuntimeError, match=f"same kind of {what}, .* Use a refiner that shares the base's latents"):
        hand_over_transformers(base, refiner)


def test_a_latent_that_is_not_finite_stops_there_naming_the_model(base, refiner):
    broken = base.clone()
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    with Counter(refiner) as counter, pytest.raises(RuntimeError, match=r"\(node 9\).*finite values from the base"):
        hand_over(broken, refiner)
    assert counter.unet_calls == 0


# Plans, and what is told and left.


def test_plans_of_both_models_apply_and_are_told_apart(base, refiner, last_lines, monkeypatch):
    verdicts = hosted.engine("telling.verdicts")
    monkeypatch.setattr(verdicts, "current_prompt", lambda: verdicts.Prompt("prompt", None, "9"))
    first = run_node("SlipstreamDeepCache", base, "1", cache_interval=2)
    second = run_node("SlipstreamCFGCutoff", refiner, "2", cutoff=0.5)
    samples, of_base = hand_over(first, second, mode={"handoff": 0.5, "split": "steps"}, steps=8)
    told = {node: [line["sampler"] for line in verdicts._kept[(None, node)].lines.values()] for node in ("1", "2")}
    assert told == {"1": ["node 9, base"], "2": ["node 9, refiner"]}
    assert last_lines("1")[0][0] == last_lines("2")[0][0] == "active"
    whole, half = by_hand(first, second, 8, 4)
    assert relative(of_base, half) < 1e-5
    assert relative(samples, whole) < 1e-5


@pytest.mark.parametrize("name", sorted(set(hosted.METHODS) - {"SlipstreamCompileModel"}))
def test_every_method_works_on_either_model(name, base, refiner, last_lines):
    """Compiling costs seconds, and is that of any sampler's run. What the latent's scaling changes in the last bit of a
    float32 number, computing in bfloat16 may round to the next one, 2**-8 away."""
    bound = 1e-3 if name in {"SlipstreamCPU", "SlipstreamRecipe", "SlipstreamPrecision"} else 1e-5
    for pair in ((run_node(name, base, "1"), refiner), (base, run_node(name, refiner, "1"))):
        samples, _ = hand_over(*pair, mode={"handoff": 0.5, "split": "steps"})
        assert relative(samples, by_hand(*pair, 6, 3)[0]) < bound, last_lines("1")


def test_one_plan_on_both_has_a_line_and_a_report_for_each(base):
    hosted.engine("telling.history")._kept.clear()
    model = run_node("SlipstreamDeepCache", base, "1", cache_interval=2)
    hand_over(model, model, mode={"handoff": 0.5})
    assert [run.sampler for run in hosted.engine("telling.history")._kept.values()] == [
        "node None, base",
        "node None, refiner",
    ]


def test_a_lora_on_one_of_two_models_that_share_their_weights(base):
    patched = hosted.add_lora(base)
    for pair in ((base, patched), (patched, base)):
        samples, _ = hand_over(*pair, mode={"handoff": 0.5, "split": "steps"})
        assert relative(samples, by_hand(*pair, 6, 3)[0]) < 1e-5
    assert relative(uninterrupted(base), uninterrupted(patched)) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "dpm_adaptive"])
def test_one_progress_bar_with_previews(sampler, base, refiner, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **kwargs: seen.append((value, total, preview))
    )
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    hand_over(base, refiner, mode={"handoff": 0.5}, sampler_name=sampler)
    values = [value for value, _, _ in seen]
    assert values == sorted(values)
    assert set(values) == {1, 2, 3, 4, 5, 6}
    assert {total for _, total, _ in seen} == {6}
    assert all(preview is not None for _, _, preview in seen)


@pytest.mark.parametrize("error", [PlantedError, comfy.model_management.InterruptProcessingException])
def test_after_an_error_or_an_interrupt_nothing_is_left(error, base, refiner, last_lines):
    planted = refiner.clone()

    def fail(args):
        raise error("planted")

    planted.set_model_sampler_post_cfg_function(fail)
    first = run_node("SlipstreamDeepCache", base, "1", cache_interval=2)
    options = dict(first.model_options["transformer_options"])
    before, _ = hand_over(base, refiner)
    with pytest.raises(error):
        hand_over(first, planted)
    ((state, text),) = last_lines("9")
    if error is PlantedError:
        assert (state, text) == ("failed", "failed after 4 of 6 steps (PlantedError: planted)")
    else:
        assert (state, text) == ("interrupted", "interrupted after 4 of 6 steps")
    assert first.model_options["transformer_options"] == options
    assert torch.equal(hand_over(base, refiner)[0], before)


def test_latents_of_a_run_go_with_it(base, refiner, monkeypatch):
    legs, leg = [], hosted.engine("refiner_handoff").Leg
    real = leg.__init__
    monkeypatch.setattr(leg, "__init__", lambda self, *args: real(self, *args) or legs.append(weakref.ref(self)))
    gc.disable()
    try:
        hand_over(base, refiner)
        assert [one() for one in legs] == [None, None]
    finally:
        gc.enable()


# Memory.

GPU = torch.device("cpu", 0)
"""The CPU by its index: another device to the host, so it loads and offloads, but nothing really moves."""


@pytest.fixture
def on_gpu(base, refiner, monkeypatch):
    """The two models, used on one device and waiting on another; nothing is loaded."""
    comfy.model_management.current_loaded_models.clear()
    for patcher in (base, refiner):
        monkeypatch.setattr(patcher, "load_device", GPU)
    yield base, refiner
    comfy.model_management.unload_all_models()


def loaded():
    return [one.model.model for one in comfy.model_management.current_loaded_models]


@pytest.mark.parametrize("has_room", [False, True])
def test_the_base_is_released_before_the_refiner_is_loaded_if_both_do_not_fit(
    has_room, on_gpu, monkeypatch, last_lines
):
    base, refiner = on_gpu
    before = []
    monkeypatch.setattr(hosted.engine("host.machine"), "has_room", lambda *args: before.append(loaded()) or has_room)
    samples, _ = hand_over(base, refiner)
    assert before == [[base.model]]
    assert (refiner.model in loaded(), base.model in loaded()) == (True, has_room)
    assert ("the base was taken off the device first" in last_lines("9")[0][1]) == (not has_room)
    assert relative(samples, by_hand(base, refiner, 6, 4)[0]) < 1e-5


def test_nothing_is_released_where_weights_have_no_other_place(base, refiner, monkeypatch, last_lines):
    monkeypatch.setattr(hosted.engine("host.machine"), "has_room", lambda *args: False)
    hand_over(base, refiner)
    assert base.model in loaded()
    assert last_lines("9") == [("active", "4 + 2 steps, handed over at timestep 200")]


def test_two_models_of_the_same_weights_are_not_released(on_gpu, monkeypatch, last_lines):
    base, _ = on_gpu
    monkeypatch.setattr(hosted.engine("host.machine"), "has_room", lambda *args: False)
    hand_over(base, base.clone())
    assert last_lines("9") == [("active", "4 + 2 steps, handed over at timestep 200")]


def test_there_is_room_for_the_weights_that_are_not_loaded_yet_and_the_sampling(refiner, monkeypatch):
    host, has_room = comfy.model_management, hosted.engine("host.machine").has_room
    shape = torch.Size((1, 4, 128, 128))
    needed = max(host.minimum_inference_memory(), refiner.memory_required([2, 4, 128, 128]))
    for loaded in (0, refiner.model_size()):
        monkeypatch.setattr(type(refiner), "loaded_size", lambda self, loaded=loaded: loaded)
        in_all = needed + 1.1 * (refiner.model_size() - loaded)
        for free in (0.99 * in_all, 1.3 * in_all + host.extra_reserved_memory()):
            monkeypatch.setattr(host, "get_free_memory", lambda *args, free=free: free)
            assert has_room(refiner, shape) == (free > in_all)
