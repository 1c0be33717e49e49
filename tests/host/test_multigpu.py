"""Under core's MultiGPU clones: conditions of one evaluation run in threads, on copies of the model."""

from __future__ import annotations

import comfy.model_management
import hosted
import pytest
import torch
from hosted import METHODS, orders, prompt, run_node, sample

multigpu = pytest.importorskip("comfy.multigpu", reason="this host has no MultiGPU")


@pytest.fixture
def two_devices(monkeypatch):
    """Two devices on a machine with one: the CPU, and the CPU by its index."""
    devices = [torch.device("cpu"), torch.device("cpu:0")]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *a, **k: devices)
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda device: None)


def on_two_devices(patcher):
    patcher.cached_patcher_init = (lambda **kwargs: hosted.model("minimal"), ())
    clone = multigpu.create_multigpu_deepclones(patcher, 2)
    (extra,) = clone.get_additional_models_with_key("multigpu")
    assert extra.model is not patcher.model
    return clone, extra


REQUIRED = {
    "SlipstreamCompileModel": {"backend": {"backend": "eager"}},
    # In bf16, batches of two and of one differ by more than what is looked for here.
    "SlipstreamCPU": {"winograd": "F(4x4)", "bf16": False},
    "SlipstreamPrecision": {"compute_dtype": "fp32", "channels_last": "on"},
    "SlipstreamAttention": {"backend": "auto", "fuse_qkv": True},
    "SlipstreamRecipe": {"goal": "best quality"},
    # Of six steps, one may be skipped.
    "SlipstreamForecast": {"error_budget": 0.5},
    # Quantized activations of batches of two and of one may round to neighbours.
    "SlipstreamQuantize": {"scheme": "int8 weight-only", "min_features": 0},
}
"""The inputs that have no default, or another one than is wanted here."""


def wire(patcher, names):
    for node_id, name in enumerate(names, 1):
        patcher = run_node(name, patcher, str(node_id), **REQUIRED.get(name, {}))
    return patcher


SHORT = ("SlipstreamForecast", "SlipstreamCFGCutoff", "SlipstreamDeepCache")
"""Those that know conditions apart. With all of them go the others."""


@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param((name,), marks=[] if name in SHORT else [pytest.mark.long]) for name in METHODS),
        tuple(METHODS),
    ],
    ids="+".join,
)
def test_one_image_whether_wired_above_or_below_multigpu(names, two_devices, last_lines):
    model = hosted.model("minimal")
    with hosted.Counter(model) as plainly:
        expected = sample(wire(model, names), steps=6)
    told = [last_lines(str(i)) for i in range(1, len(names) + 1)]
    split, extra = on_two_devices(model)
    above = wire(split, names)
    below, other = on_two_devices(wire(hosted.model("minimal"), names))
    for patcher, clone in ((above, extra), (below, other)):
        with hosted.Counter(clone) as counted:
            out = sample(patcher, steps=6)
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
    if names in (("SlipstreamCFGCutoff",), ("SlipstreamForecast",)):
        assert last_lines("1") == told[0]
        assert told[0][0][0] == "active"
    assert torch.equal(sample(model, steps=6), sample(hosted.model("minimal"), steps=6))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_orders_give_the_same_bits(every, two_devices):
    images = []
    for order in orders()[::every]:
        split, _ = on_two_devices(hosted.model("minimal"))
        images.append(sample(wire(split, order), steps=6))
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_condition_that_moves_to_the_other_device_runs_in_full_there(two_devices, last_lines):
    """A third condition joins halfway, and the host shares them out anew: features are never another device's."""
    split, _ = on_two_devices(hosted.model("minimal"))
    positive = prompt(split, 10) + prompt(split, 30, start_percent=0.4, end_percent=1.0)
    out = sample(run_node("SlipstreamDeepCache", split, "1"), positive, steps=8)
    expected = sample(run_node("SlipstreamDeepCache", hosted.model("minimal"), "1"), positive, steps=8)
    assert (out - expected).norm() / expected.norm() < 0.02
