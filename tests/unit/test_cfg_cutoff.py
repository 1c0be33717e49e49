"""CFG Cutoff's decisions and counts, on a guider that only counts."""

from __future__ import annotations

import pytest
import torch
from slipstream_pack.nodes.methods.cfg_cutoff import CFGCutoff
from slipstream_pack.nodes.methods.method import Evaluation, Model, Run, Steps


class CountingGuidance:
    def __init__(self, evaluation, guided=2, alone=1, is_guided=True):
        self.evaluation, self.cost, self.alone = evaluation, guided, alone
        self.is_guided, self.conditions = is_guided, guided
        self.left_out = ()

    def guided(self):
        self.evaluation.predictions += self.cost
        return torch.tensor(2.0)

    def positive_alone(self):
        self.evaluation.predictions += self.alone
        return torch.tensor(1.0)


def run_of(config, steps=10, evaluated=None, **guidance):
    sigmas = tuple(float(steps - i) for i in range(steps + 1))
    run = config.begin(Run(Model("any", None, None, 0, 0), Steps(sigmas), lambda percent: steps * (1 - percent)))
    kinds = []
    for step in range(steps) if evaluated is None else evaluated:
        evaluation = Evaluation(step, sigmas[step])
        kinds.append(int(run.predict_noise(evaluation, CountingGuidance(evaluation, **guidance))))
    return kinds, run.verdict()


@pytest.mark.parametrize("cutoff", [0.0, 0.25, 0.29, 0.5, 0.75, 0.99])
def test_steps(cutoff):
    kinds, (state, text) = run_of(CFGCutoff(cutoff), steps=20)
    first = int(cutoff * 20)
    assert kinds == [2] * first + [1] * (20 - first)
    assert state == "active"
    assert text == (
        f"no guidance from step {first} of 20: {20 - first} of 20 evaluations ran on the positive alone, "
        f"{20 + first} of 40 predictions evaluated"
    )


def test_timesteps():
    kinds, _ = run_of(CFGCutoff(0.5, "timesteps"))
    assert kinds == [2] * 5 + [1] * 5


def test_other_nodes_that_evaluate_more_are_counted_and_told():
    _, (state, text) = run_of(CFGCutoff(0.5), guided=3, alone=2)
    assert state == "active"
    assert "25 of 30 predictions evaluated; up to 2 predictions an evaluation remained" in text
    _, (state, text) = run_of(CFGCutoff(0.5), guided=3, alone=3)
    assert state == "inert"
    assert "other nodes on this model evaluated as much again" in text


def test_inert_runs_say_why():
    assert "the model was not evaluated" in run_of(CFGCutoff(0.5), evaluated=[])[1][1]
    kinds, (state, text) = run_of(CFGCutoff(0.5), is_guided=False)
    assert (kinds, state) == ([2] * 10, "inert")
    assert "not guided anyway" in text
    _, (state, text) = run_of(CFGCutoff(0.8), evaluated=range(5))
    assert state == "inert"
    assert text == "saved nothing: the cutoff, at step 8 of 10, was not reached"


def test_settings():
    assert CFGCutoff(1.0).off()
    assert CFGCutoff(0.99).off() is None
    with pytest.raises(ValueError, match=r"CFG Cutoff: cutoff must be from 0.0 to 1.0"):
        CFGCutoff(1.5)
    with pytest.raises(ValueError, match="CFG Cutoff: unit must be one of steps, timesteps"):
        CFGCutoff(0.5, "seconds")
