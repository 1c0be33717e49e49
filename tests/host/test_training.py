"""The training of the demo model, in a few steps: each stage runs, stages that are done aren't repeated, and what comes
out is what the node reads. That the real one draws what it is told is seen by test_demo_model."""

from __future__ import annotations

import functools
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
import transformer
import vocabulary

CPU = torch.device("cpu")
STEPS = {"autoencoder": 7, "pictures": 4, "denoiser": 2, "transformer": 3, "finished": 2, "judge": 2}


SHORT_MUON = functools.partial(torch.optim.Muon, ns_steps=1)
"""One iteration in a step: they are in bfloat16, and take a processor without it seconds each."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Muon", SHORT_MUON)
        run(folder)
    return folder


def run(folder):
    files = [folder / f"{name}.safetensors" for name in ("model", "transformer", "judge")]
    train.train(folder / "work", *files, CPU, STEPS)


@pytest.mark.long
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
    monkeypatch.setattr(demo_model, "TRANSFORMER_FILE", trained / "transformer.safetensors")
    model, _, _ = hosted.execute("SlipstreamDemoModel", architecture="transformer").result
    assert len(model.model.diffusion_model.single_layers) == 8


def test_a_stage_that_is_done_is_not_repeated(trained, monkeypatch):
    def again(*args):
        raise AssertionError("this stage was done")

    before = load_file(trained / "model.safetensors")
    for module, name in (
        (autoencoder, "train"),
        (diffusion, "encode"),
        (diffusion, "train"),
        (transformer, "train"),
        (judge, "train"),
    ):
        monkeypatch.setattr(module, name, again)
    run(trained)
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_noise_schedule_is_the_hosts():
    from comfy.model_sampling import ModelSamplingDiscrete

    sigmas = ModelSamplingDiscrete().sigmas.double()
    cumulative = diffusion.alphas_cumprod()
    assert torch.allclose(((1 - cumulative) / cumulative).sqrt(), sigmas, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("network", [diffusion, transformer])
def test_it_learns(network, monkeypatch):
    """Sixty steps on one latent tell more of its noise than none."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator).expand(4, -1, -1, -1).half()
    losses = []

    class Told:
        def __init__(self, *args, **options):
            pass

        def __call__(self, step, **values):
            losses.append(float(values["loss"]))

    monkeypatch.setattr(network, "Progress", Told)
    # One picture, neither smaller nor mirrored.
    monkeypatch.setattr(transformer, "SMALL", 0)
    monkeypatch.setattr(transformer, "FLIPPED", 0)
    words = [torch.randn(len(vocabulary.WORDS), vocabulary.WIDTH)] if network is transformer else []
    network.train(latents, torch.zeros(4, 8, dtype=torch.long), *words, 60, CPU)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_other_sources_or_steps_have_another_folder():
    assert train.fingerprint(STEPS) == train.fingerprint(STEPS)
    assert train.fingerprint(STEPS) != train.fingerprint(train.STEPS)


def test_the_transformer_is_the_hosts_and_reads_half_the_size_by_the_same_places():
    from comfy.ldm.aura.mmdit import MMDiT
    from comfy.ops import disable_weight_init

    ours = transformer.Transformer()
    ours.initialize(0)
    torch.nn.init.normal_(ours.final_linear.weight)
    hosts = MMDiT(**transformer.CONFIG, operations=disable_weight_init, dtype=torch.float32)
    hosts.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 4, 32, 32, generator=generator), torch.tensor([0.9, 0.2]), torch.randn(2, 16, 768)
    with torch.no_grad():
        assert torch.equal(ours(*given), hosts(*given))
        placed = ours.apply_pos_embeds(torch.zeros(1, 64, 192), 16, 16)
    grid = ours.positional_encoding.unflatten(1, (16, 16))
    assert torch.allclose(placed.unflatten(1, (8, 8))[0, 1, 2], grid[0, 2:4, 4:6].mean((0, 1)))


def test_the_rate_warms_up_stays_and_cools_down():
    at = transformer.rate(1000)
    assert [round(at(step), 3) for step in (0, 14, 29, 400, 500, 750, 999)] == [0.033, 0.5, 1, 1, 1, 0.5, 0.002]


def test_one_that_goes_on_is_trained_at_full_size_by_rates_that_only_fall(monkeypatch):
    monkeypatch.setattr(torch.optim, "Muon", SHORT_MUON)
    sizes = []
    forward = transformer.Transformer.forward

    def seen(self, x, *args):
        sizes.append(x.shape[-1])
        return forward(self, x, *args)

    monkeypatch.setattr(transformer.Transformer, "forward", seen)
    given = torch.randn(2, 4, 16, 16), torch.zeros(2, 8, dtype=torch.long)
    words = torch.randn(len(vocabulary.WORDS), vocabulary.WIDTH)
    first = transformer.train(*given, words, 4, CPU)
    assert sizes == [8, 8, 8, 16]
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    after = transformer.train(*given, words, 2, CPU, learned=weights).state_dict()
    assert sizes[4:] == [16, 16]
    name = "single_layers.0.attn.w1q.weight"
    assert 0 < (after[name] - weights[name]).norm() < 0.1 * weights[name].norm()
    rates = [transformer.falling(100)(step) for step in (0, 2, 50, 99)]
    assert rates[0] < rates[1] > rates[2] > rates[3] > 0
    assert rates[1] < transformer.rate(100)(50)
