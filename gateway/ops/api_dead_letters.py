"""Dead letters by the API of a process."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties
from gateway.log.base import Record
from gateway.log.json_fields import JsonFields
from gateway.log.records import StoredDelivery, decode_record_metadata
from gateway.model import Attempt, Delivery, DeliveryId, Part, Result
from gateway.ops.api_answers import Answer, event_in, letter_of, time_of
from gateway.ops.api_client import ApiClient, ApiUnavailableError
from gateway.ops.dead_letters import DeadLetter, ListedLetter, not_open, unreadable
from gateway.ops.output import rfc3339


class ApiDeadLetters:
    """Dead letters by the API. `unread` has the names of partitions that couldn't be read."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self.unread = set[str]()

    async def read(self, which: DeadFilter, *, include_resolved: bool = False) -> AsyncGenerator[ListedLetter, None]:
        """Yield the dead letters that a filter covers, newest first: the open ones, or all of them."""
        for name in which.ids or ("",):
            pages = self._client.pages(
                "dead-letters",
                id=name,
                reason=which.reason,
                include_resolved=include_resolved,
                route=which.route,
                destination=which.destination,
                since=_time(which.since),
                until=_time(which.until),
            )
            async with aclosing(pages):
                async for page in pages:
                    self.unread |= set(page["unread_partitions"])
                    for item in page["items"]:
                        yield letter_of(item)

    async def deliveries_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the ids of the deliveries that have open dead letters under these names, each of which has one.

        Raises UsageError for a name without one, and ApiUnavailableError if a partition that may have it can't be read.
        """
        ids: dict[str, None] = {}
        missing: list[str] = []
        for name in names:
            letters = [each async for each in self.read(DeadFilter(ids=(name,)))]
            for each in letters:
                if each.delivery_id is None:
                    raise unreadable(name, each.detail)
                ids[each.delivery_id] = None
            missing += [] if letters else [name]
        if missing and self.unread:
            told = f"{', '.join(missing)}: expected the id of an open dead letter, got none in what can be read"
            raise ApiUnavailableError(f"{told}: {', '.join(sorted(self.unread))} can't be now")
        if missing:
            raise not_open(missing)
        return tuple(ids)

    async def show(self, name: str) -> list[DeadLetter]:
        """Return the dead letters of a delivery or an event, or the one at a position: also resolved ones."""
        found = [each async for each in self.read(DeadFilter(ids=(name,)), include_resolved=True)]
        return [_shown(each, await self._client.get("dead-letters", each.position)) for each in found]


def _shown(listed: ListedLetter, answer: Answer) -> DeadLetter:
    """Return a dead letter with its attempts and its event, as far as they are told."""
    item = answer["letter"]
    resolved_by = None
    if item["resolved_at"] is not None:
        action: Literal["replay", "drop"] = "replay" if item["status"] == "replayed" else "drop"
        resolved_by = ControlRecord(kind="dead", name="", state="done", at=time_of(item["resolved_at"]), action=action)
    raw = answer["event"]
    return DeadLetter(
        partition=listed.partition,
        record=Record(listed.offset, listed.at, b"", b"", ()),
        properties=DeadLetterProperties(
            id=listed.delivery_id or "",
            route=listed.route,
            destination=listed.destination,
            reason=listed.reason,
            at=listed.at,
        ),
        decoded=None if raw is None else _decoded(listed, answer),
        problem="its event is for the role reader" if raw is None and listed.delivery_id is not None else listed.detail,
        resolved_by=resolved_by,
    )


def _decoded(listed: ListedLetter, answer: Answer) -> StoredDelivery:
    delivery = Delivery(
        id=DeliveryId(listed.delivery_id or ""),
        event=event_in(answer["event"]),
        route=listed.route,
        destination=listed.destination,
        attempts=tuple([attempt_of(each) for each in answer["attempts"]]),
        part=None if listed.item is None else Part(listed.item, ""),
    )
    fields = JsonFields("metadata", dict(answer["metadata"]))
    return StoredDelivery(delivery=delivery, metadata=decode_record_metadata(fields), at=listed.at)


def attempt_of(item: Answer) -> Attempt:
    """Return an attempt as the log has it."""
    return Attempt(
        number=item["number"],
        at=time_of(item["at"]),
        seconds=item["seconds"],
        result=Result(item["result"]),
        status=item["status"],
        detail=item["detail"] or "",
    )


def _time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)
