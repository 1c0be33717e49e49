"""The help pages' tables of inputs are what the schemas say, in each language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io
from hosted import HOSTS_OWN, NODES

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
BEGIN, END = "<!-- inputs -->", "<!-- /inputs -->"

WORDS = {
    "inputs": ("input", "kind and default", "what it does"),
    "outputs": ("output", "kind", "what it is"),
    "default": " (default)",
    "range": " ({} to {})",
    "at least": " ({} or more)",
    "of": "; for {}",
    "optional": ", optional",
    "comma": ", ",
    "or": " or ",
    "any": "anything",
    "sampler_name": "ComfyUI's samplers",
    "scheduler": "ComfyUI's schedulers",
    "name": "`auto` (default), or a file of yours",
}

every_node = pytest.mark.parametrize("name", list(NODES))


def inputs_of(node: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """A node's inputs: (id as prompts name it, the input, the choices that have it), those of a choice after it."""
    for entry in node.define_schema().inputs:
        yield entry.id, entry, []
        if isinstance(entry, io.DynamicCombo.Input):
            inner = {nested.id: nested for option in entry.options for nested in option.inputs}
            for name, nested in inner.items():
                having = [option.key for option in entry.options if name in [each.id for each in option.inputs]]
                yield f"{entry.id}.{name}", nested, having


def kind(entry: Any, having: list[str], words: dict[str, Any]) -> str:
    """What goes in, what it is by default, and what it can be."""
    default, choices = getattr(entry, "default", None), getattr(entry, "options", None)
    if entry.id in HOSTS_OWN:
        told = words[entry.id]
    elif choices is not None:
        keys = [getattr(choice, "key", choice) for choice in choices]
        default = keys[0] if default is None else default
        told = words["comma"].join(f"`{key}`" + (words["default"] if key == default else "") for key in keys)
    else:
        told = io_type(entry, words)
        if default not in (None, ""):
            told += f" {str(default).lower() if isinstance(default, bool) else plain(default)}"
        if getattr(entry, "max", None) is not None:
            # A seed's end is that of its 64 bits.
            bounds = words["at least"] if entry.max >= 2**63 else words["range"]
            told += bounds.format(plain(entry.min), plain(entry.max))
    if entry.optional:
        told += words["optional"]
    return told + (words["of"].format(words["comma"].join(f"`{key}`" for key in having)) if having else "")


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def io_type(entry: Any, words: dict[str, Any]) -> str:
    told = entry.get_io_type()
    return words["any"] if told in ("*", "COMFY_MATCHTYPE_V3") else told.replace(",", words["or"])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def tables(name: str) -> str:
    """The table of a node's inputs; and of its outputs, unless that is one of the kind that came in."""
    node, words = NODES[name], WORDS
    inputs = [(f"`{key}`", kind(entry, having, words), entry.tooltip) for key, entry, having in inputs_of(node)]
    schema = node.define_schema()
    outputs = [
        (f"`{entry.display_name or entry.get_io_type()}`", io_type(entry, words), entry.tooltip)
        for entry in schema.outputs
    ]
    found = [table(words["inputs"], inputs)] if inputs else []
    if [entry.get_io_type() for entry in schema.outputs] != ["MODEL"]:
        found.append(table(words["outputs"], outputs))
    return "\n\n".join(found)


@every_node
def test_the_tables_of_inputs_are_what_the_schema_says(name):
    """They drifted? This writes them anew: look at them and run again."""
    page = DOCS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, f"{page.name} needs one {BEGIN} and one {END} under its heading"
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    now = f"\n\n{tables(name)}\n\n"
    if written != now:
        page.write_text(before + BEGIN + now + END + after, encoding="utf-8")
        pytest.fail(f"the tables of {page.name} were no longer what the schema says; they were written anew")
