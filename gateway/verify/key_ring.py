"""The secrets or public keys of a source: which of them verify at a time, and which of them has verified a request.

One that has an `until` verifies nothing from then on. That is decided at each request, by the time that its signature
is checked by, so that no reload has to come in time.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Generic, NamedTuple, TypeVar

from gateway.model import UsageError
from gateway.verify.config_reader import Path

SOON = 14 * 86400.0
"""Seconds before its end from which on `gateway check` warns of a secret."""
UNTIL = r"\d{4}-\d\d-\d\d([Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d))?"
"""A date, or a time of RFC 3339 (section 5.6)."""
EXPECTED_UNTIL = "a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z"
_UNTIL = re.compile(UNTIL, re.ASCII)

K = TypeVar("K")


def parse_until(text: str) -> float:
    """Return the Unix seconds at which a time comes, or the day of a date ends in UTC. Raises ValueError."""
    found = _UNTIL.fullmatch(text)
    if not found:
        raise ValueError(text)
    try:
        at = datetime.fromisoformat(text.upper())
        return (at if found[1] else at.replace(tzinfo=UTC) + timedelta(days=1)).timestamp()
    except OverflowError as error:  # the last day of the year 9999
        raise ValueError(text) from error


class Term(NamedTuple):
    """How long one of a source's secrets verifies: the key of its list in the rules, its position there, and its end.

    The position begins at 0. `until` is in Unix seconds, infinite for a secret without an end.
    """

    key: str
    position: int
    until: float = math.inf

    @property
    def shown(self) -> str:
        """What it is called, for people: `secret 2`."""
        return f"{'public key' if self.key == 'public_keys' else 'secret'} {self.position + 1}"


class Held(NamedTuple, Generic[K]):
    """A key, its place among all of its source's, and until when it verifies.

    The place is None for a key that the rules don't list: the provider's own, or one that was fetched.
    """

    key: K
    place: int | None = None
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class KeyRing(Generic[K]):
    """The keys of a signing method, in the order of their list."""

    held: tuple[Held[K], ...] = field(default=(), repr=False)
    is_endless: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_endless", all(each.until == math.inf for each in self.held))

    def at(self, now: float) -> Sequence[Held[K]]:
        """Return those that verify at a time (Unix seconds)."""
        if self.is_endless:
            return self.held
        return [each for each in self.held if now < each.until]

    def first(self, now: float) -> K:
        """Return the one that signs test events. Raises UsageError if all have ended."""
        for each in self.at(now):
            return each.key
        raise UsageError("a test event for this source: expected a secret that hasn't ended, got none")


def endings(terms: Sequence[Term], now: float) -> Iterator[tuple[Path, str]]:
    """Yield which secrets are over or are soon: the path below `verify`, and the text. Not those of `ended_lists`."""
    ended = ended_lists(terms, now)
    for term in terms:
        if term.until - now < SOON and term.key not in ended:
            days = math.ceil((term.until - now) / 86400)
            soon = f"one that ends within {'a day' if days == 1 else f'{days} days'}"
            got = soon if now < term.until else "one that has ended, and verifies nothing any more"
            yield (term.key, term.position, "until"), f"expected a secret for more than 14 days, got {got}"


def ended_lists(terms: Sequence[Term], now: float) -> Sequence[str]:
    """Return the lists in which every secret is over: nothing verifies by them."""
    last: dict[str, float] = {}
    for term in terms:
        last[term.key] = max(term.until, last.get(term.key, -math.inf))
    return [key for key, until in last.items() if until <= now]
