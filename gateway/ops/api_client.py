"""The API of a process, for commands: one client for all that they ask it, on a machine of their own.

Each answer is bounded in bytes and seconds. What isn't the API's, such as a proxy's page or a redirect to where people
sign in, is never taken for an answer. A token is in no message, and isn't sent where others could read it on the way.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from gateway.client.egress import is_of_this_machine
from gateway.model import GatewayError, UsageError, shown

BASE = "/api/v1"
TIMEOUT = 30.0
"""Seconds for an answer: each has its bounds, of ten seconds at most."""
CONNECT_TIMEOUT = 10.0
QUIET = 40.0
"""Seconds without a byte after which a tail counts as cut: the API says something every 15."""
MOST_READ = 16 << 20
"""Bytes of an answer, at most: an event has 2 MiB of a body, and a third more in base64."""
RETRY_WAIT, LONGEST_RETRY_WAIT = 0.5, 5.0
"""Seconds before a command without an answer is given again; the longest, if the API says how long."""
_ALWAYS_REFUSED = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_TEMPORARY = ("too_many_requests", "in_progress")
"""Codes of the API below 500 that may pass by themselves."""


class ApiRefusedError(UsageError):
    """Who asks is at fault: the token, its role, or what is asked. Asking again doesn't help.

    `code` is the API's own, "" if it isn't the API that refuses.
    """

    def __init__(self, text: str, *, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class ApiUnavailableError(GatewayError):
    """The process that is asked, or the way to it, is at fault. `code` is the API's own, "" if it isn't the API's.

    `retry_after` is in seconds, if the answer says when to ask again. `may_have_acted` is whether the API may have done
    what it was asked for, since its own answer is missing.
    """

    def __init__(self, text: str, *, code: str = "", retry_after: float = 0.0, may_have_acted: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after = retry_after
        self.may_have_acted = may_have_acted


class Tail(NamedTuple):
    """A tail that is open: what comes of it, and the process's time at its start (Unix seconds), None if not told."""

    pieces: AsyncIterator[bytes]
    began_at: float | None


