"""DeepCache's schedules and decisions, on a UNet that only counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from slipstream_pack.nodes.methods.deepcache import DeepCache, full_steps
from slipstream_pack.nodes.methods.method import Evaluation, Model, Run, Steps

SD15 = Model("SD15", "SD1", 320, 12, 25)


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(10, 3, [0, 3, 6, 9]), (6, 2, [0, 2, 4]), (5, 10, [0]), (0, 3, []), (4, 1, [0, 1, 2, 3])],
)
def test_uniform(steps, interval, expected):
    assert full_steps(steps, interval, "uniform") == expected


def paper(steps, count, center, power):
    """Section 3.3 of the paper, in numpy: the unique integers of l**p + c over equally spaced l."""
    np = pytest.importorskip("numpy")
    spaced = np.linspace(-(center ** (1 / power)), (steps - center) ** (1 / power), count + 1)[:-1]
    return (np.sign(spaced) * np.abs(spaced) ** power + center).astype(int).tolist()


@pytest.mark.parametrize(("steps", "interval"), [(50, 10), (50, 5), (100, 10), (30, 6)])
def test_quadratic_is_the_papers_schedule_where_its_integers_are_distinct(steps, interval):
    expected = paper(steps, math.ceil(steps / interval), 0.3 * steps, 1.4)
    assert len(set(expected)) == len(expected)
    assert full_steps(steps, interval, "quadratic") == [0, *expected[1:]]


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 7, 20, 100])
def test_quadratic_is_ascending_distinct_complete_and_begins_at_0(interval):
    for steps in range(1, 121):
        chosen = full_steps(steps, interval, "quadratic")
        assert len(chosen) == math.ceil(steps / interval)
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert chosen[-1] < steps


def test_quadratic_is_densest_at_30_percent():
    chosen = full_steps(100, 10, "quadratic")
    gaps = {(a + b) / 2: b - a for a, b in itertools.pairwise(chosen)}
    assert 15 < min(gaps, key=gaps.get) < 45
    assert max(gaps.values()) == gaps[max(gaps)]


class CountingCall:
    """A UNet call whose features are the number of the full call that they come from."""

    def __init__(self, log, keys=("cond", "uncond")):
        self.log = log
        self.keys = keys

    def full(self, branch=None):
        self.log.append("full")
        number = float(self.log.count("full"))
        return torch.zeros(1), None if branch is None else torch.full((len(self.keys), 1), number)

    def partial(self, branch, deep):
        self.log.append(("partial", deep.flatten().tolist()))
        return torch.zeros(1)


def begin(config, steps=6):
    sigmas = tuple(float(steps - i) for i in range(steps + 1))
    return config.begin(Run(SD15, Steps(sigmas), lambda percent: steps * (1 - percent)))


def evaluate(run, steps, keys=("cond", "uncond")):
    log = []
    for step in steps:
        run.unet(Evaluation(step, 0.0), CountingCall(log, keys))
    return [entry if entry == "full" else entry[1] for entry in log]


def test_cached_steps_use_the_features_of_the_last_full_one():
    run = begin(DeepCache(3))
    assert evaluate(run, range(6)) == ["full", [1.0, 1.0], [1.0, 1.0], "full", [2.0, 2.0], [2.0, 2.0]]
    state, text = run.verdict()
    assert (state, text) == (
        "active",
        "reused the deep features in 4 of 6 steps: 4 of 6 UNet calls ran 2 of 25 blocks",
    )


def test_conditions_apart_and_in_another_order_get_their_own():
    run, log = begin(DeepCache(2)), []
    run.unet(Evaluation(0, 0.0), CountingCall(log, ("a",)))
    run.unet(Evaluation(0, 0.0), CountingCall(log, ("b",)))
    run.unet(Evaluation(1, 0.0), CountingCall(log, ("b", "a")))
    assert log == ["full", "full", ("partial", [2.0, 1.0])]


def test_a_condition_without_features_makes_its_batch_full():
    run, log = begin(DeepCache(3)), []
    run.unet(Evaluation(0, 0.0), CountingCall(log, ("a",)))
    run.unet(Evaluation(1, 0.0), CountingCall(log, ("a", "new")))
    run.unet(Evaluation(2, 0.0), CountingCall(log, ("a", "new")))
    assert log == ["full", "full", ("partial", [2.0, 2.0])]


def test_a_jump_past_a_full_step_or_back_before_it_runs_in_full():
    assert evaluate(begin(DeepCache(3)), [0, 1, 4, 5]) == ["full", [1.0, 1.0], "full", [2.0, 2.0]]
    assert evaluate(begin(DeepCache(3)), [0, 1, 3, 1, 2]) == ["full", [1.0, 1.0], "full", "full", [3.0, 3.0]]


def test_outside_the_range_every_step_is_full_and_nothing_is_kept():
    run = begin(DeepCache(10, start_percent=1 / 3, end_percent=2 / 3))
    assert run.range == [2, 3, 4]
    assert evaluate(run, range(6)) == ["full", "full", "full", [3.0, 3.0], [3.0, 3.0], "full"]
    assert not run.features


def test_verdicts_of_runs_that_reused_nothing_say_why():
    assert begin(DeepCache(3)).verdict() == ("inert", "reused nothing: the UNet was not called")
    run = begin(DeepCache(3), steps=1)
    evaluate(run, [0])
    assert run.verdict()[1].startswith("reused nothing: 1 of this run's steps lie between")
    run = begin(DeepCache(3))
    evaluate(run, [0])
    assert run.verdict()[1] == "reused nothing: all 1 steps that ran were full ones"


@pytest.mark.parametrize(
    "values", [{"cache_interval": 0}, {"cache_interval": 101}, {"cache_branch_id": -1}, {"schedule": "cubic"}]
)
def test_bad_settings(values):
    with pytest.raises(ValueError, match="DeepCache: "):
        DeepCache(**values)


def test_off():
    assert DeepCache(1).off()
    assert DeepCache(3, start_percent=0.5, end_percent=0.5).off()
    assert DeepCache(2).off() is None
