"""Commands with --api say and do what they do with the log and the index at hand."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.api.test_examples import ROOT, gateway, sent
from tests.gateway_process import GatewayProcess, free_ports
from tests.sink import Answer, Request, Sink

__all__ = ["gateway"]
pytestmark = [pytest.mark.timeout(240), pytest.mark.rotated(share=1 / 5, group="api")]
"""Each command is a process of its own."""

ORDERED_RULES = """
version: 1
sources:
  hub:
    path: /hub
    verify: {{scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}
    key: body.key
destinations:
  mirror: {{url: "{url}"}}
routes:
  - {{name: mirror, from: hub, to: mirror, order: key, on_exhausted: halt, retry: {{max_attempts: 1}}}}
"""


async def run(*words: str, **environ: str) -> tuple[int | None, str, str]:
    """Run a command; return its code, and what it printed to stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway", *words),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 40)
    return process.returncode, out.decode(), err.decode()


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


async def test_events_are_searched_and_shown_alike(gateway: GatewayProcess, tmp_path: Path) -> None:
    event = await sent(gateway)
    api, index = f"http://127.0.0.1:{gateway.admin_port}", str(tmp_path / "index.db")
    for words in (("",), ("source:github", "--since", "1h"), ("source:other",)):
        _, near, _ = await run("events", "search", *words, "--json", "--index", index)
        code, far, _ = await run("events", "search", *words, "--json", GATEWAY_API=api)
        assert code == 0
        assert lines(far)[:-1] == lines(near)[:-1]
        assert lines(far)[-1]["index"]["file"] == api
    shared = ("--json", f"--log=sqlite:///{tmp_path / 'gateway.db'}", f"--rules={gateway.rules}", f"--index={index}")
    for more in ((), ("--deliveries",)):
        _, near, _ = await run("events", "show", event, *more, *shared)
        code, far, _ = await run("events", "show", event, *more, "--json", "--api", api)
        assert (code, lines(far)) == (0, lines(near))


async def test_a_destination_is_paused_resumed_and_kicked(gateway: GatewayProcess) -> None:
    api = f"http://127.0.0.1:{gateway.admin_port}"
    code, out, _ = await run("destination", "pause", "ci", "--json", "--api", api, "--why", "moved")
    assert (code, lines(out)[0]["state"], lines(out)[0]["confirmed"]) == (0, "paused", True)
    code, out, _ = await run("destination", "pause", "ci", "--api", api)
    assert "is paused already, by local since" in out
    code, out, _ = await run("destination", "resume", "ci", "--json", "--api", api)
    assert (code, lines(out)[0]["state"]) == (0, "active")
    code, out, _ = await run("destination", "resume", "ci", "--api", api)
    assert (code, out) == (0, "destination ci isn't paused: there is nothing to do\n")
    code, out, _ = await run("route", "kick", "build-on-push", "--json", "--api", api)
    assert (code, lines(out)[0]["state"]) == (0, "done")


async def test_what_the_api_says_is_told(gateway: GatewayProcess) -> None:
    api = f"http://127.0.0.1:{gateway.admin_port}"
    (port,) = free_ports(1)
    for words, code, told in (
        (("events", "search", "nothing:x", "--api", api), 2, "400: query:1: expected one of"),
        (("events", "show", "evt_1", "--api", api), 2, "404: expected the id or the position of an event"),
        (("route", "pause", "nothing", "--api", api), 2, "404: expected a route"),
        (("events", "show", "evt_1", "--all", "--api", api), 2, "expected neither --all nor --source"),
        (
            ("events", "search", "", "--api", f"http://127.0.0.1:{port}"),
            1,
            f"http://127.0.0.1:{port}: connection refused",
        ),
        (("events", "search", "", "--api", "nowhere"), 2, "--api: expected a URL such as"),
    ):
        found, _, err = await run(*words)
        assert (found, told in err) == (code, True), err
    found, _, err = await run("events", "search", "", "--api", api, GATEWAY_API_TOKEN="gwt_wrong")
    assert (found, "401: unknown token" in err) == (2, True), err


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"])
async def test_what_isnt_the_api_is_told(answer: bytes) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        code, _, err = await run("events", "search", "", "--api", f"http://127.0.0.1:{port}")
    assert (code, "expected an answer of the API, got 200" in err) == (1, True)


async def test_a_kick_of_a_halted_key_says_by_the_api_what_it_came_to(tmp_path: Path) -> None:
    is_repaired = False

    def answer(_: Request) -> Answer:
        return Answer(status=200 if is_repaired else 500, body=b"")

    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    async with (
        Sink(answer) as sink,
        GatewayProcess(tmp_path, rules=ORDERED_RULES.format(url=sink.url), log=log) as gateway,
        ClientSession(headers={"X-Token": "a-secret-of-16-bytes"}) as session,
    ):
        for number in range(3):
            event = {"key": "a", "number": number}
            async with session.post(f"http://127.0.0.1:{gateway.port}/hub", json=event) as response:
                assert response.status == 202
        await sink.received(1)
        await asyncio.sleep(1)
        is_repaired = True
        api = f"http://127.0.0.1:{gateway.admin_port}"
        code, out, _ = await run("route", "kick", "mirror", "--api", api)
        told = "nothing waited for a retry; on ordered routes 3 tried now, all delivered"
        assert (code, out) == (0, f"kicked route mirror: {told}\n")
        assert len(sink.requests) == 4
