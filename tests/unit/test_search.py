"""The search for a plan, on machines that are simulated: what it finds, with how many runs, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
from slipstream_pack.nodes.measuring.search import CHECKS, Candidate, Dial, Level, Search, exhaustive
from slipstream_pack.nodes.measuring.trials import EXACT, Interleaved, Log, LostError, Spread, Task, Trial, from_data

FLOOR = 0.95
PROMPTS, SEEDS = 2, 3
LADDERS = {
    # Each level's share of the time, and its error on a usual picture.
    "attention": [(0.96, 0.0)],
    "cutoff": [(0.93, 0.002), (0.87, 0.008), (0.8, 0.03)],
    "forecast": [(0.72, 0.001), (0.6, 0.004), (0.5, 0.015)],
    "deepcache": [(0.7, 0.02)],
}
EXCLUDING = {"forecast", "deepcache"}


def dial(name, is_exact=False):
    levels = tuple(Level(name, rank, f"{name} {rank}", f"{name} {rank}") for rank in range(len(LADDERS[name])))
    return Dial(name, levels, is_exact, frozenset(EXCLUDING - {name} if name in EXCLUDING else ()))


DIALS = [dial("attention", is_exact=True), dial("cutoff"), dial("forecast"), dial("deepcache")]
PICTURES = [f"prompt {prompt}, seed {seed}" for seed in range(SEEDS) for prompt in range(PROMPTS)]


def fresh(number):
    return [f"prompt {prompt}, fresh seed {number}" for prompt in range(PROMPTS)]


class StoppedError(Exception):
    """An interrupt."""


class Machine:
    """A machine and a model: times with noise, that drift; errors that nearly add, larger on some pictures.

    Args:
        seed: of the noise and of what is particular to it.
        pace: how much slower it is after so many runs.
        spoiled: what a run gives in place of a picture, by level and picture.
        stops_after: runs after which it is interrupted.
    """

    def __init__(self, seed=0, noise=0.01, pace=lambda runs: 1.0, spoiled=None, stops_after=math.inf, exact_s=1.0):
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.noise = noise
        self.pace = pace
        self.spoiled = spoiled or (lambda plan, picture: None)
        self.stops_after = stops_after
        self.exact_s = exact_s
        self.now = 0.0
        self.ran = []
        self.references = set()
        self.session = f"session {seed}"

    def own(self, *names):
        """A random number that belongs to some names, whatever ran before."""
        return float(np.random.default_rng([self.seed, *(hash_of(name) for name in names)]).standard_normal())

    def ratio(self, one):
        if one.steps:
            return one.steps / 20
        share = math.prod(LADDERS[level.dial][level.rank][0] for level in one.levels)
        return share * math.exp(0.02 * self.own("time", one.key) * (len(one.levels) > 1))

    def error(self, one, picture):
        error = 0.03 if one.steps else math.fsum(LADDERS[level.dial][level.rank][1] for level in one.levels)
        # Exact methods make no difference to it.
        lossy = [level.key for level in one.levels if LADDERS[level.dial][0][1]]
        odd = 0.1 * self.own(*lossy) + 0.1 * self.own(*lossy, picture)
        return min(1.0, error * math.exp(0.4 * self.own(picture) + odd))

    def run(self, task):
        if len(self.ran) >= self.stops_after:
            raise StoppedError
        one = task.of or Candidate()
        self.ran.append((task.plan, task.picture))
        seconds = (
            self.exact_s
            * self.ratio(one)
            * self.pace(len(self.ran))
            * math.exp(self.noise * self.rng.standard_normal())
        )
        self.now += seconds
        common = {"plan": task.plan, "picture": task.picture, "session": self.session, "at": self.now - seconds / 2}
        spoiled = self.spoiled(one, task.picture)
        if isinstance(spoiled, str):
            return Trial(**common, problem=spoiled, is_error=spoiled != "NaN")
        if task.plan == EXACT:
            self.references.add(task.picture)
            return Trial(**common, seconds=seconds)
        return Trial(**common, seconds=seconds, similarity=1 - (spoiled or self.error(one, task.picture)))

    def search(self, log=None, floor=FLOOR, dials=DIALS, pictures=PICTURES, minutes=math.inf, may_run=True):
        log = Log() if log is None else log
        self.references |= {trial.picture for trial in log.of(EXACT)}
        measure = Interleaved(self.run, log, self.references.__contains__)
        return Search(dials, pictures, fresh, log, measure, floor, 20, lambda: minutes * 60 - self.now, may_run)

    def best(self, floor=FLOOR, dials=DIALS):
        """What trying everything gives, without noise."""
        quiet = Machine(self.seed, noise=0, spoiled=self.spoiled)
        return exhaustive(quiet.search(floor=floor, dials=dials))


def hash_of(name):
    return sum(place * ord(letter) for place, letter in enumerate(name, 1))


def plans(dials=DIALS):
    """How many there are on the ladder."""
    return len(Machine().search(dials=dials).every())


@pytest.mark.parametrize("floor", [0.9, 0.95, 0.99])
def test_it_finds_what_trying_everything_finds_with_a_fifth_of_the_trials(floor):
    assert 30 < plans() <= 40
    machines = [Machine(seed) for seed in range(8)]
    misses = []
    for machine in machines:
        found, best = machine.search(floor=floor).run(), machine.best(floor)
        assert found.is_complete
        assert (found.best is None) == (not found.checks or not found.checks[-1].holds)
        # Exact runs, the check and the rival are among them.
        assert len(machine.ran) <= 1.1 * plans() * len(PICTURES) / 5
        # What fails on a fresh seed is rightly not taken, though it held on all others.
        if best not in [check.plan for check in found.checks[:-1]]:
            misses.append(machine.ratio(found.best) / machine.ratio(best))
    assert sum(len(machine.ran) for machine in machines) / len(machines) <= plans() * len(PICTURES) / 5
    assert len(misses) >= 6
    assert sum(miss <= 1.05 for miss in misses) >= len(misses) - 1


@pytest.mark.parametrize("floor", [0.95, 0.99])
def test_the_floor_holds_on_pictures_that_nobody_saw(floor):
    below = 0
    for seed in range(8):
        machine = Machine(seed)
        best = machine.search(floor=floor).run().best
        below += sum(machine.error(best, f"unseen {number}") > 1 - floor for number in range(32))
    assert below <= 0.05 * 8 * 32


def test_a_slower_method_is_left_out(monkeypatch):
    monkeypatch.setitem(LADDERS, "attention", [(1.2, 0.0)])
    monkeypatch.setitem(LADDERS, "cutoff", [(1.1, 0.0001), (1.05, 0.0002), (1.3, 0.0003)])
    machine = Machine()
    search = machine.search()
    found = search.run()
    assert {level.dial for level in found.best.levels} <= EXCLUDING
    slow = Candidate((DIALS[0].levels[0],))
    assert search.state(slow) == "slower"
    assert sum(plan == slow.key for plan, _ in machine.ran) == 1


@pytest.mark.parametrize("prompt", range(PROMPTS))
def test_what_breaks_pictures_of_one_prompt_only_is_found_out(prompt):
    """Also of a prompt that comes second."""

    def spoiled(one, picture):
        return 0.3 if "forecast" in one.key and picture.startswith(f"prompt {prompt}") else None

    machine = Machine(spoiled=spoiled)
    search = machine.search()
    found = search.run()
    assert found.best == machine.best()
    assert "forecast" not in found.best.key
    assert search.state(Candidate((DIALS[0].levels[0], DIALS[2].levels[0]))) == "below the floor"


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_a_machine_that_slows_down_in_the_middle_changes_nothing(at):
    slowed = Machine(noise=0.0, pace=lambda runs: 1.0 if runs < at else 2.0)
    assert slowed.search().run().best == Machine(noise=0.0).search().run().best


@pytest.mark.parametrize("at", range(2, 20, 3))
def test_what_has_no_time_to_trust_from_other_prompts_is_not_run_at_their_pictures(at):
    """A search that was stopped while the machine slowed down; then one with prompts of its own."""
    log = Log()
    with pytest.raises(StoppedError):
        Machine(noise=0.0, pace=lambda runs: 1.0 if runs < at else 2.0, stops_after=at + 2).search(log).run()
    others = [f"other {picture}" for picture in PICTURES]
    machine = Machine(noise=0.0)
    machine.session = "another session"
    assert machine.search(log, pictures=others).run().best is not None
    assert {picture for _, picture in machine.ran}.isdisjoint(PICTURES)


def test_a_machine_that_gets_slower_all_the_time_changes_nothing():
    slowed = Machine(noise=0.0, pace=lambda runs: 1.02**runs)
    found = slowed.search().run()
    assert found.best == Machine(noise=0.0).search().run().best
    assert found.checks[-1].speed.value == pytest.approx(1 / slowed.ratio(found.best), rel=0.02)


@pytest.mark.parametrize("problem", ["NaN", "out of memory", "the compiler failed"])
@pytest.mark.parametrize("level", ["attention 0", "cutoff 1", "forecast 0", "deepcache 0"])
def test_a_failure_is_a_result(problem, level):
    """What fails is left out with all that has it, and tried once."""

    def spoiled(one, picture):
        return problem if level in one.key else None

    machine = Machine(noise=0.0, spoiled=spoiled)
    search = machine.search()
    found = search.run()
    assert found.best == machine.best()
    assert level not in found.best.key
    failed = [one for one in search.tried() if level in one.key]
    assert failed
    assert all(search.state(one) == "failed" and search.log.problem(one.key) == problem for one in failed)
    assert sum(level in plan for plan, _ in machine.ran) == len(failed)


def again(log, number, spoiled=None, **options):
    """A search of a later session with what is kept of a log."""
    machine = Machine(noise=0.0, spoiled=spoiled)
    machine.session = f"session {number}, later"
    kept = Log(from_data(json.loads(json.dumps(log.as_data()))))
    search = machine.search(kept, **options)
    return search, search.run(), machine


@pytest.mark.parametrize("level", ["attention 0", "cutoff 1", "forecast 0", "deepcache 0"])
def test_an_error_that_passed_is_tried_once_more_in_a_later_session(level):
    log = Log()
    Machine(noise=0.0, spoiled=lambda one, picture: "out of memory" if level in one.key else None).search(log).run()
    search, found, _ = again(log, 1)
    assert found.best == Machine(noise=0.0).search().run().best
    assert not any(search.log.problem(one.key) for one in search.tried())
    # Nothing that was measured is measured twice.
    measured = Counter((trial.plan, trial.picture) for trial in search.log.trials if trial.seconds and trial.plan)
    assert set(measured.values()) == {1}
    _, last, idle = again(search.log, 2)
    assert (last.best, idle.ran) == (found.best, [])


def test_an_error_that_comes_again_stays_and_is_told_to_be_of_an_earlier_run():
    def spoiled(one, picture):
        return "out of memory" if "forecast 0" in one.key else None

    log = Log()
    first = Machine(noise=0.0, spoiled=spoiled).search(log).run()
    failed = [plan for plan in {trial.plan for trial in log.trials} if log.problem(plan)]
    assert [log.problem(plan) for plan in failed] == ["out of memory"]
    search, found, machine = again(log, 1, spoiled)
    assert [run for run in machine.ran if run[0] != EXACT] == [(failed[0], PICTURES[0])]
    assert search.log.problem(failed[0]) == "out of memory"
    search, last, idle = again(search.log, 2)
    assert (first.best, found.best, last.best, idle.ran) == (*[first.best] * 3, [])
    assert search.log.problem(failed[0]) == "out of memory (in an earlier run)"


def test_pictures_that_are_not_finite_are_a_result_for_good():
    def spoiled(one, picture):
        return "NaN" if "forecast 0" in one.key else None

    log = Log()
    first = Machine(noise=0.0, spoiled=spoiled).search(log).run()
    search, found, machine = again(log, 1)
    assert (found.best, machine.ran) == (first.best, [])
    failed = [problem for one in search.tried() if (problem := search.log.problem(one.key))]
    assert set(failed) == {"NaN (in an earlier run)"}


def test_a_combination_alone_may_fail():
    def spoiled(one, picture):
        return "NaN" if {"cutoff 1", "forecast 1"} <= {level.key for level in one.levels} else None

    machine = Machine(spoiled=spoiled, noise=0.0)
    found = machine.search().run()
    assert machine.ratio(found.best) <= 1.05 * machine.ratio(machine.best())
    assert not {"cutoff 1", "forecast 1"} <= {level.key for level in found.best.levels}


def interrupted(after):
    """What is kept of a search that is interrupted, and what ran."""
    kept = []
    machine = Machine(noise=0.0, stops_after=after)
    log = Log(changed=lambda: kept.append(log.as_data()))
    with pytest.raises(StoppedError):
        machine.search(log).run()
    return kept[-1] if kept else [], machine


@pytest.mark.parametrize("after", [0, 1, 2, 7, 12, 20, 28, 33])
def test_after_an_interrupt_it_goes_on_and_measures_nothing_twice(after):
    whole = Machine(noise=0.0)
    expected = whole.search().run()
    data, first = interrupted(after)
    second = Machine(noise=0.0)
    second.session = "another session"
    found = second.search(Log(from_data(data))).run()
    assert found.best == expected.best
    assert [check.plan for check in found.checks] == [check.plan for check in expected.checks]
    ran = Counter(run for machine in (first, second) for run in machine.ran if run[0] != EXACT)
    assert set(ran.values()) == {1}
    assert len(ran) <= 1.1 * sum(plan != EXACT for plan, _ in whole.ran)


@pytest.mark.parametrize("after", range(0, 36, 3))
def test_what_ends_a_search_leaves_the_best_plan_so_far(after):
    """As time does that is up."""
    machine = Machine(noise=0.0, stops_after=after)
    search = machine.search()
    with pytest.raises(StoppedError):
        search.run()
    found = search.found
    assert not found.is_complete
    assert (found.best is not None) == (after >= 18)
    if found.best is not None:
        assert search.worst(found.best) >= FLOOR
        assert search.ratio(found.best) < 1
        assert not found.checks or found.checks[-1].plan == found.best


def test_a_search_that_is_over_answers_from_its_log():
    whole = Machine()
    log = Log()
    expected = whole.search(log).run()
    again = Machine(7)
    assert again.search(Log(from_data(log.as_data()))).run() == expected
    assert again.ran == []


def test_a_floor_that_is_changed_uses_what_was_measured():
    log, machine = Log(), Machine(noise=0.0)
    machine.search(log).run()
    before = len(machine.ran)
    found = machine.search(log, floor=0.98).run()
    assert found.best == Machine(noise=0.0).search(floor=0.98).run().best
    ran = Counter(run for run in machine.ran if run[0] != EXACT)
    assert set(ran.values()) == {1}
    assert len(machine.ran) - before < before


@pytest.mark.parametrize("seed", range(3))
def test_plans_that_a_stricter_floor_rules_out_do_not_use_up_its_checks(seed):
    """One floor after the other on one log: what passed a check on a lower one was never up for a higher one."""
    log, machine = Log(), Machine(seed, noise=0.0)
    for floor in (0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99):
        found = machine.search(log, floor=floor).run()
        assert [(check.plan, check.holds) for check in found.checks] == [(found.best, True)]


@pytest.mark.parametrize("may_run", [True, False])
@pytest.mark.parametrize("count", [1, 2, CHECKS])
def test_what_failed_on_a_fresh_seed_is_found_in_the_log_again(count, may_run):
    """Also where nothing may run: the search goes on to the next best."""
    failing = set()

    def spoiled(one, picture):
        if "fresh" in picture and one.levels and (one in failing or len(failing) < count):
            failing.add(one)
            return 0.2
        return None

    log = Log()
    expected = Machine(spoiled=spoiled).search(log).run()
    assert [check.holds for check in expected.checks] == [False] * count + [True] * (count < CHECKS)
    again = Machine()
    assert again.search(Log(from_data(log.as_data())), may_run=may_run).run() == expected
    assert again.ran == []


def test_where_nothing_may_run_a_plan_that_was_not_checked_is_not_the_best():
    data, _ = interrupted(25)
    again = Machine()
    found = again.search(Log(from_data(data)), may_run=False).run()
    assert (found.best, found.checks, found.is_complete) == (None, [], False)
    assert again.ran == []


@pytest.mark.parametrize("seconds", [0, 5, 10, 15, 40])
def test_it_keeps_to_its_minutes_and_still_checks_what_it_found(seconds):
    machine = Machine()
    found = machine.search(minutes=seconds / 60).run()
    assert machine.now <= max(seconds, 2) + 2
    assert found.is_complete == (seconds == 40)
    assert found.best is None or found.checks[-1].holds
    if found.best is not None and not found.is_complete:
        # With more time it goes on from there.
        again = machine.search(Log(machine.search().log.trials)).run()
        assert again.best is not None


def test_time_that_is_up_does_not_lose_a_plan_that_holds():
    bests = [Machine(noise=0.0).search(minutes=seconds / 60).run().best for seconds in range(0, 40, 3)]
    ratios = [1.0 if best is None else Machine(noise=0.0).ratio(best) for best in bests]
    assert bests[0] is None
    assert ratios[-1] < 0.5
    assert all(later <= earlier * 1.05 for earlier, later in itertools.pairwise(ratios))


def test_what_fails_on_a_fresh_seed_gives_way_to_the_next():
    failing = Machine(noise=0.0).search().run().best

    def spoiled(one, picture):
        return 0.2 if one == failing and "fresh" in picture else None

    found = Machine(noise=0.0, spoiled=spoiled).search().run()
    first, second = found.checks
    assert (first.plan, first.holds, first.worst) == (failing, False, pytest.approx(0.8))
    assert (second.plan, second.holds) == (found.best, True)
    assert set(first.pictures).isdisjoint(second.pictures)


def test_after_three_failures_the_model_stays_as_it_is():
    found = Machine(spoiled=lambda one, picture: 0.2 if "fresh" in picture else None).search().run()
    assert found.best is None
    assert len(found.checks) == CHECKS
    assert len({check.plan for check in found.checks}) == CHECKS
    assert not any(check.holds for check in found.checks)


@pytest.mark.parametrize("floor", [0.99999])
def test_where_nothing_holds_only_what_is_exact_is_left(floor):
    found = Machine(noise=0.0).search(floor=floor).run()
    assert found.best == Candidate((DIALS[0].levels[0],))


@pytest.mark.parametrize("dials", [[], DIALS[1:3]])
def test_where_nothing_is_faster_above_the_floor_there_is_no_plan(dials):
    found = Machine().search(floor=0.99999, dials=dials).run()
    assert found.best is None
    assert found.rival is None
    assert found.checks == []
    assert found.is_complete


def test_what_is_not_measurably_faster_is_not_taken():
    """On a machine whose times differ by more than what there is to gain."""
    machine = Machine(noise=0.5)
    search = machine.search(dials=DIALS[:1])
    found = search.run()
    assert found.best is None
    assert all(check.speed.low <= 1 and not check.holds for check in found.checks)


def test_fewer_steps_are_tried_against_the_plan_at_its_speed():
    machine = Machine(noise=0.0)
    search = machine.search()
    found = search.run()
    assert found.rival.steps == round(20 * machine.ratio(found.best))
    assert search.worst(found.rival) is not None
    # Once they are seen to be worse, no more of them runs.
    worse = Machine(noise=0.0, spoiled=lambda one, picture: 0.3 if one.steps else None)
    rival = worse.search().run().rival
    assert sum(plan == rival.key for plan, _ in worse.ran) == 1


def test_one_picture_alone_says_nothing_of_spread_and_is_checked_all_the_same():
    machine = Machine(noise=0.0)
    search = machine.search(pictures=PICTURES[:1])
    found = search.run()
    assert search.next_similarity(found.best) is None
    assert found.checks[-1].holds


def test_times_of_two_sessions_are_each_held_against_their_own():
    log = Log(
        [
            Trial(EXACT, "a", "one", 1.0, 10.0),
            Trial("plan", "a", "one", 2.0, 5.0, 0.99),
            Trial(EXACT, "a", "other", 1.0, 1.0),
            Trial("plan", "b", "other", 2.0, 0.5, 0.98),
        ]
    )
    assert log.ratio("plan") == pytest.approx(0.5)
    assert log.similarities("plan") == {"a": 0.99, "b": 0.98}
    assert log.exact_s() == 1.0


def test_a_time_before_any_exact_run_says_nothing():
    log = Log([Trial("plan", "a", "one", 2.0, 5.0, 0.99)])
    assert log.ratio("plan") is None
    assert log.times("plan") == []


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"plan": "a", "picture": "b", "session": "c", "at": "d"},
        {"plan": 1, "picture": "b", "session": "c", "at": 1.0},
        {"plan": "a", "picture": "b", "session": "c", "at": 1.0, "seconds": 0},
        {"plan": "a", "picture": "b", "session": "c", "at": 1.0, "similarity": math.nan},
        {"plan": "a", "picture": "b", "session": "c", "at": 1.0, "unknown": 1},
        {"plan": "a", "picture": "b", "session": "c", "at": 1.0, "is_error": 1},
    ],
)
def test_what_is_no_trial_is_refused(entry):
    with pytest.raises((TypeError, ValueError)):
        from_data([entry])


def test_trials_are_kept_as_plain_data():
    log = Log()
    Machine(spoiled=lambda one, picture: "NaN" if "cutoff" in one.key else None).search(log).run()
    assert from_data(json.loads(json.dumps(log.as_data(), allow_nan=False))) == log.trials


def spread(log, machines, lost=lambda error: None):
    """A search on several machines at once, whose pictures are the same."""
    references = set()
    for machine in machines:
        machine.references = references
    devices = [Interleaved(machine.run, log, references.__contains__) for machine in machines]
    measure = Spread(devices, lost)
    return Search(DIALS, PICTURES, fresh, log, measure, FLOOR, 20, at_once=len(machines)), measure


class OneOfSeveral(Machine):
    """One whose runs take time, so that the others get some too; after the first one it waits, if it has what for."""

    awaited = None

    def run(self, task):
        time.sleep(0.002)
        if self.awaited is not None and self.ran:
            assert self.awaited.wait(5)
        return super().run(task)


def fleet(count):
    """Machines of one kind, one slower than the other: their pictures are the same, their times are not."""
    machines = [OneOfSeveral(noise=0.0, exact_s=1.0 + number) for number in range(count)]
    for number, machine in enumerate(machines):
        machine.session = f"session {number}"
    return machines


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_machines_find_what_one_does_and_measure_nothing_twice(count):
    log, machines = Log(), fleet(count)
    search, measure = spread(log, machines)
    found = search.run()
    assert found.best == Machine(noise=0.0).search().run().best
    assert found.checks[-1].holds
    assert len(measure.left) == count
    assert len(log.trials) == sum(len(machine.ran) for machine in machines)
    ran = Counter(run for machine in machines for run in machine.ran if run[0] != EXACT)
    assert set(ran.values()) == {1}
    for one in search.tried():
        assert log.ratio(one.key) == pytest.approx(machines[0].ratio(one))


class Lost(OneOfSeveral):
    """One that is gone after so many runs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gone = threading.Event()

    def run(self, task):
        try:
            return super().run(task)
        except StoppedError:
            self.gone.set()
            raise LostError("machine 1 is gone") from None


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_what_a_lost_machine_was_at_is_run_by_another(after):
    log, lost = Log(), []
    machines = [*fleet(1), Lost(noise=0.0, stops_after=after)]
    machines[1].session = "session 1"
    # So that the other one gets something to do.
    machines[0].awaited = machines[1].gone
    search, measure = spread(log, machines, lost.append)
    ones = search.every()[:6]
    measure([Task(one.key, PICTURES[0], one) for one in ones], PICTURES, True)
    assert [str(error) for error in lost] == ["machine 1 is gone"]
    assert len(measure.left) == 1
    assert len(machines[1].ran) == after
    ran = [trial.plan for trial in log.trials if trial.plan != EXACT]
    assert sorted(ran) == sorted(one.key for one in ones)
    assert len(log.trials) == sum(len(machine.ran) for machine in machines)
    # And the search goes on with the one that is left.
    assert search.run().best == Machine(noise=0.0).search().run().best


def test_where_no_machine_is_left_what_was_measured_is_kept():
    log = Log()
    search, _ = spread(log, [Lost(noise=0.0, stops_after=after) for after in (4, 7)])
    with pytest.raises(LostError, match="no machine is left"):
        search.run()
    assert len(log.trials) == 11


def test_another_error_ends_the_search_on_all_machines():
    search, _ = spread(Log(), [Machine(noise=0.0, stops_after=5), *fleet(1)])
    with pytest.raises(StoppedError):
        search.run()
