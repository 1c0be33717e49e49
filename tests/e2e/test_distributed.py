"""ComfyUI-Distributed, as it is installed: a master and a worker, two real servers with our nodes on both, and the
master's page in a real browser.

Runs where `SLIPSTREAM_OTHER_PACKS` names a folder with https://github.com/robertvoy/ComfyUI-Distributed in it, with
``--long``. Loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import numpy as np
import psutil
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
    workflow.link(seed_node, 0, workflow.node("KSampler"), "seed")
    collector = workflow.add("DistributedCollector", {"images": "IMAGE"}, ["IMAGE", "AUDIO"], [False])
    workflow.link(workflow.node("VAEDecode"), 0, collector, "images")
    workflow.link(collector, 0, workflow.node("SaveImage"), "images")
    return workflow


@contextmanager
def opened(browser, master: Server, request, renderer: str = "classic", **options) -> Iterator[Page]:
    page = browser.open(master, renderer, **options)
    yield page
    page.fit()
    keep_picture(page, request.node.name)
    page.context.close()


def pictures(server: Server, entry: dict) -> list[Image.Image]:
    """The saved pictures of a prompt, by its entry in the history."""
    outputs, _ = server.result(entry)
    (found,) = [output["images"] for output in outputs.values() if "images" in output]
    return [picture(server, image) for image in found]


def picture(server: Server, image: dict) -> Image.Image:
    with urllib.request.urlopen(f"{server.url}/view?{urllib.parse.urlencode(image)}", timeout=60) as response:
        return Image.open(io.BytesIO(response.read()))


def texts(page: Page, node: int) -> list[tuple[str, str]]:
    return [(line.state, line.text) for line in page.verdicts(node)]


def last_texts(page: Page, node: int) -> list[tuple[str, str]]:
    """The same of lines that are all of the last run."""
    assert all(line.is_last for line in page.verdicts(node))
    return [(state, text.removeprefix("last run: ")) for state, text in texts(page, node)]


# The pictures


WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
DEEPCACHE = ("SlipstreamDeepCache", {"cache_interval": 2, "cache_branch_id": 0, "schedule": "uniform", **WHOLE})
CUTOFF = ("SlipstreamCFGCutoff", {"cutoff": 0.5, "unit": "steps"})
FORECAST = ("SlipstreamForecast", {"error_budget": 0.5, "max_skips": 3, **WHOLE})
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


def test_where_the_master_delegates_all_its_images_have_the_workflow_alone(master, worker):
    ids = employ(master, worker)
    data = request_of(graph(10 * next(seeds)), ids) | {"delegate_master": True}
    (image,) = pictures(master, master.wait_for(master.post("/distributed/queue", data)["prompt_id"]))
    assert json.loads(image.text["workflow"]) == data["workflow"]
    assert "slipstream" not in image.text["prompt"].lower()


# The page


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_workers_verdicts_are_on_the_masters_nodes(renderer, browser, master, worker, request):
    employ(master, worker)
    workflow = spread(Workflow())
    with opened(browser, master, request, renderer) as page:
        page.load(workflow.data)
        outcome = page.run()
        assert outcome.status == "success"
        both = pixels(pictures(master, master.get(f"/history/{outcome.prompt_id}")[outcome.prompt_id]))
        assert len(both) == 2
        assert not np.array_equal(*both)
        before = [texts(page, workflow.id(name)) for name in OURS]
        for own, others in before:
            assert own[0] == "active"
            assert others == ("active", f"{NAME}: {own[1]}")
        # Both servers answer from their caches: that was the last run's, on either.
        assert page.run().status == "success"
        assert [last_texts(page, workflow.id(name)) for name in OURS] == before
        page.reload()
        assert [last_texts(page, workflow.id(name)) for name in OURS] == before
        assert not page.problems()


def test_what_differs_on_a_worker_is_told_while_it_runs_and_of_the_node_it_is_about(browser, master, worker, request):
    """The worker's own run, and not the master's by another name: in a subgraph too, and interrupted there alone."""
    employ(master, worker)
    workflow = spread(Workflow())
    workflow.add_fault(step_s=1)
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


def test_a_worker_without_the_pack_is_told_in_one_sentence(browser, master, tmp_path, request):
    with serving(tmp_path / "bare", ours=False) as bare:
        employ(master, bare)
        workflow = spread(Workflow())
        with opened(browser, master, request) as page:
            page.load(workflow.data)
            assert page.run().status == "refused"
            # Distributed's own message, and the host's dialog, hide the nodes.
            page.page.get_by_text(MISSING, exact=True).last.wait_for()
            assert any(MISSING in text for text in page.errors())
            keep_picture(page, f"{request.node.name}-at-once")
            page.close_errors()
            for name in OURS:
                assert texts(page, workflow.id(name)) == [("failed", MISSING)]
        with opened(browser, master, request, settings={"Comfy.Locale": "zh"}) as page:
            page.load(workflow.data)
            assert page.run().status == "refused"
            ((_, text),) = texts(page, workflow.id("SlipstreamFreeU"))
            assert text.startswith(f"{NAME}: 该机器未安装 Slipstream")


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
        workflow.add_fault(step_s=1)
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
                assert not own[1].startswith("last run")
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


# Load


CLIENTS = 4
PROMPTS = 500
GROWTH_MIB = 48
"""What a server may grow by over the last four hundred prompts. The host keeps each prompt's history."""
ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class Client:
    """What a page is to a server: a socket, and what came over it.

    Attributes:
        own: the prompts that it queued.
        started: the prompts that it heard begin.
        ends: how those ended that it heard of, by id.
        told: the prompts that verdicts were of.
    """

    def __init__(self, session: aiohttp.ClientSession, server: Server, name: str):
        self.session = session
        self.server = server
        self.name = name
        self.own: set[str] = set()
        self.started: set[str] = set()
        self.ends: dict[str, str] = {}
        self.told: set[str] = set()

    async def __aenter__(self) -> Client:
        self._socket = await self.session.ws_connect(
            f"{self.server.url}/ws", params={"clientId": self.name}, max_msg_size=0
        )
        self._listening = asyncio.create_task(self._listen())
        async with self.session.get(
            f"{self.server.url}/slipstream/verdicts", params={"client_id": self.name}
        ) as answer:
            assert answer.status == 200
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._listening

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["type"] == "execution_start":
                self.started.add(event["data"]["prompt_id"])
            if event["type"] in ENDS:
                self.ends[event["data"]["prompt_id"]] = ENDS[event["type"]]
            if event["type"] == "slipstream.verdict":
                self.told.add(event["data"]["prompt_id"])

    async def post(self, path: str, data: dict) -> tuple[int, Any]:
        async with self.session.post(self.server.url + path, json=data) as answer:
            return answer.status, await answer.json(content_type=None)

    async def queue(self, path: str, data: dict) -> str | None:
        """The prompt's id; None if it was refused."""
        _, answer = await self.post(path, data)
        prompt = answer.get("prompt_id")
        if prompt is not None:
            self.own.add(prompt)
        return prompt

    async def end(self, prompt: str) -> str:
        deadline = time.monotonic() + 300
        while prompt not in self.ends:
            assert time.monotonic() < deadline, f"prompt {prompt} of {self.name} should end, but did not"
            await asyncio.sleep(0.02)
        return self.ends[prompt]

    async def entry(self, prompt: str) -> dict:
        """A prompt's entry in the history, which the server makes a moment after it told of the end."""
        for _ in range(500):
            async with self.session.get(f"{self.server.url}/history/{prompt}") as answer:
                found = await answer.json()
            if prompt in found:
                return found[prompt]
            await asyncio.sleep(0.02)
        raise AssertionError(f"prompt {prompt} of {self.name} is lost")


