"""The subgraph blueprint as a user meets it: found in the node search, put on the canvas, wired and run."""

from __future__ import annotations

import json

from loading import ROOT

(PATH,) = (ROOT / "subgraphs").glob("*.json")


def test_the_blueprint_is_found_put_on_the_canvas_wired_and_runs(page, workflow):
    page.load(workflow.data)
    outer = page.add_by_search(PATH.stem)
    page.page.evaluate(
        """([loader, outer, sampler]) => {
            const [from, node, to] = [loader, outer, sampler].map(slipstreamTest.node)
            from.connect(0, node, 0)
            node.connect(0, to, 0)
        }""",
        [workflow.id("CheckpointLoaderSimple"), outer, workflow.id("KSampler")],
    )
    widgets = page.page.evaluate("(id) => slipstreamTest.node(id).widgets.map((widget) => widget.name)", outer)
    inputs = json.loads(PATH.read_text())["definitions"]["subgraphs"][0]["inputs"]
    assert widgets == [entry["name"] for entry in inputs if entry["type"] != "MODEL"]
    page.set_widget(outer, "cache_interval", 2)
    assert page.run().status == "success"
    deepcache, cutoff, precision = page.verdicts(outer)
    assert deepcache.text.startswith("DeepCache (Slipstream): reused the deep features in 4 of 8 steps")
    assert cutoff.text.startswith("CFG Cutoff (Slipstream): ")
    assert precision.text.startswith("Precision (Slipstream): ")
    assert (deepcache.state, cutoff.state) == ("active", "active")
    assert not page.errors()
    assert not page.problems()
