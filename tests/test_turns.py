"""A thread that computes and the event loop: who has the interpreter when."""

import asyncio
import time

import pytest

from gateway.turns import MAX_TURN, SLICE, TooLongError, _turns, give_way, taking_turns


async def test_after_each_slice_the_event_loop_goes_once_through_what_it_has_to_do() -> None:
    loop, done = asyncio.get_running_loop(), 0

    def do_something() -> None:
        nonlocal done
        done += 1
        loop.call_soon(do_something)

    def compute() -> list[int]:
        seen = []
        with taking_turns(loop):
            turns = _turns.get()
            assert turns is not None
            for _ in range(20):
                # A slice is longer after an iteration that took long, as it may on a busy machine.
                time.sleep(max(0.0, turns.until - time.perf_counter()) + SLICE)
                before = done
                give_way()
                seen.append(done - before)
        return seen

    do_something()
    assert min(await asyncio.to_thread(compute)) >= 1


def test_nobody_is_waited_for_within_a_slice_nor_by_who_takes_no_turns() -> None:
    loop = asyncio.new_event_loop()  # never runs: whoever waits for it waits for long
    try:
        with taking_turns(loop):
            began = time.perf_counter()
            give_way()
        time.sleep(2 * SLICE)
        give_way()
        assert time.perf_counter() - began < MAX_TURN
    finally:
        loop.close()


def test_a_loop_that_does_not_turn_is_not_waited_for_for_long() -> None:
    loop = asyncio.new_event_loop()
    with taking_turns(loop):
        time.sleep(2 * SLICE)
        began = time.perf_counter()
        give_way()
        assert MAX_TURN / 2 < time.perf_counter() - began < 20 * MAX_TURN
        loop.close()
        time.sleep(2 * SLICE)
        began = time.perf_counter()
        give_way()
        assert time.perf_counter() - began < MAX_TURN / 2


async def test_who_may_take_only_so_long_is_stopped_once() -> None:
    """What it cleans up after that gives way, too."""
    loop, cleaned = asyncio.get_running_loop(), 0

    def work() -> None:
        nonlocal cleaned
        try:
            while True:
                give_way()
        finally:
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                give_way()
                cleaned += 1

    def compute() -> float:
        began = time.thread_time()
        with taking_turns(loop, 0.05), pytest.raises(TooLongError):
            work()
        return time.thread_time() - began

    assert 0.1 <= await asyncio.to_thread(compute) < 0.5
    assert cleaned > 10
