"""Trials of plans: what each run took and gave, as a log that can be kept and gone on with.

Times are never compared as they are. A machine gets slower and faster while it is measured, so each run stands
between runs of the exact model, and counts by its time over theirs at its moment.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from statistics import median
from typing import Any

EXACT = ""
"""The key of the exact model."""

UNSTEADY = 0.15
"""By how much, as a logarithm, the exact model may differ before and after a run whose time counts; or more, on a
machine where it always does."""


@dataclass(frozen=True)
class Trial:
    """One run of a plan at one picture: a prompt and a seed.

    Attributes:
        plan: the plan's key; `EXACT` for the exact model.
        picture: the picture's key.
        session: in which it ran: one process on one device, whose times can be compared.
        at: the middle of the run, in seconds on the session's clock.
        seconds: what it took; None where it did not come to an end.
        similarity: of its picture to the exact model's, 1 for equal ones, the worst one of a batch; None without one.
        share: of the exact model's work, as rows through the network; None where it was not counted.
        first_s: what compiling and the like took besides, the first time.
        problem: why there is no picture to use, in words.
        is_error: whether the problem is an error that was raised, which may pass; else it is what the run gave.
    """

    plan: str
    picture: str
    session: str
    at: float
    seconds: float | None = None
    similarity: float | None = None
    share: float | None = None
    first_s: float = 0.0
    problem: str = ""
    is_error: bool = False


@dataclass(frozen=True)
class Time:
    """A run's time over the exact model's, as a logarithm; and whether the machine was as fast after it as before."""

    log: float
    is_steady: bool


class Log:
    """All trials, in the order in which they ran.

    An error that one session alone came to may have passed, such as memory that something else had: later ones do not
    know of it, and try the plan once more. What two came to stays.

    Args:
        trials: of earlier sessions.
        changed: called after each new one.
    """

    def __init__(self, trials: Iterable[Trial] = (), changed: Callable[[], None] = lambda: None):
        self.trials: list[Trial] = []
        self._changed = changed
        self._lock = threading.RLock()
        self._by_plan: dict[str, list[Trial]] = defaultdict(list)
        self._exact: dict[str, list[Trial]] = defaultdict(list)
        earlier = list(trials)
        self._earlier = {trial.session for trial in earlier}
        failed = {(trial.plan, trial.session) for trial in earlier if trial.is_error}
        times = Counter(plan for plan, _ in failed)
        for trial in earlier:
            self._put(trial, is_known=not trial.is_error or times[trial.plan] > 1)

    def _put(self, trial: Trial, is_known: bool = True) -> None:
        self.trials.append(trial)
        if not is_known:
            return
        self._by_plan[trial.plan].append(trial)
        if trial.plan == EXACT and trial.seconds is not None:
            bisect.insort(self._exact[trial.session], trial, key=lambda one: one.at)

    def add(self, trial: Trial) -> None:
        """Put one more trial into it, from whichever thread."""
        with self._lock:
            self._put(trial)
            self._changed()

    def of(self, plan: str) -> list[Trial]:
        """The trials of a plan."""
        return self._by_plan.get(plan, [])

    def has(self, plan: str, picture: str) -> bool:
        """Whether a plan was tried at a picture."""
        return any(trial.picture == picture for trial in self.of(plan))

    def problem(self, plan: str) -> str:
        """Why a plan cannot be used, of the first trial that says so; empty if none does."""
        first = next((trial for trial in self.of(plan) if trial.problem), None)
        if first is None:
            return ""
        return f"{first.problem} (in an earlier run)" if first.session in self._earlier else first.problem

    def similarities(self, plan: str) -> dict[str, float]:
        """By picture, as far as there are any."""
        return {trial.picture: trial.similarity for trial in self.of(plan) if trial.similarity is not None}

    def first_s(self, plan: str) -> float:
        """What a plan's first time took besides, as its first trial found it."""
        return next((trial.first_s for trial in self.of(plan) if trial.first_s), 0.0)

    def share(self, plan: str) -> float | None:
        """A plan's work over the exact model's, as its trials have it in the middle."""
        found = [trial.share for trial in self.of(plan) if trial.share is not None]
        return median(found) if found else None

    def exact_s(self) -> float | None:
        """What a run of the exact model takes, as the latest session has it in the middle; None before the first."""
        times = next((times for times in reversed(self._exact.values()) if times), None)
        return None if times is None else median(trial.seconds for trial in times if trial.seconds is not None)

    def times(self, plan: str, pictures: Iterable[str] | None = None) -> list[Time]:
        """A plan's times, of its trials that have an exact run before or after them, at some pictures or at all."""
        among = None if pictures is None else set(pictures)
        trials = (trial for trial in self.of(plan) if among is None or trial.picture in among)
        return [time for time in map(self._time, trials) if time is not None]

    def unsteady(self) -> int:
        """How many runs of plans have a time that does not count, since the machine was not as fast after as before."""
        plans = (plan for plan in self._by_plan if plan != EXACT)
        return sum(not time.is_steady for plan in plans for time in self.times(plan))

    def usual(self, plan: str, pictures: Iterable[str] | None = None) -> list[float]:
        """The logarithms of a plan's times, of the steady ones if there are any, at some pictures or at all."""
        times = self.times(plan, pictures)
        return [time.log for time in times if time.is_steady] or [time.log for time in times]

    def ratio(self, plan: str, pictures: Iterable[str] | None = None) -> float | None:
        """A plan's time over the exact model's, at some pictures or at all; None without one."""
        logs = self.usual(plan, pictures)
        return math.exp(median(logs)) if logs else None

    def _time(self, trial: Trial) -> Time | None:
        exact = self._exact.get(trial.session, [])
        if trial.seconds is None or not exact:
            return None
        after = bisect.bisect(exact, trial.at, key=lambda one: one.at)
        one, other = exact[max(after - 1, 0)], exact[min(after, len(exact) - 1)]
        first, last = _log_s(one), _log_s(other)
        way = 0.0 if one is other else (trial.at - one.at) / (other.at - one.at)
        is_steady = abs(last - first) <= max(UNSTEADY, 3 * self._jumps(trial.session))
        return Time(math.log(trial.seconds) - (first + way * (last - first)), is_steady)

    def _jumps(self, session: str) -> float:
        """By how much the exact model's time usually differs from one run to the next."""
        logs = [_log_s(trial) for trial in self._exact[session]]
        # Of a handful, a jump would be what is usual.
        return median(abs(b - a) for a, b in pairwise(logs)) if len(logs) > 4 else 0.0

    def as_data(self) -> list[dict[str, Any]]:
        """JSON-ready; what is as usual is left out."""
        usual = {field.name: field.default for field in fields(Trial)}
        return [{name: value for name, value in asdict(trial).items() if value != usual[name]} for trial in self.trials]


