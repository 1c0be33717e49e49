"""What users read of each node, in English and in Chinese: translations, and the help pages' tables of inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io
from hosted import HOSTS_OWN, NODES

ROOT = Path(__file__).resolve().parents[2]
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
BEGIN, END = "<!-- inputs -->", "<!-- /inputs -->"

WORDS = {
    "en": {
        "inputs": ("input", "what it takes and does"),
        "outputs": ("output", "what it is"),
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
        "plan": "a file of yours, or one that comes with Slipstream",
    },
    "zh": {
        "inputs": ("输入", "取值与作用"),
        "outputs": ("输出", "内容"),
        "default": "（默认）",
        "range": "（{} 到 {}）",
        "at least": "（不小于 {}）",
        "of": "；用于 {}",
        "optional": "，可选",
        "comma": "、",
        "or": " 或 ",
        "any": "任意",
        "sampler_name": "ComfyUI 的采样器",
        "scheduler": "ComfyUI 的调度器",
        "name": "`auto`（默认），或已有的文件",
        "plan": "已有的文件，或随 Slipstream 提供的文件",
    },
}
CHINESE = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
SAME_IN_CHINESE = {"CFG", "CFG Cutoff", "DeepCache", "FreeU", "TF32", "VAE", "Winograd", "b1", "b2", "s1", "s2"}
"""Names that stay as they are."""

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


def tables(name: str, locale: str) -> str:
    """The table of a node's inputs; and of its outputs, unless that is one of the kind that came in."""
    words, chinese = WORDS[locale], CHINESE[name] if locale == "zh" else None

    def row(slot: str, key: str, label: str, told: str, tooltip: str) -> tuple[str, str]:
        # Two columns: the host's help panel is narrow.
        if chinese is None:
            return f"`{label}`", f"{told}<br>{tooltip}"
        # What the canvas shows it as goes beside the id.
        found = chinese[slot][key]
        shown = found.get("name", label)
        return f"`{label}`" + (f" {shown}" if shown != label else ""), f"{told}<br>{found['tooltip']}"

    schema = NODES[name].define_schema()
    inputs = [
        row("inputs", key.replace(".", "_"), key, kind(entry, having, words), entry.tooltip)
        for key, entry, having in inputs_of(NODES[name])
    ]
    outputs = [
        row("outputs", str(index), entry.display_name or entry.get_io_type(), io_type(entry, words), entry.tooltip)
        for index, entry in enumerate(schema.outputs)
    ]
    found = [table(words["inputs"], inputs)] if inputs else []
    if [entry.get_io_type() for entry in schema.outputs] != ["MODEL"]:
        found.append(table(words["outputs"], outputs))
    return "\n\n".join(found)


@every_node
@pytest.mark.parametrize("locale", ["en", "zh"])
def test_the_tables_of_inputs_are_what_the_schema_says(name, locale):
    """They drifted? This writes them anew: look at them and run again."""
    page = DOCS / (f"{name}.md" if locale == "en" else f"{name}/{locale}.md")
    text = page.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, f"{page} needs one {BEGIN} and one {END} under its heading"
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    now = f"\n\n{tables(name, locale)}\n\n"
    if written != now:
        page.write_text(before + BEGIN + now + END + after, encoding="utf-8")
        pytest.fail(f"the tables of {page} were no longer what the schema says; they were written anew")


def english(node: Any) -> dict[str, Any]:
    """What the host translates of a node, keyed as its locale files are: a choice's inputs as ``choice_input``."""
    schema = node.define_schema()
    inputs = {key.replace(".", "_"): {"name": entry.id, "tooltip": entry.tooltip} for key, entry, _ in inputs_of(node)}
    # An output without a name is shown as its type, which the host translates.
    outputs = {
        str(index): {**({"name": entry.display_name} if entry.display_name else {}), "tooltip": entry.tooltip}
        for index, entry in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        **({"inputs": inputs} if inputs else {}),
        "outputs": outputs,
    }


def texts(found: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves, by their path."""
    flat = {}
    for key, value in found.items():
        flat |= texts(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_the_translation_has_what_the_schemas_have_and_nothing_else():
    assert texts(CHINESE).keys() == texts({name: english(node) for name, node in NODES.items()}).keys()


def test_every_category_that_is_translated_is_one_of_ours():
    """The host translates a category's parts for every pack: it has model, sampling and loaders itself."""
    main = json.loads((LOCALES / "zh" / "main.json").read_text(encoding="utf-8"))
    ours = {part for node in NODES.values() for part in node.define_schema().category.split("/")}
    assert main.keys() == {"nodeCategories", "menuLabels"}
    assert main["nodeCategories"].keys() == {"measure", "memory"} <= ours


@every_node
def test_the_translation_is_chinese_and_says_what_the_english_says(name):
    node = NODES[name]
    told, said = texts(english(node)), texts(CHINESE[name])
    choices = {
        key.replace(".", "_"): [str(getattr(choice, "key", choice)) for choice in entry.options]
        for key, entry, _ in inputs_of(node)
        if entry.id not in HOSTS_OWN and getattr(entry, "options", None)
    }
    for key, chinese in said.items():
        if chinese.removesuffix(" (Slipstream)") not in SAME_IN_CHINESE:
            assert re.search("[\u4e00-\u9fff]", chinese), f"{key} is not Chinese: {chinese}"
        # They have a meaning in the host's messages.
        assert not set("{}@|") & set(chinese), f"{key}: {chinese}"
        numbers = [set(re.findall(r"\d+(?:\.\d+)?", text)) for text in (told[key], chinese)]
        assert numbers[0] <= numbers[1], f"{key} lacks {numbers[0] - numbers[1]}: {chinese}"
        _, _, owner = key.removesuffix(".tooltip").rpartition("inputs.")
        for choice in choices.get(owner, []):
            assert f"{choice}:" not in told[key] or choice in chinese, f"{key} does not tell {choice}: {chinese}"
