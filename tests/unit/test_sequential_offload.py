"""Sequential Offload: its settings, and what it makes of how the host loaded a model."""

from __future__ import annotations

import pytest
from slipstream_pack.nodes.methods.method import Loaded, Model, Run, Steps
from slipstream_pack.nodes.methods.sequential_offload import SequentialOffload

ANY = Model("any", None, None, 0, 0)


def told(budget_mib=1000, **values):
    """The verdict on a model of 4897 MiB, of which 900 stay on the device."""
    values = {"size_mib": 4897.2, "resident_mib": 900.4, "layers": 686, "resident_layers": 40, **values}
    run = SequentialOffload(budget_mib).begin(Run(ANY, Steps((1.0, 0.0)), float))
    run.load(lambda: Loaded(**{"device": "cuda:0", **values}))
    return run.verdict()


@pytest.mark.parametrize("budget_mib", [-1, 1024 * 1024 + 1, float("nan")])
def test_a_budget_that_cannot_be_is_refused(budget_mib):
    with pytest.raises(ValueError, match="Sequential Offload: budget_mib must be from 0 to 1048576"):
        SequentialOffload(budget_mib)


def test_it_serves_any_model_and_is_never_off():
    SequentialOffload().check(ANY)
    assert SequentialOffload().off() is None


def test_what_stays_and_what_comes():
    assert told() == (
        "active",
        "kept 900 of 4897 MiB of weights on cuda:0 (40 of 686 layers); the others came as they were used, each one "
        "waited for",
    )
    assert told(streams=2)[1].endswith("over 2 streams")


def test_nothing_stays():
    assert told(0, resident_mib=0.0, resident_layers=0, streams=2, peak_mib=1210.3) == (
        "active",
        "kept none of the 4897 MiB of weights on cuda:0: all 686 layers came as they were used, over 2 streams; at "
        "most 1210 MiB were in use there in this run, other programs included",
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"resident_layers": 686, "resident_mib": 4897.2},
            "all 4897 MiB of weights are on cuda:0, within the budget of",
        ),
        ({"is_kept_there": True, "device": "cpu"}, "this model's weights are kept on cpu, where they are used"),
        (
            {"spread": "#cuda:0;4.0;cpu", "resident_layers": 10},
            "DisTorch, from another node, has the say over where this model's weights are (#cuda:0;4.0;cpu)",
        ),
        ({"is_dynamic": True}, "passed through: DynamicVRAM already brings this model's weights to cuda:0"),
    ],
)
def test_where_it_does_nothing_it_says_why(values, reason):
    state, text = told(8000, **values)
    assert state == "inert"
    assert reason in text


def test_under_dynamic_vram_it_says_what_the_run_took():
    assert "at most 5120 MiB were in use there in this run" in told(is_dynamic=True, peak_mib=5120.4)[1]


def test_a_run_that_did_not_begin():
    run = SequentialOffload().begin(Run(ANY, Steps(()), float))
    assert run.verdict() == ("inert", "offloaded nothing: the run did not begin")
