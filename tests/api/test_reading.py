"""What the API shows: events, deliveries, dead letters, and the names of the rules."""

import asyncio
import gzip
from base64 import b64decode
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest

from gateway.access.principal import AccessRole
from gateway.api import backend as backend_module
from gateway.api import events as events_api
from gateway.api.cursors import LONGEST, encode_cursor
from gateway.api.endpoints import BASE
from gateway.engine.control.records import ControlRecord
from gateway.engine.delivery.holds import Hold
from gateway.index import search
from gateway.index.index import Index
from gateway.index.results import IndexedEvent
from gateway.log.attempt_records import Decision
from gateway.log.base import TopicSpec
from gateway.model import Event, ResponseExcerpt, Result
from tests.api.conftest import RULES, World, world_of
from tests.builders import an_attempt
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog


async def test_events_are_found_page_by_page_while_others_arrive(world: World) -> None:
    stored = [(await world.company.event(body={"n": number}))[0].id for number in range(5)]
    await world.refresh()
    first = await world.get("/events", query="source:github", limit=2)
    assert [each["id"] for each in first["items"]] == stored[:2:-1]
    await world.company.event()
    await world.refresh()
    second = await world.get("/events", query="source:github", limit=2, cursor=first["next_cursor"])
    third = await world.get("/events", query="source:github", limit=2, cursor=second["next_cursor"])
    assert [each["id"] for each in second["items"] + third["items"]] == stored[2::-1]
    assert third["next_cursor"] is None
    assert first["index"]["complete_to"] is not None


async def test_a_cursor_of_another_list_is_refused(world: World) -> None:
    for _ in range(3):
        await world.company.event()
    await world.refresh()
    page = await world.get("/events", limit=1)
    for cursor in (page["next_cursor"], "x", "W10", "e30"):
        refused = await world.get("/events", 400, query="type:push", cursor=cursor)
        assert (refused["code"], refused["status"]) == ("invalid_cursor", 400)
    assert len((await world.get("/events", limit=1, cursor=page["next_cursor"]))["items"]) == 1


async def test_an_event_is_shown_with_its_headers_and_its_deliveries(world: World) -> None:
    event, partition, offset = await world.company.event(headers={"X-Kind": "a", "Content-Type": "application/json"})
    await world.company.retry(event, attempts=(an_attempt(status=503),))
    record = await world.company.attempt(
        event, result=Result.SERVER_ERROR, status=503, decision=Decision.RETRY, response=ResponseExcerpt(body=b"busy")
    )
    await world.refresh()
    position = f"{partition.topic}/{partition.number}@{offset}"
    for name in (event.id, quote(position, safe="")):
        found = await world.get(f"/events/{name}")
        assert found["event"]["position"] == position
        assert found["event"]["status"] == "retrying"
        assert found["headers"][0] == {"name": "X-Kind", "value": "a"}
        assert found["is_stored"]
    (delivery,) = (await world.get(f"/events/{event.id}/deliveries"))["items"]
    assert (delivery["route"], delivery["destination"], delivery["status"]) == ("build", "ci", "retrying")
    assert [each["status"] for each in delivery["attempts"]] == [503]
    attempt = await world.get(f"/attempts/{quote(delivery['attempts'][0]['position'], safe='')}")
    assert (attempt["response_body"], attempt["host"]) == ("busy", record.host)


CARDS = ("4111111111111111", "5500000000000004")


@pytest.mark.parametrize("is_of_one_request", [False, True])
async def test_what_was_responded_hides_what_its_own_event_hides(
    company: Company, tmp_path: Path, *, is_of_one_request: bool
) -> None:
    """Of two that a sender has given one id, with another card each; in one request, nobody knows whose it is."""
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.card]\n", 1)
    response = ResponseExcerpt(body=", ".join(CARDS).encode())
    first, *_ = await company.event(body={"card": CARDS[0]})
    its = {"received_at": first.received_at} if is_of_one_request else {}
    second, *_ = await company.event(id=first.id, body={"card": CARDS[1]}, **its)
    async with world_of(company, tmp_path, text) as world:
        for number, event in enumerate((first, second), 1):
            await company.attempt(event, number=number, status=400, decision=Decision.DEAD_LETTER, response=response)
        await world.refresh()
        for partition, (_, end) in (await company.log.bounds("gateway.attempts")).items():
            for offset in range(end):
                found = await world.get(f"/attempts/gateway.attempts%2F{partition}@{offset}")
                shown = [card for card in CARDS if card in found["response_body"]]
                assert shown == ([] if is_of_one_request else [CARDS[2 - found["number"]]])
        listed = (await world.get("/deliveries", include_responses="true"))["items"]
        of_own = [f"{CARDS[0]}, ***", f"***, {CARDS[1]}"]
        assert [each["delivery"]["response"] for each in listed] == (["[redacted]"] if is_of_one_request else of_own)


