"""CFG Cutoff in the real host: what is evaluated, the tail's bits, and every kind of guider and guidance."""

from __future__ import annotations

import comfy.samplers
import hosted
import pytest
import torch
from hosted import Counter, latent, prompt, run_node, sample, sample_with


def cutoff(patcher, value=0.5, unit="steps"):
    return run_node("SlipstreamCFGCutoff", patcher, "2", cutoff=value, unit=unit)


def unguided_from(patcher, step, steps):
    """The host's own cfg 1.0, from a step on."""
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", steps)

    def switch(executor, x, timestep, model_options, seed=None):
        guider = executor.class_obj
        kept, guider.cfg = guider.cfg, 1.0 if float(timestep[0]) <= float(sigmas[step]) else guider.cfg
        try:
            return executor(x, timestep, model_options, seed)
        finally:
            guider.cfg = kept

    clone = patcher.clone()
    clone.add_wrapper_with_key("predict_noise", "test", switch)
    return clone


@pytest.mark.parametrize("family", ["SD15", pytest.param("SDXL", marks=pytest.mark.long), "DiT"])
def test_at_half_of_20_steps_10_evaluations_run_on_the_positive_alone_and_the_tail_is_a_cfg_1_run(family, last_lines):
    patcher = hosted.model(family)
    rows = []
    module = patcher.model.diffusion_model
    hook = module.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    out = sample(cutoff(patcher), steps=20)
    hook.remove()
    assert rows == [2] * 10 + [1] * 10
    assert torch.equal(out, sample(unguided_from(patcher, 10, 20), steps=20))
    assert not torch.equal(out, sample(patcher, steps=20))
    ((state, text),) = last_lines("2")
    assert state == "active"
    assert text == (
        "no guidance from step 10 of 20: 10 of 20 evaluations ran on the positive alone, 30 of 40 predictions evaluated"
    )


@pytest.mark.parametrize(("value", "steps"), [(0.0, 6), (0.75, 6), (0.29, 7), (0.9, 3)])
def test_it_begins_at_step_int_of_cutoff_times_steps(value, steps, model):
    with Counter(model) as counted:
        sample(cutoff(model, value), steps=steps)
    first = int(value * steps)
    assert counted.rows == [2] * first + [1] * (steps - first)


def test_a_run_of_one_step_is_guided(model, last_lines):
    """Packs sample regions step by step, each step a run of its own."""
    with Counter(model) as counted:
        sample(cutoff(model, 0.75), steps=4, start_step=2, last_step=3)
        sample(cutoff(model, 0.0), steps=4, start_step=2, last_step=3)
    assert counted.rows == [2, 1]


def test_timesteps_cut_an_image_to_image_run_off_at_the_same_noise_level(model):
    full = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)
    threshold = model.get_model_object("model_sampling").percent_to_sigma(0.6)
    with Counter(model) as counted:
        sample(cutoff(model, 0.6, "timesteps"), steps=20)
    assert counted.rows == [2 if sigma > threshold else 1 for sigma in full[:-1].tolist()]
    with Counter(model) as counted:
        sample(cutoff(model, 0.6, "timesteps"), steps=8, denoise=0.4, image=torch.randn(1, 4, 16, 16))
    assert counted.rows == [1] * 8


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        # heun's second evaluation of step 2 is made at the sigma of step 3, the first unguided one.
        ("heun", [2] * 5 + [1] * 6),
        # dpm_2's lie between the sigmas, in their own step.
        ("dpm_2", [2] * 6 + [1] * 5),
        ("dpmpp_2m", [2] * 3 + [1] * 3),
        # An ancestral step aims below the next sigma, and its midpoint may lie there.
        ("dpmpp_2s_ancestral", [2] * 5 + [1] * 6),
        ("uni_pc", [2] * 3 + [1] * 3),
        ("euler_cfg_pp", [2] * 3 + [1] * 3),
        ("dpmpp_2m_cfg_pp", [2] * 3 + [1] * 3),
        ("euler_ancestral_cfg_pp", [2] * 3 + [1] * 3),
    ],
)
def test_samplers(sampler, rows, model):
    with Counter(model) as counted:
        out = sample(cutoff(model), steps=6, sampler=sampler)
    assert counted.rows == rows
    assert out.isfinite().all()


