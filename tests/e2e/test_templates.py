"""Each template as a user meets it: opened from the Templates browser, run, reloaded, in both renderers."""

from __future__ import annotations

import json
from io import BytesIO

import pytest
from loading import ROOT
from PIL import Image

from workflows import TEMPLATES

LINES = {"SlipstreamDemoModel": 3, "SlipstreamCPU": 3}
"""Verdicts of a node that has several: what it is, and what it understood of two prompts; or one for each method."""

INERT = {"SlipstreamFP16FixVAE", "SlipstreamSequentialOffload", "SlipstreamStageOffload"}
"""Nodes that find nothing to gain on a CPU, and say so."""

AS_THE_PROCESSOR = {"SlipstreamCPU", "SlipstreamPrecision"}
"""Nodes that do something if this processor has instructions for it, or is slow at something."""

SMALLER = {
    "4K decode on a small card": {
        "ImageScale": {"width": 960, "height": 544},
        "SlipstreamVAEEncodeTiled": {"tile_size": 512},
        "SlipstreamVAEDecodeTiled": {"tile_size": 512},
    },
    "Benchmark - what each optimization gives": {"SlipstreamBenchmark": {"runs": 1}},
    "Refiner handoff 0.8": {"EmptyLatentImage": {"width": 256, "height": 256}},
    "SDXL quantized and compiled": {"SlipstreamQuantize": {"min_features": 0}},
}
"""What is set lower than in the template, since a CPU takes minutes, or the model that stands in is small."""

IN_PLANS = {"Slipstream/model", "Slipstream/sampling"}
"""Where the menu has the nodes that a saved image tells of."""

LONG = {
    "4K decode on a small card",
    "Benchmark - what each optimization gives",
    "Compile Model and Compile VAE",
    "SDXL quantized and compiled",
}
"""Run in one renderer; in the other they are opened."""


@pytest.mark.parametrize("title", list(TEMPLATES))
def test_a_template_opens_runs_shows_image_and_verdicts_and_still_does_after_a_reload(title, page, renderer):
    # Else the host answers in the second renderer from what it cached in the first: "last run".
    page.server.post("/free", {"free_memory": True})
    page.open_template("slipstream", title)
    assert not page.errors()
    kinds = {node["id"]: node["type"] for node in TEMPLATES[title]["nodes"]}
    for node_id, kind in kinds.items():
        for widget, value in SMALLER.get(title, {}).get(kind, {}).items():
            page.set_widget(node_id, widget, value)
    if title in LONG and renderer != "classic":
        return
    outcome = page.run(timeout_s=300)
    assert outcome.status == "success", outcome
    ours = [number for number, kind in kinds.items() if kind.startswith("Slipstream")]
    assert ours
    fit(page)
    for node_id in ours:
        lines = page.verdicts(node_id)
        assert len(lines) == LINES.get(kinds[node_id], 1)
        states = {"inert"} if kinds[node_id] in INERT else {"active"}
        if kinds[node_id] in AS_THE_PROCESSOR:
            states = {"active", "inert"}
        assert all(line.state in states and line.is_visible and not line.is_last for line in lines)
    savers = [node["id"] for node in TEMPLATES[title]["nodes"] if node["type"] == "SaveImage"]
    assert all(page.shows_image(node_id) for node_id in savers)
    in_plans = {str(node_id) for node_id in ours if category(page, kinds[node_id]) in IN_PLANS}
    for node_id in savers:
        assert recorded(page, outcome.prompt_id, node_id) == in_plans
    before = [page.verdicts(node_id) for node_id in ours]
    page.reload()
    fit(page)
    for node_id, told in zip(ours, before, strict=True):
        lines = page.verdicts(node_id)
        assert all(line.is_last and line.is_visible for line in lines)
        assert all(line.text.endswith(earlier.text) for line, earlier in zip(lines, told, strict=True))
    assert not page.problems()


def category(page, kind):
    return page.page.request.get(f"{page.server.url}/object_info/{kind}").json()[kind]["category"]


def recorded(page, prompt_id, saver):
    """The nodes that asked for what the image that a node saved tells of its making."""
    outputs = page.page.request.get(f"{page.server.url}/history/{prompt_id}").json()[prompt_id]["outputs"]
    (image,) = outputs[str(saver)]["images"]
    with Image.open(BytesIO(page.page.request.get(f"{page.server.url}/view", params=image).body())) as opened:
        assert "workflow" in opened.text
        record = json.loads(opened.text.get("slipstream", '{"samplers": {}}'))
    runs = [run for sampler in record["samplers"].values() for run in sampler["runs"]]
    return {node for run in runs for method in run["methods"] for node in method["nodes"]}


def fit(page):
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(800)


def test_help_pages_open(page):
    for name in (path.stem for path in (ROOT / "web" / "docs").glob("*.md")):
        answer = page.page.request.get(f"{page.server.url}/extensions/slipstream/docs/{name}.md")
        assert answer.ok
        assert "## Inputs" in answer.text()
