"""Where a run is divided, against diffusers' own pipelines and by hand."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from loading import PACK

refiner_handoff = importlib.import_module(f"{PACK}.nodes.methods.refiner_handoff")
Ensemble, ImageToImage = refiner_handoff.Ensemble, refiner_handoff.ImageToImage

TIMESTEPS = 1000


def scheduler_of(steps, **options):
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=TIMESTEPS, **options
    )
    scheduler.set_timesteps(steps)
    return scheduler


def boundary_of(scheduler, cutoff):
    """The noise level of a training timestep."""
    kept = scheduler.alphas_cumprod[min(cutoff, TIMESTEPS - 1)]
    return float(((1 - kept) / kept) ** 0.5) if cutoff else 0.0


@pytest.mark.parametrize("options", [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True},
], ids=["leading", "trailing", "linspace", "karras"])  # fmt: skip
def test_it_divides_a_run_as_diffusers_does(options):
    for steps in (1, 2, 7, 20, 25, 30, 50, 333):
        for handoff in (0.01, 0.1, 0.25, 0.5, 0.555, 0.7, 0.8, 0.9, 0.95, 0.99):
            scheduler = scheduler_of(steps, **options)
            ensemble = Ensemble(handoff)
            cutoff = ensemble.cutoff(TIMESTEPS)
            base, refiner = ensemble.legs(scheduler.sigmas, boundary_of(scheduler, cutoff))
            # As StableDiffusionXLPipeline has it in its __call__.
            theirs = int(round(TIMESTEPS - (handoff * TIMESTEPS)))  # noqa: RUF046
            assert cutoff == theirs
            assert len(base) - 1 == len([one for one in scheduler.timesteps if one >= theirs])
            pipeline = SimpleNamespace(scheduler=scheduler)
            _, left = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, 0.3, "cpu", handoff)
            assert len(refiner) - 1 == left
            assert torch.equal(torch.cat([base, refiner[1:]]), scheduler.sigmas)
            assert base[-1] == refiner[0]


@pytest.mark.parametrize("strength", [0.0, 0.02, 0.3, 0.35, 0.5, 0.999, 1.0])
def test_image_to_image_has_as_many_steps_as_in_diffusers(strength):
    for steps in (1, 9, 20, 30):
        scheduler = scheduler_of(steps)
        pipeline = SimpleNamespace(scheduler=scheduler)
        timesteps, left = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
        refining = ImageToImage(strength).refining(scheduler.sigmas)
        assert len(refining) - 1 == left == len(timesteps)
        assert torch.equal(refining, scheduler.sigmas[steps - left :])


SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize(("handoff", "steps"), [(0.0, 0), (0.1, 0), (0.2, 1), (0.5, 2), (0.75, 3), (0.9, 4), (1.0, 4)])
def test_by_steps_it_is_the_nearest_step(handoff, steps):
    base, refiner = Ensemble(handoff, "steps", exact_handoff=True).legs(SIGMAS, 3.0)
    assert torch.equal(base, SIGMAS[: steps + 1])
    assert torch.equal(refiner, SIGMAS[steps:])


@pytest.mark.parametrize(
    ("boundary", "base", "refiner"),
    [
        (3.0, [8, 4, 3], [3, 2, 1, 0]),
        (2.0, [8, 4, 2], [2, 1, 0]),
        (2.0 * (1 + 5e-7), [8, 4, 2], [2, 1, 0]),
        (2.008, [8, 4, 2], [2, 1, 0]),
        (1.992, [8, 4, 2], [2, 1, 0]),
        (2.03125, [8, 4, 2.03125], [2.03125, 2, 1, 0]),
        (8.0, [8], [8, 4, 2, 1, 0]),
        (0.5, [8, 4, 2, 1, 0.5], [0.5, 0]),
        (9.0, [8], [8, 4, 2, 1, 0]),
        (float("inf"), [8], [8, 4, 2, 1, 0]),
        (0.0, [8, 4, 2, 1, 0], [0]),
    ],
)
def test_exactly_there_a_step_is_put_in_unless_one_ends_there(boundary, base, refiner):
    legs = Ensemble(exact_handoff=True).legs(SIGMAS, boundary)
    assert [leg.tolist() for leg in legs] == [base, refiner]


def test_of_two_steps_that_end_near_it_the_nearer_one_counts():
    sigmas = torch.tensor([4.0, 2.009, 2.0, 0.0])
    base, refiner = Ensemble(exact_handoff=True).legs(sigmas, 2.001)
    assert torch.equal(base, sigmas[:3])
    assert torch.equal(refiner, sigmas[2:])


def test_without_it_the_step_that_it_falls_into_is_the_bases():
    base, refiner = Ensemble().legs(SIGMAS, 3.0)
    assert (base.tolist(), refiner.tolist()) == ([8, 4, 2], [2, 1, 0])
    base, refiner = Ensemble().legs(SIGMAS, 2.0)
    assert (base.tolist(), refiner.tolist()) == ([8, 4, 2, 1], [1, 0])


def test_a_schedule_that_rises_again_goes_over_once():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 6.0, 3.0, 0.0])
    base, refiner = Ensemble().legs(sigmas, 3.5)
    assert (base.tolist(), refiner.tolist()) == ([8, 4, 2], [2, 6, 3, 0])


def test_the_legs_are_their_own():
    """Some of the host's samplers write into the noise levels that they get."""
    sigmas = SIGMAS.clone()
    for leg in (*Ensemble().legs(sigmas, 3.0), ImageToImage(0.5).refining(sigmas)):
        leg.zero_()
    assert torch.equal(sigmas, SIGMAS)


def test_no_steps_at_all():
    for sigmas in (torch.tensor([]), torch.tensor([0.0])):
        assert all(len(leg) <= 1 for leg in Ensemble().legs(sigmas, 3.0))
        assert len(ImageToImage().refining(sigmas)) <= 1


@pytest.mark.parametrize("settings", [{"handoff": 1.1}, {"handoff": float("nan")}, {"split": "sigmas"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"Refiner Handoff: {next(iter(settings))} must be"):
        Ensemble(**settings)
    with pytest.raises(ValueError, match=r"refiner_denoise must be from 0\.0 to 1\.0"):
        ImageToImage(-0.1)
