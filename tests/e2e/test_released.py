"""What earlier versions released goes on working: their API prompts validate, run, and make the same pictures."""

from __future__ import annotations

import pytest
from compare import COMMITS, compare
from prompts import compiles, promises_its_bits, released, small

PROMPTS = {f"{version}-{title}": prompt for version, prompts in released().items() for title, prompt in prompts.items()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if compiles(prompt) else []) for name, prompt in PROMPTS.items()],
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
