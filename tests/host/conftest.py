"""What the host tests share. `hosted` has the models."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hosted
from comfy.model_patcher import ModelPatcher

# Dynamo's trace for its own tools, thousands of records a graph, of which pytest would keep each one's text.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is there before, the host's modules and what compilers keep, is not looked through each time that a test, or
    the host, collects garbage: in a process that has compiled much that takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def inner_models():
    """Those that the tests of a file share, by name, as long as each leaves them as they were."""
    return {}


@pytest.fixture
def model(request, inner_models):
    """A small UNet of fifteen blocks, with SD 1.5's prompts, or what a file's `MODEL` names. Its patcher is new for
    each test; the model inside only if a test before changed it: else what was compiled for it serves again."""
    name = getattr(request.module, "MODEL", "minimal")
    if name not in inner_models:
        inner_models[name] = hosted.model(name).model
    inner = inner_models[name]
    before = hosted.fingerprint(inner)
    yield ModelPatcher(inner, load_device=hosted.CPU, offload_device=hosted.CPU)
    if hosted.fingerprint(inner) != before:
        del inner_models[name]


@pytest.fixture
def last_lines():
    """What a node says now of what became of its methods, by node id: [(state, text), ...]."""
    verdicts = hosted.engine("telling.verdicts")
    verdicts._kept.clear()

    def lines(node_id: str) -> list[tuple[str, str]]:
        verdict = verdicts._kept[(None, node_id)]
        lines = [line for key, line in verdict.lines.items() if key != verdicts.TOLD]
        return [(line["state"], line["text"]) for line in lines]

    return lines
