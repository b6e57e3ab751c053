"""What is heard of an API that is cut, late, behind, or something else; and how much of it is kept.

what crosses                              what has to come of it
────────────────────────────────────────  ────────────────────────────────────────────────
a failure before anything was told        the end, with the reason
a failure after that                      another connection, later each time
a refusal at any time                     the end
away for longer than a process goes back  what is missing is told, with its time
an index that is behind, or held up       is told, and when it isn't any more
a program that is slow                    nothing is kept for it, nothing is lost
another process is asked for an event     its copy waits until that has read it
100,000 events                            memory as for a thousand
"""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.api import tail
from gateway.index.event_numbers import SLOTS
from gateway.listen import feed as feeds
from gateway.listen import listening as listenings
from gateway.listen.copies import target_of
from gateway.listen.feed import REACH, Feed, Heard, Missed
from gateway.listen.listening import Forwarder, Listening, Shown
from gateway.listen.live_events import LiveEvents
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.live_list import MAX_ROWS, LiveList, State
from tests.api.conftest import World, company, world, world_of
from tests.listen.cutting_proxy import CuttingProxy
from tests.sink import Answer, Sink

pytestmark = pytest.mark.rotated(group="feed")

__all__ = ["company", "world"]
NOW = datetime.now(UTC).timestamp()
CURRENT = {"complete_to": datetime.fromtimestamp(NOW, UTC).isoformat(), "problem": None}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(feeds, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(tail, "SKEW", 0.0)  # one clock, which hardly goes on by itself


def number(at: float, slot: int = 0) -> int:
    return int(at * 1000) * SLOTS + slot


def told(kind: str, at: int, data: object) -> bytes:
    return f"id: {at}\nevent: {kind}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


def event(at: int, name: str, **changes: Any) -> bytes:
    stored_at = datetime.fromtimestamp(at // SLOTS / 1000, UTC).isoformat()
    fields: dict[str, object] = {
        "id": f"evt_{name}",
        "source": "github",
        "type": "push",
        "key": None,
        "size": 2,
        "status": "pending",
        "received_at": stored_at,
        "stored_at": stored_at,
        "position": f"events/0@{name}",
        "deliveries": [],
    }
    return told("event", at, {**fields, **changes})


class Scripted:
    """An API that answers each request for its tail by the next of its script, and then goes on without an end."""

    def __init__(self, *script: bytes | web.Response, now: float = NOW) -> None:
        self.asked: list[str | None] = []
        self._script = list(script)
        self._now = now

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.headers.get("Last-Event-ID"))
        answer = self._script.pop(0) if self._script else b": nothing more\n\n"
        if isinstance(answer, web.Response):
            return answer
        date = format_datetime(datetime.fromtimestamp(self._now, UTC), usegmt=True)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Date": date})
        await response.prepare(request)
        await response.write(answer)
        if not self._script and answer.startswith(b":"):
            await asyncio.Event().wait()
        return response


@asynccontextmanager
async def heard_from(api: Scripted, query: str = "") -> AsyncIterator[Callable[[int], Any]]:
    """Serve an API; yields a function that returns the next so many that are heard of it."""
    application = web.Application()
    application.router.add_get("/api/v1/tail", api.serve)
    async with (
        TestServer(application) as server,
        ApiClient(str(server.make_url("/")), None) as client,
        aclosing(Feed(client, query).events()) as events,
    ):

        async def following(count: int) -> list[Heard | State | Missed]:
            async with asyncio.timeout(30):
                return [await anext(events) for _ in range(count)]

        yield following


def names(heard: list[Heard | State | Missed]) -> list[str]:
    return [each.id for each in heard if isinstance(each, Heard)]


async def test_it_goes_on_after_a_cut_without_what_it_has_heard() -> None:
    first, second = number(NOW), number(NOW + 5)
    api = Scripted(
        told("progress", first, CURRENT) + event(second, "1") + event(second + 1, "2") + b"id: 9\ndata: {",
        event(second, "2") + event(second + 1, "1") + event(second + 2, "3"),
    )
    async with heard_from(api) as following:
        [listens, *told_at_once, cut, back, third] = await following(6)
    assert (listens, back) == (State(""), State(""))
    assert names([*told_at_once, third]) == ["evt_1", "evt_2", "evt_3"]
    assert isinstance(cut, State)
    assert "reconnecting in" in cut.text
    assert api.asked[0] is None
    assert api.asked[1] is not None
    assert first < int(api.asked[1]) < second


async def test_waits_get_longer_until_something_new_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def slept(delay: float) -> None:
        waits.append(delay)
        await sleep(0)

    monkeypatch.setattr(feeds, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(feeds, "LONGEST_WAIT", 8.0)
    monkeypatch.setattr(asyncio, "sleep", slept)  # half a minute of waits in a moment
    at = number(NOW)
    begin = told("progress", at, CURRENT)
    busy = web.Response(status=503, headers={"Retry-After": "5"}, body=orjson.dumps({"detail": "busy"}))
    api = Scripted(begin, begin, begin, begin, begin, begin, told("progress", at + 1, CURRENT), busy, begin)
    async with heard_from(api) as following:
        while len(waits) < 8:
            await following(1)
    longest = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 1.0]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=False)), waits
    assert waits[7] == 5.0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (web.Response(status=404), "404: Not Found"),
        (web.Response(status=302, headers={"Location": "https://elsewhere.example/"}), "302: Found"),
        (web.Response(text="hello"), "expected the events of a gateway, got text/plain"),
        (b"event: event\ndata: []\n\n", "the answer isn't a live tail of a gateway"),
        (b"event: progress\nid: x\ndata: {}\n\n", "the answer isn't a live tail of a gateway"),
    ],
)
async def test_what_isnt_the_api_is_told_at_once(answer: bytes | web.Response, text: str) -> None:
    async with heard_from(Scripted(answer)) as following:
        with pytest.raises(ApiUnavailableError, match=text):
            await following(1)


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_refusal_is_the_end_at_any_time(status: int) -> None:
    refusal = web.Response(status=status, body=orjson.dumps({"detail": "expected a token\nor two"}))
    async with heard_from(Scripted(told("progress", number(NOW), CURRENT), refusal)) as following:
        with pytest.raises(ApiRefusedError, match=f"{status}: expected a token\nhttp://.*: {status}: or two"):
            await following(3)


