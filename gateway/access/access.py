"""Whose request it is at the admin address: of a token, of a person that a trusted proxy names, or of this machine."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path

import structlog
from aiohttp import web

from gateway.access.access_file import MAX_BYTES, MAX_NAME, AccessFileError, AccessList, Grant, read_access
from gateway.access.guesses import Guesses
from gateway.access.local_request import is_foreign, is_local
from gateway.access.principal import AccessError, AccessRole, Principal
from gateway.access.tokens import PREFIX, digest_of, is_equal, is_token
from gateway.rules.file_stamps import stamps_of
from gateway.rules.watch import Watch
from gateway.rules.yaml_document import reason_of
from gateway.settings import AccessSettings

LOOK_INTERVAL = 1.0
"""Seconds between looks at the access file: a change counts once two looks have found the same."""
LOOPBACK, TOKEN, IDENTITY_HEADER = "loopback", "token", "identity_header"
"""How it is known who makes a request."""
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="gateway"'}

logger = structlog.get_logger(__name__)


class Refusal(StrEnum):
    """Why a request is nobody's who may ask: a closed set, and a metric's label."""

    NO_CREDENTIALS = "no_credentials"
    NOT_LOCAL = "not_local"
    """Nobody is given access but who is on this machine, and it came from elsewhere."""
    BAD_TOKEN = "bad_token"  # noqa: S105 - a reason
    EXPIRED_TOKEN = "expired_token"  # noqa: S105 - a reason
    TOO_MANY_GUESSES = "too_many_guesses"
    FOREIGN_PAGE = "foreign_page"
    UNTRUSTED_PROXY = "untrusted_proxy"
    """It has the identity header, and didn't come from a proxy whose header counts."""
    BAD_IDENTITY = "bad_identity"
    UNKNOWN_PERSON = "unknown_person"


