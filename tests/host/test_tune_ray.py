"""`./slipstream tune --ray` on two nodes of a cluster, here on this processor: one core and one torch thread each."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import folder_paths
import hosted
import pytest
import safetensors.torch
import torch
from comfy_api.latest import io
from loading import ROOT, find_comfyui

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
sys.path.insert(0, str(ROOT / "demo"))

MINUTES = 4.0
"""Of a search that may not come to its end on a busy machine: what it measured is what is looked at."""

PROMPTS = ["summer day, mountains, a lake", "winter night, trees and a red house"]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes; a lost one is noticed soon."""
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("COMFYUI_PATH", str(find_comfyui()))
    from ray.cluster_utils import Cluster

    def start():
        return Cluster(initialize_head=True, head_node_args={"num_cpus": 1})

    try:
        started = start()
    except Exception:
        # It waits half a minute, which a busy machine takes longer than.
        started = start()
    started.second = started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def options(address: str, **values) -> argparse.Namespace:
    import tune_options

    parser = argparse.ArgumentParser()
    tune_options.add_options(parser)
    arguments = parser.parse_args(["--demo", "--ray", address, "--steps", "6", "--seeds", "1", "--floor", "0.3"])
    defaults = {"comfyui": find_comfyui(), "size": 64, "minutes": MINUTES, "cfg": 5.0}
    return argparse.Namespace(**{**vars(arguments), **defaults, **values})


def tuned(address: str, user: Path, monkeypatch, **values):
    """A search on a cluster: its report, and what it kept."""
    import tune_ray

    monkeypatch.setattr(folder_paths, "user_directory", str(user))
    shown, saved = [], []
    (report,) = tune_ray.tune_on_cluster(options(address, **values), user, PROMPTS, "", shown.append, saved.append)
    assert shown == [report]
    assert len(saved) == 1
    (file,) = (user / "slipstream" / "tune").glob("*.json")
    return report, file


def alone(user: Path, monkeypatch):
    """The same search in this process."""
    import tune_ray

    monkeypatch.setattr(folder_paths, "user_directory", str(user))
    tune, arguments = hosted.engine("tune"), options("")
    hidden = {"hidden_inputs": {io.Hidden.unique_id: "9"}, "dynamic_paths": None}
    node = hosted.NODES["SlipstreamTune"].PREPARE_CLASS_CLONE(hidden)
    wanted = tune.Wanted(arguments.floor, arguments.seeds, arguments.minutes, arguments.may_use)
    with torch.inference_mode():
        model, vae, call, prompts = tune_ray.loaded(tune_ray.job_of(arguments, PROMPTS, ""))
        tuning = tune.Tuning(node, model, vae, call, prompts, wanted)
        tuning.execute()
    return tuning


def latents(user: Path) -> dict[str, torch.Tensor]:
    """What was kept, by the names of plan and picture."""
    found = (user / "slipstream" / "tune").glob("*/*.safetensors")
    return {path.name: safetensors.torch.load_file(path)["latent"] for path in found}


def test_two_nodes_give_what_one_process_gives_and_a_killed_one_is_survived(cluster, tmp_path, monkeypatch):
    trials = hosted.engine("tune").Log
    kill = threading.Event()
    real = trials.add

    def add(self, trial):
        real(self, trial)
        if len(self.trials) == 4 and not kill.is_set():
            kill.set()
            threading.Thread(target=lambda: cluster.remove_node(cluster.second, allow_graceful=False)).start()

    monkeypatch.setattr(trials, "add", add)
    began = time.monotonic()
    report, _ = tuned(cluster.address, tmp_path / "ray", monkeypatch, save_as="mine")
    monkeypatch.setattr(trials, "add", real)
    assert report["status"] == "finished", report
    assert kill.is_set()
    notes = " ".join(report["notes"])
    assert "was lost" in notes
    assert "a minute" in notes
    print(f"\n{time.monotonic() - began:.0f} s; {notes}")
    print(report["markdown"])

    here = alone(tmp_path / "alone", monkeypatch)
    ray, one = latents(tmp_path / "ray"), latents(tmp_path / "alone")
    common = ray.keys() & one.keys()
    assert len(common) > 2
    assert all(torch.equal(ray[name], one[name]) for name in common)

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "ray"))
    kept = hosted.engine("tune").Kept(here.kept.about)
    # The same trials: nothing measured twice, each with the likeness that it has here.
    counted = Counter((trial.plan, trial.picture) for trial in kept.log.trials if trial.plan and not trial.problem)
    assert max(counted.values()) <= 2
    assert len({trial.session for trial in kept.log.trials}) == 2
    similar = {(trial.plan, trial.picture): trial.similarity for trial in here.log.trials}
    for trial in kept.log.trials:
        if (trial.plan, trial.picture) in similar:
            assert trial.similarity == similar[trial.plan, trial.picture]
    if report["best"]:
        assert (tmp_path / "ray" / "slipstream" / "plans" / "mine.json").is_file()


def test_without_a_cluster_it_says_so(tmp_path, monkeypatch):
    import tune_ray

    with pytest.raises(RuntimeError, match=r"--ray should be a cluster's address, but is 127\.0\.0\.1:1"):
        tune_ray.Cluster("127.0.0.1:1", {})
