"""The admin address: metrics, health and status of a process. It must not be reachable from outside."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry
from yarl import URL

from gateway.engine.unavailable_partitions import Unread, name_of
from gateway.log.base import Log, Partition
from gateway.model import LogNearlyFullError, LogUnavailableError
from gateway.ops.own_status import unread_statuses
from gateway.telemetry.metrics import Metrics, content_type_for, exposition

_LOOPBACK = ("127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")  # noqa: S104 - not to bind to: how such a listener is asked on its machine
_FROM_PROXIES = ("Forwarded", "X-Forwarded-For", "Via")
MAX_LINE = 64 << 10
"""Bytes of a request's line: a query of the API has 4,096 characters, each of up to 12 bytes, percent-encoded."""
PING_TIMEOUT = 2.0  # Kubernetes' probes time out after seconds; a log that hangs is an answer, too.


def admin_application(
    *,
    registry: CollectorRegistry,
    metrics: Metrics,
    log: Log,
    unready: Callable[[], str | None],
    unread: Callable[[], Mapping[Partition, Unread]] = dict,
    notes: Callable[[], Sequence[str]] = tuple,
    spools: Callable[[], bool] = lambda: False,
    status: Callable[[], Mapping[str, Any]] = dict,
    tokens: Callable[[], Mapping[str, Sequence[str]]] = dict,
    ping_timeout: float = PING_TIMEOUT,
    middlewares: Sequence[Middleware] = (),
) -> web.Application:
    """Return the application of the admin address: `/metrics`, `/livez`, `/readyz`, `/status`, `/handshakes`.

    `/livez` responds as long as the event loop runs. `/readyz` is 503, with the reason, if `unready` returns one
    (starting, draining), and while the log doesn't respond; it also updates `gateway_log_up`. Partitions that are
    `unread` are listed, but no reason: the rest is served, and no other process could read them either. Nor is a log
    that rejects only large events, or one that can't be used while the process `spools`. `notes` are other things to
    know. `/status` is what keeps deliveries from going out in this process, as JSON. `/handshakes` has the `tokens`
    that providers have sent for their operators, who are on this machine: no other address may ask, nor a page in a
    browser by another name of this one.
    """

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        metrics.event_loop_tasks.set(len(asyncio.all_tasks()))
        content_type = content_type_for(request.headers.get("Accept", ""))
        page = web.StreamResponse(headers={"Content-Type": content_type})
        with suppress(ConnectionError):  # a scraper that disconnects before the end
            await page.prepare(request)
            async for piece in exposition(registry, content_type):
                await page.write(piece)
            await page.write_eof()
        return page

    async def show_livez(_: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def show_readyz(_: web.Request) -> web.Response:
        reason = unready()
        reasons = [] if reason is None else [reason]
        all_notes = list(notes())
        if problem := await log_problem(log, ping_timeout):
            is_borne = isinstance(problem, LogNearlyFullError) or spools()
            (all_notes if is_borne else reasons).append(f"log: {problem}")
        metrics.log_up.set(0 if problem else 1)
        answer: dict[str, Any] = {"ready": not reasons, "reasons": reasons}
        if found := unread():
            answer["unread"] = [
                {
                    "topic": partition.topic,
                    "partition": name_of(partition),
                    "since": datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds"),
                    "reason": reason,
                }
                for partition, (since, reason) in sorted(found.items())
            ]
        if all_notes:
            answer["notes"] = all_notes
        return web.json_response(body=orjson.dumps(answer), status=503 if reasons else 200)

    async def show_status(_: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps({"unread": unread_statuses(unread()), **status()}))

    application = web.Application(middlewares=[closed_after_chunked, *middlewares])
    application.router.add_get("/metrics", show_metrics, allow_head=False)  # its response would have a body
    application.router.add_get("/livez", show_livez)
    application.router.add_get("/readyz", show_readyz)
    application.router.add_get("/status", show_status)
    application.router.add_get("/handshakes", partial(_show_handshakes, tokens))
    return application


def admin_runner(
    application: web.Application, *, close_timeout: float, ends_with_client: bool = False
) -> web.AppRunner:
    """Return what serves the admin address; a request in progress at its end has so many seconds.

    A compressed body isn't inflated: of one that no handler reads, aiohttp would do that all the same, without an end.
    """
    return web.AppRunner(
        application,
        access_log=None,
        auto_decompress=False,
        handle_signals=False,
        handler_cancellation=ends_with_client,
        logger=_logger,
        max_line_size=MAX_LINE,
        shutdown_timeout=close_timeout,
    )


def _is_ours(record: logging.LogRecord) -> bool:
    """Return whether a line of aiohttp's is about us: anybody could fill the log with their own malformed requests."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, web.RequestPayloadError))


_logger = logging.getLogger("gateway.ops.admin")
_logger.addFilter(_is_ours)


@web.middleware
async def closed_after_chunked(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close the connection after a chunked request: aiohttp takes its trailers for headers of the next one.

    Behind a proxy, that may be somebody else's (`gateway/ingress/trailers.py`). Few clients send such requests here.
    """
    if "Transfer-Encoding" not in request.headers:
        return await handler(request)
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.force_close()
        raise
    response.force_close()
    return response


async def _show_handshakes(tokens: Callable[[], Mapping[str, Sequence[str]]], request: web.Request) -> web.Response:
    if not is_of_this_machine(request):
        raise web.HTTPForbidden(text="expected a request from this machine, to its loopback address\n")
    return web.json_response(body=orjson.dumps({"tokens": tokens()}), headers={"Cache-Control": "no-store"})


def is_of_this_machine(request: web.Request) -> bool:
    """Return whether a program on this machine has sent a request, to its loopback address."""
    is_local = request.remote in _LOOPBACK and not any(name in request.headers for name in _FROM_PROXIES)
    return is_local and URL(f"http://{request.host}").host in {*_LOOPBACK, *_ANY, "localhost"}


async def log_problem(log: Log, timeout: float) -> LogUnavailableError | None:
    """Return why the log can't be used at the moment; None if it can."""
    try:
        async with asyncio.timeout(timeout):
            await log.ping()
    except TimeoutError:
        return LogUnavailableError(f"no answer within {timeout:g} s")
    except LogUnavailableError as error:
        return error
    return None