def with_clients(server: Server, work: Callable[[list[Client]], Awaitable[None]]) -> None:
    """Does something with several clients. In a thread: the browser has this one's event loop."""

    async def run() -> None:
        async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
            await work(
                [await stack.enter_async_context(Client(session, server, f"client {n}")) for n in range(CLIENTS)]
            )

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, run()).result()


async def asked_often(session: aiohttp.ClientSession, server: Server, waits_s: list[float], pause_s: float) -> None:
    """Asks for the verdicts again and again, and notes how long each answer took."""
    while True:
        began = time.monotonic()
        async with session.get(f"{server.url}/slipstream/verdicts") as answer:
            assert (await answer.json())["version"]
        waits_s.append(time.monotonic() - began)
        await asyncio.sleep(pause_s)


def milliseconds(waits_s: list[float]) -> str:
    middle, high, most = (1000 * wait_s for wait_s in (median(waits_s), quantiles(waits_s, n=20)[-1], max(waits_s)))
    return f"median {middle:.0f}, 95 % {high:.0f}, most {most:.0f} ms"


def test_twenty_prompts_of_four_clients_at_once_each_hear_of_their_own(master):
    async def work(clients: list[Client]) -> None:
        first = 100 * next(seeds)
        sent = [
            (
                client,
                {
                    "prompt": graph(first + 5 * n + i),
                    "client_id": client.name,
                    "extra_data": {"extra_pnginfo": {"workflow": {"id": client.name}}},
                },
            )
            for i in range(5)
            for n, client in enumerate(clients)
        ]
        prompts = await asyncio.gather(*(client.queue("/prompt", data) for client, data in sent))
        assert len(set(prompts)) == 20
        for (client, _), prompt in zip(sent, prompts, strict=True):
            assert prompt is not None
            assert await client.end(prompt) == "success"
        for client in clients:
            assert len(client.own) == 5
            assert client.told == client.own
            assert set(client.ends) == client.own

    with_clients(master, work)


