"""Every help page has the same sections, in English and in Chinese."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from loading import ROOT

DOCS = ROOT / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))

SECTIONS = {
    "Inputs": "输入",
    "The verdict": "运行结论",
    "When, and when not": "适用与不适用",
    "What it costs": "代价",
    "Measured": "实测",
    "Works with": "搭配使用",
    "Source": "来源",
}
"""English to Chinese, in their order. Sections of a node's own may stand between them."""


def sections(page: Path) -> dict[str, str]:
    """The text under each heading, in order."""
    _, *parts = re.split(r"(?m)^## (.+)\n", page.read_text(encoding="utf-8"))
    assert len(set(parts[::2])) == len(parts[::2]), f"{page} has a section twice"
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_every_section_in_order(page):
    found = sections(page)
    assert [heading for heading in found if heading in SECTIONS] == list(SECTIONS)
    assert all(text.strip() for text in found.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_chinese_page_has_the_sections_of_the_english_one(page):
    english, chinese = sections(page), sections(DOCS / page.stem / "zh.md")
    assert len(chinese) == len(english)
    of_all = [(SECTIONS.get(one), other) for one, other in zip(english, chinese, strict=True)]
    assert all(expected in (None, other) for expected, other in of_all), of_all
    assert all(text.strip() for text in chinese.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_chinese_page_has_the_figures_of_the_english_one(page):
    english, chinese = sections(page), sections(DOCS / page.stem / "zh.md")
    for one, other in zip(english, chinese, strict=True):
        assert figures(english[one]) <= figures(chinese[other]), f"{one} has figures that {other} lacks"


def figures(text: str) -> set[str]:
    """Numbers with a decimal point, outside of the generated tables."""
    return set(re.findall(r"\d+\.\d+(?:e-\d+)?", re.sub(r"(?s)<!-- inputs -->.*<!-- /inputs -->", "", text)))
