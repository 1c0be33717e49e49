"""Peak memory of a stretch of work, by sampling in a thread what is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

MIB = 1024 * 1024


@dataclass(frozen=True)
class Peak:
    """What was in use, in MiB.

    Attributes:
        peak_mib: the most at any sample.
        increase_mib: that, less what was in use at the start.
    """

    peak_mib: float
    increase_mib: float


class PeakMemory:
    """A context that watches how much memory is in use.

    Sampled, since the counters that systems keep are of the whole process's life (`ru_maxrss` never
    falls) or of one allocator among several. What lives shorter than the interval may be missed.

    Args:
        readers: each gives bytes in use now, of one kind; cheap, called from a thread of its own.
        interval_s: from one sample to the next.
    """

    def __init__(self, *readers: Callable[[], int], interval_s: float = 0.005):
        self._readers = readers
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slipstream-memory", daemon=True)
        self._failure: Exception | None = None
        self._first: list[int] = []
        self._most: list[int] = []

    def __enter__(self) -> PeakMemory:
        self._first = [read() for read in self._readers]
        self._most = self._first
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._sample()
        # No figure is made of the samples before a reader failed.
        if self._failure is not None and error is None:
            raise self._failure

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(self._interval_s):
                self._sample()
        except Exception as failure:
            self._failure = failure

    def _sample(self) -> None:
        self._most = [max(most, read()) for most, read in zip(self._most, self._readers, strict=True)]

    @property
    def peaks(self) -> tuple[Peak, ...]:
        """One for each reader, once it is over."""
        return tuple(
            Peak(most / MIB, (most - first) / MIB) for most, first in zip(self._most, self._first, strict=True)
        )
