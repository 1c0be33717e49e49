"""One real server and one real browser for all tests, and a page for each renderer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading import ROOT, find_chromium

sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "demo"), str(ROOT / "tests" / "released")]

from browser import Browser, Page, keep_picture
from comfyui import Server
from prompts import scratch_server

from workflows import Workflow


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    with scratch_server(ROOT, tmp_path_factory.mktemp("comfyui")) as started:
        yield started


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with Browser(find_chromium()) as started:
        yield started


@pytest.fixture
def open_page(server, browser, request) -> Iterator:
    """Opens pages of a test's own, and closes them at the end."""
    pages: list[Page] = []

    def opened(renderer="classic", **kwargs) -> Page:
        pages.append(browser.open(server, renderer, **kwargs))
        return pages[-1]

    yield opened
    for number, page in enumerate(pages):
        keep_picture(page, f"{request.node.name}-{number}")
        page.context.close()


PAGES: dict[str, Page] = {}


@pytest.fixture(scope="session")
def pages(browser) -> dict[str, Page]:
    """The page of each renderer: ComfyUI's takes longer to load than most tests to run."""
    return PAGES


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Close the pages behind the last test of the suite. One that waits takes its share of a processor too."""
    # Behind the very last test the browser has closed already.
    if nextitem is not None and "e2e" not in nextitem.path.parts:
        while PAGES:
            PAGES.popitem()[1].context.close()


@pytest.fixture(scope="module", params=["classic", "vue"])
def renderer(request) -> str:
    return request.param


@pytest.fixture
def page(renderer, server, browser, pages, request) -> Iterator[Page]:
    """A renderer's page with an empty workflow open and nothing else."""
    if renderer in pages:
        pages[renderer].start_over(renderer)
    else:
        pages[renderer] = browser.open(server, renderer)
    failed = request.session.testsfailed
    yield pages[renderer]
    keep_picture(pages[renderer], request.node.name)
    if request.session.testsfailed > failed:
        # Who knows what it left open.
        pages.pop(renderer).context.close()


@pytest.fixture
def workflow() -> Workflow:
    return Workflow()
