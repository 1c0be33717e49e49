"""Under core's MultiGPU clones: conditions of one evaluation run in threads, on copies of the model."""

from __future__ import annotations

import contextlib
import itertools
import math
import re

import comfy.model_management
import hosted
import pytest
import torch
from hosted import METHODS, orders, prompt, run_node, sample

multigpu = pytest.importorskip("comfy.multigpu", reason="this host has no MultiGPU")


DEVICES = [torch.device(name) for name in ("cpu", "cpu:0", "cpu:1")]
"""Several devices on a machine with one: the CPU, and the CPU by an index."""
plan_of = hosted.engine("plan.plan").plan_of


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *a, **k: DEVICES)
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda device: None)


def loadable(patcher):
    """A model that the host can load once more, as those are that its own nodes loaded."""
    patcher.cached_patcher_init = (lambda **kwargs: hosted.model("minimal"), ())
    return patcher


def on_devices(patcher, count):
    """A model spread over so many devices. With those that are on the further ones."""
    clone = multigpu.create_multigpu_deepclones(loadable(patcher), count)
    extra = clone.get_additional_models_with_key("multigpu")
    assert len({id(one.model) for one in (patcher, *extra)}) == count
    return clone, extra


def on_two_devices(patcher):
    clone, (extra,) = on_devices(patcher, 2)
    return clone, extra


REQUIRED = {
    "SlipstreamCompileModel": {"backend": {"backend": "eager"}},
    # In bf16, batches of two and of one differ by more than what is looked for here.
    "SlipstreamCPU": {"winograd": "F(4x4)", "bf16": False},
    "SlipstreamPrecision": {"compute_dtype": "fp32", "channels_last": "on"},
    "SlipstreamAttention": {"backend": "auto", "fuse_qkv": True},
    "SlipstreamRecipe": {"goal": "best quality"},
    # Of seven steps, one may be skipped.
    "SlipstreamForecast": {"error_budget": 0.5},
    # Quantized activations of batches of two and of one may round to neighbours.
    "SlipstreamQuantize": {"scheme": "int8 weight-only", "min_features": 0},
}
"""The inputs that have no default, or another one than is wanted here."""


IDLE = {
    ("SlipstreamCFGCutoff",): "1 of 2 devices had nothing to do in them",
    ("SlipstreamForecast",): "all 2 devices had nothing to do in those that were skipped",
}
"""What is told more of two devices, where it is a method that leaves them idle."""


def wire(patcher, names):
    for node_id, name in enumerate(names, 1):
        patcher = run_node(name, patcher, str(node_id), **REQUIRED.get(name, {}))
    return patcher


SHORT = ("SlipstreamForecast", "SlipstreamCFGCutoff", "SlipstreamDeepCache")
"""Those that know conditions apart."""


@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param((name,), marks=[] if name in SHORT else [pytest.mark.long]) for name in METHODS),
        pytest.param(tuple(METHODS), marks=pytest.mark.long),
    ],
    ids="+".join,
)
def test_one_image_whether_wired_above_or_below_multigpu(names, last_lines):
    model, steps = hosted.model("minimal"), 7 if "SlipstreamForecast" in names else 6
    with hosted.Counter(model) as plainly:
        expected = sample(wire(model, names), steps=steps)
    told = [last_lines(str(i)) for i in range(1, len(names) + 1)]
    split, extra = on_two_devices(model)
    above = wire(split, names)
    below, other = on_two_devices(wire(hosted.model("minimal"), names))
    for patcher, clone in ((above, extra), (below, other)):
        with hosted.Counter(clone) as counted:
            out = sample(patcher, steps=steps)
        assert counted.unet_calls, "the second device had nothing to do"
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-3)
    if names == ("SlipstreamDeepCache",):
        # Each device has calls and features of its own: as many steps are reused, in twice the calls.
        ((state, text),) = last_lines("1")
        assert (state, text) == (
            "active",
            "reused the deep features in 4 of 6 steps: 8 of 12 UNet calls ran 2 of 9 blocks",
        )
        assert plainly.unet_calls == 6
    if names in IDLE:
        ((state, text),) = told[0]
        assert state == "active"
        assert last_lines("1") == [(state, f"{text}; {IDLE[names]}")]
    assert torch.equal(sample(model, steps=steps), sample(hosted.model("minimal"), steps=steps))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_orders_give_the_same_bits(every):
    images = []
    for order in orders()[::every]:
        split, _ = on_two_devices(hosted.model("minimal"))
        images.append(sample(wire(split, order), steps=7))
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_condition_that_moves_to_the_other_device_runs_in_full_there(last_lines):
    """A third condition joins halfway, and the host shares them out anew: features are never another device's."""
    split, _ = on_two_devices(hosted.model("minimal"))
    positive = prompt(split, 10) + prompt(split, 30, start_percent=0.4, end_percent=1.0)
    out = sample(run_node("SlipstreamDeepCache", split, "1"), positive, steps=8)
    expected = sample(run_node("SlipstreamDeepCache", hosted.model("minimal"), "1"), positive, steps=8)
    assert (out - expected).norm() / expected.norm() < 0.02


