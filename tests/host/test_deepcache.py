"""DeepCache in the real host: exactness, agreement with the DeepCache package, and everything it meets."""

from __future__ import annotations

import itertools

import comfy.hooks
import comfy.model_management
import comfy.samplers
import hosted
import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, add_wrapper_with_key
from hosted import CONFIGS, Counter, add_core_freeu, controlnet, prompt, run_node, sample, with_control

every_family = pytest.mark.parametrize("family", list(CONFIGS))


MODEL = "SD15"
"""All of its blocks: each is a branch."""


def deepcache(patcher, **values):
    return run_node("SlipstreamDeepCache", patcher, "1", **values)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# The partial forward against the host's own.


def call(patcher, control=None, patches=None, seed=0):
    """One call of the real UNet, with fresh copies of what the host hands over."""
    unet, config = patcher.model.diffusion_model, patcher.model.model_config.unet_config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    context = torch.randn(2, 8, config["context_dim"], generator=generator)
    y = torch.randn(2, config["adm_in_channels"], generator=generator) if config["adm_in_channels"] else None
    control = None if control is None else {name: list(values) for name, values in control.items()}
    options = {"patches": patches or {}, "cond_or_uncond": [1, 0], "uuids": ["a", "b"]}
    # As a wrapper gets it: standing at itself, the host's forward next.
    executor = WrapperExecutor.new_class_executor(unet._forward, unet, [None])
    return hosted.engine("model.unet").HostUNetCall(
        executor, x, torch.tensor([500.0, 500.0]), context, y, control, options, {}, torch.Size((1, 4, 16, 16)), {}
    )


def residuals(patcher):
    """What a ControlNet adds to each block, of the shapes that this UNet has, in the host's order."""
    shapes, generator = [], torch.Generator().manual_seed(3)
    unet = patcher.model.diffusion_model
    handles = [b[-1].register_forward_hook(lambda m, a, o: shapes.append(o.shape)) for b in unet.input_blocks]
    call(patcher).full()
    for handle in handles:
        handle.remove()
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return {"output": made, "middle": [torch.randn(shapes[-1], generator=generator)]}


