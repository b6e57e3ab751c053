"""How findings are ranked, and what they say."""

from itertools import permutations

from gateway.ops.findings import (
    DEAD,
    HALTED,
    HELD,
    INDEX,
    NOT_READ,
    PAUSED,
    REFUSED,
    SILENT,
    SOURCE,
    WAITING,
    Finding,
    ranked,
)


def a_finding(rank: int, what: str, *, since: float | None = None, needs_attention: bool = True) -> Finding:
    return Finding(rank=rank, what=what, why="", since=since, needs_attention=needs_attention)


def test_the_worst_comes_first_and_what_is_wrong_before_what_is_not() -> None:
    ranks = (NOT_READ, REFUSED, PAUSED, HELD, HALTED, WAITING, DEAD, SOURCE, SILENT, INDEX)
    wrong = [a_finding(rank, f"wrong {rank}", since=float(100 - rank)) for rank in ranks]
    calm = [*[rank for rank in ranks if rank != REFUSED], REFUSED]  # rules that aren't refused any more are over
    fine = [a_finding(rank, f"fine {rank}", since=float(rank), needs_attention=False) for rank in calm]
    assert ranked([*reversed(fine), *reversed(wrong)]) == [*wrong, *fine]


def test_of_one_rank_the_oldest_comes_first_and_what_has_no_time_last() -> None:
    expected = [
        a_finding(WAITING, "z", since=5.0),
        a_finding(WAITING, "a", since=60.0),
        a_finding(WAITING, "b", since=60.0),
        a_finding(WAITING, "a"),
    ]
    assert [ranked(mixed) for mixed in permutations(expected)] == [expected] * 24
