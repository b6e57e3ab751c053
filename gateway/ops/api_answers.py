"""What the API of a process answers, as the values that the log and the index would have: so both are shown alike."""

from base64 import b64decode
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson

from gateway.client.request import Outbound
from gateway.index.reading import Currency
from gateway.index.results import IndexedAttempt, IndexedDelivery, IndexedEvent, ListedDelivery
from gateway.index.settlement import DeliverySummary
from gateway.index.statuses import Status
from gateway.log.audit_records import ActOutcome, AuditRecord
from gateway.log.base import Partition, Record
from gateway.model import DeadReason, Event, EventId, Headers
from gateway.ops.api_client import ApiClient
from gateway.ops.audit import Act, UnreadableAct
from gateway.ops.dead_letters import ListedLetter
from gateway.ops.explain import Explained, ExplainedRoute, Planned
from gateway.ops.log_search import Found
from gateway.rules.request_templates import Method
from gateway.rules.rules import Contact

Answer = Mapping[str, Any]


async def searched(
    client: ApiClient, query: str, limit: int
) -> AsyncGenerator[tuple[IndexedEvent | None, Currency], None]:
    """Yield the newest events that match a query, so many at most; at last, none with how current the index is."""
    currency = Currency(complete_to=0.0, settled_at=0.0)
    async for page in client.pages("events", limit=limit, query=query):
        currency = currency_of(page["index"])
        for item in page["items"]:
            yield event_of(item), currency
    yield None, currency


async def stored(client: ApiClient, name: str) -> tuple[Found, Event, int]:
    """Return where an event is, its headers and body as people may see them, and the size of its body."""
    raw = await client.get("events", name, "raw")
    partition, offset = _place_of(raw["position"])
    event = event_in(raw)
    assert partition is not None, raw["position"]
    return Found(partition, Record(offset, event.received_at, b"", event.body, ())), event, raw["size"]


def event_in(raw: Answer) -> Event:
    """Return an event that is told byte for byte."""
    return Event(
        id=EventId(raw["id"]),
        source=raw["source"],
        type=raw["type"],
        key=raw["key"],
        received_at=time_of(raw["received_at"]),
        headers=tuple([(b64decode(each["name_base64"]), b64decode(each["value_base64"])) for each in raw["headers"]]),
        query=raw["query"],
        body=b64decode(raw["body_base64"]),
    )


def headers_in(detail: Answer) -> Headers:
    """Return the headers with which an event came, also if the body that is told of it is another."""
    return tuple([(each["name"].encode(), (each["value"] or "").encode()) for each in detail["headers"] or ()])


def event_of(item: Answer, number: int = 0) -> IndexedEvent:
    """Return an event of a list; the API tells no number of it."""
    partition, offset = _place_of(item["position"])
    return IndexedEvent(
        number=number,
        id=item["id"],
        source=item["source"],
        type=item["type"],
        key=item["key"],
        received_at=time_of(item["received_at"]),
        appended_at=time_of(item["stored_at"]),
        partition=partition,
        offset=offset,
        size=item["size"],
        is_cut=False,
        status=Status(item["status"]),
        summaries={
            DeliverySummary(each["route"], each["destination"], Status(each["status"])): each["count"]
            for each in item["deliveries"]
        },
        left_out=item.get("deliveries_left_out", 0),  # one of before this was told has told all of them
    )


def listed_of(item: Answer, number: int) -> ListedDelivery:
    """Return a delivery of a list, beside its event, to which a number is given."""
    return ListedDelivery(
        event=event_of(item["event"], number),
        delivery=delivery_of(item["delivery"]),
        since=time_of(item["since"]),
        tried=item["tried"],
    )


def delivery_of(item: Answer) -> IndexedDelivery:
    """Return a delivery, with its attempts."""
    return IndexedDelivery(
        id=item["id"],
        route=item["route"],
        destination=item["destination"],
        item=item["item"],
        status=Status(item["status"]),
        replayed_at=time_of(item["replayed_at"]),
        due=time_of(item["due"]),
        reason=item["reason"] or "",
        detail=item["detail"] or "",
        partition=None,
        offset=0,
        attempts=tuple([_attempt(each) for each in item["attempts"]]),
    )


def _attempt(item: Answer) -> IndexedAttempt:
    partition, offset = _place_of(item["position"])
    return IndexedAttempt(
        number=item["number"],
        at=time_of(item["at"]),
        seconds=item["seconds"],
        result=item["result"],
        status=item["status"],
        decision=item["decision"] or "",
        detail=item["detail"] or "",
        partition=partition,
        offset=offset,
    )


def currency_of(index: Answer) -> Currency:
    """Return how current an index is."""
    return Currency(complete_to=time_of(index["complete_to"]), settled_at=time_of(index["statuses_as_of"]))


