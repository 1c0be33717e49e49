"""Refiner Handoff on the real canvas: plans on both models, with Report and Benchmark in the same workflow."""

from __future__ import annotations

import pytest

from workflows import HANDOFF, Workflow, classic_only, seeds

NODE = "SlipstreamRefinerHandoff"


@pytest.fixture
def workflow() -> Workflow:
    """CFG Cutoff on either model, a Report of either, and a Benchmark of the refiner."""
    workflow = Workflow(HANDOFF, NODE)
    handoff, latent = workflow.node(NODE), workflow.node("EmptyLatentImage")
    loaders = [node for node in workflow.data["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    prompts = [node for node in workflow.data["nodes"] if node["type"] == "CLIPTextEncodeSDXLRefiner"]
    workflow.reports = []
    for name, loader in zip(("base", "refiner"), loaders, strict=True):
        cutoff = workflow.add("SlipstreamCFGCutoff", {"model": "MODEL"}, ["MODEL"], [0.5, "steps"])
        report = workflow.add("SlipstreamReport", {"model": "MODEL", "after": "LATENT,IMAGE"}, ["STRING"], [])
        workflow.link(loader, 0, cutoff, "model")
        workflow.link(cutoff, 0, handoff, name)
        workflow.link(cutoff, 0, report, "model")
        workflow.link(handoff, 0, report, "after")
        workflow.reports.append(report["id"])
    models = {"baseline": "MODEL", "candidate": "MODEL"}
    inputs = {**models, "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
    values = [next(seeds), "fixed", 2, 5.0, "euler", "normal", 1.0, 1, "off", False]
    benchmark = workflow.add("SlipstreamBenchmark", inputs, ["IMAGE", "STRING"], values)
    for source, output, name in (
        (loaders[1], 0, "baseline"), (cutoff, 0, "candidate"), (latent, 0, "latent_image"),
        (prompts[0], 0, "positive"), (prompts[1], 0, "negative"),
    ):  # fmt: skip
        workflow.link(source, output, benchmark, name)
    return workflow


@classic_only
def test_plans_on_both_models_reports_and_a_benchmark_tell_what_they_saw(page, workflow):
    page.load(workflow.data)
    assert page.run().status == "success"
    (line,) = page.verdicts(workflow.id(NODE))
    assert (line.state, line.text[:37]) == ("active", "6 + 2 steps, handed over at timestep ")
    base, refiner = ([line.text for line in page.verdicts(report)] for report in workflow.reports)
    assert base[0].startswith(f"{NODE} {workflow.id(NODE)}, base: 6 steps in ")
    assert refiner[0].startswith(f"{NODE} {workflow.id(NODE)}, refiner: 2 steps in ")
    assert all("CFG Cutoff: no guidance from step " in text for text in (*base, *refiner))
    (line,) = page.verdicts(workflow.id("SlipstreamBenchmark"))
    assert line.text.startswith("candidate: ")
    assert not page.problems()
