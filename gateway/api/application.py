"""The API as aiohttp serves it: who asks, what they ask for, and the answer, or a problem (RFC 9457)."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar, get_args

import orjson
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.access.access import Access
from gateway.access.principal import AccessError, AccessRole, Principal
from gateway.api.acts import KEY_PATTERN, LONGEST_KEY, Sent
from gateway.api.backend import Backend
from gateway.api.endpoint import BYTES, Endpoint
from gateway.api.endpoints import BASE, ENDPOINTS
from gateway.api.event_stream import EVENT_STREAM, stream
from gateway.api.json_shapes import Problems, ShapeError, read_shape, read_value
from gateway.api.openapi import JSON, OWN, PROBLEM, document
from gateway.api.problems import ApiError, Code
from gateway.api.shares import Shares
from gateway.api.tail import Tails
from gateway.model import shown
from gateway.telemetry.logs import traceback_of

S = TypeVar("S")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = Callable[[web.Request, Principal], Awaitable[web.StreamResponse]]
BODY_SECONDS = 10.0
AT_A_TIME = 64
"""Requests in progress; what is beyond them is refused, so that they can't take the memory of what is delivered."""
EACH = 32
"""Of these, at most, those of one principal."""
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "webhook-gateway",
    "X-Content-Type-Options": "nosniff",
}
"""Of each response. A browser shows none of them as a page, whatever a sender has put in an event."""
_ACCESS_CODES = {401: Code.UNAUTHENTICATED, 403: Code.FORBIDDEN, 429: Code.TOO_MANY_REQUESTS}


def add_api(application: web.Application, backend: Backend, access: Access, logger: FilteringBoundLogger) -> None:
    """Serve the API below `BASE` of an application."""
    api = _Api(backend, access, logger)
    application.router.add_route("GET", f"{BASE}{OWN}", api.own(orjson.dumps(document())))
    for endpoint in ENDPOINTS:
        application.router.add_route(endpoint.method, f"{BASE}{endpoint.path}", api.endpoint(endpoint))
    application.router.add_route("*", f"{BASE}/{{rest:.*}}", api.nothing())


class _Api:
    """Handles requests, so many at a time."""

    def __init__(self, backend: Backend, access: Access, logger: FilteringBoundLogger) -> None:
        self._backend = backend
        self._access = access
        self._logger = logger
        self._tails = Tails()
        self._shares = Shares()
        self._in_progress = 0

    def own(self, text: bytes) -> Handler:
        """Return the handler of the API's own document."""

        async def answer(_: web.Request, __: Principal) -> web.Response:
            return _bytes(text, JSON)

        return self._handler("getOpenApi", AccessRole.VIEWER, answer)

    def nothing(self) -> Handler:
        """Return the handler of what isn't there."""

        async def answer(request: web.Request, _: Principal) -> web.Response:
            if allowed := _allowed(request.rel_url.raw_path.removeprefix(BASE)):
                headers = {"Allow": ", ".join(sorted(allowed))}
                raise ApiError(Code.METHOD_NOT_ALLOWED, f"expected the method {headers['Allow']}", headers=headers)
            raise ApiError(Code.NOT_FOUND, f"expected a path of {BASE}{OWN}")

        return self._handler("nothing", AccessRole.VIEWER, answer)

    def endpoint(self, endpoint: Endpoint) -> Handler:
        """Return the handler of an endpoint."""

        async def answer(request: web.Request, principal: Principal) -> web.StreamResponse:
            given = arguments_of(endpoint, request)
            if endpoint.is_keyed:
                given["sent"] = Sent(_key(request), request.remote or "")
            if endpoint.body is not None:
                given["given"] = await _body(request, endpoint.body, endpoint.body_bytes)
            if endpoint.answer == EVENT_STREAM:
                return await self._stream(endpoint, request, principal, given)
            found = await endpoint.run(self._backend, principal, **given)
            if endpoint.answer == BYTES:
                return _bytes(found, BYTES, {"Content-Disposition": "attachment"})
            return _bytes(json_of(found), JSON, status=endpoint.status)

        return self._handler(endpoint.name, endpoint.role, answer)

    async def _stream(
        self, endpoint: Endpoint, request: web.Request, principal: Principal, given: dict[str, Any]
    ) -> web.StreamResponse:
        """Tell a listener what an endpoint yields."""
        if (last := request.headers.get("Last-Event-ID")) is not None:
            if not _INTEGER.fullmatch(last) or last.startswith("-"):
                raise ApiError(Code.INVALID_REQUEST, "Last-Event-ID: expected an id of this stream")
            given["after"] = int(last)

        def may_listen() -> bool:
            try:
                return self._access.principal_of(request) == principal
            except AccessError:
                return False

        with self._tails.place(principal):
            told = endpoint.run(self._backend, principal, **given)
            return await stream(request, told, HEADERS, may_listen, json_of)

    def _handler(self, name: str, role: AccessRole, answer: Answer) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if self._in_progress >= AT_A_TIME:
                return _problem(ApiError(Code.BUSY, f"at most {AT_A_TIME} requests at a time"))
            self._in_progress += 1
            try:
                principal = self._access.principal_of(request)
                if not principal.role.covers(role):
                    return _problem(ApiError(Code.FORBIDDEN, f"expected the role {role}, got {principal.role}"))
                with self._shares.place(principal, EACH, "requests"):
                    return await answer(request, principal)
            except AccessError as error:
                return _problem(ApiError(_ACCESS_CODES[error.status], error.detail, headers=error.headers))
            except ApiError as error:
                return _problem(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's alone
                self._logger.error("api_failed", operation=name, exception=traceback_of(error))
                return _problem(ApiError(Code.BUG, "a bug of the gateway: its log has more"))
            finally:
                self._in_progress -= 1

        return handle


def arguments_of(endpoint: Endpoint, request: web.Request) -> dict[str, Any]:
    """Return the parameters of a request, by name. Raises ApiError with all that is wrong with them."""
    given: dict[str, Any] = {}
    try:
        _add_arguments(given, endpoint, request)
    except ShapeError as error:
        raise ApiError(Code.INVALID_REQUEST, "\n".join(error.problems)) from error
    return given


def _add_arguments(given: dict[str, Any], endpoint: Endpoint, request: web.Request) -> None:
    problems = Problems()
    known = {each.name: each for each in endpoint.parameters}
    for name, text in [*request.match_info.items(), *request.query.items()]:
        parameter = known.get(name)
        if parameter is None:
            names = ", ".join([each.name for each in endpoint.parameters if each.place == "query"]) or "none"
            problems.add(f"{shown(name)}: unknown parameter; expected one of {names}")
        elif name in given:
            problems.add(f"{name}: expected one value, got several")
        else:
            try:
                given[name] = read_value(parameter.kind, _as_json(parameter.kind, text), name)
            except ShapeError as error:
                problems.add(*error.problems)
    problems.end()


def _as_json(kind: Any, text: str) -> object:  # noqa: ANN401 - any type
    """Return a parameter as JSON would have it, if it is written as it should be; else as it is, for the message."""
    plain = get_args(kind)[0] if get_args(kind) else kind
    if plain is int and _INTEGER.fullmatch(text):
        return int(text)
    if plain is bool and text in ("true", "false"):
        return text == "true"
    return text


_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)


