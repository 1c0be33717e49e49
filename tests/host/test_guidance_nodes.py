"""CFG Cutoff with every node of the host that has a part in guidance, and with other packs' functions of each kind.

Past the cutoff each evaluation is held against the positive's prediction at that very latent, by the relative error.
"""

from __future__ import annotations

import functools

import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401 - before nodes_latent, which needs it in a circle
import hosted
import pytest
import torch
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_eps,
    nodes_fresca,
    nodes_latent,
    nodes_lt,
    nodes_lumina2,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_nag,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_slg,
    nodes_tcfg,
    nodes_video_model,
)
from hosted import Counter, prompt, relative_error, run_node, sample

STEPS = 4
TOLERANCE = 1e-5

NEEDS_THE_NEGATIVE = {
    "APG": lambda m: nodes_apg.APG.execute(m, 1.0, 5.0, 0.0).result[0],
    "APG with momentum": lambda m: nodes_apg.APG.execute(m, 0.5, 5.0, 0.9).result[0],
    "APG with lasting momentum": lambda m: nodes_apg.APG.execute(m, 1.0, 0.0, 1.0).result[0],
    "CFGNorm pre_cfg": lambda m: nodes_cfg.CFGNorm.execute(m, 1.0, pre_cfg=True).result[0],
    "CFGZeroStar": lambda m: nodes_cfg.CFGZeroStar.execute(m).result[0],
    "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 2).result[0],
    "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m).result[0],
    "NAGuidance": lambda m: nodes_nag.NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0],
    "PerpNeg": lambda m: nodes_perpneg.PerpNeg.execute(m, prompt(m, 12), 1.0).result[0],
    "RenormCFG": lambda m: nodes_lumina2.RenormCFG.execute(m, 100.0, 1.0).result[0],
    "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
    "SelfAttentionGuidance": lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0).result[0],
    "SkipLayerGuidanceDiTSimple": lambda m: nodes_slg.SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "0", "1").result[
        0
    ],
    "TCFG": lambda m: nodes_tcfg.TCFG.execute(m).result[0],
    "VideoLinearCFGGuidance": lambda m: nodes_video_model.VideoLinearCFGGuidance().patch(m, 2.0)[0],
    "VideoTriangleCFGGuidance": lambda m: nodes_video_model.VideoTriangleCFGGuidance().patch(m, 2.0)[0],
}
"""By the name of the node's class, and a setting."""

GOES_ON = {
    "CFGNorm": lambda m: nodes_cfg.CFGNorm.execute(m, 0.9).result[0],
    "EpsilonScaling": lambda m: nodes_eps.EpsilonScaling.execute(m, 1.05).result[0],
    "PerturbedAttentionGuidance": lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0).result[0],
    "SkipLayerGuidanceDiT": lambda m: nodes_slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "0", "1", 0.5).result[0],
    "TemporalScoreRescaling": lambda m: nodes_eps.TemporalScoreRescaling.execute(m, 0.9, 1.0).result[0],
    "LTXVSpatioTemporalGuidance": lambda m: nodes_lt.LTXVSpatioTemporalGuidance.execute(m, 1.0, "0", 0.0, 1.0).result[
        0
    ],
    "LTXVModalityGuidance": lambda m: nodes_lt.LTXVModalityGuidance.execute(m, 3.0, 0.0, 1.0).result[0],
}
"""Needs the positive alone, or is no guidance."""

OPERATIONS = {
    "sharpen": lambda: nodes_latent.LatentOperationSharpen.execute(3, 1.0, 0.5).result[0],
    "tonemap": lambda: nodes_latent.LatentOperationTonemapReinhard.execute(1.0).result[0],
}

