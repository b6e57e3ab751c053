"""Deliveries by the API, with what was responded to them, where that may be read, and without it elsewhere."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.index.delivery_query import WAITING, DeliveryQuery
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.api_deliveries import ApiDeliveries

AT = "2026-12-01T06:00:00.000Z"
INDEX: dict[str, Any] = {"complete_to": AT, "statuses_as_of": AT, "unread_records": 0, "problem": None}


def item(position: str, response: str | None) -> dict[str, Any]:
    """Return a delivery of a list: several of one event's id have one id as well."""
    event: dict[str, Any] = {"id": "evt_1", "source": "a", "type": "b", "key": None, "size": 1, "received_at": AT}
    event |= {"stored_at": AT, "position": position, "status": "retrying", "deliveries": []}
    delivery: dict[str, Any] = {"id": "dlv_1", "route": "r", "destination": "d", "item": None, "status": "retrying"}
    delivery |= {"replayed_at": None, "due": None, "reason": None, "detail": None, "attempts": [], "response": response}
    return {"event": event, "delivery": delivery, "since": AT, "tried": 1}


@asynccontextmanager
async def asking(answer: Callable[[web.Request], web.Response]) -> AsyncIterator[ApiDeliveries]:
    async def serve(request: web.Request) -> web.Response:
        return answer(request)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", serve)
    async with TestServer(application) as server, ApiClient(str(server.make_url("/")), None) as client:
        yield ApiDeliveries(client)


def page(*items: dict[str, Any]) -> web.Response:
    return web.json_response({"items": items, "next_cursor": None, "unrecorded_since": AT, "index": INDEX})


async def test_each_has_its_own_response_also_those_of_one_id() -> None:
    asked: list[str] = []

    def answer(request: web.Request) -> web.Response:
        asked.append(request.query_string)
        return page(item("events/0@1", "one"), item("events/0@2", "two"), item("events/0@3", None))

    async with asking(answer) as deliveries:
        listed = await deliveries.listed(DeliveryQuery(statuses=WAITING, route="r"), 20)
        bodies = [deliveries.responses.get(each.cursor) for each in listed.found]
    assert [None if each is None else each.body for each in bodies] == [b"one", b"two", None]
    assert listed.unrecorded is not None
    assert deliveries.problem == ""
    assert asked == ["limit=20&include_responses=true&route=r&status=parked,pending,retrying"]


@pytest.mark.parametrize("code", ["forbidden", "log_unavailable"])
async def test_without_responses_the_rest_is_listed_all_the_same(code: str) -> None:
    def answer(request: web.Request) -> web.Response:
        if "include_responses" in request.query:
            return web.json_response({"code": code, "detail": "expected more"}, status=403 if "f" in code else 503)
        return page(item("events/0@1", None))

    async with asking(answer) as deliveries:
        listed = await deliveries.listed(DeliveryQuery(), 20)
    assert [each.event.position for each in listed.found] == ["events/0@1"]
    assert deliveries.responses == {}
    assert "expected more" in deliveries.problem


@pytest.mark.parametrize(("status", "code"), [(401, "unauthenticated"), (503, "index_unavailable")])
async def test_any_other_failure_is_one(status: int, code: str) -> None:
    def answer(_: web.Request) -> web.Response:
        return web.json_response({"code": code, "detail": "expected more"}, status=status)

    async with asking(answer) as deliveries:
        with pytest.raises((ApiRefusedError, ApiUnavailableError), match=f"{status}: expected more"):
            await deliveries.listed(DeliveryQuery(), 20)
