"""Hundreds of sampling runs in one prompt, in the page: what is sent, and how tall a node becomes."""

from __future__ import annotations

import pytest
from browser import Page

from workflows import Workflow, seeds

OURS = ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU")
TALLEST = 420
"""Graph units that a node may grow by: half of a screen. One line of text takes 25 and more."""
LARGEST = 1500
"""Bytes of a message."""

_LISTEN = """
() => {
  const heard = (window.slipstreamHeard = { bytes: {}, messages: {}, largest: 0, tallest: {}, long_ms: 0, draws: 0 })
  app.api.addEventListener('slipstream.verdict', ({ detail }) => {
    const size = JSON.stringify(detail).length
    heard.bytes[detail.node_id] = (heard.bytes[detail.node_id] ?? 0) + size
    heard.messages[detail.node_id] = (heard.messages[detail.node_id] ?? 0) + 1
    heard.largest = Math.max(heard.largest, size)
  })
  const look = () => {
    for (const { id, size } of app.graph.nodes) heard.tallest[id] = Math.max(heard.tallest[id] ?? 0, size[1])
    requestAnimationFrame(look)
  }
  look()
  new MutationObserver((changes) => {
    heard.draws += changes.some(({ target }) => target.className === 'slipstream-verdict__rows')
  }).observe(document.body, { subtree: true, childList: true })
  new PerformanceObserver((list) => {
    for (const { duration } of list.getEntries()) heard.long_ms = Math.max(heard.long_ms, duration)
  }).observe({ entryTypes: ['longtask'] })
}
"""


def many_runs(workflow: Workflow, runs: int, kinds: int = 1, fails: int = -1) -> dict:
    """A sampler that samples many times, in the place of the template's."""
    workflow.set("CheckpointLoaderSimple", 0, "minimal.safetensors")
    inputs = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
    many = workflow.add("TestManyRuns", inputs, ["LATENT"], [next(seeds), "fixed", runs, kinds, fails])
    prompts = [node for node in workflow.data["nodes"] if node["type"] == "CLIPTextEncode"]
    workflow.link(workflow.node("SlipstreamFreeU"), 0, many, "model")
    workflow.link(prompts[0], 0, many, "positive")
    workflow.link(prompts[1], 0, many, "negative")
    workflow.link(workflow.node("EmptyLatentImage"), 0, many, "latent_image")
    workflow.link(many, 0, workflow.node("VAEDecode"), "samples")
    return many


def heard_of(page: Page) -> dict:
    return dict(page.page.evaluate("() => slipstreamHeard"))


@pytest.mark.parametrize("runs", [30, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kinds", "fails"), [(1, -1), (10, 20)], ids=["equal", "differing, one fails"])
def test_a_node_stays_low_and_its_messages_small(kinds, fails, runs, page, workflow):
    many_runs(workflow, runs, kinds, fails)
    page.load(workflow.data)
    before = {name: page.page.evaluate("(id) => slipstreamTest.node(id).size[1]", workflow.id(name)) for name in OURS}
    page.page.evaluate(_LISTEN)
    assert page.run().status == "success"
    heard = heard_of(page)
    print(runs, heard)
    for name in OURS:
        node = workflow.id(name)
        lines = page.verdicts(node)
        assert len(lines) == 1 if kinds == 1 else 5 <= len(lines) <= 6
        assert ("failed" in {line.state for line in lines}) == (fails >= 0)
        assert "running" not in {line.state for line in lines}
        assert heard["tallest"][str(node)] - before[name] < TALLEST
        assert heard["messages"][str(node)] <= 2 * runs + 1
    assert heard["largest"] < LARGEST
    if kinds == 1:
        assert page.verdicts(workflow.id("SlipstreamDeepCache"))[0].text.startswith(f"{runs} times: ")
    assert not page.problems()


def test_a_subgraph_node_shows_one_line_of_each_inner_node_where_these_have_many(page, workflow):
    page.load(workflow.data)
    outer = page.to_subgraph([workflow.id(name) for name in OURS])
    inner = {name: page.inner(outer, name) for name in OURS}
    page.page.evaluate(
        """(nodes) => {
            const line = (number) => ({ sampler: 'KSampler 3', state: 'active', text: `took ${number} s`, times: 1 })
            for (const [node_type, node_id] of Object.entries(nodes)) {
                const lines = Array.from({ length: 12 }, (_, number) => line(number))
                if (node_type.endsWith('FreeU')) lines[4].state = 'failed'
                const detail = { prompt_id: 'p', workflow_id: app.rootGraph.id, node_id, node_type, lines, record: {} }
                app.api.dispatchEvent(new CustomEvent('slipstream.verdict', { detail }))
            }
        }""",
        inner,
    )
    assert [(line.state, line.text) for line in page.verdicts(outer)] == [
        ("active", "DeepCache (Slipstream): KSampler 3: took 11 s (+11)"),
        ("active", "CFG Cutoff (Slipstream): KSampler 3: took 11 s (+11)"),
        ("failed", "FreeU (Slipstream): KSampler 3: took 4 s (+11)"),
    ]
    page.enter_subgraph(outer)
    assert len(page.verdicts(inner["SlipstreamFreeU"])) == 12
    assert not page.problems()