ON_TRANSFORMERS = ("SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "NAGuidance")


MODEL = "tiniest"


@functools.cache
def model_for(name):
    return hosted.model("DiT" if name in ON_TRANSFORMERS else MODEL)


def cutoff(patcher, value=0.5, unit="steps"):
    return run_node("SlipstreamCFGCutoff", patcher, "2", cutoff=value, unit=unit)


def evaluations(patcher, cfg=5.0, size=8, first=0):
    """What each step's evaluation comes to, at latents that do not depend on those before: [(B, C, H, W), ...]."""
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", STEPS)[first:]
    found = []

    def sampler(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for step, sigma in enumerate(sigmas[:-1]):
            generator = torch.Generator().manual_seed(step)
            at = torch.randn(x.shape, generator=generator) * sigma
            found.append(denoiser(at, sigma * x.new_ones([x.shape[0]]), **extra_args).clone())
        return x

    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(prompt(patcher, 10), prompt(patcher, 11))
    guider.set_cfg(cfg)
    image = hosted.latent(patcher, size)
    with torch.inference_mode():
        guider.sample(torch.zeros_like(image), image, comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True)
    return found


def errors(found, expected):
    return [relative_error(one, other) for one, other in zip(found, expected, strict=True)]


SCENES = {
    "from the first step on": lambda m: (evaluations(cutoff(m, 0.0)), 0, 0),
    "from the middle on": lambda m: (evaluations(cutoff(m)), 2, 0),
    # As an image-to-image run at denoise 0.3: it begins below the cutoff.
    "by timesteps, all of it past": lambda m: (evaluations(cutoff(m, 0.5, "timesteps"), first=3), 0, 3),
    "after a guided run at another size": lambda m: (
        (evaluations(m, size=12), evaluations(cutoff(m, 0.0)))[1],
        0,
        0,
    ),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", NEEDS_THE_NEGATIVE)
def test_what_needs_the_negative_is_left_out_and_named(name, scene, last_lines):
    model = model_for(name.split()[0])
    patched = NEEDS_THE_NEGATIVE[name](model)
    found, begins, first = SCENES[scene](patched)
    positive = evaluations(model, cfg=1.0, first=first)
    assert max(errors(found[begins:], positive[begins:])) < TOLERANCE
    # Up to there it is what it is without CFG Cutoff.
    guided = evaluations(NEEDS_THE_NEGATIVE[name](model), first=first)
    assert all(map(torch.equal, found[:begins], guided[:begins]))
    assert max(errors(guided, positive)) > 1e-2
    ((state, text),) = last_lines("2")
    assert state == "active"
    assert text.endswith(f"; left out with the guidance: {name.split()[0]}")


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", GOES_ON)
def test_what_needs_the_positive_alone_or_is_no_guidance_goes_on(name, scene, last_lines):
    model = model_for(name)
    found, begins, first = SCENES[scene](GOES_ON[name](model))
    # The host's own cfg 1.0, bit for bit.
    expected = evaluations(GOES_ON[name](model), cfg=1.0, first=first)
    assert all(map(torch.equal, found[begins:], expected[begins:]))
    if not name.startswith("LTXV"):  # which change what other models do not have
        assert max(errors(expected, evaluations(model, cfg=1.0, first=first))) > 1e-3
    assert "left out" not in last_lines("2")[0][1]


@pytest.mark.parametrize("name", OPERATIONS)
def test_latent_operations_go_on(name, model, last_lines):
    operation = OPERATIONS[name]()
    patched = nodes_latent.LatentApplyOperationCFG.execute(model, operation).result[0]
    found, positive = evaluations(cutoff(patched)), evaluations(model, cfg=1.0)
    assert max(errors(evaluations(patched), evaluations(model))) > 1e-2
    # Of a difference that is zero: what the operation makes of it, added to the positive.
    for one, at in zip(found[2:], positive[2:], strict=True):
        assert torch.equal(one, operation(latent=torch.zeros_like(at)) + at)
    assert "left out" not in last_lines("2")[0][1]


def test_sag_evaluates_nothing_past_the_cutoff(model, last_lines):
    patched = NEEDS_THE_NEGATIVE["SelfAttentionGuidance"](model)
    with Counter(model) as counted:
        sample(cutoff(patched), steps=STEPS)
    assert counted.rows == [2, 1] * 2 + [1] * 2
    assert "8 of 12 predictions evaluated; left out" in last_lines("2")[0][1]


def test_what_goes_on_does_so_beside_what_is_left_out(model, last_lines):
    both = GOES_ON["EpsilonScaling"](NEEDS_THE_NEGATIVE["SelfAttentionGuidance"](model))
    found = evaluations(cutoff(both, 0.0))
    expected = evaluations(GOES_ON["EpsilonScaling"](model), cfg=1.0)
    assert max(errors(found, expected)) < TOLERANCE
    assert last_lines("2")[0][1].endswith("left out with the guidance: SelfAttentionGuidance")


# Functions of other packs, each of a kind.


class KeptOnItself:
    """Momentum in an attribute, changed in place."""

    def __init__(self):
        self.average = None

    def __call__(self, args):
        difference = args["cond_denoised"] - args.get("uncond_denoised")
        if self.average is None or self.average.shape != difference.shape:
            self.average = difference.clone()
        return args["denoised"] + self.average.mul_(0.9).add_(difference)


def kept_in_a_dict():
    kept = {}

    def before(args):
        cond, uncond = args["conds_out"]
        if "before" in kept and kept["before"].shape == cond.shape:
            cond, kept["before"] = cond + 0.5 * kept["before"], cond - uncond
        else:
            kept["before"] = cond - uncond
        return [cond, uncond]

    return before


def kept_in_the_negatives_slot():
    kept = []

    def before(args):
        kept[:] = [*kept, args["conds_out"][1] * 0.5] if args["conds"][1] is not None else kept
        same = [one for one in kept if one.shape == args["conds_out"][1].shape]
        return [args["conds_out"][0], args["conds_out"][1] + sum(same)]

    return before


def divides(args):
    difference = args["cond_denoised"] - args["uncond_denoised"]
    return args["denoised"] + difference / difference.norm()


def subtracts(args):
    return args["denoised"] - 0.3 * args["uncond_denoised"]


def evaluates_the_negative(args):
    (again,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["uncond"]], args["input"], args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.5 * (args["uncond_denoised"] - again * 0.9)


NEEDING = {
    "an attribute": lambda m: m.set_model_sampler_post_cfg_function(KeptOnItself()),
    "a dict": lambda m: m.set_model_sampler_pre_cfg_function(kept_in_a_dict()),
    "the negative's slot": lambda m: m.set_model_sampler_pre_cfg_function(kept_in_the_negatives_slot()),
    "zero divided by zero": lambda m: m.set_model_sampler_post_cfg_function(divides),
    "a part of the negative": lambda m: m.set_model_sampler_post_cfg_function(subtracts),
    "the negative's prompt": lambda m: m.set_model_sampler_post_cfg_function(evaluates_the_negative),
    "the negative's prompt, at cfg 1 too": lambda m: m.set_model_sampler_post_cfg_function(
        evaluates_the_negative, disable_cfg1_optimization=True
    ),
    "a function of three arguments": lambda m: m.set_model_sampler_cfg_function(lambda cond, uncond, scale: cond * 1.1),
}
NAMES = {
    "an attribute": "KeptOnItself",
    "a dict": "kept_in_a_dict",
    "the negative's slot": "kept_in_the_negatives_slot",
    "zero divided by zero": "divides",
    "a part of the negative": "subtracts",
    "a function of three arguments": "test_guidance_nodes",
}


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("kind", NEEDING)
def test_other_packs_functions_that_need_the_negative(kind, value, model, last_lines):
    patched = model.clone()
    NEEDING[kind](patched)
    evaluations(patched)
    begins = int(value * STEPS)
    found, positive = evaluations(cutoff(patched, value)), evaluations(model, cfg=1.0)
    assert max(errors(found[begins:], positive[begins:])) < TOLERANCE
    name = NAMES.get(kind, "evaluates_the_negative")
    assert last_lines("2")[0][1].endswith(f"; left out with the guidance: {name}")


def perturbs(args):
    """The positive's own guidance, in a function that reads whatever there is."""
    negative, scale = args["uncond_denoised"], args["cond_scale"]
    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["cond"]], args["input"] * 0.9, args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.5 * (args["cond_denoised"] - other) + 0 * negative * scale


def counts():
    calls = []

    def after(args):
        calls.append(args.get("uncond"))
        return args["denoised"] * 1.01

    return after


@pytest.mark.parametrize("function", [perturbs, counts()], ids=["perturbs", "counts"])
def test_other_packs_functions_that_need_the_positive_alone(function, model, last_lines):
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(function)
    found = evaluations(cutoff(patched, 0.0))
    assert max(errors(found, evaluations(patched, cfg=1.0))) < TOLERANCE
    assert max(errors(found, evaluations(model, cfg=1.0))) > 1e-3
    assert "left out" not in last_lines("2")[0][1]