def test_cfg_plus_plus_samplers_find_the_positive_where_they_read_the_negative(model):
    """With guidance off, cfg++ and its ordinary sampler are one thing: from step 0 on, bit for bit."""
    for plus, ordinary in (("euler_cfg_pp", "euler"),):
        assert torch.allclose(
            sample(cutoff(model, 0.0), sampler=plus), sample(model, cfg=1.0, sampler=ordinary), rtol=1e-5, atol=1e-4
        )


def test_adaptive_samplers_are_cut_off_by_noise_level(model, last_lines):
    with Counter(model) as counted:
        out = sample(cutoff(model), steps=6, sampler="dpm_adaptive")
    assert set(counted.rows) == {1, 2}
    assert counted.rows[0] == 2
    assert out.isfinite().all()
    assert f"{counted.rows.count(1)} of {len(counted.rows)} evaluations" in last_lines("2")[0][1]


def test_a_restart_to_a_step_before_the_cutoff_is_guided_again(model, last_lines):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)

    def restarting(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for step in (0, 1, 2, 3, 4, 1, 2, 3, 5):
            denoiser(x, sigmas[step] * x.new_ones([x.shape[0]]), **extra_args)
        return x

    with Counter(model) as counted:
        hosted.sample_by_hand(cutoff(model), restarting, sigmas)
    assert counted.rows == [2, 2, 2, 1, 1, 2, 2, 1, 1]
    assert "4 of 9 evaluations ran on the positive alone" in last_lines("2")[0][1]


def perp_neg(patcher, neg_scale=1.0):
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guider = Guider_PerpNeg(patcher)
    guider.set_conds(prompt(patcher, 10), prompt(patcher, 11), prompt(patcher, 12))
    guider.set_cfg(5.0, neg_scale)
    return guider


def dual_cfg(patcher, nested=False):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    guider = Guider_DualCFG(patcher)
    guider.set_conds(prompt(patcher, 10), prompt(patcher, 12), prompt(patcher, 11))
    guider.set_cfg(5.0, 3.0, nested)
    return guider


GUIDERS = {
    "PerpNeg": perp_neg,
    "DualCFG": dual_cfg,
    "nested DualCFG": lambda patcher: dual_cfg(patcher, nested=True),
}


@pytest.mark.parametrize("name", list(GUIDERS))
def test_guiders_with_three_prompts(name, model, last_lines):
    with Counter(model) as counted:
        out = sample_with(GUIDERS[name](cutoff(model)), steps=6)
    assert counted.rows == [3] * 3 + [1] * 3
    assert out.isfinite().all()
    assert "12 of 18 predictions evaluated" in last_lines("2")[0][1]
    # Whatever the guider, with guidance off it is the positive alone.
    unguided = sample_with(GUIDERS[name](cutoff(model, 0.0)), steps=6)
    assert torch.equal(unguided, sample(model, cfg=1.0))
    assert "6 of 18 predictions evaluated" in last_lines("2")[0][1]


def test_the_second_model_of_a_two_model_guider_is_not_evaluated_past_the_cutoff(model):
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this host has no DualModelGuider")
    other = hosted.model("SD15", seed=9)
    guider = nodes_custom_sampler.Guider_DualModel(cutoff(model), other)
    guider.set_conds(prompt(model, 10), prompt(model, 11))
    guider.set_cfg(5.0)
    with Counter(other) as negative, Counter(model) as positive:
        sample_with(guider, steps=6)
    assert (positive.unet_calls, negative.unet_calls) == (6, 3)


def test_the_old_perpneg_node_divides_by_nothing(model, last_lines):
    from comfy_extras.nodes_perpneg import PerpNeg

    patched = PerpNeg.execute(model, prompt(model, 12), 1.0).result[0]
    with Counter(model) as counted:
        out = sample(cutoff(patched), steps=6)
    assert out.isfinite().all()
    assert sum(counted.rows) == 3 * 3 + 3
    assert "12 of 18 predictions evaluated" in last_lines("2")[0][1]


def test_regional_prompts_keep_all_their_regions(model, last_lines):
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    positive = prompt(model, 20, area=(16, 8, 0, 0)) + prompt(model, 21, mask=mask) + prompt(model, 22)
    patched = model.clone()
    patched.model.memory_required = lambda *a, **k: 1e30  # one by one, so that calls can be counted
    with Counter(model) as counted:
        out = sample(cutoff(patched), positive, steps=4)
    guided = counted.unet_calls - 2 * 3
    assert guided % 2 == 0
    assert guided // 2 > 3
    assert torch.equal(out, sample(unguided_from(patched, 2, 4), positive, steps=4))
    assert f"{counted.unet_calls} of {2 * guided} predictions evaluated; up to 3 predictions" in last_lines("2")[0][1]


def test_conditions_outside_their_timesteps_are_not_counted_as_saved(model, last_lines):
    early, late = (
        prompt(model, 20, start_percent=0.0, end_percent=0.5),
        prompt(model, 21, start_percent=0.5, end_percent=1.0),
    )
    model.model.memory_required = lambda *a, **k: 1e30
    with Counter(model) as stock:
        sample(model, early + late, steps=6)
    with Counter(model) as counted:
        sample(cutoff(model, 0.0), early + late, steps=6)
    assert f"{counted.unet_calls} of {stock.unet_calls} predictions evaluated" in last_lines("2")[0][1]


def test_what_another_pack_has_in_place_of_the_hosts_sampling_function_is_what_evaluates(model, monkeypatch):
    """AnimateDiff-Evolved's own sets up each evaluation, tells its other wrappers, and has a cfg of its own."""
    told, host = [], comfy.samplers

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None):
        options = {**model_options, "transformer_options": {**model_options["transformer_options"], "told": True}}
        cond_pred, uncond_pred = host.calc_cond_batch(model, [cond, uncond], x, timestep, options)
        return uncond_pred + (cond_pred - uncond_pred) * 7.0

    def calc_cond_batch(executor, model, conds, x, timestep, model_options):
        told.append((model_options["transformer_options"]["told"], conds[1] is not None))
        return executor(model, conds, x, timestep, model_options)

    patched = model.clone()
    patched.add_wrapper("calc_cond_batch", calc_cond_batch)
    unguided = sample(model, cfg=1.0)
    monkeypatch.setattr(comfy.samplers, "sampling_function", sampling_function)
    sample(cutoff(patched))
    assert told == [(True, True)] * 3 + [(True, False)] * 3
    assert torch.equal(sample(cutoff(patched, 0.0)), unguided)


