"""What operators do on pages, and who may; and what would be done, tried out."""

import gzip
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.principal import AccessRole, Principal
from gateway.api.problems import ApiError
from gateway.console import forms, try_page
from gateway.console.forms import Form, require_own_form, token_of
from gateway.engine.control.records import ControlRecord, tried_name
from gateway.engine.control.redelivery_records import RedeliveryResult
from gateway.ops.control_client import ControlClient
from gateway.ops.dead_letters import read_dead_letters
from tests.console.conftest import Console, console_of
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog
from tests.stalls import stalls

HOSTILE = "</textarea><script>alert(1)</script>\u202e"


@pytest.mark.parametrize("section", ["destinations", "routes"])
async def test_what_is_paused_is_resumed_by_the_same_page(console: Console, section: str) -> None:
    name = {"destinations": "ci", "routes": "build"}[section]
    path = f"/ui/{section}/{name}"
    page = await console.at(path)
    fields = page.forms[f"{path}/pause"]
    assert await console.post(f"{path}/pause", {**fields, "reason": "a move"}) == path
    page = await console.at(path)
    assert "Paused by local since" in page.text
    assert f"{path}/pause" not in page.forms
    assert await console.post(f"{path}/resume", page.forms[f"{path}/resume"]) == path
    assert "Being resumed" in (await console.at(path)).text


async def test_a_form_that_is_sent_twice_is_one_command(console: Console) -> None:
    page = await console.page("destinations", "ci")
    fields = page.forms["/ui/destinations/ci/pause"]
    first = await console.post("/ui/destinations/ci/kick", fields)
    assert await console.post("/ui/destinations/ci/kick", fields) == first
    command = await console.at(first)
    assert "kick/destination/ci" in command.text
    assert 'data-live="1"' in command.source
    _, end = (await console.company.log.bounds(console.company.topics.control))[0]
    again = (await console.page("destinations", "ci")).forms["/ui/destinations/ci/pause"]
    assert again["key"] != fields["key"]
    await console.post("/ui/destinations/ci/kick", again)
    assert (await console.company.log.bounds(console.company.topics.control))[0][1] > end


async def test_an_event_is_delivered_again(console: Console) -> None:
    event, *_ = await console.company.event()
    await console.refresh()
    page = await console.page("events", event.id)
    path = f"/ui/events/{event.id}/redeliver"
    command = await console.post(path, {**page.forms[path], "reason": "they lost it"})
    assert "redeliver/" in (await console.at(command)).text
    refused = await console.post(path, {**page.forms[path], "key": "x" * 32, "destination": "nobody"}, expect=400)
    assert "expected a destination of the rules" in refused


async def test_dead_letters_are_reviewed_before_they_are_replayed_or_dropped(console: Console) -> None:
    for _ in range(3):
        await console.company.die((await console.company.event())[0])
    page = await console.page("dead-letters", destination="ci")
    ids = re.findall(r'name="id" value="([^"]+)"', page.source)
    assert len(ids) == 3
    review = await console.at("/ui/dead-letters/review", act="drop", id=ids[0])
    assert "Drop 1 dead letter?" in review.text
    fields = review.forms["/ui/dead-letters/drop"]
    assert fields["id"] == ids[0]
    assert "expected a reason" in await console.post("/ui/dead-letters/drop", fields, expect=400)
    command = await console.post("/ui/dead-letters/drop", {**fields, "reason": "a test"})
    assert "dead/" in (await console.at(command)).text
    control = await ControlClient(console.company.log, console.company.topics).control()
    (drop,) = [each for each in control.commands.values() if each.kind == "dead"]
    await console.company.command(replace(drop, state="done"))
    await console.refresh()  # what is read of commands is kept for a while
    everything = await console.at("/ui/dead-letters/review", act="replay", destination="ci", reason="exhausted")
    assert "Replay 2 dead letters?" in everything.text
    fields = everything.forms["/ui/dead-letters/replay"]
    assert (fields["destination"], fields["dead_reason"]) == ("ci", "exhausted")
    assert "all" not in fields
    await console.post("/ui/dead-letters/replay", fields)