class ApiClient:
    """Asks one process. A context manager. Each method raises ApiRefusedError and ApiUnavailableError."""

    def __init__(self, url: str, token: str | None, *, is_plain_allowed: bool = False) -> None:
        """Raises UsageError for an invalid URL, and for one of another machine without TLS, with a token.

        With `is_plain_allowed`, the token is sent there all the same.
        """
        address = _address(url)
        if token and address.scheme == "http" and not is_of_this_machine(address.host or "") and not is_plain_allowed:
            raise UsageError(
                f"--api: expected https, or an address of this machine, got {address}: the token could be read on the "
                "way; --plain-http sends it all the same"
            )
        self.url = str(address)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, *path: str, **parameters: str | int | bool | None) -> Mapping[str, Any]:
        """Return the object at a path, whose parts may have any characters. Parameters without a value are left out."""
        given = {name: _text(each) for name, each in parameters.items() if each}
        return await self._asked("GET", path, params=given)

    async def ask(self, *path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Return what is answered to a body that commands nothing."""
        return await self._asked("POST", path, json=body)

    async def command(self, *path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Give a command, once, though it may take two tries: both have one idempotency key.

        If the first had no answer, a refusal of the second is an ApiUnavailableError, too: it isn't about the first.
        """
        headers = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
        try:
            return await self._asked("POST", path, json=body, headers=headers)
        except ApiUnavailableError as error:
            first = error
        await asyncio.sleep(min(max(RETRY_WAIT, first.retry_after), LONGEST_RETRY_WAIT))
        try:
            return await self._asked("POST", path, json=body, headers=headers)
        except (ApiUnavailableError, ApiRefusedError) as error:
            may_have_acted = isinstance(error, ApiUnavailableError) and error.may_have_acted
            if not (first.may_have_acted or may_have_acted):
                raise
            told = f"{error}; perhaps the command is stored all the same, and then it is carried out"
            raise ApiUnavailableError(told, code=error.code, may_have_acted=True) from error

    async def pages(
        self, *path: str, limit: int | None = None, **parameters: str | int | bool | None
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the pages of a list, until it ends or they have so many items."""
        cursor: str | None = None
        stuck = 0
        while limit is None or limit > 0:
            most = MOST_ITEMS if limit is None else min(limit, MOST_ITEMS)
            page = await self.get(*path, limit=most, cursor=cursor, **parameters)
            yield page
            limit = None if limit is None else limit - len(page["items"])
            before, cursor = cursor, page["next_cursor"]
            if cursor is None:
                return
            stuck = stuck + 1 if cursor == before else 0  # what is cut short may have looked at nothing
            if stuck == MOST_STUCK:
                raise ApiUnavailableError(
                    f"{self.url}: expected a list that goes on, got the same page again and again"
                )

    @asynccontextmanager
    async def tail(self, query: str, after: int | None) -> AsyncIterator[Tail]:
        """Open the tail of the events that match a query, after a number, or from now on."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=QUIET)
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._translated():
            async with self._session.get(
                self._at(("tail",)), params={"query": query}, headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                await self._check(response)
                if response.content_type != "text/event-stream":
                    raise ApiUnavailableError(
                        f"{self.url}: expected the events of a gateway, got {response.content_type}"
                    )
                yield Tail(response.content.iter_any(), _date(response))

    async def now(self) -> float:
        """Return the time of the process (Unix seconds), to a second: what is asked of it counts by its clock.

        Without it nothing can be asked of the last hour: any other time would make that everything, or nothing.
        """
        with self._translated():
            async with self._request("GET", ("me",)) as response:
                await self._check(response)
                now = _date(response)
                if now is None:
                    raise ApiUnavailableError(
                        f"{self.url}: expected the header Date in its answer, got none: does a proxy take it out?"
                    )
                return now

    async def _asked(self, method: str, path: tuple[str, ...], **given: Any) -> Mapping[str, Any]:  # noqa: ANN401 - aiohttp's
        with self._translated():
            async with self._request(method, path, **given) as response:
                await self._check(response)
                found = await _object(response)
                if found is None:
                    got = f"{response.status} and something else"
                    raise ApiUnavailableError(
                        f"{self.url}: expected an answer of the API, got {got}", may_have_acted=True
                    )
                return found

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: tuple[str, ...],
        **given: Any,  # noqa: ANN401 - aiohttp's
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT, sock_connect=CONNECT_TIMEOUT)
        async with self._session.request(
            method, self._at(path), allow_redirects=False, timeout=timeout, **given
        ) as response:
            yield response

    def _at(self, path: tuple[str, ...]) -> URL:
        return URL("/".join([f"{self.url}{BASE}", *[quote(part, safe="") for part in path]]), encoded=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            told = f"{self.url}: expected an answer, got none in time"
            raise ApiUnavailableError(told, may_have_acted=_was_sent(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiUnavailableError(f"{self.url}: {_reason(error)}", may_have_acted=_was_sent(error)) from error

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise the error that an answer is, if it is one."""
        status = response.status
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            return
        problem = await _object(response) or {}
        code = str(problem.get("code", ""))
        detail = str(problem.get("detail") or response.reason or "")
        if status < HTTPStatus.BAD_REQUEST:
            detail += f": expected an answer of the API, got a redirect{_target(response)}, which isn't followed"
        text = "\n".join([f"{self.url}: {status}: {line}" for line in detail.splitlines() or [""]])
        is_final = status < HTTPStatus.INTERNAL_SERVER_ERROR and code not in ("", *_TEMPORARY)
        if status in _ALWAYS_REFUSED or is_final:
            raise ApiRefusedError(text, code=code)
        after = response.headers.get("Retry-After", "")
        raise ApiUnavailableError(
            text, code=code, retry_after=float(after) if after.isdecimal() else 0.0, may_have_acted=not code
        )


MOST_ITEMS = 200
"""Items of a page, at most, as the API has it."""
MOST_STUCK = 5
"""Pages in a row that don't get any further, at most."""


def _address(text: str) -> URL:
    """Return where a process is. Raises UsageError, without what may be a password in the text."""
    try:
        url = URL(text)
        address = url.origin()
        is_right = address.scheme in ("http", "https") and not (url.user or url.password)
        is_right &= url.path.rstrip("/") in ("", BASE) and not (url.query_string or url.fragment)
    except ValueError:
        is_right, address = False, URL()
    if not is_right:
        got = "one with a user or password" if "@" in text else shown(text)
        raise UsageError(f"--api: expected a URL such as http://127.0.0.1:9090, got {got}")
    return address


def _text(value: str | int | bool | None) -> str:  # noqa: FBT001 - a value
    return "true" if value is True else str(value)


def _target(response: aiohttp.ClientResponse) -> str:
    """Return where an answer redirects to, without what may be a secret of a sign-in; "" if nobody can say."""
    try:
        return f" to {URL(response.headers.get('Location', '')).origin()}"
    except ValueError:
        return ""


async def _object(response: aiohttp.ClientResponse) -> Mapping[str, Any] | None:
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


def _was_sent(error: Exception) -> bool:
    """Return whether a request without an answer may have been sent."""
    return not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


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


def _date(response: aiohttp.ClientResponse) -> float | None:
    """Return the time that an answer has, None if it has none."""
    try:
        return parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
    except ValueError:
        return None
