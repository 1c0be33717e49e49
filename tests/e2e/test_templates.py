"""The templates as a user meets them: opened in the Templates browser, run, the page reloaded; in both renderers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import BytesIO

import pytest
from browser import Page, VerdictLine, keep_picture
from loading import ROOT
from PIL import Image

from workflows import TEMPLATES

LINES = {"SlipstreamCPU": 3}
"""Verdicts of a node that has several: what it is, and what it understood of two prompts; or one for each method."""

LISTS = {"SlipstreamRecipe", "SlipstreamLoadPlan", "SlipstreamTune"}
"""Nodes that say what they chose, and what each of those did."""

INERT = {"SlipstreamFP16FixVAE", "SlipstreamSequentialOffload", "SlipstreamStageOffload"}
"""Nodes that find nothing to gain on a CPU, and say so."""

AS_THE_PROCESSOR = {"SlipstreamCPU", "SlipstreamPrecision", "SlipstreamRecipe", "SlipstreamTune"}
"""Nodes that do something, or some of it, if this processor has instructions for it, or is slow at something, or has
the time."""

SMALL = {
    "EmptyLatentImage": {"width": 128, "height": 128},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "EmptyHunyuanLatentVideo": {"width": 128, "height": 128, "length": 5},
}
SMALLER = {
    "5 - Compile Model and Compile VAE": {"CheckpointLoaderSimple": {"ckpt_name": "tiniest.safetensors"}},
    "5 - Quantize and compile SDXL": {
        "CheckpointLoaderSimple": {"ckpt_name": "tiniest.safetensors"},
        "SlipstreamQuantize": {"min_features": 0},
    },
    "5 - Tiled VAE - 4K on a small card": {
        "ImageScale": {"width": 960, "height": 544},
        "SlipstreamVAEEncodeTiled": {"tile_size": 512},
        "SlipstreamVAEDecodeTiled": {"tile_size": 512},
    },
    # Random weights turn faster than those that a budget is for.
    "2 - Wan video faster": {"SlipstreamForecast": {"error_budget": 0.5}},
    "9 - Benchmark - what each optimization gives": {"SlipstreamBenchmark": {"runs": 1}},
    "9 - Tune - the fastest plan above a floor": {"SlipstreamTune": {"steps": 6, "seeds": 1, "minutes": 0.1}},
}
"""What is set lower than in the template, in all and in some: a CPU takes minutes, and some stand-ins are small."""

IN_PLANS = {"Slipstream/model", "Slipstream/sampling"}
"""Where the menu has the nodes that a saved image tells of."""

ONLY_LOOKING = {"SlipstreamSavePlan"}
"""What stands there too and puts nothing on a model."""

SAVERS = {"SaveImage", "SaveAnimatedWEBP"}

IN_BOTH = {
    "1 - Try it, no downloads",
    "2 - SD 1.5 faster - DeepCache, CFG Cutoff and FreeU",
}
"""Run in both renderers, the others in one: in the other they are opened, and run where there is time."""

LONG = {
    "2 - SDXL best quality",
    "2 - SDXL fastest",
    "3 - SDXL under 6 GB",
    "3 - SDXL under 8 GB",
    "5 - Compile Model and Compile VAE",
    "5 - Offload SDXL in stages",
    "5 - Precision and Attention on SDXL",
    "5 - Quantize and compile SDXL",
    "5 - Tiled VAE - 4K on a small card",
}
"""Another one is of the same nodes. They are opened all the same."""


@dataclass
class Tour:
    """One page for all templates of a renderer, since ComfyUI's takes longer to load than most of them to run.

    Attributes:
        told: what the nodes of those that were run said, by the tab's name and the node's id.
    """

    page: Page
    told: dict[str, dict[int, list[VerdictLine]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def tour(renderer, server, browser, pages):
    # A page that waits takes its share of a processor too.
    for waiting in pages.values():
        waiting.context.close()
    pages.clear()
    pages[renderer] = browser.open(server, renderer)
    return Tour(pages[renderer])


@pytest.fixture
def page(tour, request):
    tour.page.forget_problems()
    yield tour.page
    keep_picture(tour.page, request.node.name)


def make_small(page: Page, title: str) -> dict[int, str]:
    """Sets what takes long in an open template lower. The types of its nodes, by id."""
    assert not page.errors()
    kinds = {node["id"]: node["type"] for node in TEMPLATES[title]["nodes"]}
    for node_id, kind in kinds.items():
        for widget, value in {**SMALL, **SMALLER.get(title, {})}.get(kind, {}).items():
            page.set_widget(node_id, widget, value)
    return kinds


@pytest.mark.parametrize("renderer", ["vue"], indirect=True)
@pytest.mark.parametrize("title", [title for title in TEMPLATES if title not in IN_BOTH])
def test_a_template_opens(renderer, title, page):
    # As a file: the Templates browser is the same in both, and the slowest page there is.
    page.load(TEMPLATES[title], title)
    make_small(page, title)
    assert not page.problems()


def marks(title: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] * (title in LONG) + [pytest.mark.long_in_vue] * (title not in IN_BOTH)


@pytest.mark.parametrize("title", [pytest.param(title, marks=marks(title)) for title in TEMPLATES])
def test_a_template_opens_runs_and_shows_image_and_verdicts(title, tour, page, renderer):
    # Else the host answers in the second renderer from what it cached in the first: "last run".
    page.server.post("/free", {"free_memory": True})
    page.open_template("slipstream", title)
    kinds = make_small(page, title)
    outcome = page.run()
    assert outcome.status == "success", outcome
    ours = [number for number, kind in kinds.items() if kind.startswith("Slipstream")]
    assert ours
    page.fit()
    told = {node_id: page.verdicts(node_id) for node_id in ours}
    # One of its own, and one for each prompt.
    count = LINES | {"SlipstreamDemoModel": 1 + list(kinds.values()).count("CLIPTextEncode")}
    for node_id, lines in told.items():
        kind = kinds[node_id]
        assert len(lines) == count.get(kind, 1) or (kind in LISTS and len(lines) > 1)
        states = {"active", "inert"} if kind in AS_THE_PROCESSOR else {"inert"} if kind in INERT else {"active"}
        assert kind != "SlipstreamRecipe" or lines[0].state == "active"
        assert all(line.state in states and line.is_visible and not line.is_last for line in lines)
    savers = [node["id"] for node in TEMPLATES[title]["nodes"] if node["type"] in SAVERS]
    assert all(page.shows_image(node_id) for node_id in savers)
    putting = [node_id for node_id in ours if kinds[node_id] not in ONLY_LOOKING]
    in_plans = {str(node_id) for node_id in putting if category(page, kinds[node_id]) in IN_PLANS}
    for node_id in savers:
        assert recorded(page, outcome.prompt_id, node_id) == in_plans
    assert not page.problems()
    tour.told[page.tab()] = told


@pytest.mark.long
def test_after_a_reload_each_of_them_shows_its_last_run(tour, page):
    if not tour.told:
        pytest.skip("no template was run in this page before")
    page.reload()
    for name, told in tour.told.items():
        page.open_tab(name)
        page.fit()
        for node_id, before in told.items():
            lines = page.verdicts(node_id)
            assert all(line.is_last and line.is_visible for line in lines), (name, node_id, lines)
            for line, earlier in zip(lines, before, strict=True):
                assert line.text.endswith(earlier.text), (name, node_id, line, earlier)
    assert not page.problems()


def category(page, kind):
    return page.page.request.get(f"{page.server.url}/object_info/{kind}").json()[kind]["category"]


def recorded(page, prompt_id, saver):
    """The nodes that asked for what the image that a node saved tells of its making."""
    with Image.open(BytesIO(page.saved(prompt_id, saver))) as opened:
        # A film has it in its Exif: name:JSON.
        exif = (value.split(":", 1) for value in opened.getexif().values() if isinstance(value, str))
        text = getattr(opened, "text", None) or dict(exif)
        assert "workflow" in text
        record = json.loads(text.get("slipstream", '{"samplers": {}}'))
    runs = [run for sampler in record["samplers"].values() for run in sampler["runs"]]
    return {node for run in runs for method in run["methods"] for node in method["nodes"]}


def test_help_pages_open(page):
    for name in (path.stem for path in (ROOT / "web" / "docs").glob("*.md")):
        answer = page.page.request.get(f"{page.server.url}/extensions/slipstream/docs/{name}.md")
        assert answer.ok
        assert "## Inputs" in answer.text()
