"""What earlier versions released goes on working: their API prompts validate, run, and make the same pictures."""

from __future__ import annotations

import time

import pytest
from compare import COMMITS, compare
from prompts import compiles, promises_its_bits, released, small

from workflows import TEMPLATES

PROMPTS = {f"{version}-{title}": prompt for version, prompts in released().items() for title, prompt in prompts.items()}


def is_long(name, prompt):
    """What compiles takes minutes; a template's is run by hands in test_templates; and one order of several does."""
    return compiles(prompt) or "the other way round" in name or name.partition("-")[2] in TEMPLATES


def test_all_of_them_validate_as_they_were_queued(server):
    try:
        for prompt in PROMPTS.values():
            server.queue(prompt)
    finally:
        server.post("/queue", {"clear": True})
        server.post("/interrupt", {})
    deadline = time.monotonic() + 300
    while any(server.get("/queue").values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if is_long(name, one) else []) for name, one in PROMPTS.items()],
)
def test_a_released_prompt_validates_and_runs(name, server):
    _, outputs, _ = server.run(small(PROMPTS[name]), {})
    assert outputs


@pytest.mark.long
@pytest.mark.parametrize("version", list(COMMITS))
def test_a_released_prompt_makes_the_same_bits(version):
    prompts = {title: prompt for title, prompt in released()[version].items() if promises_its_bits(prompt)}
    try:
        differences = compare(version, prompts)
    except LookupError as error:
        pytest.skip(str(error))
    assert not {title: why for title, why in differences.items() if why}
