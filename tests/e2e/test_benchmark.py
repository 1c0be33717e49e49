"""The Benchmark's panel on the real canvas, in both renderers: what it shows, keeps, and leaves out of the workflow."""

from __future__ import annotations

import json

import pytest
from browser import keep_picture

from workflows import BENCHMARK, Workflow, classic_only, seeds

NODE = "SlipstreamBenchmark"
STEPS, RUNS, ABLATION, SAVE = 2, 7, 8, 9
"""Positions of widgets."""

READ_PANEL = """
(id) => {
  const node = slipstreamTest.node(id)
  const root = node.widgets.find((widget) => widget.element?.matches('.slipstream-verdict'))?.element
  const panel = root?.querySelector('.slipstream-benchmark')
  if (!panel) return null
  const charts = [...panel.querySelectorAll('.slipstream-benchmark__chart svg')]
  const images = [...panel.querySelectorAll('.slipstream-benchmark__images img')]
  return {
    variants: [...panel.querySelectorAll('[data-variant]')].map((row) => row.dataset.variant),
    text: panel.innerText,
    marks: charts.map((svg) => svg.querySelectorAll('path').length),
    images: images.filter((image) => image.naturalWidth > 1 && image.offsetWidth > 1).length,
    links: [...panel.querySelectorAll('.slipstream-benchmark__saved a')].map((link) => link.href),
    overflow: panel.scrollWidth - panel.clientWidth
  }
}
"""


@pytest.fixture
def workflow() -> Workflow:
    workflow = Workflow(BENCHMARK, NODE)
    workflow.set(NODE, STEPS, 4)
    workflow.set(NODE, RUNS, 2)
    return workflow


def panel(page, workflow, charts=2, images=2):
    """What the panel shows, once its charts are drawn and its images are there."""
    node_id = workflow.id(NODE)
    page.fit()
    return page.wait_for(
        lambda: page.page.evaluate(READ_PANEL, node_id),
        lambda shown: shown and len(shown["marks"]) >= charts and all(shown["marks"]) and shown["images"] >= images,
    )


def button(page, name):
    """A button of the panel, wherever the renderer put it."""
    return page.page.locator(".slipstream-benchmark").get_by_role("button", name=name)


@pytest.mark.long_in_vue
def test_it_shows_table_charts_and_images_and_keeps_them(page, workflow):
    page.load(workflow.data)
    bare = page.workflow()
    assert page.run().status == "success"
    shown = panel(page, workflow)
    variants = ["baseline", "candidate", "CFG Cutoff alone", "DeepCache alone"]
    assert shown["variants"] == variants
    assert all(count > 0 for count in shown["marks"])
    assert shown["images"] >= 2
    assert shown["overflow"] <= 0
    assert "no guidance from step 3 of 4" in shown["text"]
    ((state, text),) = [(line.state, line.text) for line in page.verdicts(workflow.id(NODE))]
    assert state == "active"
    assert text.startswith("candidate: ")
    # None of it goes into the workflow.
    after = page.workflow()
    assert after["nodes"] == bare["nodes"]
    page.reload()
    kept = panel(page, workflow)
    assert kept["variants"] == variants
    assert len(kept["marks"]) == len(shown["marks"])
    assert kept["images"] >= 2
    (line,) = page.verdicts(workflow.id(NODE))
    assert line.is_last
    assert not page.problems()


@pytest.mark.long
def test_rivals_are_rows_of_the_table(page, workflow):
    workflow.set(NODE, ABLATION, "off")
    workflow.set(NODE, RUNS, 1)
    page.load(workflow.data)
    page.set_widget(workflow.id(NODE), "rivals", True)
    page.set_widget(workflow.id(NODE), "seeds", 2)
    assert page.run().status == "success"
    shown = panel(page, workflow)
    assert shown["variants"][-1].startswith("EasyCache ")
    assert "without Slipstream" in shown["text"]
    assert shown["overflow"] <= 0
    keep_picture(page, "benchmark-rivals")
    button(page, "Copy as Markdown").dispatch_event("click")
    page.settle()
    assert "| worst SSIM |" in page.page.evaluate("() => navigator.clipboard.readText()")
    assert not page.problems()


@pytest.mark.long_in_vue
def test_the_report_can_be_copied_and_the_saved_file_opened(page, workflow):
    workflow.set(NODE, ABLATION, "off")
    workflow.set(NODE, SAVE, True)
    page.load(workflow.data)
    assert page.run().status == "success"
    shown = panel(page, workflow)
    button(page, "Copy as Markdown").dispatch_event("click")
    page.settle()
    copied = page.page.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith("### DemoFamily, 64x64, 4 steps of dpmpp_2m, karras, cfg 5")
    assert "| candidate |" in copied
    answers = [page.page.request.get(link) for link in shown["links"]]
    assert all(answer.ok for answer in answers)
    saved = json.loads(answers[0].text())
    assert {len(variant["runs"]) for variant in saved["variants"]} == {2}
    assert answers[1].text() == copied
    assert not page.problems()


