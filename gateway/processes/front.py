"""The admin address of several processes: what each has of metrics, health and status, on one page of each.

What only one of them can answer, the API and the console, is passed on to the first: it has the index.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from math import isfinite
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from gateway.ops.admin import MAX_LINE, closed_after_chunked, is_of_this_machine
from gateway.processes.child import admin_of
from gateway.processes.metrics_page import ProcessState, metrics_page
from gateway.processes.peer import PEER, headers_of_peer
from gateway.telemetry.metrics import OPEN_METRICS, content_type_for

TIMEOUT = 8.0
"""Seconds that a child has for its metrics and its status: Prometheus waits for ten, unless it says otherwise."""
OF_SCRAPE = 0.8
"""Share of Prometheus's time for it: one that hangs must not take the page from all."""
HEALTH_TIMEOUT = 2.2
"""Seconds for its health: a log that doesn't respond is an answer after two, and our probe waits for 2.5."""
FIRST = 0
"""The child with the API, the console and the index."""
EVENT_STREAM = "text/event-stream"
SENT_AHEAD = 16 << 10
"""Bytes of a live tail that the system keeps for a listener that doesn't read: the child sees then that it is slow."""
_OF_ONE_CONNECTION = (
    *(hdrs.CONNECTION, hdrs.KEEP_ALIVE, hdrs.PROXY_AUTHENTICATE, hdrs.PROXY_AUTHORIZATION),
    *(hdrs.TE, hdrs.TRAILER, hdrs.TRANSFER_ENCODING, hdrs.UPGRADE, hdrs.EXPECT),
)
"""Headers that aren't passed on (RFC 9110, section 7.6.1): none by which anything is decided."""

Answer = tuple[int, bytes] | str
"""A child's status and body, or why there is none."""


