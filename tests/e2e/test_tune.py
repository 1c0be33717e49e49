"""The Tune node's panel on the real canvas, in both renderers: the chart, a click that chooses a plan, a reload."""

from __future__ import annotations

import pytest
from browser import keep_picture

from workflows import TUNE, Workflow

NODE = "SlipstreamTune"
FEW = {"steps": 8, "seeds": 1, "floor": 0.3, "minutes": 2}

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
    for _ in range(100):
        shown = page.page.evaluate(READ_PANEL, node_id)
        if shown and shown["marks"] and shown["images"] >= 2:
            break
        page.page.wait_for_timeout(100)
    return shown


@pytest.mark.long_in_vue
def test_a_click_chooses_a_plan_and_the_node_answers_from_what_it_measured(page, workflow, renderer):
    node_id = workflow.id(NODE)
    page.load(workflow.data)
    for name, value in FEW.items():
        page.set_widget(node_id, name, value)
    page.set_widget(workflow.id("EmptyLatentImage"), "width", 128)
    page.set_widget(workflow.id("EmptyLatentImage"), "height", 128)
    assert page.run(timeout_s=300).status == "success"
    shown = panel(page, node_id)
    assert len(shown["plans"]) > 1
    assert len(shown["shown"]) == 1
    assert shown["marks"] > len(shown["plans"])
    assert shown["images"] >= 2
    keep_picture(page, f"tune-{renderer}")
    assert shown["overflow"] <= 0
    assert shown["chosen"] == ""

    other = next(name for name in shown["plans"] if "steps" not in name and name not in shown["shown"])
    row = page.page.locator(f'.slipstream-tune [data-plan="{other}"] tr')
    row.dispatch_event("click")
    page.settle()
    chosen = panel(page, node_id)
    assert chosen["chosen"] == other
    assert chosen["shown"] == [other]
    assert page.run(timeout_s=60).status == "success"
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
