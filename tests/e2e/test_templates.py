"""Each template as a user meets it: opened from the Templates browser, run, reloaded, in both renderers."""

from __future__ import annotations

import pytest
from loading import ROOT

from workflows import TEMPLATES


@pytest.mark.parametrize("title", list(TEMPLATES))
def test_a_template_opens_runs_shows_image_and_verdicts_and_still_does_after_a_reload(title, page):
    page.open_template("slipstream", title)
    assert not page.errors()
    outcome = page.run(timeout_s=300)
    assert outcome.status == "success", outcome
    ours = [node["id"] for node in TEMPLATES[title]["nodes"] if node["type"].startswith("Slipstream")]
    assert ours
    fit(page)
    for node_id in ours:
        (line,) = page.verdicts(node_id)
        assert line.state == "active"
        assert line.is_visible
        assert not line.is_last
    savers = [node["id"] for node in TEMPLATES[title]["nodes"] if node["type"] == "SaveImage"]
    assert all(page.shows_image(node_id) for node_id in savers)
    texts = [page.verdicts(node_id)[0].text for node_id in ours]
    page.reload()
    fit(page)
    for node_id, text in zip(ours, texts, strict=True):
        (line,) = page.verdicts(node_id)
        assert line.is_last
        assert line.text.endswith(text)
        assert line.is_visible
    assert not page.problems()


def fit(page):
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(800)


def test_help_pages_open(page):
    for name in (path.stem for path in (ROOT / "web" / "docs").glob("*.md")):
        answer = page.page.request.get(f"{page.server.url}/extensions/slipstream/docs/{name}.md")
        assert answer.ok
        assert "## Inputs" in answer.text()
