"""Steps: which step an evaluation belongs to."""

from __future__ import annotations

import math

import pytest
from slipstream_pack.nodes.methods.method import Model, Run, Steps, check_choice, check_number, check_range, check_unet

DESCENDING = Steps((14.6, 8.0, 4.0, 2.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("sigma", "step"),
    [
        (14.6, 0),
        (8.0, 1),
        (1.0, 4),
        # Between two sigmas: the step that it lies in.
        (10.0, 0),
        (1.5, 3),
        (0.3, 4),
        (0.0, 4),
        # Above the first: a sampler that adds noise.
        (20.0, 0),
        # Rounding on the way there and back.
        (8.0004, 1),
        (7.9996, 1),
    ],
)
def test_an_evaluation_belongs_to_the_step_at_or_above_it(sigma, step):
    assert DESCENDING.at(sigma) == step
    assert DESCENDING.at(sigma, current=3) == step


def test_where_sigmas_go_up_the_next_step_of_that_sigma_is_meant():
    flipped = Steps((0.0, 1.0, 2.0, 4.0))
    assert [flipped.at(sigma, current) for sigma, current in ((0.0, 0), (1.0, 0), (2.0, 1), (3.0, 2))] == [0, 1, 2, 2]
    restarting = Steps((8.0, 4.0, 2.0, 4.0, 2.0, 1.0, 0.0))
    current = 0
    visited = []
    for sigma in (8.0, 4.0, 2.0, 4.0, 2.0, 1.0):
        current = restarting.at(sigma, current)
        visited.append(current)
    assert visited == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("sigmas", [(), (1.0,)])
def test_a_run_without_steps(sigmas):
    assert len(Steps(sigmas)) == 0
    assert Steps(sigmas).at(1.0) == 0


FLOW = Steps((1.0, 0.9, 0.5, 0.1, 0.0), lambda sigma: 1 - sigma)


@pytest.mark.parametrize(("sigma", "following"), [(0.9, 0.5), (0.5, 0.1), (0.1, 0.0)])
def test_a_step_is_as_long_whatever_the_model_s_scale(sigma, following):
    """A flow model's latent is one of Stable Diffusion's, made smaller: noise in proportion to the picture tells."""
    scaled = [level / (1 - level) for level in (sigma, following)]
    assert FLOW.share(sigma, following) == pytest.approx(DESCENDING.share(*scaled))
    assert FLOW.gap(sigma, following) == pytest.approx(DESCENDING.gap(*scaled))


@pytest.mark.parametrize("steps", [DESCENDING, FLOW], ids=["noise is added", "flow"])
def test_steps_at_the_ends(steps):
    first = steps.sigmas[0]
    assert 0 < steps.share(first, steps.sigmas[1]) < 1
    assert steps.share(first, 0.0) == steps.share(0.0, 0.0) == steps.share(math.inf, first) == 1
    assert steps.share(steps.sigmas[1], first) == 0
    assert 0 < steps.gap(first, steps.sigmas[1]) < math.inf
    assert steps.gap(first, first) == 0
    assert steps.gap(math.inf, first) == steps.gap(first, 0.0) == math.inf


def test_a_range_holds_its_ends():
    run = Run(Model("any", None, None, 0, 0), DESCENDING, lambda percent: {0.0: 8.0, 1.0: 2.0}[percent])
    inside = run.sigma_range(0.0, 1.0)
    assert [inside(sigma) for sigma in DESCENDING.sigmas] == [False, True, True, True, False, False]


def test_errors_say_what_was_expected_what_came_and_what_to_do():
    with pytest.raises(ValueError, match=r"Node: n must be from 1 to 3, but is 4\. Set it"):
        check_number("Node", "n", 4, 1, 3)
    with pytest.raises(ValueError, match="nan"):
        check_number("Node", "n", float("nan"), 1, 3)
    with pytest.raises(ValueError, match=r"Node: c must be one of a, b, but is 'x'\. Choose"):
        check_choice("Node", "c", "x", ("a", "b"))
    with pytest.raises(ValueError, match=r"0\.5 is above 0\.2\. Swap"):
        check_range("Node", 0.5, 0.2)
    with pytest.raises(RuntimeError, match=r"Node: .*the model is Flux, which is none\. Use X"):
        check_unet("Node", Model("Flux", None, None, 0, 0), "Use X.")
    check_unet("Node", Model("SD15", "SD1", 320, 12, 25), "")


def test_a_step_is_as_long_as_the_samplers_whatever_the_model_is_told():
    """Nodes that tell the model less noise than there is, and solvers that evaluate within a step."""
    for step, sigma in enumerate(DESCENDING.sigmas[:-1]):
        for told in (sigma, 0.95 * sigma, 1.01 * DESCENDING.following(step)):
            assert DESCENDING.share_of(step, told) == DESCENDING.share(sigma, DESCENDING.following(step))
            assert DESCENDING.weight(step, told) == DESCENDING.weight(step, sigma)
    # More noise than there is can't be told from a step before.
    assert DESCENDING.share_of(1, 9.0) == DESCENDING.share(9.0, 4.0)
    assert DESCENDING.share_of(5, 0.1) == 1
