"""The training of the demo model, in a few steps: each stage runs, stages that are done aren't repeated, and what comes
out is what the node reads. That the real one draws what it is told is seen by test_demo_model."""

from __future__ import annotations

import sys

import hosted
import pytest
import torch
from hosted import engine
from loading import ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "training"))

import autoencoder
import diffusion
import judge
import train

CPU = torch.device("cpu")
STEPS = {"autoencoder": 7, "pictures": 4, "denoiser": 2, "judge": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train.train(folder / "work", folder / "model.safetensors", folder / "judge.safetensors", CPU, STEPS)
    return folder


def test_what_it_writes_is_what_the_node_reads(trained, monkeypatch):
    demo_model = engine("demo_model")
    shipped = demo_model.Demo.read()
    monkeypatch.setattr(demo_model, "FILE", trained / "model.safetensors")
    made = demo_model.Demo.read()
    assert {name: value.shape for name, value in made.weights.items()} == {
        name: value.shape for name, value in shipped.weights.items()
    }
    assert (made.words, made.length, made.unet_config) == (shipped.words, shipped.length, shipped.unet_config)
    model, _, _ = hosted.execute("SlipstreamDemoModel").result
    assert model.model.diffusion_model.model_channels == 32


def test_a_stage_that_is_done_is_not_repeated(trained, monkeypatch):
    def again(*args):
        raise AssertionError("this stage was done")

    before = load_file(trained / "model.safetensors")
    for module, name in ((autoencoder, "train"), (diffusion, "encode"), (diffusion, "train"), (judge, "train")):
        monkeypatch.setattr(module, name, again)
    train.train(trained / "work", trained / "model.safetensors", trained / "judge.safetensors", CPU, STEPS)
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_noise_schedule_is_the_hosts():
    from comfy.model_sampling import ModelSamplingDiscrete

    sigmas = ModelSamplingDiscrete().sigmas.double()
    cumulative = diffusion.alphas_cumprod()
    assert torch.allclose(((1 - cumulative) / cumulative).sqrt(), sigmas, rtol=1e-4)


def test_it_learns(monkeypatch):
    """Sixty steps on one latent tell more of its noise than none."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator).expand(4, -1, -1, -1).half()
    losses = []

    class Told:
        def __init__(self, *args, **options):
            pass

        def __call__(self, step, **values):
            losses.append(float(values["loss"]))

    monkeypatch.setattr(diffusion, "Progress", Told)
    diffusion.train(latents, torch.zeros(4, 8, dtype=torch.long), 60, CPU)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_other_sources_or_steps_have_another_folder():
    assert train.fingerprint(STEPS) == train.fingerprint(STEPS)
    assert train.fingerprint(STEPS) != train.fingerprint(train.STEPS)