@pytest.mark.parametrize("act", ["drop", "replay"])
async def test_dead_letters_that_come_after_the_review_stay_open(console: Console, act: str) -> None:
    """Of a drop and of a replay alike: the number that somebody has read is what it is about."""
    company = console.company
    await company.die((await company.event())[0])
    review = await console.at("/ui/dead-letters/review", act=act, destination="ci")
    assert f"{act.capitalize()} 1 dead letter?" in review.text
    await company.die((await company.event())[0])  # while somebody reads that, and writes why
    path = f"/ui/dead-letters/{act}"
    await console.post(path, {**review.forms[path], "reason": "a test"})
    control = await ControlClient(company.log, company.topics).control()
    (given,) = [each for each in control.commands.values() if each.kind == "dead"]
    letters = read_dead_letters(company.log, company.topics, control, given.filter, include_resolved=False)
    assert len([each async for each in letters]) == 1, "of the two"


async def test_who_has_limits_drops_dead_letters_that_they_have_chosen(console: Console) -> None:
    """By a route of theirs and others': of the chosen ones, all are of their source."""
    for source in ("stripe", "github"):
        event, *_ = await console.company.event(source=source)
        await console.company.die(event, route="audit", destination="ledger")
    console.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    (own,) = re.findall(r'name="id" value="([^"]+)"', (await console.page("dead-letters")).source)
    fields = (await console.at("/ui/dead-letters/review", act="drop", id=own)).forms["/ui/dead-letters/drop"]
    command = await console.post("/ui/dead-letters/drop", {**fields, "reason": "a test"})
    assert "dead/" in (await console.at(command)).text


async def test_a_reason_that_this_version_doesnt_know_chooses_no_others(console: Console) -> None:
    await console.company.die((await console.company.event())[0])
    review = await console.at("/ui/dead-letters/review", act="drop", route="build", reason="quota_exceeded")
    assert "Drop 0 dead letters?" in review.text
    fields = (await console.at("/ui/dead-letters/review", act="drop", route="build")).forms["/ui/dead-letters/drop"]
    wrong = {**fields, "dead_reason": "quota_exceeded", "reason": "a newer version's"}
    assert "dead_reason: expected one of" in await console.post("/ui/dead-letters/drop", wrong, expect=400)


async def test_only_an_operator_acts(console: Console) -> None:
    await console.company.die((await console.company.event())[0])
    await console.refresh()
    console.become(AccessRole.OPERATOR)
    assert "/ui/destinations/ci/pause" in (await console.page("destinations", "ci")).forms
    console.become(AccessRole.READER)
    for path in (("destinations", "ci"), ("routes", "build"), ("dead-letters",), ("dead-letters", "review")):
        page = await console.page(*path)
        assert [each for each in page.forms if each not in ("/ui/theme", "/ui/dead-letters")] == []
    own = {"token": token_of(session_of(console), Principal(name="anna", role=AccessRole.READER, via="test"))}
    for act in ("destinations/ci/pause", "routes/build/kick", "dead-letters/replay", "events/x/redeliver"):
        assert "expected the role operator" in await console.post(f"/ui/{act}", own, expect=403)


def session_of(console: Console) -> str:
    return next(each.value for each in console.client.session.cookie_jar if each.key == "session")


@pytest.mark.parametrize(
    "path", ["destinations/ci/pause", "routes/build/kick", "dead-letters/replay", "events/x/redeliver", "rules/try"]
)
async def test_a_form_of_nobody_does_nothing(console: Console, path: str) -> None:
    await console.page("destinations", "ci")
    for fields in ({}, {"token": ""}, {"token": "0" * 64}):
        assert "load the page again" in await console.post(f"/ui/{path}", fields, expect=403)
    good = (await console.page("destinations", "ci")).forms["/ui/destinations/ci/pause"]
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        await console.post(f"/ui/{path}", good, expect=403, **headers)
    async with console.client.post(
        f"/ui/{path}", data=orjson.dumps(good), headers={"Content-Type": "text/plain"}
    ) as response:
        assert response.status == 415
    assert (await console.company.log.bounds(console.company.topics.control))[0] == (0, 0)


async def test_another_method_or_act_is_none(console: Console) -> None:
    good = (await console.page("destinations", "ci")).forms["/ui/destinations/ci/pause"]
    await console.post("/ui/destinations/ci/destroy", good, expect=404)
    await console.page("destinations", "ci", "pause", expect=404)


def test_a_token_is_one_cookies_and_one_persons() -> None:
    anna = Principal(name="anna", role=AccessRole.OPERATOR, via="token")
    require_own_form(Form(fields={"token": [token_of("a", anna)]}), "a", anna)
    for session, who in (("b", anna), ("", anna), ("a", Principal(name="anna", role=AccessRole.READER, via="token"))):
        with pytest.raises(ApiError):
            require_own_form(Form(fields={"token": [token_of("a", anna)]}), session, who)
    with pytest.raises(ApiError):
        require_own_form(Form(fields={"token": [token_of("", anna)]}), "", anna)


