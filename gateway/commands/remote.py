"""Commands that ask the API of a process instead of the log and the index: `--api URL`, from any machine.

The answers become what the log and the index would have said, so that they are shown alike.
"""

import asyncio
import os
import uuid
from base64 import b64decode
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from gateway.commands.base import Invocation
from gateway.engine.control.records import ControlRecord
from gateway.index.reading import Currency
from gateway.index.results import IndexedAttempt, IndexedDelivery, IndexedEvent
from gateway.index.settlement import DeliverySummary
from gateway.index.statuses import Status
from gateway.log.base import Partition, Record
from gateway.model import Event, EventId, GatewayError, UsageError
from gateway.ops.control_client import POLL_EVERY, Pause, StoredCommand
from gateway.ops.log_search import Found

if TYPE_CHECKING:
    from gateway.engine.control.records import Kind, State

TIMEOUT = 30.0
"""Seconds for an answer: each has its bounds, of ten seconds at most."""
MOST_ITEMS = 200
POLL = 5 * POLL_EVERY
"""Seconds between questions what has come of an order."""


class ApiUnavailableError(GatewayError):
    """The process that is asked, or the way to it, is at fault: there is no answer, or it can't give one now."""


class ApiClient:
    """Asks the API of one process. A context manager.

    Each method raises ApiUnavailableError, and UsageError with what the API says of a request that isn't right.
    """

    def __init__(self, url: str, token: str | None) -> None:
        """Raises UsageError for an invalid URL."""
        try:
            self._base = URL(url).origin() / "api" / "v1"
        except ValueError:
            raise UsageError(f"--api: expected a URL such as http://127.0.0.1:9090, got {url!r}") from None
        self.url = str(self._base.origin())
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=TIMEOUT))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, *path: str, **parameters: str | int | None) -> Mapping[str, Any]:
        """Return the answer at a path, whose parts may have any characters."""
        return await self._ask("GET", path, params={name: each for name, each in parameters.items() if each})

    async def post(self, *path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Give an order, once, though it may take several tries."""
        headers = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
        try:
            return await self._ask("POST", path, json=body, headers=headers)
        except ApiUnavailableError:
            await asyncio.sleep(POLL)
            return await self._ask("POST", path, json=body, headers=headers)

    async def _ask(self, method: str, path: tuple[str, ...], **given: Any) -> Mapping[str, Any]:  # noqa: ANN401 - aiohttp's
        parts = "/".join([quote(part, safe="") for part in path])
        url = URL(f"{self._base}/{parts}", encoded=True)
        try:
            async with self._session.request(method, url, allow_redirects=False, **given) as response:
                status, text = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise ApiUnavailableError(f"{self.url}: expected an answer of the API, got: {why}") from error
        try:
            answer = orjson.loads(text)
        except ValueError as error:
            raise ApiUnavailableError(f"{self.url}: expected an answer of the API, got {status}") from error
        if status < HTTPStatus.BAD_REQUEST:
            found: Mapping[str, Any] = answer
            return found
        detail = str(answer.get("detail", "")) if isinstance(answer, dict) else ""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ApiUnavailableError(f"{self.url}: {status}: {detail}")
        raise UsageError("\n".join([f"{self.url}: {status}: {line}" for line in detail.splitlines() or [""]]))


def client_of(call: Invocation) -> ApiClient:
    """Return the client that the arguments of a command ask for."""
    return ApiClient(call.arguments.api, call.arguments.token or os.environ.get("GATEWAY_TOKEN"))


class ApiControl:
    """Gives orders by the API; its methods are those of a `ControlClient`."""

    def __init__(self, client: ApiClient, why: str) -> None:
        self._client = client
        self._body = {"reason": why} if why else {}

    async def pause(self, name: str) -> Pause:
        """Stop the deliveries of "route/…" or "destination/…"."""
        order = await self._order(name, "pause")
        return Pause(_command(order), is_new=order["is_new"], offset=None)

    async def confirmed(self, pause: Pause, *, timeout: float) -> ControlRecord | None:
        """Return what applies to a paused name once a running gateway has read it; None if none has in time."""
        waited = 0.0
        while True:
            state = await self._client.get("orders", pause.command.key)
            if state["is_read"]:
                return _command(state)
            if waited >= timeout:
                return None
            await asyncio.sleep(POLL)
            waited += POLL

    async def resume(self, name: str) -> StoredCommand | None:
        """Resume a paused name; None if there is nothing to do."""
        order = await self._order(name, "resume")
        return StoredCommand(_command(order), 0) if order["is_new"] else None

    async def kick(self, name: str) -> StoredCommand:
        """Have everything that waits for a retry retried now."""
        return StoredCommand(_command(await self._order(name, "kick")), 0)

    async def finished(self, placed: StoredCommand, *, timeout: float) -> ControlRecord | None:
        """Return an order with its outcome; None if it hasn't ended in time. A newer one of its name ends it."""
        waited = 0.0
        while True:
            state = _command(await self._client.get("orders", placed.command.key))
            if state.state in ("done", "active"):
                return state
            if state.at != placed.command.at:
                return placed.command.with_state("cancelled")
            if waited >= timeout:
                return None
            await asyncio.sleep(POLL)
            waited += POLL

    async def has_begun(self, placed: StoredCommand) -> bool:
        """Return whether a gateway has read an order, and so begins to carry it out."""
        return bool((await self._client.get("orders", placed.command.key))["is_read"])

    async def _order(self, name: str, action: str) -> Mapping[str, Any]:
        kind, _, called = name.partition("/")
        return await self._client.post(f"{kind}s", called, action, body=self._body)


def _command(order: Mapping[str, Any]) -> ControlRecord:
    """Return an order, or what has come of it, as the log has it."""
    kind, _, name = order["id"].partition("/")
    return ControlRecord(
        kind=cast("Kind", kind),
        name=name,
        state=cast("State", order["state"]),
        at=_time(order["at"]),
        by=order["by"] or "",
        count=order.get("count", 0),
        tried=order.get("tried"),
        delivered=order.get("delivered"),
        waiting_by_reason=order.get("waiting", {}),
        failed_by_result=order.get("failed_by_result", {}),
        dead=order.get("dead", 0),
        unread=order.get("unread_partitions", 0),
        detail=order.get("detail") or "",
    )


async def searched(
    client: ApiClient, query: str, limit: int
) -> AsyncGenerator[tuple[IndexedEvent | None, Currency], None]:
    """Yield the newest events that match a query, so many at most; at last, none with how current the index is."""
    cursor: str | None = None
    while True:
        page = await client.get("events", query=query, limit=min(limit, MOST_ITEMS), cursor=cursor)
        currency = _currency(page["index"])
        for item in page["items"]:
            yield _event(item), currency
        limit, cursor = limit - len(page["items"]), page["next_cursor"]
        if cursor is None or limit <= 0:
            yield None, currency
            return


async def shown(client: ApiClient, name: str) -> tuple[Found, Event]:
    """Return an event with its headers and body, and where it is."""
    raw = await client.get("events", name, "raw")
    topic, _, place = raw["position"].rpartition("/")
    number, _, offset = place.partition("@")
    event = Event(
        id=EventId(raw["id"]),
        source=raw["source"],
        type=raw["type"],
        key=raw["key"],
        received_at=_time(raw["received_at"]),
        headers=tuple([(b64decode(each["name_base64"]), b64decode(each["value_base64"])) for each in raw["headers"]]),
        query=raw["query"],
        body=b64decode(raw["body_base64"]),
    )
    record = Record(int(offset), event.received_at, b"", event.body, ())
    return Found(Partition(topic, int(number)), record), event


async def deliveries(client: ApiClient, name: str) -> tuple[IndexedEvent, list[IndexedDelivery], Currency]:
    """Return what the index of the process has of an event."""
    found = await client.get("events", name)
    its: list[IndexedDelivery] = []
    cursor: str | None = None
    while True:
        page = await client.get("events", name, "deliveries", limit=MOST_ITEMS, cursor=cursor)
        its += [_delivery(each) for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return _event(found["event"]), its, _currency(page["index"])


def _event(item: Mapping[str, Any]) -> IndexedEvent:
    topic, _, place = (item["position"] or "").rpartition("/")
    number, _, offset = place.partition("@")
    return IndexedEvent(
        number=0,
        id=item["id"],
        source=item["source"],
        type=item["type"],
        key=item["key"],
        received_at=_time(item["received_at"]),
        appended_at=_time(item["stored_at"]),
        partition=Partition(topic, int(number)) if topic else None,
        offset=int(offset or 0),
        size=item["size"],
        is_cut=False,
        status=Status(item["status"]),
        summaries=tuple(
            [
                DeliverySummary(each["route"], each["destination"], Status(each["status"]))
                for each in item["deliveries"]
                for _ in range(each["count"])
            ]
        ),
    )


def _delivery(item: Mapping[str, Any]) -> IndexedDelivery:
    return IndexedDelivery(
        id=item["id"],
        route=item["route"],
        destination=item["destination"],
        item=item["item"],
        status=Status(item["status"]),
        replayed_at=_time(item["replayed_at"]),
        due=_time(item["due"]),
        reason=item["reason"] or "",
        detail=item["detail"] or "",
        partition=None,
        offset=0,
        attempts=tuple(
            [
                IndexedAttempt(
                    number=each["number"],
                    at=_time(each["at"]),
                    seconds=each["seconds"],
                    result=each["result"],
                    status=each["status"],
                    decision=each["sequel"] or "",
                    detail=each["detail"] or "",
                    partition=None,
                    offset=0,
                )
                for each in item["attempts"]
            ]
        ),
    )


def _currency(index: Mapping[str, Any]) -> Currency:
    return Currency(complete_to=_time(index["complete_to"]), settled_at=_time(index["statuses_as_of"]))


def _time(text: str | None) -> float:
    return 0.0 if text is None else datetime.fromisoformat(text).timestamp()
