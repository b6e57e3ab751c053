"""Commands by the API, while the process that is asked goes away and comes back.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
an API that is away for a while             it is asked again, until the time is over
one that stays away                         an error, to which the CLI command adds that the command is stored
a newer one like it, of the name            what comes of that is awaited: it answers both
a pause of the name                         ends the wait: this one was replaced, and had come so far
a refusal, after no answer                  an error, which says that the command may be stored
nothing new for so long                     the wait ends, with what is known
a replay that is cancelled                  waited for until a gateway says how far it had come
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.cli import main
from gateway.engine.control.records import DeadFilter, Selection
from gateway.model import UsageError
from gateway.ops import api_client, api_commands
from gateway.ops.api_answers import time_of
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.api_commands import ApiControl, ApiRedeliveries, followed_replay
from gateway.ops.api_dead_letters import ApiDeadLetters
from gateway.ops.control_client import StoredCommand
from gateway.ops.output import Output

AT = "2026-12-01T06:00:00.000Z"
LATER = "2026-12-01T06:00:01.000Z"
AWAY = (503, {"code": "busy", "detail": "too many"})
GONE = (404, {"code": "not_found", "detail": "expected a thing, got none of that name"})
LETTER: dict[str, Any] = {
    "position": "0@7",
    "topic": "gateway.dead",
    "at": AT,
    "status": "open",
    "reason": "gone",
    "detail": None,
    "delivery_id": "dlv_1",
    "event_id": "evt_1",
    "source": "a",
    "type": "b",
    "route": "c",
    "destination": "d",
    "item": None,
    "attempts": 1,
    "last_result": "410",
    "owner": None,
    "resolved_at": None,
}
COMMAND: dict[str, Any] = {"id": "kick/route/a", "at": AT, "by": "ada", "state": "requested", "is_new": True}


class Script:
    """What is answered at each path below the API's: the next of a list, the last of which repeats."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, object]]] = {}
        self.bodies: list[object] = []

    async def serve(self, request: web.Request) -> web.Response:
        if request.can_read_body:
            self.bodies.append(await request.json())
        path = request.raw_path.removeprefix("/api/v1").partition("?")[0]
        its = self.answers[path]
        status, answer = its.pop(0) if len(its) > 1 else its[0]
        return web.json_response(answer, status=status)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiClient]:
    monkeypatch.setattr(api_client, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(api_commands, "POLL", 0.01)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", script.serve)
    async with TestServer(application) as server, ApiClient(str(server.make_url("/")), None) as made:
        yield made


def state(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"id": "kick/route/a", "at": AT, "by": "ada", "state": "requested", "is_read": False}
    return {**told, "count": 0, "waiting": {}, "failed_by_result": {}, "dead": 0, "unread_partitions": 0, **changes}


async def given(script: Script, client: ApiClient) -> tuple[ApiControl, StoredCommand]:
    script.answers["/routes/a/kick"] = [(202, COMMAND)]
    control = ApiControl(client, "it is back")
    placed = await control.kick("route/a")
    assert script.bodies == [{"reason": "it is back"}]
    return control, placed


async def test_a_command_is_followed_while_the_api_is_away(script: Script, client: ApiClient) -> None:
    control, placed = await given(script, client)
    script.answers["/commands/kick%2Froute%2Fa"] = [AWAY, (200, state()), AWAY, (200, state(state="done", count=3))]
    done = await control.finished(placed, timeout=30.0)
    assert done is not None
    assert (done.state, done.count) == ("done", 3)


async def test_an_api_that_stays_away_is_told(script: Script, client: ApiClient) -> None:
    control, placed = await given(script, client)
    script.answers["/commands/kick%2Froute%2Fa"] = [AWAY]
    with pytest.raises(ApiUnavailableError, match=r"503: too many$"):
        await control.finished(placed, timeout=0.05)


async def test_a_command_that_doesnt_end_in_time(script: Script, client: ApiClient) -> None:
    control, placed = await given(script, client)
    script.answers["/commands/kick%2Froute%2Fa"] = [(200, state(is_read=True))]
    assert await control.finished(placed, timeout=0.03) is None
    assert await control.has_begun(placed)


@pytest.mark.parametrize(("action", "states"), [("kick", ("requested", "done")), ("resume", ("resuming", "active"))])
async def test_the_same_command_of_somebody_else_is_awaited_too(
    script: Script, client: ApiClient, action: str, states: tuple[str, str]
) -> None:
    (pending, ended), key = states, "kick" if action == "kick" else "pause"
    one = {"id": f"{key}/route/a", "state": pending}
    script.answers[f"/routes/a/{action}"] = [(202, {**COMMAND, **one})]
    control = ApiControl(client, "")
    placed = await (control.kick("route/a") if action == "kick" else control.resume("route/a"))
    assert placed is not None
    script.answers[f"/commands/{key}%2Froute%2Fa"] = [
        (200, state(**one)),
        (200, state(**one, at=LATER)),
        (200, state(**{**one, "state": ended}, at=LATER, count=40)),
    ]
    done = await control.finished(placed, timeout=30.0)
    assert done is not None
    assert (done.state, done.count) == (ended, 40)


async def test_a_resume_that_a_pause_cuts_says_how_far_it_had_come(
    script: Script, client: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_commands, "CANCEL_GRACE", 0.05)
    one = {"id": "pause/route/a", "state": "resuming"}
    script.answers["/routes/a/resume"] = [(202, {**COMMAND, **one})]
    control = ApiControl(client, "")
    placed = await control.resume("route/a")
    assert placed is not None
    paused = {"id": "pause/route/a", "state": "paused"}
    script.answers["/commands/pause%2Froute%2Fa"] = [
        (200, state(**paused, at="2026-12-01T05:00:00.000Z")),  # of a process that hasn't read the resume
        (200, state(**one, count=20)),
        (200, state(**paused, at=LATER, count=20)),
        (200, state(**paused, at=LATER, count=40)),
    ]
    done = await control.finished(placed, timeout=30.0)
    assert done is not None
    assert (done.state, done.count) == ("cancelled", 40)


async def test_a_refusal_after_no_answer_says_that_the_command_may_be_stored(script: Script, client: ApiClient) -> None:
    refused = (401, {"code": "unauthenticated", "detail": "unknown token"})
    script.answers["/dead-letters/drop"] = [(502, {}), refused]
    with pytest.raises(
        ApiUnavailableError, match="401: unknown token; perhaps the command is stored all the same"
    ) as cut:
        await ApiControl(client, "").resolve("drop", DeadFilter(route="a"))
    assert cut.value.may_have_acted
    for first in (AWAY, refused):  # nothing was done then
        script.answers["/dead-letters/drop"] = [first, refused]
        with pytest.raises(ApiRefusedError, match=r"401: unknown token$"):
            await ApiControl(client, "").resolve("drop", DeadFilter(route="a"))


async def test_dead_letters_are_resolved_by_what_is_asked(script: Script, client: ApiClient) -> None:
    script.answers["/dead-letters/drop"] = [(202, {**COMMAND, "id": "dead/1"})]
    control = ApiControl(client, "")
    await control.resolve("drop", DeadFilter(route="a", since=1_796_104_800.0, ids=("dlv_1",)))
    await control.resolve("drop", DeadFilter())
    assert script.bodies == [{"ids": ["dlv_1"], "route": "a", "since": AT}, {"all": True}]


async def test_a_drop_is_about_what_was_counted_when_it_asks(
    script: Script, client: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    page: dict[str, Any] = {"next_cursor": None, "is_cut_short": False, "unread_partitions": []}
    newest = {**LETTER, "at": "2026-12-01T06:00:01.250Z"}
    script.answers["/me"] = [(200, {})]
    script.answers["/dead-letters"] = [(200, {**page, "items": [newest, LETTER]}), (200, {**page, "items": []})]
    script.answers["/dead-letters/drop"] = [(202, {**COMMAND, "id": "dead/1"})]
    monkeypatch.setattr(Output, "is_interactive", property(lambda _: True))
    monkeypatch.setattr(
        Output, "confirm", lambda _, question: question in ("drop 2 dead letters?", "drop 0 dead letters?")
    )
    words = ["dead", "drop", "--route", "c", "--no-wait", "--api", client.url]
    before = time.time()
    for each in (words, words, [*words, "--yes"]):
        assert await asyncio.to_thread(main, each) == 0
    counted, empty, unasked = script.bodies
    assert (counted, unasked) == ({"route": "c", "until": "2026-12-01T06:00:01.251Z"}, {"route": "c"})
    assert isinstance(empty, dict)
    assert before - 2 < time_of(empty["until"]) <= time.time(), "what there was when none was counted"


async def test_ids_of_events_become_those_of_their_open_dead_letters(script: Script, client: ApiClient) -> None:
    page: dict[str, Any] = {"items": [LETTER], "next_cursor": None, "is_cut_short": False, "unread_partitions": []}
    script.answers["/dead-letters"] = [(200, page)]
    letters = ApiDeadLetters(client)
    assert await letters.deliveries_of(["evt_1", "evt_2"]) == ("dlv_1",)
    script.answers["/dead-letters"] = [(200, {**page, "items": [{**LETTER, "delivery_id": None, "detail": "newer"}]})]
    with pytest.raises(UsageError, match="0@7: expected a dead letter that can be read, got: newer"):
        await letters.deliveries_of(["0@7"])
    script.answers["/dead-letters"] = [(200, {**page, "items": [], "unread_partitions": ["gateway.dead/1"]})]
    with pytest.raises(
        ApiUnavailableError, match=r"evt_3: expected .*, got none in what can be read: gateway\.dead/1 can't"
    ):
        await letters.deliveries_of(["evt_3"])
    script.answers["/dead-letters"] = [(200, {**page, "items": []})]
    with pytest.raises(UsageError, match="evt_3: expected the id of an open dead letter, got none"):
        await ApiDeadLetters(client).deliveries_of(["evt_3"])


async def test_a_replay_of_nothing_is_none(script: Script, client: ApiClient) -> None:
    script.answers["/replays"] = [(409, {"code": "nothing_to_do", "detail": "expected events, got none"})]
    assert await ApiControl(client, "").replay(Selection(route="a", since=1_796_104_800.0)) is None
    script.answers["/replays/1/cancel"] = [GONE]
    assert await ApiControl(client, "").cancel("1") is None


def replay(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"id": "1", "at": AT, "state": "requested", "route": "a", "destination": None}
    told |= {"source": None, "since": AT, "until": None, "rate": None, "undelivered": False, "scanned": 0, "total": 9}
    return {**told, "queued": 0, "unread_partitions": 0, "is_final": False, "detail": None, **changes}


async def test_a_replay_is_followed_to_its_end(script: Script, client: ApiClient) -> None:
    script.answers["/replays/1"] = [
        (200, replay()),
        AWAY,
        (200, replay()),
        (200, replay(scanned=5, queued=2)),
        (200, replay(state="cancelled", scanned=5, queued=2)),
        (200, replay(state="cancelled", scanned=5, queued=3)),
        (200, replay(state="cancelled", scanned=5, queued=3, is_final=True)),
    ]
    steps = [step async for step in followed_replay(client, "1", timeout=30.0)]
    assert [(step.progress.injected, step.is_final) for step in steps] == [
        *((0, False), (2, False), (2, False)),
        *((3, False), (3, True)),
    ]
    script.answers["/replays/1"] = [(200, replay())]
    assert len([step async for step in followed_replay(client, "1", timeout=0.03)]) == 1
    script.answers["/replays/1"] = [GONE]
    assert [step async for step in followed_replay(client, "1", timeout=30.0)] == []
    script.answers["/replays/1"] = [AWAY]
    with pytest.raises(ApiUnavailableError):
        assert [step async for step in followed_replay(client, "1", timeout=0.0)] == []


async def test_an_event_that_isnt_there_is_none(script: Script, client: ApiClient) -> None:
    script.answers["/events/evt_1/redeliver"] = [GONE]
    script.answers["/redeliveries/1"] = [GONE]
    script.answers["/redeliveries/1/cancel"] = [GONE]
    known = ApiRedeliveries(client)
    assert await known.ask("evt_1", route=None, destination=None, why="") is None
    assert [each async for each in known.followed("1", timeout=30.0)] == []
    assert not await known.cancel("1", "")


ORDERED: dict[str, Any] = {
    "is_known": True,
    "count": 3,
    "tried": 3,
    "delivered": 3,
    "dead": 0,
    "unfinished": 0,
    "waiting": {},
    "failed_by_result": {},
    "repeated_failures": {},
}


async def test_a_kick_is_followed_until_it_is_known_on_ordered_routes(script: Script, client: ApiClient) -> None:
    control, placed = await given(script, client)
    unknown = {**dict.fromkeys(ORDERED), "is_known": False}
    script.answers["/commands/kick%2Froute%2Fa"] = [
        (200, state(state="done", ordered=unknown)),
        (200, state(state="done", ordered=ORDERED)),
    ]
    outcome = await control.ordered_outcome(placed)
    assert str(outcome) == "; on ordered routes 3 tried now, all delivered"
    assert outcome.as_json["tried"] == 3


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"ordered": None}, ""),
        ({"ordered": {**ORDERED, "count": 0, "tried": 0}}, "; on ordered routes, no process has told of any"),
        ({"ordered": {"is_known": False}}, "; what was tried on ordered routes isn't known yet"),
        ({}, "; what was tried on ordered routes isn't known yet"),  # an older process
        ({"ordered": ORDERED, "at": LATER}, "; what was tried on ordered routes isn't known yet"),
    ],
)
async def test_what_isnt_known_of_a_kick_on_ordered_routes_is_told(
    script: Script, client: ApiClient, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(api_commands, "ORDERED_WITHIN", 0.0)
    control, placed = await given(script, client)
    script.answers["/commands/kick%2Froute%2Fa"] = [(200, state(state="done", **told))]
    assert str(await control.ordered_outcome(placed)) == text
