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


# The pictures


DEEPCACHE = ("SlipstreamDeepCache", {"cache_interval": 2, "cache_branch_id": 0, "schedule": "uniform"})
CUTOFF = ("SlipstreamCFGCutoff", {"cutoff": 0.5, "unit": "steps"})
FORECAST = ("SlipstreamForecast", {"error_budget": 0.5})
PLANS = {"none": (), "DeepCache and CFG Cutoff": (DEEPCACHE, CUTOFF), "Forecast": (FORECAST,)}


def graph(seed: int, ours=(DEEPCACHE, CUTOFF), steps: int = 6, model: str = "minimal", step_s: float = 0.0) -> dict:
    """A workflow of Distributed's, as it is queued."""
    nodes: dict[str, tuple[str, dict]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": f"{model}.safetensors"}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": "a lighthouse"}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": "blurry"}),
        "4": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "5": ("DistributedSeed", {"seed": seed}),
        "6": ("TestFault", {"model": ["1", 0], "fail_at": -1, "step_s": step_s}),
    }
    model_of = "6"
    for number, (kind, values) in enumerate(ours, 20):
        nodes[str(number)] = (kind, {"model": [model_of, 0], **values})
        model_of = str(number)
    conditions = {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    values = {"steps": steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    nodes["7"] = ("KSampler", {"model": [model_of, 0], "seed": ["5", 0], **conditions, **values})
    nodes["8"] = ("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]})
    nodes["9"] = ("DistributedCollector", {"images": ["8", 0], "load_balance": False})
    nodes["10"] = ("SaveImage", {"images": ["9", 0], "filename_prefix": "distributed"})
    return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}


def request_of(prompt: dict, workers: list[str], client: str = "a script", workflow: str = "a workflow") -> dict:
    """What Distributed's page posts to queue a prompt."""
    return {"prompt": prompt, "workflow": {"id": workflow}, "client_id": client, "enabled_worker_ids": workers}


def pixels(pictures: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


@pytest.mark.parametrize("plan", PLANS)
def test_a_workers_picture_is_that_of_one_machine_at_its_seed(plan, master, worker):
    ids = employ(master, worker)
    seed = 10 * next(seeds)
    answer = master.post("/distributed/queue", request_of(graph(seed, PLANS[plan]), ids))
    both = pixels(pictures(master, master.wait_for(answer["prompt_id"])))
    alone = [
        pixels(pictures(master, master.wait_for(master.queue(graph(seed + offset, PLANS[plan]))))) for offset in (0, 1)
    ]
    assert [len(found) for found in alone] == [1, 1]
    assert len(both) == 2
    assert np.array_equal(both[0], alone[0][0])
    assert np.array_equal(both[1], alone[1][0])
    assert not np.array_equal(both[0], both[1])


def test_an_image_of_the_master_tells_its_plan_and_which_workers_took_part(master, worker):
    """Distributed makes the dict that files tell of past every other pack: the prompt in the file tells it."""
    ids = employ(master, worker)
    answer = master.post("/distributed/queue", request_of(graph(10 * next(seeds)), ids))
    images = pictures(master, master.wait_for(answer["prompt_id"]))
    assert len(images) == 2
    for image in images:
        chunks = {name: json.loads(text) for name, text in image.text.items()}
        assert set(chunks) == {"prompt", "workflow"}
        told = chunks["prompt"]["7"]["_meta"]["slipstream"]
        assert [method["stem"] for method in told["runs"][0]["methods"]] == ["cfg_cutoff", "deepcache"]
        assert all(method["state"] == "active" for method in told["runs"][0]["methods"])
        assert told["runs"][0]["plan"]["version"] == 1
        assert json.loads(chunks["prompt"]["9"]["inputs"]["enabled_worker_ids"]) == ids
        # The page says so: what a worker said of its own run is not in it.
        assert NAME not in image.text["prompt"]


# The page


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_workers_verdicts_are_on_the_masters_nodes(renderer, browser, master, worker, request):
    employ(master, worker)
    workflow = spread(Workflow())
    with opened(browser, master, request, renderer) as page:
        page.load(workflow.data)
        assert page.run().status == "success"
        before = [texts(page, workflow.id(name)) for name in OURS]
        for own, others in before:
            assert own[0] == "active"
            assert others == ("active", f"{NAME}: {own[1]}")
        # Both servers answer from their caches: that was the last run's, on either.
        assert page.run().status == "success"
        last = [[(state, text.removeprefix("last run: ")) for state, text in texts(page, workflow.id(name))] for name in OURS]
        assert last == before
        assert all(line.is_last for name in OURS for line in page.verdicts(workflow.id(name)))
        page.reload()
        kept = [[(state, text.removeprefix("last run: ")) for state, text in texts(page, workflow.id(name))] for name in OURS]
        assert kept == before
        assert all(line.is_last for name in OURS for line in page.verdicts(workflow.id(name)))
        assert not page.problems()


def test_what_differs_on_a_worker_is_told_while_it_runs_and_of_the_node_it_is_about(browser, master, worker, request):
    """The worker's own run, and not the master's by another name: in a subgraph too, and interrupted there alone."""
    employ(master, worker)
    workflow = spread(Workflow())
    workflow.add_fault(step_s=0.4)
    with opened(browser, master, request) as page:
        page.load(workflow.data)
        outer = page.to_subgraph([workflow.id(name) for name in OURS])
        queued = page.queue()
        is_running = lambda lines: (  # noqa: E731
            sum(line.state == "running" and f"{NAME}: sampling" in line.text for line in lines) == len(OURS)
        )
        page.wait_for_verdict(outer, is_running)
        worker.post("/interrupt", {})
        assert page.wait(queued).status == "success"
        page.enter_subgraph(outer)
        for name in OURS:
            own, others = texts(page, page.inner(outer, name))
            assert own[0] == "active"
            assert others[0] == "interrupted"
            assert others[1].startswith(f"{NAME}: interrupted in step ")
        assert not page.problems()


MISSING = (
    f"{NAME}: Slipstream is not installed there, so Distributed cannot run this workflow on it: "
    "install it there, or switch this worker off"
)


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_a_worker_without_the_pack_is_told_in_one_sentence(locale, browser, master, tmp_path, request):
    with serving(tmp_path / "bare", ours=False) as bare, opened(browser, master, request) as page:
        employ(master, bare)
        workflow = spread(Workflow())
        page = browser.open(master, settings={"Comfy.Locale": locale})
        try:
            page.load(workflow.data)
            assert page.run().status == "refused"
            for name in OURS:
                (line,) = page.wait_for_verdict(workflow.id(name), bool)
                assert line.state == "failed"
                assert line.text == MISSING if locale == "en" else "未安装 Slipstream" in line.text
            keep_picture(page, request.node.name)
        finally:
            page.context.close()


def test_a_worker_with_another_version_is_told_beside_its_verdicts(browser, master, tmp_path, request):
    own = master.get("/slipstream/verdicts")["version"]
    with serving(tmp_path / "older", version="0.0.9") as older:
        employ(master, older)
        workflow = spread(Workflow())
        with opened(browser, master, request) as page:
            page.load(workflow.data)
            assert page.run().status == "success"
            for name in OURS:
                mine, theirs, version = texts(page, workflow.id(name))
                assert theirs == ("active", f"{NAME}: {mine[1]}")
                assert version == (
                    "inert",
                    f"{NAME}: runs Slipstream 0.0.9, but this server {own}: "
                    "pictures may differ until both have the same version",
                )
            assert not page.problems()


def test_a_worker_that_dies_costs_its_pictures_and_the_next_prompt_runs(browser, master, tmp_path, request):
    with serving(tmp_path / "mortal") as mortal:
        employ(master, mortal)
        workflow = spread(Workflow())
        workflow.add_fault(step_s=0.4)
        with opened(browser, master, request) as page:
            page.load(workflow.data)
            queued = page.queue()
            node = workflow.id("SlipstreamFreeU")
            page.wait_for_verdict(node, lambda lines: any(line.text == f"{NAME}: sampling" for line in lines))
            mortal.kill()
            outcome = page.wait(queued)
            assert outcome.status == "success"
            assert len(pictures(master, master.get(f"/history/{queued}")[queued])) == 1
            for name in OURS:
                own, lost = texts(page, workflow.id(name))
                assert own[0] == "active"
                assert lost == (
                    "failed",
                    f"{NAME}: stopped answering in the middle: pictures that it had not sent are lost",
                )
            page.set_widget(workflow.id("DistributedSeed"), "seed", next(seeds))
            outcome = page.run()
            assert outcome.status == "success"
            assert len(pictures(master, master.get(f"/history/{outcome.prompt_id}")[outcome.prompt_id])) == 1
            for name in OURS:
                own, silent = texts(page, workflow.id(name))
                assert own[0] == "active"
                assert silent == (
                    "inert",
                    f"{NAME}: does not answer and takes no part: it is off, or runs without --enable-cors-header",
                )
            assert not [problem for problem in page.problems() if problem.startswith("exception")]


def test_a_worker_that_no_page_may_ask_is_told(browser, master, tmp_path, request):
    with serving(tmp_path / "closed", cors=False) as closed:
        employ(master, closed)
        workflow = spread(Workflow())
        with opened(browser, master, request) as page:
            page.load(workflow.data)
            assert page.run().status == "success"
            own, silent = texts(page, workflow.id("SlipstreamFreeU"))
            assert own[0] == "active"
            assert silent[1].endswith("it is off, or runs without --enable-cors-header")


def test_a_page_without_workers_asks_nobody(browser, master, request):
    employ(master)
    workflow = spread(Workflow())
    asked: list[str] = []
    with opened(browser, master, request) as page:
        page.page.on("request", lambda sent: asked.append(sent.url))
        page.load(workflow.data)
        assert page.run().status == "success"
        assert len(texts(page, workflow.id("SlipstreamFreeU"))) == 1
        assert asked
        assert all(url.startswith((master.url, "blob:", "data:")) or "comfy.org" in url for url in asked)
        assert not page.problems()
