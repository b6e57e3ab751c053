"""`gateway listen` beside a gateway with an index, as developers run it.

what crosses                              what has to come of it
────────────────────────────────────────  ────────────────────────────────────────────────
connections that are cut at any byte      each event once, in order; the copies as well
a gateway that is killed and started      the same, once it is back
a receiver that fails, or is down         is told, and the next ones are sent
a source that is limited or redacted      what the token sees, masked
a viewer, a wrong token, no index         a clear end
"""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway_process import ROOT, GatewayProcess, free_ports
from tests.listen.cutting_proxy import CuttingProxy
from tests.sink import Request, Sink

pytestmark = pytest.mark.timeout(240)

RULES = """
version: 1
sources:
  odd:
    path: /odd
    verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}
    type: body.type
  github: {path: /github, verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}
  shop:
    path: /shop
    verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}
    redact: [body.card]
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: all, from: [github, shop], to: ci}
"""


class Listener:
    """A `gateway listen` that is running; what it prints is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.notes = ""
        self._new = asyncio.Event()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.lines]

    async def read(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_lines())
            tasks.create_task(self._read_notes())

    async def _read_lines(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode())
            self._new.set()

    async def _read_notes(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(65536):
            self.notes += piece.decode()
            self._new.set()

    async def has(self, count: int) -> list[dict[str, Any]]:
        """Wait until it has printed so many events, and return them."""
        await self.has_lines(count)
        return self.events

    async def has_lines(self, count: int) -> list[str]:
        async with asyncio.timeout(90):
            while len(self.lines) < count:
                await self._wait()
        return self.lines

    async def says(self, text: str, times: int = 1) -> None:
        """Wait until it has said something so often."""
        async with asyncio.timeout(60):
            while self.notes.count(text) < times:
                await self._wait()

    async def _wait(self) -> None:
        self._new.clear()
        assert self.process.returncode is None, self.notes
        try:
            async with asyncio.timeout(5):
                await self._new.wait()
        except TimeoutError:
            pass


async def start(*words: str, **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway", "listen", *words),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )


@asynccontextmanager
async def listening(*words: str, **environ: str) -> AsyncIterator[Listener]:
    """Run it, once it listens, until the end."""
    listener = Listener(await start(*words, **environ))
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(listener.read())
        try:
            await listener.says("listening at")
            yield listener
        finally:
            if listener.process.returncode is None:
                listener.process.kill()
            await listener.process.wait()
            await reading


async def ended(*words: str, **environ: str) -> tuple[int | None, str, str]:
    """Run it to its end; return its code, and what it printed."""
    process = await start(*words, **environ)
    out, err = await asyncio.wait_for(process.communicate(), 40)
    return process.returncode, out.decode(), err.decode()


def a_gateway(folder: Path, *, access: str = "", index: bool = True) -> GatewayProcess:
    environ = {"GATEWAY_INDEX": str(folder / "index.db")} if index else {}
    if access:
        environ["GATEWAY_ACCESS"] = str(folder / "access.conf")
        (folder / "access.conf").write_text(access)
    return GatewayProcess(folder, rules=RULES, log=f"sqlite:///{folder / 'gateway.db'}", environ=environ)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    async with a_gateway(tmp_path) as running:
        yield running


async def send(
    gateway: GatewayProcess, body: bytes, *, source: str = "github", headers: tuple[tuple[str, str], ...] = ()
) -> str:
    """Send an event, and return its id."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = [
        f"POST /{source} HTTP/1.1",
        "Host: hooks.example",
        "X-Token: a-secret-of-16-bytes",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *[f"{name}: {value}" for name, value in headers],
    ]
    writer.write("\r\n".join([*head, "\r\n"]).encode("latin-1") + body)
    answer = await reader.read()
    writer.close()
    assert b" 202 " in answer.partition(b"\r\n")[0], answer
    return str(orjson.loads(answer.partition(b"\r\n\r\n")[2])["id"])


def api_of(gateway: GatewayProcess) -> str:
    return f"http://127.0.0.1:{gateway.admin_port}"


