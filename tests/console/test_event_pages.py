"""The pages of events: what is found, one event's journey, its body; whatever its sender has written."""

import asyncio
import gzip
from pathlib import Path
from urllib.parse import quote

import pytest

from gateway.access.principal import AccessRole
from gateway.log.attempt_records import Decision
from gateway.model import ResponseExcerpt, Result
from tests.api.conftest import RULES
from tests.builders import an_attempt
from tests.console.conftest import Console, console_of
from tests.index.company import Company

HOSTILE = "\"><script>alert(1)</script>\u202eevil\x00\x1b[31m'&amp;{{7*7}}"


async def test_events_are_found_page_by_page(console: Console) -> None:
    for number in range(60):
        await console.company.event(body={"n": number})
    await console.refresh()
    first = await console.page("events", query="source:github")
    older = next(each for each in first.links if "cursor=" in each)
    second = await console.at(older)
    found = [each for page in (first, second) for each in page.links if each.startswith("/ui/events/gateway.events")]
    assert len(found) == len(set(found)) == 60
    assert "query=source%3Agithub" in older
    assert not any("cursor=" in each for each in second.links)


async def test_status_and_period_are_added_to_the_query(console: Console) -> None:
    dead, *_ = await console.company.event(type="deadly")
    await console.company.event(type="lively")
    await console.company.die(dead)
    await console.refresh()
    page = await console.page("events", query="type:deadly", status="dead", since="24h")
    assert "deadly" in page.text
    assert "Dead" in page.text
    assert "No event matches" in (await console.page("events", query="type:lively", status="dead")).text
    assert "lively" in (await console.page("events", status="no such", since="always")).text


async def test_a_delivery_that_a_kick_has_begun_again_isnt_called_replayed(console: Console) -> None:
    event, *_ = await console.company.event()
    kick = console.company.log.now()
    await console.company.attempt(
        event, replayed_at=kick, result=Result.CLIENT_ERROR, status=404, decision=Decision.HALTED
    )
    await console.refresh()
    page = await console.page("events", event.id)
    assert ("Begun again" in page.text, "eplayed" in page.text) == (True, False)


async def test_a_wrong_query_is_told_where_it_is_written(console: Console) -> None:
    page = await console.page("events", query="nothing:x")
    assert "query:1:" in page.text
    assert 'value="nothing:x"' in page.source


async def test_an_empty_gateway_says_what_to_do(console: Console) -> None:
    await console.refresh()
    page = await console.page("events")
    assert "No events yet" in page.text
    assert "/ui/sources" in page.links


async def test_a_journey_has_every_attempt_with_a_link_to_its_answer(console: Console) -> None:
    event, partition, offset = await console.company.event(headers={"X-Kind": "a"})
    await console.company.retry(event, attempts=(an_attempt(status=503),))
    await console.company.attempt(
        event,
        result=Result.SERVER_ERROR,
        status=503,
        decision=Decision.RETRY,
        detail="503 Service Unavailable",
        response=ResponseExcerpt(body=b"<b>busy</b>", headers=((b"Server", b"x"),)),
    )
    await console.refresh()
    page = await console.page("events", event.id)
    for name in (event.id, f"{partition.topic}/{partition.number}@{offset}"):
        page = await console.page("events", name)
        assert "503" in page.text
        assert "a retry" in page.text
        assert "/ui/routes/build" in page.links
        assert "/ui/destinations/ci" in page.links
    answer = await console.at(next(each for each in page.links if each.startswith("/ui/attempts/")))
    assert "<b>busy</b>" in answer.text
    assert "ci.example" in answer.text
    headers = await console.page("events", event.id, tab="headers")
    assert "X-Kind" in headers.text


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("pending", "Not done yet"),
        ("dead", "became a dead letter"),
        ("parked", "is resumed"),
        ("retrying", "waits for a retry"),
    ],
)
async def test_a_journey_says_what_comes_next(console: Console, setting: str, expected: str) -> None:
    event, *_ = await console.company.event()
    match setting:
        case "dead":
            await console.company.die(event)
        case "parked":
            await console.company.park(event)
        case "retrying":
            await console.company.retry(event)
        case _:
            pass
    await console.refresh()
    assert expected in (await console.page("events", event.id)).text