async def test_a_session_is_a_strict_cookie(console: Console) -> None:
    async with console.client.get("/ui/rules") as response:
        cookie = response.headers["Set-Cookie"]
        assert cookie.startswith("session=")
        for part in ("HttpOnly", "SameSite=Strict", "Path=/ui"):
            assert part in cookie
    async with console.client.get("/ui/rules") as response:
        assert "Set-Cookie" not in response.headers


async def test_an_event_says_why_other_routes_dont_take_it(console: Console) -> None:
    event, *_ = await console.company.event(type="ping", body={"zen": HOSTILE})
    await console.refresh()
    page = await console.page("events", event.id, tab="routes")
    assert "build doesn't take it" in page.text
    assert "audit takes it" in page.text
    assert f"gateway events export id:{event.id} --to tests/" in page.text
    assert "<script>alert" not in page.source
    console.become(AccessRole.VIEWER)
    assert "audit" not in (await console.page("events", event.id, tab="routes")).text


async def test_a_request_is_tried_out(console: Console, tmp_path: Path) -> None:
    event, *_ = await console.company.event(body={"note": HOSTILE}, headers={"X-A": HOSTILE})
    await console.refresh()
    form = await console.page("rules", "try", event=event.id)
    fields = {**form.forms["/ui/rules/try"], "source": "github", "headers": "X-A: b", "body": "{}"}
    page = await console.post("/ui/rules/try", fields, expect=200)
    assert "audit" in page
    assert "doesn&#39;t take it" in page
    rules = (tmp_path / "routes.yaml").read_text().replace("name: audit", "name: other")
    assert "other" in await console.post("/ui/rules/try", {**fields, "rules": rules}, expect=200)
    for wrong in ({"rules": "version: 2"}, {"headers": "no colon"}, {"source": "nobody"}, {"body": HOSTILE}):
        answer = await console.post("/ui/rules/try", {**fields, **wrong}, expect=200)
        assert "<script>alert" not in answer
    assert "line 1: expected Name: value" in await console.post("/ui/rules/try", {**fields, "headers": "a"}, expect=200)


async def test_a_form_has_the_limits_of_the_api(console: Console) -> None:
    fields = {**(await console.page("rules", "try")).forms["/ui/rules/try"], "source": "github", "body": "{}"}
    for wrong, told in (
        ({"rules": "# " + "x" * 300_000}, "rules: expected at most 262144 characters, got 300002"),
        ({"headers": "X-A: b\n" * 101}, "headers: expected at most 100 items, got 101"),
        ({"headers": "\n" * 1_001}, "headers: expected at most 1000 lines"),
        ({"headers": f"X-A: {'b' * 9000}"}, "headers[0].value: expected at most 8192 characters"),
        ({"source": "../x"}, "source: expected a name as rules have it"),
    ):
        assert told in await console.post("/ui/rules/try", {**fields, **wrong}, expect=200)
    event, *_ = await console.company.event()
    await console.company.die(event)
    await console.refresh()
    form = (await console.page("dead-letters", "review", destination="ci")).forms["/ui/dead-letters/replay"]
    assert "id[0]" not in await console.post("/ui/dead-letters/replay", {**form, "route": "x" * 100}, expect=400)
    assert "ids[0]: expected" in await console.post("/ui/dead-letters/replay", {**form, "id": "a b"}, expect=400)


async def test_a_form_is_read_of_who_may_send_it(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object, **__: object) -> Form:
        raise AssertionError

    monkeypatch.setattr("gateway.console.application.form_of", read)
    console.become(AccessRole.VIEWER)
    for path, role in (("rules/try", "reader"), ("routes/build/pause", "operator"), ("sources/x/refused/retry", "")):
        assert f"expected the role {role}" in await console.post(f"/ui/{path}", {"reason": "x"}, expect=403)


