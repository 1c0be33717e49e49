"""The recipe of SEVERAL-GPUS.md, which sends a plan to workers of Ray as raylight has them: run as it stands there.

Runs where ray can be imported, or where `SLIPSTREAM_RAY` names the folder that it was installed into by
``pip install --target FOLDER ray``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys

import hosted
import numpy as np
import pytest
import torch
from hosted import run_node, sample
from loading import ROOT, find_comfyui

FOLDER = os.environ.get("SLIPSTREAM_RAY", "")
if FOLDER:
    # Last: what else it brought is in the environment too.
    sys.path.append(FOLDER)
ray = pytest.importorskip("ray", reason="ray cannot be imported, and SLIPSTREAM_RAY names no folder with it")

pytestmark = pytest.mark.long

saved = hosted.engine("plan.saved")
plan_of = hosted.engine("plan.plan").plan_of
NODES = {
    "SlipstreamForecast": {"error_budget": 0.5},
    "SlipstreamDeepCache": {"cache_interval": 2},
    "SlipstreamCFGCutoff": {"cutoff": 0.5},
}


def stand_in():
    """The class of the workers. Made here, so that Ray sends it as it is, and does not look for this file there."""

    class StandIn:
        """What raylight's worker is to the recipe: a process that keeps a ModelPatcher, and runs a function on it; its
        sampler is the host's."""

        def __init__(self, tests: str, comfyui: str) -> None:
            import sys
            from pathlib import Path

            sys.path[:0] = [tests, str(Path(tests) / "host")]
            import torch
            from loading import load_host, load_pack

            load_host(Path(comfyui))
            torch.set_num_threads(1)
            # For the helpers of the tests, which know the pack by that name. What the recipe imports is another one.
            load_pack()
            import hosted

            self.hosted = hosted
            self.model = hosted.model("minimal")

        def model_function_runner(self, fn, *args, **kwargs):
            self.model = fn(self.model, *args, **kwargs)

        def sample(self):
            return self.hosted.sample(self.model, steps=8).numpy()

        def told(self):
            import sys

            kept = sys.modules["slipstream.nodes.engine.telling.history"]._kept
            return [(name, line.state, line.text) for run in kept.values() for name, line in run.told]

    return StandIn


def recipe():
    """The function on the page."""
    page = (ROOT / "SEVERAL-GPUS.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(code, "SEVERAL-GPUS.md", "exec"), names)
    return names["send_plan"]


@pytest.fixture(scope="module")
def custom_nodes(tmp_path_factory):
    """The folder that the host has packs in."""
    folder = tmp_path_factory.mktemp("custom_nodes")
    (folder / "slipstream").symlink_to(ROOT)
    return str(folder)


@pytest.fixture(scope="module")
def actors(tmp_path_factory):
    # Without one of its own, Ray writes one into the user's home.
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), FOLDER)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _node_ip_address="127.0.0.1",
            log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        worker = ray.remote(stand_in())
        try:
            made = [worker.remote(str(ROOT / "tests"), str(find_comfyui())) for _ in range(2)]
            yield {"workers": made}
        finally:
            ray.shutdown()


def test_the_recipe_puts_a_plan_on_the_models_of_all_workers(actors, custom_nodes):
    model = hosted.model("minimal")
    plain = sample(model, steps=8)
    for number, (name, values) in enumerate(NODES.items(), 1):
        model = run_node(name, model, str(number), **values)
    expected = sample(model, steps=8)
    assert not torch.equal(expected, plain)
    before = ray.get([actor.sample.remote() for actor in actors["workers"]])
    assert all(np.array_equal(one, plain.numpy()) for one in before)
    recipe()(actors, saved.to_json(plan_of(model)), custom_nodes)
    after = ray.get([actor.sample.remote() for actor in actors["workers"]])
    assert all(np.array_equal(one, expected.numpy()) for one in after)
    for told in ray.get([actor.told.remote() for actor in actors["workers"]]):
        assert [(name, state) for name, state, _ in told] == [
            ("CFG Cutoff", "active"), ("Forecast", "active"), ("DeepCache", "active"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "settings", "words"),
    [("warp", {}, "the method 'warp' is unknown"), ("deepcache", {"cache_interval": 5}, "different settings")],
    ids=["unknown", "in conflict"],
)
def test_a_plan_that_cannot_be_used_is_refused_in_our_words(stem, settings, words, actors, custom_nodes):
    def send(stem, settings):
        plan = {"version": 1, "methods": [{"stem": stem, "settings": settings}]}
        recipe()(actors, json.dumps(plan), custom_nodes)

    send("deepcache", {"cache_interval": 2})
    with pytest.raises(ray.exceptions.RayError, match=words):
        send(stem, settings)
