"""The search for the fastest plan above a floor, with as few runs as it takes.

What is known is used. Exact methods come first: they only have to be faster, and stand beneath everything else. Then
each approximate dial is tried by itself, from its gentlest level on, until one is too much. From these all
combinations are foretold: times multiply, errors add. Those that look fastest are tried first, several at once on one
picture, and fewer of them on each further one (successive halving: K. Jamieson, A. Talwalkar, "Non-stochastic Best
Arm Identification and Hyperparameter Optimization", AISTATS 2016); a picture that errors are large on comes early, for
the worst picture decides. What comes out is checked on seeds that the search never saw.

The search is a function of its log: with the trials of an earlier session in it, it comes to where that one was
without running anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median
from typing import Any, Literal, Protocol, TypeVar

from .statistics import LEAST_ERROR, Ratio, next_error, paired
from .trials import Log, Task

GAIN = 0.99
"""A plan counts as faster where it takes no more than this of the other's time."""

WIDTH = 2
"""How many plans are tried at once on their first picture, for each run that can be made at once; half as many on each
further one. Where one run is made at a time, more of them cost runs and find no better plan."""

HOPE = 0.97
"""By how much the time of a combination that was not tried yet may be under what is foretold of it."""

SLACK = 2.0
"""By how much a foretold error may be over what is allowed, for the plan to be tried all the same."""

CHECKS = 3
"""How many plans may be checked on fresh seeds, one after the other."""

Kept = TypeVar("Kept")
State = Literal["untried", "slower", "below the floor", "unlikely", "failed", "unfinished", "holds", "failed the check"]


@dataclass(frozen=True)
class Level:
    """One setting of a dial.

    Attributes:
        dial: the dial's name.
        rank: its place on the dial, from 0, the gentlest.
        key: what it is told by in a log that is kept.
        name: what it is for a reader.
    """

    dial: str
    rank: int
    key: str
    name: str


@dataclass(frozen=True)
class Dial:
    """Settings of one method, from the gentlest to the fastest.

    Attributes:
        is_exact: whether the picture stays the same.
        excludes: dials that it cannot go together with.
    """

    name: str
    levels: tuple[Level, ...]
    is_exact: bool = False
    excludes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """A plan to be tried: levels of different dials; or the model as it is, with fewer steps."""

    levels: tuple[Level, ...] = ()
    steps: int | None = None

    @cached_property
    def key(self) -> str:
        """What the log knows it by."""
        return f"{self.steps} steps" if self.steps else " + ".join(sorted(level.key for level in self.levels))

    @property
    def name(self) -> str:
        """What it is for a reader."""
        return f"{self.steps} steps" if self.steps else " + ".join(level.name for level in self.levels) or "as it is"

    def has(self, other: Candidate) -> bool:
        """Whether all of another one's levels are in it."""
        return set(other.levels) <= set(self.levels)

    def exceeds(self, other: Candidate) -> bool:
        """Whether all of another one's levels are in it, or stronger ones of the same dials."""
        own = {level.dial: level.rank for level in self.levels}
        return all(own.get(level.dial, -1) >= level.rank for level in other.levels)


class Measure(Protocol):
    """What runs tasks and puts their trials into the log, the exact model's pictures among them."""

    def __call__(self, tasks: list[Task], next_pictures: Sequence[str], is_closed: bool) -> None:
        """Run tasks.

        Args:
            next_pictures: which ones are likely to be asked for.
            is_closed: whether an exact run must stand after the last task.
        """


@dataclass(frozen=True)
class Check:
    """What a plan gave on pictures that the search never saw.

    Attributes:
        pictures: their keys.
        worst: the least similarity of them; None where one did not come to be.
        speed: with an interval from all of the plan's steady times, those of the search included.
        holds: whether the worst one is above the floor and the plan measurably faster than the model as it is.
        problem: why there is a picture missing.
    """

    plan: Candidate
    pictures: tuple[str, ...]
    worst: float | None
    speed: Ratio | None
    holds: bool
    problem: str = ""


