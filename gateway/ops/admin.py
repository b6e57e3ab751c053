"""The admin address: what Prometheus and Kubernetes ask a process. Never to be reached from outside."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry

from gateway.engine.unavailable_partitions import Unread, name_of
from gateway.log.base import Log, Partition
from gateway.model import LogNearlyFullError, LogUnavailableError
from gateway.telemetry.metrics import Metrics, content_type_for, exposition

PING_TIMEOUT = 2.0  # Kubernetes' probes give up after a second or a few; a hanging log is an answer, too.


def admin_application(
    *,
    registry: CollectorRegistry,
    metrics: Metrics,
    log: Log,
    unready: Callable[[], str | None],
    unread: Callable[[], Mapping[Partition, Unread]] = dict,
    notes: Callable[[], Sequence[str]] = tuple,
    status: Callable[[], Mapping[str, Any]] = dict,
    ping_timeout: float = PING_TIMEOUT,
) -> web.Application:
    """Make the application of the admin address: `/metrics`, `/livez`, `/readyz`, `/status`.

    `/livez` answers as long as the event loop turns. `/readyz` is 503 for what `unready` says (starting, draining) and
    while the log doesn't answer, and says why; asking also refreshes `gateway_log_up`. What of the log is `unread` is
    told, and is no reason: the rest is served, and no other process could read it either. Nor is a log that refuses
    large events alone, for the same reason.
    `notes` say what else somebody should know of. `/status` is what keeps deliveries back in this process, as JSON.
    """

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        metrics.event_loop_tasks.set(len(asyncio.all_tasks()))
        content_type = content_type_for(request.headers.get("Accept", ""))
        page = web.StreamResponse(headers={"Content-Type": content_type})
        with suppress(ConnectionError):  # a scraper that doesn't wait for the end of it
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
        told = list(notes())
        if problem := await log_problem(log, ping_timeout):
            (told if isinstance(problem, LogNearlyFullError) else reasons).append(f"log: {problem}")
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
        if told:
            answer["notes"] = told
        return web.json_response(body=orjson.dumps(answer), status=503 if reasons else 200)

    async def show_status(_: web.Request) -> web.Response:
        found = [
            {"topic": partition.topic, "partition": partition.number, "since": since, "reason": reason}
            for partition, (since, reason) in sorted(unread().items())
        ]
        return web.json_response(body=orjson.dumps({**status(), "unread": found}))

    application = web.Application()
    application.router.add_get("/metrics", show_metrics, allow_head=False)  # the body would follow
    application.router.add_get("/livez", show_livez)
    application.router.add_get("/readyz", show_readyz)
    application.router.add_get("/status", show_status)
    return application


async def log_problem(log: Log, timeout: float) -> LogUnavailableError | None:
    """Return why the log is of no use at the moment, if it isn't."""
    try:
        async with asyncio.timeout(timeout):
            await log.ping()
    except TimeoutError:
        return LogUnavailableError(f"no answer within {timeout:g} s")
    except LogUnavailableError as error:
        return error
    return None
