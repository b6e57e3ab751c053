"""What has become of deliveries moments after a kick has brought them on, told by the log alone.

    brought on ──▶ done, and no successor ───────────────────────▶ tried: delivered, or dropped
        │          a successor with another attempt ─────────────▶ tried: it failed
        │          a successor without one ──────────────────────▶ waits, and its note says why
        └────────▶ none of it yet ───────────────────────────────▶ on its way: in a queue, or under way

Any process may have taken a delivery, and all that the one which carries out orders sees of the others is their records
and commits. So `tried` is never more than what destinations have seen, and what isn't known counts as on its way.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Container, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from gateway.engine.jobs.log_reader import RECORDS_AT_ONCE, records_of
from gateway.log.base import Commit, Log, Partition
from gateway.log.records import decode_delivery
from gateway.model import (
    Delivery,
    Life,
    Note,
    UnreadableRecordError,
    result_label,
)

MAX_FOLLOWED = 10_000
"""Deliveries of a kick that are followed. Of more, it isn't told how many were tried."""
FOLLOW_TIMEOUT = 3.5
"""Seconds from the last that was brought on, at most: a queue, an attempt, and the commit that tells of it."""
POLL_INTERVAL = 0.25
ON_ITS_WAY = "on_its_way"
"""Why a delivery waits of which nothing is known yet; else a SpillReason, or LATER or ENDED."""
LATER = "later"
ENDED = "ended"
"""It is a dead letter, and wasn't tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KickOutcome:
    """How many were tried, and for each reason how many wait.

    Of those that failed, `got` is what the last try got, and `again` how many of them had got the same before. Of the
    others that were tried no record tells: they are `delivered`, which is None where some may be dropped.
    """

    tried: int
    delivered: int | None
    waits: Mapping[str, int]
    got: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Followed:
    route: str
    attempts: int
    before: str
    """What its last attempt had got before the kick; "" if there was none."""
    names: set[str] = field(default_factory=set)
    place: str | None = None
    """Where the record is that was brought on, or was in the shortest tier anyway; None until it is found."""
    offset: int = 0
    outcome: str = ON_ITS_WAY
    is_tried: bool = False
    got: str = ""
    """What its last attempt has got since, where it failed."""


class KickOutcomes:
    """What is followed of one kick, or of several at once; `starts` are the ends of all topics before it began."""

    def __init__(self, log: Log, *, shortest: str, dead: str, starts: Mapping[str, int]) -> None:
        self._log = log
        self._shortest = shortest
        self._dead = dead
        self._read = dict(starts)
        self._followed: dict[Life, _Followed] = {}
        self._before: dict[Life, int] = {}  # the last successor of what was written just before

    async def look_back(self, starts: Mapping[str, int], sleep: Callable[[float], Awaitable[None]]) -> None:
        """Learn what was written from these offsets on before it all began. Raises LogUnavailableError.

        What had a successor then waits there, or is dead, though its own record may not be committed yet.
        """
        ends, self._read = self._read, {**self._read, **starts}
        await self._read_on(sleep, ends)
        self._read = ends

    def is_superseded(self, delivery: Delivery) -> bool:
        """Return whether another record had carried a delivery on already."""
        return delivery.successor < self._before.get(delivery.life, 0)

    def follow(self, name: str, delivery: Delivery, place: str | None = None, offset: int = 0) -> None:
        """Follow a delivery for a name that was kicked; with the place of its record, where it isn't copied."""
        key = delivery.life
        followed = self._followed.get(key)
        if followed is None:
            if len(self._followed) >= MAX_FOLLOWED:
                return
            followed = self._followed[key] = _Followed(
                route=delivery.route,
                attempts=len(delivery.attempts),
                before=_last_result(delivery),
                place=place,
                offset=offset,
            )
        followed.names.add(name)

    async def poll(
        self,
        committed: Callable[[], Awaitable[Mapping[str, Commit]]],
        *,
        is_wanted: Callable[[], bool],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """Look until each has been tried or waits, or for some seconds. Raises LogUnavailableError."""
        until = self._log.now() + FOLLOW_TIMEOUT
        while is_wanted():
            # Before the records: what is done by then has its successor among them.
            commits = await committed()
            await self._read_on(sleep)
            self._see_done(commits)
            if self._log.now() >= until or not any(
                each.outcome == ON_ITS_WAY and not each.is_tried for each in self._followed.values()
            ):
                return
            await sleep(POLL_INTERVAL)

    def of(self, name: str, count: int, *, dropping: Container[str]) -> KickOutcome | None:
        """Return what has become of what a kick has counted; None where not all of it was followed.

        `dropping` are the routes that drop a delivery for some answers, of which no record tells either.
        """
        followed = [each for each in self._followed.values() if name in each.names]
        if len(followed) != count:
            return None
        waits = Counter([each.outcome for each in followed if not each.is_tried])
        failed = [each for each in followed if each.is_tried and each.got]
        tried = count - waits.total()
        is_certain = not any(each.route in dropping for each in followed if each.is_tried and not each.got)
        return KickOutcome(
            tried=tried,
            delivered=tried - len(failed) if is_certain else None,
            waits=dict(waits),
            got=dict(Counter([each.got for each in failed])),
            again=dict(Counter([each.got for each in failed if each.got == each.before])),
        )

    async def _read_on(self, sleep: Callable[[float], Awaitable[None]], ends: Mapping[str, int] | None = None) -> None:
        """Read what has come, or what had come by these ends."""
        topics = {place.rpartition("/")[0] for place in self._read}
        looked = 0
        for topic in sorted(topics):
            for number, (start, end) in (await self._log.readable(topic))[0].items():
                partition = Partition(topic, number)
                place = f"{topic}/{number}"
                end = end if ends is None else ends.get(place, 0)  # noqa: PLW2901 - the same end
                first = max(start, self._read.get(place, start))
                async with aclosing(records_of(self._log, partition, first, end)) as records:
                    async for record in records:
                        looked += 1
                        if looked % RECORDS_AT_ONCE == 0:
                            await sleep(0)
                        try:
                            stored = decode_delivery(record)
                        except UnreadableRecordError:
                            continue
                        if ends is None:
                            self._see(stored.delivery, stored.note, place, record.offset)
                        else:
                            key = stored.delivery.life
                            self._before[key] = max(stored.delivery.successor, self._before.get(key, 0))
                self._read[place] = end

    def _see(self, delivery: Delivery, note: Note, place: str, offset: int) -> None:
        followed = self._followed.get(delivery.life)
        if followed is None:
            return
        topic = place.rpartition("/")[0]
        if topic == self._shortest and note.is_expedited and followed.place is None:
            followed.place, followed.offset = place, offset
        elif len(delivery.attempts) > followed.attempts:
            followed.is_tried = True
            followed.got = _last_result(delivery)
        else:
            followed.outcome = ENDED if topic == self._dead else note.why or LATER

    def _see_done(self, commits: Mapping[str, Commit]) -> None:
        for each in self._followed.values():
            commit = commits.get(each.place or "")
            if each.outcome == ON_ITS_WAY and commit is not None and commit.covers(each.offset):
                each.is_tried = True


def _last_result(delivery: Delivery) -> str:
    """Return the status that the last attempt got, or the kind of its failure."""
    if not delivery.attempts:
        return ""
    return result_label(delivery.attempts[-1])