async def test_what_events_of_one_request_hide_is_hidden_together(company: Company, tmp_path: Path) -> None:
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.name]\n", 1)
    first, *_ = await company.event(body={"name": "Anna Smith"})
    await company.event(id=first.id, body={"name": "Smith Jones"}, received_at=first.received_at)
    async with world_of(company, tmp_path, text) as world:
        response = ResponseExcerpt(body=b"no such person: Anna Smith Jones")
        await company.attempt(first, status=400, decision=Decision.DEAD_LETTER, response=response)
        await world.refresh()
        (partition,) = [number for number, (_, end) in (await company.log.bounds("gateway.attempts")).items() if end]
        found = await world.get(f"/attempts/gateway.attempts%2F{partition}@0")
        assert found["response_body"] == "no such person: ***"


@pytest.mark.parametrize("most", [2, 3])
async def test_of_one_request_only_so_many_events_are_looked_at_for_what_to_hide(
    company: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of more, nobody knows what a response would have to hide."""
    monkeypatch.setattr(events_api, "MOST_NAMESAKES", most)
    read = list[int]()
    content = Index.content

    async def counted(index: Index, event: IndexedEvent) -> Event | None:
        read.append(event.offset)
        return await content(index, event)

    monkeypatch.setattr(Index, "content", counted)
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.card]\n", 1)
    first, *_ = await company.event(body={"card": CARDS[0]})
    for card in (CARDS[1], "30569309025904"):
        await company.event(id=first.id, body={"card": card}, received_at=first.received_at)
    async with world_of(company, tmp_path, text) as world:
        response = ResponseExcerpt(body=f"no such card: {CARDS[0]}".encode())
        await company.attempt(first, status=400, decision=Decision.DEAD_LETTER, response=response)
        await world.refresh()
        (partition,) = [number for number, (_, end) in (await company.log.bounds("gateway.attempts")).items() if end]
        found = await world.get(f"/attempts/gateway.attempts%2F{partition}@0")
        assert found["response_body"] == ("[redacted]" if most == 2 else "no such card: ***")
        assert len(read) == most


async def test_what_waits_is_listed_by_destination_page_by_page(world: World) -> None:
    events = [(await world.company.event())[0] for _ in range(3)]
    for event in events:
        await world.company.retry(event, attempts=(an_attempt(status=503),))
    parked, *_ = await world.company.event(source="stripe")
    await world.company.park(parked, "destination/ledger", route="book", destination="ledger")
    await world.refresh()
    first = await world.get("/deliveries/waiting", destination="ci", limit=2)
    rest = await world.get("/deliveries/waiting", destination="ci", limit=2, cursor=first["next_cursor"])
    listed = [each["event"]["id"] for page in (first, rest) for each in page["items"]]
    assert listed == [event.id for event in reversed(events)]
    assert rest["next_cursor"] is None
    assert (first["items"][0]["delivery"]["status"], first["items"][0]["tried"]) == ("retrying", 1)
    (only,) = (await world.get("/deliveries/waiting", route="book"))["items"]
    assert (only["event"]["id"], only["delivery"]["reason"]) == (parked.id, "destination/ledger")
    for cursor in (first["next_cursor"], "x"):
        refused = await world.get("/deliveries/waiting", 400, route="book", cursor=cursor)
        assert refused["code"] == "invalid_cursor"
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    assert [each["event"]["id"] for each in (await world.get("/deliveries/waiting"))["items"]] == [parked.id]


async def test_a_body_comes_byte_for_byte_and_never_as_a_page(world: World) -> None:
    body = b"<script>alert(1)</script>\xff\x00"
    event, *_ = await world.company.event(body=body, headers={"Content-Type": "text/html", "X-A": "\xff"})
    await world.refresh()
    async with world.client.get(f"{BASE}/events/{event.id}/body") as response:
        assert (await response.read(), response.status) == (body, 200)
        assert response.content_type == "application/octet-stream"
        assert response.headers["Content-Disposition"] == "attachment"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    raw = await world.get(f"/events/{event.id}/raw")
    assert b64decode(raw["body_base64"]) == body
    assert tuple([(b64decode(each["name_base64"]), b64decode(each["value_base64"])) for each in raw["headers"]]) == (
        event.headers
    )


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            gzip.compress(b'{"card": "4242", "n": "1"}'),
        ),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"card=4242&n=1"),
    ],
    ids=["gzip", "form"],
)
async def test_a_body_that_is_hidden_in_part_comes_with_its_own_headers(
    company: Company, tmp_path: Path, headers: Mapping[str, str], body: bytes
) -> None:
    """So that it can be sent again, as it is by `gateway listen`. What came is told beside the event."""
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.card]\n", 1)
    event, *_ = await company.event(headers=headers, body=body)
    await company.die(event)
    async with world_of(company, tmp_path, text) as world:
        await world.refresh()
        (letter,) = (await world.get("/dead-letters"))["items"]
        dead = await world.get(f"/dead-letters/{letter['position']}")
        for raw in (await world.get(f"/events/{event.id}/raw"), dead["event"]):
            own = [(b64decode(each["name_base64"]), b64decode(each["value_base64"])) for each in raw["headers"]]
            assert own == [(b"Content-Type", b"application/json")]
            assert orjson.loads(b64decode(raw["body_base64"])) == {"card": "[redacted]", "n": "1"}
        came = (await world.get(f"/events/{event.id}"))["headers"]
        assert {each["name"]: each["value"] for each in came} == headers


@pytest.mark.parametrize(
    "name",
    [
        "evt_00000000000000000000000000000000",
        "gateway.events.github/0@999",
        "gateway.events.github/77@0",
        "gateway.control/0@0",
        "elsewhere/0@0",
        "gateway.events.github/0@9999999999999999999",
        "\x00",
        "…",
    ],
)
async def test_what_isnt_there_is_a_404(world: World, name: str) -> None:
    await world.company.event()
    await world.refresh()
    for path in ("", "/body", "/raw", "/deliveries"):
        found = await world.get(f"/events/{quote(name, safe='')}{path}", 404)
        assert found["code"] == "not_found"
    assert (await world.get(f"/attempts/{quote(name, safe='')}", 404))["code"] == "not_found"
    assert (await world.get(f"/dead-letters/{quote(name, safe='')}", 404))["code"] == "not_found"


async def test_an_event_that_the_index_hasnt_read_yet_is_there_in_a_moment(world: World) -> None:
    """Another process may have told of it: who asks by its position isn't told that there is none."""
    await world.refresh()
    event, partition, offset = await world.company.event()
    place = f"{partition.topic}/{partition.number}@{offset}"
    for path in ("", "/body", "/raw", "/deliveries"):
        async with world.client.get(f"{BASE}/events/{quote(place, safe='')}{path}") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert (await response.json())["code"] == "index_unavailable"
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    assert (await world.get(f"/events/{quote(place, safe='')}/raw", 404))["code"] == "not_found"
    world.become(None)
    await world.refresh()
    assert (await world.get(f"/events/{quote(place, safe='')}/raw"))["id"] == event.id


async def test_an_index_that_hasnt_begun_or_lacks_a_new_topic_says_so_of_what_is_in_the_log(world: World) -> None:
    topics = world.company.topics
    for is_first in (True, False):
        source = "github" if is_first else "shop"
        await world.company.log.create(topics.specs([topics.events(source)], []))
        event, partition, offset = await world.company.event(source=source)
        place = quote(f"{partition.topic}/{partition.number}@{offset}", safe="")
        assert (await world.get(f"/events/{place}/raw", 503))["code"] == "index_unavailable"
        await world.refresh()
        assert (await world.get(f"/events/{place}/raw"))["id"] == event.id


async def test_what_a_recreated_topic_has_isnt_taken_for_what_was_read_of_the_old_one(world: World) -> None:
    old = [await world.company.event(key="k") for _ in range(3)]
    await world.refresh()
    log, (_, partition, _) = world.company.log, old[0]
    assert isinstance(log, MemoryLog)
    await log.recreate(partition.topic)
    event, partition, offset = await world.company.event(key="k")
    place = quote(f"{partition.topic}/{partition.number}@{offset}", safe="")
    assert (await world.get(f"/events/{place}/raw", 503))["code"] == "index_unavailable"
    await world.refresh()
    assert (await world.get(f"/events/{place}/raw"))["id"] == event.id


async def test_a_viewer_sees_no_bodies_and_no_values_of_headers(world: World) -> None:
    event, *_ = await world.company.event(headers={"X-Kind": "secret"}, query="q=secret", body={"a": "secret"})
    await world.refresh()
    world.become(AccessRole.VIEWER)
    found = await world.get(f"/events/{event.id}")
    assert found["headers"] == [{"name": "X-Kind", "value": None}]
    assert found["query"] is None
    for path in ("body", "raw"):
        assert (await world.get(f"/events/{event.id}/{path}", 403))["code"] == "forbidden"
    for query in ("secret", "body.a:secret", "-secret"):
        assert (await world.get("/events", 403, query=query))["code"] == "forbidden"
    assert len((await world.get("/events", query="type:push"))["items"]) == 1


async def test_dead_letters_of_many_partitions_are_listed_to_the_end(tmp_path: Path) -> None:
    log = MemoryLog(now=Ticking())
    await log.create([TopicSpec(name="gateway.dead", partitions=64, retention=86_400.0)])
    company = await Company.found(log)
    async with world_of(company, tmp_path) as world:
        stored = set[str]()
        for number in range(100):  # each partition may have as many as one of years has
            event, *_ = await company.event()
            letter, *_ = await company.die(event, destination=f"destination-{number}")
            stored.add(letter.id)
        cursors = [(page := await world.get("/dead-letters", limit=20))["next_cursor"]]
        found = [each["delivery_id"] for each in page["items"]]
        while page["next_cursor"] is not None:
            page = await world.get("/dead-letters", limit=20, cursor=page["next_cursor"])
            found += [each["delivery_id"] for each in page["items"]]
        assert (len(found), set(found)) == (100, stored)
        assert len(cursors[0]) > 512
        ends = {str(number): 10**12 for number in range(1_000)}
        assert len(encode_cursor(ends, listing=("dead-letters",))) <= LONGEST


async def test_limits_hide_what_is_others(world: World) -> None:
    ours, *_ = await world.company.event(source="stripe")
    theirs, *_ = await world.company.event(source="github")
    await world.company.die(ours, route="book", destination="ledger")
    await world.company.die(theirs)
    await world.refresh()
    limits: dict[str, frozenset[str]]
    for limits in ({"owners": frozenset({"payments"})}, {"sources": frozenset({"stripe"})}):
        world.become(AccessRole.READER, **limits)
        assert [each["id"] for each in (await world.get("/events"))["items"]] == [ours.id]
        await world.get(f"/events/{theirs.id}", 404)
        await world.get(f"/events/{theirs.id}/body", 404)
        assert [each["name"] for each in (await world.get("/sources"))["items"]] == ["stripe"]
        await world.get("/sources/github", 404)
        await world.get("/routes/build", 404)
        letters = (await world.get("/dead-letters"))["items"]
        assert [each["event_id"] for each in letters] == [ours.id]
    world.become(AccessRole.READER, owners=frozenset())
    for path in ("/events", "/sources", "/routes", "/destinations", "/dead-letters"):
        assert (await world.get(path))["items"] == []


async def test_of_what_is_others_too_who_has_limits_is_told_their_part(world: World) -> None:
    everything = await world.get("/routes/audit")
    assert everything["sources"] == ["github", "stripe"]
    assert (await world.get("/destinations/ledger"))["routes"] == 2
    assert (await world.get("/sources/stripe"))["routes"] == 2
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    assert (await world.get("/routes/audit"))["sources"] == ["stripe"]
    assert [each["name"] for each in (await world.get("/routes", source="stripe"))["items"]] == ["audit", "book"]
    assert (await world.get("/routes", source="github"))["items"] == []
    for path in ("/destinations/ledger", "/sources/stripe"):
        assert (await world.get(path))["routes"] is None
    for path in ("/destinations", "/sources"):
        assert {each["routes"] for each in (await world.get(path))["items"]} == {None}


async def test_a_delivery_of_ones_own_event_may_name_a_route_that_is_others(world: World) -> None:
    event, *_ = await world.company.event(source="stripe")
    await world.company.die(event, route="audit", destination="ledger")
    await world.refresh()
    world.become(AccessRole.READER, owners=frozenset({"payments"}))
    assert [each["delivery"]["route"] for each in (await world.get("/deliveries"))["items"]] == ["audit"]
    await world.get("/routes/audit", 404)  # it has no owner
    assert "audit" not in {each["name"] for each in (await world.get("/routes"))["items"]}


async def test_pages_of_deliveries_count_none_of_others(world: World) -> None:
    """Each page would have a cursor, and each cursor the id of a delivery."""
    for source in ("github", "github", "stripe", "github", "stripe", "github"):
        event, *_ = await world.company.event(source=source)
        await world.company.die(event, route="audit", destination="ledger")
    await world.refresh()
    assert len((await world.get("/deliveries"))["items"]) == 6
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    for path in ("/deliveries", "/deliveries?status=dead", "/deliveries?route=audit", "/deliveries?destination=ledger"):
        first = await world.get(path, limit=1)
        second = await world.get(path, limit=1, cursor=first["next_cursor"])
        items = [*first["items"], *second["items"]]
        assert [each["event"]["source"] for each in items] == ["stripe", "stripe"], path
        assert second["next_cursor"] is None, path
    of_others = await world.get("/deliveries?source=github", limit=1)
    assert (of_others["items"], of_others["next_cursor"]) == ([], None)


async def test_who_has_limits_isnt_told_how_much_all_have(world: World) -> None:
    await world.company.event()
    await world.refresh()
    found = await world.get("/index")
    assert (found["events"], found["bytes"] > 0, found["oldest_event"] is None) == (1, True, False)
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    limited = await world.get("/index")
    assert (limited["events"], limited["bytes"], limited["oldest_event"]) == (None, None, None)
    assert limited["currency"] == found["currency"]


async def test_names_of_the_rules_are_listed_in_order(world: World) -> None:
    page = await world.get("/routes", limit=2)
    assert [each["name"] for each in page["items"]] == ["audit", "book"]
    rest = await world.get("/routes", limit=2, cursor=page["next_cursor"])
    assert [each["name"] for each in rest["items"]] == ["build"]
    assert rest["next_cursor"] is None
    build = rest["items"][0]
    assert build["condition"] == {"match": {"type": {"is": "push"}}}
    assert (build["owner"], build["pause"]) == ("platform", None)
    assert [each["name"] for each in (await world.get("/routes", destination="ci"))["items"]] == ["build"]
    ci, ledger = (await world.get("/destinations"))["items"]
    assert (ci["host"], ci["routes"]) == ("ci.example", 1)
    assert (ledger["rate"], ledger["routes"]) == (10, 2)
    source = await world.get("/sources/github")
    assert (source["path"], source["scheme"], source["routes"]) == ("/github", "token", 2)
    rules = await world.get("/rules")
    assert (rules["version"], rules["routes"]) == (world.rules.version, 3)


async def test_names_are_found_by_a_part_and_by_what_stops_them(world: World) -> None:
    async def names(path: str, **query: Any) -> list[str]:
        return [each["name"] for each in (await world.get(path, **query))["items"]]

    assert await names("/routes", name="b") == ["book", "build"]
    assert await names("/destinations", name="dg") == ["ledger"]
    assert await names("/sources", name="hub") == ["github"]
    assert await names("/destinations", stopped="true") == []
    await world.company.command(ControlRecord(kind="pause", name="destination/ci", state="paused", at=1.0))
    await world.company.command(ControlRecord(kind="pause", name="route/book", state="paused", at=1.0))
    world.backend.holds = lambda: {"ledger": Hold(reason="breaker_open", since=1.0, until=2.0)}
    assert await names("/destinations", stopped="true") == ["ci", "ledger"]
    assert await names("/routes", stopped="true") == ["book"]


async def test_dead_letters_are_listed_newest_first_page_by_page(world: World) -> None:
    events = [(await world.company.event())[0] for _ in range(5)]
    for event in events:
        await world.company.die(event, destination=f"d{events.index(event)}")
    first = await world.get("/dead-letters", limit=2)
    await world.company.die((await world.company.event())[0])
    second = await world.get("/dead-letters", limit=2, cursor=first["next_cursor"])
    third = await world.get("/dead-letters", limit=2, cursor=second["next_cursor"])
    listed = [each["event_id"] for page in (first, second, third) for each in page["items"]]
    assert listed == [event.id for event in reversed(events)]
    assert third["next_cursor"] is None
    letter = first["items"][0]
    shown = await world.get(f"/dead-letters/{letter['position']}")
    assert shown["letter"] == letter
    assert [each["status"] for each in shown["attempts"]] == [400]
    only = await world.get("/dead-letters", destination="d0", since="2020-01-01T00:00:00Z")
    assert [each["event_id"] for each in only["items"]] == [events[0].id]


async def test_a_list_that_takes_long_goes_on_with_the_next_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.dead_letters.SECONDS", 0.0)
    event, *_ = await world.company.event()
    await world.company.die(event)
    page = await world.get("/dead-letters")
    assert (page["items"], page["is_cut_short"]) == ([], True)
    monkeypatch.setattr("gateway.api.dead_letters.SECONDS", 5.0)
    assert len((await world.get("/dead-letters", cursor=page["next_cursor"]))["items"]) == 1


async def test_without_an_index_everything_else_is_answered(world: World) -> None:
    world.index = None
    for path in ("/events", "/events/evt_1", "/events/evt_1/body", "/events/evt_1/deliveries", "/index"):
        problem = await world.get(path, 503)
        assert problem["code"] == "index_unavailable"
        assert "keeps none" in problem["detail"]
    for path in ("/me", "/sources", "/routes", "/destinations", "/rules", "/dead-letters"):
        await world.get(path)


async def test_a_log_that_is_away_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "PATIENCE", 0.2)

    async def hang(_: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(world.company.log, "bounds", hang)
    for path in ("/routes", "/destinations"):
        assert (await world.get(path, 503))["code"] == "log_unavailable"
    await world.get("/sources")


async def test_parameters_are_checked_all_at_once(world: World) -> None:
    problem = await world.get("/events", 400, limit="many", quary="x")
    assert problem["detail"].splitlines() == [
        "limit: expected an integer, got 'many'",
        "'quary': unknown parameter; expected one of query, limit, cursor",
    ]
    assert "from 1 to 200" in (await world.get("/events", 400, limit=0))["detail"]
    assert (await world.get("/events", 400, query="nothing:x"))["code"] == "invalid_query"
    assert (await world.get("/dead-letters", 400, since="yesterday"))["code"] == "invalid_request"
    assert (await world.get("/dead-letters", 400, reason="bad luck"))["code"] == "invalid_request"


async def test_a_value_that_ends_with_a_line_is_another(world: World) -> None:
    """Where a pattern ends with `$`, Python's search takes a newline before the end, too."""
    for path, name in (
        ("/deliveries?status=dead%0A", "status"),
        ("/deliveries?route=build%0A", "route"),
        ("/events?cursor=abc%0A", "cursor"),
        ("/routes/build%0A", "name"),
    ):
        problem = await world.get(path, 400)
        assert problem["detail"].startswith(f"{name}: expected"), problem
    for path, body in (
        ("/explain", {"source": "github\n"}),
        ("/replays", {"route": "build\n", "since": "2020-01-01T00:00:00Z"}),
        ("/dead-letters/drop", {"ids": ["dlv_1\n"]}),
    ):
        assert (await world.post(path, body, 400))["code"] == "invalid_request"


async def test_a_type_that_isnt_utf_8_is_escaped(world: World) -> None:
    event, *_ = await world.company.event(type=b"\xff\xfe".decode("utf-8", "surrogateescape"))
    await world.company.die(event)
    page = await world.get("/dead-letters")
    assert page["items"][0]["type"] == "\\xff\\xfe"


async def test_deliveries_are_listed_by_status(world: World) -> None:
    dead, parked, retrying = [(await world.company.event())[0] for _ in range(3)]
    await world.company.die(dead)
    await world.company.park(parked)
    await world.company.retry(retrying)
    await world.refresh()

    async def found(status: str = "", **query: Any) -> list[str]:
        asked = f"?status={status}" if status else ""
        return [each["event"]["id"] for each in (await world.get(f"/deliveries{asked}", **query))["items"]]

    assert await found() == [retrying.id, parked.id, dead.id]
    assert await found("dead") == [dead.id]
    assert await found("parked,dead", destination="ci") == [parked.id, dead.id]
    assert await found("retrying", route="build", source="github") == [retrying.id]
    assert await found("delivered") == []
    first = await world.get("/deliveries?status=retrying,parked", limit=1)
    rest = await world.get("/deliveries?status=parked,retrying", limit=1, cursor=first["next_cursor"])
    assert [each["event"]["id"] for each in rest["items"]] == [parked.id]
    for status in ("bad", "dead,", "dead,,parked", ""):
        assert (await world.get(f"/deliveries?status={status}", 400))["code"] == "invalid_request"
    refused = await world.get("/deliveries?status=dead", 400, cursor=first["next_cursor"])
    assert refused["code"] == "invalid_cursor"
    assert (await world.get("/deliveries/waiting", 400, cursor=first["next_cursor"]))["code"] == "invalid_cursor"


async def test_dead_letters_are_found_by_their_event_and_their_delivery(world: World) -> None:
    events = [(await world.company.event())[0] for _ in range(3)]
    deliveries = [(await world.company.die(event))[0] for event in events]
    for name in (events[1].id, deliveries[1].id):
        (letter,) = (await world.get("/dead-letters", id=name))["items"]
        assert (letter["event_id"], letter["topic"]) == (events[1].id, world.company.topics.dead)
    assert (await world.get("/dead-letters", id="evt_none"))["items"] == []


async def test_a_dead_letter_has_its_event_for_readers(world: World) -> None:
    event, *_ = await world.company.event(body=b"\xff\x00", headers={"X-A": "\xff"})
    await world.company.die(event)
    (letter,) = (await world.get("/dead-letters"))["items"]
    shown = await world.get(f"/dead-letters/{letter['position']}")
    assert b64decode(shown["event"]["body_base64"]) == b"\xff\x00"
    assert shown["event"]["position"] == f"{world.company.topics.dead}/{letter['position']}"
    assert shown["metadata"] == {"dead_reason": "exhausted", "detail": "400: no"}
    world.become(AccessRole.READER, owners=frozenset({"platform"}))  # the source's
    assert (await world.get(f"/dead-letters/{letter['position']}"))["event"] is not None
    world.become(AccessRole.VIEWER)
    assert (await world.get(f"/dead-letters/{letter['position']}"))["event"] is None


async def test_an_exported_event_has_no_credential(world: World) -> None:
    secret = "sssssssssssssssssssss"
    headers = {"X-Token": "a-secret-token", "X-Api-Key": secret, "Content-Type": "application/json"}
    event, partition, offset = await world.company.event(headers=headers, body={"echo": secret})
    await world.refresh()
    found = await world.get(f"/events/{event.id}/exported")
    assert [each["name"] for each in found["headers"]] == ["Content-Type"]
    assert found["withheld"] == ["header x-token", "header x-api-key", "body"]
    assert orjson.loads(found["body"]) == {"echo": "***"}
    assert (found["topic"], found["partition"], found["offset"]) == (partition.topic, partition.number, offset)
    assert secret not in str(found)
    assert "a-secret-token" not in str(found)
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    await world.get(f"/events/{event.id}/exported", 404)


async def test_an_event_in_the_log_is_explained_by_the_rules_in_force(world: World) -> None:
    event, partition, offset = await world.company.event(body={"ref": "main"})
    await world.refresh()
    found = await world.get(f"/events/{quote(f'{partition.topic}/{partition.number}@{offset}', safe='')}/explanation")
    assert (found["event_id"], found["is_duplicate"]) == (event.id, False)
    assert [(each["name"], each["is_matched"], each["owner"]) for each in found["routes"]] == [
        ("build", True, "platform"),
        ("audit", True, None),
    ]
    assert found["routes_left_out"] == 1
    every = await world.get(f"/events/{event.id}/explanation", include_unmatched="true")
    assert [each["name"] for each in every["routes"]] == ["build", "book", "audit"]
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    await world.get(f"/events/{event.id}/explanation", 404)


async def test_what_was_responded_to_the_last_attempt_is_told_to_readers(world: World) -> None:
    failed: dict[str, Any] = {"result": Result.SERVER_ERROR, "status": 503, "decision": Decision.RETRY}
    first, *_ = await world.company.event()
    second, *_ = await world.company.event()
    for event, body in ((first, b"busy"), (second, b"\xff\x00")):
        await world.company.retry(event, attempts=(an_attempt(status=503),))
        await world.company.attempt(event, **failed, response=ResponseExcerpt(body=body))
    await world.refresh()

    async def responses(path: str, **query: Any) -> list[str | None]:
        return [each.get("delivery", each)["response"] for each in (await world.get(path, **query))["items"]]

    hexadecimal = "00000000  ff00                                     .."
    assert await responses("/deliveries", include_responses="true") == [hexadecimal, "busy"]
    assert await responses(f"/events/{first.id}/deliveries", include_responses="true") == ["busy"]
    for path in ("/deliveries", f"/events/{first.id}/deliveries"):
        assert set(await responses(path)) == {None}
        world.become(AccessRole.VIEWER)
        assert (await world.get(path, 403, include_responses="true"))["code"] == "forbidden"
        assert set(await responses(path)) == {None}
        world.become(None)


async def test_who_owns_a_route_alone_reads_no_event_in_its_dead_letters(world: World) -> None:
    """They see the delivery, but not its source's events, wherever these are."""
    event, *_ = await world.company.event(source="github")
    await world.company.die(event, route="book", destination="ledger")
    world.become(AccessRole.READER, owners=frozenset({"payments"}))
    (letter,) = (await world.get("/dead-letters"))["items"]
    assert letter["event_id"] == event.id
    assert (await world.get(f"/dead-letters/{letter['position']}"))["event"] is None


async def test_of_an_event_with_many_deliveries_the_worst_are_told_and_all_are_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, *_ = await world.company.event()
    other, *_ = await world.company.event()
    for number in range(search.MOST_SUMMARIES + 5):
        await world.company.attempt(event, route=f"route-{number}")
    await world.company.die(event, route="route-last")
    await world.company.die(other)
    await world.refresh()
    (told,) = (await world.get("/events", query="route:route-last"))["items"]
    assert (told["id"], told["status"], len(told["deliveries"])) == (event.id, "dead", search.MOST_SUMMARIES)
    assert told["deliveries_left_out"] == 6
    assert sum(each["count"] for each in told["deliveries"]) == search.MOST_SUMMARIES
    for query, found in (
        ("route:route-99", 1),
        ("route:route-104 status:delivered", 1),
        ("route:route-104 status:dead", 0),
        ("-route:route-104 status:dead", 1),
        ("route:route-104 -status:dead", 0),
        ("destination:ci -route:route-last", 1),
    ):
        assert len((await world.get("/events", query=query))["items"]) == found, query
    monkeypatch.setattr(search, "DELIVERIES_AT_ONCE", 10)
    assert len((await world.get("/events"))["items"]) == 2
    paged = [await world.get("/deliveries", limit=60)]
    while (following := paged[-1]["next_cursor"]) is not None:
        paged.append(await world.get("/deliveries", limit=60, cursor=following))
    assert [len(page["items"]) for page in paged] == [60, search.MOST_SUMMARIES + 5 + 2 - 60]
    listed, cursor = list[str](), None
    while True:
        given = {"limit": 40} if cursor is None else {"limit": 40, "cursor": cursor}
        page = await world.get(f"/events/{event.id}/deliveries", **given)
        listed += [each["route"] for each in page["items"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert listed == sorted([*[f"route-{number}" for number in range(search.MOST_SUMMARIES + 5)], "route-last"])


async def test_pages_of_deliveries_read_no_more_than_they_tell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    event, *_ = await world.company.event()
    for number in range(9):
        for attempt in (1, 2, 3):
            await world.company.attempt(event, route=f"route-{number}", number=attempt)
    await world.refresh()
    monkeypatch.setattr(events_api, "MOST_ATTEMPTS", 2)
    made = count()
    attempt_of = search._attempt_of
    monkeypatch.setattr(search, "_attempt_of", lambda *given: (next(made), attempt_of(*given))[1])
    first = await world.get(f"/events/{event.id}/deliveries", limit=2)
    assert [[each["number"] for each in its["attempts"]] for its in first["items"]] == [[2, 3], [2, 3]]
    assert next(made) <= 6  # two of each, and of the one that says that there are more
    for cursor in ("W10", encode_cursor({"after": ["", "", True, 0, 0]}, listing=("deliveries", 1))):
        await world.get(f"/events/{event.id}/deliveries", 400, cursor=cursor)


@pytest.mark.parametrize("path", ["/deliveries", "/deliveries/waiting"])
async def test_who_owns_a_route_alone_sees_of_an_event_their_deliveries(world: World, path: str) -> None:
    """Not its key, nor where else it goes and what has come of that: these are its source's."""
    event, *_ = await world.company.event(source="github", key="acme/app")
    await world.company.park(event, "route/book", route="book", destination="ledger")
    await world.company.die(event, route="build", destination="ci")
    await world.refresh()
    world.become(AccessRole.READER, owners=frozenset({"payments"}))
    (listed,) = (await world.get(path))["items"]
    assert (listed["delivery"]["route"], listed["delivery"]["status"]) == ("book", "parked")
    told = listed["event"]
    assert (told["id"], told["key"], told["status"]) == (event.id, None, "parked")
    assert told["deliveries"] == [{"route": "book", "destination": "ledger", "status": "parked", "count": 1}]
    world.become(AccessRole.READER, owners=frozenset({"platform"}))  # who has the source, too
    told = (await world.get(path))["items"][0]["event"]
    assert (told["key"], told["status"], len(told["deliveries"])) == ("acme/app", "dead", 2)