async def test_what_is_too_old_to_be_told_is_named() -> None:
    assert REACH == tail.FURTHEST
    long_ago = NOW - REACH - 600
    api = Scripted(told("progress", number(long_ago), CURRENT), b": back\n\n", now=NOW)
    async with heard_from(api) as following:
        [_, _, missed] = await following(3)
    assert isinstance(missed, Missed)
    assert missed.since == pytest.approx(long_ago, abs=0.02)
    assert missed.until == pytest.approx(NOW - REACH, abs=3)


async def test_an_index_that_is_behind_is_told_and_that_it_has_caught_up() -> None:
    late = datetime.fromtimestamp(NOW - 60, UTC).isoformat()
    at = number(NOW)
    api = Scripted(
        told("progress", at, {"complete_to": None, "problem": None})
        + told("progress", at, {"complete_to": late, "problem": None})
        + event(at + 1, "1")
        + told("progress", at, {"complete_to": late, "problem": "the log is unavailable"})
        + told("progress", at, CURRENT)
    )
    async with heard_from(api) as following:
        heard = await following(5)
    texts = [each.text for each in heard if isinstance(each, State)]
    assert texts[0] == "the index isn't complete to any time yet"
    assert texts[1].startswith("the index is behind, complete to ")
    assert texts[2].endswith(": the log is unavailable")
    assert texts[3] == ""


async def test_why_it_is_cut_is_told() -> None:
    problem = {"detail": "a listener has to read what it is sent within 10 s", "code": "busy"}
    api = Scripted(told("progress", number(NOW), CURRENT) + b"event: cut\ndata: " + orjson.dumps(problem) + b"\n\n")
    async with heard_from(api) as following:
        [_, cut] = await following(2)
    assert isinstance(cut, State)
    assert "a listener has to read what it is sent within 10 s" in cut.text


async def test_for_a_slow_program_nothing_is_kept_and_nothing_is_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "POLL", 0.01)
    monkeypatch.setattr(listenings, "WAITING", 3)
    waiting, most, sent = 0, 0, list[str]()

    async def show(each: Shown | State | Missed) -> None:
        nonlocal waiting, most
        if isinstance(each, Shown):
            waiting += 1 if each.sent is None else -1
            most = max(most, waiting)
            sent.extend([] if each.sent is None else [each.event.id])

    async with (
        CuttingProxy(world.client.port or 0, seed=2) as proxy,
        Sink(Answer(delay=0.02)) as sink,
        ApiClient(proxy.url, None) as api,
        Forwarder(api, target_of(sink.url, allowed_host=None)) as forwarder,
        asyncio.TaskGroup() as tasks,
    ):
        listening = tasks.create_task(Listening(Feed(api, ""), forwarder, show).run())
        await asyncio.sleep(0.3)
        stored = [str((await world.company.event())[0].id) for _ in range(60)]
        await world.refresh()
        await sink.received(5)
        proxy.cut_all()
        await sink.received(60, timeout=60)
        await asyncio.sleep(0.3)
        listening.cancel()
        assert sent == stored
        assert [request.header("gateway-event-id") for request in sink.requests] == stored
        assert most <= 3 + 2, "those that wait, the one that is sent, and the one that is heard"


