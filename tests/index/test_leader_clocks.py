"""How far a partition is complete whose leader's clock is behind that of the log."""

import pytest

from gateway.index.leader_clocks import LeaderClocks
from gateway.log.base import LEADER_CLOCK_SKEW, Partition

ONE, OTHER = Partition("events", 0), Partition("events", 1)


def test_a_partition_is_complete_up_to_what_its_leaders_clock_shows() -> None:
    clocks = LeaderClocks()
    assert clocks.complete_to(ONE, 1000.0) == 1000.0
    clocks.saw(ONE, 970.5, 970.5, 1001.0)  # appended since, so at least 29.5 s behind
    assert clocks.complete_to(ONE, 1001.0) == 1001.0 - 29.5
    clocks.saw(ONE, 971.1, 972.0, 1002.0)  # and at most 30 s
    assert clocks.complete_to(ONE, 1002.0) == pytest.approx(1002.0 - 29.9)
    assert clocks.complete_to(OTHER, 1002.0) == 1002.0


def test_another_leader_that_is_not_behind_is_noticed() -> None:
    clocks = LeaderClocks()
    clocks.complete_to(ONE, 1000.0)
    clocks.saw(ONE, 970.0, 970.0, 1001.0)
    clocks.complete_to(ONE, 1001.0)
    clocks.saw(ONE, 1001.5, 1001.9, 1002.0)
    assert clocks.complete_to(ONE, 1002.0) == pytest.approx(1002.0 - 0.1)


def test_old_records_say_nothing_of_a_clock() -> None:
    clocks = LeaderClocks()
    clocks.saw(ONE, 10.0, 20.0, 1000.0)  # what was there when the index began
    assert clocks.complete_to(ONE, 1000.0) == 1000.0
    clocks.forget_ends()  # and what is read again
    clocks.saw(ONE, 10.0, 20.0, 1001.0)
    assert clocks.complete_to(ONE, 1001.0) == 1001.0
    clocks.forget_end(ONE)
    clocks.saw(ONE, 10.0, 20.0, 1002.0)
    assert clocks.complete_to(ONE, 1002.0) == 1002.0


def test_no_clock_counts_as_further_behind_than_those_of_leaders_may_be() -> None:
    clocks = LeaderClocks()
    clocks.complete_to(ONE, 1000.0)
    clocks.saw(ONE, 0.0, 0.0, 1001.0)
    assert clocks.complete_to(ONE, 1001.0) == 1001.0 - LEADER_CLOCK_SKEW
