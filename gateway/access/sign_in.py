"""People sign in with a token or through the identity provider, and are known by a session after that.

    sign-in page ──token──▶ in the access file? ─────────────────────────────────▶ session, sealed in a cookie
         └──identity provider──▶ sent there, with a cookie of this sign-in          ▲
                                        └──▶ back with a code ──▶ who? in the file? ─┘

A session is a sealed cookie, and no process keeps any: a table of them in memory would end with its process, would be
known to one process only, and would have to be bounded, so that strangers could evict others' sessions. The key is made
by each process when it starts, unless the access file names one. Where there is TLS, the cookie's name begins with
`__Host-`: no other host, and nothing without TLS, can set such a cookie. It is `SameSite=Lax`, since `Strict` ones
don't come with a request that the identity provider, or a link in a chat, has led to; cross-site requests (CSRF) are
prevented by `Sec-Fetch-Site`, `Origin`, and the tokens of forms.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from gateway.access.access import Access, Refusal, as_principal
from gateway.access.access_file import AccessList, Grant
from gateway.access.local_request import is_foreign, is_local
from gateway.access.oidc import Identity, IdTokenError, RefusedByProviderError, SignInError, StateError, state_in
from gateway.access.principal import AccessError, Principal
from gateway.access.sealed import NONCE_BYTES, Seal
from gateway.access.sessions import (
    AGE,
    FLOW_AGE,
    MAX_PATH,
    OIDC,
    TOKEN_SESSION,
    RevokedIds,
    Session,
    SignInFlow,
    binding_of_identity_provider,
    binding_of_token,
    decode_flow,
    decode_session,
    grant_of,
    kept_groups,
)
from gateway.access.sign_in_lines import Oidc
from gateway.access.throttle import Throttle, client_of
from gateway.model import immutable
from gateway.telemetry.log_quota import LogQuota

if TYPE_CHECKING:
    from gateway.access.identity_provider import IdentityProvider

SESSION, FLOW = "signed-in", "signing-in"
"""The cookies, without the prefix `__Host-`."""
LOG_INTERVAL = 10.0
"""Seconds over which the log lines of refusals are limited (`LogQuota`)."""
_NOT_HERE = "no identity provider is configured for this address"

logger = structlog.get_logger(__name__)


@immutable
class Place:
    """Where a browser sees the console: its origin, and how it is to keep cookies."""

    origin: str
    is_secure: bool

    def cookie(self, name: str) -> str:
        return f"__Host-{name}" if self.is_secure else name


@immutable
class Cookie:
    """A cookie for a browser to keep for so many seconds, or to delete if it is empty."""

    name: str
    value: str
    is_secure: bool
    max_age: float = 0.0

    def put_on(self, response: web.StreamResponse) -> None:
        if self.value:
            response.set_cookie(
                self.name,
                self.value,
                max_age=max(1, round(self.max_age)),
                path="/",
                secure=self.is_secure,
                httponly=True,
                samesite="Lax",
            )
        else:
            response.del_cookie(self.name, path="/", secure=self.is_secure, httponly=True, samesite="Lax")


@immutable
class Offer:
    """How somebody may sign in at a place: with a token, through the identity provider of that host (None: none)."""

    takes_tokens: bool
    identity_provider: str | None

    @property
    def is_any(self) -> bool:
        return self.takes_tokens or self.identity_provider is not None


class SignIn:
    """Signs people in and out, and knows those who are signed in. Without an `identity_provider`, by tokens alone.

    `on_sign_in` is called with how somebody has signed in.
    """

    def __init__(
        self,
        access: Access,
        *,
        identity_provider: "IdentityProvider | None" = None,
        on_sign_in: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._access = access
        self._identity_provider = identity_provider
        self._on_sign_in = on_sign_in
        self._clock = clock
        self._own_key = secrets.token_hex(32)
        self._seal: tuple[str, Seal] | None = None
        self._ended = RevokedIds()
        self._used = RevokedIds()
        self._attempts = Throttle()
        self._quota = LogQuota()
        self._quota_timer: asyncio.TimerHandle | None = None

    # Who somebody is.

    def principal_of(self, request: web.Request) -> Principal:
        """Return the principal of a page's request. Raises AccessError if that isn't known."""
        place = self.place_of(request)
        if place is None or self._access.has_credential(request) or place.cookie(SESSION) not in request.cookies:
            return self._access.principal_of(request)
        session = self._session(request, place)
        if session is None:
            detail = "this isn't a session of this gateway: sign in again"
            raise self._access.refusal(401, Refusal.BAD_SESSION, detail)
        now = self._clock()
        grant = None if session.is_over(now) or session.id in self._ended else grant_of(session, self._in_force, now)
        if grant is None:
            detail = "your session has ended: sign in again"
            raise self._access.refusal(401, Refusal.SESSION_OVER, detail)
        if self._is_foreign(request, place):
            detail = "expected a request of a page from this address, got one of another site's"
            raise self._access.refusal(403, Refusal.FOREIGN_PAGE, detail)
        return as_principal(grant, session.name, session.how)

    def renewal(self, request: web.Request) -> Cookie | None:
        """Return the cookie by which a session that is used goes on, None if its own is good for now."""
        place = self.place_of(request)
        session = None if place is None else self._session(request, place)
        now = self._clock()
        if place is None or session is None or session.id in self._ended or session.is_over(now):
            return None
        return self._session_cookie(place, session.with_seen_at(now)) if session.needs_renewal(now) else None

    def unchecked_session(self, request: web.Request) -> Session | None:
        """Return the session in a browser's cookie, good or not."""
        place = self.place_of(request)
        return None if place is None else self._session(request, place)

    # Where somebody may sign in.

    def is_secure(self, request: web.Request) -> bool:
        """Return whether a browser sees the console over TLS, as far as that is known."""
        place = self.place_of(request)
        return request.secure if place is None else place.is_secure

    def place_of(self, request: web.Request) -> Place | None:
        """Return where a browser sees the console, None where nobody signs in."""
        if not self._access.is_configured:
            return None
        host = request.headers.get("Host", "")
        if is_local(request.remote, host, request.headers, (request.version.major, request.version.minor)):
            scheme = "https" if request.secure else "http"
            return Place(origin=f"{scheme}://{host}".lower(), is_secure=request.secure)
        address = self._in_force.sign_in
        return None if address is None else Place(origin=address.origin, is_secure=address.is_secure)

    def offer(self, request: web.Request) -> Offer:
        """Return how somebody may sign in who asks for a page."""
        place = self.place_of(request)
        if place is None:
            return Offer(takes_tokens=False, identity_provider=None)
        idp = self._identity_provider_at(place)
        return Offer(
            takes_tokens=bool(self._in_force.tokens),
            identity_provider=None if idp is None else idp.host,
        )

    def identity_provider_logout_url(self) -> str:
        """Return where people end their session with the identity provider, "" if that isn't known."""
        idp = self._in_force.oidc
        return "" if idp is None or self._identity_provider is None else self._identity_provider.logout_url(idp)

    # Signing in and out.

    def with_token(self, request: web.Request, token: str) -> Cookie:
        """Return the cookie of a new session. Raises AccessError."""
        place = self._place_of_form(request)
        try:
            grant = self._access.grant_of_token(token, request.remote)
        except AccessError as error:
            raise self._told(request, error) from None
        now = self._clock()
        session = Session(
            id=secrets.token_urlsafe(16),
            how=TOKEN_SESSION,
            name=grant.name,
            binding=binding_of_token(grant),
            signed_in_at=now,
            seen_at=now,
        )
        self._record_sign_in(request, session, grant)
        return self._session_cookie(place, session)

    async def begin(self, request: web.Request, path: str) -> tuple[str, Cookie]:
        """Return where a browser is sent to sign in, and the cookie that it comes back with. Raises AccessError.

        `path` is the page that follows.
        """
        place = self._place_of_form(request)
        idp = self._identity_provider_at(place)
        if idp is None or self._identity_provider is None:
            raise self._failure(request, 403, Refusal.BAD_STATE, _NOT_HERE)
        flow = SignInFlow(
            state=secrets.token_urlsafe(32),
            nonce=secrets.token_urlsafe(32),
            code_verifier=secrets.token_urlsafe(48),
            return_path=path if len(path) <= MAX_PATH else "",
            binding=binding_of_identity_provider(idp),
            began_at=self._clock(),
        )
        try:
            address = await self._identity_provider.address(idp, flow, place.origin)
        except SignInError as error:
            raise self._failure(request, 503, Refusal.PROVIDER_UNAVAILABLE, str(error)) from error
        return address, self._cookie(place, FLOW, flow.encoded(), FLOW_AGE)

    async def finish(self, request: web.Request) -> tuple[str, Cookie]:
        """Return the page that follows, and the cookie of a new session, for the person who was sent back.

        Raises AccessError.
        """
        place, now = self.place_of(request), self._clock()
        idp = None if place is None else self._identity_provider_at(place)
        if place is None or idp is None or self._identity_provider is None:
            raise self._failure(request, 403, Refusal.BAD_STATE, _NOT_HERE)
        flow = self._flow(request, place, idp)
        client = client_of(request.remote, request.headers.getall("X-Forwarded-For", ()))
        if wait := self._attempts.seconds_to_wait(client, now):
            detail = "too many failed sign-ins from this address: wait"
            raise self._failure(request, 429, Refusal.TOO_MANY_GUESSES, detail, {"Retry-After": str(int(wait) + 1)})
        self._used.add(flow.state, flow.began_at + FLOW_AGE, now)
        try:
            identity = await self._identity_provider.identity(idp, flow, request.rel_url.raw_query_string, place.origin)
        except SignInError as error:
            refusal = self._refusal_of(request, error)
            if refusal.reason != Refusal.PROVIDER_UNAVAILABLE:  # its outage isn't a guess of the client's
                self._attempts.add(client, now)
            raise refusal from error
        return flow.return_path, self._admit(request, place, idp, identity)

    def sign_out(self, request: web.Request) -> Cookie | None:
        """End the session of a browser, and return what deletes its cookie."""
        place, session = self.place_of(request), self.unchecked_session(request)
        if place is None or session is None:
            return None
        self._end(session)
        logger.info("signed_out", who=session.name, via=session.how, address=request.remote or "")
        return Cookie(name=place.cookie(SESSION), value="", is_secure=place.is_secure)

    def forget_flow(self, request: web.Request) -> Cookie | None:
        """Return what deletes the cookie of a sign-in that is over, one way or the other."""
        place = self.place_of(request)
        if place is None or place.cookie(FLOW) not in request.cookies:
            return None
        return Cookie(name=place.cookie(FLOW), value="", is_secure=place.is_secure)

    def _end(self, session: Session) -> None:
        self._ended.add(session.id, session.signed_in_at + AGE, self._clock())

    def _admit(self, request: web.Request, place: Place, idp: Oidc, identity: Identity) -> Cookie:
        access, now = self._in_force, self._clock()
        grant = access.person(identity.name, identity.groups)
        if grant is None:
            left_out = ": the identity provider has left out their groups, as there are too many"
            detail = f"expected a person who is given access, got {identity.name}"
            detail += left_out if identity.are_groups_left_out else ""
            raise self._failure(request, 403, Refusal.UNKNOWN_PERSON, detail)
        session = Session(
            id=secrets.token_urlsafe(16),
            how=OIDC,
            name=identity.name,
            binding=binding_of_identity_provider(idp),
            groups=kept_groups(access.known_groups(identity.groups)),
            signed_in_at=now,
            seen_at=now,
        )
        self._record_sign_in(request, session, grant)
        return self._session_cookie(place, session)

    def _flow(self, request: web.Request, place: Place, idp: Oidc) -> SignInFlow:
        """Return the sign-in that an answer belongs to. Raises AccessError."""
        flow = decode_flow(self._opened(place, FLOW, request))
        problem = ""
        if flow is None:
            problem = "got none: sign in again"
        elif flow.is_over(self._clock()) or flow.binding != binding_of_identity_provider(idp):
            problem = "got one that has ended: sign in again"
        elif state_in(request.rel_url.raw_query_string) != flow.state:
            problem = "got another's: sign in again"
        elif flow.state in self._used:
            problem = "got one that is over: sign in again"
        if problem or flow is None:
            raise self._failure(
                request, 403, Refusal.BAD_STATE, f"expected a sign-in that this browser has begun, {problem}"
            )
        return flow

    def _place_of_form(self, request: web.Request) -> Place:
        """Return where a browser sees the page that it signs in on. Raises AccessError for a cross-site request."""
        place = self.place_of(request)
        if place is None:
            needed = "a line sign-in in the access file" if self._access.is_configured else "an access file"
            detail = f"nobody signs in at this address without {needed}"
            raise self._failure(request, 403, Refusal.NOT_LOCAL, detail)
        origin = request.headers.get("Origin")
        if is_foreign("POST", place.origin.partition("://")[2], request.headers) or origin not in (None, place.origin):
            detail = f"expected a page at {place.origin}, got one at another address"
            raise self._failure(request, 403, Refusal.FOREIGN_PAGE, detail)
        return place

    def _identity_provider_at(self, place: Place) -> Oidc | None:
        """Return the identity provider, if it sends people back to this place."""
        address = self._in_force.sign_in
        if self._identity_provider is None or address is None or address.origin != place.origin:
            return None
        return self._in_force.oidc

    def _is_foreign(self, request: web.Request, place: Place) -> bool:
        # A proxy may pass on another host; a browser sends the one that it sees.
        hosts = [place.origin.partition("://")[2], request.headers.get("Host", "")]
        return all(is_foreign(request.method, host, request.headers) for host in hosts)

    # Cookies.

    @property
    def _in_force(self) -> AccessList:
        return self._access.in_force

    def _session(self, request: web.Request, place: Place) -> Session | None:
        return decode_session(self._opened(place, SESSION, request))

    def _opened(self, place: Place, name: str, request: web.Request) -> bytes | None:
        cookie = place.cookie(name)
        return self._sealer.open(cookie, request.cookies.get(cookie, ""))

    def _session_cookie(self, place: Place, session: Session) -> Cookie:
        return self._cookie(place, SESSION, session.encoded(), session.signed_in_at + AGE - self._clock())

    def _cookie(self, place: Place, name: str, content: bytes, max_age: float) -> Cookie:
        cookie = place.cookie(name)
        sealed = self._sealer.close(cookie, content, secrets.token_bytes(NONCE_BYTES))
        return Cookie(name=cookie, value=sealed, is_secure=place.is_secure, max_age=max_age)

    @property
    def _sealer(self) -> Seal:
        address = self._in_force.sign_in
        key = (address.key if address is not None else "") or self._own_key
        if self._seal is None or self._seal[0] != key:
            self._seal = key, Seal(key.encode())
        return self._seal[1]

    # What is recorded.

    def _record_sign_in(self, request: web.Request, session: Session, grant: Grant) -> None:
        if (former := self.unchecked_session(request)) is not None:
            self._end(former)
        self._on_sign_in(session.how)
        logger.info("signed_in", who=session.name, via=session.how, role=grant.role.value, address=request.remote or "")

    def _refusal_of(self, request: web.Request, error: SignInError) -> AccessError:
        match error:
            case StateError():
                return self._failure(request, 403, Refusal.BAD_STATE, str(error))
            case IdTokenError():
                return self._failure(request, 403, Refusal.BAD_ID_TOKEN, str(error))
            case RefusedByProviderError():
                return self._failure(request, 403, Refusal.PROVIDER_REFUSED, str(error))
            case _:
                return self._failure(request, 503, Refusal.PROVIDER_UNAVAILABLE, str(error))

    def _failure(
        self, request: web.Request, status: int, why: Refusal, detail: str, headers: dict[str, str] | None = None
    ) -> AccessError:
        """Return why a sign-in fails, counted and logged."""
        return self._told(request, self._access.refusal(status, why, detail, headers))

    def _told(self, request: web.Request, error: AccessError) -> AccessError:
        if self._quota_timer is None:
            self._quota_timer = asyncio.get_running_loop().call_later(LOG_INTERVAL, self._tell_suppressed)
        if self._quota.take("", error.reason):
            logger.warning("sign_in_refused", reason=error.reason, detail=error.detail, address=request.remote or "")
        return error

    def _tell_suppressed(self) -> None:
        self._quota_timer = None
        for _, reason, count in self._quota.next_window():
            logger.info("lines_suppressed", source="", reason=reason, count=count)