def _key(request: web.Request) -> str | None:
    """Return the idempotency key of a request (draft-ietf-httpapi-idempotency-key-header). Raises ApiError."""
    keys = request.headers.getall("Idempotency-Key", [])
    if not keys:
        return None
    if len(keys) > 1 or len(keys[0]) > LONGEST_KEY or not re.fullmatch(KEY_PATTERN, keys[0]):
        expected = f"one key of at most {LONGEST_KEY} visible characters of ASCII"
        raise ApiError(Code.INVALID_REQUEST, f"Idempotency-Key: expected {expected}")
    return keys[0]


async def _body(request: web.Request, shape: type[S], most: int) -> S:
    """Read the body of a request, of so many bytes at most. Raises ApiError."""
    # A page of another site may have a browser post forms and text, but JSON only if it is asked for leave before.
    if request.content_type != JSON:
        raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE, f"expected a body of {JSON}")
    if "Content-Encoding" in request.headers:
        raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE, "expected a body without a Content-Encoding, got one with it")
    too_large = ApiError(Code.TOO_LARGE, f"expected a body of at most {most} bytes")
    if (request.content_length or 0) > most:
        raise too_large
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                read += piece
                if len(read) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(Code.INVALID_REQUEST, f"expected the body within {BODY_SECONDS:g} s") from None
    try:
        return read_shape(shape, orjson.loads(bytes(read)))
    except ValueError:
        raise ApiError(Code.INVALID_REQUEST, "body: expected JSON") from None
    except ShapeError as error:
        raise ApiError(Code.INVALID_REQUEST, "\n".join(error.problems)) from error


def json_of(answer: Any) -> bytes:  # noqa: ANN401 - any shape
    """Return a shape as JSON. What a sender has written in other bytes than UTF-8's is escaped."""
    try:
        return orjson.dumps(answer)
    except orjson.JSONEncodeError:
        return orjson.dumps(_escaped(asdict(answer)))


def _escaped(value: Any) -> Any:  # noqa: ANN401 - as JSON has it
    match value:
        case str():
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        case dict():
            return {_escaped(name): _escaped(each) for name, each in value.items()}
        case list() | tuple():
            return [_escaped(each) for each in value]
        case _:
            return value


def _bytes(
    body: bytes, content_type: str, headers: Mapping[str, str] | None = None, *, status: int = 200
) -> web.Response:
    return web.Response(body=body, status=status, headers={**HEADERS, "Content-Type": content_type, **(headers or {})})


def _problem(error: ApiError) -> web.Response:
    return _bytes(json_of(error.problem), PROBLEM, error.headers, status=error.status)


def _allowed(path: str) -> set[str]:
    """Return the methods of a path below `BASE`, none if there is no such path."""
    if path == OWN:
        return {"GET"}
    exact: set[str] = {each.method for each in ENDPOINTS if each.path == path}
    return exact or {each.method for each in ENDPOINTS if _pattern(each.path).fullmatch(path)}


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{[a-z]+\}", "[^/]+", path))
