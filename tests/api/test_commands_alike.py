"""Each command prints the same by the API as of the log, the index and the rules at hand: on both logs, byte for byte.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
events, deliveries, dead letters, acts      the same lines, and the same tables
files of events                             the same bytes, under the same names
a command by the API                        the log's CLI commands show it, and what came of it
a command by the log                        the API's CLI commands show it, and what came of it
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gateway.commands import COMMANDS
from gateway.ops.output import rfc3339
from tests.gateway_process import ROOT, GatewayProcess
from tests.listen.listener import send as post
from tests.sink import Answer, Request, Sink

pytestmark = [pytest.mark.timeout(300), pytest.mark.rotated(share=1 / 5, group="api")]
RULES = """
version: 1
sources:
  shop:
    path: /shop
    verify: {{scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}
    id: headers["x-order"]
    type: body.type
    redact: [body.card]
destinations:
  erp: {{url: "{url}erp", owner: warehouse, runbook: "https://wiki.example/erp"}}
  ci: {{url: "{url}ci"}}
routes:
  - {{name: book, from: shop, match: {{type: order}}, to: erp, owner: sales, retry: {{max_attempts: 1}}}}
  - {{name: build, from: shop, to: ci, retry: {{schedule: [2h]}}}}
"""


@dataclass
class Place:
    """A gateway, and how commands ask it from near and from afar."""

    gateway: GatewayProcess
    log: str
    prefix: str
    folder: Path
    runner: asyncio.subprocess.Process

    async def near(self, *words: str) -> tuple[int, str, str]:
        """Run a command of the log, the index and the rules at hand; return its code, stdout and stderr."""
        name = next(each for each in (" ".join(words[:2]), words[0]) if each in COMMANDS)
        known = {"log": self.log, "topic_prefix": self.prefix, "rules": str(self.gateway.rules)}
        known["index"] = str(self.folder / "index.db")
        given = [f"--{each.replace('_', '-')}={known[each]}" for each in COMMANDS[name].settings if each in known]
        return await self.run(*words, *given)

    async def far(self, *words: str, **environ: str) -> tuple[int, str, str]:
        """Run a command by the API."""
        return await self.run(*words, "--api", f"http://127.0.0.1:{self.gateway.admin_port}", **environ)

    async def run(self, *words: str, **environ: str) -> tuple[int, str, str]:
        assert self.runner.stdin is not None
        assert self.runner.stdout is not None
        self.runner.stdin.write(json.dumps({"words": words, "environ": environ}).encode() + b"\n")
        async with asyncio.timeout(60):
            code, out, err = json.loads(await self.runner.stdout.readline())
        return code, out, err

    async def lines(self, *words: str) -> list[dict[str, Any]]:
        """Return what a command prints by the API as JSON, which has to succeed."""
        code, out, err = await self.far(*words, "--json")
        assert code == 0, (words, err, self.gateway.story())
        return [json.loads(line) for line in out.splitlines()]

    async def alike(self, *words: str, code: int = 0) -> str:
        """Check that a command prints the same from near and from afar, and return that."""
        near, far = await self.near(*words), await self.far(*words)
        assert near[0] == far[0] == code, (words, near, far)
        assert without_place(far[1]) == without_place(near[1]), words
        assert far[1], words
        return far[1]


def without_place(out: str) -> str:
    """Return what was printed without where the index is, and how current it was at that moment."""
    return "".join([line for line in out.splitlines(keepends=True) if not line.startswith('{"index":')])


@asynccontextmanager
async def a_runner() -> AsyncIterator[asyncio.subprocess.Process]:
    """Start what runs commands, without any setting."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    runner = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.api.command_runner"),
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "220"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    try:
        yield runner
    finally:
        runner.kill()
        await runner.wait()