def everything(patcher):
    """A patch of each kind, all of which write in place where core's nodes do."""

    def output_block(h, skip, options):
        h[:, : h.shape[1] // 2] *= 1.1
        return h, skip * 0.9

    return {
        "input_block_patch": [lambda h, options: h * 1.01],
        "input_block_patch_after_skip": [lambda h, options: h * 0.99],
        "output_block_patch": [output_block],
        "emb_patch": [lambda emb, channels, options: emb + 0.01],
        "attn2_patch": [lambda q, k, v, options: (q, k * (1 + options["transformer_index"] / 50), v)],
    }


@pytest.mark.parametrize(
    ("family", "surroundings"),
    [
        *itertools.product(CONFIGS, ["both"]),
        *itertools.product(["SD15"], ("plain", "control", "patches")),
        *(pytest.param(family, "plain", marks=pytest.mark.long) for family in CONFIGS if family != "SD15"),
    ],
)
@torch.inference_mode()
def test_partial_on_features_of_the_same_input_is_the_full_forward(family, surroundings):
    patcher = hosted.model(family)
    control = residuals(patcher) if surroundings in ("control", "both") else None
    patches = everything(patcher) if surroundings in ("patches", "both") else None
    plain, _ = call(patcher, control, patches).full()
    for branch in range(len(patcher.model.diffusion_model.input_blocks)):
        output, deep = call(patcher, control, patches).full(branch)
        assert torch.equal(output, plain)
        assert torch.equal(call(patcher, control, patches).partial(branch, deep), plain), f"branch {branch}"


@torch.inference_mode()
def test_patches_see_the_same_block_and_transformer_index_on_partial_calls(model):
    def seen(run):
        positions = []

        def attn2(q, k, v, options):
            positions.append((options["block"], options["transformer_index"], options["original_shape"]))
            return q, k, v

        run({"attn2_patch": [attn2]})
        return positions

    full = seen(lambda patches: call(model, None, patches).full())
    _, deep = call(model).full(4)
    partial = seen(lambda patches: call(model, None, patches).partial(4, deep))
    ran = [("input", i) for i in range(5)] + [("output", i) for i in range(7, 12)]
    assert partial == [position for position in full if position[0] in ran]
    assert partial


# Steps.


def test_a_full_step_has_the_bits_of_an_uncached_evaluation(model):
    compared = []

    def compare(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        output = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        bare = {name: value for name, value in transformer_options.items() if name != "wrappers"}
        uncached = executor.class_obj._apply_model(x, t, c_concat, c_crossattn, control, bare, **kwargs)
        compared.append(torch.equal(output, uncached))
        return output

    patcher = deepcache(model, cache_interval=3)
    patcher.add_wrapper_with_key("apply_model", "test", compare)
    sample(patcher, steps=9)
    assert compared == [True, False, False] * 3


@every_family
@pytest.mark.parametrize("branch", [0, 3])
def test_the_verdict_is_what_hooks_on_the_blocks_count(family, branch, last_lines):
    patcher = hosted.model(family)
    depth = len(patcher.model.diffusion_model.input_blocks)
    with Counter(patcher) as counted:
        sample(deepcache(patcher, cache_interval=3, cache_branch_id=branch), steps=7)
    full, partial = 3, 4
    assert counted.unet_calls == full + partial
    for i in range(depth):
        assert counted.blocks[f"input{i}"] == full + (partial if i <= branch else 0)
        assert counted.blocks[f"output{i}"] == full + (partial if i >= depth - 1 - branch else 0)
    assert counted.blocks["middle"] == full
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert text == (
        f"reused the deep features in 4 of 7 steps: 4 of 7 UNet calls ran {2 * (branch + 1)} of {2 * depth + 1} blocks"
    )


@pytest.mark.parametrize(
    ("sampler", "full", "calls"),
    [
        ("euler", 3, 8),
        ("dpmpp_2m", 3, 8),
        # Two evaluations a step but the last, at the next step's sigma: step 0 has one, 3 and 6 have two.
        ("heun", 1 + 2 + 2, 15),
        # Two evaluations a step but the last, the second between the sigmas: 0, 3 and 6 have two.
        ("dpm_2", 2 + 2 + 2, 15),
        ("euler_ancestral", 3, 8),
        ("uni_pc", 3, 8),
        ("ddim", 3, 8),
        ("euler_cfg_pp", 3, 8),
    ],
)
def test_a_step_is_full_or_cached_as_a_whole_however_often_it_evaluates(sampler, full, calls, model):
    with Counter(model) as counted:
        out = sample(deepcache(model, cache_interval=3), steps=8, sampler=sampler)
    assert counted.unet_calls == calls
    assert counted.blocks["middle"] == full
    assert out.isfinite().all()


def test_dpm_adaptive_chooses_its_own_sigmas_and_is_placed_on_the_list_it_was_given(model, last_lines):
    with Counter(model) as counted:
        out = sample(deepcache(model, cache_interval=3), steps=6, sampler="dpm_adaptive")
    cached = counted.unet_calls - counted.blocks["middle"]
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert f"{cached} of {counted.unet_calls} UNet calls" in text
    assert cached
    assert out.isfinite().all()


def test_a_restart_back_to_an_earlier_step_never_finds_features_of_a_later_one(model):
    """A restarting sampler goes back from step 5 to step 4 (a cached one), and on from there."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)

    def restarting(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for step in (0, 1, 2, 3, 4, 5, 4, 5, 1, 2):
            before = counted.blocks.get("middle", 0)
            denoiser(x, sigmas[step] * ones, **extra_args)
            ran_full.append((step, counted.blocks.get("middle", 0) > before))
        return x

    ran_full: list[tuple[int, bool]] = []
    with Counter(model) as counted:
        hosted.sample_by_hand(deepcache(model, cache_interval=3), restarting, sigmas)
    first = [(0, True), (1, False), (2, False), (3, True), (4, False), (5, False)]
    # Back at 4 the features are those of 3, as before; back at 1 they are of 3, later than 1: full again.
    assert ran_full == [*first, (4, False), (5, False), (1, True), (2, False)]


def test_steps_outside_the_range_are_full(model, last_lines):
    sigma = model.get_model_object("model_sampling").percent_to_sigma
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 10)
    in_range = sum(sigma(0.7) <= s <= sigma(0.3) for s in sigmas[:-1].tolist())
    with Counter(model) as counted:
        sample(deepcache(model, cache_interval=10, start_percent=0.3, end_percent=0.7), steps=10)
    assert counted.blocks["middle"] == 10 - (in_range - 1)
    run = deepcache(model, cache_interval=10, start_percent=0.4, end_percent=0.5)
    sample(run, steps=4)
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert "0 of this run's steps lie between start_percent 0.4 and end_percent 0.5" in text


def test_quadratic_has_as_many_full_steps_as_uniform_at_other_places(model):
    counts = {}
    images = {}
    for schedule in ("uniform", "quadratic"):
        with Counter(model) as counted:
            images[schedule] = sample(deepcache(model, cache_interval=5, schedule=schedule), steps=20)
        counts[schedule] = counted.blocks["middle"]
    assert counts == {"uniform": 4, "quadratic": 4}
    assert not torch.equal(images["uniform"], images["quadratic"])


def test_one_step_saves_nothing_and_says_why(model, last_lines):
    plain = sample(model, steps=1)
    assert torch.equal(sample(deepcache(model), steps=1), plain)
    ((state, text),) = last_lines("1")
    assert (state, text.split(":")[0]) == ("inert", "reused nothing")


# Against an independent implementation.


def in_diffusers(patcher):
    """The same weights in diffusers' UNet, through the host's own table of names."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    config = patcher.model.model_config.unet_config
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=[config["model_channels"] * mult for mult in config["channel_mult"]],
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=config["context_dim"],
        attention_head_dim=8,
    )
    weights = patcher.model.diffusion_model.state_dict()
    named = {theirs: weights[ours] for theirs, ours in comfy.utils.unet_to_diffusers(config).items() if ours in weights}
    unet.load_state_dict(named, strict=True)
    return unet.eval()


@pytest.mark.parametrize(
    ("interval", "branch"),
    [
        *((2, 0), (3, 1), (4, 10)),
        *(pytest.param(*both, marks=pytest.mark.long) for both in ((3, 0), (5, 2), (3, 4), (2, 7))),
    ],
)
@torch.inference_mode()
def test_a_whole_run_agrees_with_the_deepcache_package(interval, branch, model):
    from types import SimpleNamespace

    from DeepCache import DeepCacheSDHelper

    steps, cfg = 12, 5.0
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    timesteps = sampling.timestep(sigmas[:-1]).float()
    unet = in_diffusers(model)
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=timesteps.tolist()))
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    positive, negative = prompt(model, 10), prompt(model, 11)
    context = torch.cat([positive[0][0], negative[0][0]])
    noise = comfy.sample.prepare_noise(hosted.latent(model), 1)
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), max_denoise=True)
    for i in range(steps):
        scaled = (x / (sigmas[i] ** 2 + 1) ** 0.5).repeat(2, 1, 1, 1)
        eps = unet(scaled, timesteps[i], encoder_hidden_states=context).sample
        guided = eps[1:] + cfg * (eps[:1] - eps[1:])
        x = x + guided * (sigmas[i + 1] - sigmas[i])
    theirs = x / model.model.latent_format.scale_factor
    ours = sample(
        deepcache(model, cache_interval=interval, cache_branch_id=branch), positive, negative, steps=steps, cfg=cfg
    )
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(sample(model, positive, negative, steps=steps, cfg=cfg), theirs) > 1e-3


