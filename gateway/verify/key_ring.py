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

EXPIRY_WARNING = 14 * 86400.0
"""Seconds before its expiry from which on `gateway check` warns of a secret or a certificate."""
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


class SecretLifetime(NamedTuple):
    """Until when one of a source's secrets verifies, the key of its list in the rules, and its position there.

    The position begins at 0. `until` is in Unix seconds, infinite for a secret that never expires.
    """

    key: str
    position: int
    until: float = math.inf

    @property
    def shown(self) -> str:
        """What it is called, for people: `secret 2`."""
        return f"{'public key' if self.key == 'public_keys' else 'secret'} {self.position + 1}"


class KeyEntry(NamedTuple, Generic[K]):
    """A key, its index among all keys of its source, and until when it verifies.

    The index is None for a key that the rules don't list: the provider's own, or one that was fetched.
    """

    key: K
    secret_index: int | None = None
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class KeyRing(Generic[K]):
    """The keys of a signing method, in the order of their list."""

    entries: tuple[KeyEntry[K], ...] = field(default=(), repr=False)
    never_expires: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "never_expires", all(each.until == math.inf for each in self.entries))

    def at(self, now: float) -> Sequence[KeyEntry[K]]:
        """Return those that verify at a time (Unix seconds)."""
        if self.never_expires:
            return self.entries
        return [each for each in self.entries if now < each.until]

    def first(self, now: float) -> K:
        """Return the one that signs test events. Raises UsageError if all have expired."""
        for each in self.at(now):
            return each.key
        raise UsageError("a test event for this source: expected a secret that hasn't expired, got none")


def expiring_secrets(lifetimes: Sequence[SecretLifetime], now: float) -> Iterator[tuple[Path, str]]:
    """Yield which secrets have expired or will soon: their path below `verify`, and a message.

    Those of `expired_lists` are left out.
    """
    expired = expired_lists(lifetimes, now)
    for lifetime in lifetimes:
        if lifetime.until - now < EXPIRY_WARNING and lifetime.key not in expired:
            days = math.ceil((lifetime.until - now) / 86400)
            soon = f"one that expires within {'a day' if days == 1 else f'{days} days'}"
            got = soon if now < lifetime.until else "one that has expired, and verifies nothing any more"
            yield (lifetime.key, lifetime.position, "until"), f"expected a secret for more than 14 days, got {got}"


def expired_lists(lifetimes: Sequence[SecretLifetime], now: float) -> Sequence[str]:
    """Return the lists in which every secret has expired: nothing verifies with them."""
    last: dict[str, float] = {}
    for lifetime in lifetimes:
        last[lifetime.key] = max(lifetime.until, last.get(lifetime.key, -math.inf))
    return [key for key, until in last.items() if until <= now]
