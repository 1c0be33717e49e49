"""From a blank canvas to a faster SDXL workflow, by what a user's hands do: searching, dragging wires, pressing Run."""

from __future__ import annotations

import time

import pytest

NODES = {
    "Load Checkpoint": (180, 150),
    "CLIP Text Encode (Prompt)": (430, 150),
    "CLIP Text Encode": (430, 340),
    "Empty Latent Image": (430, 560),
    "KSampler": (750, 150),
    "VAE Decode": (1020, 150),
    "Save Image": (1180, 300),
}
"""What each is called in the search, and where it is put. The second text encoder is the negative prompt's."""


@pytest.mark.long
def test_a_faster_sdxl_workflow_from_a_blank_canvas(page):
    began = time.monotonic()
    page.blank_canvas()
    loader, positive, negative, size, sampler, decoder, saver = (
        page.add_by_search(name, at) for name, at in NODES.items()
    )
    for source, target in (
        ((loader, "MODEL"), (sampler, "model")),
        ((loader, "CLIP"), (positive, "clip")),
        ((loader, "CLIP"), (negative, "clip")),
        ((loader, "VAE"), (decoder, "vae")),
        ((positive, "CONDITIONING"), (sampler, "positive")),
        ((negative, "CONDITIONING"), (sampler, "negative")),
        ((size, "LATENT"), (sampler, "latent_image")),
        ((sampler, "LATENT"), (decoder, "samples")),
        ((decoder, "IMAGE"), (saver, "images")),
    ):
        page.wire(*source, *target)
    page.set_widget(loader, "ckpt_name", "sd_xl_base_1.0.safetensors")
    page.set_widget(size, "width", 256)
    page.set_widget(size, "height", 256)
    assert page.run().status == "success"
    plain = time.monotonic()

    recipe = page.add_by_search("Recipe (Slipstream)", (230, 700))
    page.wire(loader, "MODEL", recipe, "model")
    page.wire(recipe, "MODEL", sampler, "model")
    page.set_widget(recipe, "goal", "fastest")
    assert page.run().status == "success"
    took = time.monotonic() - plain
    page.fit()
    plan, *lines = page.verdicts(recipe)
    assert "+ Forecast, error_budget 0.2" in plan.text
    assert {line.state for line in lines} <= {"active", "inert"}
    assert any("skipped " in line.text for line in lines)
    assert not page.errors()
    assert not page.problems()
    print(f"a workflow: {plain - began:.0f} s; made faster: {took:.0f} s")
