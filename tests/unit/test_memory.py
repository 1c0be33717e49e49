"""Peak memory: of a reader that can be foreseen, and of this process."""

from __future__ import annotations

import mmap
import threading
import time

import psutil
import pytest
import torch
from slipstream_pack.nodes.measuring.memory import MIB, PeakMemory


def test_the_peak_is_found_between_start_and_end():
    in_use, seen = [100 * MIB], threading.Event()

    def read():
        if in_use[0] > 300 * MIB:
            seen.set()
        return in_use[0]

    with PeakMemory(read, lambda: 5 * MIB, interval_s=0.001) as memory:
        in_use[0] = 356 * MIB
        assert seen.wait(10)
        in_use[0] = 50 * MIB
    (first, second) = memory.peaks
    assert (first.peak_mib, first.increase_mib) == (356, 256)
    assert (second.peak_mib, second.increase_mib) == (5, 0)


def test_what_is_in_use_at_the_very_end_counts():
    samples = iter([1 * MIB, 9 * MIB])
    with PeakMemory(lambda: next(samples), interval_s=1000) as memory:
        pass
    assert memory.peaks[0].increase_mib == 8


def test_a_real_allocation_of_256_mib():
    # From the system itself: an allocator may have as much of what other tests freed.
    with PeakMemory(lambda: psutil.Process().memory_info().rss) as memory, mmap.mmap(-1, 256 * MIB) as block:
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        time.sleep(0.05)
    assert memory.peaks[0].increase_mib == pytest.approx(256, rel=0.1)


def test_no_figure_is_made_where_reading_failed():
    calls = iter([0, 0])

    def read():
        try:
            return next(calls)
        except StopIteration:
            raise RuntimeError("no answer") from None

    def slow():
        with PeakMemory(read, interval_s=0.001):
            time.sleep(0.2)

    with pytest.raises(RuntimeError, match="no answer"):
        slow()


def test_it_stops_watching_also_after_an_error():
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="planted"), PeakMemory(lambda: 0):
        raise RuntimeError("planted")
    assert threading.active_count() == before
