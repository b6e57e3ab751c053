"""Whose request it is at the admin address: of a token, of a person that a trusted proxy names, or of this machine."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path

import structlog
from aiohttp import web

from gateway.access.access_file import MAX_NAME, AccessFileError, AccessList, Grant
from gateway.access.local_request import is_foreign, is_local
from gateway.access.principal import LOOPBACK, AccessError, AccessRole, Principal
from gateway.access.read_file import files_of, read_file
from gateway.access.throttle import Throttle
from gateway.access.tokens import PREFIX, digest_of, is_equal, is_token
from gateway.rules.file_stamps import Stamps, stamps_of
from gateway.rules.watch import Watch
from gateway.settings import AccessSettings

LOOK_INTERVAL = 1.0
"""Seconds between looks at the access file: a change counts once two looks have found the same."""
TOKEN, IDENTITY_HEADER = "token", "identity_header"
"""How it is known who makes a request, or else `LOOPBACK`."""
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
    BAD_SESSION = "bad_session"
    """A cookie that isn't ours: of another key, or changed."""
    SESSION_OVER = "session_over"
    """By its age, because nobody has used it, or because what it rests on is gone."""
    BAD_STATE = "bad_state"
    """Somebody came back from the identity provider whom this browser hasn't sent there, or too late, or twice."""
    BAD_ID_TOKEN = "bad_id_token"  # noqa: S105 - a reason
    PROVIDER_REFUSED = "provider_refused"
    PROVIDER_UNAVAILABLE = "provider_unavailable"


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
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings or AccessSettings()
        self._refused = refused
        self._clock = clock
        self._sleep = sleep
        self._environ = environ
        self._list = AccessList()
        self._files: Sequence[Path] = ()
        self._watch = Watch({})
        self._problem = ""
        self._wrong_tokens = Throttle()

    def load(self) -> None:
        """Read the access file, if there is one. Blocks; raises AccessFileError."""
        if self._settings.file is not None:
            stamps, found = self._read(self._settings.file)
            if isinstance(found, AccessFileError):
                raise found
            self._list, self._watch = found, Watch(stamps)

    @property
    def in_force(self) -> AccessList:
        """What the access file says, or said when it was last good."""
        return self._list

    @property
    def is_configured(self) -> bool:
        """Whether access is given by a file; otherwise everybody on this machine has it."""
        return self._settings.is_configured

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
            stamps = await asyncio.to_thread(stamps_of, self._files)
            if not self._watch.observe(stamps):
                continue
            read, found = await asyncio.to_thread(self._read, file)
            self._watch.mark_read(read)
            if isinstance(found, AccessFileError):
                self._problem = str(found).splitlines()[0]
                logger.error("access_file_refused", path=str(file), problems=str(found).splitlines()[:10])
            else:
                self._list = found
                self._problem = ""
                tokens, people = len(self._list.tokens), len(self._list.people)
                logger.info("access_file_read", path=str(file), tokens=tokens, people=people)

    def principal_of(self, request: web.Request) -> Principal:
        """Return who makes a request. Raises AccessError, with a status, if nobody does who may."""
        if (token := _token_in(request)) is not None:
            grant = self.grant_of_token(token, request.remote)
            return as_principal(grant, grant.name, TOKEN)
        if (header := self._settings.identity_header) is not None and header in request.headers:
            return self._of_identity(request, request.headers.getall(header))
        if self._settings.is_configured:
            raise self.refusal(401, Refusal.NO_CREDENTIALS, "expected a token (Authorization: Bearer gwt_…), got none")
        return self._of_this_machine(request)

    def has_credential(self, request: web.Request) -> bool:
        """Return whether a request says by itself who makes it: by a token, or by the header of a proxy."""
        header = self._settings.identity_header
        return _token_in(request) is not None or (header is not None and header in request.headers)

    def _read(self, file: Path) -> tuple[Stamps, AccessList | AccessFileError]:
        """Read the file, and the secrets that it names, with the stamps that they had before."""
        self._files = files_of(file)
        stamps = stamps_of(self._files)
        try:
            return stamps, read_file(file, self._environ)
        except AccessFileError as error:
            return stamps, error

    def grant_of_token(self, token: str, address: str | None) -> Grant:
        """Return what a token may that comes from an address. Raises AccessError; then a guess is counted."""
        now = self._clock()
        grant = self._grant_of(token)
        if grant is None:
            if wait := self._wrong_tokens.seconds_to_wait(address, now):
                headers = {"Retry-After": str(int(wait) + 1)}
                detail = "too many wrong tokens from this address: wait"
                raise self.refusal(429, Refusal.TOO_MANY_GUESSES, detail, headers)
            if is_token(token):
                self._wrong_tokens.add(address, now)
            raise self.refusal(401, Refusal.BAD_TOKEN, "unknown token")
        if grant.expires is not None and now >= grant.expires:
            raise self.refusal(401, Refusal.EXPIRED_TOKEN, f"expected a token that is good, got {grant.name}, expired")
        return grant

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
            raise self.refusal(401, Refusal.UNTRUSTED_PROXY, detail)
        hosts = [request.headers.get("X-Forwarded-Host", ""), request.headers.get("Host", "")]
        if all(is_foreign(request.method, host, request.headers) for host in hosts):
            raise self._foreign()
        name = values[0].strip()
        if len(values) != 1 or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self.refusal(401, Refusal.BAD_IDENTITY, "expected one name of a person")
        grant = self._list.person(name)
        if grant is None:
            raise self.refusal(403, Refusal.UNKNOWN_PERSON, f"expected a person who is given access, got {name}")
        return as_principal(grant, name, IDENTITY_HEADER)

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
            detail = "expected a request of a program on this machine, to its loopback address"
            raise self.refusal(401, Refusal.NOT_LOCAL, detail)
        if is_foreign(request.method, host, request.headers):
            raise self._foreign()
        return Principal(name="local", role=AccessRole.OPERATOR, via=LOOPBACK)

    def _foreign(self) -> AccessError:
        detail = "expected a request of a page from this address, got one of another site's"
        return self.refusal(403, Refusal.FOREIGN_PAGE, detail)

    def refusal(self, status: int, why: Refusal, detail: str, headers: Mapping[str, str] | None = None) -> AccessError:
        """Count a request of nobody who may ask, and return the error that says so."""
        self._refused(why)
        is_challenge = status == HTTPStatus.UNAUTHORIZED
        return AccessError(status, detail, reason=why, headers=_CHALLENGE if is_challenge else headers)


def _token_in(request: web.Request) -> str | None:
    """Return the token of ours that a request has, None if it has none."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    token = credential.strip()
    return token if scheme.lower() == "bearer" and token.startswith(PREFIX) else None


def as_principal(grant: Grant, name: str, via: str) -> Principal:
    """Return somebody with what they may."""
    return Principal(name=name, role=grant.role, owners=grant.owners, sources=grant.sources, via=via)
