"""What saved images tell of the plan that made them, through the host's own executor, queue and SaveImage."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import comfy.model_management
import execution
import folder_paths
import hosted
import pytest
import small_models
from comfy.cli_args import args
from comfy_api.latest import io
from hosted import NODES, latent, prompt
from PIL import Image

import nodes as host_nodes

metadata = hosted.engine("telling.metadata")
PLANNED = ("stem", "settings")
"""What of a method is part of the plan, and not of the nodes or the run."""
numbers = itertools.count()


class Loader(io.ComfyNode):
    """A model, two prompts, a latent and a VAE. What is called before each prediction may fail."""

    model, vae, callback = None, None, None

    @classmethod
    def define_schema(cls):
        kinds = (io.Model, io.Conditioning, io.Conditioning, io.Latent, io.Vae)
        return io.Schema(node_id="TestLoader", inputs=[], outputs=[kind.Output() for kind in kinds])

    @classmethod
    def execute(cls):
        model = Loader.model.clone()

        def predict_noise(executor, *args):
            if Loader.callback is not None:
                Loader.callback()
            return executor(*args)

        model.add_wrapper("predict_noise", predict_noise)
        return io.NodeOutput(model, prompt(model, 1), prompt(model, 2), {"samples": latent(model, 8)}, Loader.vae)


class Host:
    """The host's queue and executor, without its network.

    Attributes:
        server: what stands for the server; its handlers get each prompt before it is queued.
    """

    def __init__(self, output):
        self.output = output
        self.server = SimpleNamespace(
            client_id=None, last_node_id=None, on_prompt_handlers=[], queue_updated=lambda: None,
            send_sync=lambda *args: None, send_progress_text=lambda *args: None, sockets={},
        )  # fmt: skip
        self.server.add_on_prompt_handler = self.server.on_prompt_handlers.append
        self.server.prompt_queue = execution.PromptQueue(self.server)
        amounts = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, amounts)

    def post(self, graph, extra=None):
        """What comes in at /prompt; without more, what the page sends of a workflow is empty."""
        data = {"prompt": graph, "extra_data": {"extra_pnginfo": {}} if extra is None else extra}
        for handler in self.server.on_prompt_handlers:
            data = handler(data)
        number = next(numbers)
        outputs = [node for node, entry in graph.items() if entry["class_type"].startswith("Save")]
        item = (number, f"prompt {number}", data["prompt"], data.get("extra_data", {}), outputs, {})
        self.server.prompt_queue.put(item)

    def work(self):
        """Do what is queued, as the host's worker does. Returns the last one's new image, if there is one."""
        while self.server.prompt_queue.queue:
            before = set(self.output.iterdir())
            item, number = self.server.prompt_queue.get()
            # In a thread, since the browser tests leave an event loop running in this one.
            with ThreadPoolExecutor(1) as worker:
                worker.submit(self.executor.execute, item[2], item[1], item[3].copy(), item[4]).result()
            self.server.prompt_queue.task_done(number, {}, None)
        new = set(self.output.iterdir()) - before
        if not new:
            return None
        (path,) = new
        return path

    def run(self, graph, extra=None):
        """Queue and do a prompt. Returns what its image tells, chunk by chunk."""
        self.post(graph, extra)
        path = self.work()
        return None if path is None else chunks_of(path)


def chunks_of(path):
    with Image.open(path) as image:
        return {name: json.loads(text) for name, text in image.text.items()}


@pytest.fixture(scope="module")
def models():
    return small_models.model("SD15"), small_models.vae()


@pytest.fixture
def host(tmp_path, monkeypatch, models):
    Loader.model, Loader.vae = models
    Loader.callback = None
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    host = Host(tmp_path)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=host.server)))
    for name, node in {"TestLoader": Loader, **NODES}.items():
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
    metadata._kept.clear()
    metadata._prompts.clear()
    metadata.listen()
    metadata.listen()
    assert len(host.server.on_prompt_handlers) == 1
    return host


def sampler(model, seed=1, steps=3):
    values = {"seed": seed, "steps": steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]}
    return {"class_type": "KSampler", "inputs": {**links, **values}}


def graph(prefix="a", sampler_id="3", **values):
    return {
        "1": {"class_type": "TestLoader", "inputs": {}},
        "12:7": {"class_type": "SlipstreamCFGCutoff", "inputs": {"model": ["1", 0], "cutoff": 0.5, "unit": "steps"}},
        sampler_id: sampler("12:7", **values),
        "8": {"class_type": "VAEDecode", "inputs": {"samples": [sampler_id, 0], "vae": ["1", 4]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": prefix}},
    }


def told(chunks):
    """The steps of each sampler's runs."""
    return {node: [run["steps"] for run in found["runs"]] for node, found in chunks["slipstream"]["samplers"].items()}


