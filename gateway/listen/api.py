"""The API of a process, as a listener asks it: the live tail, and events byte for byte."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from gateway.listen.messages import MalformedStreamError
from gateway.model import GatewayError, UsageError

TIMEOUT = 30.0
"""Seconds for an answer."""
CONNECT_TIMEOUT = 10.0
QUIET = 40.0
"""Seconds without a byte after which a tail counts as cut: the API says something every 15."""
MOST_READ = 16 << 20
"""Bytes of an answer, at most: an event has 2 MiB of a body, and a third more in base64."""
_REFUSED = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class RefusedError(UsageError):
    """Who asks is at fault: the token, its role, or the query. Asking again doesn't help."""


class AwayError(GatewayError):
    """The process that is asked, or the way to it, is at fault. `code` is the API's own, "" if it isn't the API's.

    `retry_after` is in seconds, if the answer says when to ask again.
    """

    def __init__(self, text: str, *, code: str = "", retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after = retry_after


class Tail(NamedTuple):
    """A tail that is open: what comes of it, and the process's time at its start (Unix seconds), None if not told."""

    pieces: AsyncIterator[bytes]
    began_at: float | None


class Api:
    """Asks one process. A context manager. Each method raises RefusedError and AwayError."""

    def __init__(self, url: str, token: str | None) -> None:
        """Raises UsageError for an invalid URL."""
        try:
            address = URL(url).origin()
        except ValueError:
            address = URL()
        if address.scheme not in ("http", "https"):
            raise UsageError(f"--api: expected a URL such as http://127.0.0.1:9090, got {url!r}")
        self.url = str(address)
        self._base = f"{address}/api/v1"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, *path: str) -> Mapping[str, Any]:
        """Return the object at a path, whose parts may have any characters."""
        url = "/".join([self._base, *[quote(part, safe="") for part in path]])
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        with self._translated():
            async with self._session.get(URL(url, encoded=True), allow_redirects=False, timeout=timeout) as response:
                await self._check(response)
                found = await self._object(response)
                if found is None:
                    raise AwayError(f"{self.url}: expected an answer of the API, got something else")
                return found

    @asynccontextmanager
    async def tail(self, query: str, after: int | None) -> AsyncIterator[Tail]:
        """Open the tail of the events that match a query, after a number, or from now on."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=QUIET)
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._translated():
            async with self._session.get(
                f"{self._base}/tail", params={"query": query}, headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                await self._check(response)
                if response.content_type != "text/event-stream":
                    raise AwayError(f"{self.url}: expected the events of a gateway, got {response.content_type}")
                yield Tail(response.content.iter_any(), _date(response.headers.get("Date", "")))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise AwayError(f"{self.url}: expected an answer, got none in time") from error
        except MalformedStreamError as error:
            raise AwayError(f"{self.url}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise AwayError(f"{self.url}: {_reason(error)}") from error

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == HTTPStatus.OK:
            return
        problem = await self._object(response) or {}
        lines = str(problem.get("detail") or response.reason or "").splitlines() or [""]
        text = "\n".join([f"{self.url}: {response.status}: {line}" for line in lines])
        if response.status in _REFUSED:
            raise RefusedError(text)
        after = response.headers.get("Retry-After", "")
        raise AwayError(text, code=str(problem.get("code", "")), retry_after=float(after) if after.isdecimal() else 0.0)

    async def _object(self, response: aiohttp.ClientResponse) -> Mapping[str, Any] | None:
        """Return what an answer has; None if it isn't an object, or too large."""
        read = bytearray()
        async with asyncio.timeout(TIMEOUT):
            async for piece in response.content.iter_any():
                read += piece
                if len(read) > MOST_READ:
                    return None
        try:
            found = orjson.loads(bytes(read))
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


def _reason(error: Exception) -> str:
    """Return why there is no answer: aiohttp's own texts name its classes."""
    match error:
        case aiohttp.ClientConnectorError(os_error=ConnectionRefusedError()):
            return "connection refused"
        case aiohttp.ClientConnectorError(os_error=cause):
            return cause.strerror or str(cause)
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | ConnectionError():
            return "the connection was cut"
        case _:
            return str(error) or "no answer"


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None
