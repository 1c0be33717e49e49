"""ComfyUI-Distributed, as it is installed: a master and a worker, two real servers with our nodes on both, and the
master's page in a real browser.

Runs where `SLIPSTREAM_OTHER_PACKS` names a folder with https://github.com/robertvoy/ComfyUI-Distributed in it, with
``--long``. Loopback only.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import Page, keep_picture
from comfyui import Server
from loading import ROOT, find_comfyui
from PIL import Image
from prompts import make_base

from workflows import Workflow, seeds

PACK = Path(os.environ.get("SLIPSTREAM_OTHER_PACKS", "")) / "ComfyUI-Distributed"
if not os.environ.get("SLIPSTREAM_OTHER_PACKS") or not PACK.is_dir():
    pytest.skip("SLIPSTREAM_OTHER_PACKS names no folder with ComfyUI-Distributed", allow_module_level=True)

pytestmark = pytest.mark.long

OURS = ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU")
NAME = "attic"
"""What the worker is called on the master."""
TIMEOUT_S = 4
"""How long the master waits for a worker that has gone silent; a minute by default."""


@contextmanager
def serving(folder: Path, port: int = 0, ours: bool = True, version: str = "", cors: bool = True) -> Iterator[Server]:
    """A server with Distributed and our pack in a folder of its own; in one that is there, again.

    Args:
        ours: whether our pack is there.
        version: that of our pack; its own, if empty.
        cors: as Distributed starts its workers, and as its page wants remote ones.
    """
    packs = folder / "custom_nodes"
    if not packs.exists():
        make_base(folder, ROOT)
        # A copy: it keeps its settings in its own folder.
        shutil.copytree(PACK, packs / PACK.name, ignore=shutil.ignore_patterns(".git", "tests"))
        if version:
            project = packs / "slipstream" / "pyproject.toml"
            lines = project.read_text(encoding="utf-8").splitlines()
            lines = [f'version = "{version}"' if line.startswith("version = ") else line for line in lines]
            project.write_text("\n".join(lines), encoding="utf-8")
        if not ours:
            shutil.rmtree(packs / "slipstream")
    comfyui = find_comfyui()
    assert comfyui is not None
    options = ["--cpu", *(["--enable-cors-header"] if cors else [])]
    with Server(comfyui, folder, folder / "server.log", options, port) as server:
        yield server


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("master"), cors=False) as server:
        yield server


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("worker")) as server:
        yield server


def employ(master: Server, *workers: Server) -> list[str]:
    """Tells the master of its workers, as its page does. Their ids."""
    ids = [f"w{number}" for number, _ in enumerate(workers)]
    entries = [
        {"id": name, "name": NAME if name == "w0" else name, "host": "127.0.0.1", "port": server.port, "enabled": True}
        for name, server in zip(ids, workers, strict=True)
    ]
    settings = {"worker_timeout_seconds": TIMEOUT_S, "has_auto_populated_workers": True}
    master.post("/distributed/config", {"workers": entries, **settings})
    return ids


def spread(workflow: Workflow, seed: int | None = None) -> Workflow:
    """A workflow as Distributed wants it: a seed that differs by worker, and one node that collects the pictures."""
    seed_node = workflow.add("DistributedSeed", {}, ["INT"], [seed or next(seeds), "fixed"])
    sampler = workflow.node("KSampler")
    sampler["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": None})
    workflow.link(seed_node, 0, sampler, "seed")
    collector = workflow.add("DistributedCollector", {"images": "IMAGE"}, ["IMAGE", "AUDIO"], [False])
    workflow.link(workflow.node("VAEDecode"), 0, collector, "images")
    workflow.link(collector, 0, workflow.node("SaveImage"), "images")
    return workflow


@contextmanager
def opened(browser, master: Server, request, renderer: str = "classic") -> Iterator[Page]:
    page = browser.open(master, renderer)
    yield page
    keep_picture(page, request.node.name)
    page.context.close()


def pictures(server: Server, entry: dict) -> list[Image.Image]:
    """The saved pictures of a prompt, by its entry in the history."""
    outputs, _ = server.result(entry)
    (found,) = [output["images"] for output in outputs.values() if "images" in output]
    return [picture(server, image) for image in found]


def picture(server: Server, image: dict) -> Image.Image:
    import urllib.parse
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/view?{urllib.parse.urlencode(image)}", timeout=60) as response:
        return Image.open(io.BytesIO(response.read()))


def texts(page: Page, node: int) -> list[tuple[str, str]]:
    return [(line.state, line.text) for line in page.verdicts(node)]


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_workers_verdicts_are_on_the_masters_nodes(renderer, browser, master, worker, request):
    employ(master, worker)
    workflow = spread(Workflow())
    with opened(browser, master, request, renderer) as page:
        page.load(workflow.data)
        outcome = page.run()
        assert outcome.status == "success"
        for name in OURS:
            own, others = texts(page, workflow.id(name))
            print(own, others)
            assert own[0] == "active"
            assert others == ("active", f"{NAME}: {own[1]}")
        assert not page.problems()