@classic_only
def test_an_interrupted_one_shows_what_was_measured_and_the_next_prompt_runs(page, workflow):
    workflow.set(NODE, ABLATION, "off")
    workflow.set(NODE, RUNS, 50)
    page.load(workflow.data)
    queued = page.queue()
    page.wait_for_verdict(workflow.id(NODE), lambda lines: bool(lines) and lines[0].text.startswith("round 2 of 50"))
    page.interrupt()
    assert page.wait(queued).status == "interrupted"
    (line,) = page.verdicts(workflow.id(NODE))
    assert line.state == "interrupted"
    assert line.text.startswith("interrupted after ")
    assert panel(page, workflow)["variants"] == ["baseline", "candidate"]
    page.set_widget(workflow.id(NODE), "runs", 1)
    assert page.run().status == "success"
    assert page.verdicts(workflow.id(NODE))[0].state == "active"
    assert not page.problems()


@pytest.mark.long_in_vue
def test_without_a_vae_there_are_no_images_and_no_empty_frame(page, workflow):
    benchmark = workflow.node(NODE)
    entry = next(entry for entry in benchmark["inputs"] if entry["name"] == "vae")
    workflow.data["links"] = [link for link in workflow.data["links"] if link[0] != entry["link"]]
    workflow.node("SlipstreamDemoModel")["outputs"][2]["links"] = []
    entry["link"] = None
    workflow.set(NODE, ABLATION, "off")
    page.load(workflow.data)
    assert page.run().status == "success"
    shown = panel(page, workflow, images=0)
    assert shown["variants"] == ["baseline", "candidate"]
    assert shown["images"] == 0
    assert len(shown["marks"]) == 2
    assert not page.problems()


@pytest.mark.long
@classic_only
def test_two_of_them_one_in_a_subgraph_beside_a_sampler_each_tell_of_their_own(page, workflow):
    """The nodes that they measure have a line for each candidate, and one for the sampler's run."""
    workflow.set(NODE, ABLATION, "off")
    inputs = {"baseline": "MODEL", "candidate": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}
    second = workflow.add(NODE, {**inputs, "latent_image": "LATENT"}, ["IMAGE", "STRING"], [])
    second["widgets_values"] = [next(seeds), "fixed", 6, 5.0, "euler", "normal", 1.0, 1, "off", False]
    inputs = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
    sampler = workflow.add("KSampler", inputs, ["LATENT"], [next(seeds), "fixed", 8, 5.0, "euler", "normal", 1.0])
    decoder = workflow.add("VAEDecode", {"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], [])
    shown = workflow.add("PreviewImage", {"images": "IMAGE"}, [], [])
    loader, latent = workflow.node("SlipstreamDemoModel"), workflow.node("EmptyLatentImage")
    prompts = [node for node in workflow.data["nodes"] if node["type"] == "CLIPTextEncode"]
    for target, model in ((second, "candidate"), (sampler, "model")):
        workflow.link(workflow.node("SlipstreamCFGCutoff"), 0, target, model)
        workflow.link(prompts[0], 0, target, "positive")
        workflow.link(prompts[1], 0, target, "negative")
        workflow.link(latent, 0, target, "latent_image")
    workflow.link(loader, 0, second, "baseline")
    workflow.link(sampler, 0, decoder, "samples")
    workflow.link(loader, 2, decoder, "vae")
    workflow.link(decoder, 0, shown, "images")
    page.load(workflow.data)
    outer = page.to_subgraph([second["id"]])
    assert page.run().status == "success"
    inner = page.inner(outer, NODE)
    told = {line.text.split(": ")[0]: line.text for line in page.verdicts(workflow.id("SlipstreamCFGCutoff"))}
    samplers = (f"{NODE} {workflow.id(NODE)}, candidate", f"{NODE} {inner}, candidate", f"KSampler {sampler['id']}")
    assert told.keys() == set(samplers)
    assert all(f" of {steps} " in told[name] for name, steps in zip(samplers, (4, 6, 8), strict=True))
    assert panel(page, workflow)["variants"] == ["baseline", "candidate"]
    (summary,) = page.verdicts(outer)
    page.enter_subgraph(outer)
    (line,) = page.verdicts(inner)
    assert summary.text.endswith(line.text)
    assert line.text.startswith("candidate: ")
    assert not page.problems()


@pytest.mark.long
def test_in_the_light_theme(open_page, workflow):
    workflow.set(NODE, ABLATION, "off")
    page = open_page("vue", theme="light")
    page.load(workflow.data)
    assert page.run().status == "success"
    assert panel(page, workflow)["variants"] == ["baseline", "candidate"]
    assert not page.problems()


@pytest.mark.long
@classic_only
def test_the_nodes_show_the_candidates_own_verdict_once(page, workflow):
    page.load(workflow.data)
    assert page.run().status == "success"
    for name in ("SlipstreamDeepCache", "SlipstreamCFGCutoff"):
        (line,) = page.verdicts(workflow.id(name))
        assert line.state == "active"