async def test_hostile_values_are_text(console: Console) -> None:
    event, *_ = await console.company.event(
        type=HOSTILE,
        key=HOSTILE,
        body=HOSTILE.replace("\x00", "").encode(),
        headers={"X-A": HOSTILE.replace("\x00", "")},
    )
    await console.company.die(event, attempts=(an_attempt(status=400, detail=HOSTILE),))
    await console.refresh()
    for page in (
        await console.page("events"),
        await console.page("events", query=HOSTILE),
        await console.page("events", event.id),
        await console.page("events", event.id, tab="body"),
        await console.page("events", event.id, tab="headers"),
        await console.page("events", HOSTILE, expect=404),
        await console.page(HOSTILE, expect=404),
    ):
        assert "<script>alert" not in page.source
        assert "\u202e" not in page.source
        assert "\x1b" not in page.source


async def test_a_body_is_shown_in_part_and_downloaded_whole(console: Console) -> None:
    body = b'{"items": [' + b'{"n": 1, "name": "' + b"x" * 50 + b'"},' * 15_000 + b"0]}"
    event, *_ = await console.company.event(body=body)
    await console.refresh()
    page = await console.page("events", event.id, tab="body")
    for view in ("pretty", "raw", "hex"):
        page = await console.page("events", event.id, tab="body", view=view)
        assert len(page.source) < 500_000
        assert "This is the beginning of" in page.text
    path = f"/ui/events/{event.id}/body"
    assert path in page.links
    async with console.client.get(path) as response:
        assert await response.read() == body
        assert response.content_type == "application/octet-stream"
        assert response.headers["Content-Disposition"] == f'attachment; filename="{event.id}.body"'
        assert "sandbox" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_an_event_is_copied_as_a_command(console: Console) -> None:
    event, *_ = await console.company.event(body=b'{"a": "it\'s <b>"}', headers={"X-A": "b"})
    await console.refresh()
    page = await console.page("events", event.id, tab="body")
    assert "curl http://127.0.0.1:8080/github" in page.text
    assert "-H 'X-A: b'" in page.text


async def test_what_is_copied_or_tried_out_of_a_body_that_is_hidden_in_part_has_its_own_headers(
    company: Company, tmp_path: Path
) -> None:
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.card]\n", 1)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip", "X-A": "b"}
    event, *_ = await company.event(body=gzip.compress(b'{"card": "4242", "n": 1}'), headers=headers)
    async with console_of(company, tmp_path, text) as console:
        await console.refresh()
        page = await console.page("events", event.id, tab="body")
        assert "-H 'X-A: b'" in page.text
        assert """--data-binary '{"card":"[redacted]","n":1}'""" in page.text
        assert "gzip" not in page.text
        tried = (await console.page("rules", "try", event=event.id)).source
        assert "X-A: b" in tried
        assert "gzip" not in tried
        assert "gzip" in (await console.page("events", event.id, tab="headers")).text  # what came


async def test_a_body_of_other_bytes_is_shown_as_these(console: Console) -> None:
    event, *_ = await console.company.event(body=b"\xff\x00<script>")
    await console.refresh()
    page = await console.page("events", event.id, tab="body", view="pretty")
    assert "ff00 3c73" in page.text
    assert "isn't UTF-8" in page.text


async def test_a_viewer_sees_neither_bodies_nor_values(console: Console) -> None:
    event, *_ = await console.company.event(headers={"X-Kind": "secret"}, body={"a": "secret"}, query="q=secret")
    await console.refresh()
    console.become(AccessRole.VIEWER)
    for tab in ("journey", "body", "headers"):
        assert "secret" not in (await console.page("events", event.id, tab=tab)).source
    await console.page("events", event.id, "body", expect=403)
    assert "reader" in (await console.page("events", query="body.a:secret")).text


async def test_limits_hide_what_is_others(console: Console) -> None:
    ours, *_ = await console.company.event(source="stripe", type="ours")
    theirs, *_ = await console.company.event(source="github", type="theirs")
    await console.refresh()
    console.become(AccessRole.READER, sources=frozenset({"stripe"}))
    page = await console.page("events")
    assert "ours" in page.text
    assert "theirs" not in page.text
    await console.page("events", ours.id)
    routes = (await console.page("events", ours.id, tab="routes")).text
    assert "audit takes it" in routes
    assert "build" not in routes
    await console.page("events", theirs.id, expect=404)


async def test_without_an_index_a_page_says_so(console: Console) -> None:
    console.index = None
    page = await console.page("events", expect=503)
    assert "gateway run --role console" in page.text


async def test_a_log_that_is_away_is_told(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    event, *_ = await console.company.event()
    await console.refresh()
    monkeypatch.setattr("gateway.api.backend.PATIENCE", 0.2)

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    assert console.index is not None
    monkeypatch.setattr(type(console.index), "content", hang)
    page = await console.page("events", event.id, expect=503)
    assert "gave no answer" in page.text
    assert f"/ui/events/{quote(event.id)}" in page.links