async def test_a_copy_waits_for_a_process_whose_index_is_behind(world: World, tmp_path: Path) -> None:
    """Of several processes behind one address, one tells of an event, and another is asked for it."""
    (other_folder := tmp_path / "other").mkdir()
    shown: list[Shown] = []
    waits, done = asyncio.Event(), asyncio.Event()

    async def show(each: Shown | State | Missed) -> None:
        if isinstance(each, Shown):
            shown.append(each)
            if "the index is behind" in each.waits_for:
                waits.set()
            if each.sent is not None:
                done.set()

    async with (
        world_of(world.company, other_folder) as other,
        Sink() as sink,
        ApiClient(str(world.client.make_url("/")), None) as telling,
        ApiClient(str(other.client.make_url("/")), None) as asked,
        Forwarder(asked, target_of(sink.url, allowed_host=None)) as forwarder,
        asyncio.timeout(30),
        asyncio.TaskGroup() as tasks,
    ):
        await world.refresh()
        await other.refresh()
        listening = tasks.create_task(Listening(Feed(telling, ""), forwarder, show).run())
        await asyncio.sleep(0.3)
        stored = (await world.company.event())[0].id
        await world.refresh()
        await waits.wait()
        await other.refresh()
        await done.wait()
        listening.cancel()
        assert [request.header("gateway-event-id") for request in sink.requests] == [stored]
    assert [each.sent.status for each in shown if each.sent] == [200]


async def test_memory_doesnt_grow_with_100_000_events() -> None:
    count, at = 100_000, number(NOW)

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for begin in range(0, count, 500):
            await response.write(b"".join([event(at + n * SLOTS, str(n)) for n in range(begin, begin + 500)]))
        await asyncio.Event().wait()
        return response

    application = web.Application()
    application.router.add_get("/api/v1/tail", serve)
    rows, peaks = LiveList(), list[int]()
    async with TestServer(application) as server, ApiClient(str(server.make_url("/")), None) as api:
        live = LiveEvents(None)
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(Listening(Feed(api, ""), None, live.show).run())
            tracemalloc.start()
            async with aclosing(live.items()) as items:  # type: ignore[type-var]
                heard = 0
                async for each in items:
                    if isinstance(each, State):
                        continue
                    rows.put(each)
                    heard += 1
                    if heard in (10_000, count):
                        peaks.append(tracemalloc.get_traced_memory()[1])
                    if heard == count:
                        break
            tracemalloc.stop()
            listening.cancel()
    assert rows.total == MAX_ROWS
    assert rows.dropped == count - MAX_ROWS
    assert peaks[1] < peaks[0] + (1 << 20), peaks


async def test_an_event_that_isnt_in_the_log_any_more_is_told_and_the_next_one_is_sent() -> None:
    at = number(NOW)
    answers = {"events/0@1": 404, "events/0@2": 503, "events/0@3": 200}
    asked: list[str] = []

    async def raw(request: web.Request) -> web.Response:
        position = request.match_info["event"]
        asked.append(position)
        status = answers[position]
        if status == 404:
            problem = {"code": "not_found", "detail": "expected the record of evt_1 in the log, got none"}
            return web.json_response(problem, status=404)
        answers[position] = 200
        found = {"id": f"evt_{position[-1]}", "headers": [], "body_base64": ""}
        return web.json_response(found) if status == 200 else web.Response(status=status)

    async def me(_: web.Request) -> web.Response:
        return web.json_response({"role": "reader"})

    shown: list[Shown] = []
    done = asyncio.Event()

    async def show(each: Shown | State | Missed) -> None:
        if isinstance(each, Shown):
            shown.append(each)
            if len([one for one in shown if one.sent]) == 3:
                done.set()

    api = Scripted(event(at, "1") + event(at + 1, "2") + event(at + 2, "3"))
    application = web.Application()
    application.router.add_get("/api/v1/tail", api.serve)
    application.router.add_get("/api/v1/me", me)
    application.router.add_get("/api/v1/events/{event}/raw", raw)
    async with (
        TestServer(application) as server,
        Sink() as sink,
        ApiClient(str(server.make_url("/")), None) as client,
        Forwarder(client, target_of(sink.url, allowed_host=None)) as forwarder,
        asyncio.timeout(30),
        asyncio.TaskGroup() as tasks,
    ):
        listening = tasks.create_task(Listening(Feed(client, ""), forwarder, show).run())
        await done.wait()
        listening.cancel()
    first, *others = [each.sent for each in shown if each.sent]
    assert (first.is_success, first.status, first.detail) == (False, None, "the API doesn't have it any more")
    assert [each.status for each in others] == [200, 200]
    assert asked == ["events/0@1", "events/0@2", "events/0@2", "events/0@3"]
    assert "503" in next(each.waits_for for each in shown if "http" in each.waits_for)
    assert [request.header("gateway-event-id") for request in sink.requests] == ["evt_2", "evt_3"]
