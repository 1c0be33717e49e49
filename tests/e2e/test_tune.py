"""The Tune node's panel on the real canvas, in both renderers: the chart, a click that chooses a plan, a reload."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter

import pytest
import tune
import tune_options
from browser import keep_picture
from loading import ROOT
from prompts import scratch_server

from workflows import TUNE, Workflow

NODE = "SlipstreamTune"
FEW = {"steps": 6, "seeds": 1, "floor": 0.3, "minutes": 1}

READ_PANEL = """
(id) => {
  const node = slipstreamTest.node(id)
  const root = node.widgets.find((widget) => widget.element?.matches('.slipstream-verdict'))?.element
  const panel = root?.querySelector('.slipstream-tune')
  if (!panel) return null
  const rows = [...panel.querySelectorAll('[data-plan]')]
  const images = [...panel.querySelectorAll('.slipstream-benchmark__images img')]
  return {
    plans: rows.map((row) => row.dataset.plan),
    usable: rows.filter((row) => row.dataset.result !== 'failed').map((row) => row.dataset.plan),
    shown: rows.filter((row) => row.hasAttribute('data-shown')).map((row) => row.dataset.plan),
    marks: panel.querySelector('.slipstream-benchmark__chart svg')?.querySelectorAll('path').length ?? 0,
    images: images.filter((image) => image.naturalWidth > 1 && image.offsetWidth > 1).length,
    chosen: node.widgets.find((widget) => widget.name === 'chosen').value,
    text: panel.innerText,
    overflow: panel.scrollWidth - panel.clientWidth
  }
}
"""


@pytest.fixture
def workflow() -> Workflow:
    return Workflow(TUNE, NODE)


def panel(page, node_id):
    """What the panel shows, once its chart is drawn and its images are there."""
    page.fit()
    return page.wait_for(
        lambda: page.page.evaluate(READ_PANEL, node_id),
        lambda shown: shown and shown["marks"] and shown["images"] >= 2,
    )


@pytest.mark.long_in_vue
def test_a_click_chooses_a_plan_and_the_node_answers_from_what_it_measured(page, workflow, renderer):
    node_id = workflow.id(NODE)
    page.load(workflow.data)
    for name, value in FEW.items():
        page.set_widget(node_id, name, value)
    assert page.run().status == "success"
    shown = panel(page, node_id)
    assert shown["plans"]
    assert len(shown["shown"]) == 1
    assert shown["marks"] > len(shown["plans"])
    assert shown["images"] >= 2
    keep_picture(page, f"tune-{renderer}")
    assert shown["overflow"] <= 0
    assert shown["chosen"] == ""
    page.page.locator(".slipstream-tune").get_by_role("button", name="Copy as Markdown").dispatch_event("click")
    page.settle()
    copied = page.page.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith("### DemoFamily, 64x64, 6 steps of ")
    assert all(f"| {name} |" in copied for name in shown["plans"] if name not in shown["shown"])

    # The table's first rows may be the best alone.
    every = page.page.locator(".slipstream-tune").get_by_role("button", name="All ")
    if every.is_visible():
        every.dispatch_event("click")
        shown = panel(page, node_id)
    other = next(name for name in shown["usable"] if "steps" not in name and name not in shown["shown"])
    row = page.page.locator(f'.slipstream-tune [data-plan="{other}"] tr')
    row.dispatch_event("click")
    page.settle()
    chosen = panel(page, node_id)
    assert chosen["chosen"] == other
    assert chosen["shown"] == [other]
    assert page.run().status == "success"
    assert page.verdicts(node_id)[0].text.startswith(f"chosen: {other}; ")
    # A second click goes back to the best.
    row.dispatch_event("click")
    page.settle()
    assert panel(page, node_id)["chosen"] == ""

    page.reload()
    kept = panel(page, node_id)
    assert kept["plans"]
    assert kept["images"] >= 2
    assert page.verdicts(node_id)[0].is_last
    assert not page.problems()


@pytest.mark.long
def test_it_is_readable_on_light_too(open_page, workflow):
    page = open_page("vue", theme="light")
    node_id = workflow.id(NODE)
    page.load(workflow.data)
    for name, value in FEW.items():
        page.set_widget(node_id, name, value)
    assert page.run().status == "success"
    assert panel(page, node_id)["plans"]
    keep_picture(page, "tune-light")
    assert not page.problems()


@pytest.mark.long
def test_a_plan_saved_by_one_comfyui_loads_in_another_with_other_packages(server, tmp_path, monkeypatch):
    """The other one has no torchao."""
    methods = {
        "2": {"class_type": "SlipstreamForecast", "inputs": {"model": ["1", 0], "error_budget": 0.1}},
        "3": {"class_type": "SlipstreamQuantize", "inputs": {"model": ["2", 0], "scheme": "int8 dynamic"}},
    }
    nodes = server.nodes()
    for node in methods.values():
        required = nodes[node["class_type"]]["input"]["required"]
        defaults = {
            name: spec[1]["default"] for name, spec in required.items() if len(spec) > 1 and "default" in spec[1]
        }
        node["inputs"] = {**defaults, **node["inputs"]}
    loader = {"1": {"class_type": "SlipstreamDemoModel", "inputs": {}}}
    save = {"4": {"class_type": "SlipstreamSavePlan", "inputs": {"model": ["3", 0], "save_as": "from one"}}}
    server.result(server.wait_for(server.queue({**loader, **methods, **save})))
    (saved,) = server.log.parent.glob("user/slipstream/plans/from one.json")

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torchao.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    base = tmp_path / "other"
    (base / "user" / "slipstream" / "plans").mkdir(parents=True)
    shutil.copy(saved, base / "user" / "slipstream" / "plans")
    with scratch_server(ROOT, base) as other:
        sampler = {
            "seed": 1, "steps": 8, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0],
        }  # fmt: skip
        prompt = {
            **loader,
            "2": {"class_type": "SlipstreamLoadPlan", "inputs": {"model": ["1", 0], "plan": "from one"}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "summer"}},
            "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "5": {"class_type": "KSampler", "inputs": sampler},
            "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
            "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "x"}},
        }
        other.result(other.wait_for(other.queue(prompt)))
        told = other.get("/slipstream/verdicts")["verdicts"]
        (lines,) = [one["lines"] for one in told if one["node_type"] == "SlipstreamLoadPlan"]
    texts = [line["text"] for line in lines]
    assert any(text.startswith("Forecast: ") for text in texts), texts
    assert any("torchao" in text and "left out" in text for text in texts), texts


@pytest.mark.long
@pytest.mark.parametrize("after", [1, 6])
def test_after_a_crash_it_goes_on_and_nothing_is_measured_twice(after, tmp_path):
    """The server is killed in the middle of a run, whatever is being written then."""
    base = tmp_path / "comfyui"
    parser = argparse.ArgumentParser()
    tune_options.add_options(parser)
    arguments = parser.parse_args(["--size", "64", "--steps", "6", "--floor", "0.3", "--seeds", "1", "--minutes", "1"])

    def trials():
        files = list((base / "user" / "slipstream" / "tune").glob("*.json"))
        return json.loads(files[0].read_text())["trials"] if files else []

    with scratch_server(ROOT, base) as first:
        prompt = tune.build_prompt(first.nodes(), None, arguments)
        first.queue(prompt)
        deadline = time.monotonic() + 300
        while len(trials()) < after:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
    kept = trials()
    with scratch_server(ROOT, base) as second:
        second.result(second.wait_for(second.queue(prompt)))
    every = trials()
    assert every[: len(kept)] == kept
    assert len(every) > len(kept)
    # The exact model's time is taken beside each plan's; and a plan's once more, where the machine changed under it.
    counted = Counter((trial["plan"], trial["picture"]) for trial in every if trial["plan"])
    assert max(counted.values()) <= 2
    assert sum(number == 2 for number in counted.values()) <= len(counted) / 4
