"""`gateway listen` beside a gateway with an index, as developers run it.

what crosses                              what has to come of it
────────────────────────────────────────  ────────────────────────────────────────────────
a gateway that is killed and started      each event once, once it is back
a receiver that fails, or is down         is told, and the next ones are sent
a source that is limited or redacted      what the token sees, masked
a viewer, a wrong token, no index         a clear end
"""

import asyncio
import gzip
import signal
import sys
from pathlib import Path

import orjson
import pytest

from tests.gateway_process import ROOT, GatewayProcess, free_ports
from tests.listen.listener import a_gateway, api_of, ended, listening, send
from tests.sink import Request, Sink

pytestmark = [pytest.mark.timeout(240), pytest.mark.rotated(share=1 / 5, group="listen")]
"""Each is some processes."""


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
        form = (("Content-Type", "application/x-www-form-urlencoded"),)
        packed = (("Content-Type", "application/json"), ("Content-Encoding", "gzip"))
        await send(gateway, b"card=4242424242424242&total=1", source="shop", headers=form)
        body = gzip.compress(b'{"card": "4242424242424242", "total": "1"}')
        await send(gateway, body, source="shop", headers=packed)
        await listener.has(3)
        for request in sink.requests[1:]:
            assert orjson.loads(request.body) == {"card": "[redacted]", "total": "1"}
            headers = {name.lower(): value for name, value in request.headers}
            assert headers[b"content-type"] == b"application/json"
            assert b"content-encoding" not in headers


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
        code, _, err = await ended("--api", api, GATEWAY_API_TOKEN="gwt_wrong")
        assert (code, "401: unknown token" in err) == (2, True), err
        async with listening("--api", api, "--forward", sink.url, GATEWAY_API_TOKEN=tokens["reader"]) as listener:
            await send(gateway, b"{}")
            await listener.has_lines(1)
            (tmp_path / "access.conf").write_text(access.split("\n")[0] + "\n")
            assert await asyncio.wait_for(listener.process.wait(), 90) == 2
        assert "401: unknown token" in listener.notes
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
