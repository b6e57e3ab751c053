"""Do the identities of a source tell its events apart? By the events that the log has of the last while."""

from collections.abc import Iterable
from contextlib import aclosing

from gateway.log.base import Log
from gateway.log.records import decode_event, fingerprint
from gateway.model import UnreadableRecordError, identity_of
from gateway.ops.history import newest_first

MOST = 200_000
"""Events that are looked at, the newest."""
FEWEST = 10
"""Events of a source below which nothing is said of it."""


class Seen:
    """What was seen of the events of one source."""

    def __init__(self) -> None:
        self.count = 0
        self.identified = 0
        self.identities: set[bytes] = set()
        self.contents: set[bytes] = set()

    def problem(self, dedupe: float | None) -> str:
        """Say what is wrong, if something seems to be."""
        if self.count < FEWEST or not self.identified:
            return ""
        if len(self.identities) == 1 and self.identified > 1:
            return f"expected an identity that differs from event to event, got one for {self.identified:,} events"
        copies = self.identified - len(self.contents)
        if dedupe is not None and 2 * copies > self.count:
            return f"expected events that differ, got {copies:,} of {self.count:,} that are taken for copies of others"
        return ""


async def identities_of(log: Log, topics: Iterable[str], since: float) -> dict[str, Seen]:
    """Look at the events that were appended since then; source → what was seen of its own."""
    found: dict[str, Seen] = {}
    looked = 0
    async with aclosing(newest_first(log, sorted(topics), since=since)) as history:
        async for each in history:
            looked += 1
            if looked > MOST:
                break
            try:
                event = decode_event(each.record)
            except UnreadableRecordError:
                continue
            seen = found.setdefault(event.source, Seen())
            seen.count += 1
            identity = identity_of(event.id)
            if identity is not None:
                seen.identified += 1
                seen.identities.add(identity)
                seen.contents.add(identity + fingerprint(event))
    return found
