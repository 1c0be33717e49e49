"""What the host tests share. `hosted` has the models."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hosted

# Dynamo's trace for its own tools, thousands of records a graph, of which pytest would keep each one's text.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is there before, the host's modules and what compilers keep, is not looked through each time that a test, or
    the host, collects garbage: in a process that has compiled much that takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def model(request):
    """A small UNet of fifteen blocks, with SD 1.5's prompts, or what a file's `MODEL` names; new for each test."""
    return hosted.model(getattr(request.module, "MODEL", "minimal"))


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
