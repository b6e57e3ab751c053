"""What a redelivery asks for, and what has come of it, as control records have both. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.log.json_fields import PARTITION_NAME, JsonFields

FORMAT = 2
"""Version of the value of a command to redeliver: an owner of the jobs who doesn't know them leaves it to one who does,
as it leaves whatever a newer version has written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redelivery:
    """One event that is to be delivered again: by all routes that take it, or by one; to all destinations, or to one.

    Its record is at `offset` of `partition` ("topic/partition"), and `event` is the id that it has there. `reason` is
    why an operator wants it, "" if that wasn't said.
    """

    event: str
    partition: str
    offset: int
    route: str | None = None
    destination: str | None = None
    reason: str = ""

    @property
    def position(self) -> str:
        """Where its record is, as commands name it."""
        return f"{self.partition}@{self.offset}"

    def as_json(self) -> dict[str, Any]:
        fields = {
            "event": self.event,
            "partition": self.partition,
            "offset": self.offset,
            "route": self.route,
            "destination": self.destination,
            "reason": self.reason or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliveryResult:
    """What a redelivery has made of one delivery.

    It is "queued" in the shortest tier, or "dead": a dead letter, as its route can't say whether it takes the event, or
    where it goes. `paused_by` is the paused name ("route/…" or "destination/…") until whose resume it will be parked.
    """

    route: str
    destination: str
    outcome: Literal["queued", "dead"]
    paused_by: str = ""

    def as_json(self) -> dict[str, Any]:
        paused = {"paused_by": self.paused_by} if self.paused_by else {}
        return {"route": self.route, "destination": self.destination, "outcome": self.outcome, **paused}


def as_json(asked: Redelivery | None, results: Sequence[RedeliveryResult]) -> dict[str, Any]:
    """Return the fields of a control record that are a redelivery's; none if it isn't about one."""
    fields: dict[str, Any] = {} if asked is None else {"v": FORMAT, "redelivery": asked.as_json()}
    return fields | ({"results": [each.as_json() for each in results]} if results else {})


def decode_redelivery(fields: JsonFields) -> Redelivery:
    """Read what a redelivery asks for. Raises UndecodableRecordError."""
    fields.allow("event", "partition", "offset", "route", "destination", "reason")
    return Redelivery(
        event=fields.text("event"),
        partition=fields.text("partition", like=PARTITION_NAME, expected="topic/partition"),
        offset=fields.integer("offset"),
        route=fields.text("route") if fields.has("route") else None,
        destination=fields.text("destination") if fields.has("destination") else None,
        reason=fields.text("reason") if fields.has("reason") else "",
    )


def decode_results(body: JsonFields) -> tuple[RedeliveryResult, ...]:
    """Read the results in a record. Raises UndecodableRecordError."""
    return tuple([_result(each) for each in body.each("results")]) if body.has("results") else ()


def _result(fields: JsonFields) -> RedeliveryResult:
    outcome = fields.text("outcome")
    if outcome not in ("queued", "dead"):
        raise fields.error("outcome", "queued or dead")
    return RedeliveryResult(
        route=fields.text("route"),
        destination=fields.text("destination"),
        outcome="queued" if outcome == "queued" else "dead",
        paused_by=fields.text("paused_by") if fields.has("paused_by") else "",
    )