class Front:
    """Asks the children of one parent. `states` are those that there should be."""

    def __init__(self, folder: Path, states: Callable[[], Sequence[ProcessState]]) -> None:
        self._folder = folder
        self._states = states
        self._sessions: dict[int, aiohttp.ClientSession] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect to whichever child is asked, until the end of the block."""
        async with AsyncExitStack() as stack:
            for each in self._states():
                self._sessions[each.number] = await stack.enter_async_context(
                    aiohttp.ClientSession(
                        connector=aiohttp.UnixConnector(str(admin_of(self._folder, each.number)), limit=0),
                        cookie_jar=aiohttp.DummyCookieJar(),
                        auto_decompress=False,
                        skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE),
                        timeout=aiohttp.ClientTimeout(total=None),
                        max_line_size=MAX_LINE,
                        max_field_size=MAX_LINE,
                    )
                )
            yield

    def application(self) -> web.Application:
        application = web.Application(middlewares=[closed_after_chunked])
        application.router.add_get("/metrics", self._show_metrics, allow_head=False)
        application.router.add_get("/livez", self._show_livez)
        application.router.add_get("/readyz", self._show_readyz)
        application.router.add_get("/status", self._show_status)
        application.router.add_get("/handshakes", self._show_handshakes)
        application.router.add_route("*", "/{rest:.*}", self._pass_on)
        return application

    async def _show_metrics(self, request: web.Request) -> web.Response:
        accept = request.headers.get(hdrs.ACCEPT, "")
        content_type = content_type_for(accept)
        answers = await self._ask("/metrics", {hdrs.ACCEPT: accept}, timeout=_scrape_timeout(request))
        pages = {number: each[1] for number, each in answers.items() if not isinstance(each, str) and _is_ok(each)}
        is_open = content_type.startswith(OPEN_METRICS)
        page = await asyncio.to_thread(metrics_page, pages, self._states(), is_open=is_open)
        return web.Response(body=page, headers={hdrs.CONTENT_TYPE: content_type})

    async def _show_livez(self, _: web.Request) -> web.Response:
        """Respond with 503 if the event loop of a child doesn't run; one that has ended is started again."""
        answers = await self._ask("/livez", timeout=HEALTH_TIMEOUT)
        running = {each.number for each in self._states() if each.is_ready}
        reasons = [_why(number, each) for number, each in answers.items() if number in running and not _is_ok(each)]
        return _json({"alive": not reasons, "reasons": reasons}, is_ok=not reasons)

    async def _show_readyz(self, _: web.Request) -> web.Response:
        answers = await self._ask("/readyz", timeout=HEALTH_TIMEOUT)
        found: dict[str, list[Any]] = {"reasons": [], "unread": [], "notes": []}
        is_ready = True
        for number, answer in answers.items():
            fields = _fields(answer)
            is_ready = is_ready and _is_ok(answer)
            if fields is None:
                found["reasons"].append(_why(number, answer))
                continue
            found["reasons"] += [f"process {number}: {each}" for each in fields.get("reasons", ())]
            found["notes"] += [f"process {number}: {each}" for each in fields.get("notes", ())]
            found["unread"] += [{**each, "process": number} for each in fields.get("unread", ())]
        more = {name: each for name, each in found.items() if each and name != "reasons"}
        return _json({"ready": is_ready, "reasons": found["reasons"], **more}, is_ok=is_ready)

    async def _show_status(self, _: web.Request) -> web.Response:
        """Respond with the status of each process, and what all of them have in common."""
        answers = await self._ask("/status", timeout=TIMEOUT)
        states = {each.number: each for each in self._states()}
        processes: list[Mapping[str, Any]] = []
        for number, answer in answers.items():
            more = {"process": number, "pid": states[number].pid, "restarts": states[number].restarts}
            fields = _fields(answer)
            problem = {"problem": {"reason": _reason(answer)}}
            processes.append({**(problem if fields is None else fields), **more})
        known = next((each for each in processes if "problem" not in each), None)
        if known is None:
            return _json({"processes": processes}, is_ok=False)
        common = {name: known.get(name) for name in ("version", "role", "log_names", "rules")}
        return _json({**common, "processes": [{"role": known.get("role"), **each} for each in processes]})

    async def _show_handshakes(self, request: web.Request) -> web.Response:
        if not is_of_this_machine(request):
            raise web.HTTPForbidden(text="expected a request from this machine, to its loopback address\n")
        answers = await self._ask("/handshakes", {PEER: "127.0.0.1", hdrs.HOST: "localhost"}, timeout=HEALTH_TIMEOUT)
        tokens: dict[str, list[str]] = {}
        for answer in answers.values():
            for source, found in (_fields(answer) or {}).get("tokens", {}).items():
                tokens.setdefault(source, []).extend(found)
        return web.json_response(body=orjson.dumps({"tokens": tokens}), headers={hdrs.CACHE_CONTROL: "no-store"})

    async def _ask(
        self, path: str, headers: Mapping[str, str] | None = None, *, timeout: float
    ) -> Mapping[int, Answer]:
        """Ask every child, all at once."""
        numbers = [each.number for each in self._states()]
        answers = await asyncio.gather(*[self._ask_one(number, path, headers or {}, timeout) for number in numbers])
        return dict(zip(numbers, answers, strict=True))

    async def _ask_one(self, number: int, path: str, headers: Mapping[str, str], timeout: float) -> Answer:
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._sessions[number].get(f"http://localhost{path}", headers=headers, timeout=limit) as answer:
                return answer.status, await answer.read()
        except TimeoutError:
            return f"no answer within {timeout:g} s"
        except (OSError, aiohttp.ClientError):
            return "not running" if self._states()[number].pid is None else "starting"

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """Have the first child answer, byte for byte, for as long as it takes: it may be a stream."""
        headers = _passed_on(request.headers)
        headers.update(headers_of_peer(request))
        body = request.content if request.can_read_body else None
        if body is not None and request.content_length is not None:
            headers[hdrs.CONTENT_LENGTH] = str(request.content_length)
        url = URL(f"http://localhost{request.raw_path}", encoded=True)
        response: web.StreamResponse | None = None
        try:
            async with self._sessions[FIRST].request(
                request.method, url, headers=headers, data=body, allow_redirects=False
            ) as answer:
                response = web.StreamResponse(
                    status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers)
                )
                if answer.content_length is not None:
                    response.content_length = answer.content_length
                if answer.content_type == EVENT_STREAM and request.transport is not None:
                    connection = request.transport.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_AHEAD)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (OSError, aiohttp.ClientError) as error:
            if response is None or not response.prepared:
                reason = (
                    f"process {FIRST} doesn't respond ({type(error).__name__}); it is started again if it has ended"
                )
                return web.Response(status=503, text=f"{reason}\n", headers={hdrs.RETRY_AFTER: "1"})
            if request.transport is not None:
                request.transport.abort()  # what has been sent isn't all of it
            return response


def _passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers that go through, in their order, with repeats.

    Also those that a sender's `Connection` names: a child decides by headers who asks, by those that its parent got.
    """
    found = CIMultiDict(headers)
    for name in (*_OF_ONE_CONNECTION, hdrs.CONTENT_LENGTH, PEER):
        found.popall(name, None)
    return found


def _scrape_timeout(request: web.Request) -> float:
    """Return the seconds for a page of metrics, by what Prometheus says of its own patience."""
    try:
        given = float(request.headers.get("X-Prometheus-Scrape-Timeout-Seconds", ""))
    except ValueError:
        return TIMEOUT
    return max(0.1, min(TIMEOUT, OF_SCRAPE * given)) if isfinite(given) else TIMEOUT


def _is_ok(answer: Answer) -> bool:
    return not isinstance(answer, str) and answer[0] == HTTPStatus.OK


def _fields(answer: Answer) -> Mapping[str, Any] | None:
    """Return the JSON that a child has answered with, None if that is none."""
    if isinstance(answer, str):
        return None
    try:
        found = orjson.loads(answer[1])
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _why(number: int, answer: Answer) -> str:
    return f"process {number}: {_reason(answer)}"


def _reason(answer: Answer) -> str:
    return answer if isinstance(answer, str) else f"HTTP {answer[0]}"


def _json(fields: Mapping[str, Any], *, is_ok: bool = True) -> web.Response:
    return web.json_response(body=orjson.dumps(fields), status=200 if is_ok else 503)
