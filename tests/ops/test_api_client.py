"""How commands ask the API: what is an answer, what is none, and who sees the token.

what crosses                              what has to come of it
────────────────────────────────────────  ────────────────────────────────────────────────
a refusal, by the API or a proxy          an error of who asks, with the API's code
a failure that passes                     another error, with when to ask again
no answer to a command                    the same command again, once, under one key
no answer to anything else                an error
a redirect, a page, too much, too slow    no answer
another machine without TLS               no token goes there
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.cli import main
from gateway.model import UsageError
from gateway.ops import api_client
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError

TOKEN = "gwt_" + "s" * 40


class Api:
    """Answers each request by the next of its script, the last of which repeats."""

    def __init__(self, *script: Any) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self._script = list(script)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.raw_path, dict(request.headers), body))
        answer = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if callable(answer):
            found: web.StreamResponse = await answer(request)
            return found
        status, content = answer
        return web.Response(status=status, body=orjson.dumps(content), content_type="application/json")


@asynccontextmanager
async def asking(api: Api, token: str | None = TOKEN) -> AsyncIterator[ApiClient]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", api.serve)
    async with TestServer(application) as server, ApiClient(str(server.make_url("/")), token) as client:
        yield client


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(api_client, "LONGEST_RETRY_WAIT", 0.02)


def problem(code: str, detail: str = "expected a thing, got another") -> dict[str, str]:
    return {"code": code, "detail": detail}


async def cut(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def test_a_path_has_any_characters_and_parameters_without_a_value_are_left_out() -> None:
    api = Api((200, {"a": 1}))
    async with asking(api) as client:
        assert await client.get("events", "a/b@1 ü?", "raw", limit=3, query="", cursor=None, all=True) == {"a": 1}
    ((method, path, headers, _),) = api.requests
    assert (method, path) == ("GET", "/api/v1/events/a%2Fb%401%20%C3%BC%3F/raw?limit=3&all=true")
    assert headers["Authorization"] == f"Bearer {TOKEN}"


async def test_pages_follow_each_other_until_the_last_or_so_many_items() -> None:
    def api() -> Api:
        return Api(
            (200, {"items": [1, 2], "next_cursor": "c"}),
            (200, {"items": [], "next_cursor": "d"}),  # cut short
            (200, {"items": [3], "next_cursor": None}),
        )

    first = api()
    async with asking(first) as client:
        assert [item async for page in client.pages("x", source="a") for item in page["items"]] == [1, 2, 3]
    assert [path.partition("?")[2] for _, path, _, _ in first.requests] == [
        "limit=200&source=a",
        "limit=200&cursor=c&source=a",
        "limit=200&cursor=d&source=a",
    ]
    second = api()
    async with asking(second) as client:
        assert [item async for page in client.pages("x", limit=2) for item in page["items"]] == [1, 2]
    assert [path for _, path, _, _ in second.requests] == ["/api/v1/x?limit=2"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_query"),
        (401, "unauthenticated"),
        (403, "forbidden"),
        (404, "not_found"),
        (409, "conflict"),
        (413, "too_large"),
        (422, "key_reused"),
        (401, ""),
        (403, ""),
    ],
)
async def test_a_refusal_is_an_error_of_who_asks(status: int, code: str) -> None:
    content = problem(code, "one: expected a, got b\ntwo: expected c, got d") if code else {"message": "sign in"}
    api = Api((status, content))
    async with asking(api) as client:
        for ask in (client.get("me"), client.command("replays", body={})):
            with pytest.raises(ApiRefusedError) as caught:
                await ask
            assert caught.value.code == code
            if code:
                first, second = str(caught.value).splitlines()
                assert first == f"{client.url}: {status}: one: expected a, got b"
                assert second == f"{client.url}: {status}: two: expected c, got d"
            assert TOKEN not in str(caught.value)
    assert len(api.requests) == 2, "asked again, though that doesn't help"


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (503, problem("busy")),
        (500, problem("bug")),
        (429, problem("too_many_requests")),
        (409, problem("in_progress")),
        (502, "<html>"),
        (404, {"message": "no such service"}),
        (404, "page not found"),
    ],
)
async def test_what_may_pass_is_an_error_of_the_process_or_the_way_to_it(status: int, content: object) -> None:
    async with asking(Api((status, content))) as client:
        with pytest.raises(ApiUnavailableError, match=f"^{client.url}: {status}: "):
            await client.get("me")


async def test_it_is_told_when_to_ask_again() -> None:
    async def busy(_: web.Request) -> web.Response:
        return web.json_response(problem("busy"), status=503, headers={"Retry-After": "7"})

    async with asking(Api(busy)) as client:
        with pytest.raises(ApiUnavailableError) as caught:
            await client.get("me")
    assert (caught.value.code, caught.value.retry_after) == ("busy", 7.0)


@pytest.mark.parametrize("first", [cut, (503, problem("busy")), (409, problem("in_progress")), (200, "<html>")])
async def test_a_command_without_an_answer_is_given_again_once_under_one_key(first: Any) -> None:
    api = Api(first, (202, {"id": "replay/1"}))
    async with asking(api) as client:
        assert (await client.command("replays", body={"route": "a"}))["id"] == "replay/1"
        await client.command("replays", body={"route": "a"})
    keys = [headers["Idempotency-Key"] for _, _, headers, _ in api.requests]
    assert keys[0] == keys[1] != keys[2]
    assert {body for _, _, _, body in api.requests} == {b'{"route": "a"}'}
    api = Api(cut)
    async with asking(api) as client:
        with pytest.raises(ApiUnavailableError, match="the connection was cut"):
            await client.command("replays", body={})
    assert len(api.requests) == 2


@pytest.mark.parametrize(
    ("answer", "may_be_stored"),
    [(cut, True), ((502, {"message": "bad gateway"}), True), ((503, problem("log_unavailable")), False)],
)
async def test_a_command_without_any_answer_of_the_api_may_be_stored(answer: Any, *, may_be_stored: bool) -> None:
    async with asking(Api(answer)) as client:
        with pytest.raises(ApiUnavailableError) as caught:
            await client.command("replays", body={})
    assert ("perhaps the command is stored all the same" in str(caught.value)) is may_be_stored


async def test_a_command_that_reaches_nobody_isnt_stored() -> None:
    async with ApiClient("http://127.0.0.1:1", None) as client:
        with pytest.raises(ApiUnavailableError) as caught:
            await client.command("replays", body={})
    assert "perhaps" not in str(caught.value)


async def test_without_a_time_nothing_is_asked_that_needs_one() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        content = b'{"name":"ada"}'
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        assert isinstance(request.transport, asyncio.WriteTransport)
        request.transport.write(head.encode() + content)
        request.transport.close()
        return web.Response()

    async with asking(Api(answer)) as client:
        with pytest.raises(ApiUnavailableError, match="expected the header Date in its answer, got none"):
            await client.now()


async def test_what_commands_nothing_is_asked_once() -> None:
    """But for a GET on a connection that was cut, which aiohttp sends again by itself: it changes nothing."""
    api = Api(cut)
    async with asking(api) as client:
        for ask in (client.get("me"), client.ask("explain", body={})):
            with pytest.raises(ApiUnavailableError, match="the connection was cut"):
                await ask
    assert [method for method, _, _, _ in api.requests].count("POST") == 1
    assert not [headers for _, _, headers, _ in api.requests if "Idempotency-Key" in headers]


@pytest.mark.parametrize("content", [[1], "text", None, 7])
async def test_what_is_no_object_is_no_answer(content: object) -> None:
    async with asking(Api((200, content))) as client:
        with pytest.raises(ApiUnavailableError, match="expected an answer of the API, got 200 and something else"):
            await client.get("me")


async def test_an_answer_that_is_too_large_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "MOST_READ", 1000)
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100_000):
            await response.write(b" " * 1000)
            sent += 1
        return response

    async with asking(Api(endless)) as client:
        with pytest.raises(ApiUnavailableError, match="expected an answer of the API"):
            await client.get("me")
    assert sent < 50_000


async def test_an_answer_that_takes_too_long_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "TIMEOUT", 0.2)

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    async with asking(Api(drip)) as client:
        with pytest.raises(ApiUnavailableError, match="expected an answer, got none in time"):
            await client.get("me")


async def test_a_redirect_isnt_followed_and_gets_no_token() -> None:
    elsewhere = Api((200, {"token": "please"}))
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", elsewhere.serve)
    async with TestServer(application) as server:
        target = str(server.make_url("/login?state=secret"))

        async def redirect(_: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": target})

        async with asking(Api(redirect)) as client:
            with pytest.raises(ApiUnavailableError) as caught:
                await client.get("me")
    assert f"302: Found: expected an answer of the API, got a redirect to {target[:-19]}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert elsewhere.requests == []


async def test_the_time_is_the_processs() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({}, headers={"Date": "Tue, 01 Dec 2026 06:00:00 GMT"})

    async with asking(Api(answer)) as client:
        assert await client.now() == 1_796_104_800.0


@pytest.mark.parametrize(
    "url",
    [
        "nowhere",
        "ftp://gateway.internal",
        "http://",
        "http://gateway.internal/console",
        "https://gateway.internal?x=1",
        "http://gateway.internal:99999",
        "https://ada:a-password@gateway.internal",
    ],
)
async def test_an_address_that_isnt_right_is_told_without_a_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        ApiClient(url, None)
    assert str(caught.value).startswith("--api: expected a URL such as http://127.0.0.1:9090, got ")
    assert "a-password" not in str(caught.value)


async def test_an_address_may_have_the_path_of_the_api() -> None:
    for url in ("https://gateway.internal", "https://gateway.internal/", "https://gateway.internal/api/v1/"):
        async with ApiClient(url, TOKEN) as client:
            assert client.url == "https://gateway.internal"


async def test_a_token_isnt_sent_to_another_machine_without_tls() -> None:
    for url in ("http://gateway.internal:9090", "http://192.0.2.1", "http://localhost.example", "http://[2001:db8::1]"):
        with pytest.raises(UsageError) as caught:
            ApiClient(url, TOKEN)
        assert "expected https, or an address of this machine" in str(caught.value)
        assert TOKEN not in str(caught.value)
        async with ApiClient(url, None), ApiClient(url, TOKEN, is_plain_allowed=True):
            pass
    for url in ("http://127.0.0.1:9090", "http://[::1]:9090", "http://localhost", "https://gateway.internal"):
        async with ApiClient(url, TOKEN):
            pass


@pytest.mark.parametrize("command", [("events", "search", ""), ("listen",), ("dead", "list"), ("audit", "list")])
@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (("--token", TOKEN), {}, "--token: expected --token-file FILE, or the token in GATEWAY_API_TOKEN"),
        ((f"--token={TOKEN}",), {}, "--token: expected --token-file FILE, or the token in GATEWAY_API_TOKEN"),
        ((), {"GATEWAY_API_TOKEN": f"{TOKEN} {TOKEN}"}, "GATEWAY_API_TOKEN: expected a token"),
        ((), {"GATEWAY_API_TOKEN": TOKEN}, "--api: expected https, or an address of this machine"),
        (("--token-file", "/dev/null"), {"GATEWAY_API_TOKEN": TOKEN}, "--token-file: /dev/null: expected a token"),
        (("--token-file", "nowhere"), {}, "nowhere: expected a file, got: "),
    ],
)
def test_a_token_is_no_argument_and_in_no_message(  # noqa: PLR0917 - parameters and fixtures
    command: tuple[str, ...],
    words: tuple[str, ...],
    environ: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("GATEWAY_TOKEN", "GATEWAY_API_TOKEN", "GATEWAY_API"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main([*command, "--api", "http://gateway.internal", *words]) == 2
    out, err = capsys.readouterr()
    assert told in err
    assert TOKEN not in out + err


def test_the_log_wins_where_it_is_named_and_both_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_API", "http://127.0.0.1:1")
    assert main(["audit", "list"]) == 1
    assert "http://127.0.0.1:1: connection refused" in capsys.readouterr().err
    assert main(["audit", "list", "--log", "sqlite:///none.db"]) != 0
    assert "none.db" in capsys.readouterr().err
    assert main(["audit", "list", "--log", "sqlite:///none.db", "--api", "http://127.0.0.1:1"]) == 2
    assert "--api: expected none with --log" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("rejected", "list"), ("rejected", "show", "0@1")])
def test_what_the_api_doesnt_serve_is_told(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--api", "http://127.0.0.1:1"]) == 2
    assert "--api: expected none, since the API doesn't serve this command: " in capsys.readouterr().err
    monkeypatch.setenv("GATEWAY_API", "http://127.0.0.1:1")
    main([*command])
    assert "GATEWAY_API isn't asked: the API doesn't serve this command" in capsys.readouterr().err


async def test_a_list_that_doesnt_go_on_ends() -> None:
    api = Api((200, {"items": [], "next_cursor": "c"}))
    async with asking(api) as client:
        with pytest.raises(ApiUnavailableError, match="expected a list that goes on"):
            assert [page async for page in client.pages("x")] == []
    assert len(api.requests) == 6


def test_the_former_variable_isnt_read_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be somebody's own, such as a secret of the rules: so it ends nothing."""
    monkeypatch.delenv("GATEWAY_API_TOKEN", raising=False)
    monkeypatch.setenv("GATEWAY_TOKEN", TOKEN)
    assert main(["dead", "list", "--api", "http://127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("GATEWAY_TOKEN isn't read: a token for the API is in GATEWAY_API_TOKEN, or in --token-file\n")
    assert TOKEN not in err