def test_functions_after_guidance_may_write_into_what_they_get(model):
    """As in the host, each slot is a tensor of its own."""
    differences = []

    def write(args):
        args["cond_denoised"].add_(1.0)
        differences.append((args["cond_denoised"] - args["uncond_denoised"]).abs().max().item())
        return args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(write)
    out = sample(cutoff(patched, 0.0))
    assert torch.equal(out, sample(model, cfg=1.0))
    assert min(differences) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("reason", ["cfg 1.0", "basic guider", "two models, cfg 1.0"])
def test_a_run_that_is_not_guided_anyway_is_inert_and_untouched(reason, model, last_lines):
    if reason == "cfg 1.0":
        out, expected = sample(cutoff(model), cfg=1.0), sample(model, cfg=1.0)
    elif reason == "two models, cfg 1.0":
        from comfy_extras import nodes_custom_sampler

        if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
            pytest.skip("this host has no DualModelGuider")

        def two_models(patcher):
            guider = nodes_custom_sampler.Guider_DualModel(patcher, hosted.model("SD15", seed=9))
            guider.set_conds(prompt(patcher, 10), prompt(patcher, 11))
            guider.set_cfg(1.0)
            return sample_with(guider)

        out, expected = two_models(cutoff(model)), two_models(model)
    else:
        from comfy_extras.nodes_custom_sampler import Guider_Basic

        def basic(patcher):
            guider = Guider_Basic(patcher)
            guider.set_conds(prompt(patcher, 10))
            return sample_with(guider)

        out, expected = basic(cutoff(model)), basic(model)
    assert torch.equal(out, expected)
    ((state, text),) = last_lines("2")
    assert state == "inert"
    assert "not guided anyway" in text


def test_a_run_that_ends_before_the_cutoff_says_so(model, last_lines):
    """The first of two samplers that share the steps of one run, by timesteps."""
    sample(cutoff(model, 0.8, "timesteps"), steps=10, last_step=5)
    ((state, text),) = last_lines("2")
    assert state == "inert"
    assert "the cutoff, at 80% of the timesteps, was not reached" in text


def test_a_batch_of_images(model):
    images = latent(model, batch=3)
    with Counter(model) as counted:
        sample(cutoff(model), image=images, steps=4)
    assert counted.rows == [6, 6, 3, 3]