def test_an_image_tells_methods_settings_nodes_versions_and_verdicts(host):
    workflow = {"id": "a workflow", "nodes": []}
    chunks = host.run(graph(), {"extra_pnginfo": {"workflow": workflow, "slipstream": "of another file"}})
    assert chunks["workflow"] == workflow
    versions = hosted.engine("host.machine").versions()
    found = chunks["slipstream"]
    assert {name: found.pop(name) for name in versions} == versions
    (method,) = found["samplers"]["3"]["runs"][0]["methods"]
    assert method.pop("text").startswith("no guidance from step 1 of 3")
    assert method == {
        "stem": "cfg_cutoff",
        "title": "CFG Cutoff",
        "settings": {"cutoff": 0.5, "unit": "steps", "start": 0.0, "reuse_every": 1, "adaptive": 0.0},
        "nodes": ["12:7"],
        "state": "active",
    }
    run = {"steps": 3, "methods": [method], "plan": {"version": 1, "methods": [{key: method[key] for key in PLANNED}]}}
    assert found == {"samplers": {"3": {"type": "KSampler", "runs": [run]}}}
    # Which a file can be read for.
    (entry,) = hosted.engine("plan.saved").from_data(run["plan"]).entries
    assert entry.config == hosted.method("cfg_cutoff").CFGCutoff(0.5)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("SaveAnimatedWEBP", {"fps": 6.0, "lossless": True, "quality": 80, "method": "fastest"}),
        ("SaveAnimatedPNG", {"fps": 6.0, "compress_level": 4}),
    ],
)
def test_animated_images_tell_it_too(host, kind, values, monkeypatch):
    # Not at the top: on older hosts it imports the server, which `host` stands for.
    from comfy_extras import nodes_images

    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, kind, getattr(nodes_images, kind))
    animated = graph()
    animated["9"]["class_type"] = kind
    animated["9"]["inputs"] |= values
    host.post(animated)
    written = host.work().read_bytes()
    assert b'"stem": "cfg_cutoff"' in written
    assert b"no guidance from step 1 of 3" in written


