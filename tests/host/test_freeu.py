"""FreeU in the real host: the bits of core's own, presets, range."""

from __future__ import annotations

import hosted
import pytest
import torch
from hosted import add_core_freeu, run_node, sample

VALUES = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}


MODEL = "SD15"
"""With the two widths that FreeU looks for."""


def freeu(patcher, **values):
    return run_node("SlipstreamFreeU", patcher, "3", **values)


@pytest.mark.parametrize(
    ("version", "core", "family"),
    [
        *(("v2", "FreeU_V2", family) for family in hosted.CONFIGS),
        *(("v1", "FreeU", family) for family in ("SD15", "SDXL")),
        *(pytest.param("v1", "FreeU", family, marks=pytest.mark.long) for family in ("SD20", "SSD1B", "SDXLRefiner")),
    ],
)
def test_over_the_full_range_it_has_the_bits_of_core(family, version, core):
    patcher = hosted.model(family)
    ours = sample(freeu(patcher, preset="custom", version=version, **VALUES), steps=4)
    assert torch.equal(ours, sample(add_core_freeu(patcher, core, **VALUES), steps=4))
    assert not torch.equal(ours, sample(patcher, steps=4))


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("SD15", (1.5, 1.6, 0.9, 0.2)),
        ("SD20", (1.4, 1.6, 0.9, 0.2)),
        ("SDXL", (1.3, 1.4, 0.9, 0.2)),
        ("SSD1B", (1.3, 1.4, 0.9, 0.2)),
        ("SDXLRefiner", (1.3, 1.4, 0.9, 0.2)),
    ],
)
def test_auto_takes_the_values_of_the_models_family_and_says_which(family, values, last_lines):
    patcher = hosted.model(family)
    named = dict(zip(("b1", "b2", "s1", "s2"), values, strict=True))
    assert torch.equal(sample(freeu(patcher)), sample(freeu(patcher, preset="custom", **named)))
    ((state, text),) = last_lines("3")
    assert state == "active"
    assert text.startswith("v2 with b1 {:g}, b2 {:g}, s1 {:g}, s2 {:g}, on ".format(*values))


def test_the_verdict_is_what_hooks_on_the_blocks_count(model, last_lines):
    """It acts where 4 or 2 times model_channels channels enter an output block: on 10 of SD 1.5's 12."""
    widths = []
    unet = model.model.diffusion_model
    handles = [block[0].register_forward_pre_hook(lambda m, args: widths.append(m)) for block in unet.output_blocks]
    sample(freeu(model), steps=3)
    for handle in handles:
        handle.remove()
    assert len(widths) == 3 * 12
    assert last_lines("3")[0][1].endswith("on 30 block outputs in 3 evaluations")


def test_the_range_is_of_timesteps(model, last_lines):
    plain = sample(model, steps=10)
    first, second = sample(freeu(model, end_percent=0.5), steps=10), sample(freeu(model, start_percent=0.5), steps=10)
    whole = sample(freeu(model), steps=10)
    assert len({tuple(image.flatten().tolist()) for image in (plain, first, second, whole)}) == 4
    sample(freeu(model, start_percent=0.4, end_percent=0.5), steps=4)
    ((state, text),) = last_lines("3")
    assert state == "inert"
    assert "between start_percent 0.4 and end_percent 0.5" in text


def test_it_acts_beside_cores_own(model):
    both = sample(freeu(add_core_freeu(model)))
    assert torch.equal(both, sample(add_core_freeu(freeu(model))))
    assert not torch.equal(both, sample(freeu(model)))


def test_the_smallest_image_stays_finite(model):
    """At 64x64 pixels the deepest features are a single pixel: there is no map to follow, and no 0/0."""
    assert sample(freeu(model), image=hosted.latent(model, 8)).isfinite().all()


def test_a_diffusion_transformer_is_refused():
    with pytest.raises(RuntimeError, match=r"FreeU.*the model is AuraFlow"):
        freeu(hosted.model("DiT"))


def test_bad_settings_are_refused_and_name_the_node(model):
    with pytest.raises(ValueError, match=r"FreeU: start_percent must not be above end_percent, but 0.6 is above 0.4"):
        freeu(model, start_percent=0.6, end_percent=0.4)
    with pytest.raises(ValueError, match=r"FreeU: b1 must be from 0.0 to 10.0, but is nan"):
        freeu(model, preset="custom", b1=float("nan"))
