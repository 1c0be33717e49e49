"""Hundreds of sampling runs in one prompt: few lines on a node, small messages, and nothing lost that matters."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.model_management
import hosted
import pytest
from hosted import run_node, sample

engine = hosted.engine
verdicts, folding = engine("telling.verdicts"), engine("telling.folding")
history, metadata = engine("telling.history"), engine("telling.metadata")
MANY = 500
GRAPH = {
    "1": {"class_type": "SlipstreamDeepCache", "inputs": {}},
    "3": {"class_type": "KSampler", "inputs": {}},
    **{str(100 + number): {"class_type": "KSampler", "inputs": {"seed": number}} for number in range(MANY)},
}


@dataclass
class Method:
    """One that says what it is given."""

    text: str
    state: str = "active"

    def verdict(self):
        return self.state, self.text


@dataclass(frozen=True)
class Runs:
    """Many runs of a kind.

    Attributes:
        text, state: what a method says of a run, by its number.
        node: what samples.
        fails: what ends a run.
        lines: how many lines the node then has.
    """

    text: object = lambda number: "reused 3 of 4"
    state: object = lambda number: "active"
    node: object = lambda number: "3"
    fails: object = lambda number: None
    lines: int = 1


def at(when, what, otherwise):
    return lambda number: what if number == when else otherwise


KINDS = {
    "equal": Runs(),
    "two kinds in turn": Runs(text=lambda number: f"reused {number % 2} of 4", lines=2),
    "differing": Runs(text=lambda number: f"took {number} s", lines=6),
    "from equal to differing": Runs(text=lambda number: f"took {max(number, 400)} s", lines=6),
    "several samplers": Runs(node=lambda number: str(100 + number)),
    "several samplers, differing": Runs(
        node=lambda number: str(100 + number), text=lambda number: f"took {number} s", lines=6
    ),
    "a loop's": Runs(node=lambda number: f"3.0.{number}.5"),
    "one fails": Runs(fails=at(250, RuntimeError("a fault"), None), lines=2),
    "one of differing fails": Runs(
        text=lambda number: f"took {number} s", fails=at(250, RuntimeError("a fault"), None), lines=6
    ),
    "many fail": Runs(
        text=lambda number: f"took {number} s",
        fails=lambda number: RuntimeError(f"fault {number}") if number % 2 else None,
        lines=6,
    ),
    "one is interrupted": Runs(fails=at(250, comfy.model_management.InterruptProcessingException(), None), lines=2),
    "one of differing does nothing": Runs(
        text=lambda number: f"took {number} s", state=at(250, "inert", "active"), lines=6
    ),
}


@pytest.fixture
def page(monkeypatch):
    """A client with our script, and what it is sent."""
    sent = []
    instance = SimpleNamespace(send_sync=lambda event, data, client: sent.append(json.dumps(data)), sockets={"c": None})
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    monkeypatch.setattr(verdicts, "_clients", {"c"})
    for kept in (verdicts._kept, history._kept, metadata._kept):
        kept.clear()
    monkeypatch.setattr(verdicts, "current_prompt", lambda: place.here)
    place = SimpleNamespace(here=prompt("3"), sent=sent)
    return place


def prompt(node):
    return verdicts.Prompt("p", "w", node, "c", GRAPH)


def last(page, node="1"):
    """The lines that the page has of a node."""
    told = (json.loads(data) for data in reversed(page.sent))
    return next(verdict["lines"] for verdict in told if verdict["node_id"] == node)


def run_many(page, plan, runs, methods=1, count=MANY):
    teller, record = engine("telling.teller").Teller, engine("plan.record").Record
    for number in range(count):
        page.here = prompt(runs.node(number))
        counted = record(4)
        told = teller(plan, counted, None)
        told.publish([])
        assert "running" in {line["state"] for line in last(page)}
        counted.evaluation(0)
        error = runs.fails(number)
        counted.end(error)
        told.end([Method(runs.text(number), runs.state(number))] * methods, error)


def told_of(lines):
    """How many runs some lines tell of."""
    counted = [re.match(r"and (\d+) more", line["text"]) for line in lines]
    return sum(int(found[1]) if found else line["times"] for line, found in zip(lines, counted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_few_lines_tell_of_all_runs(kind, page, model):
    runs = KINDS[kind]
    plan = engine("plan.plan").plan_of(run_node("SlipstreamDeepCache", model, "1"))
    run_many(page, plan, runs)
    lines = last(page)
    assert len(lines) == runs.lines
    assert told_of(lines) == MANY
    assert max(map(len, page.sent)) < 1500
    ends = {line["state"] for line in lines}
    for number in (0, 250, 251):
        line = verdicts.line(SimpleNamespace(status="finished", model_calls=0), runs.state(number), "")
        status, _ = engine("plan.record").outcome(runs.fails(number))
        assert (line.state if status == "finished" else status) in ends
    # The same again after a reload, and none of it grows.
    verdict = verdicts._kept["w", "1"]
    assert verdict.as_dict()["lines"] == lines
    assert len(verdict.lines) <= verdicts.LATEST
    assert len(verdict.earlier.lines) <= folding.STORED


@pytest.mark.parametrize("kind", ["equal", "differing", "one of differing fails", "several samplers, differing"])
def test_a_node_of_several_methods_stays_readable(kind, page, model):
    plan = engine("plan.plan").plan_of(run_node("SlipstreamRecipe", model, "1", goal="fastest"))
    assert len(plan.entries) > 1
    run_many(page, plan, KINDS[kind], len(plan.entries), 300)
    itself, *lines = last(page)
    assert itself["text"].startswith("fastest, for ")
    assert len(lines) <= folding.MOST + 1
    assert told_of(lines) == 300 * len(plan.entries)
    assert ("failed" in {line["state"] for line in lines}) == ("fails" in kind)
    assert max(map(len, page.sent)) < 4500
    # One message for all methods.
    assert len(page.sent) == 2 * 300 + 1


def test_runs_that_a_handful_can_tell_of_are_told_one_by_one(page, model):
    plan = engine("plan.plan").plan_of(run_node("SlipstreamDeepCache", model, "1"))
    run_many(page, plan, Runs(text=lambda number: f"took {number} s", node=lambda number: str(100 + number)), count=6)
    assert [(line["sampler"], line["text"], line["times"]) for line in last(page)] == [
        (f"KSampler {100 + number}", f"took {number} s", 1) for number in range(6)
    ]


def test_a_line_that_was_folded_goes_on_while_its_run_does(page):
    """A sampler that samples inside of a run, and a node that tells of itself anew each time."""
    node = engine("plan.plan").Node("1", "SlipstreamDeepCache")

    def publish(state, text, key):
        verdicts.publish(prompt("3"), node, verdicts.Line(state, text), {}, key)

    publish("running", "sampling", (0.5, "deepcache"))
    for number in range(MANY):
        publish("active", "words it knows: a tree", (verdicts.OF_ITSELF, "model"))
        publish("active", f"took {number} s", (number + 1, "deepcache"))
    assert "running" in {line["state"] for line in last(page)}
    publish("failed", "a fault", (0.5, "deepcache"))
    lines = last(page)
    assert "running" not in {line["state"] for line in lines}
    assert "a fault" in {line["text"] for line in lines}
    assert [line["times"] for line in lines if line["text"].startswith("words")] == [1]
    assert told_of(lines) == MANY + 2


def test_the_demo_model_says_of_many_prompts_what_it_ignored(page):
    demo_model = engine("demo_model")
    source = engine("plan.plan").Node("1", "SlipstreamDemoModel")
    tokenizer = demo_model.DemoTokenizer(demo_model.Demo.read(), source)
    for number in range(100):
        tokenizer.tokenize_with_weights(f"a lake, {'x' * number if number == 50 else 'trees ' * number}")
    itself, *lines = last(page)
    assert "Words it knows: " in itself["text"]
    assert told_of(lines) == 100
    assert len(lines) == folding.HANDFUL + 1


def test_stages_of_a_vae_fold_what_many_nodes_decoded(page):
    stages = engine("vae.stages")

    class Stage(stages.Stage):
        title, stem, does, rank = "Test", "test", "tests", 0

        def _begin(self):
            self.calls = stages.Calls()

        def _verdict(self):
            return "active", "; ".join(self.calls.told())

    stage = Stage(None, None, engine("plan.plan").Node("1", "SlipstreamTinyVAE"))
    for number in range(100):
        page.here = prompt(f"3.0.{number}.8")
        for _ in range(2):
            with stage._telling():
                stage.calls.add("decode", 1)
    assert [(line["text"], line["times"]) for line in last(page)] == [("decoded in 2 calls", 100)]


def test_a_sampler_that_runs_in_a_loop_is_named_as_the_node_that_loops(page, model):
    patcher = run_node("SlipstreamDeepCache", model, "1")
    for number in range(3):
        page.here = prompt(f"3.0.{number}.5")
        sample(patcher, steps=1)
    ((line),) = last(page)
    assert (line["sampler"], line["times"]) == ("KSampler 3", 3)
    assert len(history._kept) == 1
    (told,) = metadata._kept.values()
    assert len(told.runs) == 1


@pytest.mark.parametrize("node", [lambda number: "3", lambda number: f"3.0.{number}.5"], ids=["a node", "a loop"])
def test_an_image_tells_of_a_bounded_number_of_plans_and_how_many_there_were(node, page):
    for number in range(MANY):
        metadata.keep(prompt(node(number)), number, 1, [])
    (told,) = (sampler.as_dict() for sampler in metadata._kept.values())
    assert len(told["runs"]) == metadata.RUNS
    assert told["left_out"] == MANY - metadata.RUNS
    metadata.keep(prompt(node(MANY)), MANY - 1, 2, [])
    assert [run["steps"] for run in told["runs"][-1:]] == [1]
    assert [run["steps"] for run in next(iter(metadata._kept.values())).as_dict()["runs"][-1:]] == [2]


def test_a_report_tells_of_a_handful_of_many_samplers(page, model):
    plan = engine("plan.plan").plan_of(run_node("SlipstreamDeepCache", model, "1"))
    run_many(
        page, plan, Runs(node=lambda number: str(100 + number), fails=at(7, RuntimeError("a fault"), None)), count=90
    )
    page.here = prompt("9")
    patcher = run_node("SlipstreamDeepCache", model, "1")
    text = hosted.execute("SlipstreamReport", "9", model=patcher, after={"samples": hosted.latent(model)}).result[0]
    named = re.findall(r"KSampler (\d+): ", text)
    assert named == ["107", "186", "187", "188", "189"]
    assert re.search(r"\nand 85 more runs, .* s in all: 85 finished$", text)
    assert last(page, "9")[0]["state"] == "failed"