def test_a_host_that_is_to_write_no_metadata_writes_none_of_ours(host, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    assert host.run(graph()) == {}


def test_without_a_node_of_ours_nothing_is_touched(host):
    bare = graph()
    bare["3"]["inputs"]["model"] = ["1", 0]
    del bare["12:7"]
    assert set(host.run(bare)) == {"prompt"}
    sent = {"workflow": {}}
    (handler,) = host.server.on_prompt_handlers
    extra = {"extra_pnginfo": sent}
    assert handler({"prompt": bare, "extra_data": extra})["extra_data"]["extra_pnginfo"] is sent
    bypassed = graph("b")
    bypassed["3"]["inputs"]["model"] = ["1", 0]
    assert set(host.run(bypassed)) == {"prompt"}


def test_a_prompt_that_is_no_prompt_or_goes_in_circles_passes(host):
    (handler,) = host.server.on_prompt_handlers
    for data in (
        {},
        {"prompt": graph()},
        {"prompt": graph(), "extra_data": {"extra_pnginfo": None}},
        {"prompt": None},
        {"prompt": {"1": None}},
        {"prompt": graph(), "extra_data": {"extra_pnginfo": "x"}},
    ):
        assert handler(dict(data)) == data
    circle = graph()
    circle["12:7"]["inputs"]["model"] = ["3", 0]
    assert handler({"prompt": circle})["prompt"] == circle


def test_an_image_whose_sampler_the_host_had_cached_tells_of_the_run_that_made_it(host):
    steps = []
    Loader.callback = lambda: steps.append(1)
    # Queued before the first one has run, and after; and, as the host's cache knows no ids, by another sampler node.
    host.post(graph())
    host.post(graph("b"))
    assert told(chunks_of(host.work())) == {"3": [3]}
    first = len(steps)
    assert told(host.run(graph("c"))) == {"3": [3]}
    assert told(host.run(graph("d", "5"))) == {"5": [3]}
    assert len(steps) == first > 0
    # Another seed, another length: that run's.
    assert told(host.run(graph("e", seed=2, steps=4))) == {"3": [4]}
    assert len(steps) > first


def test_what_the_page_sends_and_what_the_host_makes_of_it_are_one_sampler(host):
    """The page sends integers where it can, and the host's validation writes floats in their place."""
    sent = graph()
    sent["3"]["inputs"] |= {"cfg": 5, "denoise": 1}
    host.post(sent)
    sent["3"]["inputs"] |= {"cfg": 5.0, "denoise": 1.0}
    assert told(chunks_of(host.work())) == {"3": [3]}
    again = graph("b")
    again["3"]["inputs"] |= {"cfg": 5, "denoise": 1}
    host.post(again)
    again["3"]["inputs"] |= {"cfg": 5.0, "denoise": 1.0}
    assert told(chunks_of(host.work())) == {"3": [3]}


def test_a_client_that_sends_no_workflow_gets_no_claim_of_one(host):
    """Other packs' nodes take an `extra_pnginfo` that is not None for the page's: the prompt itself tells it."""
    with_workflow = host.run(graph())["slipstream"]
    (run,) = with_workflow.pop("samplers").values()
    steps = []
    Loader.callback = lambda: steps.append(1)
    titled = graph("b", seed=2)
    titled["3"]["_meta"] = {"title": "mine", "slipstream": "of another file"}
    # One that ran, and one that the host's cache answers.
    for sent in (titled, graph("c", seed=2)):
        chunks = host.run(sent, {})
        assert set(chunks) == {"prompt"}
        meta = chunks["prompt"]["3"]["_meta"]
        assert meta.pop("title", "mine") == "mine"
        assert meta == {"slipstream": {**with_workflow, **run}}
        assert len(steps) == 3
        assert "slipstream" not in json.dumps([entry for node, entry in chunks["prompt"].items() if node != "3"])
    kept = next(iter(host.server.prompt_queue.get_history().values()))["prompt"]
    assert type(kept[2]) is dict
    assert titled["3"]["_meta"]["slipstream"] == "of another file"


def test_a_run_that_did_not_end_leaves_no_claim_in_a_prompt_either(host):
    assert "_meta" in host.run(graph(), {})["prompt"]["3"]
    (handler,) = host.server.on_prompt_handlers
    waiting = handler({"prompt": graph("b")})["prompt"]
    assert waiting["3"]["_meta"]["slipstream"]["runs"]

    def fail():
        raise RuntimeError("a planted fault")

    Loader.callback = fail
    host.executor.reset()
    assert host.run(graph("c"), {}) is None
    assert waiting["3"]["_meta"] == {}


def test_each_sampler_has_an_entry_and_the_last_image_both(host):
    two = graph()
    two["4"] = sampler("12:7", steps=2)
    two["4"]["inputs"]["latent_image"] = ["3", 0]
    two["8"]["inputs"]["samples"] = ["4", 0]
    assert told(host.run(two)) == {"3": [3], "4": [2]}
    two["4"]["inputs"]["steps"] = 4
    assert told(host.run(two)) == {"3": [3], "4": [4]}


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_a_run_that_did_not_end_leaves_no_claim(host, error):
    assert told(host.run(graph())) == {"3": [3]}
    waiting = {"prompt": graph("b"), "extra_data": {"extra_pnginfo": {}}}
    (handler,) = host.server.on_prompt_handlers
    info = handler(waiting)["extra_data"]["extra_pnginfo"]
    assert "slipstream" in info

    def fail():
        raise error("a planted fault")

    Loader.callback = fail
    host.executor.reset()
    assert host.run(graph("c")) is None
    assert not host.executor.success
    assert "slipstream" not in info
    assert not metadata._kept


def test_it_holds_no_prompt_that_the_host_let_go_and_no_more_runs_than_it_says(host, monkeypatch):
    monkeypatch.setattr(metadata, "KEPT", 2)
    for seed in range(4):
        host.post(graph(seed=seed, steps=1))
    assert len(metadata._prompts) == 4
    host.work()
    assert len(metadata._kept) == 2
    gc.collect()
    assert not metadata._prompts
    # What the host keeps of a prompt is plain data.
    running = next(iter(host.server.prompt_queue.get_history().values()))["prompt"]
    assert type(running[3]["extra_pnginfo"]) is dict


def test_a_node_that_another_one_expanded_into_is_told_as_that_one(host):
    where = hosted.engine("telling.verdicts").Prompt("a prompt", None, "3.0.0.5", None, graph())
    (handler,) = host.server.on_prompt_handlers
    info = handler({"prompt": graph(), "extra_data": {"extra_pnginfo": {}}})["extra_data"]["extra_pnginfo"]
    metadata.keep(where, "one", 3, [])
    metadata.keep(where, "another", 4, [])
    metadata.keep(where, "one", 5, [])
    assert told(info) == {"3": [5, 4]}


def test_a_handoff_tells_of_itself_and_of_the_plans_of_both_models(host):
    both = {"base_positive": ["1", 1], "base_negative": ["1", 2], "latent_image": ["1", 3]}
    inputs = {
        "base": ["12:7", 0],
        "refiner": ["12:7", 0],
        **both,
        "seed": 1,
        "steps": 5,
        "cfg": 5.0,
        "refiner_cfg": 5.0,
    }
    mode = {"mode": "ensemble", "mode.handoff": 0.6, "mode.split": "steps", "mode.exact_handoff": False}
    handoff = graph()
    values = {"sampler_name": "euler", "scheduler": "normal", **mode}
    handoff["3"] = {"class_type": "SlipstreamRefinerHandoff", "inputs": {**inputs, **values}}
    chunks = host.run(handoff)
    runs = chunks["slipstream"]["samplers"]["3"]["runs"]
    assert [(run.get("part"), run["steps"]) for run in runs] == [("base", 3), ("refiner", 2), (None, 5)]
    assert [run["plan"]["methods"][0]["settings"]["cutoff"] for run in runs[:2]] == [0.5, 0.5]
    ((method,),) = (run["methods"] for run in runs[2:])
    assert "plan" not in runs[2]
    assert method["settings"] == {"mode": "ensemble", "handoff": 0.6, "split": "steps", "exact_handoff": False}
    assert method["nodes"] == ["3"]
    assert method["text"].startswith("3 + 2 steps, handed over at timestep ")
