"""An OpenTelemetry collector for tests: takes OTLP over HTTP, and keeps every span.

async with Collector() as collector:
    ...
    spans = await collector.received(lambda spans: len(spans) == 4)
"""

import asyncio
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A span as it came. `kind` is `server`, `producer`, `consumer` or `client`; `parent` is empty for a root."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    seconds: float
    is_error: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """A context manager; `url` is known inside of it. `status` is what it answers."""

    def __init__(self, status: int = 200) -> None:
        self.spans: list[Seen] = []
        self.status = status
        self.asked = 0
        self.bodies = b""
        self._has_come = asyncio.Event()
        self._runner: web.AppRunner
        self.url = ""

    async def received(self, is_enough: Callable[[Sequence[Seen]], bool], *, timeout: float = 15.0) -> list[Seen]:
        """Wait until the spans are enough, and return them."""
        async with asyncio.timeout(timeout):
            while not is_enough(self.spans):
                self._has_come.clear()
                await self._has_come.wait()
        return self.spans

    async def refused(self, times: int, *, timeout: float = 15.0) -> None:
        """Wait until so many requests have come in all."""
        async with asyncio.timeout(timeout):
            while self.asked < times:
                self._has_come.clear()
                await self._has_come.wait()

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body.startswith(b"\x1f\x8b"):
            body = gzip.decompress(body)
        if self.status == 200:
            self.bodies += body
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        self._has_come.set()
        return web.Response(status=self.status, content_type="application/x-protobuf")


def _spans(request: ExportTraceServiceRequest) -> list[Seen]:
    return [
        Seen(
            name=span.name,
            kind={2: "server", 3: "client", 4: "producer", 5: "consumer"}[span.kind],
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            state=span.trace_state,
            seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
            is_error=span.status.code == 2,
            attributes=_values(span.attributes),
            resource=_values(resource.resource.attributes),
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
