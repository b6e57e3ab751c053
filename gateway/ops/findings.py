"""What keeps deliveries from going out: one finding, and which of several is the worst."""

from collections.abc import Iterable
from dataclasses import dataclass

NOT_READ, REFUSED, PAUSED, HELD, HALTED, WAITING, DEAD, SOURCE, SILENT = range(9)
"""Ranks, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that keeps deliveries from going out, or that waits. Times are Unix seconds.

    `next` is what to do about it, a command a line; a line that isn't one begins with `#`.
    """

    rank: int
    what: str
    why: str
    is_wrong: bool = True
    since: float | None = None
    until: float | None = None
    who: str = ""
    next: tuple[str, ...] = ()
    count: int | None = None


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return the worst first: what is wrong before what isn't, then by rank, then the longest."""
    return sorted(findings, key=lambda each: (not each.is_wrong, each.rank, each.since or float("inf"), each.what))


def owners_first(destination: str, after: str) -> list[str]:
    """Say what is wrong with a destination whose breaker is open, by what the last attempt got that failed."""
    if not after:
        return []
    does = {"timeout": "doesn't answer", "auth": "can't be asked, as its token endpoint gives no token"}
    told = does.get(after, f"answers {after}" if after.isdecimal() else f"can't be reached ({after})")
    return [f"# {destination} {told}: its owners first"]