async def test_over_cut_connections_nothing_is_told_twice_and_nothing_is_missing(gateway: GatewayProcess) -> None:
    seed = int(os.environ.get("GATEWAY_TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)
    async with Sink() as sink, CuttingProxy(gateway.admin_port, seed=seed) as proxy:
        async with listening("--json", "--api", proxy.url, "--forward", sink.url) as listener:
            proxy.cut_after(1, 8000)
            stored = []
            for number in range(120):
                stored.append(await send(gateway, b'{"number": %d}' % number))
                if number % 30 == 7:
                    await asyncio.sleep(1.1)
            events = await listener.has(len(stored))
            await asyncio.sleep(2.5)  # whatever would be told twice
            events = listener.events
            assert proxy.cuts > 20, (seed, proxy.cuts)
            assert "reconnecting in" in listener.notes
        positions = [event["position"] for event in events]
        assert len(set(positions)) == len(positions), f"seed {seed}"
        assert sorted(event["id"] for event in events) == sorted(stored), f"seed {seed}"
        assert [event["stored_at"] for event in events] == sorted(event["stored_at"] for event in events)
        assert [request.header("gateway-event-id") for request in sink.requests] == [event["id"] for event in events]
        assert {event["forward"]["status"] for event in events} == {200}


async def test_a_gateway_that_is_killed_and_comes_back_is_heard_again(gateway: GatewayProcess) -> None:
    async with listening("--json", "--api", api_of(gateway)) as listener:
        stored = [await send(gateway, b"{}") for _ in range(3)]
        await listener.has(3)
        gateway.kill()
        await listener.says("reconnecting in")
        await gateway.start()
        stored += [await send(gateway, b"{}") for _ in range(3)]
        events = await listener.has(6)
        assert [event["id"] for event in events] == stored
        assert "forward" not in events[0]
        listener.process.send_signal(signal.SIGINT)
        assert await listener.process.wait() == 130
    assert "Traceback" not in listener.notes


async def test_a_copy_is_what_the_provider_sent(gateway: GatewayProcess) -> None:
    body = b'{"caf\xc3\xa9": [1,  2]}\r\n\x00'
    given = (
        ("Content-Type", "application/json"),
        ("X-GitHub-Event", "push"),
        ("X-Twice", "one"),
        ("x-twice", "two"),
        ("X-Bytes", "\xe9"),
        ("TE", "trailers"),
        ("Gateway-Event-Id", "evt_of_a_stranger"),
    )
    async with (
        Sink(path="/hooks?from=github") as sink,
        listening("--json", "--api", api_of(gateway), "--forward", sink.url) as listener,
    ):
        event = await send(gateway, body, headers=given)
        [told] = await listener.has(1)
        listener.process.send_signal(signal.SIGTERM)
        assert await listener.process.wait() == 0
    assert told["forward"].keys() == {"is_success", "status", "seconds", "detail"}
    [request] = sink.requests
    assert (request.method, request.target, request.body) == ("POST", "/hooks?from=github", body)
    assert request.headers == (
        (b"Host", f"127.0.0.1:{sink.port}".encode()),
        (b"Content-Type", b"application/json"),
        (b"X-GitHub-Event", b"push"),
        (b"X-Twice", b"one"),
        (b"x-twice", b"two"),
        (b"X-Bytes", b"\xe9"),
        (b"gateway-event-id", event.encode()),
        (b"Content-Length", str(len(body)).encode()),
    )


async def test_a_copy_lacks_what_the_rules_hide(gateway: GatewayProcess) -> None:
    async with Sink() as sink, listening("--json", "--api", api_of(gateway), "--forward", sink.url) as listener:
        await send(gateway, b'{"card": "4242424242424242", "total": 1}', source="shop")
        await listener.has(1)
        assert b"4242" not in sink.requests[0].body
        assert orjson.loads(sink.requests[0].body)["total"] == 1


async def test_a_copy_that_fails_is_told_and_the_next_ones_are_sent(gateway: GatewayProcess) -> None:
    def answer(request: Request) -> int:
        return 500 if request.body == b"2" else 200

    async with Sink(answer) as sink, listening("--json", "--api", api_of(gateway), "--forward", sink.url) as listener:
        for number in range(4):
            await send(gateway, b"%d" % number)
        events = await listener.has(4)
        assert [event["forward"]["status"] for event in events] == [200, 200, 500, 200]
        await sink.refuse()
        await send(gateway, b"4")
        failed = (await listener.has(5))[4]["forward"]
        assert (failed["is_success"], failed["status"]) == (False, None)
        assert "refused" in failed["detail"]
        await sink.listen()
        await send(gateway, b"5")
        assert (await listener.has(6))[5]["forward"]["status"] == 200
        assert [request.body for request in sink.requests] == [b"0", b"1", b"2", b"3", b"5"]


async def test_a_query_and_sources_choose_what_is_heard(gateway: GatewayProcess) -> None:
    words = ("--api", api_of(gateway), "--source", "github", "body.a:1")
    async with listening(*words) as listener:
        await send(gateway, b'{"a": 1}', source="shop")
        await send(gateway, b'{"a": 2}')
        wanted = await send(gateway, b'{"a": 1}')
        [line] = await listener.has_lines(1)
        assert wanted in line
        assert "  github  " in line


async def test_what_a_token_may_is_told(tmp_path: Path) -> None:
    access = ""
    tokens = {}
    for role in ("viewer", "reader"):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "gateway", "token", "new", role, "--role", role, "--access", str(tmp_path / "made.conf")),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        tokens[role] = (await process.communicate())[0].decode().strip()
    access = (tmp_path / "made.conf").read_text()
    async with a_gateway(tmp_path, access=access) as gateway, Sink() as sink:
        api = api_of(gateway)
        (tmp_path / "token").write_text(tokens["viewer"] + "\n")
        with_file = ("--api", api, "--token-file", str(tmp_path / "token"))
        code, _, err = await ended(*with_file, "--forward", sink.url)
        assert (code, "expected a token of the role reader, got one of a viewer" in err) == (2, True), err
        code, _, err = await ended(*with_file, "body.a:1")
        assert (code, "expected the role reader to search by what bodies have" in err) == (2, True), err
        async with listening(*with_file, "--json") as listener:
            stored = await send(gateway, b"{}")
            assert (await listener.has(1))[0]["id"] == stored
        code, _, err = await ended("--api", api, GATEWAY_TOKEN="gwt_wrong")
        assert (code, "401: expected a token" in err) == (2, True), err
        async with listening("--api", api, "--forward", sink.url, GATEWAY_TOKEN=tokens["reader"]) as listener:
            await send(gateway, b"{}")
            await listener.has_lines(1)
            (tmp_path / "access.conf").write_text(access.split("\n")[0] + "\n")
            assert await asyncio.wait_for(listener.process.wait(), 90) == 2
        assert "401: expected a token" in listener.notes
        assert "Traceback" not in listener.notes


async def test_a_process_without_an_index_and_none_at_all_are_told(tmp_path: Path) -> None:
    async with a_gateway(tmp_path, index=False) as gateway:
        code, out, err = await ended("--api", api_of(gateway))
        assert (code, out) == (1, "")
        assert "503: the index isn't available: this process keeps none" in err
    (port,) = free_ports(1)
    code, _, err = await ended("--api", f"http://127.0.0.1:{port}")
    assert (code, f"error: http://127.0.0.1:{port}: connection refused\n") == (1, err)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--api", "nowhere"), "--api: expected a URL such as"),
        (("--forward", "localhost:3000"), "--forward: expected a URL such as"),
        (("--forward", "http://192.0.2.1:3000"), "--allow-host 192.0.2.1 sends there what people have sent"),
        (("--forward", "http://localhost.example/"), "expected an address of this machine"),
        (("--allow-host", "devbox"), "--allow-host: expected --forward"),
        (("--source", "a b"), "--source: expected the name of a source"),
        (("--token-file", "/dev/null"), "--token-file: /dev/null: expected a token"),
    ],
)
async def test_what_isnt_right_is_told(words: tuple[str, ...], told: str) -> None:
    code, out, err = await ended(*words)
    assert (code, out, told in err) == (2, "", True), err
