"""The page's commands on graphs and saved workflows, without a browser: node runs the modules that the page runs, and
the host says whether what they make of a workflow can be queued."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hosted import NODES
from loading import ROOT, find_node

NODE = find_node()
pytestmark = pytest.mark.skipif(NODE is None, reason="no node was found")

PROGRAMS = ROOT / "tests" / "web"
OURS = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}

ROWS = (
    ("unknownSigmas",),
    ("otherModel",),
    ("stopsEarly", "goesOn"),
    ("unknownGuider", "unknownPart"),
    ("nested",),
    ("outside",),
)
"""Why no Benchmark is put into a workflow, as the README's table has it."""

REFUSALS = {key for keys in ROWS for key in keys} | {"unknownSampler"}
"""And Refiner Handoff, in a template of ours."""


NO_PICTURES = {"noPicture", "pictureOutside"}
"""And no Tune, which compares pictures."""


def templates() -> dict[str, Path]:
    """The host's own workflows, as far as its packages are installed."""
    found = {}
    for package in ("comfyui_workflow_templates_json", "comfyui_workflow_templates"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted((Path(folder) / "templates").glob("*.json")):
                workflow = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(workflow, dict) and "nodes" in workflow:
                    found.setdefault(path.stem, path)
    return found


def in_a_thread(coroutine: Any) -> Any:
    """The browser tests leave an event loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@pytest.fixture(scope="module")
def host():
    """The host's nodes and ours, as its server would know them."""
    import nodes

    before = dict(nodes.NODE_CLASS_MAPPINGS)
    in_a_thread(nodes.init_extra_nodes(init_custom_nodes=False))
    nodes.NODE_CLASS_MAPPINGS.update(NODES)
    yield nodes
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(before)


@pytest.fixture(scope="module")
def object_info(host) -> dict[str, Any]:
    """What the page gets of each node."""

    def info(name: str, node: Any) -> dict[str, Any]:
        if hasattr(node, "GET_NODE_INFO_V1"):
            return dict(node.GET_NODE_INFO_V1())
        return {
            "input": node.INPUT_TYPES(),
            "output": node.RETURN_TYPES,
            "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
            "display_name": host.NODE_DISPLAY_NAME_MAPPINGS.get(name, name),
        }

    return {name: info(name, node) for name, node in host.NODE_CLASS_MAPPINGS.items()}


@pytest.fixture(scope="module")
def run(object_info, tmp_path_factory):
    """Runs a program of tests/web with the host's nodes and more."""

    def run(program: str, **more: Any) -> dict[str, Any]:
        job = tmp_path_factory.mktemp("commands") / "job.json"
        plain = lambda value: str(value) if isinstance(value, type) else list(value)  # noqa: E731
        job.write_text(json.dumps({"infos": object_info, **more}, default=plain), encoding="utf-8")
        command = [NODE, str(PROGRAMS / program), str(job)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)

    return run


@pytest.fixture(scope="module")
def looked_at(run) -> dict[str, Any]:
    """What became of every workflow that samples."""
    workflows = {name: str(path) for name, path in {**templates(), **OURS}.items()}
    return {name: found for name, found in run("run.mjs", workflows=workflows).items() if found["samplers"]}


def test_small_graphs(run):
    failures = {name: failure for name, failure in run("cases.mjs").items() if failure}
    assert not failures, "\n\n".join(failures.values())


def test_the_host_translates_the_commands_as_the_page_does():
    """The menu by its English label, the settings by the command's id."""
    words = (ROOT / "web" / "js" / "commands" / "words.mjs").read_text(encoding="utf-8")
    names = ("speedUp", "benchmark", "tune", "toggle", "remove")
    english, chinese = ([re.findall(rf"(?m)^    {name}: '(.+)'", words)[i] for name in names] for i in (0, 1))
    main, commands = (
        json.loads((ROOT / "locales" / "zh" / f"{file}.json").read_text(encoding="utf-8"))
        for file in ("main", "commands")
    )
    assert main["menuLabels"] == dict(zip(english, chinese, strict=True))
    ids = [f"Slipstream_{name[0].upper()}{name[1:]}" for name in names]
    assert commands == {id_: {"label": label} for id_, label in zip(ids, chinese, strict=True)}


def test_every_node_of_ours_is_of_one_kind(run):
    kinds = run("run.mjs", workflows={}, kinds=sorted(NODES))["kinds"]
    others = {name: kind for name, kind in kinds.items() if kind != "pass"}
    assert others == {
        "SlipstreamBenchmark": "measure",
        "SlipstreamReport": "measure",
        "SlipstreamTune": "measure",
        "SlipstreamVAEDecodeTiled": "replace",
        "SlipstreamVAEEncodeTiled": "replace",
        "SlipstreamDemoModel": "stay",
        "SlipstreamRefinerHandoff": "stay",
        "SlipstreamTinyVAE": "stay",
    }


def test_each_saved_workflow_is_wired_or_refused_and_comes_back_exactly(looked_at):
    assert len(looked_at) >= len(OURS) - 1  # in one only a Benchmark samples
    for name, found in looked_at.items():
        steps = found["steps"]
        for step, made in steps.items():
            if "refused" in made:
                assert step in ("benchmark", "tune"), (name, made)
                assert made["refused"] in REFUSALS | (NO_PICTURES if step == "tune" else set()), (name, made)
                assert made["unchanged"], (name, made)
            else:
                assert not made["problems"], (name, step, made["problems"])
                assert not made["overlaps"], (name, step, made["overlaps"])
            assert made["said"]
            assert made["zh"] != made["said"]
        added = [kind for _, kind in steps["speedUp"]["added"]]
        assert set(added) <= {"SlipstreamRecipe"}
        assert added or found["ours"], name
        assert not steps["again"]["added"], name
        if not found["ours"]:
            assert steps["remove"]["prompt"] == found["before"], name
            last = next((step for step in ("tune", "benchmark") if "refused" not in steps[step]), None)
            if last:
                assert steps["on"]["prompt"] == steps[last]["prompt"], name


def wrong(prompt: dict[str, Any]) -> set[tuple[str, str, str]] | None:
    """What the host finds wrong with a prompt: node, error, details. None if it does not know all of its nodes."""
    import execution

    _, error, _, by_node = in_a_thread(execution.validate_prompt("prompt", json.loads(json.dumps(prompt)), None))
    if error and error["type"] == "missing_node_type":
        return None
    found = {(node, one["type"], one["details"]) for node, told in by_node.items() for one in told["errors"]}
    return found | ({("", error["type"], error["details"])} if error and not by_node else set())


def check_with_the_host(workflows: dict[str, Any]) -> Counter[str]:
    """Whether the host would take what the commands made of workflows, where it knows all of their nodes."""
    counts: Counter[str] = Counter()
    for name, found in workflows.items():
        # Files that are not there, and the like, are wrong before too.
        before = wrong(found["before"])
        counts["known" if before is not None else "unknown"] += 1
        if before is None:
            continue
        for step in ("speedUp", "benchmark", "tune", "off", "remove"):
            made = found["steps"][step]
            if "refused" not in made:
                after = wrong(made["prompt"])
                assert after is not None, (name, step)
                # Behind the one that is wrong the host looks no further, and a Benchmark hears of it too.
                assert after <= before, (name, step, after - before)
    return counts


SAMPLE = 12
"""Every one of so many workflows is validated in the ordinary suite."""


def test_the_host_would_take_what_is_made(host, looked_at):
    some = dict(list(looked_at.items())[::SAMPLE])
    ours = {name: found for name, found in looked_at.items() if name in OURS}
    assert check_with_the_host({**some, **ours})["known"]


@pytest.mark.long
def test_the_host_would_take_what_is_made_of_every_workflow(host, looked_at):
    counts = check_with_the_host(looked_at)
    assert counts["known"] > counts["unknown"]


def test_the_readme_says_of_how_many(looked_at):
    theirs = [found["steps"] for name, found in looked_at.items() if name not in OURS]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    version = importlib.metadata.version("comfyui-workflow-templates")
    pattern = r"All (\d+) workflows .*?\((\S+):.*? wired into (\d+) of them, a Tune\s+into (\d+)"
    total, told, put, tuned = re.findall(pattern, text, re.DOTALL)[0]
    if version != told:
        pytest.skip(f"it tells of {told}, and here is {version}")
    refused = Counter(steps["benchmark"].get("refused", "") for steps in theirs)
    assert (int(total), int(put)) == (len(theirs), refused.pop(""))
    assert int(tuned) == sum("refused" not in steps["tune"] for steps in theirs)
    table = text[text.index("| workflows | why no Benchmark |") :].split("\n\n")[0]
    rows = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|", table)]
    assert rows == [sum(refused.pop(key) for key in keys) for keys in ROWS]
    assert not refused
