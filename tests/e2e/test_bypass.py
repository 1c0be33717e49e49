"""Bypassing a node equals removing it; muting one equals deleting it. By the keys that users press."""

from __future__ import annotations

import io
import itertools

import pytest
from PIL import Image

from workflows import classic_only

OURS = ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU")


def pixels(page, outcome, workflow) -> bytes:
    """The picture that a prompt saved."""
    return Image.open(io.BytesIO(page.saved(outcome.prompt_id, workflow.id("SaveImage")))).tobytes()


@pytest.mark.long
@classic_only
def test_bypassing_any_of_them_equals_removing_it(page, workflow):
    pictures = {}
    for count in range(len(OURS) + 1):
        for names in itertools.combinations(OURS, count):
            page.load(workflow.data, "-".join(("bypassed", *names)))
            for name in names:
                page.press("Control+b", workflow.id(name))
                assert page.mode(workflow.id(name)) == 4
            bypassed, outcome = page.prompt(), page.run()
            assert outcome.status == "success"
            pictures[names] = pixels(page, outcome, workflow)
            for name in OURS:
                assert bool(page.verdicts(workflow.id(name))) == (name not in names)
            if count == 1 or names == OURS:
                page.load(workflow.data, "-".join(("removed", *names)))
                for name in names:
                    page.press("Delete", workflow.id(name))  # the host wires what fed it to what it fed
                assert page.prompt() == bypassed
                outcome = page.run()
                assert outcome.status == "success"
                assert pixels(page, outcome, workflow) == pictures[names]
    assert len(set(pictures.values())) == len(pictures)
    assert not page.problems()


@classic_only
@pytest.mark.parametrize("name", OURS)
def test_muting_equals_taking_it_out_with_its_links(name, page, workflow):
    """So the host does with any node: the sampler has no model then, and the prompt is refused."""
    page.load(workflow.data, "muted")
    page.press("Control+m", workflow.id(name))
    assert page.mode(workflow.id(name)) == 2
    muted, refused = page.prompt(), page.run()
    page.close_errors()
    page.load(workflow.data, "removed")
    page.page.evaluate("(id) => app.rootGraph.remove(slipstreamTest.node(id))", workflow.id(name))
    page.settle()
    assert page.prompt() == muted
    assert page.run() == refused
    assert refused.status == "refused"
