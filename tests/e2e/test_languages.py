"""What the host shows of each node in English and in Chinese: the texts on the canvas, and the help page."""

from __future__ import annotations

import json
import re

import pytest
from loading import ROOT

DOCS = ROOT / "web" / "docs"
NODES = sorted(page.stem for page in DOCS.glob("*.md"))
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))

_ADD = """
(type) => {
  app.graph.clear()
  const node = LiteGraph.createNode(type)
  node.pos = [300, 250]
  app.graph.add(node)
  const inputs = {}
  const read = () => {
    for (const { name, label, localized_name } of node.inputs) inputs[name] = label ?? localized_name ?? name
    for (const { name, label } of node.widgets ?? []) if (name in inputs) inputs[name] = label ?? name
  }
  read()
  // Each choice of a dynamic combo brings inputs of its own.
  for (const [name, [kind]] of Object.entries(node.constructor.nodeData.input?.required ?? {})) {
    const widget = node.widgets?.find((widget) => widget.name === name)
    if (kind === 'COMFY_DYNAMICCOMBO_V3')
      for (const value of [...widget.options.values]) { widget.value = value; read() }
  }
  const outputs = node.outputs.map(({ label, localized_name }) => label ?? localized_name)
  app.canvas.ds.reset()
  return { title: node.title, inputs, outputs }
}
"""

_IS_HELP = """
(title) => document.querySelector('.node-help-content .markdown-content h1')?.textContent === title
"""

_READ_HELP = """
async () => {
  const help = document.querySelector('.node-help-content .markdown-content')
  const pictures = [...help.querySelectorAll('img')]
  await Promise.allSettled(pictures.map((picture) => picture.decode()))
  return {
    text: help.innerText,
    headings: [...help.querySelectorAll('h2')].map((heading) => heading.textContent),
    tables: [...help.querySelectorAll('table')].map((table) =>
      [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))
    ),
    links: [...help.querySelectorAll('a')].map((link) => link.getAttribute('href')),
    broken: pictures.filter((picture) => !picture.naturalWidth).map((picture) => picture.src)
  }
}
"""


def plain(cell: str) -> str:
    """A cell of a Markdown table as it is read."""
    return re.sub(r"[*`]", "", cell.strip())


def tables(text: str) -> list[list[str]]:
    """The first cells of each table's rows, its head and all."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(plain(line.split("|")[1]))
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


@pytest.mark.parametrize("locale", [pytest.param("en", marks=pytest.mark.long), "zh"])
def test_the_canvas_and_the_help_panel(open_page, locale):
    page = open_page(settings={"Comfy.Locale": locale})
    for name in NODES:
        shown = page.page.evaluate(_ADD, name)
        told = CHINESE[name] if locale == "zh" else None
        if told is not None:
            assert shown["title"] == told["display_name"]
            labels = {key.replace(".", "_"): label for key, label in shown["inputs"].items()}
            assert labels == {key: text["name"] for key, text in told.get("inputs", {}).items()}
            for index, text in told["outputs"].items():
                assert shown["outputs"][int(index)] == text.get("name", shown["outputs"][int(index)])
        else:
            assert shown["title"].endswith(" (Slipstream)")

        page.settle()
        page.page.mouse.click(400, 235)  # its title
        page.page.get_by_test_id("info-button").click()
        source = (DOCS / (f"{name}.md" if told is None else f"{name}/zh.md")).read_text(encoding="utf-8")
        page.page.wait_for_function(_IS_HELP, arg=re.match("# (.+)", source)[1])
        help_page = page.page.evaluate(_READ_HELP)
        assert help_page["headings"] == [plain(heading) for heading in re.findall("(?m)^## (.+)", source)]
        assert [[row[0] for row in table] for table in help_page["tables"]] == tables(source)
        assert not re.search(r"<!--|-->|\*\*|`", help_page["text"]), f"{name}: Markdown shows"
        assert all(link.startswith("https://") for link in help_page["links"])
        assert not help_page["broken"]
    # The host asks for <NodeId>/en.md first, and then takes <NodeId>.md.
    assert not [problem for problem in page.problems() if not problem.endswith("/en.md)")]