def rss_mib(server: Server) -> float:
    return psutil.Process(server.pid).memory_info().rss / 2**20


def test_five_hundred_prompts_through_two_servers(master, tmp_path):
    """With interrupts, other models, wrong prompts and a worker that is killed in between: each client hears of its
    own, none is lost, memory is flat."""
    stack = contextlib.ExitStack()
    worker = stack.enter_context(serving(tmp_path / "worker"))
    ids = employ(master, worker)
    outcomes: Counter[str] = Counter()
    images: Counter[int] = Counter()
    at: dict[int, tuple[float, float]] = {}
    waits_s: list[float] = []
    numbers = iter(range(1, PROMPTS + 1))
    first = 1000 * next(seeds)

    async def one(client: Client, number: int) -> None:
        plan = list(PLANS.values())[number // 3 % len(PLANS)]
        prompt = graph(first + 3 * number, plan, steps=3, model="tiniest" if number // 10 % 2 else "minimal")
        expected = {"success"}
        if number % 25 == 7:
            prompt["7"]["inputs"]["steps"], expected = "many", {"refused"}
        elif number % 25 == 17:
            prompt["6"]["inputs"]["fail_at"], expected = 1, {"error"}
        elif number % 50 == 12:
            prompt["6"]["inputs"]["step_s"], expected = 0.3, {"interrupted"}
        was_at_rest = at_rest.is_set()
        queued = await client.queue("/distributed/queue", request_of(prompt, ids, client.name, client.name))
        if queued is None:
            outcome = "refused"
        else:
            if "interrupted" in expected:
                while queued not in client.started:
                    await asyncio.sleep(0.02)
                await client.post("/interrupt", {"prompt_id": queued})
            outcome = await client.end(queued)
            await client.entry(queued)
        if not (was_at_rest and at_rest.is_set()):
            # The worker may go between the moment that Distributed asks whether it is there and the one that it is sent
            # its part: Distributed refuses the prompt.
            expected.add("refused")
        assert outcome in expected, (number, outcome)
        outcomes[outcome] += 1
        if outcome == "success":
            outputs = (await client.entry(queued))["outputs"]
            images[sum(len(output.get("images", ())) for output in outputs.values())] += 1

    async def busy(client: Client) -> None:
        for number in numbers:
            await one(client, number)
            if number % 50 == 0:
                at[number] = rss_mib(master), rss_mib(worker) if at_rest.is_set() else 0.0

    async def trouble() -> None:
        """Kills the worker in the middle, and starts it again."""
        nonlocal worker
        while sum(outcomes.values()) < PROMPTS // 2:
            await asyncio.sleep(0.1)
        at_rest.clear()
        port = worker.port
        await asyncio.to_thread(worker.kill)
        await asyncio.sleep(2)
        worker = await asyncio.to_thread(stack.enter_context, serving(tmp_path / "worker", port))
        at_rest.set()

    async def work(clients: list[Client]) -> None:
        at_rest.set()
        asking = asyncio.create_task(asked_often(clients[0].session, master, waits_s, 0.2))
        await asyncio.gather(trouble(), *(busy(client) for client in clients))
        assert not asking.done()
        asking.cancel()
        for client in clients:
            assert client.told <= client.own
            assert set(client.ends) == client.own

    at_rest = asyncio.Event()
    idle_s: list[float] = []

    async def idle(clients: list[Client]) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked_often(clients[0].session, master, idle_s, 0.05), 3)

    began = time.monotonic()
    with stack:
        with_clients(master, work)
        took_s = time.monotonic() - began
        with_clients(master, idle)
        print(f"{PROMPTS} prompts in {took_s:.0f} s: {dict(outcomes)}; pictures each: {dict(images)}")
        print(f"/slipstream/verdicts under load: {milliseconds(waits_s)}; idle: {milliseconds(idle_s)}")
        print(
            "MiB of master and worker by prompts:", {n: tuple(round(x) for x in mib) for n, mib in sorted(at.items())}
        )
        assert sum(outcomes.values()) == PROMPTS
        assert min(outcomes[name] for name in ("success", "refused", "error", "interrupted")) > 0
        assert images[2] > PROMPTS // 2
        assert set(images) <= {1, 2}
        assert at[PROMPTS][0] - at[100][0] < GROWTH_MIB
        assert at[PROMPTS][1] - at[PROMPTS - 100][1] < GROWTH_MIB
