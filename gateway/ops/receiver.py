"""The test receiver of `gateway receive`: shows what it gets, verifies it, and fails on demand."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from aiohttp import web
from rich.text import Text

from gateway.model import RefusedError
from gateway.ops.output import body_fields, json_line, rfc3339
from gateway.settings import Address
from gateway.telemetry.logs import printable
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier

MAX_BODY = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A received request. The names and ids are from the gateway's headers, None if it isn't from a gateway.

    `is_verified` is None without a secret. `size` is that of the body, in bytes; `answer` is the response's status.
    """

    at: float
    path: str
    route: str | None
    event: str | None
    delivery: str | None
    attempt: int | None
    is_verified: bool | None
    size: int
    answer: int
    body: bytes = b""

    def as_json(self) -> str:
        """Return one line, without its end; the body as text or, if it isn't text, in base64 as `body_base64`."""
        return json_line(
            {
                "at": rfc3339(self.at),
                "path": self.path,
                "route": self.route,
                "event_id": self.event,
                "delivery_id": self.delivery,
                "attempt": self.attempt,
                "verified": self.is_verified,
                "size": self.size,
                "status": self.answer,
                **body_fields(self.body),
            }
        )

    def as_text(self) -> Text:
        """Return one line for a terminal."""
        mark, colour = {True: ("✓", "green"), False: ("✗", "red"), None: ("-", "dim")}[self.is_verified]
        clock = time.strftime("%H:%M:%S", time.localtime(self.at)) + f".{int(self.at % 1 * 1000):03d}"
        return Text.assemble(
            (f"{clock}  ", "dim"),
            (f"{self.answer} ", "green" if self.answer < 300 else "red"),  # noqa: PLR2004 - above are the failures
            (f"{mark}  ", colour),
            (f"{printable(self.route or self.path):<24} ", "bold"),
            f"attempt {self.attempt or '-'}  {self.size:>8,} B  ",
            (printable(self.event or ""), "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )


class Receiver:
    """Responds to each request after `delay` seconds with the next status in `respond`; the last one repeats.

    `secrets` are Standard Webhooks' (`whsec_` and base64); `report` is called before the response is sent. Port 0 takes
    a free one: `port` is the actual one after the start. A context manager, or `start` and `close`. Raises OSError for
    a port in use.
    """

    def __init__(
        self,
        *,
        report: Callable[[Received], None],
        port: int = 0,
        respond: Sequence[int] = (200,),
        delay: float = 0.0,
        secrets: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.port = port
        self._report = report
        self._answers = list(reversed(respond))
        self._delay = delay
        scheme = {"scheme": "standard-webhooks", "secrets": list(secrets)}
        self._verifier = build_verifier(scheme) if secrets else None
        self._host = host
        self._closing = asyncio.Event()
        self._runner = web.ServerRunner(web.Server(self._receive, auto_decompress=False), shutdown_timeout=0.1)

    @property
    def url(self) -> str:
        return f"http://{Address(self._host, self.port)}/"

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self.port).start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        self._closing.set()
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _receive(self, request: web.BaseRequest) -> web.Response:
        at = time.time()
        body = await request.clone(client_max_size=MAX_BODY).read()
        answer = self._answers.pop() if len(self._answers) > 1 else self._answers[0]
        attempt = request.headers.get("gateway-attempt", "")
        self._report(
            Received(
                at=at,
                path=request.path,
                route=request.headers.get("gateway-route"),
                event=request.headers.get("gateway-event-id"),
                delivery=request.headers.get("gateway-delivery-id"),
                attempt=int(attempt) if attempt.isdecimal() else None,
                is_verified=self._is_verified(request, body, now=at),
                size=len(body),
                answer=answer,
                body=body,
            )
        )
        if self._delay:
            # A sender that disconnects doesn't end this, so closing does.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._delay):
                    await self._closing.wait()
        return web.Response(status=answer)

    def _is_verified(self, request: web.BaseRequest, body: bytes, *, now: float) -> bool | None:
        if self._verifier is None:
            return None
        path, _, query = request.raw_path.partition("?")
        sent = Request(method=request.method, path=path, query=query, headers=request.raw_headers, body=body)
        try:
            self._verifier.verify(sent, now=now)
        except RefusedError:
            return False
        return True
