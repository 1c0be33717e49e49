"""What measured times say: against planted effects, equal runs, and hiccups."""

from __future__ import annotations

import numpy as np
import pytest
from slipstream_pack.nodes.measuring.statistics import LEAST_ERROR, Ratio, Summary, next_error, paired, speedup

STEPS = 20


def runs(rng, rounds, factor=1.0):
    """Step times as a busy machine has them: 3 % of noise a step, 1 % a run, one step in twenty up to twice as long."""
    noise = 1 + 0.03 * rng.standard_normal((rounds, STEPS)) + 0.01 * rng.standard_normal((rounds, 1))
    return factor * (noise + (rng.random((rounds, STEPS)) < 0.05) * rng.random((rounds, STEPS)))


@pytest.mark.parametrize("rounds", [3, 5, 10])
def test_equal_runs_rarely_show_a_difference_and_a_tenth_is_found(rounds):
    rng = np.random.default_rng(rounds)
    trials = 100
    false = sum(speedup(runs(rng, rounds), runs(rng, rounds)).is_difference for _ in range(trials))
    found = sum(speedup(runs(rng, rounds, 1.1), runs(rng, rounds)).is_difference for _ in range(trials))
    assert false <= 0.07 * trials
    # Of three rounds Student's t asks for much.
    assert found >= {3: 0.2, 5: 0.9, 10: 0.97}[rounds] * trials


def test_the_interval_holds_the_planted_ratio():
    rng = np.random.default_rng(0)
    ratios = [speedup(runs(rng, 5, 2.5), runs(rng, 5)) for _ in range(100)]
    assert sum(ratio.low <= 2.5 <= ratio.high for ratio in ratios) >= 93
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in ratios)


def test_a_hiccup_in_one_step_of_one_round_is_no_part_of_the_ratio():
    usual, hiccup = np.ones((5, STEPS)), np.ones((5, STEPS))
    hiccup[2, 7] = 50
    assert speedup(hiccup, usual).value == 1.0
    assert not speedup(hiccup, usual).is_difference


def test_parts_of_different_number_are_compared_by_their_sums():
    assert speedup([[1.0, 2.0, 3.0]] * 3, [[2.0]] * 3).value == pytest.approx(3.0)


def test_one_round_has_no_interval_and_claims_nothing():
    ratio = speedup([[4.0]], [[2.0]])
    assert ratio == Ratio(2.0)
    assert not ratio.is_difference


def test_it_is_the_same_interval_whenever_it_is_asked():
    rng = np.random.default_rng(1)
    baseline, variant = runs(rng, 5), runs(rng, 5)
    assert speedup(baseline, variant) == speedup(baseline, variant)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(2.5, 2.25, 2.75), "2.50x faster (2.25 to 2.75)"),
        (Ratio(0.5, 0.4, 0.625), "2.00x slower (1.60 to 2.50)"),
        (Ratio(1.02, 0.97, 1.07), "no measurable difference (0.97 to 1.07)"),
        (Ratio(1.5), "1.50x (one round: no interval)"),
    ],
)
def test_a_ratio_in_words(ratio, text):
    assert str(ratio) == text


def test_a_summary():
    assert Summary.of([3.0, 1.0, 2.0, 10.0]) == Summary(2.5, 1.0, 10.0)
    assert Summary.of([]) is None


@pytest.mark.parametrize("pictures", [2, 3, 6, 20])
def test_one_more_picture_is_within_what_was_foretold_of_it(pictures):
    """Of errors that differ by factors, in 95 of 100 cases."""
    rng = np.random.default_rng(pictures)
    trials = 1000
    errors = np.exp(-4 + 0.7 * rng.standard_normal((trials, pictures + 1)))
    within = sum(one[-1] <= next_error(list(one[:-1])) for one in errors)
    assert within == pytest.approx(0.95 * trials, abs=0.025 * trials)


def test_equal_errors_have_no_spread_and_one_alone_says_nothing_of_it():
    assert next_error([0.01, 0.01, 0.01]) == pytest.approx(0.01)
    assert next_error([0.0, 0.0]) == pytest.approx(LEAST_ERROR)
    assert next_error([0.01]) is None
    assert next_error([]) is None


def test_pairs_give_an_interval_that_holds_the_planted_ratio():
    rng = np.random.default_rng(0)
    ratios = [paired(list(np.log(1.5) + 0.05 * rng.standard_normal(6))) for _ in range(200)]
    assert sum(ratio.low <= 1.5 <= ratio.high for ratio in ratios) >= 180
    assert paired([np.log(2.0)]) == Ratio(pytest.approx(2.0))