@dataclass
class Found:
    """What a search came to.

    Attributes:
        best: the plan to use; None for the model as it is. Of a search that did not end by itself or for its time, the
            best one so far.
        checks: of the plans that looked best, in their order; the last one is the best one's, if there is a best one.
        rival: fewer steps, as fast as the best plan; None if there is no best plan, or no fewer steps.
        is_complete: whether the search ended by itself; else its time was up, and it can go on from there.
        problems: what a reader should know.
    """

    best: Candidate | None = None
    checks: list[Check] = field(default_factory=list)
    rival: Candidate | None = None
    is_complete: bool = False
    problems: list[str] = field(default_factory=list)


class _TimeIsUpError(Exception):
    """There is no time for more of the search."""


class Search:
    """One search.

    Args:
        dials: in the order in which their levels are named.
        pictures: keys of prompts and seeds: those of all prompts with the first seed, then with the second, and so on.
        fresh: gives the keys of other pictures for the first check, the second and so on, each of seeds of its own.
        log: with the trials of earlier sessions.
        measure: see `Measure`; it may raise whatever ends the search.
        floor: the least similarity that the worst picture may have, below 1.
        steps: of the sampler, which the rival has fewer of.
        left_s: seconds that are left; the search ends in time to check what it found.
        may_run: whether anything may run; else the search says what its log has to say.
        at_once: how many runs can be made at once.
    """

    def __init__(
        self,
        dials: Sequence[Dial],
        pictures: Sequence[str],
        fresh: Callable[[int], Sequence[str]],
        log: Log,
        measure: Measure,
        floor: float,
        steps: int = 0,
        left_s: Callable[[], float] = lambda: math.inf,
        may_run: bool = True,
        at_once: int = 1,
    ):
        self.dials = list(dials)
        self.pictures = list(pictures)
        self.log = log
        self.found = Found()
        self._fresh = fresh
        self._measure = measure
        self._most = 1 - floor
        self._steps = steps
        self.may_run = may_run
        self._at_once = at_once
        self._left_s = left_s
        self._is_over = False
        self._base = Candidate()
        self._refused: set[Candidate] = set()
        self._known: dict[str, Any] = {}
        self._first = self.pictures[0]
        # What can be run here: the log may have pictures of other prompts.
        self._own = {*self.pictures, *(picture for number in range(CHECKS) for picture in fresh(number))}
        self._order = {dial.name: place for place, dial in enumerate(self.dials)}

    def run(self) -> Found:
        """All of it. Where something ends it, the best plan so far is found, though it may not have been checked."""
        try:
            best = self._checked()
            self.found.best = best
            self.found.is_complete = not self._is_over
            if best is not None:
                self._rival(best)
        except BaseException:
            self.found.is_complete, self._is_over = False, True
            self._known.clear()
            self.found.best = self.found.best or self._best()
            raise
        return self.found

    def _checked(self) -> Candidate | None:
        """The best plan that holds on fresh seeds too."""
        while len(self.found.checks) < CHECKS:
            best = self._searched()
            try:
                if best is None or self._is_checked(best):
                    return best
            except _TimeIsUpError:
                self._is_over = True
                return None
            self._refuse(best)
            if self.may_run and self._left_s() <= 0:
                self._is_over = True
                return None
        return None

    def _refuse(self, one: Candidate) -> None:
        self._refused.add(one)
        self._known.clear()

    def _searched(self) -> Candidate | None:
        try:
            self._exact()
            self._alone()
            self._combined()
        except _TimeIsUpError:
            self._is_over = True
        return self._best()

    # What is tried

    def _exact(self) -> None:
        """Find what exact methods give together: the base of all others."""
        self._try([Candidate((level,)) for dial in self.dials if dial.is_exact for level in dial.levels])
        best: list[tuple[float, Candidate]] = []
        for dial in self.dials:
            levels = [Candidate((level,)) for level in dial.levels] if dial.is_exact else []
            useful = [(self.ratio(one), one) for one in levels if self._is_useful(one)]
            best += [min(useful, key=lambda pair: pair[0])] if useful else []
        self._base = Candidate()
        self._known.clear()
        for _, one in sorted(best, key=lambda pair: pair[0]):
            joined = self._joined(self._base, one)
            if joined is None:
                continue
            self._try([joined])
            if self._is_useful(joined, self._base):
                self._base = joined
        self._known.clear()

    def _alone(self) -> None:
        """Try each approximate dial by itself, from the gentlest level on until one is too much."""
        going = [dial for dial in self.dials if not dial.is_exact]
        for rank in itertools.count():
            going = [dial for dial in going if rank < len(dial.levels)]
            ones = [one for dial in going if (one := self._single(dial.levels[rank])) is not None]
            if not ones:
                return
            self._try(ones)
            going = [
                dial for dial in going if (one := self._single(dial.levels[rank])) is None or not self._is_too_much(one)
            ]

    def _try(self, ones: Sequence[Candidate]) -> None:
        self._ask([(one, self._first) for one in ones])

    def _combined(self) -> None:
        """Try what looks fastest, until nothing that may hold looks faster than what does."""
        while True:
            best = self._best()
            within = GAIN * (1.0 if best is None else self.ratio(best))
            pool = [one for one in self.candidates() if self._is_open(one) and self._hoped(one) < within]
            if not pool:
                return
            pool.sort(key=self._hoped)
            seen = len(self._seen(pool[0]))
            alike = [one for one in pool if len(self._seen(one)) == seen]
            some = alike[: self._at_once * max(1, WIDTH >> seen)]
            self._ask([(one, self._next_picture(one)) for one in some])

    def _ask(self, asked: Sequence[tuple[Candidate, str]], is_reserved: bool = False, is_closed: bool = False) -> None:
        """Have candidates run at pictures, where they have not; and once more, where the machine changed under all of
        their runs.

        Raises:
            _TimeIsUpError: there is not enough left of it. For what is reserved there always is.
        """
        tasks = [Task(one.key, picture, one) for one, picture in asked if not self.log.has(one.key, picture)]
        while tasks:
            if not self.may_run:
                raise _TimeIsUpError
            exact_s = self.log.exact_s()
            if not is_reserved and exact_s is not None:
                # The check of what was found: each picture with the exact model's, and one more.
                reserve = 2 * len(self._fresh(0)) + 1
                if self._left_s() < exact_s * (len(tasks) + 2 + reserve):
                    raise _TimeIsUpError
            self._measure(tasks, self.pictures, is_closed)
            self._known.clear()
            again = ((one, self._unsteady_at(one)) for one in self.tried())
            tasks = [Task(one.key, picture, one) for one, picture in again if picture is not None]

    def _unsteady_at(self, one: Candidate) -> str | None:
        """Where a candidate ran last, if no time of it here can be trusted and it is not known to be that way."""
        ran = [trial.picture for trial in self.log.of(one.key) if trial.picture in self._own]
        times = self.log.times(one.key, self._own)
        if not times or self.log.problem(one.key) or len(set(ran)) < len(ran):
            return None
        return None if any(time.is_steady for time in times) else ran[-1]

    # What is known

    def _once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What follows from the log, worked out once for each state of it."""
        if name not in self._known:
            self._known[name] = make()
        found: Kept = self._known[name]
        return found

    def candidates(self) -> list[Candidate]:
        """All combinations of what is of use, on the base."""
        return self._once("candidates", self._combinations)

    def _combinations(self) -> list[Candidate]:
        choices: list[list[Level | None]] = []
        for dial in self.dials:
            if not dial.is_exact:
                ones = ((level, self._single(level)) for level in dial.levels)
                useful = [level for level, one in ones if one is not None and self._is_useful(one, self._base)]
                choices.append([None, *useful])
        found = [self._base] if self._base.levels else []
        for chosen in itertools.product(*choices):
            levels = [level for level in chosen if level is not None]
            joined = self._joined(self._base, Candidate(tuple(levels))) if levels else None
            if joined is not None and joined not in found:
                found.append(joined)
        return found

    def every(self) -> list[Candidate]:
        """All combinations that the dials allow, of use or not."""
        choices = [[Candidate(), *(Candidate((level,)) for level in dial.levels)] for dial in self.dials]
        found: list[Candidate] = [Candidate()]
        for options in choices:
            found = [both for one in found for other in options if (both := self._joined(one, other)) is not None]
        return found[1:]

    def tried(self) -> list[Candidate]:
        """All that was tried, whatever became of it, in the order of the dials."""
        return [one for one in self._once("every", self.every) if self.log.of(one.key)]

    def state(self, one: Candidate) -> State:
        """What became of a candidate."""
        if self.log.problem(one.key):
            return "failed"
        if one in self._refused:
            return "failed the check"
        errors = list(self._errors(one).values())
        if not errors:
            return "untried"
        if max(errors) > self._most:
            return "below the floor"
        if self.ratio(one) >= GAIN:
            return "slower"
        if len(errors) == len(self.pictures):
            return "holds" if self._holds(one) else "unlikely"
        return "unfinished" if self._is_likely(one) else "unlikely"

    def ratio(self, one: Candidate) -> float:
        """A candidate's time over the exact model's: as measured, or as its levels' times multiply."""
        measured = self._ratio(one)
        if measured is not None:
            return measured
        miss = self._once("time", lambda: self._calibration(self._time_miss))
        return self._foretold_ratio(one) * math.exp(miss)

    def worst(self, one: Candidate) -> float | None:
        """The least similarity of a candidate's pictures so far."""
        errors = self._errors(one)
        return 1 - max(errors.values()) if errors else None

    def next_similarity(self, one: Candidate) -> float | None:
        """What one more picture's similarity stays above in 95 of 100 cases; None for fewer than two pictures."""
        most = next_error(list(self._errors(one).values()))
        return None if most is None else max(-1.0, 1 - most)

    def _hoped(self, one: Candidate) -> float:
        return self.ratio(one) * (1.0 if self.log.of(one.key) else HOPE)

    def _ratio(self, one: Candidate) -> float | None:
        return self._once(f"ratio {one.key}", lambda: self.log.ratio(one.key, self.pictures))

    def _single(self, level: Level) -> Candidate | None:
        return self._joined(self._base, Candidate((level,)))

    def _joined(self, one: Candidate, other: Candidate) -> Candidate | None:
        """Both together, in the dials' order; None if they cannot be."""
        levels = sorted((*one.levels, *other.levels), key=lambda level: self._order[level.dial])
        names = [level.dial for level in levels]
        if len(set(names)) < len(names):
            return None
        if any(dial.name in names and dial.excludes & set(names) for dial in self.dials):
            return None
        return Candidate(tuple(levels))

    def _errors(self, one: Candidate) -> dict[str, float]:
        """By picture of the search, as far as it was tried."""
        found = self.log.similarities(one.key)
        return {picture: max(0.0, 1 - found[picture]) for picture in self.pictures if picture in found}

    def _seen(self, one: Candidate) -> list[str]:
        return [picture for picture in self.pictures if self.log.has(one.key, picture)]

    def _is_lost(self, one: Candidate) -> bool:
        """Whether nothing can come of it any more, by its own trials."""
        return bool(self.log.problem(one.key)) or one in self._refused or self._is_too_much(one)

    def _is_too_much(self, one: Candidate) -> bool:
        """Whether a picture of it is below the floor."""
        return any(error > self._most for error in self._errors(one).values())

    def _is_open(self, one: Candidate) -> bool:
        """Whether it may yet be the best one, and is not tried to the end."""
        if self._is_lost(one) or len(self._seen(one)) == len(self.pictures):
            return False
        # What is too much stays too much with more on top of it, and what fails goes on failing.
        lost = (other for other in self._once("lost", self._lost) if one != other)
        if any(one.exceeds(other) if self._is_too_much(other) else one.has(other) for other in lost):
            return False
        return self._is_likely(one)

    def _is_useful(self, one: Candidate, base: Candidate | None = None) -> bool:
        """Whether it is faster than what it stands on, and nothing is wrong with it."""
        if self._is_lost(one) or not self.log.of(one.key):
            return False
        below = 1.0 if base is None or not base.levels else self.ratio(base)
        ratio = self._ratio(one)
        return ratio is not None and ratio < GAIN * below

    def _holds(self, one: Candidate) -> bool:
        """Whether it is above the floor: each picture of at least two, where there are two, and one more."""
        errors = list(self._errors(one).values())
        if len(errors) < min(2, len(self.pictures)) or self._is_lost(one):
            return False
        most = next_error(errors)
        return most is None or most <= self._most

    def _best(self) -> Candidate | None:
        """The fastest one that holds on all pictures, or where the time was up, on those that it was tried on."""
        found = [
            one
            for one in self.candidates()
            if (self._is_over or len(self._errors(one)) == len(self.pictures))
            and self._holds(one)
            and self.ratio(one) < GAIN
        ]
        return min(found, key=self.ratio, default=None)

    # What is foretold

    def _foretold_ratio(self, one: Candidate) -> float:
        base = self.ratio(self._base) if self._base.levels and one != self._base else 1.0
        found = base
        for single in self._parts(one):
            found *= (self._ratio(single) or base) / base
        return found

    def _parts(self, one: Candidate) -> list[Candidate]:
        """Each of its levels alone on the base."""
        own = set(self._base.levels)
        singles = (self._single(level) for level in one.levels if level not in own)
        return [single for single in singles if single is not None]

    def _lost(self) -> list[Candidate]:
        """All of which nothing can come any more."""
        levels = (level for dial in self.dials if not dial.is_exact for level in dial.levels)
        singles = (single for level in levels if (single := self._single(level)) is not None)
        return [one for one in dict.fromkeys((*singles, *self.candidates())) if self._is_lost(one)]

    def _time_miss(self, one: Candidate) -> float | None:
        ratio = self._ratio(one)
        return None if ratio is None else math.log(ratio / self._foretold_ratio(one))

    def _error_miss(self, one: Candidate) -> float | None:
        levels, _ = self._fitted()
        alone = [levels.get(part) for part in self._parts(one)]
        if one not in levels or not alone or any(part is None for part in alone):
            return None
        return levels[one] - math.log(math.fsum(math.exp(part) for part in alone if part is not None))

    def _calibration(self, miss: Callable[[Candidate], float | None]) -> float:
        """How far combinations were off what was foretold of them, as a logarithm, held back where few are known."""
        several = (one for one in self.candidates() if len(self._parts(one)) > 1 and self.log.of(one.key))
        misses = [found for one in several if (found := miss(one)) is not None]
        return math.fsum(misses) / (len(misses) + 1)

    def _fitted(self) -> tuple[dict[Candidate, float], dict[str, float]]:
        """Logarithms of errors taken apart into what a candidate adds and what a picture adds to all of them."""
        return self._once("fitted", self._fit)

    def _fit(self) -> tuple[dict[Candidate, float], dict[str, float]]:
        known = {
            one: {picture: math.log(max(error, LEAST_ERROR)) for picture, error in self._errors(one).items()}
            for one in self.candidates()
        }
        known = {one: logs for one, logs in known.items() if logs and max(logs.values()) > math.log(10 * LEAST_ERROR)}
        pictures = dict.fromkeys(self.pictures, 0.0)
        levels: dict[Candidate, float] = {}
        for _ in range(10):
            levels = {one: fmean(log - pictures[at] for at, log in logs.items()) for one, logs in known.items()}
            for picture in self.pictures[1:]:
                rest = [logs[picture] - levels[one] for one, logs in known.items() if picture in logs]
                pictures[picture] = median(rest) if rest else 0.0
        return levels, pictures

    def _is_likely(self, one: Candidate) -> bool:
        """Whether it may be above the floor with all pictures, by its own errors and by what others had on the rest."""
        levels, pictures = self._fitted()
        own = self._errors(one)
        if one in levels:
            level = levels[one]
        else:
            parts = [math.exp(levels[part]) for part in self._parts(one) if part in levels]
            if not parts:
                return True
            level = math.log(math.fsum(parts)) + self._once("error", lambda: self._calibration(self._error_miss))
        every = [own.get(picture, math.exp(level + pictures[picture])) for picture in self.pictures]
        most = next_error(every) or every[0]
        allowed = self._most * math.pow(SLACK, 1 - len(own) / len(self.pictures))
        return most <= allowed

    def _next_picture(self, one: Candidate) -> str:
        """Where it is likeliest to fail, of those that it was not tried on; one that nobody was tried on, else."""
        _, effects = self._fitted()
        known = {picture for other in self.candidates() for picture in self._errors(other)}
        open_ones = [picture for picture in self.pictures if picture not in self._seen(one)]
        return max(open_ones, key=lambda picture: (effects[picture], picture not in known))

    # What is checked

    def _is_checked(self, one: Candidate) -> bool:
        """Check a plan on pictures that the search never saw."""
        pictures = self._to_check(one)
        for picture in pictures:
            # One by one, so that each stands between exact runs.
            self._ask([(one, picture)], is_reserved=True, is_closed=True)
        check = self._check(one, pictures)
        self.found.checks.append(check)
        return check.holds

    def _to_check(self, one: Candidate) -> Sequence[str]:
        """Those that an earlier search checked it on, whatever its floor was; else the next ones."""
        every = (self._fresh(number) for number in range(CHECKS))
        known = (pictures for pictures in every if all(self.log.has(one.key, picture) for picture in pictures))
        return next(known, self._fresh(len(self.found.checks)))

    def _check(self, one: Candidate, pictures: Sequence[str]) -> Check:
        """What a plan's trials on fresh pictures say."""
        similar, problem = self.log.similarities(one.key), self.log.problem(one.key)
        worst = None if problem else min(similar[picture] for picture in pictures)
        every, own = self.log.usual(one.key), self.log.usual(one.key, pictures)
        speed = None
        if own:
            # The search chose it for being fast there: what it took here counts, and the spread of all of them.
            spread, value = paired([-log for log in every]), math.exp(-median(own))
            by = value / spread.value
            speed = Ratio(value, spread.low and spread.low * by, spread.high and spread.high * by)
        is_faster = speed is not None and speed.low is not None and speed.low > 1
        holds = worst is not None and worst >= 1 - self._most and is_faster
        return Check(one, tuple(pictures), worst, speed, holds, problem)

    def _rival(self, best: Candidate) -> None:
        """Try fewer steps that are as fast as the best plan, until they are seen to be worse."""
        steps = max(1, round(self._steps * self.ratio(best)))
        if steps >= self._steps:
            return
        rival = self.found.rival = Candidate(steps=steps)
        for _ in self.pictures:
            left = [picture for picture in self.pictures if not self.log.has(rival.key, picture)]
            if not left or self._is_lost(rival):
                return
            try:
                self._ask([(rival, max(left, key=lambda picture: self._fitted()[1][picture]))])
            except _TimeIsUpError:
                return


def exhaustive(search: Search) -> Candidate | None:
    """The fastest plan by the same rule for the floor, with every combination tried on every picture: what a search is
    held against."""
    ones = search.every()
    search._ask([(one, picture) for one in ones for picture in search.pictures], is_reserved=True, is_closed=True)
    return min((one for one in ones if search._holds(one) and search.ratio(one) < GAIN), key=search.ratio, default=None)
