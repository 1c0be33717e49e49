"""CFG Cutoff's decisions and counts, on a guider that only counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from slipstream_pack.nodes.methods.cfg_cutoff import MOST, CFGCutoff, Difference, Measured
from slipstream_pack.nodes.methods.method import Evaluation, MethodRun, Model, Run, Steps


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


# The interval, reuse and the measured end.


@pytest.mark.parametrize(("start", "cutoff"), [(0.1, 1.0), (0.25, 0.75), (0.0, 0.5), (0.3, 0.31)])
def test_guidance_has_a_beginning(start, cutoff):
    kinds, (state, text) = run_of(CFGCutoff(cutoff, start=start), steps=20)
    begins, ends = int(start * 20), int(cutoff * 20)
    assert kinds == [1] * begins + [2] * (ends - begins) + [1] * (20 - ends)
    assert state == "active"
    where = " and ".join([f"before step {begins}"] * (begins > 0) + [f"from step {ends}"] * (ends < 20))
    alone = 20 - ends + begins
    assert text == (
        f"no guidance {where} of 20: {alone} of 20 evaluations ran on the positive alone, "
        f"{40 - alone} of 40 predictions evaluated"
    )


def test_a_beginning_by_timesteps():
    kinds, _ = run_of(CFGCutoff(0.75, "timesteps", 0.25))
    assert kinds == [1] * 3 + [2] * 5 + [1] * 2


def test_a_run_of_one_step_has_its_guidance():
    assert run_of(CFGCutoff(1.0, start=0.9), steps=1)[0] == [2]


@dataclass
class Call:
    """What `methods.method.ConditionsCall` is, over a positive and others with planted predictions."""

    evaluation: Evaluation
    predicts: list
    x: torch.Tensor
    sigma: float
    weights: tuple | None
    are_positive: tuple
    state: object = 0
    window: tuple = ()
    chosen: tuple | None = None

    @property
    def places(self):
        return range(len(self.predicts)) if self.chosen is None else self.chosen

    @property
    def keys(self):
        return tuple((place, self.window) for place in self.places)

    @property
    def states(self):
        return tuple(self.state for _ in self.places)

    def only(self, places):
        return replace(self, chosen=tuple(places))

    def evaluate(self):
        self.evaluation.predictions += len(self.places)
        return [self.predicts[place](self.x, self.sigma) for place in self.places]


@dataclass
class Guided:
    """A run of Euler's method: D = sum of weights * predictions, and what each evaluation took.

    Attributes:
        differs: by what the positive is above each other condition at a noise level.
        weights: of all conditions, the positive's first.
    """

    differs: list
    weights: tuple = (5.0, -4.0)
    knows_weights: bool = True
    steps: int = 20
    top: float = 10.0
    needing_negative: tuple = ()
    state: Callable = lambda sigma: 0
    budget: float | None = None
    adapts_steps: bool = False
    batch: int = 1
    twice: bool = False
    refused: tuple = ()
    broken: float = 0.0

    def __post_init__(self):
        self.sigmas = (*(self.top * 0.8**i for i in range(self.steps)), 0.0)

    def run(self, config):
        model = Model("any", None, None, 0, 0)
        run = config.begin(Run(model, Steps(self.sigmas), lambda p: self.top * (1 - p), adapts_steps=self.adapts_steps))
        positive = lambda x, sigma: x * (1 / (1 + sigma**2)) + torch.ones_like(x) * 2  # noqa: E731
        predicts = [positive, *((lambda x, s, f=f: positive(x, s) - f(s) * torch.ones_like(x)) for f in self.differs)]
        x, self.taken, self.errors = torch.full((self.batch, 4), self.top), [], []
        for step, sigma in enumerate(self.sigmas[:-1]):
            for _ in range(1 + self.twice):
                if step in self.refused:
                    # An attempt that a method does not accept.
                    attempt = Evaluation(step, sigma, budget=self.budget)
                    off = [lambda x, s, f=f: f(x, s) + self.broken for f in predicts]
                    run.predict_noise(attempt, Planted(self, run, attempt, off, x, sigma))
                is_again = step in self.refused
                evaluation = Evaluation(step, sigma, budget=self.budget, is_again=is_again)
                denoised = run.predict_noise(evaluation, Planted(self, run, evaluation, predicts, x, sigma))
                self.taken.append(evaluation.predictions)
                self.errors.append(evaluation.error)
            x = x + (x - denoised) / sigma * (self.sigmas[step + 1] - sigma)
        self.said = run.verdict()
        return x


@dataclass
class Planted:
    of: Guided
    run: object
    evaluation: Evaluation
    predicts: list
    x: torch.Tensor
    sigma: float
    is_guided: bool = True
    left_out: tuple = ()

    @property
    def needing_negative(self):
        return self.of.needing_negative

    @property
    def conditions(self):
        return len(self.predicts)

    def guided(self):
        weights = self.of.weights if self.of.knows_weights else None
        call = Call(
            self.evaluation, self.predicts, self.x, self.sigma, weights,
            tuple(place == 0 for place in range(len(self.predicts))), self.of.state(self.sigma),
        )  # fmt: skip
        takes_part = type(self.run).conditions is not MethodRun.conditions
        found = self.run.conditions(self.evaluation, call) if takes_part else call.evaluate()
        return sum(weight * one for weight, one in zip(self.of.weights, found, strict=True))

    def positive_alone(self):
        self.evaluation.predictions += 1
        return self.predicts[0](self.x, self.sigma)


SMOOTH = {
    # The derivatives' difference that each way has exactly right.
    "held": lambda sigma: 0.05 * sigma,
    "linear": lambda sigma: 0.05 * sigma * (1 - 0.05 * sigma),
}


@pytest.mark.parametrize("every", [2, 3, 4, 5])
@pytest.mark.parametrize("way", SMOOTH)
@pytest.mark.parametrize("knows_weights", [True, False])
def test_a_difference_that_goes_on_as_foretold_is_reused_without_error(way, every, knows_weights):
    given = Guided([SMOOTH[way]], knows_weights=knows_weights)
    exact = given.run(CFGCutoff(1.0, start=0.01))
    assert set(given.taken) == {2}
    found = given.run(CFGCutoff(1.0, reuse_every=every))
    # Of the first two scores, one is of a history too short for a slope.
    assert torch.allclose(found, exact, rtol=1e-5 if way == "held" else 1e-3)
    assert given.taken[:3] == [2] * 3
    full = [step for step, taken in enumerate(given.taken) if taken == 2]
    # Each third and so on, from the last of the first ones.
    assert full[2:] == list(range(2, 20, every))
    state, text = given.said
    reused = given.taken.count(1)
    assert state == "active"
    assert text.startswith(
        f"{reused} of 20 evaluations reused the guidance of those before, "
        f"{sum(given.taken)} of 40 predictions evaluated; reused by "
    )
    assert f"{way} " in text


def test_all_conditions_of_a_guider_are_reused_from_their_own():
    given = Guided([lambda s: 0.05 * s, lambda s: -0.1 * s], weights=(6.0, -4.0, -1.0))
    exact = given.run(CFGCutoff(1.0, start=0.01))
    assert torch.allclose(given.run(CFGCutoff(1.0, reuse_every=3)), exact, rtol=1e-4)
    assert set(given.taken) == {1, 3}
    assert f"{sum(given.taken)} of 60 predictions evaluated" in given.said[1]


@pytest.mark.parametrize("budget", [None, 0.02])
def test_what_would_miss_too_much_is_made_in_full(budget):
    rough = lambda sigma: math.sin(9 * math.log(sigma))  # noqa: E731
    given = Guided([rough], budget=budget)
    given.run(CFGCutoff(1.0, reuse_every=5))
    assert given.taken.count(2) > 12
    assert "more were made in full, as reuse would have missed by too much" in given.said[1]
    limit, row = MOST if budget is None else budget, 0.0
    for taken, error in zip(given.taken, given.errors, strict=True):
        row = row + error if taken == 1 else 0.0
        # Forecast counts the row itself.
        assert (row if budget is None else error) <= limit


def test_errors_of_reuse_are_taken_back():
    """What is foretold wrongly between two full evaluations is known from both by then."""
    bent = lambda sigma: 0.03 * sigma + 0.2 * math.exp(-sigma / 3)  # noqa: E731
    given, config = Guided([bent]), CFGCutoff(1.0, reuse_every=3)
    exact = given.run(CFGCutoff(1.0, start=0.01))
    with_errors_taken_back = (given.run(config) - exact).norm()
    assert given.taken.count(1) > 8
    kept, Difference.missed = Difference.missed, lambda *_: None
    try:
        without = (given.run(config) - exact).norm()
    finally:
        Difference.missed = kept
    assert with_errors_taken_back < 0.5 * without


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("NAGuidance needs the negative", {"needing_negative": ("NAGuidance",)}),
        ("this sampler chooses its own steps", {"adapts_steps": True}),
        ("the first 3 guided evaluations are made in full in any case", {"steps": 3}),
    ],
)
def test_where_nothing_can_be_reused_all_is_as_it_was_and_the_verdict_says_why(reason, given):
    plain, reusing = (Guided([SMOOTH["held"]], **given) for _ in range(2))
    assert torch.equal(plain.run(CFGCutoff(1.0, start=0.01)), reusing.run(CFGCutoff(1.0, reuse_every=2)))
    assert reusing.said[0] == "inert"
    assert reason in reusing.said[1]


def test_another_state_of_a_prompt_is_another_difference():
    given = Guided([lambda s: 0.05 * s if s > 1 else 3.0], state=lambda sigma: sigma > 1)
    given.run(CFGCutoff(1.0, reuse_every=5))
    changed = next(step for step, sigma in enumerate(given.sigmas) if sigma <= 1)
    assert given.taken[changed] == 2


def test_of_a_batch_the_worst_decides():
    one, two = Measured((-4.0,), torch.ones(2, 4), [torch.tensor([[0.0], [0.1]]).expand(2, 4)], []), None
    two = one.of(torch.zeros(2, 4))
    assert two.tolist() == pytest.approx([0.4 / 1.4])


@pytest.mark.parametrize("knows_weights", [True, False])
def test_guidance_ends_where_it_adds_less_than_asked_for(knows_weights):
    """Its share falls with the noise level: D is about 2, the difference 0.05 * sigma, four times that is added."""
    given = Guided([SMOOTH["held"]], knows_weights=knows_weights)
    given.run(CFGCutoff(0.9, adaptive=0.05))
    ends = given.taken.index(1)
    assert given.taken == [2] * ends + [1] * (20 - ends)
    assert 5 < ends < 18
    state, text = given.said
    assert state == "active"
    assert text.startswith(
        f"no guidance from step {ends} of 20: {20 - ends} of 20 evaluations ran on the positive alone"
    )
    assert "; it ended where it still added 0.0" in text
    assert text.endswith("(adaptive 0.05)")
    earlier = Guided([SMOOTH["held"]])
    earlier.run(CFGCutoff(0.9, adaptive=0.2))
    assert earlier.taken.index(1) < ends


def test_the_cutoff_is_the_latest_end():
    given = Guided([SMOOTH["held"]])
    given.run(CFGCutoff(0.5, adaptive=0.001))
    assert given.taken == [2] * 10 + [1] * 10
    assert "which is not under adaptive (0.001)" in given.said[1]


def test_a_noise_level_that_goes_up_begins_anew():
    config = CFGCutoff(1.0, reuse_every=2, adaptive=0.05)
    given = Guided([SMOOTH["held"]])
    given.sigmas = (*given.sigmas[:14], *given.sigmas)
    given.run(config)
    assert given.taken[14:17] == [2] * 3


def test_two_evaluations_at_one_noise_level():
    given = Guided([SMOOTH["held"]], twice=True)
    exact = given.run(CFGCutoff(1.0, start=0.01))
    assert torch.allclose(given.run(CFGCutoff(1.0, reuse_every=2)), exact, rtol=1e-4)
    assert given.taken.count(1) > 12


def test_new_settings():
    assert CFGCutoff(1.0, start=0.1).off() is None
    assert CFGCutoff(1.0, reuse_every=2).off() is None
    assert CFGCutoff(1.0, adaptive=0.1).off() is None
    assert CFGCutoff(0.0).off() is None
    for values, told in (
        ({"cutoff": 0.5, "start": 0.5}, "start must lie before cutoff, but 0.5 does not lie before 0.5"),
        ({"cutoff": 0.0, "start": 0.1}, "start must lie before cutoff"),
        ({"start": -0.1}, "start must be from 0.0 to 1.0"),
        ({"reuse_every": 6}, "reuse_every must be from 1 to 5"),
        ({"reuse_every": 0}, "reuse_every must be from 1 to 5"),
        ({"adaptive": 1.5}, "adaptive must be from 0.0 to 1.0"),
    ):
        with pytest.raises(ValueError, match=f"CFG Cutoff: {told}"):
            CFGCutoff(**values)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("refused", [*((step,) for step in range(1, 12)), tuple(range(20))], ids=str)
def test_of_an_attempt_that_was_not_accepted_nothing_is_kept(refused, broken):
    given = Guided([SMOOTH["linear"]], refused=refused, broken=broken)
    exact = Guided([SMOOTH["linear"]]).run(CFGCutoff(1.0, start=0.01))
    assert torch.allclose(given.run(CFGCutoff(1.0, reuse_every=3)), exact, rtol=1e-3)
    # What is made again is made in full.
    assert all(given.taken[step] == 2 for step in refused)
    reused = given.taken.count(1)
    state, text = given.said
    assert state == ("active" if reused else "inert")
    assert not reused or text.startswith(f"{reused} of 20 evaluations reused the guidance")
    assert "nan" not in text


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_lifts_no_budget(broken):
    rough = lambda sigma: math.sin(9 * math.log(sigma))  # noqa: E731
    given = Guided([rough], refused=(1, 2, 3), broken=broken, budget=1e-9)
    given.run(CFGCutoff(1.0, reuse_every=4))
    assert given.taken == [2] * 20


@pytest.mark.parametrize("way", SMOOTH)
def test_what_was_missed_is_not_made_much_of_in_a_small_step(way):
    one = Difference(0, history=[(4.0, torch.ones(3))], foretold=[(3.9, torch.zeros(3), 0.5)])
    difference = torch.tensor(SMOOTH[way](3.8)).expand(3)
    assert one.missed(3.8, difference, most=0.5) is not None
    assert one.missed(3.8, difference, most=0.4) is None


@pytest.mark.parametrize("start", [0.1, 0.5])
def test_where_no_guidance_was_is_told_of_what_forecast_skipped_too(start):
    given = Guided([SMOOTH["held"]])
    run = CFGCutoff(1.0, start=start).begin(Run(Model("any", None, None, 0, 0), Steps(given.sigmas), lambda p: 1 - p))
    begins = int(start * 20)
    for step, sigma in enumerate(given.sigmas[:-1]):
        evaluation = Evaluation(step, sigma)
        planted = Planted(given, run, evaluation, [lambda x, s: x, lambda x, s: x], torch.ones(1, 4), sigma)
        if (step and step % 2 == 0) or step == begins - 1 > 0:
            evaluation.is_forecast = True
            planted.positive_alone = planted.guided = lambda: torch.ones(1, 4)
        run.predict_noise(evaluation, planted)
    assert run.verdict()[1].startswith(f"no guidance before step {begins} of 20: ")
