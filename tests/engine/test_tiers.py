import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.engine.tiers import SHORTEST, TOLERANCE, WAIT_IN_MEMORY, plan
from gateway.log.topics import TIERS

DAY = 86400.0
DELAYS = st.floats(-10.0, DAY, allow_nan=False)


@pytest.mark.parametrize(
    ("delay", "path"),
    [
        (-3600.0, []),
        (0.0, []),
        (0.9, []),
        (3.0, []),
        (4.5, []),
        (4.6, ["5s"]),
        (5.0, ["5s"]),
        (8.0, ["5s"]),
        (19.0, ["20s"]),
        (18.9, ["5s", "5s", "5s"]),
        (100.0, ["80s", "20s"]),
        (720.0, ["5m", "5m", "80s", "20s", "20s"]),
        (3600.0, ["20m", "20m", "20m"]),
        (DAY, ["20h", "80m", "80m", "80m"]),
    ],
)
def test_a_delay_is_a_walk_over_tiers_the_longest_first(delay: float, path: list[str]) -> None:
    assert hops(delay) == path


def hops(delay: float) -> list[str]:
    """Return the tiers that a delay goes through if appending takes no time."""
    path: list[str] = []
    now = 0.0
    while tier := plan(delay, now):
        path.append(tier)
        now += TIERS[tier]
    return path


@settings(derandomize=True, deadline=None)
@given(delay=DELAYS)
@example(delay=DAY)
def test_a_walk_ends_within_the_tolerance_or_leaves_a_moment_to_memory(delay: float) -> None:
    rest = delay - sum(TIERS[tier] for tier in hops(delay))
    assert -TOLERANCE - 1e-6 <= rest < WAIT_IN_MEMORY or rest == delay <= 0


@settings(derandomize=True, deadline=None)
@given(delay=DELAYS)
@example(delay=68334.6)
def test_the_number_of_hops_is_bounded(delay: float) -> None:
    path = hops(delay)
    assert len(path) <= 19
    assert all(path.count(tier) <= 3 for tier in path)


@settings(derandomize=True, deadline=None)
@given(delay=st.floats(0.0, DAY), lateness=st.lists(st.floats(0.0, 600.0), min_size=25, max_size=25))
def test_slow_hops_make_a_walk_shorter_and_never_early(delay: float, lateness: list[float]) -> None:
    """Each append and fetch takes its time; what is planned next is planned from when it was read."""
    now = 0.0
    for late in lateness:
        tier = plan(delay, now)
        if tier is None:
            break
        assert now + TIERS[tier] <= delay + TOLERANCE + 1e-6
        now += TIERS[tier] + late
    assert plan(delay, now) is None


def test_the_fallback_of_a_caller_without_memory_is_the_shortest_tier() -> None:
    assert min(TIERS, key=TIERS.__getitem__) == SHORTEST