@pytest.fixture(params=["embedded", "kafka"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A gateway with three orders: the ERP refuses them, ci is down, and there is one that isn't an order."""
    log, prefix = f"sqlite:///{tmp_path / 'gateway.db'}", "gateway."
    if request.param == "kafka":
        log, prefix = f"kafka://{request.getfixturevalue('kafka')}", f"t{uuid4().hex[:12]}."

    def answer(asked: Request) -> Answer:
        if asked.target == "/erp":
            return Answer(status=422, body=b"unknown article \xe2\x82\xac for 4242424242424242")
        return Answer(status=503, body=b"down until noon")

    environ = {"GATEWAY_INDEX": str(tmp_path / "index.db")}
    async with Sink(answer, path="/") as sink, a_runner() as runner:
        rules = RULES.format(url=sink.url)
        async with GatewayProcess(tmp_path, rules=rules, log=log, prefix=prefix, environ=environ) as gateway:
            made = Place(gateway, log, prefix, tmp_path, runner)
            for number, kind in ((4710, "order"), (4711, "order"), (4712, "parcel")):
                await send(gateway, number, {"type": kind, "order": {"id": number}, "card": "4242424242424242"})
            await settled(made)
            yield made


async def send(gateway: GatewayProcess, number: int, body: object) -> None:
    headers = (("Content-Type", "application/json"), ("X-Order", str(number)), ("X-Api-Key", "k" * 20))
    await post(gateway, json.dumps(body).encode(), source="shop", headers=headers)


async def settled(place: Place) -> None:
    """Wait until the index knows what has become of all events, so that nothing changes any more."""
    async with asyncio.timeout(60):
        while True:
            listed = (await place.lines("deliveries", "list"))[:-1]
            tried = [each["status"] for each in listed if each["attempts"]]
            if sorted(tried) == ["dead", "dead", "retrying", "retrying", "retrying"]:
                return
            await asyncio.sleep(0.3)


async def test_what_is_shown_is_alike(place: Place) -> None:
    (event,) = [each["id"] for each in (await place.lines("events", "search", "body.order.id:4711"))[:-1]]
    for more in ((), ("--json",)):
        await place.alike("events", "list", *more)
        await place.alike("events", "list", "--source", "shop", "--since", "1h", "--limit", "2", *more)
        await place.alike("events", "search", "status:dead since:2d", *more)
        await place.alike("events", "show", event, *more)
        await place.alike("events", "show", event, "--deliveries", *more)
        await place.alike("deliveries", "list", *more)
        for status in ("retrying", "dead", "dead,retrying", "parked"):
            await place.alike("deliveries", "list", "--status", status, "--source", "shop", *more)
        await place.alike("deliveries", "list", "--waiting", "--destination", "ci", "--limit", "2", *more)
        await place.alike("dead", "list", *more)
        await place.alike("dead", "list", "--route", "book", "--since", "1h", "--all", "--limit", "1", *more)
        await place.alike("dead", "show", event, *more)
        await place.alike("dead", "replay", event, "--dry-run", *more)
        await place.alike("dead", "drop", "--reason", "exhausted", "--dry-run", *more)
        await same_status(place, *more)
        await same_status(place, "ci", *more)
        await same_status(place, "erp", *more)
    assert "down until noon" in await place.alike("deliveries", "list", "--waiting")
    assert "unknown article € for ***" in await place.alike("deliveries", "list", "--status", "dead", "--json")
    assert "no dead letters" in (await place.far("dead", "list", "--destination", "ci", "--all"))[1]
    assert "4242" not in await place.alike("events", "show", event)


async def same_status(place: Place, *words: str) -> None:
    """Check that the status of a gateway is the same by its API and by its log and admin address."""
    near = await place.near("status", *words, "--admin", f"127.0.0.1:{place.gateway.admin_port}")
    far = await place.far("status", *words)
    assert far == near
    assert "dead letters: exhausted" in far[1] or "got 503" in far[1], far


async def test_what_would_come_of_an_event_is_alike(place: Place) -> None:
    (event,) = [each["id"] for each in (await place.lines("events", "search", "body.order.id:4711"))[:-1]]
    (place.folder / "order.json").write_text('{"type": "order", "order": {"id": 1}}')
    words = ("--source", "shop", "--header", "X-Order: 1", "--header", "X-Other: ä")
    for more in ((), ("--json",)):
        near = await place.near("explain", str(place.gateway.rules), event, *more)
        assert (await place.far("explain", event, *more))[:2] == near[:2]
        asked = (str(place.folder / "order.json"), *words, *more)
        near = await place.near("explain", str(place.gateway.rules), *asked)
        assert (await place.far("explain", *asked))[:2] == near[:2]
        assert (await place.far("explain", str(place.gateway.rules), *asked))[0] == 0
    assert "an open dead letter: book → erp" in (await place.far("explain", event))[1]
    refused: tuple[tuple[tuple[str, ...], str], ...] = (
        (("shop",), "expected --source with a file, or the id or position of an event"),
        ((event, "--show-secrets"), "expected no --show-secrets with --api"),
        ((str(place.gateway.rules), event), "expected no rule file with an event and --api"),
    )
    for given, told in refused:
        code, _, err = await place.far("explain", *given)
        assert (code, told in err) == (2, True), err


async def test_files_of_events_are_alike(place: Place) -> None:
    for to in ("events", "events.jsonl"):
        for words in (("source:shop",), ("body.order.id:4711",), ("--source", "shop", "--limit", "2")):
            ways = {}
            for where, run in (("near", place.near), ("far", place.far)):
                (folder := place.folder / f"{where}-{uuid4().hex[:8]}").mkdir()
                code, out, err = await run("events", "export", *words, "--to", str(folder / to), "--json")
                told = {**json.loads(out), "to": ""}
                files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                ways[where] = (code, told, err, files)
            assert ways["far"] == ways["near"]
            code, told, _, files = ways["far"]
            assert (code, bool(files), told["withheld"]) == (0, True, ways["near"][1]["withheld"])
            assert b"kkkk" not in b"".join(files.values())


async def test_commands_by_the_api_are_those_of_the_log(place: Place) -> None:
    first, second = [each["id"] for each in (await place.lines("events", "search", "type:order"))[:-1]]
    code, out, _ = await place.far("dead", "replay", first, "--why", "it is back")
    assert (code, out.startswith("queued ")) == (0, True)
    code, _, err = await place.far("dead", "replay", "evt_nothing")
    assert (code, err) == (2, "error: evt_nothing: expected the id of an open dead letter, got none\n")
    assert (await place.far("dead", "drop", "--route", "book", "--yes", "--json"))[0] == 0

    code, out, err = await place.far("events", "redeliver", first, "--destination", "erp", "--why", "it is back")
    assert (code, f"queued 1 delivery of {first}" in out) == (0, True), err
    code, out, err = await place.near("events", "redeliver", second, "--destination", "erp", "--json")
    assert code == 0, err
    name = json.loads(out)["redelivery"]
    for more in ((), ("--json",)):
        await place.alike("events", "redeliver", "--list", *more)
        await place.alike("events", "redeliver", "--follow", name, *more)
    assert (await place.far("events", "redeliver", "--cancel", name))[0] == 2
    assert (await place.far("events", "redeliver", "--follow", "nothing"))[0] == 2
    assert (await place.far("events", "redeliver", "evt_nothing"))[0] == 1

    code, out, err = await place.far("replay", "--route", "book", "--from", "1h", "--json")
    assert code == 0, err
    (replay, *_) = [json.loads(line)["replay"] for line in out.splitlines()]
    for more in ((), ("--json",)):
        await place.alike("replay", "--follow", replay, *more)
    code, out, _ = await place.far("replay", "--undelivered", "--from", "1h", "--source", "shop")
    assert (code, out.count("queued ")) == (0, 2)
    code, out, _ = await place.far("replay", "--route", "book", "--from", "2h", "--to", "1h")
    assert (code, out) == (0, "no events were stored in that time: there is nothing to do\n")
    for words in (
        ("--cancel", replay),
        ("--follow", "nothing"),
        ("--event", first, "--from", "1h"),
        ("--route", "book"),
    ):
        assert (await place.far("replay", *words))[0] == 2

    assert (await place.far("destination", "pause", "ci"))[0] == 0
    assert (await place.near("destination", "resume", "ci"))[0] == 0
    for more in ((), ("--json",)):
        await place.alike("audit", "list", *more)
        await place.alike("audit", "list", "--who", "local", "--since", "1h", "--limit", "3", *more)
    acts = await place.lines("audit", "list")
    assert {each["what"] for each in acts} >= {"redeliver", "replay", "dead replay", "dead drop", "pause", "resume"}


async def same(place: Place, *words: str, code: int = 0) -> str:
    """Check that a command prints the same, to stdout and to stderr, and return what it prints."""
    near, far = await place.near(*words), await place.far(*words)
    assert far == near
    assert far[0] == code, far
    return far[1] + far[2]


async def test_what_a_replay_would_deliver_is_alike(place: Place) -> None:
    order, *_ = [each["id"] for each in (await place.lines("events", "search", "type:order"))[:-1]]
    now = time.time()
    since, until = rfc3339(now - 3600), rfc3339(now + 1)
    times = ("--from", since, "--to", until, "--dry-run")
    for more in ((), ("--json",)):
        told = await same(place, "replay", "--route", "book", *times, *more)
        assert '"count":2' in told or "would queue 2 deliveries: 2 events to erp; nothing was done" in told
        await same(place, "replay", "--undelivered", *times, *more)
        await same(place, "replay", "--undelivered", "--destination", "erp", *times, *more)
        await same(place, "replay", "--route", "build", "--source", "shop", "--undelivered", *times, *more)
        await same(place, "replay", "--route", "book", "--from", since, "--to", rfc3339(now - 60), "--dry-run", *more)
        await same(place, "replay", "--event", order, "--dry-run", *more)
        await same(place, "replay", "--event", order, "--route", "book", "--dry-run", *more)
        await same(place, "replay", "--event", order, "--destination", "ci", "--dry-run", *more)
    assert f"--from {since} --to {until}" in await same(place, "replay", "--route", "book", *times)
    assert order in await same(place, "replay", "--event", order, "--dry-run")
    (parcel,) = [each["id"] for each in (await place.lines("events", "search", "type:parcel"))[:-1]]
    assert "expected book to match it, got build" in await same(
        place, "replay", "--event", parcel, "--route", "book", code=2
    )
    await same(place, "replay", "--event", "evt_nothing", code=1)
    assert (await place.far("replay", "--route", "nothing", *times))[0] == 2


async def test_one_event_is_replayed_by_the_api(place: Place) -> None:
    order, *_ = [each["id"] for each in (await place.lines("events", "search", "type:order"))[:-1]]
    code, out, err = await place.far("replay", "--event", order, "--route", "book", "--why", "it is back", "--json")
    assert code == 0, err
    last = json.loads(out.splitlines()[-1])
    assert (last["state"], last["injected"], last["total"]) == ("done", 1, 1)
    code, out, err = await place.far("replay", "--event", order, "--destination", "ci", "--no-wait")
    assert (code, "of route build is stored" in out) == (0, True), err
    acts = [each for each in await place.lines("audit", "list") if each["what"] == "replay"]
    assert len([each for each in acts if "--event " in json.dumps(each)]) == 2
    assert "it is back" in json.dumps(acts)


async def test_a_viewer_gets_what_viewers_may_see(place: Place) -> None:
    """What needs a reader is left out where that is possible, and refused where it isn't, by its name."""
    access = place.folder / "access.conf"
    code, out, _ = await place.run("token", "new", "eve", "--role", "viewer", "--access", str(access))
    assert code == 0
    await place.gateway.stop()
    environ = {"GATEWAY_INDEX": str(place.folder / "index.db"), "GATEWAY_ACCESS": str(access)}
    rules = place.gateway.rules.read_text()
    async with GatewayProcess(
        place.folder, rules=rules, log=place.log, prefix=place.prefix, environ=environ
    ) as gateway:
        there = Place(gateway, place.log, place.prefix, place.folder, place.runner)
        assert (await there.far("dead", "list"))[0] == 2
        (place.folder / "token").write_text(out)
        token = ("--token-file", str(place.folder / "token"))
        code, told, err = await there.far("deliveries", "list", "--waiting", *token)
        assert code == 0, err
        assert "503" in told
        assert "down until noon" not in told
        assert "what was responded isn't shown: " in err
        assert "expected the role reader, got viewer" in err
        assert (await there.far("dead", "list", GATEWAY_API_TOKEN=out.strip()))[0] == 0
        assert "book → erp" in (await there.far("status", *token))[1]
        assert (await there.far("status", "--admin", "127.0.0.1:1", *token))[0] == 2
        for words in (("explain", "evt_" + 32 * "0"), ("dead", "drop", "--all", "--yes"), ("audit", "list")):
            code, _, err = await there.far(*words, *token)
            assert (code, "403: expected the role " in err) == (2, True), (words, err)