async def test_a_large_form_holds_nobody_up(console: Console) -> None:
    token = (await console.page("rules", "try")).forms["/ui/rules/try"]["token"].encode()
    begin = b"token=" + token + b"&source=github&headers="
    for piece in (b"a:%0A", b"%41"):
        body = begin + piece * ((try_page.MOST_BYTES - len(begin)) // len(piece))

        async def pieces(body: bytes = body) -> AsyncIterator[bytes]:
            for at in range(0, len(body), 1 << 16):
                yield body[at : at + (1 << 16)]

        async with stalls() as found:
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            async with console.client.post("/ui/rules/try", data=pieces(), headers=headers) as response:
                assert "headers" in await response.text()
                assert response.status == 200
        assert found.longest < 0.05, piece
    await console.post("/ui/routes/build/pause", {"token": "x" * 70_000}, expect=413)


@given(st.dictionaries(st.text(max_size=3), st.text()), st.integers(3, 20))
def test_a_form_is_decoded_piece_by_piece(fields: dict[str, str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "PIECE", size)
        assert forms._decoded(urlencode(fields).encode()) == {name: [value] for name, value in fields.items()}


async def test_a_form_is_bounded(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (await console.page("destinations", "ci")).forms["/ui/destinations/ci/pause"]
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/x-www-form-urlencoded"}
    for path in ("/ui/destinations/ci/pause", "/ui/theme"):
        async with console.client.post(path, data=gzip.compress(b"theme=dark"), headers=packed) as response:
            assert response.status == 415
    monkeypatch.setattr("gateway.console.forms.MOST_BYTES", 200)
    await console.post("/ui/destinations/ci/pause", {**good, "reason": "x" * 300}, expect=413)
    many = {f"f{number}": "" for number in range(30)}
    monkeypatch.setattr("gateway.console.forms.MOST_BYTES", 4000)
    monkeypatch.setattr("gateway.console.forms.MOST_FIELDS", 20)
    await console.post("/ui/destinations/ci/pause", {**good, **many}, expect=400)


async def test_a_kick_of_an_ordered_route_isnt_said_to_have_done_nothing(tmp_path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()), ordered=[("book", "ledger")])
    async with console_of(company, tmp_path) as console:
        await company.log.append(company.topics.ordered("book", "ledger"), key=b"k", value=b"{}", headers=[])
        fields = (await console.page("routes", "book")).forms["/ui/routes/book/pause"]
        order = await console.post("/ui/routes/book/kick", fields)
        offset = (await console.backend.control()).offset_of("kick/route/book")
        assert offset is not None
        at = company.log.now()
        for name in ("announcement/kick/route/book", "kick/route/book"):
            mark = ControlRecord(kind="checkpoint", name=name, state="done", at=at, covers_commands_below=offset + 1)
            await company.log.append(company.topics.control, key=mark.encode()[0], value=mark.encode()[1], headers=[])
        page = await console.at(order)
        assert "what was tried isn't known yet" in page.text
        assert 'data-live="1"' in page.source
        for number in await company.log.bounds(company.topics.ordered("book", "ledger")):
            told = ControlRecord(
                kind="checkpoint",
                name=tried_name("book", "ledger", number),
                state="done",
                at=at,
                count=3,
                tried=3,
                delivered=2,
                failed_by_result={"503": 1},
            )
            await company.log.append(company.topics.control, key=told.encode()[0], value=told.encode()[1], headers=[])
        page = await console.at(order)
        assert re.search(r"On ordered routes\s*(\d+), \1 tried, \d+ delivered", page.text)
        assert "failed: 503" in page.text
        assert 'data-live="1"' not in page.source


async def test_what_was_delivered_again_is_shown_with_its_event_and_each_delivery(console: Console) -> None:
    event, *_ = await console.company.event()
    await console.refresh()
    page, path = await console.page("events", event.id), f"/ui/events/{event.id}/redeliver"
    assert re.findall(
        r'<option value="([^"]+)">', page.source.partition("<datalist")[2].partition("</datalist")[0]
    ) == [
        "ci",
        "ledger",
    ]
    order = await console.post(path, {**page.forms[path], "reason": "they lost it", "destination": "ci"})
    shown = await console.at(order)
    assert f"/ui/events/{event.id}" in shown.links
    assert "they lost it" in shown.text
    assert "None yet" in shown.text
    control = await console.backend.control()
    (asked,) = [each for each in control.commands.values() if each.kind == "redeliver"]
    results = (
        RedeliveryResult(route="build", destination="ci", outcome="queued"),
        RedeliveryResult(route="audit", destination="ledger", outcome="queued", paused_by="route/audit"),
        RedeliveryResult(route="book", destination="", outcome="dead"),
    )
    await console.company.command(asked.with_state("done", count=2, results=results))
    shown = await console.at(order)
    for told in ("ci", "parked until route audit is resumed", "a dead letter: its route can't be decided"):
        assert told in shown.text
    assert "2 queued, 1 dead" in shown.text
    assert "done" not in shown.text.partition("Deliveries")[0], "queued isn't done"
    assert {"/ui/routes/build", "/ui/destinations/ci", "/ui/routes/audit"} <= set(shown.links)