def letter_of(item: Answer) -> ListedLetter:
    """Return a dead letter of a list."""
    number, _, offset = item["position"].partition("@")
    is_readable = item["delivery_id"] is not None
    detail = item["detail"] or ""
    return ListedLetter(
        partition=Partition(item["topic"], int(number)),
        offset=int(offset),
        at=time_of(item["at"]),
        status=item["status"],
        reason=item["reason"],
        detail=detail,
        delivery_id=item["delivery_id"],
        event_id=item["event_id"] or "",
        received_at=None,
        source=item["source"] or "",
        type=item["type"] or "",
        route=item["route"] or "",
        destination=item["destination"] or "",
        item=item["item"],
        attempts=item["attempts"],
        last_result=item["last_result"] or detail,
        owner=(item["owner"] or "") if is_readable else "",
    )


def act_of(item: Answer) -> Act | UnreadableAct:
    """Return an act of the audit."""
    if item["problem"] is not None:
        return UnreadableAct(position=item["position"], at=time_of(item["at"]), problem=item["problem"])
    record = AuditRecord(
        id=item["id"],
        at=time_of(item["at"]),
        who=item["who"],
        via=item["via"],
        is_proven=item["is_proven"],
        origin=item["origin"],
        what=item["what"],
        on=item["on"],
        why=item["why"] or "",
    )
    return Act(
        record=record,
        outcome=ActOutcome(item["outcome"] or ActOutcome.BEGUN),
        detail=item["detail"] or "",
        ended_at=None if item["outcome_at"] is None else time_of(item["outcome_at"]),
    )


def exported_of(item: Answer) -> dict[str, object]:
    """Return an event as a file of exported events has it."""
    fields = {name: value for name, value in item.items() if name not in ("headers", "body", "body_base64", "withheld")}
    body = {name: item[name] for name in ("body", "body_base64") if item[name] is not None}
    withheld: dict[str, object] = {"withheld": tuple(item["withheld"])} if item["withheld"] else {}
    return {**fields, "headers": [[each["name"], each["value"]] for each in item["headers"]], **body, **withheld}


def explained_of(answer: Answer, event: Event) -> Explained:
    """Return an explanation; `event` has the headers that the answer leaves out, and its body unless it is told."""
    every = [request for each in answer["routes"] for request in each["requests"]]
    sent = [_body_of(each) for each in every if each["is_event_body"] and not each["is_body_left_out"]]
    body = sent[0] if sent else event.body
    routes = tuple([_route(each, body) for each in answer["routes"]])
    seen = Event(
        id=EventId(answer["event_id"]),
        source=answer["source"],
        type=answer["type"],
        key=answer["key"],
        received_at=event.received_at,
        headers=event.headers,
        query=event.query,
        body=body,
    )
    as_read = answer["body_as_read"]
    return Explained(
        event=seen,
        rules=answer["rules"],
        identified_by=answer["identified_by"] or "",
        dedupe=answer["dedupe_seconds"],
        body_warnings=tuple(answer["body_warnings"]),
        body_as_read="" if as_read is None else orjson.dumps(as_read).decode(),
        routes=routes,
        routes_left_out=answer["routes_left_out"],
    )


LEFT_OUT = b"(a body that the API doesn't tell: those before it are long)"


def _route(item: Answer, event_body: bytes) -> ExplainedRoute:
    return ExplainedRoute(
        name=item["name"],
        is_matched=item["is_matched"],
        reason=item["reason"],
        requests=tuple([_planned(each, event_body) for each in item["requests"]]),
        requests_in_all=item["requests_in_all"],
        contact=Contact(item["owner"] or "", item["runbook"] or ""),
        halts=item["halts"],
        wait=item["wait"] or "",
    )


def _planned(item: Answer, event_body: bytes) -> Planned:
    if item["problem"] is not None:
        return Planned(
            destination=item["destination"] or "",
            request=None,
            part=item["item"],
            problem=item["problem"],
            reason=DeadReason(item["dead_reason"]),
            available_fields=item["available_fields"] or "",
        )
    headers: Sequence[Answer] = item["headers"]
    left_out = event_body if item["is_event_body"] else LEFT_OUT
    request = Outbound(
        url=item["url"],
        headers=tuple([(each["name"].encode(), each["value"].encode()) for each in headers]),
        body=left_out if item["is_body_left_out"] else _body_of(item),
        method=Method(item["method"]),
    )
    return Planned(destination=item["destination"], request=request, part=item["item"])


def _body_of(item: Answer) -> bytes:
    text: str | None = item["body"]
    return b64decode(item["body_base64"]) if text is None else text.encode()


def _place_of(position: str | None) -> tuple[Partition | None, int]:
    """Return where a record is, by TOPIC/PARTITION@OFFSET; no partition if that isn't known."""
    topic, _, place = (position or "").rpartition("/")
    number, _, offset = place.partition("@")
    return (Partition(topic, int(number)), int(offset)) if topic else (None, 0)


def time_of(text: str | None) -> float:
    """Return a time in Unix seconds, 0 for none."""
    return 0.0 if text is None else datetime.fromisoformat(text).timestamp()