LEAVING_IDLE = {
    "CFG Cutoff": ("SlipstreamCFGCutoff", {"cutoff": 0.5}),
    "guidance reused": ("SlipstreamCFGCutoff", {"cutoff": 1.0, "reuse_every": 2}),
    "Forecast": ("SlipstreamForecast", {"error_budget": 0.5}),
}
SAMPLE = {("CFG Cutoff", 1, 2), ("CFG Cutoff", 3, 3), ("Forecast", 2, 3)}


def by_any_way(text):
    """What Forecast tells, but for the ways that it chose."""
    return re.sub(r"forecast by [^;]+", "", text)


@pytest.mark.parametrize(
    ("method", "regions", "count"),
    [
        pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.long)
        for case in itertools.product(LEAVING_IDLE, (1, 2, 3), (2, 3))
    ],
)
def test_one_decision_for_all_devices_and_what_idles_is_told(method, regions, count, last_lines):
    """Of any number of conditions: the host shares those of one evaluation out by as many as there are."""
    name, values = LEAVING_IDLE[method]

    def positive(patcher):
        return [entry for seed in range(20, 20 + regions) for entry in prompt(patcher, seed)]

    def run(patcher):
        return sample(run_node(name, patcher, "1", **values), positive(patcher), steps=8)

    expected = run(hosted.model("minimal"))
    ((state, text),) = last_lines("1")
    assert state == "active"
    plain, extra = on_devices(hosted.model("minimal"), count)
    counters = [hosted.Counter(one) for one in (plain, *extra)]
    with contextlib.ExitStack() as stack:
        for counter in counters:
            stack.enter_context(counter)
        sample(plain, positive(plain), steps=8)
        of_each = [sum(counter.rows) for counter in counters]
        for counter in counters:
            counter.rows.clear()
        out = run(plain)
    rows = [sum(counter.rows) for counter in counters]
    ((_, now),) = last_lines("1")
    # Other batches round otherwise, by which Forecast may choose another of two ways that are equally near.
    assert (out - expected).norm() / expected.norm() < (1e-4 if now.startswith(text) else 1e-3)
    assert by_any_way(now).startswith(by_any_way(text))
    if name == "SlipstreamForecast":
        # Each device left out the same evaluations.
        made = 8 - int(re.match(r"skipped (\d+) of 8", text)[1])
        assert made < 8
        assert [8 * one for one in rows] == [made * one for one in of_each]
        idle = f"; all {count} devices had nothing to do in those that were skipped"
        assert by_any_way(now) == by_any_way(text) + idle
    else:
        assert sum(rows) < sum(of_each)
        # One condition of each region is left.
        idle = count - min(count, math.ceil(regions / math.ceil(regions / count)))
        assert (f"{idle} of {count} devices had nothing to do in them" in now) == (idle > 0)
        assert ("devices" in now) == (idle > 0)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, marks=[] if names == ("SlipstreamForecast",) else pytest.mark.long)
        for names in [*((name,) for name in METHODS), tuple(METHODS)]
    ],
    ids="+".join,
)
def test_a_plan_goes_along_where_the_host_loads_a_model_anew_for_another_device(names, last_lines):
    """As its node Select Model Device does."""
    model = loadable(hosted.model("minimal"))
    wired = wire(model, names)
    expected = sample(wired, steps=6)
    told = [last_lines(str(i)) for i in range(1, len(names) + 1)]
    moved = wired.deepclone_multigpu(DEVICES[1])
    assert moved.model is not model.model
    assert plan_of(moved) == plan_of(wired)
    hosted.engine("telling.verdicts")._kept.clear()
    assert torch.equal(sample(moved, steps=6), expected)
    # On the CPU by an index there is something to offload.
    if "SlipstreamSequentialOffload" not in names:
        assert [state for state, _ in last_lines("1")] == [state for state, _ in told[0]]
    assert torch.equal(sample(wired, steps=6), expected)