class Access:
    """Says who makes each request.

    Without an access file, everyone with an account on this machine is an operator, and nobody else has access.
    `refused` is called with why a request is nobody's.
    """

    def __init__(
        self,
        settings: AccessSettings | None = None,
        *,
        refused: Callable[[Refusal], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._settings = settings or AccessSettings()
        self._refused = refused
        self._clock = clock
        self._sleep = sleep
        self._list = AccessList()
        self._watch = Watch({})
        self._problem = ""
        self._guesses = Guesses()

    def load(self) -> None:
        """Read the access file, if there is one. Blocks; raises AccessFileError."""
        if self._settings.file is not None:
            stamps = stamps_of([self._settings.file])
            self._list = _read(self._settings.file)
            self._watch = Watch(stamps)

    def notes(self) -> Sequence[str]:
        """Return what is wrong with the access file, for `/readyz`: what it said before is in force."""
        return [f"access: {self._problem}"] if self._problem else []

    async def watch(self) -> None:
        """Read the access file whenever it changes, until cancelled. One that is invalid changes nothing."""
        file = self._settings.file
        if file is None:
            return
        while True:
            await self._sleep(LOOK_INTERVAL)
            stamps = await asyncio.to_thread(stamps_of, [file])
            if not self._watch.observe(stamps):
                continue
            self._watch.mark_read(stamps)
            try:
                self._list = await asyncio.to_thread(_read, file)
            except AccessFileError as error:
                self._problem = str(error).splitlines()[0]
                logger.error("access_file_refused", path=str(file), problems=str(error).splitlines()[:10])
            else:
                self._problem = ""
                tokens, people = len(self._list.tokens), len(self._list.people)
                logger.info("access_file_read", path=str(file), tokens=tokens, people=people)

    def principal_of(self, request: web.Request) -> Principal:
        """Return who makes a request. Raises AccessError, with a status, if nobody does who may."""
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        token = credential.strip()
        if scheme.lower() == "bearer" and token.startswith(PREFIX):
            return self._of_token(request, token)
        if (header := self._settings.identity_header) is not None and header in request.headers:
            return self._of_identity(request, request.headers.getall(header))
        if self._settings.is_configured:
            raise self._error(401, Refusal.NO_CREDENTIALS, "expected a token (Authorization: Bearer gwt_…), got none")
        return self._of_this_machine(request)

    def _of_token(self, request: web.Request, token: str) -> Principal:
        now = self._clock()
        if wait := self._guesses.seconds_to_wait(request.remote, now):
            headers = {"Retry-After": str(int(wait) + 1)}
            detail = "expected fewer wrong tokens from this address, got too many: wait"
            raise self._error(429, Refusal.TOO_MANY_GUESSES, detail, headers)
        grant = self._grant_of(token)
        if grant is None:
            self._guesses.add(request.remote, now)
            raise self._error(401, Refusal.BAD_TOKEN, "expected a token that is known here, got another")
        if grant.expires is not None and now >= grant.expires:
            raise self._error(401, Refusal.EXPIRED_TOKEN, f"expected a token that is good, got {grant.name}, expired")
        return _principal(grant, grant.name, TOKEN)

    def _grant_of(self, token: str) -> Grant | None:
        """Return what a token may. Takes as long for each token of the right form, whether and where it is listed."""
        if not is_token(token):
            return None
        digest, found = digest_of(token), None
        for grant in self._list.tokens:
            if is_equal(grant.digest, digest):
                found = grant
        return found

    def _of_identity(self, request: web.Request, values: Sequence[str]) -> Principal:
        if not self._is_trusted(request.remote):
            detail = "expected who it is from a trusted proxy, got it from another address"
            raise self._error(401, Refusal.UNTRUSTED_PROXY, detail)
        hosts = [request.headers.get("X-Forwarded-Host", ""), request.headers.get("Host", "")]
        if all(is_foreign(request.method, host, request.headers) for host in hosts):
            raise self._foreign()
        name = values[0].strip()
        if len(values) != 1 or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self._error(401, Refusal.BAD_IDENTITY, "expected one name of a person, got another value")
        grant = self._list.person(name)
        if grant is None:
            raise self._error(403, Refusal.UNKNOWN_PERSON, f"expected a person who is given access, got {name}")
        return _principal(grant, name, IDENTITY_HEADER)

    def _is_trusted(self, peer: str | None) -> bool:
        try:
            found = ip_address((peer or "").partition("%")[0])
        except ValueError:
            return False
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in self._settings.identity_proxies)

    def _of_this_machine(self, request: web.Request) -> Principal:
        host = request.headers.get("Host", "")
        if not is_local(request.remote, host, request.headers, (request.version.major, request.version.minor)):
            detail = "expected a request of a program on this machine, to its loopback address, got another"
            raise self._error(401, Refusal.NOT_LOCAL, detail)
        if is_foreign(request.method, host, request.headers):
            raise self._foreign()
        return Principal(name="local", role=AccessRole.OPERATOR, via=LOOPBACK)

    def _foreign(self) -> AccessError:
        detail = "expected a request of a page from this address, got one of another site's"
        return self._error(403, Refusal.FOREIGN_PAGE, detail)

    def _error(self, status: int, why: Refusal, detail: str, headers: dict[str, str] | None = None) -> AccessError:
        self._refused(why)
        return AccessError(status, detail, headers=_CHALLENGE if status == 401 else headers)  # noqa: PLR2004 - unauthorized


def _principal(grant: Grant, name: str, via: str) -> Principal:
    return Principal(name=name, role=grant.role, owners=grant.owners, sources=grant.sources, via=via)


def _read(file: Path) -> AccessList:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise AccessFileError(f"{file}: expected at most {MAX_BYTES >> 20} MiB, got more")
        return read_access(content.decode(), str(file))
    except OSError as error:
        raise AccessFileError(f"{file}: expected an access file, got: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise AccessFileError(f"{file}: expected UTF-8, got other bytes") from None