def from_data(data: Iterable[dict[str, Any]]) -> list[Trial]:
    """The trials that `Log.as_data` told of.

    Raises:
        TypeError, ValueError: they are none.
    """
    found = [Trial(**entry) for entry in data]
    for trial in found:
        texts = (trial.plan, trial.picture, trial.session, trial.problem)
        figures = (trial.seconds, trial.similarity, trial.share)
        numbers = [trial.at, trial.first_s, *(one for one in figures if one is not None)]
        is_typed = all(isinstance(text, str) for text in texts) and isinstance(trial.is_error, bool)
        if not is_typed or not all(map(_is_number, numbers)):
            raise ValueError(f"no trial: {trial}")
        if trial.seconds is not None and trial.seconds <= 0:
            raise ValueError(f"no time: {trial.seconds}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _log_s(trial: Trial) -> float:
    assert trial.seconds is not None
    return math.log(trial.seconds)


@dataclass(frozen=True)
class Task:
    """A plan to be tried at a picture. `of` is what the one who runs it knows it by."""

    plan: str
    picture: str
    of: Any = None


class Interleaved:
    """Runs tasks between runs of the exact model, on one device.

    Args:
        run: makes one run, whatever comes of it; raises only what ends all of the search.
        log: takes what comes of each.
        has_reference: whether the exact model's picture is there to compare with.
        every: how many tasks at most stand between two exact runs.
    """

    def __init__(
        self,
        run: Callable[[Task], Trial],
        log: Log,
        has_reference: Callable[[str], bool],
        every: int = 3,
    ):
        self._run = run
        self._log = log
        self._has_reference = has_reference
        self._every = every
        self._since: int | None = None
        """How many tasks ran since the last exact run; None before the first one."""

    def __call__(self, tasks: list[Task], next_pictures: Iterable[str] = (), is_closed: bool = False) -> None:
        """Run tasks. The last ones may be without an exact run after them until the next call.

        Args:
            next_pictures: which pictures are likely to be asked for: an exact run that is due anyway makes one of them.
            is_closed: whether an exact run must stand after the last task.
        """
        following = list(next_pictures)
        for place, task in enumerate(tasks):
            if not self._has_reference(task.picture):
                self._exact(task.picture)
            elif self._since is None or self._since >= self._every:
                self._exact(self._due([other.picture for other in tasks[place:]] + following))
            self._log.add(self._run(task))
            self._since = (self._since or 0) + 1
        if is_closed and tasks:
            self.close([*following, tasks[-1].picture])

    def close(self, pictures: list[str]) -> None:
        """Have an exact run stand after the last task.

        Args:
            pictures: see `next_pictures`; at least one.
        """
        if self._since:
            self._exact(self._due(pictures))

    def _due(self, pictures: list[str]) -> str:
        """The first picture without a reference, or the last one."""
        return next((picture for picture in pictures if not self._has_reference(picture)), pictures[-1])

    def _exact(self, picture: str) -> None:
        self._log.add(self._run(Task(EXACT, picture)))
        self._since = 0


class LostError(Exception):
    """A device, or the machine that it is in, is gone; whatever ran there did not come to an end."""


class Spread:
    """Runs tasks on several devices at once, each between exact runs of its own. What a lost one was at is run by
    another.

    Args:
        devices: one for each; its runs raise `LostError` when it is gone.
        lost: called with what it was that was lost.

    Attributes:
        left: those that are not lost.
    """

    def __init__(self, devices: Sequence[Interleaved], lost: Callable[[LostError], None] = lambda error: None):
        self.left = list(devices)
        self._lost = lost

    def __call__(self, tasks: list[Task], next_pictures: Sequence[str] = (), is_closed: bool = False) -> None:
        """See `Interleaved`.

        Raises:
            LostError: no device is left.
        """
        waiting = deque(tasks)
        self._each(lambda device: self._work(device, waiting, list(next_pictures)))
        while waiting:
            # Given back by a device that was lost when the others had no more to do.
            self._each(lambda device: self._work(device, waiting, list(next_pictures)))
        if is_closed and tasks:
            self._each(lambda device: device.close([*next_pictures, tasks[-1].picture]))

    def _work(self, device: Interleaved, waiting: deque[Task], following: list[str]) -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            try:
                device([task], [other.picture for other in waiting.copy()] + following)
            except BaseException:
                waiting.appendleft(task)
                raise

    def _each(self, act: Callable[[Interleaved], None]) -> None:
        """Do something on all devices at once, and go on without those that are lost."""
        if not self.left:
            raise LostError("no machine is left; what was measured is kept")
        with ThreadPoolExecutor(len(self.left)) as pool:
            doing = [(device, pool.submit(act, device)) for device in self.left]
        errors = [(device, error) for device, future in doing if (error := future.exception()) is not None]
        for device, error in errors:
            if not isinstance(error, LostError):
                raise error
            self.left.remove(device)
            self._lost(error)