# What it meets.


def apart(patcher, every=1):
    """Make the host run conditions one by one, as it does where memory is short; from time to time if `every` > 1."""
    calls = 0

    def memory_required(*args, **kwargs):
        nonlocal calls
        calls += 1
        return 1e30 if calls % every == 0 else 0

    patcher.model.memory_required = memory_required
    return patcher


def test_cond_and_uncond_apart_or_in_batches_that_change(model, last_lines):
    expected = sample(deepcache(model), steps=9)
    for every in (1, 2, 3, 5):
        out = sample(deepcache(apart(hosted.model("SD15"), every)), steps=9)
        assert relative_error(out, expected) < 1e-5
        assert "in 6 of 9 steps" in last_lines("1")[0][1]


def test_batches(model):
    """Each image of a batch is what it is alone, from the same noise."""
    together = sample(deepcache(model), image=hosted.latent(model, batch=3))
    noise = comfy.sample.prepare_noise(hosted.latent(model, batch=3), 1)
    for i in range(3):
        alone = sample(deepcache(model), noise=noise[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-5


def regional(patcher):
    left, right = prompt(patcher, 20, area=(16, 8, 0, 0), strength=1.0), prompt(patcher, 21, area=(16, 8, 0, 8))
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    masked = prompt(patcher, 22, mask=mask, mask_strength=0.7)
    return left + right + masked + prompt(patcher, 23, strength=0.3)


def test_regional_prompts_each_keep_their_own_features(last_lines):
    """The negative gets copies of the regions with their uuids: batched or apart, none may take another's."""
    model = hosted.model("SD15")
    together = sample(deepcache(model), regional(model), steps=9)
    assert "in 6 of 9 steps" in last_lines("1")[0][1]
    other = apart(hosted.model("SD15"))
    assert relative_error(sample(deepcache(other), regional(other), steps=9), together) < 1e-5
    exact = sample(model, regional(model), steps=9)
    assert 1e-4 < relative_error(together, exact) < 0.2


def test_a_condition_that_begins_on_a_cached_step_runs_in_full_there(model, last_lines):
    late = prompt(model, 30, start_percent=0.5, end_percent=1.0)
    with Counter(model) as counted:
        out = sample(deepcache(model, cache_interval=3), prompt(model, 10) + late, steps=8)
    assert out.isfinite().all()
    # 0, 3 and 6 by schedule, 4 since the condition begins there.
    assert counted.blocks["middle"] == 4
    assert "in 4 of 8 steps" in last_lines("1")[0][1]


@pytest.mark.parametrize("both", [True, False], ids=["on both prompts", "on the positive"])
def test_controlnet_acts_on_every_step(both, model):
    control = controlnet(model)
    positive = with_control(prompt(model, 10), control, both=both)
    negative = with_control(prompt(model, 11), control, both=True) if both else prompt(model, 11)
    controlled = sample(deepcache(model), positive, negative)
    assert not torch.equal(controlled, sample(deepcache(model)))
    calls = []
    hook = control.control_model.register_forward_hook(lambda *_: calls.append(1))
    sample(deepcache(model), positive, negative, steps=6)
    hook.remove()
    assert len(calls) >= 6


def test_ipadapter_like_attention_replacement_runs_on_every_executed_block(model):
    seen = []

    def attn2(q, k, v, options):
        seen.append(options["block"])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 1.05

    patched = model.clone()
    for block in (("input", 1), ("middle", 0), ("output", 11)):
        patched.set_model_attn2_replace(attn2, *block)
    sample(deepcache(patched, cache_interval=3), steps=6)
    assert seen.count(("output", 11)) == 6
    assert seen.count(("middle", 0)) == seen.count(("input", 1)) == 2


def test_lora_by_hooks_on_one_prompt(last_lines):
    """Weights that change between the conditions of one evaluation: each keeps its own features."""
    model = hosted.model("SD15")
    weights = {}
    for key, weight in model.model.diffusion_model.state_dict().items():
        if key.endswith("to_q.weight"):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            generator = torch.Generator().manual_seed(4)
            weights[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            weights[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3

    def hooked():
        hooks = comfy.hooks.create_hook_lora(weights, 1.0, 1.0)
        return prompt(model, 10, hooks=hooks)

    exact, plain = sample(model, hooked(), steps=9), sample(model, steps=9)
    assert relative_error(exact, plain) > 1e-3
    cached = sample(deepcache(model), hooked(), steps=9)
    assert "in 6 of 9 steps" in last_lines("1")[0][1]
    assert relative_error(cached, exact) < relative_error(cached, plain)
    assert torch.equal(sample(model, steps=9), plain)


def test_inpainting_masks(model):
    image = torch.randn(1, 4, 16, 16)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    out = sample(deepcache(model), image=image, noise_mask=mask)
    assert torch.allclose(out[..., 8:], image[..., 8:], atol=1e-4)
    assert not torch.allclose(out[..., :8], image[..., :8], atol=1e-1)


@pytest.mark.parametrize("core", ["FreeU", "FreeU_V2"])
def test_core_freeu_writes_into_what_it_gets_and_must_not_reach_the_kept_features(core, model):
    """At a branch whose features core's FreeU changes: twice the factor would show at once."""
    patched = add_core_freeu(model, core, b1=1.5, b2=1.6)
    exact = sample(patched, steps=4)
    out = sample(deepcache(patched, cache_interval=4, cache_branch_id=5), steps=4)
    assert relative_error(out, exact) < 0.5 * relative_error(sample(model, steps=4), exact)


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_core_caches_are_refused_wherever_they_are_wired(name, model, last_lines):
    from comfy_extras import nodes_easycache

    core = getattr(nodes_easycache, f"{name}Node")
    values = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    with pytest.raises(RuntimeError, match=rf"DeepCache.*{name}"):
        deepcache(core.execute(model, **values).result[0])
    above = core.execute(deepcache(model), **values).result[0]
    with pytest.raises(RuntimeError, match=rf"DeepCache.*{name}.*node 1"):
        sample(above)
    ((state, text),) = last_lines("1")
    assert state == "failed"
    assert name in text


def test_a_diffusion_transformer_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"the model is AuraFlow.*Use Forecast"):
        deepcache(hosted.model("DiT"))


@every_family
def test_too_deep_a_branch_names_the_maximum(family):
    patcher = hosted.model(family)
    depth = len(patcher.model.diffusion_model.input_blocks)
    sample(deepcache(patcher, cache_branch_id=depth - 1), steps=4)
    if depth < 12:
        with pytest.raises(ValueError, match=rf"cache_branch_id must be from 0 to {depth - 1}"):
            deepcache(patcher, cache_branch_id=depth)


def test_the_other_model_of_a_two_model_guider_is_left_alone(model):
    """DualModelGuider runs the negative on a second model under the first one's options."""
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this host has no DualModelGuider")
    guider = nodes_custom_sampler.Guider_DualModel(deepcache(model), hosted.model("SD15", seed=9))
    guider.set_conds(prompt(model, 10), prompt(model, 11))
    guider.set_cfg(5.0)
    assert hosted.sample_with(guider).isfinite().all()


# Wrappers of other packs that run the UNet in parts.


def tiled(patcher, batched):
    """A MultiDiffusion-like wrapper: four tiles one by one, or in one call, tile by tile with all conditions."""

    def tiles_of(x):
        return [x[..., :8, :8], x[..., :8, 8:], x[..., 8:, :8], x[..., 8:, 8:]]

    def joined(tiles):
        return torch.cat([torch.cat(tiles[:2], -1), torch.cat(tiles[2:], -1)], -2)

    def wrapper(apply_model, arguments):
        x, timestep, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        if not batched:
            return joined([apply_model(tile, timestep, **c) for tile in tiles_of(x)])
        c["c_crossattn"] = c["c_crossattn"].repeat(4, 1, 1)
        return joined(list(apply_model(torch.cat(tiles_of(x)), timestep.repeat(4), **c).chunk(4)))

    clone = patcher.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_tiles_never_take_the_features_of_other_tiles_or_conditions(batched, model, last_lines):
    """When the cutoff drops the negative, a batch of tiles has another order: its first cached step runs in full."""
    patcher = run_node("SlipstreamCFGCutoff", deepcache(tiled(model, batched)), "2", cutoff=0.5)
    with Counter(model) as counted:
        out = sample(patcher, steps=20)
    calls = 1 if batched else 4
    assert counted.unet_calls == 20 * calls
    assert counted.blocks["middle"] == (7 + batched) * calls
    exact = sample(run_node("SlipstreamCFGCutoff", tiled(model, batched), "2", cutoff=0.5), steps=20)
    whole = sample(model, steps=20)
    assert relative_error(out, exact) < 0.5 * relative_error(whole, exact)
    assert f"in {13 - batched} of 20 steps" in last_lines("1")[0][1]


def windowed(patcher, is_named):
    """An AnimateDiff-like wrapper: eight frames in two windows of four, which move by a frame with every evaluation."""
    evaluations = []

    def calc_cond_batch(executor, model, conds, x, timestep, model_options):
        evaluations.append(1)
        outputs = [torch.zeros_like(x) for _ in conds]
        frames = [(i + len(evaluations)) % 8 for i in range(8)]
        for window in (frames[:4], frames[4:]):
            options = {**model_options, "transformer_options": {**model_options["transformer_options"]}}
            if is_named:
                options["transformer_options"]["ad_params"] = {"sub_idxs": window}
            parts = executor(model, conds, x[window], timestep[window], options)
            for output, part in zip(outputs, parts, strict=True):
                output[window] = part
        return outputs

    clone = patcher.clone()
    clone.add_wrapper("calc_cond_batch", calc_cond_batch)
    return clone


@pytest.mark.parametrize("is_named", [True, False])
def test_windows_that_move_are_reused_for_the_same_frames_only(is_named, model, last_lines):
    patcher = windowed(deepcache(model, cache_interval=3), is_named)
    with Counter(model) as counted:
        out = sample(patcher, image=hosted.latent(model, batch=8), steps=6)
    # No window comes twice within three steps here: every call is a full one, and the node says why.
    assert counted.blocks["middle"] == counted.unet_calls == 12
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert "other conditions, windows or tiles" in text
    assert torch.equal(out, sample(windowed(model, is_named), image=hosted.latent(model, batch=8), steps=6))


def twice_a_call(patcher):
    """A wrapper such as Advanced-ControlNet's for references: put on the run when it begins, it runs the UNet on
    another latent first, and on the real one with what that gave."""

    def reading(executor, x, *args, **kwargs):
        return executor(x, *args, **kwargs) + 0.3 * executor(torch.ones_like(x), *args, **kwargs)

    def outer_sample(executor, *args, **kwargs):
        guider = executor.class_obj
        before, guider.model_options = guider.model_options, create_model_options_clone(guider.model_options)
        try:
            add_wrapper_with_key("diffusion_model", "test", reading, guider.model_options, is_model_options=True)
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before

    clone = patcher.clone()
    clone.add_wrapper("outer_sample", outer_sample)
    return clone


def test_a_pack_that_runs_the_unet_twice_a_call_may_be_wired_anywhere(model, last_lines):
    """Each of the two calls has features of its own, also where what runs it twice joins the run after us."""
    below = sample(deepcache(twice_a_call(model), cache_interval=3), steps=6)
    assert last_lines("1") == [
        ("active", "reused the deep features in 4 of 6 steps: 8 of 12 UNet calls ran 2 of 25 blocks")
    ]
    assert torch.equal(sample(twice_a_call(deepcache(model, cache_interval=3)), steps=6), below)
    exact = sample(twice_a_call(model), steps=6)
    assert relative_error(below, exact) < 0.5 * relative_error(sample(deepcache(model), steps=6), exact)


def test_wrappers_inside_stand_around_cached_calls_too(model):
    """Those that join each evaluation, after the run has begun."""
    seen = []

    def inside(executor, x, *args, **kwargs):
        seen.append(x.shape[0])
        return executor(x, *args, **kwargs) * 1.1

    def calc_cond_batch(executor, model, conds, x, timestep, model_options):
        options = create_model_options_clone(model_options)
        add_wrapper_with_key("diffusion_model", "test", inside, options, is_model_options=True)
        return executor(model, conds, x, timestep, options)

    wrapped = model.clone()
    wrapped.add_wrapper("calc_cond_batch", calc_cond_batch)
    sample(deepcache(wrapped, cache_interval=3), steps=6)
    assert seen == [2] * 6


def test_features_are_kept_only_as_long_as_they_can_be_used(model):
    """After the cutoff the negative's features go with the next full step."""
    kept = []

    def look(executor, *args, **kwargs):
        (run,) = executor.class_obj.model_options["transformer_options"]["wrappers"]["diffusion_model"]["slipstream"]
        output = executor(*args, **kwargs)
        kept.append(len(run.__self__.around_unet.features))
        return output

    patcher = run_node("SlipstreamCFGCutoff", deepcache(model, cache_interval=3), "2", cutoff=0.5)
    patcher.add_wrapper("predict_noise", look)
    sample(patcher, steps=12)
    assert kept == [2] * 6 + [1] * 6


def test_what_other_packs_put_in_place_of_the_hosts_functions_runs_on_cached_steps_too(model, monkeypatch):
    from comfy.ldm.modules.diffusionmodules import openaimodel

    calls, original = [], openaimodel.forward_timestep_embed
    monkeypatch.setattr(
        openaimodel, "forward_timestep_embed", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    sample(deepcache(model, cache_interval=3), steps=3)
    assert len(calls) == 25 + 2 + 2


def test_cores_whole_model_compile_is_refused_wherever_it_is_wired(model):
    """Its guards leave the transformer options out: the graph of a full step would serve a cached one."""

    def compiled(patcher):
        clone = patcher.clone()
        clone.model_options["torch_compile_kwargs"] = {"backend": "inductor"}  # what set_torch_compile_wrapper leaves
        return clone

    with pytest.raises(RuntimeError, match=r"DeepCache: ComfyUI's TorchCompileModel"):
        deepcache(compiled(model))
    with pytest.raises(RuntimeError, match=r"DeepCache: ComfyUI's TorchCompileModel.*node 1"):
        sample(compiled(deepcache(model)))
