"""For whom new addresses of keys are asked: no flood from a few networks takes what another needs."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.key_budget import AT_ONCE, OWN, OWN_INTERVAL, PER_SECOND, RESERVE, KeyBudget

OTHERS = int(RESERVE) // OWN - 1
"""So many networks may flood."""

asks = st.lists(
    st.tuples(st.floats(0.0, 30.0), st.integers(0, OTHERS - 1), st.integers(1, 200)), min_size=1, max_size=60
)
"""Seconds after the one before, which network, how often in that moment."""


@given(asks=asks)
def test_a_network_that_asks_seldom_gets_its_own_whatever_some_others_do(
    asks: list[tuple[float, int, int]],
) -> None:
    budget, now, last = KeyBudget(0.0), 0.0, -OWN * OWN_INTERVAL
    taken = 0
    for seconds, network, times in asks:
        now += seconds
        taken += sum([budget.take(f"attacker {network}", now) for _ in range(times)])
        if now >= last + OWN * OWN_INTERVAL:
            last = now
            assert [budget.take("vendor", now) for _ in range(OWN)] == [True] * OWN
            taken += OWN
    assert taken <= AT_ONCE + PER_SECOND * now


def test_networks_that_come_one_after_the_other_leave_the_next_its_own() -> None:
    """Not a half for the first, a quarter for the second, and nothing for the seventh."""
    budget = KeyBudget(0.0)
    for network in range(OTHERS):
        assert sum([budget.take(str(network), 1.0) for _ in range(1000)]) >= OWN
    assert [budget.take("vendor", 1.0) for _ in range(3)] == [True, True, False]


def test_one_network_has_what_is_shared_and_its_own() -> None:
    """As many as are refilled from then on: nobody else asks."""
    budget = KeyBudget(0.0)
    assert sum([budget.take("lone", 0.0) for _ in range(1000)]) == AT_ONCE - RESERVE
    hour = [budget.take("lone", n / 10) for n in range(36_000)]
    assert abs(sum(hour) - PER_SECOND * 3600) <= OWN


def test_from_many_networks_it_is_bounded_and_so_is_what_is_kept() -> None:
    budget = KeyBudget(0.0)
    taken, kept = 0, 0
    for n in range(100_000):
        taken += budget.take(f"2001:db8:{n:x}::", n / 100)
        kept = max(kept, len(budget._used_until))
    assert taken <= AT_ONCE + PER_SECOND * 1000
    assert kept <= AT_ONCE + PER_SECOND * OWN * OWN_INTERVAL


def test_a_clock_that_is_set_back_gives_nothing() -> None:
    budget = KeyBudget(1000.0)
    assert sum([budget.take("lone", 0.0) for _ in range(1000)]) <= AT_ONCE - RESERVE + OWN
